"""Grouping by similarity: the method of `evolve`, on the unchanged blocks of a Vision Transformer.

Similar patches share one slow token, their mean. The blocks run on the slow tokens, and every patch receives what they
have added to its slow token. Pairs are found by bipartite matching and weighted in attention as in ToMe
(https://arxiv.org/abs/2210.09461). Unlike there, matching is on the tokens themselves, pairs are chosen by Ward's
criterion, groups of patches that differ weigh less, blocks are not changed, and the grid is restored after the last.

A stage starts with rounds of matching (`match_tokens`), each of which joins up to half of the tokens
(`group_tokens`). `TokenGroups` has the stages that go on. `run_blocks` is the loop over the blocks.

Sequences are prefix tokens (class token first), then patch tokens in raster order. Shapes use B images, N tokens of
which P (`num_prefix_tokens`) are prefix tokens, n = N - P patches, C channels.
"""
import math
from functools import partial, reduce
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from timm.models import checkpoint
from torch import nn
from torch.nn import functional as F

from .slow_tokens import SlowTokens
from .tokens import align_rows, at_least_float32, larger, num_kept, offsets, product, take_and_add, take_rope, take_rows

for _name in 'align_rows', 'at_least_float32', 'take_and_add', 'take_rope':
    torch.fx.wrap(_name)  # FX looks for them where they are called


def falling_ratios(keep_ratio: float, starts: Sequence[int]) -> Tuple[float, ...]:
    """Keep ratios to three decimals, with `keep_ratio` as geometric mean, and logarithms proportional to depth ** 1.2.

    A lower power below a keep ratio of 0.5 was better without training and worse after it.
    """
    depths = [(start + 1) ** 1.2 for start in starts]
    return tuple(max(round(float(keep_ratio) ** (len(depths) * depth / sum(depths)), 3), 0.001) for depth in depths)


def channel_weight(block: nn.Module) -> Any:
    """Weight (C,) of the norm that is the first layer of a block, None if another layer is."""
    found = ((n, m) for n, m in block.named_modules() if isinstance(m, nn.Linear) or hasattr(m, 'weight'))
    name, first = next(found, ('', block))
    weight: Any = None if isinstance(first, nn.Linear) else getattr(first, 'weight', None)
    weight = dict(first.named_parameters(recurse=False)).get('weight', weight)  # getattr gives a proxy under FX
    if not isinstance(weight, torch.Tensor) or weight.ndim != 1:
        return None
    for owner, key in (first, 'weight'), (block, f'{name}.weight'):  # accelerate may have offloaded it
        weight = (getattr(getattr(owner, '_hf_hook', None), 'weights_map', None) or {}).get(key, weight)
    freed = not getattr(first, '_fsdp_use_orig_params', True)  # by FSDP1: to read it would end the process
    if freed or weight.shape != getattr(first, 'normalized_shape', weight.shape):
        raise RuntimeError(f'{name}.weight must be whole, as FSDP2 keeps it, got a part of that of {first}.')
    return weight.full_tensor() if hasattr(weight, 'full_tensor') else weight  # of all shards


def checkerboard(position: torch.Tensor, width: int) -> torch.Tensor:
    """Positions (n,) of a grid, ordered so that black and white fields alternate: the two sides of the matching."""
    whole = position // 2 * 2 + 1 < position.shape[0]
    moves = position // width % 2 * (1 - width % 2) * whole  # neighbours change places in every second row
    return position + moves * (1 - position % 2 * 2)


