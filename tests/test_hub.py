"""Weights from the Hub, by huggingface_hub itself, from a server that stands in for the Hub.

huggingface_hub reads its environment when it is imported. So functions named `client_*` run in processes of their own,
in which the server's address is that of the Hub.
"""
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import helpers
import pytest
import timm
import torch
from helpers import assert_same_weights, authors_names, build_deit, build_levit, images
from hub_server import Server
from safetensors.torch import save

from timm_evovit import evolve, informative_tokens
from timm_evovit.checkpoints import BY_SIMILARITY
from timm_evovit.hub import PUBLISHED

# without a number of classes: 1000, as the weights of the Hub have
TINY, TINY_LEVIT = ({k: v for k, v in sizes.items() if k != 'num_classes'} for sizes in (
    helpers.TINY, helpers.TINY_LEVIT))
TOP1 = {  # ImageNet-1k, as the paper's tables report it (arXiv 2108.01390)
    'evo_deit_tiny_patch16_224': 72.0, 'evo_deit_small_patch16_224': 79.4, 'evo_deit_base_patch16_224': 81.3,
    'evo_deit_base_patch16_384': 82.0, 'evo_levit_128s': 73.0, 'evo_levit_128': 74.4, 'evo_levit_192': 76.8,
    'evo_levit_256': 78.8, 'evo_levit_384': 80.7, 'evo_levit_256_384': 81.1, 'evo_levit_384_384': 82.2,
}


def create(name, pretrained=True, **kwargs):
    return timm.create_model(name, pretrained=pretrained, **{**TINY, **kwargs}).eval()


def error(function):
    """What a function fails with, as text: not every error can be sent from process to process."""
    with pytest.raises(Exception) as e:  # noqa: B017 whatever it is
        function()
    return f'{e.type.__name__}: {e.value}'


def dense_weights(seed=0):
    """A DeiT's weights, large enough that attention is far from uniform."""
    return helpers.build('deit_tiny_patch16_224', seed, num_classes=1000).state_dict()


@pytest.fixture(scope='module')
def clients(tmp_path_factory):
    """A server, and processes with the environment asked for, in which its address is that of the Hub."""
    server, home, pools = Server(), tmp_path_factory.mktemp('home'), {}

    def client(**env):
        key = tuple(sorted(env.items()))
        if key not in pools:
            inherited = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGING', 'TIMM_EVOVIT'))}
            own = {'HF_ENDPOINT': server.url, 'HF_HOME': str(home / 'hf'), 'HF_TOKEN': 'hf_test',
                   'TORCH_HOME': str(home / 'torch'), 'OMP_NUM_THREADS': '1'}
            with mock.patch.dict(os.environ, {**inherited, **own, **env}, clear=True):
                pools[key] = ProcessPoolExecutor(1, multiprocessing.get_context('spawn'))
                pools[key].submit(os.getpid).result(timeout=240)  # it has started, with this environment
        return pools[key]

    yield server, client
    for pool in pools.values():
        pool.shutdown()
    server.shutdown()


@pytest.fixture
def hub(clients, tmp_path):
    """An empty Hub; `run` calls a function where it is the only one."""
    server, client = clients
    for table in (server.repos, server.moved, server.files, server.drive, server.requests):
        table.clear()

    class Hub:
        @staticmethod
        def run(function, *args, **env):
            return client(**env).submit(function, *args).result(timeout=240)

        @staticmethod
        def hold_deit():
            server.repos['timm/deit_tiny_patch16_224.fb_in1k'] = {'model.safetensors': save(dense_weights())}

    Hub.server, Hub.folder = server, tmp_path
    return Hub


# DeiT's weights

def without_mark(model):
    """Weights, without the key that says that the model groups like patches."""
    return {k: v for k, v in model.state_dict().items() if k != BY_SIMILARITY}


