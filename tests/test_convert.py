"""The command timm-evovit convert: what it writes, what it refuses, and the download."""
import argparse
import json
import os
import pickle
import re
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import pytest
import timm
import torch
from hub_server import Server
from safetensors.torch import load_file
from test_checkpoints import as_authors_name_it
from test_evo_deit import build as build_deit
from test_evo_deit import images as images_deit
from test_evo_levit import authors_names
from test_evo_levit import build as build_levit
from test_evo_levit import images as images_levit

from timm_evovit.cli import main
from timm_evovit.convert import convert, read_checkpoint
from timm_evovit.hub import PUBLISHED

TINY = ['img_size=32', 'patch_size=8', 'embed_dim=24', 'num_heads=3', 'mlp_ratio=2']
TINY_LEVIT = ['img_size=64', 'embed_dim=(16,24,32)', 'key_dim=4', 'num_heads=(2,3,4)', 'depth=(4,2,2)']
ARGS = argparse.Namespace(lr=5e-4, model='evo_deit', output_dir='out', nested=argparse.Namespace(epochs=300))


def authors_checkpoint(weights, ema=None):
    """What the authors' training loop saves."""
    return {
        'model': weights,
        'model_ema': ema,
        'optimizer': {'state': {0: {'step': 3, 'exp_avg': torch.zeros(2)}}, 'param_groups': [{'lr': 1e-3}]},
        'lr_scheduler': {'t_in_epochs': True},
        'epoch': 299,
        'scaler': {'scale': 65536.0},
        'args': ARGS,
    }


@pytest.fixture
def deit(tmp_path):
    """A model, and a file of the authors with its weights, and those doubled as their moving average."""
    model = build_deit()
    weights = as_authors_name_it(model.state_dict())
    torch.save(
        authors_checkpoint(weights, {k: 2 * v for k, v in weights.items()}), tmp_path / 'authors.pth')
    return model, tmp_path / 'authors.pth'


@pytest.fixture
def levit(tmp_path):
    model = build_levit()
    weights = authors_names(model)
    for i, (kind, number) in enumerate((kind, block) for block in (1, 2, 3) for kind in ('m1', 'm2')):
        start = f'blocks.{number}.{kind}.'  # modules that the authors list a second time, partly inside of a stage
        copies = {f'stage_blocks.4.m.{i}.{k[len(start):]}': v for k, v in weights.items() if k.startswith(start)}
        assert copies
        weights.update(copies)
    torch.save(authors_checkpoint(weights), tmp_path / 'authors.pth')
    return model, tmp_path / 'authors.pth', weights


def run(capsys, *args):
    """Exit status and output; nothing may be left behind by a failure."""
    status = main(['convert', *map(str, args)])
    out, err = capsys.readouterr()
    if status:
        output = Path(args[args.index('--output') + 1])
        assert not output.exists() and not [p for p in output.parent.iterdir() if 'partial' in p.name]
        assert 'timm-evovit: ' in err and 'Traceback' not in err
    return status, out + err


