"""DeiT's weights, the paper's, and models that were pushed, with a folder in the place of the Hub."""
import json
import os
from functools import partial

import helpers
import numpy as np
import pytest
import timm
import torch
from helpers import assert_same_weights, authors_names, build_deit, build_levit, images
from programs import run_python
from safetensors.torch import save_file

from timm_evovit import evolve, find_slow_tokens
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


def hold(folder, repo, weights):
    """Put weights where `hub` or a process in the folder finds them."""
    (folder / repo).mkdir(parents=True)
    save_file(weights, folder / repo / 'model.safetensors')


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that stands in for the Hub, with DeiT's weights, large enough that attention is far from uniform."""
    monkeypatch.setattr(
        'timm.models._hub.hf_hub_download', lambda repo_id, filename, **kwargs: str(tmp_path / repo_id / filename))
    monkeypatch.setattr(timm.models, 'push_to_hf_hub', lambda model, repo_id, **kwargs: timm.models.save_for_hf(
        model, tmp_path / repo_id, safe_serialization=True, **kwargs))
    dense = helpers.build('deit_tiny_patch16_224', num_classes=1000).state_dict()
    hold(tmp_path, 'timm/deit_tiny_patch16_224.fb_in1k', dense)
    return tmp_path


@torch.no_grad()
def test_deits_weights(hub):
    """The default tag without a variable: DeiT, as timm loads it and `evolve` makes it faster, unless arguments differ."""
    dense, x = create('deit_tiny_patch16_224'), images(3)
    for name in ('evo_deit_tiny', 'evo_deit_tiny_patch16_224', 'evo_deit_tiny_patch16_224.fb_in1k'):
        model = create(name)
        assert model.global_pool == 'token' and model.head_cls is None and model.slow_tokens == 'similarity'
        weights = model.state_dict()
        del weights[BY_SIMILARITY]
        assert_same_weights(weights, dense)
        expected = evolve(dense)(x)
        assert torch.equal(model(x), expected) and not torch.allclose(expected, dense(x), atol=1e-3)
        assert model.pretrained_cfg['crop_pct'] == dense.pretrained_cfg['crop_pct'] == 0.9
        model.set_keep_ratio(1)
        torch.testing.assert_close(model(x), dense(x))
    for kwargs in (dict(slow_tokens='attention'), dict(representative_token=True), dict(tradeoff=0.5),
                   dict(selection='layer'), dict(layer_to_stage_epochs=2)):
        model = create('evo_deit_tiny', **kwargs)
        assert model.slow_tokens == 'attention' and model.keep_ratio == (0.5, 0.5) and model.global_pool == 'token'
        assert find_slow_tokens(model, x)[0].attention is not None
    assert create('evo_deit_tiny', keep_ratio=0.7, slow_tokens='similarity').keep_ratio == evolve(dense, 0.7).keep_ratio
    pinned = create('evo_deit_tiny', pretrained_cfg_overlay=dict(hf_hub_id='timm/deit_tiny_patch16_224.fb_in1k@main'))
    assert pinned.global_pool == 'token' and torch.equal(pinned(x), expected)


def test_deits_weights_in_a_model_that_differs(hub):
    """Both branches start from DeiT where the readout is the paper's."""
    dense, model = create('deit_tiny_patch16_224'), create('evo_deit_tiny', global_pool='avg')
    for ours, theirs in ((model.fc_norm, dense.norm), (model.norm_cls, dense.norm), (model.head, dense.head),
                         (model.head_cls, dense.head), (model.blocks[3].mlp, dense.blocks[3].mlp)):
        assert_same_weights(ours, theirs)
    alone = create('evo_deit_tiny', global_pool='avg', assisted_cls=False)
    assert alone.head_cls is None and torch.equal(alone.fc_norm.weight, dense.norm.weight)


