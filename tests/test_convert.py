"""The command timm-evovit convert: what it writes, what it refuses, and the download."""
import argparse
import inspect
import json
import os
import pickle
import re
import sys
import types
from importlib.metadata import entry_points
from pathlib import Path, PurePosixPath

import pytest
import timm
import torch
from helpers import assert_same_weights, authors_names, build
from safetensors.torch import load_file, save_file

import timm_evovit
from timm_evovit.hub import PUBLISHED
from timm_evovit.tools.cli import main
from timm_evovit.tools.load import read_weights

TINY = dict(img_size=32, patch_size=8, embed_dim=24, num_heads=3, mlp_ratio=2)
TINY_LEVIT = dict(img_size=64, embed_dim=(16, 24, 32), key_dim=4, num_heads=(2, 3, 4), depth=(4, 2, 2))


def authors_checkpoint(weights, ema=None):
    """What the authors' training loop saves."""
    return {
        'model': weights, 'model_ema': ema, 'epoch': 299, 'lr_scheduler': {'t_in_epochs': True},
        'optimizer': {'state': {0: {'step': 3, 'exp_avg': torch.zeros(2)}}, 'param_groups': [{'lr': 1e-3}]},
        'args': argparse.Namespace(lr=5e-4, model='evo_deit', nested=argparse.Namespace(epochs=300))}


@pytest.fixture
def deit(tmp_path):
    """A model, and the authors' file of its weights, whose moving average is twice as large."""
    model = build('evo_deit_tiny', **TINY)
    weights = authors_names(model)
    torch.save(authors_checkpoint(weights, {k: 2 * v for k, v in weights.items()}), tmp_path / 'authors.pth')
    return model, tmp_path / 'authors.pth'


@pytest.fixture
def run(tmp_path, capsys):
    """Run the command, and see that a failure leaves nothing behind. Returns exit status and output."""
    def run(name, *args, kwargs=TINY, output='out'):
        before = {p for p in tmp_path.iterdir() if p.name != 'hub'}
        options = (f'{k}={v}'.replace(' ', '') for k, v in kwargs.items())
        status = main(['convert', name, *map(str, args), '--output', str(tmp_path / output), '--model-kwargs', *options])
        out, err = capsys.readouterr()
        if status:
            assert {p for p in tmp_path.iterdir() if p.name != 'hub'} == before
            assert 'timm-evovit: ' in err and 'Traceback' not in err
        return status, out + err
    return run


def load(folder):
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


