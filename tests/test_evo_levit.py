"""Evo-LeViT against a plain reference, the authors' figures, and what a user of timm does with a model."""
import argparse
import copy
import math
import re

import pytest
import timm
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from timm.layers import resample_abs_pos_embed
from timm.models import checkpoint
from timm.utils import reparameterize_model
from torch.nn import functional as F

import timm_evovit.evo_levit
from timm_evovit import AssistedLoss, EvoLevit, informative_tokens

NAME = 'evo_levit_128s'
SMALL = dict(num_classes=10, img_size=64, embed_dim=(16, 24, 32), key_dim=4, num_heads=(2, 3, 4), depth=(4, 2, 2))


def build(seed=0, **kwargs):
    """A small model with weights and statistics large enough that attention is far from uniform and tokens differ."""
    torch.manual_seed(seed)
    model = timm.create_model(NAME, **{**SMALL, **kwargs}).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.ndim > 1:
                p.normal_(std=0.2 if 'pos_embed' in key or 'token' in key else 1 / math.sqrt(p[0].numel()))
            elif key.endswith('weight'):
                p.uniform_(0.4, 1)
            else:
                p.normal_(std=0.4)
            if key.endswith('qkv.bn.weight'):
                p.mul_(2)
        for key, b in model.named_buffers():
            if key.endswith('running_mean'):
                b.normal_(std=0.3)
            elif key.endswith('running_var'):
                b.uniform_(0.5, 2)
    return model


def images(n=2, size=(64, 64), chans=3, seed=1):
    return torch.randn(n, chans, *size, generator=torch.Generator().manual_seed(seed))