def test_weights_handed_over_are_the_papers(tmp_path, monkeypatch):
    """With the tag fb_in1k, which is the default, and without the Hub being asked."""
    monkeypatch.setattr('timm.models._hub.hf_hub_download', None)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    path = tmp_path / 'authors.pth'
    weights = authors_names(build_deit(num_classes=1000))
    torch.save({'model': weights}, path)
    paper = create('evo_deit_tiny', pretrained_cfg_overlay=dict(state_dict=dict(weights)))
    assert paper.global_pool == 'avg' and paper.head_cls is not None
    assert torch.equal(paper.fc_norm.weight, weights['norm.weight'])
    for overlay in (dict(file=str(path)), dict(url=path.as_uri())):
        for name in ('evo_deit_tiny', 'evo_deit_tiny_patch16_224.fb_in1k'):
            model = create(name, pretrained_cfg_overlay=overlay)
            assert model.global_pool == 'avg' and model.pretrained_cfg['crop_pct'] == 0.875
            assert_same_weights(model, paper)
        # as scripts do that resolve the configuration first
        cfg = timm.models.resolve_pretrained_cfg('evo_deit_tiny_patch16_224', 'fb_in1k', overlay).to_dict()
        assert_same_weights(create('evo_deit_tiny_patch16_224', pretrained_cfg=cfg), paper)
    token = create('evo_deit_tiny', pretrained_cfg_overlay=dict(file=str(path)), global_pool='token')
    assert torch.equal(token.norm.weight, paper.norm_cls.weight) and torch.equal(token.head.bias, paper.head_cls.bias)


@pytest.mark.parametrize('name', ['evo_deit_tiny', 'evo_deit_base_patch16_384.fb_in1k'])
def test_without_weights_the_readout_is_the_papers(name):
    model = create(name, pretrained=False)
    assert model.global_pool == 'avg' and model.pretrained_cfg['crop_pct'] == 0.875
    for crop_pct in (0.9, 1.0):  # the first is that of the tag
        model = create(name, pretrained=False, pretrained_cfg_overlay=dict(crop_pct=crop_pct))
        assert model.pretrained_cfg['crop_pct'] == crop_pct


# The paper's weights

def test_the_papers_weights_without_an_organisation():
    assert 'TIMM_EVOVIT_HUB' not in os.environ, 'tests run without it'
    assert set(PUBLISHED) == set(TOP1) and not timm.list_pretrained('evo_levit*')
    for name, top1 in TOP1.items():
        full, default = f'{name}.evovit_in1k', timm.get_pretrained_cfg(name)
        cfg = timm.get_pretrained_cfg(full)
        assert cfg.hf_hub_id is None and f' {top1} %' in cfg.notes[0] and not timm.models.is_model_pretrained(full)
        assert cfg.crop_pct == 0.875 and cfg.license == 'mit' and cfg.paper_ids == 'arXiv:2108.01390'
        sizes = TINY_LEVIT if 'levit' in name else TINY
        with pytest.raises(RuntimeError, match=f'TIMM_EVOVIT_HUB.*`timm-evovit convert {name} ') as e:
            timm.create_model(full, pretrained=True, **sizes)
        assert (f'{name}.fb_in1k' if 'deit' in name else 'evo_deit_small_patch16_224.fb_in1k') in str(e.value)
        assert default.tag == ('fb_in1k' if 'deit' in name else 'evovit_in1k')


def test_the_organisation_that_holds_the_papers_weights(tmp_path):
    """It is read from the environment when the package is imported."""
    deit, levit = build_deit(num_classes=1000), build_levit(num_classes=1000)
    for name, model in (('evo_deit_tiny_patch16_224', deit), ('evo_levit_128s', levit)):
        hold(tmp_path, f'somebody/{name}.evovit_in1k', model.state_dict())
    out, _ = run_python('-c', f'''if True:
        import json, timm, timm.models._hub, torch
        timm.models._hub.hf_hub_download = lambda repo_id, filename, **kwargs: f'{{repo_id}}/{{filename}}'
        deit = timm.create_model('evo_deit_tiny', pretrained=True, **{TINY})
        levit = timm.create_model('evo_levit_128s', pretrained=True, **{TINY_LEVIT})
        torch.save((deit.state_dict(), levit.state_dict()), 'loaded.pth')
        names = {[*PUBLISHED]}
        assert all(timm.models.is_model_pretrained(name) for name in names)
        print(json.dumps({{name: timm.get_pretrained_cfg(name).hf_hub_id for name in [*names, 'evo_deit_tiny']}}))
    ''', cwd=tmp_path, TIMM_EVOVIT_HUB='somebody')
    full = {name: name for name in PUBLISHED} | {'evo_deit_tiny': 'evo_deit_tiny_patch16_224'}
    assert json.loads(out) == {name: f'somebody/{full[name]}.evovit_in1k' for name in full}
    for model, loaded in zip((deit, levit), torch.load(tmp_path / 'loaded.pth'), strict=True):
        assert_same_weights(model, loaded)