@torch.fx.wrap
def match_tokens(
        tokens: torch.Tensor, others: torch.Tensor, sizes: torch.Tensor, other_sizes: torch.Tensor, padded: bool,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Bipartite matching (ToMe section 3): each token finds its partner of lowest cost among the others.

    The cost of joining two tokens is Ward's (https://doi.org/10.1080/01621459.1963.10500845) for vectors of length
    one: their cosine distance times `size * other_size / (size + other_size)`, so large groups are joined last.

    Args:
        tokens, others: (B, n, C) and (B, m, C), in float32 at least.
        sizes, other_sizes: Patches that each stands for, (B, n) and (B, m). Where `padded`, 0 has an infinite cost.

    Returns for each token the cost, (B, n), and the position of its partner.
    """
    norm, other_norm = [torch.linalg.vector_norm(x, dim=2) for x in [tokens, others]]
    cost = 1 - product(tokens, others.transpose(1, 2)) / (norm.unsqueeze(2) * other_norm.unsqueeze(1)).clamp_min(1e-12)
    cost = cost / (sizes.reciprocal().unsqueeze(2) + other_sizes.reciprocal().unsqueeze(1))
    if padded:  # tokens that are no numbers are joined as others are
        cost = cost.nan_to_num().masked_fill((sizes == 0).unsqueeze(2) | (other_sizes == 0).unsqueeze(1), math.inf)
    if not isinstance(others.shape[1], int) or others.shape[1] == 0:
        cost = F.pad(cost, [0, 1], value=math.inf)  # min fails on no column, and torch.export would guard against none
    return cost.min(dim=2)


class Grouping(NamedTuple):
    """How one round of matching divides a sequence: up to R tokens are joined to others.

    It is undone by `take_and_add(slow tokens, slow_rows, changed_rows, restoration)`, also after blocks have run.
    """
    slow_idx: torch.Tensor  # (B, N) slow token of each token
    member_idx: torch.Tensor  # (B, M) for each slow token the token that others are joined to
    slow_rows: torch.Tensor  # (B, N) slow_idx as rows of slow tokens.flatten(0, 1)
    changed_rows: torch.Tensor  # (B, 2 * R) tokens that are joined, and those that they are joined to, as rows
    restoration: torch.Tensor  # (B, 2 * R, C) what a slow token lacks to these, 0 where fewer are joined


@torch.fx.wrap
def group_tokens(
        x: torch.Tensor, sizes: torch.Tensor, spread: torch.Tensor, num_prefix_tokens: int, num_patches: int,
        keep_ratio: Tuple[int, int], num_valid: Optional[torch.Tensor] = None,
        channel_weight: Optional[torch.Tensor] = None, width: Optional[int] = None,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, Grouping]:
    """Join the pairs of lowest cost, in one round of matching. Of equal pairs the earlier one comes first.

    Args:
        x: Tokens (B, N, C).
        sizes, spread: Patches that each token stands for, 0 for padding, and the sum of costs of joining them, (B, N).
        num_patches: Number of patches of the complete sequence.
        keep_ratio: That of groups to patches after this round, numerator and denominator, at least half of that before.
        num_valid: With padding, the number of patches of each image, (B, 1). Each is grouped as it would be without,
            and padding gets a group of its own, the last one.
        channel_weight: Tokens are compared by their channels times this, (C,).
        width: That of the grid, if each token is one patch. Otherwise, or if it is not known, the two sides of the
            matching are every second token.

    Returns the prefix and slow tokens (B, M, C), means over patches, their sizes and spread (B, M), and the grouping.
    """
    B, N, C = x.shape
    P, n = num_prefix_tokens, N - num_prefix_tokens
    padded = num_valid is not None
    position = torch.arange(N, device=x.device)
    place = position[P:] if width is None else P + checkerboard(position[:n], width)
    even, odd = place[::2], place[1::2]  # the two sides of the matching
    first = offsets(x)
    placed = (x.detach()[:, P:] if width is None else take_rows(x.detach(), place + first)).to(sizes.dtype)
    if channel_weight is not None and channel_weight.shape[0] == C:  # not the weight of a norm inside attention
        placed = placed * channel_weight.detach().to(placed)
    cost, partner = match_tokens(
        placed[:, ::2], placed[:, 1::2], sizes.index_select(1, even), sizes.index_select(1, odd), padded)
    if not torch.jit.is_scripting() and (torch.jit.is_tracing() or torch.compiler.is_compiling()):
        cost, order = cost.sort(dim=1)  # exporters to ONNX know no stable sort, and that of ONNX is stable
    else:
        cost, order = cost.sort(dim=1, stable=True)

    rows = position[:(n + 1) // 2]
    joins: Optional[torch.Tensor] = None  # None if each row of these joins
    if num_valid is None:
        M = P + num_kept(num_patches, keep_ratio)
        rows = rows[:larger(2, N - M)]  # none may be joined, and torch.export would guard sizes of 0 and 1
        if not isinstance(M, int) or N - M < 2:
            joins = (rows < N - M).unsqueeze(0)
    else:
        M = P + 2 + num_kept(num_patches, keep_ratio)  # that of padding, and patches that are all on one side
        num_joined = (sizes[:, P:] > 0).sum(dim=1, keepdim=True) - (
            num_valid * keep_ratio[0] // keep_ratio[1]).clamp_min(1)
        joins = (rows < num_joined) & (cost < math.inf)
    if isinstance(n, int) and n == 1:
        odd = even  # a single token has no partner, and is joined to none
    # copies: torch.export would guard the sizes of slices
    order, cost = order.index_select(1, rows), cost.index_select(1, rows)
    token_idx, other_idx = even[order], odd[partner.gather(1, order)]
    without = position.new_zeros(B, N).scatter(1, token_idx, 1)
    if joins is not None:  # other tokens are joined to themselves
        other_idx, cost = torch.where(joins, other_idx, token_idx), cost.masked_fill(~joins, 0)
        without = without.scatter(1, other_idx, 0)
    # slow tokens have the order of the tokens that are neither joined nor padding
    if padded:
        without = without + (sizes == 0)
    slow_idx = position - without.cumsum(dim=1)
    if padded:
        slow_idx = slow_idx.masked_fill(sizes == 0, M - 1)
    target_idx = slow_idx.gather(1, other_idx)
    slow_idx = slow_idx.scatter(1, token_idx, target_idx)
    member_idx = slow_idx.new_zeros(B, M).scatter(1, slow_idx, position.expand(B, N)).scatter(1, target_idx, other_idx)

    slow_sizes = sizes.new_zeros(B, M).scatter_add(1, slow_idx, sizes)
    spread = sizes.new_zeros(B, M).scatter_add(1, slow_idx, spread.scatter_add(1, token_idx, cost))
    total = slow_sizes.gather(1, target_idx)
    if padded:
        total = total.clamp_min(1)
    share = (sizes.gather(1, token_idx) / total).unsqueeze(2)  # of a token in its mean
    # a mean is shorter than its tokens. To first order in their distance, this is the part that is lost
    shorter = (cost / total).unsqueeze(2)
    changed_rows = torch.cat([token_idx, other_idx], dim=1) + first
    # half precision would lose a part in a large group
    token, other = take_rows(x, changed_rows).to(sizes.dtype).tensor_split(2, dim=1)
    change = torch.addcmul(share * (token - other), shorter, other)
    slow_first = offsets(member_idx)
    target_rows = target_idx + slow_first
    slow = take_and_add(x, member_idx + first, target_rows, change)
    restoration = torch.cat([token - take_rows(slow, target_rows), -change], dim=1)
    return slow, slow_sizes, spread, Grouping(slow_idx, member_idx, slow_idx + slow_first, changed_rows, restoration)


class TokenGroups:
    """The groups of one forward pass: stages that go on, each grouping the slow tokens of the one before.

    Args:
        x: Complete sequence (B, N, C).
        key_mask: Mask of the keys of attention, (B or 1, heads or 1, 1, N), as scaled_dot_product_attention takes it:
            True for keys to attend to, or what is added to the scores. Patches that no head attends to are padding.
        grid_size: Height and width of the patch grid, None if it is not known.
    """

    def __init__(
            self, x: torch.Tensor, num_prefix_tokens: int, key_mask: Optional[torch.Tensor] = None,
            grid_size: Optional[Tuple[int, int]] = None) -> None:
        self.num_prefix_tokens, self.num_patches = num_prefix_tokens, x.shape[1] - num_prefix_tokens
        self.width = None if grid_size is None else grid_size[1]
        self.groupings: List[Grouping] = []
        self.member_idx: Optional[torch.Tensor] = None  # (B, M) token of the complete sequence of each slow token
        self.sizes = torch.ones_like(x[:, :, 0], dtype=at_least_float32(x))  # (B, M) patches of each token
        self.spread = torch.zeros_like(self.sizes)  # (B, M) how much they differ
        self.keys: Any = None  # tensor (B, heads or 1, M), weight of each token as a key, None without a mask
        self.num_valid: Optional[torch.Tensor] = None  # (B, 1) patches of each image, without padding
        if key_mask is not None:
            keys = key_mask.to(self.sizes.dtype)
            keys = keys if key_mask.dtype == torch.bool else (keys - keys.amax(3, keepdim=True).nan_to_num()).exp()
            self.keys = keys.squeeze(2).expand(x.shape[0], -1, -1)
            prefix = torch.arange(x.shape[1], device=x.device) < num_prefix_tokens  # they are no padding
            self.sizes = ((self.keys > 0).any(dim=1) | prefix).to(keys.dtype)
            self.num_valid = self.sizes[:, num_prefix_tokens:].long().sum(dim=1, keepdim=True)

    def join(
            self, x: torch.Tensor, keep_ratio: Tuple[int, int], channel_weight: Optional[torch.Tensor]) -> torch.Tensor:
        """Slow tokens of x (B, M, C), after one round of matching towards this ratio of them to patches."""
        x, self.sizes, self.spread, new = group_tokens(
            x, self.sizes, self.spread, self.num_prefix_tokens, self.num_patches, keep_ratio, self.num_valid,
            channel_weight, None if self.groupings else self.width)
        if self.keys is not None:
            slow_idx = new.slow_idx.unsqueeze(1).expand_as(self.keys)
            self.keys = self.keys.new_zeros(*self.keys.shape[:2], x.shape[1]).scatter_add(2, slow_idx, self.keys)
        self.member_idx = new.member_idx if self.member_idx is None else self.member_idx.gather(1, new.member_idx)
        self.groupings.append(new)
        return x

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """Slow tokens (B, M, C), after any number of blocks, to the complete sequence (B, N, C) in raster order."""
        for _, _, slow_rows, changed_rows, restoration in reversed(self.groupings):
            x = take_and_add(x, slow_rows, changed_rows, restoration)
        return x

    def attn_mask(self, x: torch.Tensor) -> torch.Tensor:
        """Logarithm of the weight of each key, (B, heads or 1, 1, M), in the type of the tokens x (B, M, C).

        It is the number of patches that share the slow token (ToMe section 3, 'proportional attention'), times the
        squared length that a mean of unit vectors has: norms make it 1 again, and so the key and the value too long.
        """
        shorter = 2 * self.spread / self.sizes  # to first order
        if self.keys is None:
            logarithm = (self.sizes.log() - shorter).unsqueeze(1)
        else:
            ignored = self.keys == 0  # their gradient would be no number
            logarithm = (self.keys.masked_fill(ignored, 1).log() - shorter.unsqueeze(1)).masked_fill(ignored, -math.inf)
        return align_rows(logarithm.to(x.dtype).unsqueeze(2))

    def slow_tokens(self, block: int) -> SlowTokens:
        """The groups of patches (B, n) that `block` is the first to run on."""
        P = self.num_prefix_tokens
        slow_idx = reduce(lambda idx, next_idx: next_idx.gather(1, idx), (g.slow_idx for g in self.groupings))
        return SlowTokens(block, (self.sizes.gather(1, slow_idx) == 1)[:, P:], slow_idx[:, P:] - P, None)

    def take_rope(self, rope: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of the patches as timm's blocks take it to that of the slow tokens.

        A group has that of the patch that others have joined. The mean was no more accurate at ratios of 0.4 or more.
        """
        if self.member_idx is None:
            return rope
        P = self.num_prefix_tokens
        return take_rope(rope, (self.member_idx[:, P:] - P).clamp_min(0))  # empty groups have no member


def run_blocks(
        blocks: List[nn.Module], tokens: List[torch.Tensor], stages: Dict[int, Tuple[int, int]],
        num_prefix_tokens: int, rope: Any = None, rope_per_block: bool = False,
        attn_mask: Optional[torch.Tensor] = None, is_causal: bool = False, key_mask: Optional[torch.Tensor] = None,
        grad_checkpointing: bool = False, take_indices: Sequence[int] = (),
        slow_tokens: Optional[List[SlowTokens]] = None, grid_size: Optional[Tuple[int, int]] = None,
) -> Tuple[torch.Tensor, List[torch.Tensor]]:
    """Run the blocks of a Vision Transformer on groups of similar tokens.

    Args:
        blocks: Called as `block(x, attn_mask=..., rope=...)` with what there is, as timm's blocks are.
        tokens: List of the tokens (B, N, C). It is emptied, so that nothing keeps them while the blocks run.
        stages: First block of each stage, ascending, and its ratio of slow tokens to patches. A lower ratio than that
            of the stage before groups its slow tokens, a higher one starts from the complete sequence.
        rope: Rotary embedding of the patches as timm's blocks take it, or with `rope_per_block` one for each block.
        attn_mask, is_causal: Mask of the blocks before the first stage. With stages, it or `key_mask` must be of keys.
        grad_checkpointing: Recompute each block in the backward pass.
        take_indices: Blocks whose output is returned, restored to the complete sequence.
        slow_tokens: List that receives the groups of each stage, (B, n).
        grid_size: Height and width of the patch grid, None if it is not known.

    Returns tokens (B, N, C) after the last block, in raster order, and those after each block of `take_indices`.

    Raises:
        ValueError: The mask cannot follow the patches into their groups.
    """
    dense_args: Dict[str, Any] = {} if attn_mask is None else {'attn_mask': attn_mask}
    dense_args.update({'is_causal': True} if is_causal else {})
    args, intermediates, x = dense_args, [], tokens.pop()
    if all(ratio == (1, 1) for ratio in stages.values()):
        key_mask = None
    elif dense_args and key_mask is None:
        if is_causal:
            raise ValueError('is_causal must be False where tokens are grouped, got True: groups have no order.')
        key_mask = dense_args['attn_mask']
        shape, dtype = tuple(key_mask.shape), key_mask.dtype
        if len(shape) != 4 or shape[2:] != (1, x.shape[1]) or not (dtype == torch.bool or dtype.is_floating_point):
            raise ValueError(f'attn_mask must be a mask of keys, bool or float, (B or 1, heads or 1, 1, N), where '
                             f'tokens are grouped, and N is {x.shape[1]} here, got {shape}, {dtype}.')
    ratio, groups = (1, 1), TokenGroups(x, num_prefix_tokens, key_mask, grid_size)
    channel_weights = {i: channel_weight(block) for i, block in enumerate(blocks) if stages.get(i, (1, 1)) != (1, 1)}
    for i, block in enumerate(blocks):
        starts = i in stages and stages[i] != ratio
        if starts:
            if stages[i][0] * ratio[1] > ratio[0] * stages[i][1]:
                x, ratio = groups.restore(x), (1, 1)
                groups = TokenGroups(x, num_prefix_tokens, key_mask, grid_size)
            while ratio != stages[i]:  # each round can join half of the tokens
                ratio = ratio[0], 2 * ratio[1]
                if stages[i][0] * ratio[1] > ratio[0] * stages[i][1]:
                    ratio = stages[i]
                x = groups.join(x, ratio, channel_weights[i])
            args = dense_args
            if groups.groupings:
                args = {**dense_args, 'attn_mask': groups.attn_mask(x)}
                if slow_tokens is not None:
                    slow_tokens.append(groups.slow_tokens(i))
        if rope is not None and (starts or i == 0 or rope_per_block):
            args = {**args, 'rope': groups.take_rope(rope[i] if rope_per_block else rope)}
        block_args = {} if isinstance(block, nn.Identity) else args  # timm's way to take a block out
        x = checkpoint(partial(block, **block_args), x) if grad_checkpointing else block(x, **block_args)
        if i in take_indices:
            intermediates.append(groups.restore(x))
    return groups.restore(x), intermediates