class Written:
    """The model written out: images one by one, only joined where batch norm takes statistics over all of them."""

    def __init__(self, model):
        self.w = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.training = model.training
        self.representative = model.stages[0].blocks.representative_token
        self.layer_wise = model.selection == 'layer'
        self.keep_ratio = model.keep_ratio
        self.stages = [(len(s.blocks), s.blocks[0].attn.num_heads) for s in model.stages]
        self.key_dim = model.stages[0].blocks[0].attn.key_dim
        self.fixed = model.fixed_tradeoff if model.tradeoff is None else None
        self.attentions = 0
        self.statistics = {}
        self.kept = []

    def norm(self, name, xs):
        """Rows of each x are what is normalized, columns are channels."""
        mean, var = self.w[f'{name}.running_mean'], self.w[f'{name}.running_var']
        if self.training:
            rows = torch.cat(xs)
            mean, var = rows.mean(dim=0), rows.var(dim=0, unbiased=False)
            self.statistics[name] = mean, rows.var(dim=0)
        return [(x - mean) / (var + 1e-5).sqrt() * self.w[f'{name}.weight'] + self.w[f'{name}.bias'] for x in xs]

    def linear(self, name, xs):
        return self.norm(f'{name}.bn', [x @ self.w[f'{name}.linear.weight'].T for x in xs])

    def mlp(self, name, xs):
        hidden = [F.hardswish(x) for x in self.linear(f'{name}.ln1', xs)]
        return [x + y for x, y in zip(xs, self.linear(f'{name}.ln2', hidden))]

    def heads(self, queries, keys, values):
        """Lists over heads of (M, d), (N, d), (N, e); output (M, heads * e) and class attention (N,)."""
        tables = [(q @ k.T / math.sqrt(self.key_dim)).softmax(dim=1) for q, k in zip(queries, keys)]
        return torch.cat([t @ v for t, v in zip(tables, values)], dim=1), sum(t[0] for t in tables) / len(tables)

    def block(self, name, xs, heads):
        outs, rows, d = [], [], self.key_dim
        for qkv in self.linear(f'{name}.attn.qkv', xs):
            parts = qkv.chunk(heads, dim=1)
            out, row = self.heads(*zip(*(p.split([d, d, p.shape[1] - 2 * d], dim=1) for p in parts)))
            outs.append(F.hardswish(out))
            rows.append(row)
        xs = [x + y for x, y in zip(xs, self.linear(f'{name}.attn.proj.ln', outs))]
        return self.mlp(f'{name}.mlp', xs), rows

    def tradeoff(self):
        self.attentions += 1
        return self.fixed if self.fixed is not None else torch.sigmoid(self.w['tradeoff'][self.attentions - 1])

    def downsample(self, name, xs, gs, grid):
        xs = [x + self.w[f'{name}.attn_downsample.pos_embed'][0] for x in xs]
        H, W = grid
        chosen = [i * W + j for i in range(0, H, 2) for j in range(0, W, 2)]
        heads, d = xs[0].shape[1] // self.key_dim, self.key_dim
        kvs = self.linear(f'{name}.attn_downsample.kv', xs)
        qs = self.linear(f'{name}.attn_downsample.q.ln', [x[[0] + [1 + i for i in chosen]] for x in xs])
        a, outs, mixed = self.tradeoff(), [], []
        for kv, q, g in zip(kvs, qs, gs):
            parts = kv.chunk(heads, dim=1)
            out, row = self.heads(q.chunk(heads, dim=1), [p[:, :d] for p in parts], [p[:, d:] for p in parts])
            outs.append(F.hardswish(out))
            m = (1 - a) * g[chosen] + a * row[1:][chosen]
            mixed.append(m / m.sum() * g.sum())
        return self.mlp(f'{name}.mlp', self.linear(f'{name}.attn_downsample.proj.ln', outs)), mixed

    def group(self, stage, blocks, xs, gs, heads, ratio):
        """Some blocks that share one selection; with ratio 1 there is none."""
        n = len(xs[0]) - 1
        k = n if ratio == 1 else max(1, int(n * ratio))
        kept, rest, slow, before = [], [], [], []
        for x, g in zip(xs, gs if gs is not None else [torch.zeros(n)] * len(xs)):
            order = sorted(range(n), key=lambda i: -g[i].item())
            kept.append(order[:k])
            rest.append(order[k:])
            parts = [x[[0] + [1 + i for i in kept[-1]]]]
            if rest[-1] and self.representative:
                before.append(g[rest[-1]] @ x[1:][rest[-1]] / g[rest[-1]].sum())
                parts.append(before[-1][None])
            slow.append(torch.cat(parts))
        if ratio < 1:
            self.kept.append([sorted(order) for order in kept])
        for b in blocks:
            slow, rows = self.block(f'stages.{stage}.blocks.{b}', slow, heads)
            a = self.tradeoff()
            fresh = []
            for image, row in enumerate(rows):
                own = row[1:1 + k]
                if gs is None:
                    fresh.append(own[torch.tensor(kept[image]).argsort()])
                    continue
                g = gs[image].clone()
                g[kept[image]] = (1 - a) * g[kept[image]] + a * own
                fresh.append(g)
            gs = fresh
        out = []
        for image, x in enumerate(xs):
            x = x.clone()
            if rest[image] and self.representative:
                for i in rest[image]:
                    x[1 + i] += slow[image][-1] - before[image]
            x[[0] + [1 + i for i in kept[image]]] = slow[image][:1 + k]
            out.append(x)
        return out, gs

    def __call__(self, x):
        """Images (B, in_chans, H, W) to the tokens after each stage and four logits (B, num_classes)."""
        for i in range(1, 5):
            x = F.conv2d(x, self.w[f'stem.conv{i}.linear.weight'], stride=2, padding=1)
            B, C, H, W = x.shape
            x = torch.stack(self.norm(f'stem.conv{i}.bn', list(x.flatten(2).transpose(1, 2))))
            x = x.transpose(1, 2).reshape(B, C, H, W)
            x = F.hardswish(x) if i < 4 else x
        xs = [torch.cat([self.w['cls_token'][0], y.flatten(1).T]) + self.w['pos_embed'][0] for y in x]
        gs, after = None, []
        for stage, (depth, heads) in enumerate(self.stages):
            if stage > 0:
                xs, gs = self.downsample(f'stages.{stage}.downsample', xs, gs, (H, W))
                H, W = math.ceil(H / 2), math.ceil(W / 2)
            dense = min(2, depth) if stage == 0 else 0
            groups = [([b], 1) for b in range(dense)]
            if depth > dense:
                last = list(range(dense, depth))
                groups += [([b], self.keep_ratio[stage]) for b in last] if self.layer_wise else [
                    (last, self.keep_ratio[stage])]
            for blocks, ratio in groups:
                xs, gs = self.group(stage, blocks, xs, gs, heads, ratio)
            after.append(torch.stack(xs))
        mean, cls = torch.stack([x[1:].mean(dim=0) for x in xs]), torch.stack([x[0] for x in xs])
        logits = []
        for name, y in (('head', mean), ('head_dist', mean), ('head_cls', cls), ('head_cls_dist', cls)):
            y, = self.norm(f'{name}.bn', [y])
            logits.append(y @ self.w[f'{name}.linear.weight'].T + self.w[f'{name}.linear.bias'])
        return after, logits


configurations = st.fixed_dictionaries(dict(
    seed=st.integers(0, 10_000),
    depth=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    height=st.integers(17, 80),
    width=st.integers(17, 80),
    tradeoff=st.one_of(st.just('learned'), st.sampled_from([0., 0.5, 1.]), st.floats(0, 1)),
    selection=st.sampled_from(['stage', 'layer']),
    representative_token=st.booleans(),
    attn_ratio=st.sampled_from([1, 2]),
    data=st.data(),
))