@torch.no_grad()
def client_deit_evolves(folder):
    dense, x = create('deit_tiny_patch16_224'), images(3)
    for name in ('evo_deit_tiny', 'evo_deit_tiny_patch16_224', 'evo_deit_tiny_patch16_224.fb_in1k'):
        model = create(name)
        assert model.global_pool == 'token' and model.head_cls is None and model.slow_tokens == 'similarity'
        assert_same_weights(without_mark(model), dense)
        expected = evolve(dense)(x)
        assert torch.equal(model(x), expected) and not torch.allclose(expected, dense(x), atol=1e-3)
        assert model.pretrained_cfg['crop_pct'] == dense.pretrained_cfg['crop_pct'] == 0.9
        timm.models.save_for_hf(model, folder, model_args=model.model_args)
        saved = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        assert_same_weights(saved, model)
        assert saved.keep_ratio == model.keep_ratio and torch.equal(saved(x), expected)
        model.set_keep_ratio(1)
        torch.testing.assert_close(model(x), dense(x))
    for kwargs in (dict(slow_tokens='attention'), dict(representative_token=True), dict(tradeoff=0.5),
                   dict(selection='layer'), dict(layer_to_stage_epochs=2)):
        model = create('evo_deit_tiny', **kwargs)
        assert model.slow_tokens == 'attention' and model.keep_ratio == (0.5, 0.5) and model.global_pool == 'token'
        assert informative_tokens(model, x)[0].attention is not None
    assert create('evo_deit_tiny', keep_ratio=0.7, slow_tokens='similarity').keep_ratio == evolve(dense, 0.7).keep_ratio
    pinned = create('evo_deit_tiny', pretrained_cfg_overlay=dict(hf_hub_id='timm/deit_tiny_patch16_224.fb_in1k@main'))
    assert pinned.global_pool == 'token'
    assert_same_weights(without_mark(pinned), dense)


def test_deits_weights(hub):
    """The default tag without a variable: DeiT, as timm loads it and `evolve` makes it faster, unless arguments differ."""
    hub.hold_deit()
    hub.run(client_deit_evolves, str(hub.folder))
    assert any(r.startswith('GET /cdn/') for r in hub.server.requests), 'the redirect was not followed'


def client_both_branches_start_from_deit():
    dense, model = create('deit_tiny_patch16_224'), create('evo_deit_tiny', global_pool='avg')
    for ours, theirs in ((model.fc_norm, dense.norm), (model.norm_cls, dense.norm), (model.head, dense.head),
                         (model.head_cls, dense.head), (model.blocks[3].mlp, dense.blocks[3].mlp)):
        assert_same_weights(ours, theirs)
    alone = create('evo_deit_tiny', global_pool='avg', assisted_cls=False)
    assert alone.head_cls is None and torch.equal(alone.fc_norm.weight, dense.norm.weight)
    few = create('evo_deit_tiny', global_pool='avg', num_classes=7)
    assert few.head.out_features == few.head_cls.out_features == 7
    assert torch.equal(few.norm_cls.weight, dense.norm.weight)


def test_an_explicit_readout_wins(hub):
    hub.hold_deit()
    hub.run(client_both_branches_start_from_deit)


def client_timm_adapts_deits_weights():
    dense, few = create('deit_tiny_patch16_224'), create('evo_deit_tiny', num_classes=7, in_chans=1, img_size=48)
    assert few.global_pool == 'token' and few(images(3, 48, chans=1)).shape == (3, 7)
    torch.testing.assert_close(
        few.patch_embed.proj.weight, dense.patch_embed.proj.weight.sum(dim=1, keepdim=True))
    assert few.pos_embed.shape[1] == 37 and torch.equal(few.norm.weight, dense.norm.weight)
    maps = create('evo_deit_tiny', features_only=True, num_classes=0)(images(3))
    assert [m.shape for m in maps] == [(3, 24, 4, 4)] * 3


def test_what_timm_adapts(hub):
    hub.hold_deit()
    hub.run(client_timm_adapts_deits_weights)


def client_readout():
    return create('evo_deit_tiny').global_pool


def test_from_the_cache(hub):
    hub.hold_deit()
    assert hub.run(client_readout) == 'token'
    before = list(hub.server.requests)
    assert hub.run(client_readout, HF_HUB_OFFLINE='1') == 'token'
    assert hub.server.requests == before


# Weights handed over