def same(model, other):
    assert model.state_dict().keys() == other.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_deit(deit, tmp_path, capsys):
    model, path = deit
    output = tmp_path / 'new' / 'folder'
    status, out = run(capsys, 'evo_deit_tiny', path, '--output', output, '--model-kwargs', *TINY)
    assert status == 0
    found = len(torch.load(path, weights_only=False)['model'])
    assert f'authors.pth (model): {found} tensors' in out and '24 joined' in out and 'none dropped' in out
    assert f'{len(load_file(output / "model.safetensors"))} tensors' in out and found - 24 == len(model.state_dict())
    assert sorted(p.name for p in output.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    loaded = timm.create_model(f'local-dir:{output}', pretrained=True).eval()
    same(model, loaded)
    assert loaded.num_classes == 10 and torch.equal(loaded(images_deit()), model(images_deit()))
    card = (output / 'README.md').read_text()
    assert 'license: mit' in card and 'arxiv.org/abs/2108.01390' in card and 'sha256' in card and 'authors.pth' in card
    assert '72.0' not in card, 'these are not the published weights'
    config = json.loads((output / 'config.json').read_text())
    assert config['pretrained_cfg']['crop_pct'] == 0.875 and config['architecture'] == 'evo_deit_tiny_patch16_224'

    assert main(['convert', 'evo_deit_tiny', str(path), '--output', str(output)]) == 1
    assert 'remove it or name another' in capsys.readouterr().err
    same(model, timm.create_model(f'local-dir:{output}', pretrained=True))


def test_moving_average_and_options(deit, tmp_path, capsys):
    model, path = deit
    (tmp_path / 'ema').mkdir()  # an empty folder is as good as none
    status, out = run(
        capsys, 'evo_deit_tiny', path, '--output', tmp_path / 'ema', '--use-ema', '--model-kwargs', *TINY)
    assert status == 0 and '(model_ema)' in out
    loaded = timm.create_model(f'local-dir:{tmp_path / "ema"}', pretrained=True)
    assert torch.equal(loaded.head_cls.weight, 2 * model.head_cls.weight)
    status, out = run(
        capsys, 'evo_deit_tiny', path, '--output', tmp_path / 'plain', '--model-kwargs', *TINY, 'assisted_cls=False',
        'keep_ratio=0.7')
    assert status == 0 and '4 dropped, assisted_cls=False' in out and 'head_cls.weight' in out
    loaded = timm.create_model(f'local-dir:{tmp_path / "plain"}', pretrained=True)
    assert loaded.head_cls is None and loaded.keep_ratio == (0.7, 0.7)


def test_levit(levit, tmp_path, capsys):
    model, path, weights = levit
    status, out = run(capsys, 'evo_levit_128s', path, '--output', tmp_path / 'out', '--model-kwargs', *TINY_LEVIT)
    copies = [k for k in weights if k.startswith('stage_blocks.')]
    assert status == 0 and f'{len(weights)} tensors' in out and f'{len(copies)} dropped, copies' in out
    assert f'{len(model.tradeoff) - 1} joined' in out
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    same(model, loaded)
    assert torch.equal(loaded(images_levit()), model(images_levit()))

    status, out = run(
        capsys, 'evo_levit_128s', path, '--output', tmp_path / 'fixed', '--model-kwargs', *TINY_LEVIT, 'tradeoff=0.5')
    assert status == 0 and '1 dropped, the tradeoff is a fixed number: tradeoff' in out

    weights[copies[7]] = weights[copies[7]] + 1
    torch.save(authors_checkpoint(weights), path)
    status, out = run(capsys, 'evo_levit_128s', path, '--output', tmp_path / 'no', '--model-kwargs', *TINY_LEVIT)
    assert status == 1 and copies[7] in out and 'copy' in out


def test_the_published_sizes(tmp_path, capsys):
    """No arguments but the name; the top-1 of the paper is in the configuration and the card."""
    model = timm.create_model('evo_deit_tiny')
    torch.save(authors_checkpoint(as_authors_name_it(model.state_dict())), tmp_path / 'a.pth')
    status, out = run(capsys, 'evo_deit_tiny', tmp_path / 'a.pth', '--output', tmp_path / 'out')
    assert status == 0 and ': 180 tensors' in out and ': 156 tensors' in out
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    same(model, loaded)
    assert loaded.global_pool == 'avg' and '72.0' in loaded.pretrained_cfg['notes'][0]
    assert '72.0 %' in (tmp_path / 'out' / 'README.md').read_text()

    torch.save(model.state_dict(), tmp_path / 'b.pth')  # by timm's names: nobody knows whose weights these are
    assert run(capsys, 'evo_deit_tiny', tmp_path / 'b.pth', '--output', tmp_path / 'own')[0] == 0
    card = (tmp_path / 'own' / 'README.md').read_text()
    assert '72.0' not in card and 'license: unknown' in card and "authors' implementation" not in card
    assert 'notes' not in timm.create_model(f'local-dir:{tmp_path / "own"}').pretrained_cfg


def test_an_upload_that_fails_leaves_what_can_be_uploaded(deit, tmp_path, capsys, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError('no route to the Hub')

    monkeypatch.setattr(timm.models, 'push_to_hf_hub', unreachable)
    assert main([
        'convert', 'evo_deit_tiny', str(deit[1]), '--output', str(tmp_path / 'out'), '--model-kwargs', *TINY,
        '--push-to-hub', 'a/b']) == 1
    out = capsys.readouterr().err
    assert 'a/b was not uploaded: no route to the Hub' in out and f'{tmp_path / "out"} is complete' in out
    same(deit[0], timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True))


def test_a_checkpoint_of_timms_train_script(deit, tmp_path, capsys):
    model, _ = deit
    state = {f'module.{k}': v for k, v in model.state_dict().items()}
    torch.save({'state_dict': state, 'arch': 'evo_deit', 'args': ARGS, 'version': 2}, tmp_path / 'last.pth.tar')
    status, _ = run(
        capsys, 'evo_deit_tiny', tmp_path / 'last.pth.tar', '--output', tmp_path / 'out', '--model-kwargs', *TINY)
    assert status == 0
    same(model, timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True))


