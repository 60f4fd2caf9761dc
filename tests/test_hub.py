"""Weights from the Hub, by huggingface_hub itself in a process of its own, from a server that stands in for the Hub."""
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import timm
import torch
from hub_server import Server
from safetensors.torch import save
from test_checkpoints import as_authors_name_it
from test_evo_deit import build as build_deit
from test_evo_levit import build as build_levit

from timm_evovit.hub import PUBLISHED

TESTS = Path(__file__).parent
TINY = dict(img_size=32, patch_size=8, embed_dim=24, num_heads=3)  # 1000 classes, as the weights of the Hub have
TINY_LEVIT = dict(img_size=64, embed_dim=(16, 24, 32), key_dim=4, num_heads=(2, 3, 4), depth=(4, 2, 2))
PROCESS = '''
import contextlib, io, json, sys, traceback
import timm, torch
from timm_evovit import informative_tokens
TINY, TINY_LEVIT, url = json.loads(sys.argv[1])
x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))

def same(model, other):
    return set(model.state_dict()) == set(other.state_dict()) and all(
        torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())

def error(f):
    try:
        f()
    except Exception as e:
        return f'{type(e).__name__}: {e}'
    raise AssertionError('no error')

def create(name, pretrained=True, **kwargs):
    return timm.create_model(name, pretrained=pretrained, **{**TINY, **kwargs}).eval()

for line in sys.stdin:
    out, failed, (folder, code) = io.StringIO(), '', json.loads(line)
    with contextlib.redirect_stdout(out):
        try:
            exec(code, {**globals(), 'folder': folder})
        except BaseException:
            failed = traceback.format_exc()
    print(json.dumps([out.getvalue(), failed]), flush=True)
'''


def dense_weights(seed=0):
    """A DeiT's weights, large enough that attention is far from uniform."""
    model = build_deit(seed, num_classes=1000, mlp_ratio=4, global_pool='token')
    assert set(model.state_dict()) == set(timm.create_model('deit_tiny_patch16_224', device='meta').state_dict())
    return model.state_dict()


@pytest.fixture(scope='module')
def processes(tmp_path_factory):
    """A server, and processes with the environment asked for, in which its address is that of the Hub."""
    server, home, running = Server(), tmp_path_factory.mktemp('home'), {}

    def process(env):
        key = tuple(sorted(env.items()))
        if key not in running:
            inherited = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGING', 'TIMM_EVOVIT'))}
            running[key] = subprocess.Popen(
                [sys.executable, '-c', PROCESS, json.dumps([TINY, TINY_LEVIT, server.url])],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=home,
                env={**inherited, 'HF_ENDPOINT': server.url, 'HF_HOME': str(home / 'hf'), 'HF_TOKEN': 'hf_test',
                     'TORCH_HOME': str(home / 'torch'), 'OMP_NUM_THREADS': '1', **env})
        return running[key]

    yield server, process
    for p in running.values():
        p.stdin.close()
        p.wait(timeout=60)
    server.shutdown()


@pytest.fixture
def hub(processes, tmp_path):
    """An empty Hub; run code where it is the only one."""
    server, process = processes
    for table in (server.repos, server.moved, server.files, server.drive, server.requests):
        table.clear()

    def run(code, **env):
        p = process(env)
        p.stdin.write(json.dumps([str(tmp_path), textwrap.dedent(code)]) + '\n')
        p.stdin.flush()
        out, failed = json.loads(p.stdout.readline())
        assert not failed, failed + out
        return out

    run.server, run.folder = server, tmp_path
    return run