@settings(max_examples=50, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate),
          suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(c=configurations)
def test_matches_the_written_out_method(c):
    """Tokens, selections, logits; in training also statistics and every gradient."""
    num_stages, size = len(c['depth']), (c['height'], c['width'])
    if max(size) <= 32:
        size = (33, size[1])
    ratio = st.one_of(st.floats(0.05, 0.95), st.just(1.), st.sampled_from([0.25, 0.5]))
    keep_ratio = [c['data'].draw(ratio) for _ in c['depth']]
    model = build(
        c['seed'], img_size=size, depth=c['depth'], embed_dim=(16, 24, 32)[:num_stages],
        num_heads=(2, 3, 4)[:num_stages], out_indices=(0,), keep_ratio=keep_ratio, tradeoff=c['tradeoff'],
        selection=c['selection'], representative_token=c['representative_token'], attn_ratio=c['attn_ratio'],
    ).double()
    x = images(3, size, seed=c['seed']).double()
    model.set_distilled_training()
    model.set_assisted_training()
    with torch.no_grad():
        written = Written(model)
        after, logits = written(x)
        torch.testing.assert_close(model(x), (logits[0] + logits[1]) / 2)
        torch.testing.assert_close(model.forward_features(x), after[-1])
        for features, tokens in zip(model.forward_intermediates(x)[1], after):
            torch.testing.assert_close(features.flatten(2).transpose(1, 2), tokens[:, 1:])
        found = [[m.flatten().nonzero().flatten().tolist() for m in t.mask] for t in informative_tokens(model, x)]
        assert found == written.kept

    model.train()
    weights = torch.randn(4, 3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    written = Written(model)
    expected = written(x)[1]
    before = {k: v.clone() for k, v in model.named_buffers()}
    (main, dist), (main_cls, dist_cls) = model(x)
    parameters = dict(model.named_parameters())
    gradients = []
    for outputs in (expected, (main, dist, main_cls, dist_cls)):
        loss = sum((y.softmax(dim=1) * w).sum() for y, w in zip(outputs, weights))
        gradients.append(torch.autograd.grad(loss, list(parameters.values()), allow_unused=True))
    torch.testing.assert_close([main, dist, main_cls, dist_cls], expected, rtol=1e-5, atol=1e-7)
    scale = max(g.abs().max() for g in gradients[0] if g is not None).item()
    for name, a, b in zip(parameters, *gradients):
        a = torch.zeros_like(b) if a is None else a
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-7 * scale, msg=lambda m: f'{name}: {m}')
    for name, (mean, var) in written.statistics.items():
        for key, new in (('running_mean', mean), ('running_var', var)):
            expected_buffer = 0.9 * before[f'{name}.{key}'] + 0.1 * new
            torch.testing.assert_close(model.get_buffer(f'{name}.{key}'), expected_buffer)


def test_reference_runs_more_than_one_kind_of_stage():
    """The comparison above would mean little if selection never left a placeholder out or always the same."""
    found = informative_tokens(build(), images(4, seed=3))
    assert [t.block for t in found] == [2, 4, 6]
    assert [tuple(t.mask.shape[1:]) for t in found] == [(4, 4), (2, 2), (1, 1)]
    assert [t.mask.sum(dim=(1, 2)).tolist() for t in found] == [[8] * 4, [2] * 4, [1] * 4]
    assert (found[0].mask[0] != found[0].mask[1]).any()
    assert [t.block for t in informative_tokens(build(selection='layer'), images())] == [2, 3, 4, 5, 6, 7]
    assert [t.block for t in informative_tokens(build(depth=(2, 3, 4)), images())] == [2, 5]
    assert [t.block for t in informative_tokens(build(depth=(1, 1, 1), keep_ratio=(0.5, 1, 0.5)), images())] == [2]


def recorded_model(**kwargs):
    """Weights and statistics made by a formula, so that others can make the same."""
    model = timm.create_model(NAME, **{**SMALL, 'img_size': 96}, **kwargs).double().eval()
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


# What the authors' code makes of it: the first logits of both images, and of all four heads in training mode
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


@pytest.mark.parametrize('kwargs', [{}, dict(selection='layer'), dict(tradeoff=0.25)])
def test_images_do_not_depend_on_the_batch(kwargs):
    model = build(**kwargs).double()
    x = images(5).double()
    with torch.no_grad():
        together = model(x)
        torch.testing.assert_close(together, torch.cat([model(image[None]) for image in x]))
        torch.testing.assert_close(together.flip(0), model(x.flip(0)))


