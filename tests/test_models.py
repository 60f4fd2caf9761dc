"""Evo-DeiT and Evo-LeViT alike: sizes, arguments, and what timm does with a model."""
from itertools import product

import pytest
import timm
import torch
from helpers import FAMILIES, both_families, build, images_for, tiny
from timm.optim import param_groups_layer_decay
from torch.utils._pytree import tree_leaves

from timm_evovit import find_slow_tokens


@pytest.mark.parametrize('name, assisted, alone', [
    ('evo_deit_tiny_patch16_224', 5_910_800, 5_717_416),
    ('evo_deit_small_patch16_224', 22_436_432, 22_050_664),
    ('evo_deit_base_patch16_224', 87_338_192, 86_567_656),
    ('evo_levit_128s', 8_606_651, 7_835_115),
    ('evo_levit_128', 10_041_022, 9_269_486),
    ('evo_levit_192', 11_803_526, 11_031_990),
    ('evo_levit_256', 20_035_278, 19_007_230),
    ('evo_levit_384', 40_836_830, 39_295_758),
])
def test_published_sizes(name, assisted, alone):
    """Parameters with and without what classifies the class token, as the authors' models have them."""
    short = name.removesuffix('_patch16_224')
    assert timm.get_pretrained_cfg(short).tag == timm.get_pretrained_cfg(name).tag
    for either, assisted_cls, count in ((name, False, alone), (short, True, assisted)):
        model = timm.create_model(either, assisted_cls=assisted_cls, device='meta')
        assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize('name, published', [
    ('evo_deit_small_patch16_384', False), ('evo_deit_base_patch16_384', True), ('evo_levit_128s_384', False),
    ('evo_levit_128_384', False), ('evo_levit_192_384', False), ('evo_levit_256_384', True), ('evo_levit_384_384', True),
])
def test_larger_input(name, published):
    model = timm.create_model(name, device='meta')
    data = timm.data.resolve_data_config(model=model)
    assert data['input_size'] == (3, 384, 384) and data['interpolation'] == 'bicubic' and data['crop_pct'] == 0.875
    assert model.pos_embed.shape[1] == 24 * 24 + 1
    assert (timm.get_pretrained_cfg(name).tag != 'untrained') == published
    if 'levit' in name:
        assert getattr(model.stages[0].blocks[0].drop_path1, 'drop_prob', 0) == (0.1 if name == 'evo_levit_384_384' else 0)
        assert model.stages[1].downsample.attn_downsample.pos_embed.shape[1] == 24 * 24 + 1


BAD = {
    'deit': [
        (dict(keep_ratio=0), ValueError, r'keep_ratio must be in \(0, 1\], got 0'),
        (dict(keep_ratio=(0.5,)), ValueError, r'2, one per evolution stage, got \(0.5,\)'),
        (dict(keep_ratio=(0.5, '0.5')), TypeError, "'0.5'"),
        (dict(stages=(4, 12)), ValueError, r'1 .. 11 for a model of 12 blocks, got \(4, 12\)'),
        (dict(stages=(4, 8.5)), TypeError, '8.5'),
        (dict(tradeoff=1.2), ValueError, r'tradeoff must be in \[0, 1\], got 1.2'),
        (dict(tradeoff=(0.5,) * 11), ValueError, r'12, one per block, got \(0.5'),
        (dict(tradeoff='learned'), TypeError, 'learned'),
        (dict(class_token=False), ValueError, 'class_token must be True .* got False'),
        (dict(block_fn=torch.nn.Identity), TypeError, r'blocks\.0.* got Identity'),
        (dict(attn_layer='diff'), TypeError, r'blocks\.0.* got .*DiffAttention'),
    ],
    'levit': [
        (dict(keep_ratio=1.5), ValueError, '1.5'),
        (dict(keep_ratio=(0.5, 0.5)), ValueError, r'3, one per evolution stage, got \(0.5, 0.5\)'),
        (dict(keep_ratio='half'), TypeError, 'half'),
        (dict(tradeoff=1.2), ValueError, r'tradeoff must be .*\[0, 1\], got 1.2'),
        (dict(tradeoff='half'), ValueError, "'half'"),
        (dict(tradeoff=(0.5, 0.5)), ValueError, '0.5, 0.5'),
        (dict(use_conv=True), ValueError, 'use_conv must be left out.*got True'),
        (dict(img_size=16), ValueError, 'img_size must be larger than 32 pixels .* got .*16'),
        (dict(depth=(4, 4)), ValueError, r'depth .* 3 by embed_dim, got \(4, 4\)'),
        (dict(embed_dim=16), TypeError, 'embed_dim must be one width per stage, .* got 16'),
        (dict(key_dim=32), ValueError, r'key_dim must be in 1 \.\. 16, got 32'),
        (dict(stem_backbone=torch.nn.Identity()), ValueError, 'stem_backbone'),
    ],
    'both': [
        (dict(selection='token'), ValueError, "'stage' or 'layer', got 'token'"),
        (dict(representative_token='no'), TypeError, "representative_token must be True or False, got 'no'"),
        (dict(layer_to_stage_epochs=-1), ValueError, 'layer_to_stage_epochs must be 0 or more epochs, got -1'),
        (dict(layer_to_stage_epochs=0.5), TypeError, 'layer_to_stage_epochs must be a number of epochs .* got 0.5'),
        (dict(layer_to_stage_epochs=9, selection='layer'), ValueError, "selection must be 'stage' with layer_to_stage_ep"),
        (dict(not_an_argument=1), TypeError, 'not_an_argument'),
    ],
}


