"""Any Vision Transformer of timm that evolves, against its own dense blocks run by a plain reference."""
import copy
import functools
import math

import helpers
import pytest
import reference
import timm
import torch
from helpers import TINY, assert_same_weights, images, images_for, own_indices
from timm.models._features import FeatureGetterNet
from timm.models.eva import Eva, EvaBlockPostNorm
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)

from timm_evovit import evolve, find_slow_tokens

SMALL = dict(TINY, depth=6)
NO_CLASS_TOKEN = dict(class_token=False, global_pool='avg')
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
    ('vit_base_patch16_siglip_224', {}),
    ('vit_base_patch16_224', dict(NO_CLASS_TOKEN, reg_tokens=2)),
    ('vit_base_patch16_rpn_224', {}),
    ('gated', {}),
    # EvaAttention: fused projections and absolute positions; separate ones, rotary embedding, SwiGLU
    ('eva_large_patch14_196', {}),
    ('eva02_tiny_patch14_224', {}),
    ('eva02_base_patch14_224', dict(scale_attn_inner=True, img_size=(24, 40))),
    ('eva02_enormous_patch14_clip_224', {}),  # EvaBlockPostNorm
    ('vit_small_plus_patch16_dinov3', dict(init_values=0.5, dynamic_img_size=True)),  # halves are rotated; register tokens
    ('vit_base_patch16_rope_reg1_gap_256', {}),  # no class token
    # AttentionRope: attention pooling; an embedding for each block; fewer heads of keys and values, norm of queries
    ('vit_pe_core_tiny_patch16_384', {}),
    ('vit_base_patch16_rope_mixed_224', {}),
    ('vit_5b_patch16_sapiens2', dict(num_heads=4, embed_dim=32, num_kv_heads=2, init_values=0.5)),
    ('gated rope', {}),
    ('vit_base_patch16_224', dict(block_fn=ParallelScalingBlock)),
    ('vit_base_patch16_224', dict(block_fn=DiffParallelScalingBlock)),
    ('vit_base_patch16_224', dict(block_fn=ParallelThingsBlock)),
    ('vit_base_patch16_224', dict(attn_layer='diff', num_heads=3)),
    ('naflexvit_base_patch16_par_gap', {}),
    ('naflexvit_base_patch16_parfac_gap', dict(reg_tokens=2)),
    ('naflexvit_base_patch16_gap', dict(rope_type='axial')),
    ('naflexvit_base_patch16_siglip', dict(global_pool='map')),
]
by_model = pytest.mark.parametrize('name, config', MODELS, ids=[f'{i}-{name}' for i, (name, _) in enumerate(MODELS)])


def build_dense(name='vit_base_patch16_224', seed=0, **kwargs):
    """A small dense model in float64."""
    gated = name.startswith('gated')
    name = {'gated': 'vit_base_patch16_224', 'gated rope': 'vit_base_patch16_rope_224'}.get(name, name)
    kwargs = {'depth': 6, **kwargs}
    if not timm.is_model(name):
        pytest.skip(f'this timm has no {name}')
    torch.manual_seed(seed)
    model = timm.create_model(name, **helpers.tiny(name, **kwargs))
    if gated and not hasattr(model.blocks[0].attn, 'gate'):
        pytest.skip('the attention layers of this timm have no gate')
    for block in model.blocks if gated else ():
        block.attn.gate = torch.nn.Linear(24, 24)
    model = helpers.randomize(model).eval().double()
    if getattr(model, 'rope_mixed', False):
        try:
            model(images_for(model))
        except RuntimeError as e:
            pytest.skip(f'mixed rotary embeddings of this timm know no float64: {e}')
    return model


def written_out(dense, evolved, x):
    """Tokens (N, C) and groups of every image, by the dense model's own blocks.

    The rotary embedding that timm gives to a block, of a group that of the patch that others have joined, and the
    logarithm of the weights of keys are handed to the block.
    """
    results = []
    for image in x.split(1):
        calls = []
        hooks = [block.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((args[0], kwargs.get('rope'))), with_kwargs=True)
            for block in dense.blocks]
        dense(image)
        for hook in hooks:
            hook.remove()
        results.append(reference.evolve_by_similarity(
            functools.partial(run_block, dense, [rope for _, rope in calls]), calls[0][0][0], len(dense.blocks),
            dense.num_prefix_tokens, evolved.stage_starts, evolved.keep_ratio,
            [getattr(first_norm(block), 'weight', None) for block in dense.blocks],
            1 if isinstance(dense, NaFlexVit) else dense.patch_embed.grid_size[1]))
    return results