def test_set_keep_ratio_touches_no_weights():
    model = build()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x = images()
    with torch.no_grad():
        half = model(x)
        model.set_keep_ratio((0.25, 1, 0.5))
        assert [t.block for t in informative_tokens(model, x)] == [2, 6]
        assert informative_tokens(model, x)[0].mask.sum(dim=(1, 2)).tolist() == [4, 4]
        model.set_keep_ratio(1)
        assert informative_tokens(model, x) == [] and not torch.allclose(model(x), half, rtol=1e-3)
        dense = build(selection='layer', representative_token=False, tradeoff=0.3, keep_ratio=1)
        dense.load_state_dict(state, strict=False)
        torch.testing.assert_close(dense(x), model(x))
        model.set_keep_ratio(0.5)
        assert torch.equal(model(x), half)
        for bad in (0, 2, (0.5,), 'x', float('nan')):
            with pytest.raises((ValueError, TypeError)):
                model.set_keep_ratio(bad)
        assert model.keep_ratio == (0.5, 0.5, 0.5) and torch.equal(model(x), half)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_attention_that_nothing_reads_is_not_computed(monkeypatch):
    from timm_evovit import evolution
    calls = []
    original = evolution.class_attention
    monkeypatch.setattr(evolution, 'class_attention', lambda *args: calls.append(1) or original(*args))
    for kwargs, count in (({}, 4 + 1 + 2 + 1), (dict(selection='layer'), 4 + 1 + 2 + 1 + 1), (dict(keep_ratio=1), 0),
                          (dict(keep_ratio=(0.5, 1, 1)), 2), (dict(tradeoff=1.), 1 + 2 + 1 + 2 + 1)):
        calls.clear()
        build(**kwargs)(images())
        assert len(calls) == count, kwargs


def test_published_sizes():
    """Parameters with and without the class token heads."""
    expected = {
        '128s': (8_606_651, 7_835_115),
        '128': (10_041_022, 9_269_486),
        '192': (11_803_526, 11_031_990),
        '256': (20_035_278, 19_007_230),
        '384': (40_836_830, 39_295_758),
    }
    for name, counts in expected.items():
        for assisted, count in zip((True, False), counts):
            model = timm.create_model(f'evo_levit_{name}', assisted_cls=assisted, device='meta')
            assert sum(p.numel() for p in model.parameters()) == count
        large = timm.create_model(f'evo_levit_{name}_384', device='meta')
        assert large.img_size == (384, 384) and large.pretrained_cfg['crop_pct'] == 0.875
        rate = getattr(large.stages[0].blocks[0].drop_path1, 'drop_prob', 0)
        assert rate == (0.1 if name == '384' else 0)
        assert large.stages[1].downsample.attn_downsample.pos_embed.shape[1] == 24 * 24 + 1
    assert timm.get_pretrained_cfg('evo_levit_384_384').tag == 'evovit_in1k'


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
    model.eval()
    assert torch.is_tensor(model(x)) and torch.is_tensor(AssistedLoss(F.cross_entropy)(model(x), torch.arange(5)))
    alone = build(assisted_cls=False).train()
    assert torch.is_tensor(alone(x))
    alone.set_distilled_training()
    assert len(alone(x)) == 2


def test_loss_of_the_recipe():
    model = build().train()
    model.set_distilled_training()
    model.set_assisted_training()
    x, target, teacher = images(4), torch.arange(4), torch.arange(4).flip(0)

    def distillation(output, y):
        return (F.cross_entropy(output[0], y) + F.cross_entropy(output[1], teacher)) / 2

    (main, dist), (main_cls, dist_cls) = output = model(x)
    ce = F.cross_entropy
    expected = (ce(main, target) + ce(main_cls, target)) / 4 + (ce(dist, teacher) + ce(dist_cls, teacher)) / 4
    torch.testing.assert_close(AssistedLoss(distillation)(output, target), expected)


def test_token_distillation_task():
    from timm import task
    model = build().train()
    teacher = timm.create_model('test_vit', num_classes=10, img_size=64)
    training = task.TokenDistillationTask(
        model, teacher, torch.nn.CrossEntropyLoss(), distill_type='hard', task_loss_weight=0.5, verbose=False).train()
    training(images(4), torch.arange(4))['loss'].backward()
    assert model.distilled_training and [n for n, p in model.named_parameters() if p.grad is None] == []
    training.eval()
    assert model(images(4)).shape == (4, 10)


