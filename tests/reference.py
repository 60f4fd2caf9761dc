"""Evo-DeiT written out plainly: one image at a time, one token at a time where that is clearer, no batching.

Weights are read from the model's state dict; everything else is done here, after the paper and the authors' choices.
"""
import math
from typing import Callable, Dict, List, NamedTuple, Sequence, Tuple

import torch
from torch.nn import functional as F

Weights = Dict[str, torch.Tensor]


class Result(NamedTuple):
    tokens: torch.Tensor  # (N, C), class token and registers first
    kept: Dict[int, List[int]]  # block -> raster indices of the informative patches, ascending
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


def evolve(
        block: Callable[[int, torch.Tensor], Tuple[torch.Tensor, torch.Tensor]],
        x: torch.Tensor,
        depth: int,
        num_prefix: int,
        stages: Sequence[int],
        keep_ratio: Sequence[float],
        tradeoff: Sequence[float],
        layer_wise: bool,
        representative: bool,
) -> Result:
    """Tokens (N, C) of one image through all blocks, with every attention row tracked whether or not it is read.

    `block(i, tokens)` runs block i and returns class attention over all tokens as well.
    """
    N = len(x)
    n = N - num_prefix
    g = None
    kept_by_block: Dict[int, List[int]] = {}
    after = []
    ratio = 1.
    kept = list(range(n))
    waiting = {}  # raster index of a placeholder -> its token
    token = None  # the representative token, as it is now
    order = list(range(n))

    def complete(sequence: torch.Tensor, token, token_before) -> torch.Tensor:
        out = torch.empty(N, x.shape[1], dtype=x.dtype)
        out[:num_prefix] = sequence[:num_prefix]
        for position, j in enumerate(kept):
            out[num_prefix + j] = sequence[num_prefix + position]
        for j, value in waiting.items():
            out[num_prefix + j] = value if token is None else value + (token - token_before)
        return out

    token_before = None
    for i in range(depth):
        starts = i in stages
        if starts:
            ratio = keep_ratio[list(stages).index(i)]
        if starts or (layer_wise and ratio < 1):
            x = complete(x, token, token_before)
            waiting, token, token_before, kept = {}, None, None, order
            if ratio < 1:
                count = max(1, int(n * ratio))
                kept = sorted(sorted(order, key=lambda j: -g[j].item())[:count])
                kept_by_block[i] = kept
                waiting = {j: x[num_prefix + j] for j in order if j not in kept}
                if representative and waiting:
                    total = sum(g[j] for j in waiting)
                    token = token_before = sum(g[j] / total * value for j, value in waiting.items())
                x = torch.stack(list(x[:num_prefix]) + [x[num_prefix + j] for j in kept])
        sequence = x if token is None else torch.cat([x, token[None]])
        sequence, row = block(i, sequence)
        if token is not None:
            token = sequence[-1]
            sequence = sequence[:-1]
        x = sequence
        row = row[num_prefix:num_prefix + len(kept)]
        if g is None:
            g = row.clone()
        else:
            g = g.clone()
            for position, j in enumerate(kept):
                g[j] = (1 - tradeoff[i]) * g[j] + tradeoff[i] * row[position]
        after.append(complete(x, token, token_before))
    return Result(after[-1], kept_by_block, after)


def logits(w: Weights, tokens: torch.Tensor, num_prefix: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Logits of the averaged patches and of the class token."""
    def head(suffix: str, norm: str, y: torch.Tensor) -> torch.Tensor:
        y = F.layer_norm(y, y.shape, w[f'{norm}.weight'], w[f'{norm}.bias'], 1e-6)
        return w[f'head{suffix}.weight'] @ y + w[f'head{suffix}.bias']

    return head('', 'fc_norm', tokens[num_prefix:].mean(dim=0)), head('_cls', 'norm_cls', tokens[0])


def image_logits(model: torch.nn.Module, image: torch.Tensor, heads: int) -> Tuple[torch.Tensor, torch.Tensor, Result]:
    """Logits of both heads for one image (in_chans, H, W), and how it got there, for a square-patched plain model."""
    w = model.state_dict()
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
        model.blocks.tradeoff, model.selection == 'layer', model.blocks.representative_token)
    return (*logits(w, result.tokens, num_prefix), result)