def client_handed_over(folder, url):
    weights = torch.load(f'{folder}/authors.pth')
    paper = create('evo_deit_tiny', pretrained_cfg_overlay=dict(state_dict=dict(weights)))
    assert paper.global_pool == 'avg' and paper.head_cls is not None
    assert torch.equal(paper.fc_norm.weight, weights['model']['norm.weight'])
    for overlay in (dict(file=f'{folder}/authors.pth'), dict(url=f'{url}/weights.pth')):
        for name in ('evo_deit_tiny', 'evo_deit_tiny_patch16_224.fb_in1k'):
            model = create(name, pretrained_cfg_overlay=overlay)
            assert model.global_pool == 'avg' and model.pretrained_cfg['crop_pct'] == 0.875
            assert_same_weights(model, paper)
        # as scripts do that resolve the configuration first
        cfg = timm.models.resolve_pretrained_cfg('evo_deit_tiny_patch16_224', 'fb_in1k', overlay).to_dict()
        assert_same_weights(create('evo_deit_tiny_patch16_224', pretrained_cfg=cfg), paper)
    token = create('evo_deit_tiny', pretrained_cfg_overlay=dict(file=f'{folder}/authors.pth'), global_pool='token')
    assert torch.equal(token.norm.weight, paper.norm_cls.weight) and torch.equal(token.head.bias, paper.head_cls.bias)


def test_weights_handed_over_are_the_papers(hub):
    """With the tag fb_in1k, which is the default, and without the Hub being asked."""
    path = hub.folder / 'authors.pth'
    torch.save({'model': authors_names(build_deit(num_classes=1000))}, path)
    hub.server.files['/weights.pth'] = path.read_bytes()
    hub.run(client_handed_over, str(hub.folder), hub.server.url)
    assert set(hub.server.requests) == {'GET /weights.pth'}


@pytest.mark.parametrize('name', ['evo_deit_tiny', 'evo_deit_tiny.fb_in1k', 'evo_deit_base_patch16_384.fb_in1k'])
def test_without_weights_the_readout_is_the_papers(name):
    model = create(name, pretrained=False)
    assert model.global_pool == 'avg' and model.pretrained_cfg['crop_pct'] == 0.875
    for crop_pct in (0.9, 1.0):  # the first is that of the tag
        model = create(name, pretrained=False, pretrained_cfg_overlay=dict(crop_pct=crop_pct))
        assert model.pretrained_cfg['crop_pct'] == crop_pct


# What is missing or damaged

def client_moved_repository():
    moved = create('evo_deit_base_patch16_384')
    assert moved.global_pool == 'token' and moved.pretrained_cfg['crop_pct'] == 1
    assert_same_weights(without_mark(moved), create('deit_base_patch16_384'))


def test_a_repository_that_was_renamed(hub):
    hub.server.repos['renamed/deit_base'] = {'model.safetensors': save(dense_weights())}
    hub.server.moved['timm/deit_base_patch16_384.fb_in1k'] = 'renamed/deit_base'
    hub.run(client_moved_repository)


def client_missing():
    return [
        error(lambda: create('evo_deit_tiny', pretrained_cfg_overlay=dict(hf_hub_id='timm/nobody'))),
        error(lambda: create('evo_deit_base')),
        error(lambda: create('evo_deit_small_patch16_384')),
        error(lambda: create('evo_deit_tiny_patch16_224.nobody_in1k')),
    ]


def test_what_is_missing(hub):
    hub.server.repos['timm/deit_base_patch16_224.fb_in1k'] = {'config.json': b'{}'}
    repository, entry, weights, tag = hub.run(client_missing)
    assert repository.startswith('RepositoryNotFoundError')
    assert entry.startswith(('EntryNotFoundError', 'RemoteEntryNotFoundError'))
    assert 'No pretrained weights exist for evo_deit_small_patch16_384' in weights
    assert 'Invalid pretrained tag (nobody_in1k)' in tag


def client_damaged():
    return error(lambda: create('evo_deit_small'))


def client_whole():
    return create('evo_deit_small').global_pool


