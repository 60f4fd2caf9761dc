"""Any ViT of timm that evolves, against its own dense blocks run by a plain reference."""
import copy
import functools
import math
import re

import helpers
import pytest
import reference
import timm
import torch
from helpers import TINY, assert_same_weights, images, images_for, informative_indices
from safetensors.torch import load_file
from timm.models._features import FeatureGetterNet
from timm.models.vision_transformer import Attention, ParallelScalingBlock, VisionTransformer
from torch.nn import functional as F

from timm_evovit import evolve, informative_tokens
from timm_evovit.evolution import group_tokens, match_tokens

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
]
by_model = pytest.mark.parametrize('name, config', MODELS, ids=[f'{i}-{name}' for i, (name, _) in enumerate(MODELS)])
by_attention = functools.partial(evolve, slow_tokens='attention')


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
    """Tokens (B, N, C) and informative patches or groups of every image, by the dense model's own blocks.

    Rotary embeddings, of a group that of the patch that others have joined, and the logarithm of sizes are handed to
    timm's own blocks.
    """
    P = dense.num_prefix_tokens
    rope = None
    if getattr(dense, 'rope', None) is not None:
        shape = dense.patch_embed.dynamic_feat_size(x.shape[-2:])
        if dense.rope_mixed:
            rope = dense.rope.get_embed(shape=shape)
        else:
            rope = dense.rope.get_embed(shape=shape)[None, None].expand(len(dense.blocks), -1, -1, -1)

    def block(i, y, members):
        kwargs = {}
        if rope is not None:
            identity = torch.cat([torch.zeros_like(rope[i][:, 0]), torch.ones_like(rope[i][:, 0])], dim=1)[:, ::2]
            kwargs['rope'] = torch.stack(
                [rope[i][:, own[0]] if own else identity for own in members], dim=1)
        sizes = [1] * P + [max(len(own), 1) for own in members]
        mask = torch.tensor(sizes, dtype=y.dtype).log()[None, None, None]
        row = None
        if dense.cls_token is not None:
            row = class_attention(dense.blocks[i], y, kwargs.get('rope'))
        return dense.blocks[i](y[None], attn_mask=mask, **kwargs)[0], row

    def class_attention(block, y, rope):
        attn = block.attn
        rows, head_dim = [], attn.proj.in_features // attn.num_heads
        y = block.norm1(y) if type(block).__name__ in ('Block', 'EvaBlock') else y
        bias = 0.
        if getattr(attn, 'q_bias', None) is not None:
            bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
        if attn.qkv is not None:
            q, k, _ = (attn.qkv(y) + bias).view(len(y), 3, attn.num_heads, -1).unbind(1)
        else:
            q, k = attn.q_proj(y).view(len(y), attn.num_heads, -1), attn.k_proj(y).view(len(y), -1, head_dim)
        q, k = attn.q_norm(q), attn.k_norm(k)
        for h in range(attn.num_heads):
            keys = k[:, h * k.shape[1] // attn.num_heads]
            if rope is not None:
                sin, cos = rope[h % len(rope)].chunk(2, dim=1)
                keys = torch.cat([keys[:P], torch.stack([
                    rotated(key, s, c, attn.rotate_half) for key, s, c in zip(keys[P:], sin, cos)])])
            rows.append(torch.softmax(keys @ q[0, h] / math.sqrt(head_dim), dim=0))
        return sum(rows) / len(rows)

    def rotated(key, sin, cos, half):
        d = len(key)
        out = torch.empty_like(key)
        for a in range(d // 2):
            i, j = (a, a + d // 2) if half else (2 * a, 2 * a + 1)
            out[i], out[j] = cos[i] * key[i] - sin[i] * key[j], cos[j] * key[j] + sin[j] * key[i]
        return out

    before = []
    hook = dense.blocks[0].register_forward_pre_hook(lambda module, args: before.append(args[0]))
    dense(x)
    hook.remove()
    args = len(dense.blocks), P, evolved.stage_starts, evolved.keep_ratio
    if evolved.slow_tokens == 'similarity':
        return [reference.evolve_by_similarity(block, y, *args) for y in before[0]]
    return [
        reference.evolve(
            block, y, *args, evolved.blocks.tradeoff, evolved.selection == 'layer', evolved.blocks.representative_token)
        for y in before[0]
    ]


@pytest.mark.parametrize('kwargs', [
    dict(keep_ratio=(0.8, 0.4), stages=(1, 3)),
    dict(keep_ratio=(0.6, 0.2, 0.5), stages=(1, 2, 4)),  # two rounds of matching; from the complete grid again
    dict(slow_tokens='attention'), dict(slow_tokens='attention', representative_token=False, keep_ratio=0.3),
    dict(slow_tokens='attention', selection='layer', stages=(1, 3), keep_ratio=(0.7, 0.4), tradeoff=0.25),
], ids=['default', 'up and down', 'attention', 'no representative token', 'layer-wise'])
@by_model
@torch.no_grad()
def test_evolves_the_blocks_it_is_given(name, config, kwargs):
    dense = build_dense(name, **config)
    x = images_for(dense)
    before = dense(x)
    if dense.cls_token is None and 'slow_tokens' in kwargs:
        with pytest.raises(ValueError, match='no class token'):
            evolve(dense, **kwargs)
        return
    evolved = evolve(dense, **kwargs)
    expected = written_out(dense, evolved, x)
    found = informative_tokens(evolved, x)
    assert [t.block for t in found] == list(expected[0].kept) and len(found) >= 2
    for t in found:
        if evolved.slow_tokens == 'attention':
            assert informative_indices(t) == [r.kept[t.block] for r in expected]
        else:
            assert t.attention is None
            assert t.groups.flatten(1).tolist() == [r.kept[t.block] for r in expected]
            assert informative_indices(t) == [
                [j for j, g in enumerate(r.kept[t.block]) if r.kept[t.block].count(g) == 1] for r in expected]
    tokens = dense.norm(torch.stack([r.tokens for r in expected]))
    torch.testing.assert_close(evolved(x), dense.forward_head(tokens))
    last, maps = evolved.forward_intermediates(x, indices=[2, 4], output_fmt='NLC', return_prefix_tokens=True)
    torch.testing.assert_close(last, tokens)
    for i, (patches, prefix) in zip((2, 4), maps):
        torch.testing.assert_close(
            torch.cat([prefix, patches], dim=1), torch.stack([r.after[i] for r in expected]))
    assert not torch.equal(evolved(x), before) and torch.equal(dense(x), before)


@by_model
@torch.no_grad()
def test_keep_ratio_1_leaves_outputs(name, config):
    dense = build_dense(name, **config)
    x = images_for(dense)
    evolved = evolve(dense, keep_ratio=1)
    torch.testing.assert_close(evolved(x), dense(x))
    evolved.set_keep_ratio(0.5)
    assert not torch.allclose(evolved(x), dense(x))


@by_model
def test_everything_is_shared(name, config):
    dense = build_dense(name, **config)
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
    assert by_attention(build_dense(depth=depth)).stage_starts == stages


@pytest.mark.parametrize('depth, stages', [
    (12, (1, 3, 6, 9)), (24, (2, 7, 12, 18)), (16, (1, 4, 8, 12)), (10, (1, 3, 5, 7)), (8, (1, 3, 5)), (6, (1, 3)), (2, (1,)),
    (1, ())])
def test_default_stages_by_similarity_start_early(depth, stages):
    assert evolve(build_dense(depth=depth)).stage_starts == stages


def test_one_ratio_by_similarity_falls_by_the_same_factor_from_block_to_block():
    model = evolve(build_dense(depth=12), 0.5)
    assert model.keep_ratio == (0.786, 0.617, 0.43, 0.3)
    model.set_keep_ratio(0.7)
    factors = [ratio ** (1 / (block + 1)) for block, ratio in zip(model.stage_starts, model.keep_ratio)]
    assert max(factors) - min(factors) < 1e-3
    assert math.isclose(math.prod(model.keep_ratio), 0.7 ** 4, rel_tol=2e-3)  # 0.7 is the geometric mean
    model.set_keep_ratio((0.9, 0.9, 0.5, 0.7))
    assert model.keep_ratio == (0.9, 0.9, 0.5, 0.7)
    model.set_keep_ratio(1)
    assert model.keep_ratio == (1.,) * 4
    assert evolve(build_dense(depth=12), 0.5, stages=[4]).keep_ratio == (0.5,)
    assert evolve(build_dense(depth=12), 0.5, stages=[2, 5]).keep_ratio == (0.63, 0.397)


@pytest.mark.parametrize('slow_tokens', ['similarity', 'attention'])
@pytest.mark.parametrize('name', ['vit_base_patch16_224', 'deit_tiny_distilled_patch16_224', 'eva02_tiny_patch14_224'])
def test_feature_maps_either_way(name, slow_tokens):
    how = dict(slow_tokens=slow_tokens, stages=(2, 4), keep_ratio=(0.7, 0.5))
    dense = build_dense(name)
    x = images_for(dense)
    config = {**SMALL, 'out_indices': (1, 4)}
    features = timm.create_model(name, features_only=True, **config).double().eval()
    features.model.load_state_dict(dense.state_dict(), strict=False)
    evolved = evolve(features, **how)
    assert evolved.model.stage_starts == evolve(dense, **how).stage_starts == (2, 4) and len(evolved.model.blocks) == 5
    assert evolved.feature_info.channels() == features.feature_info.channels() == [24, 24]
    expected = [r.after for r in written_out(dense, evolve(dense, **how), x)]
    with torch.no_grad():
        again = FeatureGetterNet(evolve(dense, **how), out_indices=(1, 4))(x)
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
    evolved = evolve(build_dense(name, **config))
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
    evolved = evolve(build_dense(name, **config))
    x = images_for(evolved)
    expected = evolved(x)
    torch.save(evolved, tmp_path / 'model.pt')
    assert torch.equal(torch.load(tmp_path / 'model.pt', weights_only=False)(x), expected)
    assert torch.equal(copy.deepcopy(evolved)(x), expected)
    torch.save(evolved.state_dict(), tmp_path / 'weights.pt')
    fresh = build_dense(name, seed=1, **config)
    fresh.load_state_dict(torch.load(tmp_path / 'weights.pt'))
    assert torch.equal(evolve(fresh)(x), expected)
    assert copy.deepcopy(evolved).bfloat16()(x.bfloat16()).isfinite().all()


@pytest.mark.parametrize('name, config', MODELS[:4] + MODELS[7:8], ids=[name for name, _ in MODELS[:4] + MODELS[7:8]])
def test_trains(name, config):
    evolved = evolve(build_dense(name, **config)).train()
    x = images_for(evolved)
    gradients = torch.autograd.grad(evolved(x).square().sum(), list(evolved.parameters()))
    assert all(g.abs().sum() > 0 for g in gradients)
    evolved.set_grad_checkpointing()
    again = torch.autograd.grad(evolved(x).square().sum(), list(evolved.parameters()))
    torch.testing.assert_close(again, gradients)


@pytest.mark.slow
@some_models
def test_compiled_training(name, config):
    evolved = evolve(build_dense(name, **config)).train()
    x = images_for(evolved)
    gradients = [torch.autograd.grad(forward(x).square().sum(), list(evolved.parameters()))
                 for forward in (evolved, torch.compile(evolved, backend='aot_eager', fullgraph=True))]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize('name', ['vit_base_patch16_224', 'eva02_tiny_patch14_224', 'vit_base_patch16_rope_mixed_224'])
def test_patch_dropout(name):
    """Rotary embeddings are then those of other patches in every image."""
    dense = build_dense(name, patch_drop_rate=0.3).train()
    x = images_for(dense)
    outputs = []
    for model in (dense, evolve(dense, 1), evolve(dense), by_attention(dense)):
        torch.manual_seed(0)  # the same patches
        outputs.append(model.train()(x))
    torch.testing.assert_close(outputs[1], outputs[0])
    assert not any(torch.allclose(y, outputs[0]) for y in outputs[2:])


def test_ties_are_resolved_by_position():
    """Of equal patches the first even ones join the first odd one, whatever the other images are."""
    tokens = torch.cat([torch.ones(2, 8, 4), torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0))])
    assert match_tokens(tokens, 6)[0][:2].tolist() == [[0, 0, 0, 1, 2, 3, 4, 5]] * 2
    assert torch.equal(match_tokens(tokens[3:4], 5)[0], match_tokens(tokens, 5)[0][3:4])


@pytest.mark.parametrize('slow_tokens', ['similarity', 'attention'])
@torch.no_grad()
def test_fx_traces_an_embedding_for_each_block(slow_tokens):
    dense = build_dense('vit_base_patch16_rope_mixed_224', dynamic_img_size=False)
    x = images_for(dense)
    evolved = evolve(dense, slow_tokens=slow_tokens)
    torch.testing.assert_close(torch.fx.symbolic_trace(evolved)(x), evolved(x))


def test_large_groups_in_bfloat16(monkeypatch):
    """A group of five hundred patches that differ little: its mean is not that of the last few."""
    index_add, seen = torch.Tensor.index_add_, []

    def recorded(self, *args):  # on a CPU bfloat16 would do, on a GPU it would not
        seen.append(self.dtype)
        return index_add(self, *args)

    monkeypatch.setattr(torch.Tensor, 'index_add_', recorded)
    tokens = 1 + torch.arange(1000.).view(1, 1000, 1) / 1000
    tokens = F.pad(tokens, [0, 1])
    tokens[:, 3::2] = tokens[:, 3::2].flip(2)  # all even ones are like the first odd one, and like no other
    stage, sizes = group_tokens(tokens.bfloat16(), None, 500, 0)
    mean = torch.cat([tokens[:, ::2, :1], tokens[:, 1:2, :1]], dim=1).mean()
    assert sizes[0, 0] == 501 and seen == [torch.float32]
    assert stage.slow.dtype == torch.bfloat16 and abs(stage.slow[0, 0, 0].item() - mean.item()) < 0.01


@pytest.mark.parametrize('value', ['nan', 'inf'])
@pytest.mark.parametrize('broken', [0, 2])
@torch.no_grad()
def test_nan_in_nan_out(broken, value):
    """An image that is not finite spoils no other, and is no error: so it is in training that overflows."""
    evolved = evolve(build_dense())
    x = images_for(evolved)
    expected = evolved(x)
    x[broken] = float(value)
    y = evolved(x)
    others = [i for i in range(3) if i != broken]
    assert y[broken].isnan().all() and torch.equal(y[others], expected[others])


def test_tokens_that_are_like_no_other():
    """Of opposite tokens the least opposite ones are joined."""
    tokens = torch.tensor([[[1., 0.], [-0.5, 0.87], [0.6, -0.8], [-1., 0.]]])  # best -0.5 with the second, -0.6 the last
    assert match_tokens(tokens, 3)[0].tolist() == [[0, 0, 1, 2]]


def test_large_tokens_in_half_precision():
    """Their dot products, a million here, are more than half precision holds."""
    tokens = torch.eye(32)[[0, 0, 1, 2, 3, 0]].unsqueeze(0)
    tokens[0, 1, 4] = 1  # the first token is less like this one than like the last one
    assert match_tokens(tokens, 5)[0].tolist() == [[4, 0, 1, 2, 3, 4]]
    assert match_tokens(1000 * tokens.half(), 5)[0].tolist() == [[4, 0, 1, 2, 3, 4]]


def test_a_zero_token_in_half_precision_is_like_no_other():
    tokens = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0))
    tokens[:, 3] = 0
    for x in (tokens, tokens.half()):
        assert match_tokens(x, 54)[0].unique().numel() == 54