@pytest.mark.parametrize('kwargs', [
    {}, dict(selection='layer'), dict(representative_token=False), dict(assisted_cls=False), dict(keep_ratio=1),
    dict(tradeoff=0.5), dict(num_classes=0), dict(global_pool='', num_classes=0), dict(depth=(1, 1, 1)),
    dict(img_size=33), dict(depth=(0, 1, 0)), dict(drop_rate=0.1, drop_path_rate=0.2),
])
@pytest.mark.parametrize('distilled', [False, True])
@pytest.mark.parametrize('assisted', [False, True])
def test_every_parameter_has_a_gradient(kwargs, distilled, assisted):
    model = build(**kwargs).train()
    model.set_distilled_training(distilled)
    model.set_assisted_training(assisted)
    output = [model(images(3, model.img_size))]
    while not torch.is_tensor(output[0]):
        output = [y for pair in output for y in pair]
    sum(y.square().sum() for y in output).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_tradeoff_learns_where_it_decides():
    """Through the weights of representative tokens: not in block 0, nor after the last selection."""
    model = build(img_size=96).train()
    model(images(4, (96, 96))).square().sum().backward()
    assert (model.tradeoff.grad != 0).tolist() == [False] + [True] * 7 + [False] * 2
    assert model.stages[2].blocks[0].attn.qkv.linear.weight.grad.abs().max() > 0


@pytest.mark.parametrize('kwargs', [{}, dict(selection='layer'), dict(representative_token=False)])
def test_grad_checkpointing_changes_nothing(monkeypatch, kwargs):
    gradients = []
    for enable, reentrant in ((False, False), (True, False), (True, True)):
        model = build(**kwargs).train()
        model.set_grad_checkpointing(enable)
        monkeypatch.setattr('timm.layers.config._USE_REENTRANT_CKPT', reentrant)
        calls = []
        monkeypatch.setattr(
            timm_evovit.evolution, 'checkpoint',
            lambda block, x: calls.append(getattr(block, 'args', [block])[0]) or checkpoint(block, x))
        torch.manual_seed(0)  # the same heads
        model(images(3)).square().sum().backward()
        assert calls == [block for stage in model.stages for block in stage.blocks] * enable
        gradients.append([p.grad for p in model.parameters()])
    for checkpointed in gradients[1:]:
        torch.testing.assert_close(checkpointed, gradients[0])


# What timm does with a model

@pytest.mark.parametrize('kwargs', [{}, dict(assisted_cls=False), dict(selection='layer')])
def test_folded_batch_norm(kwargs):
    model = build(**kwargs)
    folded = reparameterize_model(model)
    assert not [m for m in folded.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    x = images(4)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-4 * model(x).abs().max().item())


def test_inference_leaves_no_trace():
    model = build()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    assert torch.equal(model(images()), model(images()))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes


@pytest.mark.parametrize('size, grids', [
    ((160, 160), [(10, 10), (5, 5), (3, 3)]),
    ((65, 40), [(5, 3), (3, 2), (2, 1)]),
    ((16, 100), [(1, 7), (1, 4), (1, 2)]),
])
def test_features_are_complete_grids(size, grids):
    model = build(img_size=size)
    x = images(2, size)
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        assert [m.shape[1:] for m in maps] == [(c, *g) for c, g in zip((16, 24, 32), grids)]
        assert torch.equal(final, model.forward_features(x)) and final.shape[1] == 1 + grids[-1][0] * grids[-1][1]
        assert torch.equal(final[:, 1:], maps[-1].flatten(2).transpose(1, 2))
        torch.testing.assert_close(model.forward_head(final, pre_logits=True), maps[-1].mean(dim=(2, 3)))
        backbone = timm.create_model(NAME, **{**SMALL, 'img_size': size}, features_only=True, out_indices=(0, 2)).eval()
        backbone.model.load_state_dict(model.state_dict(), strict=False)
        torch.testing.assert_close(backbone(x), [maps[0], maps[2]])
        assert backbone.feature_info.reduction() == [16, 64]
        early = model.forward_intermediates(x, [1], stop_early=True)
        assert torch.equal(early[1][0], maps[1]) and early[0].shape[2] == 24
        assert [t.mask.shape[1:] for t in informative_tokens(model, x)] == grids


@pytest.mark.parametrize('last', range(3))
def test_pruning_keeps_the_evolution(last):
    model = build()
    x = images()
    with torch.no_grad():
        expected = model.forward_intermediates(x, [last], intermediates_only=True)[0]
        assert model.prune_intermediate_layers([last], prune_head=False) == [last]
        torch.testing.assert_close(model.forward_intermediates(x, intermediates_only=True)[-1], expected)
        model.set_keep_ratio(0.25)  # still a working model
        assert len(informative_tokens(model, x)) == last + 1
        model.reset_classifier(3, 'avg')
        assert model(x).shape == (2, 3)


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


