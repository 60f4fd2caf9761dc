"""Evo-LeViT against a plain reference, the authors' figures, and what a user of timm does with a model."""

import helpers
import pytest
import timm
import torch
from helpers import TINY_LEVIT, authors_names, load, own_indices, tiny
from helpers import build_levit as build
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from reference import ReferenceLevit
from timm.layers import resample_abs_pos_embed
from timm.utils import reparameterize_model
from torch.nn import functional as F

from timm_evovit import AssistedLoss, attention, find_slow_tokens

NAME = 'evo_levit_128s'


def images(n=2, size=64, seed=1):
    return helpers.images(n, size, seed=seed)


@st.composite
def arguments(draw):
    """Arguments of `build`."""
    depth = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    num_stages = len(depth)
    height, width = draw(st.integers(17, 80)), draw(st.integers(17, 80))
    ratio = st.one_of(st.floats(0.05, 0.95), st.just(1.), st.sampled_from([0.25, 0.5]))
    return dict(
        seed=draw(st.integers(0, 10_000)),
        img_size=(height if max(height, width) > 32 else 33, width),
        depth=depth,
        embed_dim=(16, 24, 32)[:num_stages],
        num_heads=(2, 3, 4)[:num_stages],
        out_indices=(0,),
        keep_ratio=[draw(ratio) for _ in depth],
        tradeoff=draw(st.one_of(st.just('learned'), st.sampled_from([0., 0.5, 1.]), st.floats(0, 1))),
        selection=draw(st.sampled_from(['stage', 'layer'])),
        representative_token=draw(st.booleans()),
        attn_ratio=draw(st.sampled_from([1, 2])),
    )


@pytest.mark.slow
@settings(
    max_examples=40, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate),  # shrinking takes minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(kwargs=arguments())
def test_matches_the_written_out_method(kwargs):
    """Logits, tokens and selections in evaluation mode; logits of four heads, gradients and statistics in training."""
    model = build(**kwargs).double()
    x = images(3, kwargs['img_size'], seed=kwargs['seed']).double()
    with torch.no_grad():
        reference = ReferenceLevit(model)
        after, logits = reference(x)
        torch.testing.assert_close(model(x), (logits[0] + logits[1]) / 2)
        torch.testing.assert_close(model.forward_features(x), after[-1])
        for features, tokens in zip(model.forward_intermediates(x)[1], after):
            torch.testing.assert_close(features.flatten(2).transpose(1, 2), tokens[:, 1:])
    assert [own_indices(t) for t in find_slow_tokens(model, x)] == reference.kept

    model.train().set_distilled_training()
    model.set_assisted_training()
    reference = ReferenceLevit(model)
    expected = reference(x)[1]
    before = {k: v.clone() for k, v in model.named_buffers()}
    (main, dist), (main_cls, dist_cls) = model(x)
    torch.testing.assert_close([main, dist, main_cls, dist_cls], expected, rtol=1e-5, atol=1e-7)

    weights = torch.randn(4, 3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parameters = dict(model.named_parameters())
    gradients = []
    for outputs in (expected, (main, dist, main_cls, dist_cls)):
        loss = sum((y.softmax(dim=1) * w).sum() for y, w in zip(outputs, weights))
        gradients.append(torch.autograd.grad(loss, list(parameters.values()), allow_unused=True))
    scale = max(g.abs().max() for g in gradients[0] if g is not None).item()
    for name, a, b in zip(parameters, *gradients):
        a = torch.zeros_like(b) if a is None else a
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-7 * scale, msg=lambda m, name=name: f'{name}: {m}')

    for name, (mean, var) in reference.statistics.items():
        for key, new in (('running_mean', mean), ('running_var', var)):
            expected_buffer = 0.9 * before[f'{name}.{key}'] + 0.1 * new
            torch.testing.assert_close(model.get_buffer(f'{name}.{key}'), expected_buffer)