def test_deit(deit, run, tmp_path):
    model, path = deit
    output = tmp_path / 'new' / 'folder'
    status, out = run('evo_deit_tiny', path, output=output)
    assert status == 0 and 'dropped' not in out
    assert f'authors.pth: {len(model.state_dict()) + 24} tensors' in out
    assert f'{output}: {len(load_file(output / "model.safetensors"))} tensors' in out
    assert sorted(p.name for p in output.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    assert [p.name for p in output.parent.iterdir()] == ['folder']
    loaded = load(output)
    assert_same_weights(model, loaded)
    x = torch.randn(2, 3, 32, 32)
    assert loaded.num_classes == 10 and torch.equal(loaded(x), model(x))
    card = (output / 'README.md').read_text()
    assert 'license: mit' in card and 'authors.pth' in card
    assert '72.0' not in card, 'these are not the published weights'
    config = json.loads((output / 'config.json').read_text())
    assert config['architecture'] == 'evo_deit_tiny_patch16_224' and 'num_classes' not in config['model_args']

    status, out = run('evo_deit_tiny', path, output=output)
    assert status == 1 and 'remove it or name another' in out
    assert_same_weights(model, load(output))


def test_levit(run, tmp_path):
    model, path = build('evo_levit_128s', **TINY_LEVIT), tmp_path / 'levit.pth'
    torch.save(authors_checkpoint(authors_names(model)), path)
    status, out = run('evo_levit_128s', path, kwargs=TINY_LEVIT)
    assert status == 0 and f'{len(read_weights(path))} tensors' in out and 'dropped' not in out
    assert_same_weights(model, load(tmp_path / 'out'))
    status, out = run('evo_levit_128s', path, kwargs=dict(TINY_LEVIT, tradeoff=0.5), output='fixed')
    assert status == 0 and 'dropped, as the model has none: tradeoff' in out


def test_moving_average(deit, run, tmp_path):
    (tmp_path / 'out').mkdir()  # an empty folder is as good as none
    assert run('evo_deit_tiny', deit[1], '--use-ema')[0] == 0
    assert torch.equal(load(tmp_path / 'out').head_cls.weight, 2 * deit[0].head_cls.weight)
    torch.save({'model': authors_names(deit[0])}, tmp_path / 'plain.pth')
    assert 'under model_ema or state_dict_ema' in run('evo_deit_tiny', tmp_path / 'plain.pth', '--use-ema', output='b')[1]


def test_arguments_of_the_model(deit, run, tmp_path):
    status, out = run('evo_deit_tiny', deit[1], kwargs=dict(TINY, assisted_cls=False, keep_ratio=0.7))
    assert status == 0 and 'dropped, as the model has none: norm_cls.weight, norm_cls.bias, head_cls.weight' in out
    loaded = load(tmp_path / 'out')
    assert loaded.head_cls is None and set(loaded.keep_ratio) == {0.7}


def test_the_published_sizes(run, tmp_path, monkeypatch):
    """No arguments but the name; only with the authors' own file is the top-1 of the paper in configuration and card."""
    model = timm.create_model('evo_deit_tiny')
    torch.save(authors_checkpoint(authors_names(model)), tmp_path / 'a.pth')
    monkeypatch.setattr('timm_evovit.tools.convert._download', lambda name: tmp_path / 'a.pth')
    assert run('evo_deit_tiny', kwargs={})[0] == 0
    loaded = load(tmp_path / 'out')
    assert_same_weights(model, loaded)
    assert loaded.global_pool == 'avg' and '72.0' in loaded.pretrained_cfg['notes'][0]
    assert '72.0 %' in (tmp_path / 'out' / 'README.md').read_text()
    assert run('evo_deit_tiny', tmp_path / 'a.pth', kwargs={}, output='a')[0] == 0
    card = (tmp_path / 'a' / 'README.md').read_text()
    assert '72.0' not in card and 'license: mit' in card and 'notes' not in load(tmp_path / 'a').pretrained_cfg


def test_a_checkpoint_of_timms_train_script(deit, run, tmp_path):
    """Of a compiled model; nobody knows who trained it."""
    state = {'_orig_mod.' + k: v for k, v in deit[0].state_dict().items()}
    args = argparse.Namespace(lr=5e-4)
    torch.save({'state_dict': state, 'optimizer': {}, 'args': args, 'metric': 71.3}, tmp_path / 'last.pth.tar')
    assert run('evo_deit_tiny', tmp_path / 'last.pth.tar')[0] == 0
    assert_same_weights(deit[0], load(tmp_path / 'out'))
    cfg = json.loads((tmp_path / 'out' / 'config.json').read_text())['pretrained_cfg']
    assert not cfg.keys() & {'tag', 'license', 'origin_url'}, 'these are not the weights of the authors'
    assert 'license: unknown' in (tmp_path / 'out' / 'README.md').read_text()


class Runs:
    """Code that a plain unpickler would run."""
    def __reduce__(self):
        return os.mkdir, ('it_was_run',)


@pytest.mark.parametrize('write, message', [
    (lambda f, ck: torch.save({**ck, 'x': Runs()}, f), r'GLOBAL (posix|nt)\.mkdir\. No code in it was run'),
    (lambda f, ck: pickle.dump(Runs(), f, protocol=4), 'is damaged, or holds more than'),
    (lambda f, ck: torch.save({**ck, 'x': PurePosixPath('a')}, f), r'GLOBAL pathlib\S*PurePosixPath'),
    (lambda f, ck: torch.save(list(ck.values()), f), 'no dict of tensors under model or state_dict, it holds a list'),
    (lambda f, ck: torch.save({'optimizer': {}, 'epoch': 3}, f), 'no dict of tensors under .* holds optimizer, epoch'),
    (lambda f, ck: torch.save({'model': {'a': 3}}, f), 'no dict of tensors under .* holds model'),
    (lambda f, ck: f.write(b'no checkpoint at all'), 'is damaged'),
])
def test_what_is_no_checkpoint(deit, run, tmp_path, monkeypatch, write, message):
    monkeypatch.chdir(tmp_path)
    with open('bad.pth', 'wb') as f:
        write(f, torch.load(deit[1], weights_only=False))
    status, out = run('evo_deit_tiny', 'bad.pth')
    assert status == 1 and re.search(message, out, re.DOTALL), out
    assert 'bad.pth' in out and 'weights_only' not in out and not Path('it_was_run').exists()
    assert run('evo_deit_tiny', 'nothing.pth')[0] == run('evo_deit_tiny', '.')[0] == 1


def test_half_a_checkpoint(deit, tmp_path):
    checkpoint = torch.load(deit[1], weights_only=False)
    torch.save(checkpoint, tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    save_file({k: v.contiguous() for k, v in checkpoint['model'].items()}, tmp_path / 'a.safetensors')
    for path in (deit[1], tmp_path / 'old.pth', tmp_path / 'a.safetensors'):
        assert len(read_weights(path)) == len(checkpoint['model'])
        content = path.read_bytes()
        for part in (0.02, 0.99):
            path.write_bytes(content[:int(part * len(content))])
            with pytest.raises(ValueError, match=f'{path.name} is damaged'):
                read_weights(path)


@pytest.mark.parametrize('name, kwargs, message', [
    ('evo_deit_tiny', dict(TINY, img_size=48), r'size mismatch for pos_embed'),
    ('evo_deit_tiny', dict(TINY, depth=11), r'Unexpected key.*blocks\.11'),
    ('evo_levit_128s', TINY_LEVIT, 'size mismatch for cls_token'),
    ('deit_tiny_patch16_224', {}, "must be an Evo-DeiT or Evo-LeViT, got 'deit_tiny"),
    ('evo_deit_tiny', dict(TINY, keep_ratio=3), 'keep_ratio'),
    ('evo_levit_128_384', {}, "A published model must be one of .* got 'evo_levit_128_384'"),
])
def test_the_wrong_model(deit, run, name, kwargs, message):
    """Nothing is dropped, resampled or replaced."""
    path = () if 'published' in message else (deit[1],)
    status, out = run(name, *path, kwargs=kwargs)
    assert status == 1 and re.search(message, out, re.DOTALL), out


@pytest.mark.parametrize('error, wanted', [(KeyboardInterrupt, (130, 'interrupted')), (OSError('full'), (1, 'full'))])
def test_a_write_that_fails_leaves_nothing(deit, run, monkeypatch, error, wanted):
    def write_half(model, folder, **kwargs):
        Path(folder).mkdir()
        Path(folder, 'model.safetensors').write_bytes(b'half')
        raise error

    monkeypatch.setattr('timm_evovit.tools.convert.save_for_hf', write_half)
    status, out = run('evo_deit_tiny', deit[1])
    assert status == wanted[0] and wanted[1] in out


def test_the_command_is_installed(monkeypatch, capsys):
    command = entry_points(group='console_scripts')['timm-evovit'].load()
    for args, code, out in (['convert', 'evo_deit_tiny'], 2, ''), (['--version'], 0, f'timm-evovit {timm_evovit.__version__}\n'):
        monkeypatch.setattr('sys.argv', ['timm-evovit', *args])
        with pytest.raises(SystemExit) as e:
            command()
        assert e.value.code == code and capsys.readouterr().out == out


def test_download(deit, run, tmp_path, monkeypatch):
    """gdown may fail, or print why there is no file, as before version 6; what it has downloaded is kept."""
    gdown = pytest.importorskip('gdown', reason="the download needs pip install -e '.[convert]'")
    signature, downloads = inspect.signature(gdown.download), []

    def download(*args, **kwargs):
        asked = signature.bind(*args, **kwargs).arguments
        assert asked['resume'] and not asked['use_cookies'] and asked['id'] == PUBLISHED['evo_deit_tiny_patch16_224'][1]
        downloads.append(asked['output'])
        if len(downloads) == 1:
            raise RuntimeError('Too many users')
        if len(downloads) == 3:
            Path(asked['output']).write_bytes(deit[1].read_bytes())

    monkeypatch.setitem(sys.modules, 'gdown', types.SimpleNamespace(download=download))
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    for reason in ('Too many users', 'was not downloaded'):
        status, out = run('evo_deit_tiny')
        assert status == 1 and reason in out and 'Run the command again' in out and 'drive.google.com/file/d/1AL4' in out
    for name in ('evo_deit_tiny', 'evo_deit_tiny_patch16_224'):
        assert run(name, output=name)[0] == 0
        assert_same_weights(deit[0], load(tmp_path / name))
    assert len(downloads) == 3
    monkeypatch.setitem(sys.modules, 'gdown', None)
    assert 'pip install gdown' in run('evo_deit_base_patch16_384', kwargs={})[1]