def first_norm(block):
    """What weighs the channels that a block reads, None with norms that come later."""
    if isinstance(block, ParallelThingsBlock):
        return block.attns[0].norm
    if isinstance(block, (ParallelScalingBlock, DiffParallelScalingBlock)):
        return block.in_norm
    return None if isinstance(block, (ResPostBlock, EvaBlockPostNorm)) else block.norm1


def run_block(dense, ropes, i, y, members, spread):
    logarithm = [0.] * dense.num_prefix_tokens + [
        math.log(len(own)) - 2 * cost / len(own) for own, cost in zip(members, spread)]
    rope = {} if ropes[i] is None else {'rope': ropes[i][..., [own[0] for own in members], :]}
    return dense.blocks[i](y[None], attn_mask=y.new_tensor(logarithm)[None, None, None], **rope)[0]


@pytest.mark.parametrize('kwargs', [
    dict(keep_ratio=(0.8, 0.4), stages=(1, 3)),
    dict(keep_ratio=(0.6, 0.2, 0.5), stages=(1, 2, 4)),  # two rounds of matching; from the complete grid again
], ids=['default', 'up and down'])
@by_model
@torch.no_grad()
def test_evolves_the_blocks_it_is_given(name, config, kwargs):
    dense = build_dense(name, **config)
    x = images_for(dense)
    before = dense(x)
    evolved = evolve(dense, **kwargs)
    expected = written_out(dense, evolved, x)
    found = find_slow_tokens(evolved, x)
    assert [t.block for t in found] == list(expected[0].kept) and len(found) >= 2
    for t in found:
        assert t.attention is None
        assert t.groups.flatten(1).tolist() == [r.kept[t.block] for r in expected]
        assert own_indices(t) == [
            [j for j, g in enumerate(r.kept[t.block]) if r.kept[t.block].count(g) == 1] for r in expected]
    tokens = dense.norm(torch.stack([r.tokens for r in expected]))
    torch.testing.assert_close(evolved(x), dense.forward_head(tokens))
    args = dict(indices=[2, 4], output_fmt='NLC', return_prefix_tokens=True)
    last, maps = evolved.forward_intermediates(x, **args)
    output = evolved.forward_intermediates(x, output_dict=True, **args)
    patches, prefix = (output.get(f'image_intermediates{name}') for name in ('', '_prefix'))
    assert isinstance(dense, Eva) or output.keys() == dense.forward_intermediates(x, output_dict=True, **args).keys()
    torch.testing.assert_close([last, output['image_features'], list(maps)], [
        tokens, tokens, list(zip(patches, prefix)) if prefix else patches])
    for i, found in zip((2, 4), maps, strict=True):
        found = torch.cat(found[::-1], dim=1) if prefix else found
        torch.testing.assert_close(found, torch.stack([r.after[i] for r in expected]))
    assert not torch.equal(evolved(x), before) and torch.equal(dense(x), before)


@by_model
@torch.no_grad()
def test_keep_ratio_1_leaves_outputs(name, config):
    """Bit for bit, called without a mask; feature extraction in the forms of timm."""
    dense = build_dense(name, **config)
    x = images_for(dense)
    evolved = evolve(dense, keep_ratio=1)
    masks = []
    hooks = [block.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs.get('attn_mask')), with_kwargs=True) for block in dense.blocks]
    assert torch.equal(evolved(x), dense(x))
    for hook in hooks:
        hook.remove()
    assert len(masks) == 2 * len(dense.blocks) and not any(mask is not None for mask in masks)
    for args in (dict(), dict(norm=True, return_prefix_tokens=True), dict(output_fmt='NLC', stop_early=True, indices=[1]),
                 dict(intermediates_only=True, indices=2), dict(output_dict=True, return_prefix_tokens=True)):
        if 'output_dict' in args and isinstance(dense, Eva):
            continue  # timm's Eva has none
        torch.testing.assert_close(
            evolved.forward_intermediates(x, **args), dense.forward_intermediates(x, **args), rtol=0, atol=0)
    evolved.set_keep_ratio(0.5)
    assert not torch.allclose(evolved(x), dense(x))


@by_model
def test_everything_is_shared(name, config):
    dense = build_dense(name, **config)
    evolved = evolve(dense)
    assert isinstance(evolved, type(dense))
    assert evolved.pretrained_cfg == dict(dense.pretrained_cfg, architecture='evo_vit')
    for named in ('named_modules', 'named_parameters', 'named_buffers'):
        own, other = (dict(getattr(m, named)()) for m in (evolved, dense))
        own.pop('', None), other.pop('', None)
        assert list(own) == list(other) and all(own[k] is other[k] for k in own)
    assert list(evolved.state_dict()) == list(dense.state_dict())
    evolved.reset_classifier(2)
    evolved.double()  # older timm makes a head in float32
    assert dense(images_for(dense)).shape[-1] == evolved(images_for(dense)).shape[-1] == 2 == dense.num_classes