class Runs:
    """Code that a plain unpickler would run."""
    def __reduce__(self):
        return os.mkdir, ('it_was_run',)


@pytest.mark.parametrize('write, message', [
    (lambda f, ck: torch.save({**ck, 'x': Runs()}, f), r'holds (posix|nt)\.mkdir\. Only tensors'),
    (lambda f, ck: torch.save({**ck, 'x': Runs()}, f, _use_new_zipfile_serialization=False),
     r'holds (posix|nt)\.mkdir\.'),
    (lambda f, ck: f.write(pickle.dumps(Runs(), protocol=4)), r'holds (posix|nt)\.mkdir\.'),
    (lambda f, ck: f.write(pickle.dumps(Runs(), protocol=2)), r'holds (posix|nt)\.mkdir\.'),
    (lambda f, ck: torch.save({**ck, 'where': PurePosixPath('a')}, f), r'holds pathlib\S*PurePosixPath\.'),
    (lambda f, ck: torch.save(list(ck.values()), f), 'holds a list, a checkpoint is a dict'),
    (lambda f, ck: torch.save({'optimizer': {}, 'epoch': 3}, f), "no weights under 'model', it holds optimizer, epoch"),
    (lambda f, ck: torch.save({'model': {'a': 3}}, f), "'model' in .* must hold tensors only, these are none: a"),
    (lambda f, ck: None, r'damaged, or only the first part of one \(0 bytes\)'),
    (lambda f, ck: f.write(b'no checkpoint at all'), r'damaged, or only the first part of one \(20 bytes\)'),
    (lambda f, ck: f.write(b'\n <!DOCTYPE html><html><head><TITLE>Google Drive - Quota exceeded</TITLE></head>'),
     'web page, "Google Drive - Quota exceeded".*too often'),
])
def test_what_is_no_checkpoint(deit, tmp_path, capsys, monkeypatch, write, message):
    checkpoint = torch.load(deit[1], weights_only=False)
    monkeypatch.chdir(tmp_path)
    with open('bad.pth', 'wb') as f:
        write(f, checkpoint)
    status, out = run(capsys, 'evo_deit_tiny', 'bad.pth', '--output', tmp_path / 'out', '--model-kwargs', *TINY)
    assert status == 1 and re.search(message, out, re.DOTALL), out
    assert 'bad.pth' in out and 'weights_only' not in out and not Path('it_was_run').exists()


