"""`evolve` gives another view of the same model, on the blocks that are there, whatever somebody has put into them."""
import copy
import functools
import math
import pickle

import helpers
import pytest
import timm
import torch
from helpers import build, images, images_for
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

from timm_evovit import evolve, similarity
from timm_evovit.similarity import TokenGroups

KINDS = {
    'vit': ('vit_base_patch16_224', {}),
    'eva02': ('eva02_base_patch14_224', {}),
    'dinov3': ('vit_small_plus_patch16_dinov3', dict(init_values=0.5)),
    'naflexvit': ('naflexvit_base_patch16_gap', {}),
}
every_kind = pytest.mark.parametrize('kind', KINDS)


def build_kind(kind='vit', **kwargs):
    name, config = KINDS[kind]
    return build(name, depth=6, **config, **kwargs)


# What somebody else has put into the blocks

class Lora(nn.Linear):
    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.load_state_dict(linear.state_dict())
        self.down, self.up = (nn.Linear(*shape, bias=False) for shape in ((self.in_features, 2), (2, self.out_features)))

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


def add_lora(model):
    for block in model.blocks:
        name = 'qkv' if getattr(block.attn, 'qkv', None) is not None else 'q_proj'
        setattr(block.attn, name, Lora(getattr(block.attn, name)))


def hook_block(model):
    model.blocks[1].register_forward_hook(lambda module, args, output: 0.5 * output)


def hook_block_by_accelerate(model):
    """It gives modules an attribute `forward`."""
    old = model.blocks[2].forward
    model.blocks[2].forward = functools.update_wrapper(functools.partial(lambda *a, **k: 0.5 * old(*a, **k)), old)