@pytest.mark.parametrize('kwargs', [{}, dict(selection='layer', tradeoff=0.3, assisted_cls=False)])
def test_script_and_fx(kwargs):
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
    model = build(**kwargs)
    many = images(5, seed=2)
    with torch.no_grad():
        expected = model(many)
        torch.testing.assert_close(torch.jit.script(model)(many), expected, rtol=1e-4, atol=1e-4)
        node = get_graph_node_names(model)[1][-1]
        torch.testing.assert_close(create_feature_extractor(model, [node])(many)[node], expected)
    model.train()
    outputs = []
    for m in (torch.jit.script(model), model):
        torch.manual_seed(0)  # the same heads
        outputs.append(m(many))
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)


def test_export_and_compile():
    model = build(depth=(3, 1), embed_dim=(16, 24), num_heads=(2, 3), out_indices=(0, 1))
    x, many = images(), images(5, seed=2)
    with torch.no_grad():
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('batch', min=2, max=64)},))
        torch.testing.assert_close(exported.module()(many), model(many))
    model.train()
    outputs = []
    for m in (torch.compile(model, backend='eager', fullgraph=True), model):
        torch.manual_seed(0)  # the same heads
        outputs.append(m(many))
    torch.testing.assert_close(*outputs)


def test_bfloat16_tells_close_patches_apart():
    """A new model attends almost evenly: patches would tie by the dozen if class attention were rounded to bfloat16."""
    torch.manual_seed(0)
    model = timm.create_model(NAME).eval()
    x = images(4, (224, 224))
    full = informative_tokens(model, x)
    half = informative_tokens(model.to(torch.bfloat16), x.bfloat16())
    assert all((a.mask & b.mask).sum() > 0.95 * a.mask.sum() for a, b in zip(full, half))


def test_low_precision_and_meta():
    model = build()
    x = images(4)
    with torch.no_grad():
        full = model(x)
        with torch.autocast('cpu', torch.bfloat16):
            assert F.cosine_similarity(model(x).float().flatten(), full.flatten(), dim=0) > 0.97
        half = model.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16 and F.cosine_similarity(half.float().flatten(), full.flatten(), dim=0) > 0.9
    assert informative_tokens(model, x.bfloat16())[0].attention.dtype == torch.float32
    meta = timm.create_model(NAME, device='meta', dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in meta.parameters()} == {('meta', torch.bfloat16)}
    meta.reset_classifier(3)
    assert meta(torch.empty(2, 3, 224, 224, device='meta', dtype=torch.bfloat16)).shape == (2, 3)
    model.float().train()
    with torch.autocast('cpu', torch.bfloat16):
        model(x).float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_initialisation():
    """init_weights after to_empty gives what the constructor gives."""
    torch.manual_seed(0)
    fresh = timm.create_model(NAME, **SMALL)
    model = timm.create_model(NAME, **SMALL, device='meta').to_empty(device='cpu')
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


def test_parameter_groups():
    from timm.optim import param_groups_layer_decay
    model = build()
    positions = {f'stages.{i}.downsample.attn_downsample.pos_embed' for i in (1, 2)}
    assert model.no_weight_decay() == {'tradeoff', 'cls_token', 'pos_embed'} | positions
    groups = param_groups_layer_decay(
        model, weight_decay=0.05, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    scale = {id(p): g['lr_scale'] for g in groups for p in g['params']}
    order = [scale[id(p)] for p in (
        model.cls_token,
        model.stages[0].blocks[0].mlp.ln1.linear.weight,
        model.stages[1].downsample.mlp.ln1.linear.weight,
        model.stages[2].blocks[1].mlp.ln1.linear.weight,
        model.head_cls.linear.weight,
    )]
    assert order == sorted(set(order)) and order[-1] == 1
    decay = {id(p): g['weight_decay'] for g in groups for p in g['params']}
    assert decay[id(model.tradeoff)] == 0 and decay[id(model.head.linear.weight)] == 0.05


def test_nan_in_nan_out():
    model = build()
    x = images()
    x[0] = float('nan')
    with torch.no_grad():
        y = model(x)
    assert y[0].isnan().all() and y[1].isfinite().all()


def test_deepcopy_and_pickle(tmp_path):
    model = build()
    torch.save(model, tmp_path / 'model.pt')
    with torch.no_grad():
        expected = model(images())
        assert torch.equal(copy.deepcopy(model)(images()), expected)
        assert torch.equal(torch.load(tmp_path / 'model.pt', weights_only=False)(images()), expected)


# Checkpoints

def authors_names(model):
    """The model's state dict under the authors' names."""
    out, flat = {}, 0
    prefixes = {}
    for i, stage in enumerate(model.stages):
        if i > 0:
            prefixes[f'stages.{i}.downsample.attn_downsample.'] = f'blocks.{flat}.'
            prefixes[f'stages.{i}.downsample.mlp.'] = f'blocks.{flat + 1}.m.'
            flat += 2
        for b in range(len(stage.blocks)):
            prefixes[f'stages.{i}.blocks.{b}.attn.'] = f'blocks.{flat}.m1.m.'
            prefixes[f'stages.{i}.blocks.{b}.mlp.'] = f'blocks.{flat}.m2.m.'
            flat += 1
    scalars = [v + 'learn_tradeoff' for k, v in prefixes.items() if k.endswith(('attn.', 'attn_downsample.'))]
    for key, value in model.state_dict().items():
        if key == 'tradeoff':
            out.update((name, a[None]) for name, a in zip(scalars, value))
            continue
        for own, theirs in prefixes.items():
            if key.startswith(own):
                key = theirs + key[len(own):].replace('ln1', '0').replace('ln2', '2').replace('proj.ln', 'proj.1')
                key = key.replace('q.ln', 'q.1').replace('pos_embed', 'poss')
        key = re.sub(r'^stem\.conv(\d)', lambda m: f'patch_embed.{2 * int(m[1]) - 2}', key)
        key = key.replace('linear.', 'l.' if key.startswith('head') else 'c.')
        out['poss' if key == 'pos_embed' else key] = value
    out.update({f'stage_{k}': v for k, v in out.items() if k.startswith('blocks.0.')})
    return out


def load(state_dict, num_classes=10, **kwargs):
    overlay = dict(state_dict=dict(state_dict), num_classes=10)
    return timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay=overlay, **{**SMALL, 'num_classes': num_classes, **kwargs}).eval()