def test_deits_weights(hub):
    """The default tag without a variable: DeiT, as timm loads it, with tokens selected in every image."""
    hub.server.repos['timm/deit_tiny_patch16_224.fb_in1k'] = {'model.safetensors': save(dense_weights())}
    hub('''
    dense = create('deit_tiny_patch16_224')
    with torch.no_grad():
        for name in ('evo_deit_tiny', 'evo_deit_tiny_patch16_224', 'evo_deit_tiny_patch16_224.fb_in1k'):
            model = create(name)
            assert model.global_pool == 'token' and model.head_cls is None and same(model, dense), name
            assert [t.mask.sum(dim=(1, 2)).tolist() for t in informative_tokens(model, x)] == [[8] * 3] * 2
            assert not torch.allclose(model(x), dense(x), atol=1e-3)
            assert model.pretrained_cfg['crop_pct'] == dense.pretrained_cfg['crop_pct'] == 0.9
            model.set_keep_ratio(1)
            torch.testing.assert_close(model(x), dense(x))
    pinned = create('evo_deit_tiny', pretrained_cfg_overlay=dict(hf_hub_id='timm/deit_tiny_patch16_224.fb_in1k@main'))
    assert pinned.global_pool == 'token' and same(pinned, dense)

    # an explicit readout wins, both branches start from DeiT's norm and head
    model = create('evo_deit_tiny', global_pool='avg')
    for ours, theirs in ((model.fc_norm, dense.norm), (model.norm_cls, dense.norm), (model.head, dense.head),
                         (model.head_cls, dense.head)):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert torch.equal(model.blocks[3].mlp.fc1.weight, dense.blocks[3].mlp.fc1.weight)
    alone = create('evo_deit_tiny', global_pool='avg', assisted_cls=False)
    assert alone.head_cls is None and torch.equal(alone.fc_norm.weight, dense.norm.weight)
    few = create('evo_deit_tiny', global_pool='avg', num_classes=7)
    assert few.head.out_features == few.head_cls.out_features == 7
    assert torch.equal(few.norm_cls.weight, dense.norm.weight)

    # what timm adapts
    few = create('evo_deit_tiny', num_classes=7, in_chans=1, img_size=48)
    assert few.global_pool == 'token' and few(x[:, :1, :1, :1].expand(-1, -1, 48, 48)).shape == (3, 7)
    torch.testing.assert_close(
        few.patch_embed.proj.weight, dense.patch_embed.proj.weight.sum(dim=1, keepdim=True))
    assert few.pos_embed.shape[1] == 37 and torch.equal(few.norm.weight, dense.norm.weight)
    maps = create('evo_deit_tiny', features_only=True, num_classes=0)(x)
    assert [m.shape for m in maps] == [(3, 24, 4, 4)] * 3
    ''')
    assert any(r.startswith('GET /cdn/') for r in hub.server.requests), 'the redirect was not followed'
    before = list(hub.server.requests)
    hub('''
    assert create('evo_deit_tiny').global_pool == 'token'
    print(error(lambda: create('evo_deit_small')))
    ''', HF_HUB_OFFLINE='1')
    assert hub.server.requests == before, 'not from the cache'


def test_weights_handed_over_are_the_papers(hub):
    """With the tag fb_in1k, which is the default, and without the Hub being asked."""
    weights = build_deit(num_classes=1000, mlp_ratio=4).state_dict()
    path = hub.folder / 'authors.pth'
    torch.save({'model': as_authors_name_it(weights)}, path)
    hub.server.files['/weights.pth'] = path.read_bytes()
    hub('''
    weights = torch.load(f'{folder}/authors.pth')
    paper = create('evo_deit_tiny', pretrained_cfg_overlay=dict(state_dict=dict(weights)))
    assert paper.global_pool == 'avg' and paper.head_cls is not None
    assert torch.equal(paper.fc_norm.weight, weights['model']['norm.weight'])
    for overlay in (dict(file=f'{folder}/authors.pth'), dict(url=f'{url}/weights.pth')):
        for name in ('evo_deit_tiny', 'evo_deit_tiny_patch16_224.fb_in1k'):
            model = create(name, pretrained_cfg_overlay=overlay)
            assert model.global_pool == 'avg' and model.pretrained_cfg['crop_pct'] == 0.875 and same(model, paper)
        # as scripts do that resolve the configuration first
        cfg = timm.models.resolve_pretrained_cfg('evo_deit_tiny_patch16_224', 'fb_in1k', overlay).to_dict()
        assert same(create('evo_deit_tiny_patch16_224', pretrained_cfg=cfg), paper)
    token = create('evo_deit_tiny', pretrained_cfg_overlay=dict(file=f'{folder}/authors.pth'), global_pool='token')
    assert torch.equal(token.norm.weight, paper.norm_cls.weight) and torch.equal(token.head.bias, paper.head_cls.bias)
    for name in ('evo_deit_tiny', 'evo_deit_tiny.fb_in1k', 'evo_deit_base_patch16_384.fb_in1k'):
        model = create(name, pretrained=False)
        assert model.global_pool == 'avg' and model.pretrained_cfg['crop_pct'] == 0.875
    for crop_pct in (0.9, 1.0):  # the first is that of the tag
        model = create('evo_deit_tiny', pretrained=False, pretrained_cfg_overlay=dict(crop_pct=crop_pct))
        assert model.pretrained_cfg['crop_pct'] == crop_pct
    ''')
    assert set(hub.server.requests) == {'GET /weights.pth'}