class OwnBlock(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.inner = block

    def forward(self, x, **kwargs):
        return self.inner(x, **kwargs) + 0.1 * x


def wrap_blocks(model):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = OwnBlock(block)


@every_kind
@pytest.mark.parametrize('change', [add_lora, hook_block, hook_block_by_accelerate, wrap_blocks])
@torch.no_grad()
def test_what_is_in_the_blocks_works_before_and_after(kind, change):
    """As in the dense model at keep ratio 1, and the same whether it was there before `evolve` or came after."""
    torch.manual_seed(1)
    before, after = build_kind(kind), build_kind(kind)
    x = images_for(before)
    plain = evolve(build_kind(kind), 0.5)(x)
    state = torch.random.get_rng_state()
    change(before)
    first = evolve(before, 0.5)
    torch.random.set_rng_state(state)
    second = evolve(after, 0.5)
    change(after)
    assert torch.equal(first(x), second(x)) and not torch.allclose(first(x), plain)
    for dense, evolved in ((before, first), (after, second)):
        evolved.set_keep_ratio(1)
        assert torch.equal(evolved(x), dense(x))


def weight_as_buffer(norm):
    weight = norm.weight.detach()
    del norm.weight
    norm.register_buffer('weight', weight)


def script_blocks(blocks):
    for i, block in enumerate(blocks):
        blocks[i] = torch.jit.script(block)


@pytest.mark.parametrize('change', [
    lambda blocks: [parametrize.register_parametrization(b.norm1, 'weight', nn.Identity()) for b in blocks],
    lambda blocks: [prune.identity(b.norm1, 'weight') for b in blocks],
    lambda blocks: [setattr(b, 'norm1', nn.Sequential(b.norm1)) for b in blocks],
    lambda blocks: [weight_as_buffer(b.norm1) for b in blocks],
    script_blocks], ids=['parametrized', 'pruned', 'wrapped', 'buffer', 'scripted'])
@torch.no_grad()
def test_groups_are_those_of_the_norms_weight(change, monkeypatch):
    dense = build_kind()
    for block in dense.blocks:
        block.norm1.weight.normal_()
    x = images_for(dense)
    expected = evolve(dense, 0.5)(x)
    change(dense.blocks)
    torch.testing.assert_close(evolve(dense, 0.5)(x), expected)
    monkeypatch.setattr(similarity, 'channel_weight', lambda block: None)
    assert not torch.allclose(evolve(dense, 0.5)(x), expected)


def test_models_that_differ_in_a_norm():
    model = evolve(build_kind(), 0.5)
    x = images_for(model)
    weights = torch.rand(2, model.embed_dim)

    def run(weight):
        return torch.func.functional_call(model, {'blocks.0.norm1.weight': weight}, x)

    torch.testing.assert_close(torch.func.vmap(run)(weights), torch.stack([run(weight) for weight in weights]))


@pytest.mark.parametrize('name, value', [('weight', nn.Parameter(torch.ones(0))), ('_fsdp_use_orig_params', False)])
def test_a_norm_whose_weight_fsdp1_has_freed_is_refused(name, value):
    model = evolve(build_kind(), 0.5)
    setattr(model.blocks[0].norm1, name, value)
    with pytest.raises(RuntimeError, match=r'norm1.weight must be whole, as FSDP2 keeps it, got a part of that of LayerNorm'):
        model(images_for(model))


# Two views of one model

@every_kind
@pytest.mark.parametrize('cast', [lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.to('meta')])
def test_casting_one_leaves_both_able_to_run(kind, cast):
    for which in (0, 1):
        dense = build_kind(kind)
        pair = dense, evolve(dense)
        cast(pair[which])
        x = images_for(build_kind(kind)).to(next(dense.parameters()))
        for model in pair:
            y = model(x)
            assert y.dtype == x.dtype and y.device == x.device


def test_modes_and_checkpointing_are_shared():
    dense = build_kind()
    evolved = evolve(dense)
    assert evolved.train() is evolved and dense.training and dense.blocks[0].training
    dense.eval()
    assert not evolved.training
    evolved.set_grad_checkpointing()
    assert dense.grad_checkpointing
    dense.set_grad_checkpointing(False)
    assert not evolved.grad_checkpointing
    dense.requires_grad_(False)
    assert not any(p.requires_grad for p in evolved.parameters())
    dense.reset_classifier(3, 'avg')
    assert evolved.num_classes == 3 and evolved.global_pool == 'avg'
    assert evolved(images_for(dense)).shape == (3, 3)
    evolved.head = nn.Linear(24, 7)
    assert evolved.get_classifier() is dense.head and dense(images_for(dense)).shape == (3, 7)


@pytest.mark.parametrize('kind', ['vit', 'eva02'])
@pytest.mark.parametrize('change', [
    lambda m: m.reset_classifier(3, 'avg'), lambda m: m.set_input_size((48, 32))], ids=['classifier', 'size'])
def test_either_view_saves_what_the_other_has_changed(kind, change, tmp_path):
    for which in (0, 1):
        dense = build_kind(kind)
        if not hasattr(dense, '_traits'):
            pytest.skip('this timm does not record changes')
        pair = dense, evolve(dense, 0.5)
        change(pair[which])
        pair[1].set_keep_ratio(0.4)
        x = images(2, tuple(dense.patch_embed.img_size))
        for i, model in enumerate(pair):
            folder = tmp_path / f'{which}{i}'
            timm.models.save_for_hf(
                model, folder, model_args=model.model_args if i else None, safe_serialization=True)
            again = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
            with torch.no_grad():
                assert torch.equal(again(x), model(x)) and type(again) is type(model)


def test_full_backward_hooks_are_shared():
    dense, calls = build_kind(), []
    evolved = evolve(dense)
    dense.register_full_backward_hook(lambda module, inputs, outputs: calls.append(module))
    evolved(images_for(dense)).sum().backward()
    assert calls == [evolved]


@every_kind
@torch.no_grad()
def test_copies_and_pickles(kind, tmp_path):
    dense = build_kind(kind)
    x = images_for(dense)
    evolved = evolve(dense, 0.5)
    expected = evolved(x)
    torch.save(evolved, tmp_path / 'model.pt')
    copies = [
        copy.deepcopy(evolved), pickle.loads(pickle.dumps(evolved)), copy.copy(evolved),
        torch.load(tmp_path / 'model.pt', weights_only=False)]
    for other in copies:
        assert type(other) is type(evolved) and other.keep_ratio == evolved.keep_ratio
        assert torch.equal(other(x), expected)
    for other in copies[:2]:
        other.train()
        assert not evolved.training and not dense.training


class OwnTransformer(VisionTransformer):
    """One that somebody has written."""

    def forward_features(self, x, attn_mask=None, is_causal=False):
        return 2 * super().forward_features(x, attn_mask, is_causal)

    def embedding(self, x):
        return self.forward_features(x)[:, 0]


def build_with_plain(cls):
    """A model of a subclass, a plain VisionTransformer of the same weights, and images."""
    torch.manual_seed(0)
    dense, plain = helpers.randomize(cls(**helpers.TINY, depth=6)).eval(), build_kind()
    plain.load_state_dict(dense.state_dict())
    return dense, plain, images_for(dense)


@torch.no_grad()
def test_a_subclass_keeps_its_methods():
    dense, plain, x = build_with_plain(OwnTransformer)
    evolved = evolve(dense, 0.5)
    assert isinstance(evolved, OwnTransformer)
    assert torch.equal(evolved.embedding(x), 2 * evolve(plain, 0.5).forward_features(x)[:, 0])
    assert torch.equal(copy.deepcopy(evolved)(x), evolved(x))
    assert torch.equal(pickle.loads(pickle.dumps(evolved))(x), evolved(x))


# What cannot work

class WithoutSuper(VisionTransformer):
    def forward_features(self, x, attn_mask=None, is_causal=False):
        return self.norm(self.patch_embed(x))


class OwnLoop(VisionTransformer):
    def forward_features(self, x, attn_mask=None, is_causal=False):
        return self.norm(self.blocks(super()._pos_embed(self.patch_embed(x))))


class OtherName(VisionTransformer):
    def forward_features(self, x, attn_mask=None, is_causal=False):
        return self.norm(self.layers(super()._pos_embed(self.patch_embed(x))))


class PastSuper(VisionTransformer):
    def forward(self, x):
        return self.forward_head(VisionTransformer.forward_features(self, x))


class LoopInMethod(VisionTransformer):
    def forward(self, x):
        return self.encode(x)

    def encode(self, x):
        return self.blocks(x)


class OwnEmbed(VisionTransformer):
    def _embed(self, x):
        return x


class ByHelper(VisionTransformer):
    """Evolves: it reaches ours through a method and a comprehension."""

    def forward(self, x):
        return torch.stack([self.one(y[None])[0] for y in x])

    def one(self, x):
        return self.forward_head(self.forward_features(x))


@torch.no_grad()
def test_a_forward_of_ones_own_that_evolves():
    dense, plain, x = build_with_plain(ByHelper)
    torch.testing.assert_close(evolve(dense, 0.5)(x), evolve(plain, 0.5)(x))


def test_a_configuration_of_ones_own():
    model = build_kind()
    model.pretrained_cfg = {'mean': (0.5,) * 3}
    assert evolve(model).pretrained_cfg == model.pretrained_cfg


class MasklessBlock(Block):
    def forward(self, x):
        return super().forward(x)


def with_forward():
    model = build_kind()
    model.forward = functools.partial(VisionTransformer.forward, model)
    return model


def with_attribute():
    model = build_kind()
    model.keep_ratio = 0.5
    return model


def with_other_blocks(kind=nn.Identity):
    model = build_kind()
    model.blocks = kind()
    return model


@pytest.mark.parametrize('model, message', [
    (with_forward, 'attribute forward of the model replaces'),
    (with_other_blocks, 'blocks must be a plain nn.Sequential or nn.ModuleList, got Identity'),
    (lambda: with_other_blocks(type('Own', (nn.Sequential,), {'forward': len})), 'plain nn.Sequential or nn.ModuleList, got Own'),
    (lambda: WithoutSuper(**helpers.TINY), r'WithoutSuper.forward_features must call that of VisionTransformer by super'),
    (lambda: OwnLoop(**helpers.TINY), 'OwnLoop.forward_features must call .*, and not use self.blocks'),
    (lambda: OtherName(**helpers.TINY), 'OtherName.forward_features must call'),
    (lambda: LoopInMethod(**helpers.TINY), 'LoopInMethod.forward must call .*, and not use self.blocks'),
    (lambda: PastSuper(**helpers.TINY), 'PastSuper.forward must call'),
    (lambda: OwnEmbed(**helpers.TINY), 'OwnEmbed._embed has the name of a method that evolve adds'),
    (with_attribute, 'attribute keep_ratio, which evolve needs'),
    (lambda: build('vit_base_patch16_224', depth=6, block_fn=MasklessBlock),
     r'blocks.0 must take attn_mask .* got MasklessBlock.forward\(x\)'),
    (lambda: timm.create_model('resnet10t'), 'VisionTransformer, Eva, NaFlexVit, got ResNet'),
    (lambda: timm.create_model('beitv2_base_patch16_224', depth=1, device='meta'), 'got Beit'),
    (lambda: build('evo_deit_tiny'), 'EvoVisionTransformer evolves already'),
    (lambda: evolve(build_kind()), 'EvolvedVisionTransformer evolves already'),
    (lambda: torch.compile(build_kind()), 'got OptimizedModule'),
], ids=lambda v: None if callable(v) else '')
def test_what_cannot_evolve_is_refused(model, message):
    with pytest.raises(TypeError, match=message):
        evolve(model())


@pytest.mark.parametrize('kwargs, error, message', [
    (dict(keep_ratio=0), ValueError, r'keep_ratio must be in \(0, 1\], got 0'),
    (dict(keep_ratio=float('nan')), ValueError, r'keep_ratio must be in \(0, 1\], got nan'),
    (dict(keep_ratio='0.5'), TypeError, r"keep_ratio must be a number in \(0, 1\] or one per evolution stage, got '0.5'"),
    (dict(keep_ratio=True), TypeError, 'got True'),
    (dict(keep_ratio=(0.5, 0.5)), ValueError, 'keep_ratio must be one number or 3'),
    (dict(stages=(3, 3)), ValueError, r'ascending order, got \(3, 3\)'),
    (dict(stages=(6,)), ValueError, r'0 \.\. 5 for a model of 6 blocks'),
    (dict(stages='early'), TypeError, "got 'early'"), (dict(stages=''), TypeError, "got ''"),
    (dict(stages=b'\0\2'), TypeError, 'block indices such as'), (dict(keep_ratio=b'\1'), TypeError, 'keep_ratio must be'),
    (dict(slow_tokens='attention'), TypeError, 'slow_tokens'),
])
def test_bad_arguments_leave_the_model_alone(kwargs, error, message):
    dense = build_kind()
    x = images_for(dense)
    before = set(vars(dense))
    with torch.no_grad():
        expected = dense(x)
        with pytest.raises(error, match=message):
            evolve(dense, **kwargs)
        assert torch.equal(dense(x), expected) and type(dense) is VisionTransformer and set(vars(dense)) == before
        if 'keep_ratio' in kwargs:
            evolved = evolve(dense, 0.5)
            ratios, grouped = evolved.keep_ratio, evolved(x)
            with pytest.raises(error, match=message):
                evolved.set_keep_ratio(kwargs['keep_ratio'])
            assert evolved.keep_ratio == ratios and torch.equal(evolved(x), grouped)


# Masks

@torch.no_grad()
def test_a_mask_of_keys_follows_the_patches():
    """Masked patches get no weight and join no other one: they might have any value."""
    evolved = evolve(build_kind().double(), (0.5, 0.3), (1, 3))
    x = images_for(evolved)
    keys = torch.ones(3, 1, 1, 17, dtype=torch.bool)
    keys[:, :, :, 13:] = False  # the last row of the grid
    y = evolved.forward_features(x, attn_mask=keys)
    other = x.clone()
    other[:, :, 24:] = torch.randn(3, 3, 8, 32).double()
    torch.testing.assert_close(evolved.forward_features(other, attn_mask=keys)[:, :13], y[:, :13])
    assert not torch.allclose(evolved.forward_features(other)[:, :13], evolved.forward_features(x)[:, :13])
    added = torch.zeros(3, 1, 1, 17).double().masked_fill(~keys, float('-inf'))
    torch.testing.assert_close(evolved.forward_features(x, attn_mask=added), y)
    torch.testing.assert_close(evolved.forward_features(x, attn_mask=added.expand(-1, 3, -1, -1)), y)
    torch.testing.assert_close(evolved.forward_features(x, attn_mask=keys[:1]), y)
    torch.testing.assert_close(evolved(x, attn_mask=keys), evolved.forward_head(y))
    torch.testing.assert_close(evolved.forward_intermediates(x, attn_mask=keys)[0], y)


def test_a_learned_weight_of_keys_has_a_gradient_beside_padding():
    evolved, bias = evolve(build_kind(), 0.5), torch.zeros(1, 3, 1, 17, requires_grad=True)
    evolved(images_for(evolved), attn_mask=bias.masked_fill(torch.arange(17) > 12, -math.inf)).sum().backward()
    assert bias.grad[..., :13].abs().min() > 0 and not bias.grad[..., 13:].any()


def test_no_patch_is_lost_where_all_are_on_one_side_of_the_matching():
    keys = torch.arange(9).view(1, 1, 1, 9) % 2 == 0  # the black fields of 3 x 3
    groups, x = TokenGroups(torch.randn(1, 9, 4), 0, keys, (3, 3)), torch.randn(1, 9, 4)
    for ratio, sizes in (((1, 2), [1, 1, 1, 1, 1, 0]), ((1, 4), None)):
        x = groups.join(x, ratio, None)
        assert sizes in (None, groups.sizes[0].tolist()) and groups.sizes.sum() == 5
        slow_idx = groups.slow_tokens(0).groups
        assert not set(slow_idx[keys[:, 0, 0]].tolist()) & set(slow_idx[~keys[:, 0, 0]].tolist())


@torch.no_grad()
def test_a_weight_of_keys_is_summed_over_groups():
    """A mask that adds the same to all keys of a head changes nothing, one that adds to some does what it says."""
    evolved = evolve(build_kind().double(), 0.5)
    x = images_for(evolved)
    y = evolved.forward_features(x)
    same = torch.tensor([0.5, -2., 3.]).double().view(1, 3, 1, 1).expand(1, 3, 1, 17)
    torch.testing.assert_close(evolved.forward_features(x, attn_mask=same), y)
    some = torch.zeros(1, 3, 1, 17).double()
    some[:, 1, :, 5:] = -1.
    z = evolved.forward_features(x, attn_mask=some)
    assert not torch.allclose(z, y)
    with pytest.raises(ValueError, match=r'N is \d+ here, got'):
        evolved.forward_features(x, attn_mask=some[..., 1:])
    evolved.set_keep_ratio(1)
    assert torch.equal(evolved.forward_features(x, attn_mask=some), evolved._evolved_from.forward_features(x, attn_mask=some))


@pytest.mark.parametrize('kind', ['bool', 'float', 'one head'])
@pytest.mark.parametrize('visible_prefix', [(), (0,), (1,)])
@torch.no_grad()
def test_masked_prefix_tokens_attend_as_in_the_dense_model(visible_prefix, kind):
    """Patches are like their neighbours here, so evolving is exact. The last picture has no key at all."""
    dense = build('deit_tiny_distilled_patch16_224').double()
    dense.pos_embed[:, 2:] = 0
    x = images(3).double().unflatten(3, (4, 8))[:, :, :, ::2].repeat_interleave(2, 3).flatten(3)
    keys = torch.zeros(3, 1 if kind == 'bool' else 3, 1, 18, dtype=torch.bool)
    keys[..., visible_prefix] = True
    keys[0, ..., 2:10] = keys[1, ..., 4:14] = True
    keys[2] = False
    mask = keys
    if kind != 'bool':
        mask = torch.zeros(keys.shape).double().masked_fill(~keys, -math.inf)
    if kind == 'one head':
        mask[:, 1] = -math.inf
    expected = dense.forward_features(x, attn_mask=mask)
    found = evolve(dense, 0.5, stages=0).forward_features(x, attn_mask=mask)
    torch.testing.assert_close(found[:, :2], expected[:, :2])
    torch.testing.assert_close(found[keys[:, 0, 0]], expected[keys[:, 0, 0]])


@torch.no_grad()
def test_what_is_no_number_stays_in_its_picture():
    evolved = evolve(build_kind(), 0.5)
    x = images_for(evolved)
    keys = torch.arange(17).view(1, 1, 1, 17) < 13
    expected = evolved(x, attn_mask=keys)
    for value in (math.nan, math.inf, 3e38):
        x[0] = value
        assert not evolved(x, attn_mask=keys)[0].isfinite().any()
        torch.testing.assert_close(evolved(x, attn_mask=keys)[1:], expected[1:])
    x[1, 0, 0, 0] = math.nan
    torch.testing.assert_close(evolved(x, attn_mask=keys)[2], expected[2])


@pytest.mark.parametrize('kind', ['vit', 'eva02', 'naflexvit'])  # timm's DINOv3 cannot
@torch.no_grad()
def test_a_default_device_that_is_not_the_models(kind):
    evolved = evolve(build_kind(kind), 0.5)
    x = images_for(evolved)
    expected = evolved(x)
    with torch.device('meta'):
        assert torch.equal(evolved(x), expected)


@pytest.mark.parametrize('args, kwargs', [
    ((), dict(foo=1)), ((None, False, False, False, 'NLC', False, False), dict(output_dict=True)),
    ((None, False, False, False, 'NLC', False, False, None, False, 1), {})])
@torch.no_grad()
def test_wrong_arguments_of_forward_intermediates(args, kwargs):
    dense = build_kind()
    for model in (dense, evolve(dense)):
        with pytest.raises(TypeError):
            model.forward_intermediates(images_for(dense), *args, **kwargs)


@pytest.mark.parametrize('mask, message', [
    (dict(attn_mask=torch.ones(17, 17, dtype=torch.bool)), r'mask of keys, .* got \(17, 17\)'),
    (dict(attn_mask=torch.zeros(1, 1, 17, 17)), r'got \(1, 1, 17, 17\)'),
    (dict(is_causal=True), 'is_causal must be False where tokens are grouped, got True'),
])
@torch.no_grad()
def test_masks_of_pairs_are_refused(mask, message):
    evolved = evolve(build_kind())
    x = images_for(evolved)
    for call in (evolved, evolved.forward_features, evolved.forward_intermediates):
        with pytest.raises(ValueError, match=message):
            call(x, **mask)
    with pytest.raises(ValueError, match='bool or float, .* torch.int64'):
        evolved(x, attn_mask=torch.ones(1, 1, 1, 17, dtype=torch.int64))
    evolved.set_keep_ratio(1)
    assert torch.equal(evolved(x, **mask), evolved._evolved_from(x, **mask))


# NaFlexVit: patches of any number and aspect ratio

def patches_of(images, size):
    """What timm's NaFlex loader gives: patches (B, n, size * size * 3) with coordinates and padding."""
    rows = []
    for image in images:
        h, w = (side // size for side in image.shape[-2:])
        patches = image.reshape(3, h, size, w, size).permute(1, 3, 2, 4, 0).reshape(h * w, -1)
        coord = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing='ij'), -1).view(-1, 2)
        rows.append((patches, coord))
    n = max(len(patches) for patches, _ in rows)
    pad = [n - len(patches) for patches, _ in rows]
    return dict(
        patches=torch.stack([F.pad(p, [0, 0, 0, k]) for (p, _), k in zip(rows, pad)]),
        patch_coord=torch.stack([F.pad(c, [0, 0, 0, k]) for (_, c), k in zip(rows, pad)]),
        patch_valid=torch.stack([torch.arange(n) < n - k for k in pad]))