@pytest.mark.parametrize('depth, stages', [(12, (0, 2, 4, 6, 8, 10)), (5, (0, 2, 4)), (2, (0,)), (1, (0,))])
def test_every_second_block_starts_a_stage(depth, stages):
    assert evolve(build_dense(depth=depth)).stage_starts == stages


@pytest.mark.parametrize('keep_ratio', [0.7, 0.5, 0.3])
def test_one_ratio_by_similarity_falls_from_block_to_block(keep_ratio):
    model = evolve(build_dense(depth=8), keep_ratio)
    powers = [math.log(ratio) / (block + 1) ** 1.2 for block, ratio in zip(model.stage_starts, model.keep_ratio)]
    assert max(powers) - min(powers) < 1e-2 * -powers[0]
    assert math.isclose(math.prod(model.keep_ratio), keep_ratio ** 4, rel_tol=7e-3)  # it is the geometric mean


def test_ratios_are_those_of_the_stages():
    model = evolve(build_dense(depth=8), 0.5)
    assert model.keep_ratio == (0.881, 0.624, 0.419, 0.271)
    model.set_keep_ratio((0.9, 0.9, 0.5, 0.7))
    assert model.keep_ratio == (0.9, 0.9, 0.5, 0.7)
    model.set_keep_ratio(1)
    assert model.keep_ratio == (1.,) * 4
    assert evolve(build_dense(depth=12), 0.5, stages=[4]).keep_ratio == (0.5,)
    assert evolve(build_dense(depth=12), 0.5, stages=[2, 5]).keep_ratio == (0.657, 0.381)


@pytest.mark.parametrize('name', ['vit_base_patch16_224', 'deit_tiny_distilled_patch16_224', 'eva02_tiny_patch14_224'])
@torch.no_grad()
def test_feature_maps_either_way(name):
    how = dict(stages=(2, 4), keep_ratio=(0.7, 0.5))
    dense = build_dense(name)
    x = images_for(dense)
    features = timm.create_model(name, features_only=True, **SMALL, out_indices=(1, 4)).double().eval()
    features.model.load_state_dict(dense.state_dict(), strict=False)
    evolved = evolve(features, **how)
    assert evolved.model.stage_starts == (2, 4) and len(evolved.model.blocks) == 5
    assert evolved.model.blocks[0] is features.model.blocks[0]
    assert evolved.feature_info.channels() == features.feature_info.channels() == [24, 24]
    expected = [r.after for r in written_out(dense, evolve(dense, **how), x)]
    again = FeatureGetterNet(evolve(copy.deepcopy(dense), **how), out_indices=(1, 4))(x)
    for i, a, b, c in zip((1, 4), evolved(x), again, features(x)):
        maps = torch.stack([after[i][dense.num_prefix_tokens:].T.unflatten(1, (4, 4)) for after in expected])
        torch.testing.assert_close(a, maps)
        torch.testing.assert_close(b, maps)
        assert (i == 1) == torch.allclose(a, c)  # before any selection the dense maps