def test_what_is_missing_or_damaged(hub):
    repos = hub.server.repos
    whole = save(dense_weights())
    repos['timm/deit_small_patch16_224.fb_in1k'] = {'model.safetensors': whole[:len(whole) // 2]}
    repos['timm/deit_base_patch16_224.fb_in1k'] = {'config.json': b'{}'}
    repos['renamed/deit_base'] = {'model.safetensors': whole}
    hub.server.moved['timm/deit_base_patch16_384.fb_in1k'] = 'renamed/deit_base'
    out = hub('''
    print(error(lambda: create('evo_deit_tiny', pretrained_cfg_overlay=dict(hf_hub_id='timm/nobody'))))
    print(error(lambda: create('evo_deit_small')))
    print(error(lambda: create('evo_deit_base')))
    moved = create('evo_deit_base_patch16_384', num_heads=3)
    assert moved.global_pool == 'token' and moved.pretrained_cfg['crop_pct'] == 1
    assert same(moved, create('deit_base_patch16_384', num_heads=3))
    print(error(lambda: create('evo_deit_small_patch16_384')))
    print(error(lambda: create('evo_deit_tiny_patch16_224.nobody_in1k')))
    ''').splitlines()
    repository, damaged, entry = (next(line for line in out if line.startswith(e)) for e in (
        'RepositoryNotFoundError', 'SafetensorError', ('EntryNotFoundError', 'RemoteEntryNotFoundError')))
    assert 'No pretrained weights exist for evo_deit_small_patch16_384' in '\n'.join(out)
    assert 'Invalid pretrained tag (nobody_in1k)' in out[-1]
    repos['timm/deit_small_patch16_224.fb_in1k']['model.safetensors'] = whole
    hub("assert create('evo_deit_small', num_heads=3).global_pool == 'token'")


def test_the_organisation_that_holds_the_papers_weights(hub):
    weights = build_deit(num_classes=1000, mlp_ratio=4).state_dict()
    levit = build_levit(num_classes=1000).state_dict()
    hub.server.repos.update({
        'somebody/evo_deit_tiny_patch16_224.evovit_in1k': {'model.safetensors': save(weights)},
        'somebody/evo_levit_128s.evovit_in1k': {'model.safetensors': save(levit)},
        'timm/deit_tiny_patch16_224.fb_in1k': {'model.safetensors': save(dense_weights())},
    })
    torch.save(levit, hub.folder / 'levit.pth')
    torch.save({k: v + 1 for k, v in weights.items()}, hub.folder / 'deit.pth')
    hub.server.files['/deit.pth'] = (hub.folder / 'deit.pth').read_bytes()
    out = hub('''
    from timm_evovit.hub import PUBLISHED
    assert len(PUBLISHED) == 11
    for name in PUBLISHED:
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.tag == 'evovit_in1k' and cfg.hf_hub_id == f'somebody/{name}.evovit_in1k'
        assert timm.models.is_model_pretrained(name)
    assert timm.get_pretrained_cfg('evo_deit_tiny').hf_hub_id == 'somebody/evo_deit_tiny_patch16_224.evovit_in1k'
    model = create('evo_deit_tiny')
    assert model.global_pool == 'avg' and model.pretrained_cfg['tag'] == 'evovit_in1k'
    assert create('evo_deit_tiny.fb_in1k').global_pool == 'token'
    handed = create('evo_deit_tiny', pretrained_cfg_overlay=dict(url=f'{url}/deit.pth'))
    assert torch.equal(handed.fc_norm.weight, model.fc_norm.weight + 1)
    levit = timm.create_model('evo_levit_128s', pretrained=True, **TINY_LEVIT)
    saved = torch.load(f'{folder}/levit.pth')
    assert all(torch.equal(v, saved[k]) for k, v in levit.state_dict().items())
    print(error(lambda: timm.create_model('evo_levit_256', pretrained=True, **TINY_LEVIT)))
    ''', TIMM_EVOVIT_HUB='somebody')
    assert 'RepositoryNotFoundError' in out and 'somebody/evo_levit_256.evovit_in1k' in out


@pytest.mark.parametrize('name', PUBLISHED)
def test_nobody_has_said_where_they_are(name):
    assert 'TIMM_EVOVIT_HUB' not in os.environ, 'tests run without it'
    with pytest.raises(RuntimeError) as e:
        timm.create_model(f'{name}.evovit_in1k', pretrained=True, **(TINY_LEVIT if 'levit' in name else TINY))
    message = str(e.value)
    assert 'TIMM_EVOVIT_HUB' in message and f'timm-evovit convert {name}' in message
    assert (f'{name}.fb_in1k' if 'deit' in name else 'evo_deit_small_patch16_224.fb_in1k') in message
    cfg = timm.get_pretrained_cfg(f'{name}.evovit_in1k')
    assert cfg.hf_hub_id is None and not timm.models.is_model_pretrained(f'{name}.evovit_in1k')
    assert cfg.crop_pct == 0.875 and cfg.license == 'mit' and cfg.paper_ids == 'arXiv:2108.01390'
    assert timm.get_pretrained_cfg(name).tag == ('fb_in1k' if 'deit' in name else 'evovit_in1k')
    readme = (TESTS.parent / 'README.md').read_text()
    top1 = next(line for line in readme.splitlines() if line.startswith(f'| `{name}`')).split('|')[4].strip()
    assert f' {top1} %' in cfg.notes[0]
    timm.create_model(f'{name}.evovit_in1k', **(TINY_LEVIT if 'levit' in name else TINY))


def test_deits_tag_says_what_timm_says():
    for size in ('tiny_patch16_224', 'small_patch16_224', 'base_patch16_224', 'base_patch16_384'):
        ours, theirs = (timm.get_pretrained_cfg(f'{family}_{size}.fb_in1k') for family in ('evo_deit', 'deit'))
        for field in ('hf_hub_id', 'input_size', 'crop_pct', 'interpolation', 'mean', 'std', 'num_classes'):
            assert getattr(ours, field) == getattr(theirs, field), (size, field)
        assert ours.paper_ids == 'arXiv:2012.12877' and 'apache' in ours.license
    assert not timm.list_pretrained('evo_levit*')


PUSH = '''
def plain_values(args):
    return json.loads(json.dumps(args))

def check(model, repo, images, push, **overrides):
    push(model, f'somebody/{repo}')
    again = timm.create_model(f'hf-hub:somebody/{repo}', pretrained=True).eval()
    assert same(again, model) and plain_values(again.model_args) == plain_values(model.model_args)
    with torch.no_grad():
        assert torch.equal(again(images), model.eval()(images))
    return again

def own(model, repo):
    model.push_to_hf_hub(repo)

def timms(model, repo):
    timm.models.push_to_hf_hub(model, repo, model_args=model.model_args)

def plain(model, repo):
    timm.models.push_to_hf_hub(model, repo)

pushes = [own, timms]
if hasattr(create('resnet10t', pretrained=False, **dict.fromkeys(TINY)), '_model_args'):
    pushes.append(plain)  # this timm saves arguments by itself
'''


def test_push_and_reload(hub):
    """Bit for bit, readout, keep ratio and all."""
    hub.server.repos['timm/deit_tiny_patch16_224.fb_in1k'] = {'model.safetensors': save(dense_weights())}
    out = hub(PUSH + '''
for i, push in enumerate(pushes):  # each way of timm's needs another way to carry the arguments
    model = create('evo_deit_tiny')
    model.set_keep_ratio((0.7, 0.25))
    again = check(model, f'token{i}', x, push)
    assert again.keep_ratio == (0.7, 0.25) and again.global_pool == 'token'
    warm = timm.create_model(f'hf-hub:somebody/token{i}', pretrained=True, global_pool='avg')
    assert torch.equal(warm.head_cls.weight, model.head.weight) and torch.equal(warm.fc_norm.bias, model.norm.bias)

    model = create(
        'evo_deit_small', pretrained=False, num_classes=5, img_size=(32, 48), depth=6, stages=(1, 4), tradeoff=0.25,
        selection='layer', representative_token=True, assisted_cls=False, keep_ratio=0.3, layer_to_stage_epochs=0,
        drop_path_rate=0.1)
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(2, 3, 32, 48)
    again = check(model, f'avg{i}', images, push)
    assert again.stage_starts == (1, 4) and again.selection == 'layer' and again.blocks.representative_token
    assert again.tradeoff == (0.25,) * 6 and again.head_cls is None and again.patch_embed.img_size == (32, 48)
    larger = timm.create_model(f'hf-hub:somebody/avg{i}', pretrained=True, img_size=(48, 32))
    assert larger.pos_embed.shape == model.pos_embed.shape

    model = create('evo_deit_tiny', pretrained=False, layer_to_stage_epochs=2)
    model.reset_classifier(9, 'token')
    assert check(model, f'reset{i}', x, push).layer_to_stage_epochs == 2

    model = timm.create_model('evo_levit_128s', num_classes=4, tradeoff=0.25, keep_ratio=(0.5, 1, 0.3), **TINY_LEVIT)
    model.set_keep_ratio(0.4)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    again = check(model, f'levit{i}', torch.randn(2, 3, 64, 64), push)
    assert again.keep_ratio == (0.4,) * 3 and again.tradeoff is None
print(len(pushes))
''')
    assert int(out.split()[-1]) >= 2
    assert {'config.json', 'model.safetensors', 'README.md'} <= set(hub.server.repos['somebody/levit0'])
    config = json.loads(hub.server.repos['somebody/levit0']['config.json'])
    assert config['architecture'] == 'evo_levit_128s' and config['model_args']['keep_ratio'] == [0.4] * 3


def test_convert_and_upload(hub):
    """The command, from the authors' file to `hf-hub:`."""
    weights = build_deit(num_classes=1000, mlp_ratio=4).state_dict()
    torch.save({'model': as_authors_name_it(weights)}, hub.folder / 'authors.pth')
    out = hub('''
    from timm_evovit.tools.cli import main
    assert main(['convert', 'evo_deit_tiny', f'{folder}/authors.pth', '--output', f'{folder}/out', '--push-to-hub',
                 'somebody/evo', '--model-kwargs', *[f'{k}={v}' for k, v in TINY.items()]]) == 0
    models = [timm.create_model(name, pretrained=True) for name in (f'local-dir:{folder}/out', 'hf-hub:somebody/evo')]
    assert same(*models)
    ''')
    assert "hf-hub:somebody/evo" in out
    repo = hub.server.repos['somebody/evo']
    assert repo['config.json'] == (hub.folder / 'out' / 'config.json').read_bytes()
    assert repo['model.safetensors'] == (hub.folder / 'out' / 'model.safetensors').read_bytes()
    assert b'authors.pth' in repo['README.md'] and set(repo) == {'config.json', 'model.safetensors', 'README.md'}