NAFLEX = [
    ('naflexvit_base_patch16_gap', {}),
    ('naflexvit_base_patch16_par_gap', dict(class_token=True, global_pool='token')),
    ('naflexvit_base_patch16_gap', dict(rope_type='axial')),
    ('naflexvit_base_patch16_gap', dict(rope_type='mixed')),
    ('naflexvit_base_patch16_map', {}),
]


@pytest.mark.parametrize('keep_ratio', [0.6, 0.25, 1])
@pytest.mark.parametrize('name, config', NAFLEX)
@torch.no_grad()
def test_a_padded_batch_is_its_images_one_by_one(name, config, keep_ratio):
    dense = build(name, depth=6, init_values=0.5, **config)  # with 1e-5, timm's default, blocks would hardly act
    assert type(dense.double()) is NaFlexVit
    evolved = evolve(dense, keep_ratio, (1, 3))
    sizes = (32, 32), (24, 56), (16, 40), (8, 16), (8, 8)
    pictures = [images(1, size, seed=i)[0].double() for i, size in enumerate(sizes)]
    batch = patches_of(pictures, 8)
    tokens = evolved.forward_features(**batch)
    P = dense.num_prefix_tokens
    for i, picture in enumerate(pictures):
        alone = patches_of([picture], 8)
        n = alone['patches'].shape[1]
        torch.testing.assert_close(
            tokens['patches'][i, :P + n], evolved.forward_features(**alone)['patches'][0], rtol=0, atol=1e-12)
        torch.testing.assert_close(evolved(batch)[i], evolved(alone)[0], rtol=0, atol=1e-12)
    assert torch.equal(tokens['patch_valid'], batch['patch_valid'])
    nonsense = dict(batch, patches=torch.where(batch['patch_valid'][..., None], batch['patches'], 1e3))
    torch.testing.assert_close(evolved(nonsense), evolved(batch), rtol=0, atol=1e-12)  # padding is never read
    no_number = dict(batch, patches=batch['patches'].index_fill(0, torch.tensor([0]), math.nan))
    torch.testing.assert_close(evolved(no_number)[1:], evolved(batch)[1:], rtol=0, atol=1e-12)
    if keep_ratio == 1:
        assert torch.equal(evolved(batch), dense(batch))
        for args in (dict(), dict(output_dict=True, norm=True), dict(return_prefix_tokens=True, indices=[1])):
            torch.testing.assert_close(
                evolved.forward_intermediates(batch, output_fmt='NLC', **args),
                dense.forward_intermediates(batch, output_fmt='NLC', **args), rtol=0, atol=0)
    else:
        difference = (evolved(batch) - dense(batch)).abs().amax(dim=1)
        assert difference[:3].min() > 1e-4 and difference[4] < 1e-12  # one patch is left as it is