def test_reference_runs_more_than_one_kind_of_stage():
    """The comparison above would mean little if selection never left a placeholder out or always the same."""
    found = find_slow_tokens(build(), images(4, seed=3))
    assert [t.block for t in found] == [2, 4, 6]
    assert [tuple(t.mask.shape[1:]) for t in found] == [(4, 4), (2, 2), (1, 1)]
    assert [t.mask.sum(dim=(1, 2)).tolist() for t in found] == [[8] * 4, [2] * 4, [1] * 4]
    assert (found[0].mask[0] != found[0].mask[1]).any()
    assert [t.block for t in find_slow_tokens(build(selection='layer'), images())] == [2, 3, 4, 5, 6, 7]
    assert [t.block for t in find_slow_tokens(build(depth=(2, 3, 4)), images())] == [2, 5]
    assert [t.block for t in find_slow_tokens(build(depth=(1, 1, 1), keep_ratio=(0.5, 1, 0.5)), images())] == [2]


def recorded_model(**kwargs):
    """Weights and statistics made by a formula, so that others can make the same."""
    model = timm.create_model(NAME, **tiny(NAME, img_size=96, **kwargs)).double().eval()
    for i, (key, value) in enumerate(sorted(model.state_dict().items())):
        wave = torch.arange(value.numel(), dtype=torch.float64).mul(1.7 + 0.013 * i).add(i).sin().view(value.shape)
        if key.endswith(('running_var', 'bn.weight')):
            value.copy_(0.8 + 0.3 * wave)
        elif key.endswith('linear.weight'):
            value.copy_(wave * (3 if 'qkv' in key else 1.5) / value[0].numel() ** 0.5)
        elif not key.endswith('num_batches_tracked'):
            value.copy_(0.5 * wave)
    x = torch.arange(2 * 3 * 96 * 96, dtype=torch.float64)
    return model, x.pow(1.5).mul(0.01).sin().mul(2).view(2, 3, 96, 96)


# Logits that the authors' levit/evo_levit.py (github.com/YifanXu74/Evo-ViT, commit 4c5d9b3) computes in float64 with
# the weights of `recorded_model`, loaded under the authors' names into its LeViT: 96 x 96 images, widths 16 24 32, key
# dim 4, heads 2 3 4, depths 4 2 2, ratios 0.5 from the third block on, learned tradeoffs. The first four of each image
# in evaluation mode, then the first of each of the four heads in training mode. Computed again in November 2026: the
# same.
RECORDED = {
    'stage': [1.904415, 0.154585, -2.479242, -2.029588, 1.803043, 0.239688, -2.370998, -1.776336,
              0.939282, 0.145263, 1.327118, 1.87419],
    'layer': [1.905194, 0.153182, -2.482204, -2.030425, 1.78681, 0.241702, -2.407164, -1.784079,
              0.906018, -0.363696, 1.733169, 2.682007],
}


@pytest.mark.parametrize('selection', ['stage', 'layer'])
def test_figures_of_the_authors_code(selection):
    model, x = recorded_model(selection=selection)
    with torch.no_grad():
        logits = model(x)
        model.set_distilled_training()
        model.set_assisted_training()
        (main, dist), (main_cls, dist_cls) = model.train()(torch.cat([x, x.flip(3)]))
    got = logits[:, :4].flatten().tolist() + [y[0, 0].item() for y in (main, dist, main_cls, dist_cls)]
    assert got == pytest.approx(RECORDED[selection], rel=0, abs=2e-6)


def test_attention_that_nothing_reads_is_not_computed(monkeypatch):
    calls = []
    original = attention.class_attention
    monkeypatch.setattr(attention, 'class_attention', lambda *args: calls.append(1) or original(*args))
    for kwargs, count in (
            ({}, 4 + 1 + 2 + 1), (dict(selection='layer'), 4 + 1 + 2 + 1 + 1), (dict(keep_ratio=1), 0),
            (dict(keep_ratio=(0.5, 1, 1)), 2)):
        calls.clear()
        build(**kwargs)(images())
        assert len(calls) == count, kwargs


# Training

