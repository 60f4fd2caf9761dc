"""Any ViT of timm that evolves, against its own dense blocks run by a plain reference."""
import copy
import math

import helpers
import pytest
import reference
import timm
import torch
from helpers import TINY, assert_same_weights, images, images_for, informative_indices
from safetensors.torch import load_file
from timm.models._features import FeatureGetterNet
from timm.models.vision_transformer import Attention, ResPostBlock, VisionTransformer

from timm_evovit import evolve, informative_tokens

SMALL = dict(TINY, depth=6)
MODELS = [
    ('deit_small_patch16_224', {}),
    ('deit_tiny_distilled_patch16_224', {}),
    ('deit3_small_patch16_224', dict(init_values=0.5)),
    ('vit_base_patch16_224', dict(global_pool='avg', qk_norm=True)),
    ('vit_base_patch16_224', dict(depth=7, in_chans=1, img_size=(24, 40), dynamic_img_size=True)),
    ('vit_base_patch16_clip_quickgelu_224', {}),
    ('vit_small_patch14_reg4_dinov2', dict(init_values=0.5, mlp_ratio=2)),
    ('vit_tiny_r_s16_p8_224', dict(img_size=64, patch_size=1)),
    ('vit_base_patch16_224', dict(global_pool='map', scale_attn_norm=True, scale_mlp_norm=True, reg_tokens=2)),
]


def build(name='vit_base_patch16_224', seed=0, **kwargs):
    """A small dense model in float64."""
    return helpers.build(name, seed, **{'depth': 6, **kwargs}).double()


def written_out(dense, evolved, x):
    """Tokens (B, N, C) and informative patches of every image, by the dense model's own blocks."""
    def block(i, y):
        attn = dense.blocks[i].attn
        q, k, _ = attn.qkv(dense.blocks[i].norm1(y)).view(len(y), 3, attn.num_heads, -1).unbind(1)
        q, k = attn.q_norm(q), attn.k_norm(k)
        rows = [torch.softmax(q[0, h] @ k[:, h].T / math.sqrt(attn.head_dim), dim=0) for h in range(attn.num_heads)]
        return dense.blocks[i](y[None])[0], sum(rows) / len(rows)

    before = []
    hook = dense.blocks[0].register_forward_pre_hook(lambda module, args: before.append(args[0]))
    dense(x)
    hook.remove()
    return [
        reference.evolve(
            block, y, len(dense.blocks), dense.num_prefix_tokens, evolved.stage_starts, evolved.keep_ratio,
            evolved.blocks.tradeoff, evolved.selection == 'layer', evolved.blocks.representative_token)
        for y in before[0]
    ]


@pytest.mark.parametrize('kwargs', [
    {}, dict(representative_token=False, keep_ratio=0.3),
    dict(selection='layer', stages=(1, 3), keep_ratio=(0.7, 0.4), tradeoff=0.25),
], ids=['default', 'no representative token', 'layer-wise'])
@pytest.mark.parametrize('name, config', MODELS, ids=[f'{i}-{name}' for i, (name, _) in enumerate(MODELS)])
@torch.no_grad()
def test_evolves_the_blocks_it_is_given(name, config, kwargs):
    dense = build(name, **config)
    x = images_for(dense)
    before = dense(x)
    evolved = evolve(dense, **kwargs)
    expected = written_out(dense, evolved, x)
    found = informative_tokens(evolved, x)
    assert [t.block for t in found] == list(expected[0].kept) and len(found) >= 2
    for t in found:
        assert informative_indices(t) == [r.kept[t.block] for r in expected]
    tokens = dense.norm(torch.stack([r.tokens for r in expected]))
    torch.testing.assert_close(evolved(x), dense.forward_head(tokens))
    last, maps = evolved.forward_intermediates(x, indices=[2, 4], output_fmt='NLC', return_prefix_tokens=True)
    torch.testing.assert_close(last, tokens)
    for i, (patches, prefix) in zip((2, 4), maps):
        torch.testing.assert_close(
            torch.cat([prefix, patches], dim=1), torch.stack([r.after[i] for r in expected]))
    assert not torch.equal(evolved(x), before) and torch.equal(dense(x), before)


@pytest.mark.parametrize('name, config', MODELS, ids=[f'{i}-{name}' for i, (name, _) in enumerate(MODELS)])
@torch.no_grad()
def test_keep_ratio_1_leaves_outputs(name, config):
    dense = build(name, **config)
    x = images_for(dense)
    evolved = evolve(dense, keep_ratio=1)
    torch.testing.assert_close(evolved(x), dense(x))
    evolved.set_keep_ratio(0.5)
    assert not torch.allclose(evolved(x), dense(x))