@pytest.mark.parametrize('keep_ratio', [1., (1., 0.5)])
def test_the_first_grid_is_called_at_any_ratio(keep_ratio):
    model, calls = evolve(build_dense(), keep_ratio, stages=(1, 3)), []
    model.blocks[1].grid.register_forward_hook(lambda module, args, output: calls.append(output.shape))
    model(images_for(model))
    assert calls == [(3, 17, 24)]


def test_pruning_leaves_the_series_of_ratios():
    model = evolve(build_dense(depth=12), 0.5)
    ratios = model.keep_ratio
    model.prune_intermediate_layers([4])
    model.set_keep_ratio(0.5)
    assert model.keep_ratio == ratios[:2] and len(model.blocks) == 5


def test_an_empty_batch_of_grouped_keys():
    dense = build_dense(
        'vit_5b_patch16_sapiens2', num_heads=4, embed_dim=32, num_kv_heads=2, init_values=0.5, dynamic_img_size=False)
    x = images_for(dense)[:0]
    assert evolve(dense)(x).shape == dense(x).shape == (0, 10)


def test_modes_are_not_shared():
    dense = build_dense(drop_path_rate=0.5, proj_drop_rate=0.5)
    x = images_for(dense)
    evolved = evolve(dense).train()
    assert torch.equal(dense(x), dense(x)) and not torch.equal(evolved(x), evolved(x))
    names = [name for name, _ in evolved.named_modules() if not name.endswith('.grid')]
    assert names == [name for name, _ in dense.named_modules()]
    assert not any(a is b for a, b in zip(evolved.modules(), dense.modules()))
    evolved.blocks[0].mlp.fc1.weight.data.zero_()
    assert dense.blocks[0].mlp.fc1.weight.abs().sum() == 0