def test_half_a_checkpoint(deit, tmp_path, capsys):
    content = deit[1].read_bytes()
    for part in (0.02, 0.5, 0.99):
        (tmp_path / 'part.pth').write_bytes(content[:int(part * len(content))])
        status, out = run(capsys, 'evo_deit_tiny', tmp_path / 'part.pth', '--output', tmp_path / 'out')
        assert status == 1 and 'only the first part' in out
    torch.save(torch.load(deit[1], weights_only=False), tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    content = (tmp_path / 'old.pth').read_bytes()
    assert not zipfile.is_zipfile(tmp_path / 'old.pth')
    assert read_checkpoint(tmp_path / 'old.pth')['args'] == ARGS
    for part in (0.02, 0.5, 0.99):
        (tmp_path / 'part.pth').write_bytes(content[:int(part * len(content))])
        with pytest.raises(ValueError, match='only the first part'):
            read_checkpoint(tmp_path / 'part.pth')


@pytest.mark.parametrize('name, kwargs, message', [
    ('evo_deit_tiny', ['img_size=48', *TINY[1:]],
     r'another EvoVisionTransformer: pos_embed \(1, 17, 24\) instead of \(1, 37'),
    ('evo_deit_tiny', ['patch_size=4', 'img_size=16', *TINY[2:]], 'patch_embed.proj.weight'),
    ('evo_deit_tiny', ['depth=11', *TINY], r'unexpected: blocks\.11'),
    ('evo_deit_tiny', ['in_chans=1', *TINY], r'patch_embed\.proj\.weight'),
    ('evo_deit_small', [], r'cls_token \(1, 1, 24\) instead of \(1, 1, 384\)'),
    ('evo_levit_128s', TINY_LEVIT, 'does not fit EvoLevit'),
    ('deit_tiny_patch16_224', [], 'is a VisionTransformer, convert takes evo_deit_base'),
    ('evo_deit_huge', [], "no model 'evo_deit_huge', there are evo_deit_base"),
    ('evo_deit_tiny', ['keep_ratio=3'], 'keep_ratio must lie in'),
    ('evo_deit_tiny', ['not_an_argument=3'], 'evo_deit_tiny: .*not_an_argument'),
])
def test_the_wrong_model(deit, tmp_path, capsys, name, kwargs, message):
    status, out = run(capsys, name, deit[1], '--output', tmp_path / 'out', '--model-kwargs', *kwargs)
    assert status == 1 and re.search(message, out), out


def test_other_weights_are_refused(deit, tmp_path, capsys):
    path = tmp_path / 'other.pth'
    for name, model, kwargs, message in (
            ('evo_levit_128s', timm.create_model('levit_128s', num_classes=10), [], 'attention_biases and no class'),
            ('evo_deit_tiny', build_deit(global_pool='token'), TINY, 'fc_norm.weight is missing')):
        torch.save({'model': model.state_dict()}, path)
        status, out = run(capsys, name, path, '--output', tmp_path / 'out', '--model-kwargs', *kwargs)
        assert status == 1 and message in out
    weights = torch.load(deit[1], weights_only=False)['model']
    for change, message in (
            (lambda w: w.pop('head_cls.weight'), 'head_cls.weight'),
            (lambda w: w.pop('norm_cls.bias'), 'norm_cls.bias'),
            (lambda w: w.update(extra=torch.zeros(3)), 'unexpected: extra'),
            (lambda w: w.update({'head.2.weight': torch.zeros(3)}), 'head.2.weight')):
        changed = dict(weights)
        change(changed)
        torch.save({'model': changed}, path)
        status, out = run(capsys, 'evo_deit_tiny', path, '--output', tmp_path / 'out', '--model-kwargs', *TINY)
        assert status == 1 and message in out
    assert 'model_ema' in run(capsys, 'evo_deit_tiny', path, '--output', tmp_path / 'out', '--use-ema')[1]
    assert 'bad name' in run(capsys, 'evo_deit_tiny', path, '--output', tmp_path / 'out', '--push-to-hub', 'bad name')[1]
    for missing in ('nothing.pth', '.'):
        assert run(capsys, 'evo_deit_tiny', tmp_path / missing, '--output', tmp_path / 'out')[0] == 1


def test_no_space_left(deit, tmp_path, capsys):
    """A limit on the size of files, which the system enforces, stands in for a full disk."""
    resource = pytest.importorskip('resource', reason='limits on the size of files are those of Unix')
    assert deit[1].stat().st_size > 100_000
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        status, out = run(capsys, 'evo_deit_tiny', deit[1], '--output', tmp_path / 'out', '--model-kwargs', *TINY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1 and 'could not be written' in out and 'File too large' in out
    assert [p.name for p in tmp_path.iterdir()] == ['authors.pth']


@pytest.mark.parametrize('error, status', [(OSError(28, 'No space left on device'), 1), (KeyboardInterrupt(), 130)])
def test_an_interrupted_write_leaves_nothing(deit, tmp_path, capsys, monkeypatch, error, status):
    def write_half(model, folder, **kwargs):
        folder.mkdir()
        (folder / 'model.safetensors').write_bytes(b'half')
        raise error

    monkeypatch.setattr('timm_evovit.convert.save_for_hf', write_half)
    got, out = run(capsys, 'evo_deit_tiny', deit[1], '--output', tmp_path / 'out', '--model-kwargs', *TINY)
    assert got == status and ('No space left' in out if status == 1 else 'interrupted' in out)
    assert [p.name for p in tmp_path.iterdir()] == ['authors.pth']


def test_what_was_written_is_read_back(deit, tmp_path, capsys, monkeypatch):
    real = timm.models.save_for_hf

    def write_other(model, folder, **kwargs):
        real(build_deit(seed=1), folder, **kwargs)

    monkeypatch.setattr('timm_evovit.convert.save_for_hf', write_other)
    status, out = run(capsys, 'evo_deit_tiny', deit[1], '--output', tmp_path / 'out', '--model-kwargs', *TINY)
    assert status == 1 and 'reads back as something else' in out


def test_the_command_is_installed():
    assert entry_points(group='console_scripts')['timm-evovit'].value == 'timm_evovit.cli:main'
    with pytest.raises(SystemExit) as e:
        main(['convert', 'evo_deit_tiny'])
    assert e.value.code == 2


# Google Drive

@pytest.fixture
def drive(monkeypatch, tmp_path):
    """gdown itself, with a server in the place of Google's."""
    pytest.importorskip('gdown', reason="the download needs pip install -e '.[convert]'")
    from requests.adapters import HTTPAdapter
    server, send = Server(), HTTPAdapter.send

    def redirected(self, request, *args, **kwargs):
        parts = urlsplit(request.url)
        assert parts.scheme == 'https' and parts.hostname in ('drive.google.com', 'drive.usercontent.google.com')
        request.url = f'{server.url}/drive{parts.path}?{parts.query}'
        return send(self, request, *args, **kwargs)

    monkeypatch.setattr(HTTPAdapter, 'send', redirected)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    for variable in ('http_proxy', 'https_proxy', 'all_proxy', 'HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY'):
        monkeypatch.delenv(variable, raising=False)
    yield server
    server.shutdown()


def test_download(deit, drive, tmp_path, capsys):
    """The connection breaks once; the second try asks for the rest, the third needs no network."""
    model, path = deit
    checkpoint = torch.load(path, weights_only=False)
    torch.save({**checkpoint, 'optimizer': torch.zeros(1_000_000)}, path)  # it comes in pieces of half a megabyte
    content = path.read_bytes()
    drive.drive[PUBLISHED['evo_deit_tiny_patch16_224'][1]] = content
    drive.cut_after = len(content) // 2
    args = ['--model-kwargs', *TINY]
    status, out = run(capsys, 'evo_deit_tiny', '--output', tmp_path / 'out', *args)
    assert status == 1 and 'the next try goes on from there' in out and 'drive.google.com/file/d/1AL4' in out
    drive.requests.clear()
    status, out = run(capsys, 'evo_deit_tiny', '--output', tmp_path / 'out', *args)
    assert status == 0 and '100%' in out, 'no progress bar'
    resumed = [int(start) for r in drive.requests for start in re.findall(r'bytes=(\d+)-', r)]
    assert len(resumed) == 1 and 1_000_000 < resumed[0] <= len(content) // 2
    same(model, timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True))
    drive.requests.clear()
    checkpoint.pop('model_ema')
    torch.save(checkpoint, tmp_path / 'hub' / 'checkpoints' / 'evo_deit_tiny_patch16_224.evovit_in1k.pth')
    assert run(capsys, 'evo_deit_tiny', '--output', tmp_path / 'ema', *args, '--use-ema')[0] == 1
    assert run(capsys, 'evo_deit_tiny_patch16_224', '--output', tmp_path / 'again', *args)[0] == 0
    assert not drive.requests


def test_download_fails(deit, drive, tmp_path, capsys):
    file_id = PUBLISHED['evo_deit_tiny_patch16_224'][1]
    drive.drive[file_id] = b'<html><p class="uc-error-subcaption">Too many users have viewed this file.</p></html>'
    args = ['evo_deit_tiny', '--output', tmp_path / 'out', '--model-kwargs', *TINY]
    status, out = run(capsys, *args)
    assert status == 1 and 'Too many users' in out and 'in a browser' in out
    drive.drive[file_id] = deit[1].read_bytes()[:1000]
    status, out = run(capsys, *args)
    assert status == 1 and 'first part' in out
    drive.drive[file_id] = deit[1].read_bytes()
    assert run(capsys, *args)[0] == 0, 'the damaged file was kept'


def test_without_a_published_file_or_gdown(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gdown', None)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    status, out = run(capsys, 'evo_deit_base_patch16_384', '--output', tmp_path / 'out')
    assert status == 1 and "pip install gdown" in out and PUBLISHED['evo_deit_base_patch16_384'][1] in out
    status, out = run(capsys, 'evo_levit_128_384', '--output', tmp_path / 'out')
    assert status == 1 and 'No checkpoint of evo_levit_128_384 was published' in out


def test_transformers_load_it(deit, levit, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    transformers = pytest.importorskip('transformers', reason='TimmWrapper models are those of transformers')
    for name, (model, path, *_), images, kwargs in (
            ('evo_deit_tiny', deit, images_deit(), dict(k.split('=') for k in TINY)),
            ('evo_levit_128s', levit, images_levit(), dict(k.split('=') for k in TINY_LEVIT))):
        torch.save({'model': model.state_dict()}, path)
        output = tmp_path / name
        convert(name, path, output, model_kwargs={k: eval(v) for k, v in kwargs.items()})
        wrapper = transformers.AutoModelForImageClassification.from_pretrained(output).eval()
        assert type(wrapper).__name__ == 'TimmWrapperForImageClassification' and wrapper.num_labels == 10
        same(model, wrapper.timm_model)
        with torch.no_grad():
            torch.testing.assert_close(wrapper(images).logits, model(images))
            backbone = transformers.AutoModel.from_pretrained(output).eval()
            features = model.forward_head(model.forward_features(images), pre_logits=True)
            torch.testing.assert_close(backbone(images).pooler_output, features)