@pytest.mark.parametrize('name, config', MODELS, ids=[f'{i}-{name}' for i, (name, _) in enumerate(MODELS)])
def test_everything_is_shared(name, config):
    dense = build(name, **config)
    evolved = evolve(dense)
    assert isinstance(evolved, type(dense))
    assert evolved.pretrained_cfg == dict(dense.pretrained_cfg, architecture='evo_vit')
    assert dict(evolved.named_parameters()).keys() == dict(dense.named_parameters()).keys()
    assert all(a is b for a, b in zip(evolved.parameters(), dense.parameters()))
    assert list(evolved.state_dict()) == list(dense.state_dict())
    parameters = sum(p.numel() for p in dense.parameters())
    dense.reset_classifier(2)  # of one of them, the other keeps its own
    assert evolved(images_for(evolved)).shape[-1] == 10 and sum(p.numel() for p in evolved.parameters()) == parameters


@pytest.mark.parametrize('depth, stages', [(12, (4, 8)), (24, (8, 16)), (6, (2, 4)), (7, (2, 4)), (2, (1,)), (1, ())])
def test_default_stages_are_a_dense_third_and_two_equal_stages(depth, stages):
    assert evolve(build(depth=depth)).stage_starts == stages


@pytest.mark.parametrize('name', ['vit_base_patch16_224', 'deit_tiny_distilled_patch16_224'])
def test_feature_maps_either_way(name):
    dense = build(name)
    x = images_for(dense)
    config = {**SMALL, 'out_indices': (1, 4)}
    features = timm.create_model(name, features_only=True, **config).double().eval()
    features.model.load_state_dict(dense.state_dict(), strict=False)
    evolved = evolve(features)
    assert evolved.model.stage_starts == evolve(dense).stage_starts == (2, 4) and len(evolved.model.blocks) == 5
    assert evolved.feature_info.channels() == features.feature_info.channels() == [24, 24]
    expected = [r.after for r in written_out(dense, evolve(dense), x)]
    with torch.no_grad():
        again = FeatureGetterNet(evolve(dense), out_indices=(1, 4))(x)
        for i, a, b, c in zip((1, 4), evolved(x), again, features(x)):
            maps = torch.stack([after[i][dense.num_prefix_tokens:].T.unflatten(1, (4, 4)) for after in expected])
            torch.testing.assert_close(a, maps)
            torch.testing.assert_close(b, maps)
            assert (i == 1) == torch.allclose(a, c)  # before any selection the dense maps


some_models = pytest.mark.parametrize('name, config', [MODELS[1], MODELS[6]], ids=['distilled', 'registers'])