@pytest.mark.parametrize('family, kwargs, error, message', [
    (family, *row) for family in FAMILIES for row in BAD[family] + BAD['both']])
def test_bad_arguments(family, kwargs, error, message):
    with pytest.raises(error, match=message):
        timm.create_model(FAMILIES[family], **tiny(FAMILIES[family], **kwargs))


GRADIENTS = {
    'deit': [
        dict(representative_token=True), dict(representative_token=True, selection='layer'), dict(global_pool='token'),
        dict(global_pool='map'), dict(global_pool='max'), dict(global_pool='avgmax'), dict(reg_tokens=1),
        dict(img_size=8), dict(fc_norm=False), dict(final_norm=False), dict(patch_drop_rate=0.25),
        dict(init_values=0.1, qk_norm=True)],
    'levit': [
        dict(representative_token=False), dict(tradeoff=0.5), dict(global_pool='', num_classes=0), dict(depth=(1, 1, 1)),
        dict(img_size=33), dict(depth=(0, 1, 0)), dict(drop_rate=0.1, drop_path_rate=0.2)],
    'both': [{}, dict(selection='layer'), dict(assisted_cls=False), dict(keep_ratio=1), dict(num_classes=0)],
}


@pytest.mark.parametrize('family, kwargs', [(f, kwargs) for f in FAMILIES for kwargs in GRADIENTS[f] + GRADIENTS['both']])
def test_every_parameter_has_a_gradient(family, kwargs):
    for distilled, assisted in product((False, True)[:1 + (family == 'levit')], (False, True)):
        model = build(family, **kwargs).train()
        model.set_assisted_training(assisted)
        if distilled:
            model.set_distilled_training()
        sum(y.square().sum() for y in tree_leaves(model(images_for(model)))).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize('family, last', [('deit', 3), ('deit', 5), ('deit', 11), *(('levit', i) for i in range(3))])
@torch.no_grad()
def test_pruning_keeps_the_evolution(family, last):
    model = build(family, representative_token=True)
    x = images_for(model)
    expected = model.forward_intermediates(x, [last], intermediates_only=True)[0]
    kept = [t for t in find_slow_tokens(model, x) if t.block <= last or family == 'levit'][:last + 1]
    assert model.prune_intermediate_layers([last], prune_head=False) == [last] and len(model.keep_ratio) == len(kept)
    torch.testing.assert_close(model.forward_intermediates(x, intermediates_only=True)[-1], expected)
    model.set_keep_ratio(0.25)  # still a working model
    found = find_slow_tokens(model, x)
    assert [t.block for t in found] == [t.block for t in kept]
    assert all(t.mask.sum() == 3 * max(1, t.mask[0].numel() // 4) for t in found)
    model.reset_classifier(3, 'avg')
    assert model(x).shape == (3, 3)


@both_families
def test_meta_device(family):
    model = timm.create_model(FAMILIES[family], device='meta', dtype=torch.bfloat16)
    model.reset_classifier(7)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {('meta', torch.bfloat16)}
    assert model(torch.empty(3, 3, 224, 224, device='meta', dtype=torch.bfloat16)).shape == (3, 7)


@pytest.mark.parametrize('family, order, not_decayed', [
    ('deit', ['cls_token', 'blocks.0.norm1.weight', 'blocks.11.norm1.weight', 'head.weight'], {'pos_embed', 'cls_token'}),
    ('levit', [
        'cls_token', 'stages.0.blocks.0.mlp.ln1.linear.weight', 'stages.1.downsample.mlp.ln1.linear.weight',
        'stages.2.blocks.1.mlp.ln1.linear.weight', 'head_cls.linear.weight'],
     {'tradeoff', 'cls_token', 'pos_embed', *(f'stages.{i}.downsample.attn_downsample.pos_embed' for i in (1, 2))}),
])
def test_parameter_groups(family, order, not_decayed):
    model = build(family)
    assert not_decayed <= model.no_weight_decay()
    groups = param_groups_layer_decay(
        model, weight_decay=0.05, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    names = {id(p): name for name, p in model.named_parameters()}
    scale, decay = ({names[id(p)]: g[key] for g in groups for p in g['params']} for key in ('lr_scale', 'weight_decay'))
    scales = [scale[name] for name in order]
    assert scales == sorted(set(scales)) and scales[-1] == 1
    assert all(scale[name] == 1 for name in scale if name.startswith(('head', 'fc_norm', 'norm_cls')))
    assert not any(decay[name] for name in not_decayed) and decay[order[-1]] == 0.05