@pytest.mark.parametrize('depth', [(4, 2, 2), (2, 3, 1)])
def test_authors_names_load(depth):
    model = build(depth=depth)
    state = authors_names(model)
    assert {
        'blocks.0.m1.m.learn_tradeoff', 'blocks.1.m2.m.2.bn.running_var', 'patch_embed.6.c.weight', 'head_dist.l.bias',
        f'blocks.{depth[0]}.poss', f'blocks.{depth[0] + 1}.m.0.c.weight', f'blocks.{depth[0]}.q.1.c.weight',
    } <= set(state)
    for wrapped in (state, {'model': state}):
        loaded = load(wrapped, depth=depth)
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())
        assert set(loaded.state_dict()) == set(model.state_dict())
    own = load(model.state_dict(), depth=depth)
    assert torch.equal(own(images()), model(images()))


def test_checkpoints_adapt():
    model = build()
    state = authors_names(model)
    fixed = load(state, tradeoff=0.25, assisted_cls=False)
    assert fixed.tradeoff is None and fixed.head_cls is None
    assert torch.equal(fixed.head_dist.linear.weight, model.head_dist.linear.weight)
    other = load(state, num_classes=3)
    assert other(images()).shape == (2, 3) and torch.equal(other.head.bn.running_var, model.head.bn.running_var)
    assert load(state, num_classes=3, assisted_cls=False)(images()).shape == (2, 3)
    assert load(state, num_classes=0)(images()).shape == (2, 32)
    grey = load(state, in_chans=1)
    torch.testing.assert_close(grey.stem.conv1.linear.weight, model.stem.conv1.linear.weight.sum(dim=1, keepdim=True))