def test_another_input_size():
    evolved = evolve(build_dense())
    evolved.set_input_size((48, 32))
    x = torch.randn(2, 3, 48, 32, generator=torch.Generator().manual_seed(0)).double()
    dense = build_dense(img_size=(48, 32))
    dense.load_state_dict(evolved.state_dict())
    assert torch.equal(evolved(x), evolve(dense)(x)) and informative_tokens(evolved, x)[0].mask.shape == (2, 6, 4)


def test_arguments_are_those_of_the_model_as_built():
    """Also where features_only has pruned it since."""
    config = dict(pretrained=False, features_only=True, out_indices=(1, 3), **SMALL)
    pruned = evolve(timm.create_model('vit_tiny_patch16_224', **config), keep_ratio=(0.7, 0.5), stages=(2, 4)).model
    assert pruned.stage_starts == (2,) and pruned.keep_ratio == (0.7,)
    assert len(pruned.blocks.tradeoff) == len(pruned.blocks) == 4


class OtherAttention(Attention):
    pass


class OtherTransformer(VisionTransformer):
    pass


@pytest.mark.parametrize('model, error, message', [
    (lambda: timm.create_model('vit_tiny_patch16_224', **SMALL, block_fn=ParallelScalingBlock),
     TypeError, "blocks.0 must be one of the blocks Block, ResPostBlock, .*, got ParallelScalingBlock"),
    (lambda: timm.create_model('vit_tiny_patch16_224', **SMALL, attn_layer=OtherAttention),
     TypeError, "blocks.0.attn must be timm's Attention, .*, got OtherAttention"),
    (lambda: OtherTransformer(**SMALL), TypeError, 'got OtherTransformer'),
    (lambda: timm.create_model('resnet10t'), TypeError, 'got ResNet'),
    (lambda: timm.create_model('evo_deit_tiny', **SMALL), TypeError, 'EvoVisionTransformer evolves already'),
    (lambda: evolve(build_dense()), TypeError, 'EvolvedVisionTransformer evolves already'),
    (lambda: torch.compile(build_dense()), TypeError, 'got OptimizedModule'),
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
    (dict(slow_tokens='likeness'), ValueError, "slow_tokens must be 'attention' or 'similarity', got 'likeness'"),
    (dict(slow_tokens='attention', tradeoff=2), ValueError, 'tradeoff must be in'),
    (dict(slow_tokens='attention', selection='none'), ValueError, "got 'none'"),
    (dict(slow_tokens='attention', representative_token='no'), TypeError, "got 'no'"),
    (dict(tradeoff=0.5), ValueError, "tradeoff must be left out with slow_tokens='similarity', got 0.5"),
    (dict(selection='layer'), ValueError, "selection must be left out with slow_tokens='similarity', got 'layer'"),
    (dict(layer_to_stage_epochs=2), ValueError, 'layer_to_stage_epochs must be left out'),
    (dict(representative_token=True), ValueError, 'representative_token must be left out'),
])
def test_bad_arguments_leave_the_model_alone(kwargs, error, message):
    dense = build_dense()
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