def test_outputs_of_training():
    model = build().train()
    x = images(5)

    def outputs(distilled, assisted):
        model.set_distilled_training(distilled)
        model.set_assisted_training(assisted)
        return model(x)

    with torch.no_grad():
        (main, dist), (main_cls, dist_cls) = outputs(True, True)
        average, average_cls = outputs(False, True)
        rows, rows_dist = outputs(True, False)
        one = outputs(False, False)
    assert torch.equal(average, (main + dist) / 2) and torch.equal(average_cls, (main_cls + dist_cls) / 2)
    by_patches = (rows == main).all(dim=1)
    assert by_patches.sum() in (2, 3)
    for got, a, b in ((rows, main, main_cls), (rows_dist, dist, dist_cls)):  # one draw for both
        assert torch.equal(got, torch.where(by_patches.unsqueeze(1), a, b))
    assert ((one == average).all(dim=1) ^ (one == average_cls).all(dim=1)).all()
    assert len({tuple(y[0].tolist()) for y in (main, dist, main_cls, dist_cls)}) == 4
    outputs(True, True)
    assert torch.is_tensor(AssistedLoss(F.cross_entropy)(model.eval()(x), torch.arange(5)))  # one output
    alone = build(assisted_cls=False).train()
    assert torch.is_tensor(alone(x))
    alone.set_distilled_training()
    assert len(alone(x)) == 2


# What timm does with a model

@pytest.mark.parametrize('kwargs', [{}, dict(assisted_cls=False), dict(selection='layer')])
def test_folded_batch_norm(kwargs):
    model = build(**kwargs)
    folded = reparameterize_model(model)
    assert not [m for m in folded.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    x = images(4)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-4 * model(x).abs().max().item())


@pytest.mark.parametrize('size, grids', [
    ((160, 160), [(10, 10), (5, 5), (3, 3)]),
    ((65, 40), [(5, 3), (3, 2), (2, 1)]),
    ((16, 100), [(1, 7), (1, 4), (1, 2)]),
])
@torch.no_grad()
def test_features_are_complete_grids(size, grids):
    model, x = build(img_size=size), images(2, size)
    final, maps = model.forward_intermediates(x)
    assert [m.shape[1:] for m in maps] == [(c, *g) for c, g in zip((16, 24, 32), grids)]
    assert torch.equal(final, model.forward_features(x)) and final.shape[1] == 1 + grids[-1][0] * grids[-1][1]
    assert torch.equal(final[:, 1:], maps[-1].flatten(2).transpose(1, 2))
    torch.testing.assert_close(model.forward_head(final, pre_logits=True), maps[-1].mean(dim=(2, 3)))
    early = model.forward_intermediates(x, [1], stop_early=True)
    assert torch.equal(early[1][0], maps[1]) and early[0].shape[2] == 24
    assert [t.mask.shape[1:] for t in find_slow_tokens(model, x)] == grids
    backbone = timm.create_model(NAME, features_only=True, **tiny(NAME, img_size=size, out_indices=(0, 2))).eval()
    backbone.model.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(backbone(x), [maps[0], maps[2]])
    assert backbone.feature_info.channels() == [16, 32] and backbone.feature_info.reduction() == [16, 64]


def test_heads_follow_the_readout():
    model = build()
    assert list(model.get_classifier()) == [model.head, model.head_dist, model.head_cls, model.head_cls_dist]
    model.train().reset_classifier(7)
    assert model(images()).shape == (2, 7)
    assert all(head.training and head.linear.out_features == 7 for head in model.get_classifier())
    with torch.no_grad():
        model.eval().reset_classifier(0)
        assert model.head_cls is None and model.head_cls_dist is None
        torch.testing.assert_close(model(images()), model.forward_features(images())[:, 1:].mean(dim=1))
        model.reset_classifier(0, '')
        assert torch.equal(model(images()), model.forward_features(images()))
    model.reset_classifier(3, 'avg')
    assert model.head_cls.linear.out_features == 3
    alone = build(assisted_cls=False)
    assert list(alone.get_classifier()) == [alone.head, alone.head_dist]
    assert model.default_cfg['classifier'] == tuple(
        name for name, module in model.named_modules() if any(module is head.linear for head in model.get_classifier()))


