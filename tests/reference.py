"""Both methods written out plainly, for Evo-DeiT, Evo-LeViT and `evolve`, one image or one token at a time.

Weights are read from the model; everything else is done here, after the paper and the authors' choices.
"""
import math
from fractions import Fraction
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch.nn import functional as F

Weights = Dict[str, torch.Tensor]


class Result(NamedTuple):
    tokens: torch.Tensor  # (N, C), class token and registers first
    kept: Dict[int, List[int]]  # block -> raster indices of the informative patches, ascending; or groups
    after: List[torch.Tensor]  # (N, C) after each block, complete


def block(w: Weights, i: int, x: torch.Tensor, heads: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """One transformer block on tokens (N, C); returns class attention over all tokens as well."""
    def norm(name: str, y: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(y, y.shape[-1:], w[f'blocks.{i}.{name}.weight'], w[f'blocks.{i}.{name}.bias'], 1e-6)

    def linear(name: str, y: torch.Tensor) -> torch.Tensor:
        return y @ w[f'blocks.{i}.{name}.weight'].T + w[f'blocks.{i}.{name}.bias']

    C = x.shape[1]
    d = C // heads
    qkv = linear('attn.qkv', norm('norm1', x))
    q, k, v = qkv[:, :C], qkv[:, C:2 * C], qkv[:, 2 * C:]
    outputs, rows = [], []
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        attention = torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(d), dim=-1)
        outputs.append(attention @ v[:, part])
        rows.append(attention[0])
    x = x + linear('attn.proj', torch.cat(outputs, dim=1))
    x = x + linear('mlp.fc2', F.gelu(linear('mlp.fc1', norm('norm2', x))))
    return x, sum(rows) / heads


def run_stage(
        run: Callable[[int, List[torch.Tensor]], Tuple[List[torch.Tensor], List[torch.Tensor]]], blocks: Sequence[int],
        xs: List[torch.Tensor], gs: Optional[List[torch.Tensor]], ratio: float, tradeoff: Callable[[int], float],
        num_prefix: int, representative: bool,
) -> Tuple[List[List[torch.Tensor]], List[torch.Tensor], List[List[int]]]:
    """Blocks that share one selection, with ratio 1 none; every attention row is tracked whether or not it is read.

    `run(i, xs)` runs block i on the tokens (N, C) of every image and returns class attention over all tokens as well.
    `gs` are global class attention of the patches of every image, None before the first block.

    Returns the complete tokens of every image after each block, `gs`, and the informative patches of every image.
    """
    P, n = num_prefix, len(xs[0]) - num_prefix
    k = n if ratio == 1 else max(1, int(n * ratio))
    kept, rest, slow, before = [], [], [], []
    for x, g in zip(xs, gs or [torch.zeros(n)] * len(xs)):
        order = sorted(range(n), key=lambda j: -g[j].item())
        kept.append(sorted(order[:k]))
        rest.append(order[k:])
        parts = [x[:P], x[P:][kept[-1]]]
        if rest[-1] and representative:
            before.append(g[rest[-1]] @ x[P:][rest[-1]] / g[rest[-1]].sum())
            parts.append(before[-1][None])
        slow.append(torch.cat(parts))
    after = []
    for i in blocks:
        slow, rows = run(i, slow)
        a = tradeoff(i)
        rows = [row[P:P + k] for row in rows]
        if gs is not None:
            mixed = [g.clone() for g in gs]
            for g, own, row in zip(mixed, kept, rows):
                g[own] = (1 - a) * g[own] + a * row
        gs = rows if gs is None else mixed
        after.append([x.clone() for x in xs])
        for image, x in enumerate(after[-1]):
            x[[*range(P), *(P + j for j in kept[image])]] = slow[image][:P + k]
            for j in rest[image] if representative else ():
                x[P + j] += slow[image][-1] - before[image]
    return after, gs, kept


def evolve(
        block: Callable[[int, torch.Tensor], Tuple[torch.Tensor, torch.Tensor]], x: torch.Tensor, depth: int,
        num_prefix: int, stages: Sequence[int], keep_ratio: Sequence[float], tradeoff: Sequence[float],
        layer_wise: bool, representative: bool,
) -> Result:
    """Tokens (N, C) of one image through all blocks. `block(i, tokens)` returns class attention as well."""
    def run(i: int, xs: List[torch.Tensor]) -> Tuple[List[torch.Tensor], List[torch.Tensor]]:
        y, row = block(i, xs[0])
        return [y], [row]

    kept, after, gs, ratio, i = {}, [], None, 1., 0
    while i < depth:
        if i in stages:
            ratio = keep_ratio[list(stages).index(i)]
        end = i + 1 if layer_wise and ratio < 1 else min(s for s in (*stages, depth) if s > i)
        found, gs, own = run_stage(
            run, range(i, end), [x], gs, ratio, tradeoff.__getitem__, num_prefix, representative)
        after += [x for x, in found]
        x = after[-1]
        if ratio < 1:
            kept[i] = own[0]
        i = end
    return Result(x, kept, after)


Block = Callable[[int, torch.Tensor, List[List[int]], List[float]], torch.Tensor]


class Joined(NamedTuple):
    groups: List[List[int]]  # positions in each group, first the one that others are joined to, in the order of these
    means: List[torch.Tensor]  # of each group, made longer
    costs: List[float]  # of each group, at which others are joined


def match(
        tokens: List[torch.Tensor], count: int, sizes: Sequence[int] = (), weight: torch.Tensor = None, width: int = 1,
) -> Joined:
    """One round of bipartite matching, with the sides of a checkerboard `width` fields wide."""
    sizes = sizes or [1] * len(tokens)
    units = [t if weight is None else t * weight for t in tokens]
    units = [t / t.norm() for t in units]
    colours = [(j // width + j % width) % 2 for j in range(len(tokens))]
    partner, costs = {}, {}
    for a in (j for j, colour in enumerate(colours) if not colour):
        for b in (j for j, colour in enumerate(colours) if colour):
            cost = (1 - (units[a] @ units[b]).item()) * sizes[a] * sizes[b] / (sizes[a] + sizes[b])
            if a not in partner or cost < costs[a]:
                partner[a], costs[a] = b, cost
    joined = sorted(partner, key=lambda a: costs[a])[:len(tokens) - count]  # the earlier of equal ones first
    groups = {i: [i] for i in range(len(tokens)) if i not in joined}
    for a in joined:
        groups[partner[a]].append(a)
    groups = [groups[i] for i in sorted(groups)]
    means, sums = [], [sum(costs[j] for j in group[1:]) for group in groups]
    for group, cost in zip(groups, sums):
        total = sum(sizes[j] for j in group)
        means.append(sum(sizes[j] * tokens[j] for j in group) / total + cost / total * tokens[group[0]])
    return Joined(groups, means, sums)


def evolve_by_similarity(
        block: Block, x: torch.Tensor, depth: int, num_prefix: int, stages: Sequence[int], keep_ratio: Sequence[float],
        weights: Sequence[torch.Tensor], width: int,
) -> Result:
    """As `evolve`, with slow tokens that like patches share. `kept` has the number of each patch's group.

    `weights` are those of the channels for each block, `width` is that of the grid.
    `block(i, tokens, members, spread)` gets the patches that each token behind the prefix stands for as well, and the
    sum of costs at which they were joined.
    """
    n = len(x) - num_prefix
    prefix, tokens, members, spread = x[:num_prefix], list(x[num_prefix:]), [[j] for j in range(n)], [0.] * n
    levels: List[Tuple[List[torch.Tensor], List[List[int]], List[torch.Tensor]]] = []
    groups_by_block: Dict[int, List[int]] = {}
    after = []
    ratio = 1.

    def undo(tokens: List[torch.Tensor]) -> List[torch.Tensor]:
        for before, groups, means in reversed(levels):
            whole = list(before)
            for group, mean, token in zip(groups, means, tokens):
                for position in group:
                    whole[position] = before[position] + token - mean
            tokens = whole
        return tokens

    for i in range(depth):
        if i in stages and keep_ratio[list(stages).index(i)] != ratio:
            last, ratio = ratio, keep_ratio[list(stages).index(i)]
            if ratio > last:
                tokens, members, spread, levels = undo(tokens), [[j] for j in range(n)], [0.] * n, []
            count = max(1, math.floor(n * Fraction(str(ratio))))
            while len(tokens) > count:
                groups, means, costs = match(
                    tokens, max(count, len(tokens) // 2), [len(own) for own in members], weights[i],
                    1 if levels else width)
                members = [sum((members[position] for position in group), []) for group in groups]
                spread = [sum(spread[position] for position in group) + cost for group, cost in zip(groups, costs)]
                levels.append((tokens, groups, means))
                tokens = means
            if ratio < 1:
                groups_by_block[i] = [next(g for g, own in enumerate(members) if j in own) for j in range(n)]
        sequence = block(i, torch.cat([prefix, torch.stack(tokens)]), members, spread)
        prefix, tokens = sequence[:num_prefix], list(sequence[num_prefix:])
        after.append(torch.cat([prefix, torch.stack(undo(tokens))]))
    return Result(after[-1], groups_by_block, after)


def logits(w: Weights, tokens: torch.Tensor, num_prefix: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Logits of the averaged patches and of the class token."""
    def head(suffix: str, norm: str, y: torch.Tensor) -> torch.Tensor:
        y = F.layer_norm(y, y.shape, w[f'{norm}.weight'], w[f'{norm}.bias'], 1e-6)
        return w[f'head{suffix}.weight'] @ y + w[f'head{suffix}.bias']

    return head('', 'fc_norm', tokens[num_prefix:].mean(dim=0)), head('_cls', 'norm_cls', tokens[0])


def image_logits(model: torch.nn.Module, image: torch.Tensor, heads: int) -> Tuple[torch.Tensor, torch.Tensor, Result]:
    """Logits of both heads for one image (in_chans, H, W), and how it got there, for a square-patched plain model."""
    w = dict(model.named_parameters())
    weight, bias = w['patch_embed.proj.weight'], w['patch_embed.proj.bias']
    p = weight.shape[-1]
    _, height, width = image.shape
    tokens = [w['cls_token'][0, 0]] + ([*w['reg_token'][0]] if 'reg_token' in w else [])
    num_prefix = len(tokens)
    for top in range(0, height, p):
        for left in range(0, width, p):
            patch = image[:, top:top + p, left:left + p]
            tokens.append((weight * patch).sum(dim=(1, 2, 3)) + bias)
    x = torch.stack(tokens) + w['pos_embed'][0]
    result = evolve(
        lambda i, y: block(w, i, y, heads), x, len(model.blocks), num_prefix, model.stage_starts, model.keep_ratio,
        model.tradeoff, model.selection == 'layer', model.representative_token)
    return (*logits(w, result.tokens, num_prefix), result)


class ReferenceLevit:
    """Evo-LeViT written out: images one by one, joined only where batch norm takes statistics over all of them."""

    def __init__(self, model):
        self.w = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.training = model.training
        self.representative = model.representative_token
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
                found, gs, kept = run_stage(
                    lambda b, xs: self.block(f'stages.{stage}.blocks.{b}', xs, heads), blocks, xs, gs, ratio,
                    lambda b: self.tradeoff(), 1, self.representative)
                xs = found[-1]
                self.kept += [kept] if ratio < 1 else []
            after.append(torch.stack(xs))
        mean, cls = torch.stack([x[1:].mean(dim=0) for x in xs]), torch.stack([x[0] for x in xs])
        logits = []
        for name, y in (('head', mean), ('head_dist', mean), ('head_cls', cls), ('head_cls_dist', cls)):
            y, = self.norm(f'{name}.bn', [y])
            logits.append(y @ self.w[f'{name}.linear.weight'].T + self.w[f'{name}.linear.bias'])
        return after, logits