@pytest.mark.parametrize('size', [(96, 96), (48, 80)])
def test_position_embeddings_resample(size):
    model = build()
    larger = load(authors_names(model), img_size=size)
    grid = [-(-s // 16) for s in size]
    torch.testing.assert_close(larger.pos_embed, resample_abs_pos_embed(model.pos_embed, grid))
    for i, old in ((1, 4), (2, 2)):
        before = model.stages[i].downsample.attn_downsample.pos_embed
        after = larger.stages[i].downsample.attn_downsample.pos_embed
        assert before.shape[1] == old * old + 1 and after.shape[1] == grid[0] * grid[1] + 1
        torch.testing.assert_close(after, resample_abs_pos_embed(before, grid))
        grid = [-(-s // 2) for s in grid]
    assert larger(images(2, size)).shape == (2, 10)


def test_position_embeddings_resample_from_any_grid():
    """A grid that is not square is known from the configuration that comes with the weights."""
    model = build(img_size=(64, 96))
    overlay = dict(state_dict=model.state_dict(), num_classes=10, input_size=(3, 64, 96))
    other = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **{**SMALL, 'img_size': (96, 64)})
    torch.testing.assert_close(other.pos_embed, resample_abs_pos_embed(model.pos_embed, [6, 4], [4, 6]))
    for i, old, new in ((1, [4, 6], [6, 4]), (2, [2, 3], [3, 2])):
        torch.testing.assert_close(
            other.stages[i].downsample.attn_downsample.pos_embed,
            resample_abs_pos_embed(model.stages[i].downsample.attn_downsample.pos_embed, new, old))


def test_wrong_checkpoints_are_named():
    state = authors_names(build())
    with pytest.raises(ValueError, match='attention_biases.*class token'):
        load(timm.create_model('levit_128s', **SMALL).state_dict())
    for change, message in (
            (lambda s: s.pop('blocks.3.m1.m.qkv.c.weight'), r'Missing key\(s\) .*stages\.0\.blocks\.3\.attn\.qkv\.linear'),
            (lambda s: s.pop('poss'), 'Missing key.*pos_embed'),
            (lambda s: s.update(extra=torch.zeros(1)), 'Unexpected key.*extra'),
            (lambda s: [s.pop(k) for k in list(s) if 'learn_tradeoff' in k], 'Missing key.*tradeoff'),
            (lambda s: s.update({'cls_token': torch.zeros(1, 1, 8)}), r'size mismatch for cls_token'),
            (lambda s: s.update(poss=torch.zeros(1, 13, 16)), r'size mismatch for pos_embed')):
        changed = dict(state)
        change(changed)
        with pytest.raises(RuntimeError, match=message):
            load(changed)
    with pytest.raises(RuntimeError, match=r'Missing key.*stages\.2\.blocks\.2'):
        load(state, depth=(4, 2, 3))


# Bad input

@pytest.mark.parametrize('kwargs, error, message', [
    (dict(keep_ratio=0), ValueError, r'keep_ratio must be in \(0, 1\], got 0'),
    (dict(keep_ratio=1.5), ValueError, '1.5'),
    (dict(keep_ratio=(0.5, 0.5)), ValueError, r'3, one per evolution stage, got \(0.5, 0.5\)'),
    (dict(keep_ratio='half'), TypeError, 'half'),
    (dict(tradeoff=1.2), ValueError, r'tradeoff must be in \[0, 1\], got 1.2'),
    (dict(tradeoff=float('nan')), ValueError, 'nan'),
    (dict(tradeoff='half'), ValueError, "'half'"),
    (dict(tradeoff=True), TypeError, 'True'),
    (dict(tradeoff=(0.5, 0.5)), ValueError, '0.5, 0.5'),
    (dict(selection='token'), ValueError, "'stage' or 'layer', got 'token'"),
    (dict(use_conv=True), ValueError, 'use_conv must be False'),
    (dict(img_size=16), ValueError, r'\(16, 16\) .* one side must be larger than 32'),
    (dict(img_size=32), ValueError, r'\(2, 2\), \(1, 1\), \(1, 1\)'),
    (dict(img_size=0), ValueError, r'\(0, 0\)'),
    (dict(depth=(4, 4)), ValueError, r'depth .* 3 by embed_dim, got \(4, 4\)'),
    (dict(not_an_argument=1), TypeError, 'not_an_argument'),
    (dict(num_heads=(2, 3)), ValueError, r'num_heads .* 3 by embed_dim, got \(2, 3\)'),
    (dict(embed_dim=16), TypeError, 'embed_dim must be one width per stage, .* got 16'),
    (dict(key_dim=32), ValueError, r'key_dim must be in 1 \.\. 16 .* got 32'),
    (dict(stem_backbone=torch.nn.Identity()), ValueError, 'stem_backbone'),
    (dict(representative_token='no'), TypeError, "representative_token must be True or False, got 'no'"),
    (dict(assisted_cls='false'), TypeError, "assisted_cls must be True or False, got 'false'"),
])
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        timm.create_model(NAME, **{**SMALL, **kwargs})


def test_input_of_another_size():
    with pytest.raises(AssertionError, match=r'width \(80\) does not match model \(64\)'):
        build()(images(1, (64, 80)))
    with pytest.raises(AssertionError, match=r'height \(63\)'):  # the same grid, but not the same pixels under each patch
        build()(images(1, (63, 64)))


def test_arguments_as_a_command_line_gives_them():
    from timm.utils import ParseKwargs
    parser = argparse.ArgumentParser()
    parser.add_argument('--model-kwargs', nargs='*', action=ParseKwargs)
    args = parser.parse_args(['--model-kwargs', 'keep_ratio=[0.5,0.7,1]', 'tradeoff=0.25', 'selection=layer',
                              'representative_token=False', 'assisted_cls=False'])
    model = timm.create_model(NAME, **SMALL, **args.model_kwargs)
    assert isinstance(model, EvoLevit) and model.keep_ratio == (0.5, 0.7, 1) and model.selection == 'layer'
    assert model.stages[1].blocks.tradeoff == [0.25, 0.25] and model.head_cls is None
    assert not model.stages[1].blocks.representative_token
    learned = timm.create_model(NAME, **SMALL, **parser.parse_args(['--model-kwargs', 'tradeoff=learned']).model_kwargs)
    assert learned.tradeoff.shape == (10,)