@torch.no_grad()
def test_any_vision_transformer_as_naflex():
    dense = build('vit_base_patch16_224', depth=6, use_naflex=True).double()
    assert type(dense) is NaFlexVit
    x = images_for(dense)
    evolved = evolve(dense, 0.5)
    assert not torch.allclose(evolved(x), dense(x))
    batch = patches_of(list(x), 8)
    torch.testing.assert_close(evolved(batch), evolved(x), rtol=0, atol=1e-12)
    for args in (dict(x=batch), dict(x=batch['patches'], patch_coord=batch['patch_coord'])):
        with pytest.raises(ValueError, match="output_fmt must be 'NLC'"):
            evolved.forward_intermediates(**args)


def test_naflex_trains():
    """Padding gets no gradient, and every parameter one."""
    evolved = evolve(build('naflexvit_base_patch16_gap', depth=6), 0.5).train()
    batch = patches_of([images(1, size)[0] for size in ((32, 32), (16, 24))], 8)
    batch['patches'].requires_grad_()
    evolved(batch).square().sum().backward()
    gradient = batch['patches'].grad
    assert not gradient[~batch['patch_valid']].any() and gradient[batch['patch_valid']].any(dim=-1).all()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in evolved.parameters())


# Blocks that are taken out or added

def identity(blocks):
    blocks[3] = nn.Identity()
    return blocks