@pytest.mark.slow
@some_models
@torch.no_grad()
def test_script_fx_export_and_compile(name, config):
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
    evolved = evolve(build(name, **config))
    x = images_for(evolved)
    expected = evolved(x)
    torch.testing.assert_close(torch.jit.script(evolved)(x), expected)
    node = get_graph_node_names(evolved)[1][-1]
    torch.testing.assert_close(create_feature_extractor(evolved, [node])(x)[node], expected)
    batch = torch.export.Dim('batch', min=2, max=64)
    exported = torch.export.export(evolved, (x[:2],), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(exported.module()(x), expected)
    torch.testing.assert_close(torch.compile(evolved, backend='eager', fullgraph=True)(x), expected)


@some_models
@torch.no_grad()
def test_copies(name, config, tmp_path):
    evolved = evolve(build(name, **config))
    x = images_for(evolved)
    expected = evolved(x)
    torch.save(evolved, tmp_path / 'model.pt')
    assert torch.equal(torch.load(tmp_path / 'model.pt', weights_only=False)(x), expected)
    assert torch.equal(copy.deepcopy(evolved)(x), expected)
    torch.save(evolved.state_dict(), tmp_path / 'weights.pt')
    fresh = build(name, seed=1, **config)
    fresh.load_state_dict(torch.load(tmp_path / 'weights.pt'))
    assert torch.equal(evolve(fresh)(x), expected)
    assert copy.deepcopy(evolved).bfloat16()(x.bfloat16()).isfinite().all()


@pytest.mark.parametrize('name, config', MODELS[:4] + MODELS[7:8], ids=[name for name, _ in MODELS[:4] + MODELS[7:8]])
def test_trains(name, config):
    evolved = evolve(build(name, **config)).train()
    x = images_for(evolved)
    gradients = torch.autograd.grad(evolved(x).square().sum(), list(evolved.parameters()))
    assert all(g.abs().sum() > 0 for g in gradients)
    evolved.set_grad_checkpointing()
    again = torch.autograd.grad(evolved(x).square().sum(), list(evolved.parameters()))
    torch.testing.assert_close(again, gradients)


@pytest.mark.slow
@some_models
def test_compiled_training(name, config):
    evolved = evolve(build(name, **config)).train()
    x = images_for(evolved)
    gradients = [torch.autograd.grad(forward(x).square().sum(), list(evolved.parameters()))
                 for forward in (evolved, torch.compile(evolved, backend='aot_eager', fullgraph=True))]
    torch.testing.assert_close(*gradients)


def test_modes_are_not_shared():
    dense = build(drop_path_rate=0.5, proj_drop_rate=0.5)
    x = images_for(dense)
    evolved = evolve(dense).train()
    assert torch.equal(dense(x), dense(x)) and not torch.equal(evolved(x), evolved(x))
    names = [name for name, _ in evolved.named_modules() if not name.endswith('.grid')]
    assert names == [name for name, _ in dense.named_modules()]
    assert not any(a is b for a, b in zip(evolved.modules(), dense.modules()))
    evolved.blocks[0].mlp.fc1.weight.data.zero_()
    assert dense.blocks[0].mlp.fc1.weight.abs().sum() == 0


def test_another_input_size():
    evolved = evolve(build())
    evolved.set_input_size((48, 32))
    x = torch.randn(2, 3, 48, 32, generator=torch.Generator().manual_seed(0)).double()
    dense = build(img_size=(48, 32))
    dense.load_state_dict(evolved.state_dict())
    assert torch.equal(evolved(x), evolve(dense)(x)) and informative_tokens(evolved, x)[0].mask.shape == (2, 6, 4)


def test_arguments_are_those_of_the_model_as_built():
    """Also where features_only has pruned it since."""
    config = dict(pretrained=False, features_only=True, out_indices=(1, 3), **SMALL)
    pruned = evolve(timm.create_model('vit_tiny_patch16_224', **config), keep_ratio=(0.7, 0.5), stages=(2, 4)).model
    assert pruned.stage_starts == (2,) and pruned.keep_ratio == (0.7,)
    assert len(pruned.blocks.tradeoff) == len(pruned.blocks) == 4


def gated():
    model = build()
    model.blocks[2].attn.gate = torch.nn.Linear(24, 24)
    return model


class OtherAttention(Attention):
    pass


class OtherTransformer(VisionTransformer):
    pass


@pytest.mark.parametrize('model, error, message', [
    (lambda: timm.create_model('vit_tiny_patch16_224', class_token=False, global_pool='avg', **SMALL),
     ValueError, 'no class token'),
    (lambda: timm.create_model('vit_tiny_patch16_224', class_token=False, reg_tokens=2, global_pool='avg', **SMALL),
     ValueError, 'no class token'),
    (lambda: timm.create_model('vit_tiny_patch16_224', **SMALL, block_fn=ResPostBlock),
     TypeError, "blocks.0 must be timm's Block, got ResPostBlock"),
    (lambda: timm.create_model('vit_tiny_patch16_224', **SMALL, attn_layer=OtherAttention),
     TypeError, "blocks.0.attn must be timm's Attention, got OtherAttention"),
    (lambda: gated(), TypeError, 'blocks.2.attn is gated'),
    (lambda: OtherTransformer(**SMALL), TypeError, 'got OtherTransformer'),
    (lambda: timm.create_model('resnet10t'), TypeError, 'got ResNet'),
    (lambda: timm.create_model('evo_deit_tiny', **SMALL), TypeError, 'EvoVisionTransformer evolves already'),
    (lambda: evolve(build()), TypeError, 'EvolvedVisionTransformer evolves already'),
    (lambda: torch.compile(build()), TypeError, 'got OptimizedModule'),
], ids=lambda v: None if callable(v) else '')
def test_what_cannot_evolve_is_refused(model, error, message):
    model = model()
    with pytest.raises(error, match=message):
        evolve(model)


@pytest.mark.parametrize('kwargs, error, message', [
    (dict(keep_ratio=0), ValueError, r'keep_ratio must be in \(0, 1\], got 0'),
    (dict(keep_ratio=(0.5, 0.5, 0.5)), ValueError, 'keep_ratio must be one number or 2'),
    (dict(stages=(3, 3)), ValueError, r'ascending order, got \(3, 3\)'),
    (dict(stages=(6,)), ValueError, r'1 \.\. 5 for a model of 6 blocks'),
    (dict(tradeoff=2), ValueError, 'tradeoff must be in'),
    (dict(selection='none'), ValueError, "got 'none'"),
    (dict(representative_token='no'), TypeError, "got 'no'"),
])
def test_bad_arguments_leave_the_model_alone(kwargs, error, message):
    dense = build()
    x = images_for(dense)
    with torch.no_grad():
        before = dense(x)
        with pytest.raises(error, match=message):
            evolve(dense, **kwargs)
        assert torch.equal(dense(x), before) and type(dense) is VisionTransformer


# evo_vit, by name

ARGS = dict(img_size=32, patch_size=8, embed_dim=24, num_heads=3, num_classes=7)


@pytest.mark.parametrize('base', ['vit_tiny_patch16_224', 'deit_tiny_distilled_patch16_224', 'vit_small_patch14_reg4_dinov2'])
def test_evo_vit_evolves_its_base(base):
    args = dict(ARGS, in_chans=1, drop_rate=0.1)
    torch.manual_seed(0)
    model = timm.create_model('evo_vit', base=base, keep_ratio=0.7, stages=(3,), **args).eval()
    torch.manual_seed(0)
    dense = timm.create_model(base, **args).eval()
    assert_same_weights(model, dense)
    x = images(2, 32, 1)
    with torch.no_grad():
        torch.testing.assert_close(model(x), evolve(dense, 0.7, (3,))(x))
        model.set_keep_ratio(1)
        torch.testing.assert_close(model(x), dense(x))
    for key in ('mean', 'std', 'crop_pct', 'interpolation'):
        assert model.pretrained_cfg[key] == dense.pretrained_cfg[key]
    backbone = timm.create_model('evo_vit', base=base, features_only=True, out_indices=(1, 4), **dict(ARGS, num_classes=0))
    assert [y.shape[1:] for y in backbone(images(1))] == [(24, 4, 4)] * 2


@pytest.mark.parametrize('by_name', [True, False])
def test_evo_vit_comes_back_evolving(by_name, tmp_path):
    """From a folder that timm's own function has written, with the keep ratio that it was saved with."""
    if by_name:
        model = timm.create_model('evo_vit', base='vit_tiny_patch16_224', selection='layer', **ARGS).eval()
    else:
        dense = timm.create_model('vit_tiny_patch16_224', **ARGS)
        if not hasattr(dense, '_model_args'):
            pytest.skip('this timm does not record model arguments')
        model = evolve(dense, selection='layer').eval()
    model.set_keep_ratio(0.3)
    timm.models.save_for_hf(model, tmp_path, model_args=model.model_args, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = images(2)
    assert type(again) is type(model) and again.keep_ratio == (0.3, 0.3)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    weights = load_file(tmp_path / 'model.safetensors')
    timm.create_model('vit_tiny_patch16_224', **ARGS).load_state_dict(weights)  # the dense base takes them


@pytest.mark.parametrize('kwargs, error, message', [
    (dict(base='nothing_of_that_name'), RuntimeError, 'nothing_of_that_name'),
    (dict(base='resnet18'), TypeError, 'VisionTransformer or VisionTransformerDistilled, got ResNet'),
    (dict(base='vit_base_patch16_siglip_224'), ValueError, 'no class token'),
    (dict(nothing=1), TypeError, 'nothing'),
    (dict(keep_ratio=2), ValueError, r'keep_ratio must be in \(0, 1\], got 2'),
])
def test_evo_vit_says_why_it_cannot_be_built(kwargs, error, message):
    with pytest.raises(error, match=message):
        timm.create_model('evo_vit', device='meta', **kwargs)


@pytest.mark.slow
def test_evo_vit_in_transformers_wrapper(tmp_path):
    transformers = pytest.importorskip('transformers', reason='transformers is not installed')
    args = {k: v for k, v in ARGS.items() if k != 'num_classes'}
    config = transformers.TimmWrapperConfig(
        architecture='evo_vit', model_args=dict(base='vit_tiny_patch16_224', keep_ratio=0.7, **args), num_labels=7)
    wrapper = transformers.TimmWrapperForImageClassification(config).eval()
    wrapper.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert again.timm_model.keep_ratio == (0.7, 0.7)
    with torch.no_grad():
        torch.testing.assert_close(again(images(2)).logits, wrapper(images(2)).logits)