def test_a_damaged_file_is_not_kept(hub):
    whole = save(dense_weights())
    files = hub.server.repos['timm/deit_small_patch16_224.fb_in1k'] = {'model.safetensors': whole[:len(whole) // 2]}
    assert hub.run(client_damaged).startswith('SafetensorError')
    files['model.safetensors'] = whole
    assert hub.run(client_whole) == 'token'


# The paper's weights

def client_organisation(folder, url):
    assert set(PUBLISHED) == set(TOP1)
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
    assert_same_weights(levit, torch.load(f'{folder}/levit.pth'))
    return error(lambda: timm.create_model('evo_levit_256', pretrained=True, **TINY_LEVIT))


@pytest.mark.slow
def test_the_organisation_that_holds_the_papers_weights(hub):
    weights, levit = build_deit(num_classes=1000).state_dict(), build_levit(num_classes=1000).state_dict()
    hub.hold_deit()
    hub.server.repos.update({
        'somebody/evo_deit_tiny_patch16_224.evovit_in1k': {'model.safetensors': save(weights)},
        'somebody/evo_levit_128s.evovit_in1k': {'model.safetensors': save(levit)},
    })
    torch.save(levit, hub.folder / 'levit.pth')
    torch.save({k: v + 1 for k, v in weights.items()}, hub.folder / 'deit.pth')
    hub.server.files['/deit.pth'] = (hub.folder / 'deit.pth').read_bytes()
    missing = hub.run(client_organisation, str(hub.folder), hub.server.url, TIMM_EVOVIT_HUB='somebody')
    assert 'RepositoryNotFoundError' in missing and 'somebody/evo_levit_256.evovit_in1k' in missing


@pytest.mark.parametrize('name', PUBLISHED)
def test_nobody_has_said_where_they_are(name):
    assert 'TIMM_EVOVIT_HUB' not in os.environ, 'tests run without it'
    sizes = TINY_LEVIT if 'levit' in name else TINY
    with pytest.raises(RuntimeError) as e:
        timm.create_model(f'{name}.evovit_in1k', pretrained=True, **sizes)
    message = str(e.value)
    assert 'TIMM_EVOVIT_HUB' in message and f'timm-evovit convert {name}' in message
    assert (f'{name}.fb_in1k' if 'deit' in name else 'evo_deit_small_patch16_224.fb_in1k') in message
    assert not timm.models.is_model_pretrained(f'{name}.evovit_in1k')
    timm.create_model(f'{name}.evovit_in1k', **sizes)


@pytest.mark.parametrize('name, top1', TOP1.items())
def test_configuration_of_the_papers_weights(name, top1):
    cfg = timm.get_pretrained_cfg(f'{name}.evovit_in1k')
    assert cfg.hf_hub_id is None and f' {top1} %' in cfg.notes[0]
    assert cfg.crop_pct == 0.875 and cfg.license == 'mit' and cfg.paper_ids == 'arXiv:2108.01390'
    assert timm.get_pretrained_cfg(name).tag == ('fb_in1k' if 'deit' in name else 'evovit_in1k')


@pytest.mark.parametrize('size', ['tiny_patch16_224', 'small_patch16_224', 'base_patch16_224', 'base_patch16_384'])
def test_deits_tag_says_what_timm_says(size):
    ours, theirs = (timm.get_pretrained_cfg(f'{family}_{size}.fb_in1k') for family in ('evo_deit', 'deit'))
    for field in ('hf_hub_id', 'input_size', 'crop_pct', 'interpolation', 'mean', 'std', 'num_classes'):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.paper_ids == 'arXiv:2012.12877' and 'apache' in ours.license


def test_levit_has_no_weights_elsewhere():
    assert not timm.list_pretrained('evo_levit*')


# Upload

def push_own(model, repo):
    model.push_to_hf_hub(repo)


def push_timms(model, repo):
    timm.models.push_to_hf_hub(model, repo, model_args=model.model_args)


def push_plain(model, repo):
    """Where timm records the arguments by itself."""
    timm.models.push_to_hf_hub(model, repo)


TIMM_RECORDS_ARGS = hasattr(timm.create_model('test_vit', device='meta'), '_model_args')
pushes = pytest.mark.parametrize('push', [push_own, push_timms, pytest.param(
    push_plain, marks=pytest.mark.skipif(not TIMM_RECORDS_ARGS, reason='this timm does not record model arguments'))])


def push_and_reload(model, push, x):
    """The model from the Hub, bit for bit as the one that was pushed."""
    push(model, 'somebody/model')
    again = timm.create_model('hf-hub:somebody/model', pretrained=True).eval()
    assert_same_weights(again, model)
    assert json.loads(json.dumps(again.model_args)) == json.loads(json.dumps(model.model_args))
    with torch.no_grad():
        assert torch.equal(again(x), model.eval()(x))
    return again


def client_push_deit(push):
    model = create('evo_deit_tiny')
    model.set_keep_ratio((0.9, 0.8, 0.7, 0.6, 0.5, 0.3))
    again = push_and_reload(model, push, images())
    assert again.keep_ratio == (0.9, 0.8, 0.7, 0.6, 0.5, 0.3) and again.global_pool == 'token'
    warm = timm.create_model('hf-hub:somebody/model', pretrained=True, global_pool='avg')
    assert torch.equal(warm.head_cls.weight, model.head.weight) and torch.equal(warm.fc_norm.bias, model.norm.bias)


def client_push_arguments(push):
    model = create(
        'evo_deit_small', pretrained=False, num_classes=5, img_size=(32, 48), depth=6, stages=(1, 4), tradeoff=0.25,
        selection='layer', representative_token=True, assisted_cls=False, keep_ratio=0.3, layer_to_stage_epochs=0,
        drop_path_rate=0.1)
    torch.nn.init.normal_(model.head.weight)
    again = push_and_reload(model, push, images(2, (32, 48)))
    assert again.stage_starts == (1, 4) and again.selection == 'layer' and again.representative_token
    assert again.tradeoff == (0.25,) * 6 and again.head_cls is None
    assert again.patch_embed.img_size == (32, 48)
    larger = timm.create_model('hf-hub:somebody/model', pretrained=True, img_size=(48, 32))
    assert larger.pos_embed.shape == model.pos_embed.shape


def client_push_schedule(push):
    model = create('evo_deit_tiny', pretrained=False, layer_to_stage_epochs=2)
    model.reset_classifier(9, 'token')
    assert push_and_reload(model, push, images()).layer_to_stage_epochs == 2


def client_push_levit(push):
    model = build_levit(num_classes=4, tradeoff=0.25, keep_ratio=(0.5, 1, 0.3))
    model.set_keep_ratio(0.4)
    again = push_and_reload(model, push, images(2, 64))
    assert again.keep_ratio == (0.4,) * 3 and again.tradeoff is None


def client_push_vit(push):
    """By the name of its base, and evolved from a model of the Hub."""
    model = create('evo_vit', base='deit_tiny_patch16_224', keep_ratio=0.4, stages=(2, 6))
    again = push_and_reload(model, push, images())
    assert again.keep_ratio == (0.615, 0.26) and again.model_args['base'] == 'deit_tiny_patch16_224'
    dense = create('deit_tiny_patch16_224')
    assert_same_weights(again, dense)
    timm.models.push_to_hf_hub(dense, 'somebody/dense', model_args=TINY)
    from_hub = timm.create_model('evo_vit', base='hf-hub:somebody/dense', pretrained=True, keep_ratio=0.4, stages=(2, 6))
    with torch.no_grad():
        assert torch.equal(from_hub.eval()(images()), model(images()))
    push_and_reload(from_hub, push, images())


@pushes
@pytest.mark.parametrize('client', [
    client_push_deit, client_push_arguments, client_push_schedule, client_push_levit, client_push_vit])
def test_push_and_reload(hub, client, push):
    """Bit for bit, readout, keep ratio and all."""
    hub.hold_deit()
    hub.run(client, push)
    repo = hub.server.repos['somebody/model']
    assert {'config.json', 'model.safetensors', 'README.md'} <= set(repo)
    config = json.loads(repo['config.json'])
    if client is client_push_levit:
        assert config['architecture'] == 'evo_levit_128s' and config['model_args']['keep_ratio'] == [0.4] * 3
