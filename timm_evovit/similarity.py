"""Grouping by similarity: the method of `evolve`, on the unchanged blocks of a Vision Transformer.

Like patches share one slow token, their mean. The blocks run on the slow tokens, and every patch receives what they
have added to its slow token. Pairs are found and weighted as in ToMe (https://arxiv.org/abs/2210.09461), but once per
stage and on the tokens themselves; stages are nested, and the patch grid is restored after the last block.

A stage starts with rounds of matching (`match_tokens`), each of which joins up to half of the tokens
(`group_tokens`). `TokenGroups` has the stages that go on. `run_blocks` is the loop over the blocks.

Sequences are prefix tokens (class token first), then patch tokens in raster order. Shapes use B images, N tokens of
which P (`num_prefix_tokens`) are prefix tokens, n = N - P patches, C channels.
"""
import math
from functools import partial
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from timm.models import checkpoint
from torch import nn
from torch.nn import functional as F

from .tokens import Selection, at_least_float32, flat_idx, larger, num_kept, restore_tokens, take_tokens


def default_stages(depth: int) -> List[int]:
    """First block of each stage: four, evenly from a twelfth to three quarters of the depth, 1, 3, 6, 9 of 12 blocks.

    There are fewer where they would be shorter than two blocks.
    """
    starts = [max(1 + 2 * i, depth * (3 + 8 * i) // 36) for i in range(4)]
    return [start for start in starts if start <= depth * 4 // 5]


def falling_ratios(keep_ratio: float, starts: Sequence[int]) -> Tuple[float, ...]:
    """Keep ratios to three decimals, with `keep_ratio` as geometric mean: each block multiplies by the same factor."""
    depths = [start + 1 for start in starts]
    exponents = [len(depths) * depth / sum(depths) for depth in depths]
    return tuple(max(round(float(keep_ratio) ** exponent, 3), 0.001) for exponent in exponents)


@torch.fx.wrap
def match_tokens(
        tokens: torch.Tensor, num_joined: torch.Tensor, valid: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """One round of bipartite matching (ToMe section 3).

    Every second token looks for the most similar one of the others, by cosine similarity in float32 at least. The most
    similar pairs are joined. Of equal pairs the earlier one comes first.

    Args:
        tokens: (B, n, C).
        num_joined: Number of pairs to join, (B, 1) or (1, 1), at most half of the tokens, rounded up.
        valid: Tokens that are no padding, (B, n), None for all. Padding is never joined.

    Returns which tokens are joined to another, (B, n), and the position of that other one, (B, n).
    """
    B, n, _ = tokens.shape
    tokens = tokens.to(at_least_float32(tokens))
    length = torch.linalg.vector_norm(tokens, dim=-1).clamp_min(1e-6)
    even, odd = tokens[:, ::2], tokens[:, 1::2].transpose(1, 2)
    if torch.jit.is_scripting():  # its autocast takes a constant device only
        scores = even.bmm(odd)
    else:
        with torch.autocast('cpu' if tokens.is_meta else tokens.device.type, enabled=False):  # meta has none
            scores = even.bmm(odd)  # torch.export would guard the sizes of even @ odd
    scores = scores / length[:, 1::2].unsqueeze(1)
    if valid is not None:
        scores = scores.masked_fill(~valid[:, 1::2].unsqueeze(1), -math.inf)
    best, partner = F.pad(scores, [0, 1], value=-math.inf).max(dim=2)  # over one extra column: max fails on none
    best = best / length[:, ::2]
    if valid is not None:
        best = best.masked_fill(~valid[:, ::2], -math.inf)
    # join scores above the cutoff, and break ties by position: ONNX has no stable sort
    last = (num_joined - 1).clamp_min(0).expand(B, 1)
    cutoff = best.sort(dim=1, descending=True).values.gather(1, last)
    above, equal = best > cutoff, (best == cutoff) & (best > -math.inf)
    joins = above | (equal & (equal.long().cumsum(dim=1) <= num_joined - above.sum(dim=1, keepdim=True)))
    position = torch.arange(n, device=tokens.device)
    pair = position // 2  # of an even token and the odd one that follows
    joined = joins.index_select(1, pair) & (position % 2 == 0)
    return joined, (2 * partner.index_select(1, pair) + 1).clamp_max(n - 1)


class Grouping(NamedTuple):
    """A sequence divided by one round of matching."""
    x: torch.Tensor  # (B, N, C) the tokens before
    slow: torch.Tensor  # (B, M, C) the prefix and slow tokens made of them, means over patches
    slow_idx: torch.Tensor  # (B, N) slow token of each token
    member_idx: torch.Tensor  # (B, M) for each slow token the token that others are joined to


@torch.fx.wrap
def group_tokens(
        x: torch.Tensor, weights: Optional[torch.Tensor], num_prefix_tokens: int, num_patches: int,
        keep_ratio: Tuple[int, int], num_valid: Optional[torch.Tensor] = None,
) -> Tuple[Grouping, torch.Tensor]:
    """Join the most similar tokens of a sequence, in one round of matching.

    Args:
        x: Tokens (B, N, C).
        weights: First the number of patches that each token stands for, 0 for padding, then any others that are summed
            over groups, (B, 1 or more, N). None for one patch each.
        num_patches: Number of patches of the complete sequence.
        keep_ratio: Ratio of groups to patches that all rounds lead to, numerator and denominator.
        num_valid: With padding, the number of patches of each image, (B, 1). Each is grouped as it would be without,
            and padding gets a group of its own, the last one.

    Returns the grouping, and the weights of its slow tokens.
    """
    B, N, C = x.shape
    P, n = num_prefix_tokens, N - num_prefix_tokens
    if weights is None:
        weights = torch.ones_like(x[:, :, 0], dtype=at_least_float32(x)).unsqueeze(1)
    position = torch.arange(N, device=x.device)
    valid: Optional[torch.Tensor] = None
    if num_valid is None:
        num_groups = larger(num_kept(num_patches, keep_ratio), n // 2)
        num_joined = (position.new_zeros([1, 1]) + n - num_groups).clamp_min(0)
    else:
        num_groups = 1 + larger(num_kept(num_patches, keep_ratio), (n + 1) // 2)
        valid = weights[:, 0, P:] > 0
        count = valid.sum(dim=1, keepdim=True)
        target = (num_valid * keep_ratio[0] // keep_ratio[1]).clamp_min(1)
        num_joined = (count - target.maximum(count // 2)).clamp_min(0)
    joined, partner = match_tokens(x.detach()[:, P:], num_joined, valid)

    kept = ~joined if valid is None else valid & ~joined
    number = kept.long().cumsum(dim=1) - 1
    group_idx = torch.where(joined, number.gather(1, partner), number).clamp_max(num_groups - 1)
    if valid is not None:
        group_idx = torch.where(valid, group_idx, num_groups - 1)
    num_slow = P + num_groups
    prefix = position[:P].expand(B, P)
    slow_idx = torch.cat([prefix, group_idx + P], dim=1)
    place = torch.cat([prefix, torch.where(kept, group_idx + P, num_slow)], dim=1)  # the last is dropped again
    member_idx = position.new_zeros(B, num_slow + 1).scatter(1, place, position.expand(B, N))[:, :num_slow]

    slow_weights = weights.new_zeros(B, weights.shape[1], num_slow).scatter_add(
        2, slow_idx.unsqueeze(1).expand_as(weights), weights)
    share = weights[:, 0] / slow_weights[:, 0].gather(1, slow_idx).clamp_min(1)  # of a token in its mean
    rows = (x * share.unsqueeze(2)).flatten(0, 1)  # half precision would lose a part in a large group
    # not index_add, of which the ONNX exporter without torch.export loses repeated indices
    row_idx = flat_idx(slow_idx, num_slow).unsqueeze(1).expand_as(rows)
    slow = rows.new_zeros(B * num_slow, C).scatter_add(0, row_idx, rows)
    return Grouping(x, slow.to(x.dtype).view(B, num_slow, C), slow_idx, member_idx), slow_weights


@torch.fx.wrap
def take_rope(rope: torch.Tensor, patch_idx: torch.Tensor) -> torch.Tensor:
    """Rotary embeddings (B, heads or 1, M, d), by index (B, M), of (B or 1, heads or 1, n, d) or fewer dimensions."""
    while rope.ndim < 4:
        rope = rope.unsqueeze(0)
    rows = rope.transpose(1, 2).flatten(2).expand(patch_idx.shape[0], -1, -1)
    return take_tokens(rows, patch_idx).unflatten(2, (rope.shape[1], rope.shape[3])).transpose(1, 2)


class TokenGroups:
    """The groups of one forward pass: stages that go on, each grouping the slow tokens of the one before.

    Args:
        x: Complete sequence (B, N, C).
        key_mask: Mask of the keys of attention, (B or 1, heads or 1, 1, N), as scaled_dot_product_attention takes it:
            True for keys to attend to, or what is added to the scores. Patches that no head attends to are padding.
    """

    def __init__(self, x: torch.Tensor, num_prefix_tokens: int, key_mask: Optional[torch.Tensor] = None) -> None:
        self.num_prefix_tokens = num_prefix_tokens
        self.num_patches = x.shape[1] - num_prefix_tokens
        self.groupings: List[Grouping] = []
        self.slow_idx: Optional[torch.Tensor] = None  # (B, N) slow token of each token of the complete sequence
        self.member_idx: Optional[torch.Tensor] = None  # (B, M) token of the complete sequence of each slow token
        self.weights: Optional[torch.Tensor] = None  # (B, 1, M) patches of each token; with a mask, weights as keys too
        self.num_valid: Optional[torch.Tensor] = None  # (B, 1) patches of each image, without padding
        if key_mask is not None:
            keys = key_mask.to(at_least_float32(x))
            keys = keys if key_mask.dtype == torch.bool else (keys - keys.amax(3, keepdim=True)).exp()
            keys = keys.squeeze(2).expand(x.shape[0], -1, -1)
            valid = (keys > 0).any(dim=1, keepdim=True)
            self.weights = torch.cat([valid.to(keys.dtype), keys], dim=1)
            self.num_valid = valid[:, 0, num_prefix_tokens:].sum(dim=1, keepdim=True)

    def join(self, x: torch.Tensor, keep_ratio: Tuple[int, int]) -> torch.Tensor:
        """Slow tokens of x (B, M, C), after one round of matching towards this ratio of them to patches."""
        grouping, self.weights = group_tokens(
            x, self.weights, self.num_prefix_tokens, self.num_patches, keep_ratio, self.num_valid)
        slow_idx, member_idx = grouping.slow_idx, grouping.member_idx
        if self.slow_idx is not None and self.member_idx is not None:
            slow_idx, member_idx = slow_idx.gather(1, self.slow_idx), self.member_idx.gather(1, member_idx)
        self.slow_idx, self.member_idx = slow_idx, member_idx
        self.groupings.append(grouping)
        return grouping.slow

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """Slow tokens (B, M, C), after any number of blocks, to the complete sequence (B, N, C) in raster order."""
        for grouping in reversed(self.groupings):
            x = restore_tokens(grouping.x, x - grouping.slow, grouping.slow_idx)
        return x

    def attn_mask(self, x: torch.Tensor) -> torch.Tensor:
        """Logarithm of the weight of each key, (B, heads or 1, 1, M), in the type of the tokens x (B, M, C).

        It is the number of patches that share the slow token (ToMe section 3, 'proportional attention').
        """
        weights: Any = self.weights
        if self.num_valid is not None:
            weights = weights[:, 1:]
        M = weights.shape[2]
        # rows padded to a multiple of 8: otherwise fused attention on a GPU copies the mask in every block
        return F.pad(weights.log().to(x.dtype), [0, 8 - M % 8])[:, :, None, :M]

    def take_rope(self, rope: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of the patches as timm's blocks take it to that of the slow tokens.

        A group has that of the patch that others have joined. The mean was no more accurate at ratios of 0.4 or more.
        """
        if self.member_idx is None:
            return rope
        P = self.num_prefix_tokens
        return take_rope(rope, (self.member_idx[:, P:] - P).clamp_min(0))  # groups of padding have no member


def run_blocks(
        blocks: Iterable[nn.Module], x: torch.Tensor, stages: Dict[int, Tuple[int, int]], num_prefix_tokens: int,
        rope: Any = None, rope_per_block: bool = False, attn_mask: Optional[torch.Tensor] = None,
        is_causal: bool = False, key_mask: Optional[torch.Tensor] = None, grad_checkpointing: bool = False,
        take_indices: Sequence[int] = (), selections: Optional[List[Selection]] = None,
) -> Tuple[torch.Tensor, List[torch.Tensor]]:
    """Run the blocks of a Vision Transformer on groups of like tokens.

    Args:
        blocks: Called as `block(x, attn_mask=..., rope=...)` with what there is, as timm's blocks are.
        x: Tokens (B, N, C).
        stages: First block of each stage, ascending, and its ratio of slow tokens to patches. A lower ratio than that
            of the stage before groups its slow tokens, a higher one starts from the complete sequence.
        rope: Rotary embedding of the patches as timm's blocks take it, or with `rope_per_block` one for each block.
        attn_mask, is_causal: Mask of the blocks before the first stage. With stages it must be one of keys.
        key_mask: The mask of keys that `attn_mask` stands for, if that is none.
        grad_checkpointing: Recompute each block in the backward pass.
        take_indices, selections: Blocks whose output is wanted, complete; receives the groups of each stage.

    Returns tokens (B, N, C) after the last block, in raster order, and those after each block of `take_indices`.

    Raises:
        ValueError: The mask cannot follow the patches into their groups.
    """
    dense_args: Dict[str, Any] = {} if attn_mask is None else {'attn_mask': attn_mask}
    dense_args.update({'is_causal': True} if is_causal else {})
    if all(ratio == (1, 1) for ratio in stages.values()):
        key_mask = None
    elif dense_args and key_mask is None:
        if is_causal:
            raise ValueError('is_causal must be False where tokens are grouped, got True: groups have no order.')
        shape: Any = tuple(dense_args['attn_mask'].shape)
        if len(shape) != 4 or shape[2] != 1:
            raise ValueError(
                f'attn_mask must be a mask of keys, (B or 1, heads or 1, 1, N), where tokens are grouped, got {shape}.')
        key_mask = attn_mask
    args, intermediates = dense_args, []
    ratio, groups = (1, 1), TokenGroups(x, num_prefix_tokens, key_mask)
    for i, block in enumerate(blocks):
        starts = i in stages and stages[i] != ratio
        if starts:
            if stages[i][0] * ratio[1] > ratio[0] * stages[i][1]:
                x, ratio, groups = groups.restore(x), (1, 1), TokenGroups(x, num_prefix_tokens, key_mask)
            while stages[i][0] * ratio[1] < ratio[0] * stages[i][1]:  # each round can join half of the tokens
                x, ratio = groups.join(x, stages[i]), (ratio[0], 2 * ratio[1])
            ratio, args = stages[i], dense_args
            if groups.slow_idx is not None:
                args = {**dense_args, 'attn_mask': groups.attn_mask(x)}
                if selections is not None:
                    P = num_prefix_tokens
                    selections.append(Selection(i, groups.slow_idx[:, P:] - P, x.shape[1] - P, None))
        if rope is not None and (starts or i == 0 or rope_per_block):
            args = {**args, 'rope': groups.take_rope(rope[i] if rope_per_block else rope)}
        block_args = {} if isinstance(block, nn.Identity) else args  # timm's way to take a block out
        x = checkpoint(partial(block, **block_args), x) if grad_checkpointing else block(x, **block_args)
        if i in take_indices:
            intermediates.append(groups.restore(x))
    return groups.restore(x), intermediates