@pytest.mark.parametrize('size', ['tiny_patch16_224', 'small_patch16_224', 'base_patch16_224', 'base_patch16_384'])
def test_deits_tag_says_what_timm_says(size):
    ours, theirs = (timm.get_pretrained_cfg(f'{family}_{size}.fb_in1k') for family in ('evo_deit', 'deit'))
    for field in ('hf_hub_id', 'input_size', 'crop_pct', 'interpolation', 'mean', 'std', 'num_classes'):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.paper_ids == 'arXiv:2012.12877' and 'apache' in ours.license


# Models that are pushed

RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.3)


def vit_of_the_hub():
    dense = create('deit_tiny_patch16_224')
    timm.models.push_to_hf_hub(dense, 'somebody/dense', model_args=TINY)
    model = create('evo_vit', base='hf-hub:somebody/dense', keep_ratio=0.4, stages=(2, 6))
    assert_same_weights(model, dense)
    return model


def test_arguments_of_numpy_can_be_saved():
    args = timm.create_model('evo_vit', keep_ratio=np.float32(0.5), stages=range(2, 7, 4), device='meta').model_args
    assert json.loads(json.dumps({k: args[k] for k in ('keep_ratio', 'stages')})) == {'keep_ratio': 0.5, 'stages': [2, 6]}


@pytest.mark.parametrize('build, keep_ratio, attributes', [
    (partial(create, 'evo_deit_tiny'), RATIOS, dict(keep_ratio=RATIOS, global_pool='token', slow_tokens='similarity')),
    (partial(
        helpers.build, 'evo_deit_small', num_classes=5, img_size=(32, 48), depth=6, stages=(1, 4), tradeoff=0.25,
        selection='layer', representative_token=True, assisted_cls=False, keep_ratio=0.3, layer_to_stage_epochs=0,
        drop_path_rate=0.1),
     None, dict(stage_starts=(1, 4), selection='layer', representative_token=True, tradeoff=(0.25,) * 6, head_cls=None)),
    (partial(build_levit, num_classes=4, tradeoff=0.25, keep_ratio=(0.5, 1, 0.3)), 0.4,
     dict(keep_ratio=(0.4,) * 3, tradeoff=None)),
    (partial(create, 'evo_vit', base='deit_tiny_patch16_224', stages=(2, 6)), 0.4,
     dict(keep_ratio=(0.615, 0.26), stage_starts=(2, 6))),
    (vit_of_the_hub, None, dict(keep_ratio=(0.615, 0.26), stage_starts=(2, 6))),
])
@pytest.mark.parametrize('by_timm', [False, True])
def test_push_and_reload(hub, build, keep_ratio, attributes, by_timm):
    """Bit for bit, readout, keep ratio and all; newer versions of timm record the arguments by themselves."""
    model = build()
    if keep_ratio:
        model.set_keep_ratio(keep_ratio)
    if by_timm and not hasattr(timm.create_model('test_vit', device='meta'), '_model_args'):
        pytest.skip('this timm does not record model arguments')
    if by_timm:
        timm.models.push_to_hf_hub(model, 'somebody/model')
    else:
        model.push_to_hf_hub('somebody/model')
    again = timm.create_model('hf-hub:somebody/model', pretrained=True).eval()
    assert_same_weights(again, model)
    assert json.loads(json.dumps(again.model_args)) == json.loads(json.dumps(model.model_args))
    assert {k: getattr(again, k) for k in attributes} == attributes
    x = helpers.images_for(model)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_a_pushed_model_with_other_arguments(hub):
    model = create('evo_deit_tiny')
    model.push_to_hf_hub('somebody/model')
    warm = timm.create_model('hf-hub:somebody/model', pretrained=True, global_pool='avg', img_size=(48, 32))
    assert torch.equal(warm.head_cls.weight, model.head.weight) and torch.equal(warm.fc_norm.bias, model.norm.bias)
    assert warm.pos_embed.shape[1] == 25