@pytest.mark.parametrize('name, config', MODELS[:4] + MODELS[7:8], ids=[name for name, _ in MODELS[:4] + MODELS[7:8]])
def test_trains(name, config):
    evolved = evolve(build_dense(name, **config)).train()
    x = images_for(evolved)
    gradients = torch.autograd.grad(evolved(x).square().sum(), list(evolved.parameters()))
    assert all(g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize('name', [
    'vit_base_patch16_224', 'eva02_tiny_patch14_224', 'vit_base_patch16_rope_mixed_224', 'naflexvit_base_patch16_gap',
    'naflexvit mixed rope'])
def test_patch_dropout(name):
    """Rotary embeddings are then those of other patches in every image."""
    mixed = dict(rope_type='mixed') if 'naflexvit mixed' in name else {}
    dense = build_dense(name.replace('vit mixed rope', 'vit_base_patch16_gap'), patch_drop_rate=0.3, **mixed).train()
    x = images_for(dense)
    outputs = []
    for model in (dense, evolve(dense, 1), evolve(dense)):
        torch.manual_seed(0)  # the same patches
        outputs.append(model(x))
    assert torch.equal(outputs[1], outputs[0]) and not torch.allclose(outputs[2], outputs[0])


def test_pruning_leaves_the_series_of_ratios():
    for prune_dense in (False, True):
        dense = build_dense(depth=12)
        model = evolve(dense, 0.5)
        ratios = model.keep_ratio
        (dense if prune_dense else model).prune_intermediate_layers([4])
        model.set_keep_ratio(0.5)
        assert model.keep_ratio == ratios[:3] and len(model.blocks) == 5


def test_an_empty_batch_of_grouped_keys():
    dense = build_dense(
        'vit_5b_patch16_sapiens2', num_heads=4, embed_dim=32, num_kv_heads=2, init_values=0.5, dynamic_img_size=False)
    x = images_for(dense)[:0]
    assert evolve(dense)(x).shape == dense(x).shape == (0, 10)


def test_arguments_are_those_of_the_model_as_built():
    """Also where features_only has pruned it since."""
    config = dict(pretrained=False, features_only=True, out_indices=(1, 3), **SMALL)
    pruned = evolve(timm.create_model('vit_tiny_patch16_224', **config), keep_ratio=(0.7, 0.5), stages=(2, 4)).model
    assert pruned.stage_starts == (2,) and pruned.keep_ratio == (0.7,)
    assert len(pruned.blocks) == 4


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


def test_a_pretrained_cfg_without_weights_is_kept():
    cfg = dict(input_size=(3, 96, 96), mean=(0., 0., 0.), num_classes=7)
    model = timm.create_model('evo_vit', base='vit_tiny_patch16_224', pretrained_cfg=cfg)
    assert model.num_classes == 7 and {k: model.pretrained_cfg[k] for k in cfg} == cfg


def test_folders_come_back(tmp_path):
    """Of an older version, whose config has the arguments of class attention at the values that they had by
    similarity; and of a model with another patch size than it was built with.
    """
    old = dict(slow_tokens='similarity', representative_token=None, tradeoff=None, selection='stage')
    for args in (old, {}):
        model = timm.create_model('evo_vit', base='vit_tiny_patch16_224', keep_ratio=0.5, **ARGS).eval()
        if not args:
            model.set_input_size(patch_size=16)
        timm.models.save_for_hf(model, tmp_path, model_args={**model.model_args, **args}, safe_serialization=True)
        again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
        with torch.no_grad():
            assert torch.equal(again(images(2)), model(images(2)))


@pytest.mark.parametrize('kwargs, error, message', [
    (dict(base='nothing_of_that_name'), RuntimeError, 'nothing_of_that_name'),
    (dict(base='resnet18'), TypeError, 'VisionTransformer, Eva, NaFlexVit, got ResNet'),
    (dict(slow_tokens='attention'), ValueError, "slow_tokens must be left out: .* Evo-DeiT has it, got 'attention'"),
    (dict(layer_to_stage_epochs=200), ValueError, 'layer_to_stage_epochs must be left out'),
    (dict(nothing=1), TypeError, 'nothing'),
    (dict(keep_ratio=2), ValueError, r'keep_ratio must be in \(0, 1\], got 2'),
])
def test_evo_vit_says_why_it_cannot_be_built(kwargs, error, message):
    with pytest.raises(error, match=message):
        timm.create_model('evo_vit', device='meta', **kwargs)


@pytest.mark.slow
def test_transformers_load_what_timm_and_they_saved(tmp_path):
    transformers = pytest.importorskip('transformers', reason='transformers is not installed')
    model = evolve(timm.create_model('vit_tiny_patch16_224', **ARGS).eval(), 0.7, (1, 3))
    timm.models.save_for_hf(model, tmp_path, model_args=model.model_args, safe_serialization=True)
    config = transformers.TimmWrapperConfig.from_pretrained(tmp_path)
    config.model_args.pop('num_classes', None)  # timm 1.0.31 writes it, and transformers would pass it twice
    wrapper = transformers.AutoModelForImageClassification.from_pretrained(tmp_path, config=config).eval()
    told = transformers.TimmWrapperConfig(architecture='evo_vit', model_args=model.model_args, num_labels=7)
    assert transformers.TimmWrapperForImageClassification(told).timm_model.keep_ratio == model.keep_ratio
    wrapper.save_pretrained(tmp_path / 'again')
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'again').eval()
    assert wrapper.timm_model.keep_ratio == again.timm_model.keep_ratio == model.keep_ratio == (0.805, 0.608)
    with torch.no_grad():
        torch.testing.assert_close(wrapper(images(2)).logits, model(images(2)))
        torch.testing.assert_close(again(images(2)).logits, model(images(2)))