CHANGES = {
    'identity': identity,
    'the first four': lambda blocks: nn.Sequential(*list(blocks)[:4]),
    'append': lambda blocks: blocks.append(copy.deepcopy(blocks[0])),
    'list': lambda blocks: nn.ModuleList(blocks),
}


@pytest.mark.parametrize('view', [0, 1])
@pytest.mark.parametrize('change', CHANGES)
@torch.no_grad()
def test_blocks_changed_after_evolve(change, view):
    """As the dense model at keep ratio 1, and as the changed model evolved at the same blocks at others."""
    dense = build_kind()
    x = images_for(dense)
    pair = dense, evolve(dense, (0.5, 0.3), (1, 3))
    pair[view].blocks = CHANGES[change](pair[view].blocks)
    y = pair[1](x)
    fresh = build_kind()
    fresh.blocks = CHANGES[change](fresh.blocks)
    stages = tuple(s for s in (1, 3) if s < len(fresh.blocks))
    assert torch.equal(y, evolve(fresh, (0.5, 0.3)[:len(stages)], stages)(x))
    if change != 'list':  # which timm's own forward does not take
        pair[1].set_keep_ratio(1)
        assert torch.equal(pair[1](x), dense(x))


@torch.no_grad()
def test_a_loop_over_the_blocks_is_the_dense_model():
    dense = build_kind()
    x = images_for(dense)
    evolved = evolve(dense, 0.5)
    y = evolved._pos_embed(evolved.patch_embed(x))
    for block in evolved.blocks:
        y = block(y)
    assert torch.equal(evolved.norm(y), dense.forward_features(x))