def test_bfloat16_tells_close_patches_apart():
    """A new model attends almost evenly: patches would tie by the dozen if class attention were rounded to bfloat16."""
    torch.manual_seed(0)
    model = timm.create_model(NAME).eval()
    x = images(4, (224, 224))
    full = find_slow_tokens(model, x)
    half = find_slow_tokens(model.to(torch.bfloat16), x.bfloat16())
    assert all((a.mask & b.mask).sum() > 0.95 * a.mask.sum() for a, b in zip(full, half))


def test_initialisation():
    """init_weights after to_empty gives what the constructor gives."""
    torch.manual_seed(0)
    fresh = timm.create_model(NAME, **TINY_LEVIT)
    model = timm.create_model(NAME, **TINY_LEVIT, device='meta').to_empty(device='cpu')
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(7)
    model.init_weights()
    assert fresh.cls_token.abs().max() == 0 and fresh.tradeoff.abs().max() == 0
    assert fresh.stages[0].blocks[0].attn.proj.ln.bn.weight.abs().max() == 0
    assert fresh.stages[1].downsample.attn_downsample.proj.ln.bn.weight.min() == 1
    for key, value in fresh.state_dict().items():
        other = model.state_dict()[key].double()
        assert other.mean().item() == pytest.approx(value.double().mean().item(), rel=0.5, abs=0.05), key
        if value.numel() > 64:
            assert other.std().item() == pytest.approx(value.double().std().item(), rel=0.3, abs=0.02), key


# Checkpoints

def test_checkpoints_adapt():
    model = build()
    source = dict(state_dict=authors_names(model))
    fixed = load(source, NAME, tradeoff=0.25, assisted_cls=False)
    assert fixed.tradeoff is None and fixed.head_cls is None
    assert torch.equal(fixed.head_dist.linear.weight, model.head_dist.linear.weight)
    other = load(source, NAME, num_classes=3)
    assert other(images()).shape == (2, 3) and torch.equal(other.head.bn.running_var, model.head.bn.running_var)
    assert load(source, NAME, num_classes=3, assisted_cls=False)(images()).shape == (2, 3)
    assert load(source, NAME, num_classes=0)(images()).shape == (2, 32)
    grey = load(source, NAME, in_chans=1)
    torch.testing.assert_close(grey.stem.conv1.linear.weight, model.stem.conv1.linear.weight.sum(dim=1, keepdim=True))


@pytest.mark.parametrize('old, new', [((64, 64), (96, 96)), ((64, 64), (48, 80)), ((64, 96), (96, 64))])
def test_position_embeddings_resample(old, new):
    """A grid that is not square is known from the configuration that comes with the weights."""
    model = build(img_size=old)
    source = dict(state_dict=authors_names(model))
    if old[0] != old[1]:
        source['input_size'] = (3, *old)
    other = load(source, NAME, img_size=new)
    names = 'pos_embed', *(f'stages.{i}.downsample.attn_downsample.pos_embed' for i in (1, 2))
    for name, reduction in zip(names, (16, 16, 32)):
        a, b = ([-(-side // reduction) for side in size] for size in (old, new))
        before, after = (m.get_parameter(name) for m in (model, other))
        assert before.shape[1] == a[0] * a[1] + 1 and after.shape[1] == b[0] * b[1] + 1
        torch.testing.assert_close(after, resample_abs_pos_embed(before, b, a))
    assert other(images(2, new)).shape == (2, 10)


def test_input_of_another_size():
    with pytest.raises(AssertionError, match=r'width \(80\) does not match model \(64\)'):
        build()(images(1, (64, 80)))
    with pytest.raises(AssertionError, match=r'height \(63\)'):  # the same grid, but other pixels under each patch
        build()(images(1, (63, 64)))