@pytest.mark.parametrize('how, keep_ratio', [
    (dict(slow_tokens='attention', selection='layer'), (0.3, 0.3)), (dict(stages=(1, 3)), (0.448, 0.201))])
@pytest.mark.parametrize('by_name', [True, False])
def test_evo_vit_comes_back_evolving(by_name, how, keep_ratio, tmp_path):
    """From a folder that timm's own function has written, with the keep ratio that it was saved with."""
    if by_name:
        model = timm.create_model('evo_vit', base='vit_tiny_patch16_224', **how, **ARGS).eval()
    else:
        dense = timm.create_model('vit_tiny_patch16_224', **ARGS)
        if not hasattr(dense, '_model_args'):
            pytest.skip('this timm does not record model arguments')
        model = evolve(dense, **how).eval()
    model.set_keep_ratio(0.3)
    timm.models.save_for_hf(model, tmp_path, model_args=model.model_args, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = images(2)
    assert type(again) is type(model) and again.keep_ratio == keep_ratio and again.slow_tokens == model.slow_tokens
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    weights = load_file(tmp_path / 'model.safetensors')
    timm.create_model('vit_tiny_patch16_224', **ARGS).load_state_dict(weights)  # the dense base takes them


def test_another_patch_size_comes_back(tmp_path):
    model = timm.create_model('evo_vit', base='vit_tiny_patch16_224', **ARGS).eval()
    model.set_input_size(patch_size=16)
    timm.models.save_for_hf(model, tmp_path, model_args=model.model_args, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(images(2)), model(images(2)))


@pytest.mark.parametrize('kwargs, error, message', [
    (dict(base='nothing_of_that_name'), RuntimeError, 'nothing_of_that_name'),
    (dict(base='resnet18'), TypeError, 'VisionTransformer, VisionTransformerDistilled, Eva, got ResNet'),
    (dict(base='vit_base_patch16_siglip_224', slow_tokens='attention'), ValueError, 'no class token'),
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
        architecture='evo_vit', model_args=dict(base='vit_tiny_patch16_224', keep_ratio=0.7, stages=(1, 3), **args), num_labels=7)
    wrapper = transformers.TimmWrapperForImageClassification(config).eval()
    wrapper.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert again.timm_model.keep_ratio == wrapper.timm_model.keep_ratio == (0.788, 0.622)
    with torch.no_grad():
        torch.testing.assert_close(again(images(2)).logits, wrapper(images(2)).logits)


@pytest.mark.slow
@pytest.mark.parametrize('by_name', [True, False])
def test_transformers_load_what_timm_saved(tmp_path, by_name):
    transformers = pytest.importorskip('transformers', reason='transformers is not installed')
    if by_name:
        model = timm.create_model('evo_vit', base='vit_tiny_patch16_224', keep_ratio=0.5, **ARGS).eval()
    else:
        model = evolve(timm.create_model('vit_tiny_patch16_224', **ARGS).eval(), 0.5)
    timm.models.save_for_hf(model, tmp_path, model_args=model.model_args, safe_serialization=True)
    config = transformers.TimmWrapperConfig.from_pretrained(tmp_path)
    config.model_args.pop('num_classes', None)  # timm 1.0.31 writes it, and transformers would pass it twice
    wrapper = transformers.AutoModelForImageClassification.from_pretrained(tmp_path, config=config).eval()
    assert wrapper.timm_model.keep_ratio == model.keep_ratio
    with torch.no_grad():
        torch.testing.assert_close(wrapper(images(2)).logits, model(images(2)))


@pytest.mark.slow
def test_evolved_in_transformers_wrapper_warns(tmp_path):
    """The wrapper's config describes the dense model; the warning says what to build, and that comes back evolving."""
    transformers = pytest.importorskip('transformers', reason='transformers is not installed')
    args = {k: v for k, v in ARGS.items() if k != 'num_classes'}
    config = transformers.TimmWrapperConfig(architecture='vit_tiny_patch16_224', model_args=args, num_labels=7)
    wrapper = transformers.TimmWrapperForImageClassification(config).eval()
    wrapper.timm_model = evolve(wrapper.timm_model, 0.6)
    with pytest.warns(UserWarning, match='saves this model as its dense base') as caught:
        wrapper.save_pretrained(tmp_path)
    message = next(str(w.message) for w in caught if 'dense base' in str(w.message))
    told = eval(re.search(r'model_args=(\{.*\})', message)[1])
    config = transformers.TimmWrapperConfig(architecture='evo_vit', model_args=told, num_labels=7)
    again = transformers.TimmWrapperForImageClassification(config).eval()
    again.load_state_dict(wrapper.state_dict())
    again.save_pretrained(tmp_path / 'evolving')
    back = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'evolving').eval()
    with torch.no_grad():
        torch.testing.assert_close(back(images(2)).logits, wrapper(images(2)).logits)
