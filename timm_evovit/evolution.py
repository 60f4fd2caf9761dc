"""Slow-fast token evolution: which slow token a patch belongs to, split and merge, and the blocks in between.

'Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer', https://arxiv.org/abs/2108.01390.

A stage divides the patches among slow tokens, runs its blocks on these, and adds to every patch what the blocks added
to its slow token. In the paper the patches of highest global class attention are slow tokens of their own and all
others share one, the representative token, or wait. By similarity, like patches share a slow token.

Everything here works on sequences of prefix tokens (class token first) followed by patch tokens in raster order and
knows no model. Shapes use B images, N tokens of which P are prefix tokens, n = N - P patches, C channels.
"""
import math
from fractions import Fraction
from functools import partial
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from timm.models import checkpoint
from torch import nn
from torch.nn import functional as F


class Schedule(NamedTuple):
    """Where a sequence of blocks selects tokens and where it tracks global class attention, one entry per block."""
    stage_keep_ratio: List[Optional[Tuple[int, int]]]  # numerator and denominator where a stage starts, else None
    matching_rounds: List[int]  # rounds of matching by similarity at the start of a stage, 0 to select by attention
    nested: List[bool]  # a stage that starts here groups the slow tokens of the one before, which goes on around it
    needs_class_attention: List[bool]  # a later selection reads the global class attention as it is after this block

    @classmethod
    def build(
            cls,
            tradeoff: Sequence[float],
            starts: Dict[int, float],
            selection: str = 'stage',
            slow_tokens: str = 'attention',
    ) -> 'Schedule':
        """Lay out the evolution stages over the blocks (paper section 'Slow-fast token evolution').

        Args:
            tradeoff: Weight of each block's class attention in the global class attention.
            starts: First block of each evolution stage, and its ratio of slow tokens to patches, 1 to update them all.
            selection: 'stage', or 'layer' for stages of one block.
            slow_tokens: Find slow tokens by class 'attention' or by 'similarity'.
        """
        stage_keep_ratio: List[Optional[Tuple[int, int]]] = []
        matching_rounds, nested = [], []
        seen: List[float] = []  # ratio of the patches that a block sees
        for i in range(len(tradeoff)):
            before = seen[-1] if seen else 1.
            seen.append(starts.get(i, before))
            selects = i in starts or (selection == 'layer' and seen[i] < 1)
            rounds, goes_on = 0, False
            if slow_tokens == 'similarity':
                selects, goes_on = i in starts and (before == 1 or seen[i] != before), seen[i] < before < 1
                rounds = num_matching_rounds(before if goes_on else 1., seen[i])
            stage_keep_ratio.append(as_fraction(seen[i]) if selects else None)
            matching_rounds.append(rounds)
            nested.append(goes_on)
        needs_class_attention = []
        read = False
        for i in reversed(range(len(tradeoff))):
            needs_class_attention.append(read)
            if seen[i] == 1 and tradeoff[i] == 1:
                read = False  # this block replaces every entry, what was there before is not read
            selects_by_attention = stage_keep_ratio[i] is not None and matching_rounds[i] == 0
            read = read or (selects_by_attention and seen[i] < 1)
        return cls(stage_keep_ratio, matching_rounds, nested, needs_class_attention[::-1])

    def part(self, start: int, stop: Optional[int] = None) -> 'Schedule':
        """The schedule of the blocks start .. stop - 1."""
        return Schedule._make(entries[start:stop] for entries in self)


class StageState(NamedTuple):
    """What a stage sets aside until its end."""
    x: torch.Tensor  # (B, N, C) the sequence as it was when the stage began
    slow: torch.Tensor  # (B, P + M, C) the prefix and slow tokens that were made of it
    slow_idx: torch.Tensor  # (B, N) where in `slow` each token of x belongs, P + M for patches that wait
    member_idx: torch.Tensor  # (B, P + M) for each slow token the token of x whose rotary embedding it takes
    waits: bool  # there are such patches


class Selection(NamedTuple):
    """One division of the patches among slow tokens."""
    block: int  # the first block that runs on the slow tokens
    group_idx: torch.Tensor  # (B, n) slow token of each patch, num_groups for the one that all others share
    num_groups: int
    global_attn: Optional[torch.Tensor]  # (B, n) global class attention that selected them, None by similarity


class AttentionContext:
    """What a block tells its attention layer beside the tokens, and where that layer leaves its class attention."""

    def __init__(self, bias: Optional[torch.Tensor], rope: Optional[torch.Tensor], needs_class_attn: bool) -> None:
        self.bias = bias  # added to the scaled dot products with each key, (B, 1, 1, N)
        self.rope = rope  # sine and cosine of the rotary embedding of each token, (B or 1, heads or 1, N, d)
        self.needs_class_attn = needs_class_attn  # class attention is wanted
        self.class_attn = torch.jit.annotate(Optional[torch.Tensor], None)  # (B, N)


class EvolutionState:
    """What goes through the blocks beside the tokens, during one forward pass.

    Modules get it as an argument and write to it. Each of them returns one tensor, as hooks and wrappers expect.
    """

    def __init__(
            self,
            grad_checkpointing: bool = False,
            tradeoff: Optional[torch.Tensor] = None,
            rope: Optional[torch.Tensor] = None,
            rope_per_block: bool = False,
    ) -> None:
        self.grad_checkpointing = grad_checkpointing  # recompute each block in the backward pass
        self.tradeoff = tradeoff  # weights of the attention layers still to come in place of their fixed ones
        self.rope = rope  # sine and cosine for each token, (1 or blocks, B or 1, heads or 1, N, d)
        self.rope_per_block = rope_per_block  # each block has a rotary embedding of its own
        self.global_attn = torch.jit.annotate(Optional[torch.Tensor], None)  # (B, n) None where nothing later reads it
        self.take_indices = torch.jit.annotate(List[int], [])  # blocks whose output is wanted, also inside a stage
        self.intermediates = torch.jit.annotate(List[torch.Tensor], [])  # (B, N, C) each, complete
        self.selections = torch.jit.annotate(List[Selection], [])


def as_fraction(ratio: float) -> Tuple[int, int]:
    """Numerator and denominator of the decimal that a float was written as: 0.7 is 7 / 10.

    With integers the number of kept patches is exact, and symbolic where the grid is. The limit of the denominator
    keeps products with a number of patches within 64 bits.
    """
    return Fraction(str(ratio)).limit_denominator(10 ** 12).as_integer_ratio()


@torch.fx.wrap
def larger(a: int, b: int) -> int:
    """max(a, b), also of symbolic integers."""
    if torch.jit.is_scripting() or torch.jit.is_tracing():
        return max(a, b)
    return torch.sym_max(a, b)


@torch.fx.wrap
def num_kept(num_patches: int, keep_ratio: Tuple[int, int]) -> int:
    """Number of slow tokens: `num_patches * keep_ratio`, rounded down, at least one."""
    return larger(1, num_patches * keep_ratio[0] // keep_ratio[1])


def num_matching_rounds(before: float, after: float) -> int:
    """Rounds of matching that lead from one ratio of slow tokens to a lower one: each can join half of them."""
    ratio = Fraction(*as_fraction(before)) / Fraction(*as_fraction(after))
    return (math.ceil(ratio) - 1).bit_length()  # the least number with 2 ** number >= ratio


def at_least_float32(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.fx.wrap
def class_attention(scores: torch.Tensor) -> torch.Tensor:
    """Scaled dot products (B, heads, N) of the class token's query with all keys to class attention (B, N).

    It is the mean over the heads (paper eq. 3), in float32 at least: selection needs to tell close patches apart.
    """
    return scores.to(at_least_float32(scores)).softmax(dim=-1).mean(dim=1)


def update_global_attn(
        global_attn: torch.Tensor,
        class_attn: torch.Tensor,
        tradeoff: float,
        learned_tradeoff: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Global class attention (B, n) after one more layer: `(1 - tradeoff) * global_attn + tradeoff * class_attn`.

    A scalar tensor `learned_tradeoff` takes the place of `tradeoff`.
    """
    if learned_tradeoff is not None:
        return global_attn.lerp(class_attn, learned_tradeoff.to(global_attn.dtype))
    return global_attn.lerp(class_attn, tradeoff)


def flat_idx(token_idx: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Indices (B, M) into the tokens of each image to indices into the tokens (B * num_tokens) of all."""
    return (token_idx + num_tokens * torch.arange(token_idx.shape[0], device=token_idx.device).unsqueeze(1)).flatten()


def take_rows(x: torch.Tensor, token_idx: torch.Tensor) -> torch.Tensor:
    """Tokens of x (B, N, C), by index (B, M), as rows (B * M, C): faster on a CPU than gather or x[i, j]."""
    return x.flatten(0, 1).index_select(0, flat_idx(token_idx, x.shape[1]))


def take_tokens(x: torch.Tensor, token_idx: torch.Tensor) -> torch.Tensor:
    """Tokens (B, M, C) of x (B, N, C), by index (B, M)."""
    return take_rows(x, token_idx).view(token_idx.shape[0], token_idx.shape[1], x.shape[2])


@torch.fx.wrap
def split_tokens(
        x: torch.Tensor,
        global_attn: torch.Tensor,
        keep_ratio: Tuple[int, int],
        num_prefix_tokens: int,
        representative_token: bool,
) -> Tuple[StageState, torch.Tensor, torch.Tensor]:
    """Split a complete sequence by class attention (paper section 'Token selection').

    Args:
        x: Tokens (B, N, C).
        global_attn: Global class attention (B, n).
        keep_ratio: Ratio of informative patches, numerator and denominator.
        num_prefix_tokens: Number of tokens in front of the patches, P.
        representative_token: Append the mean of the placeholders, weighted by `global_attn`, if there are any.

    Returns:
        The stage, raster indices (B, K) of the informative patches and their global class attention (B, K).
    """
    B, N, _ = x.shape
    n = N - num_prefix_tokens
    K = num_kept(n, keep_ratio)
    kept_attn, keep_idx = global_attn.topk(K, dim=1, sorted=False)
    prefix_idx = torch.arange(num_prefix_tokens, device=x.device).expand(B, -1)
    token_idx = torch.cat([prefix_idx, keep_idx + num_prefix_tokens], dim=1)
    slow = take_tokens(x, token_idx)
    order = torch.arange(num_prefix_tokens + K, device=x.device).expand(B, -1)
    slow_idx = torch.full((B, N), num_prefix_tokens + K, dtype=torch.int64, device=x.device)
    slow_idx = slow_idx.scatter(1, token_idx, order)
    if representative_token and n > K:
        weight = global_attn.scatter(1, keep_idx, 0.)
        weight = weight / weight.sum(dim=1, keepdim=True).clamp_min(1e-37)
        mean = weight.to(x.dtype).unsqueeze(1) @ x[:, num_prefix_tokens:]
        slow = torch.cat([slow, mean], dim=1)
        token_idx = F.pad(token_idx, [0, 1])  # that of the class token, which is not rotated
    return StageState(x, slow, slow_idx, token_idx, not representative_token), keep_idx, kept_attn


@torch.fx.wrap
def match_tokens(tokens: torch.Tensor, num_groups: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """One round of bipartite matching (ToMe, https://arxiv.org/abs/2210.09461, section 3).

    Every second token looks for the most similar one of the others, by cosine similarity. The most similar pairs are
    joined until `num_groups` tokens are left; at most half of the tokens can be joined. Of equal pairs the earlier one
    comes first.

    Args:
        tokens: (B, n, C).
        num_groups: Number of groups, n // 2 at least.

    Returns:
        For each token its group, (B, n), and its place in an order, (B, n), in which one token of each group comes
        first, in the order of the groups, and those follow that are joined to one.
    """
    n, C = tokens.shape[1:]
    num_joined = n - num_groups
    length = torch.linalg.vector_norm(tokens, dim=-1).clamp_min(1e-6)  # not zero in half precision
    even, odd = tokens[:, ::2], tokens[:, 1::2]
    products = even.new_empty(even.shape[0], even.shape[1], odd.shape[1])
    products = torch.baddbmm(products, even, odd.transpose(1, 2), beta=0, alpha=1 / C)  # by C against overflow
    scores = F.pad(products / length[:, 1::2].unsqueeze(1), [0, 1], value=-math.inf)
    best, partner = scores.max(dim=2)  # over one extra column: max fails on none
    best = best / length[:, ::2]
    # joined are those above the least one that is, and the first of its equals: ONNX has no stable sort
    position = torch.arange(n, device=tokens.device)
    last = position.new_full([1], num_joined - 1).clamp_min(0)
    least = best.sort(dim=1, descending=True).values.index_select(1, last)
    above, equal = best > least, best == least
    joins = above | (equal & (equal.long().cumsum(dim=1) <= num_joined - above.sum(dim=1, keepdim=True)))
    pair = position // 2  # of an even token and the odd one that follows
    joined = joins.index_select(1, pair) & (position % 2 == 0)
    number = (~joined).long().cumsum(dim=1) - 1
    partner_idx = (2 * partner.index_select(1, pair) + 1).clamp_max(n - 1)
    group_idx = torch.where(joined, number.gather(1, partner_idx), number)
    order = torch.where(joined, num_groups - 1 + position - number, number)
    return group_idx.clamp_max(num_groups - 1), order  # with NaN in the image fewer are joined


@torch.fx.wrap
def group_tokens(
        x: torch.Tensor,
        sizes: Optional[torch.Tensor],
        num_groups: int,
        num_prefix_tokens: int,
) -> Tuple[StageState, torch.Tensor]:
    """Split a sequence by similarity: one round of matching.

    Args:
        x: Tokens (B, N, C).
        sizes: Number of patches that each token stands for, (B, N), None for one each.
        num_groups: Number of slow tokens, (N - P) // 2 at least.
        num_prefix_tokens: Number of tokens in front of the patches, P.

    Returns:
        The stage, whose slow tokens are means over patches, and the sizes of its tokens, (B, P + num_groups).
    """
    B, N, _ = x.shape
    if sizes is None:
        sizes = torch.ones_like(x[:, :, 0], dtype=at_least_float32(x))
    group_idx, order = match_tokens(x.detach()[:, num_prefix_tokens:], num_groups)
    position = torch.arange(N, device=x.device).expand(B, -1)
    slow_idx = torch.cat([position[:, :num_prefix_tokens], group_idx + num_prefix_tokens], dim=1)
    order = torch.cat([position[:, :num_prefix_tokens], order + num_prefix_tokens], dim=1)
    # two places stay empty: torch.export does not know that this is no negative number, and guards against one
    num_slow, num_joined = num_prefix_tokens + num_groups, larger(0, N - num_prefix_tokens - num_groups)
    token_idx = position.new_zeros(B, num_slow + num_joined + 2).scatter(1, order, position)
    member_idx, joined_idx = token_idx[:, :num_slow], token_idx[:, num_slow:]
    joined_group = slow_idx.gather(1, joined_idx)
    joined_sizes = sizes.gather(1, joined_idx) * (torch.arange(num_joined + 2, device=x.device) < num_joined)
    slow_sizes = sizes.gather(1, member_idx).scatter_add(1, joined_group, joined_sizes)
    # mean over the patches of a group: its centre, and for each token that is joined a part of the way there
    rows = take_rows(x, member_idx).to(sizes.dtype)  # half precision would lose a part in a large group
    idx = flat_idx(joined_group, num_slow)
    weight = (joined_sizes / slow_sizes.gather(1, joined_group)).view(-1, 1)
    parts = (take_rows(x, joined_idx) - rows.index_select(0, idx)).mul_(weight)
    if torch.jit.is_tracing():  # the ONNX exporter without torch.export loses repeated indices of index_add
        rows = rows.scatter_add(0, idx.unsqueeze(1).expand_as(parts), parts)
    else:
        rows.index_add_(0, idx, parts)  # in place saves a copy
    return StageState(x, rows.to(x.dtype).view(B, num_slow, x.shape[2]), slow_idx, member_idx, False), slow_sizes


@torch.fx.wrap
def merge_tokens(stages: List[StageState], slow: torch.Tensor) -> torch.Tensor:
    """Slow tokens (B, P + M, C) after any number of blocks to the sequence (B, N, C) before the first of nested stages.

    Each token receives what the blocks added to its slow token (paper section 'Slow-fast token updating').
    """
    update = slow - stages[-1].slow
    for i in range(len(stages) - 1, 0, -1):
        rows = take_rows(update, stages[i].slow_idx).add_(stages[i].x.flatten(0, 1))
        update = rows.sub_(stages[i - 1].slow.flatten(0, 1)).view_as(stages[i].x)
    if stages[0].waits:
        update = F.pad(update, [0, 0, 0, 1])
    return stages[0].x + take_tokens(update, stages[0].slow_idx)


@torch.fx.wrap
def take_rope(rope: torch.Tensor, token_idx: torch.Tensor) -> torch.Tensor:
    """Rotary embeddings (B, heads or 1, M, d), by index (B, M), of those of all tokens (B or 1, heads or 1, N, d)."""
    B, M = token_idx.shape
    rows = rope.transpose(1, 2).flatten(2)
    rows = rows[0].index_select(0, token_idx.flatten()) if rope.shape[0] == 1 else take_tokens(rows, token_idx)
    return rows.view(B, M, rope.shape[1], rope.shape[3]).transpose(1, 2)


def run_block(
        block: nn.Module,
        x: torch.Tensor,
        bias: Optional[torch.Tensor],
        rope: Optional[torch.Tensor],
        needs_class_attn: bool,
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """Output of a block and its class attention. Checkpointing needs a function without side effects."""
    context = AttentionContext(bias, rope, needs_class_attn)
    x = block(x, context)
    return x, context.class_attn


class Stages:
    """The evolution stages that go on at one point of a sequence of blocks; nested ones begin and end together."""

    def __init__(self, x: torch.Tensor, num_prefix_tokens: int, representative_token: bool) -> None:
        """`x` is the complete sequence (B, N, C)."""
        self.num_prefix_tokens = num_prefix_tokens
        self.num_patches = x.shape[1] - num_prefix_tokens
        self.representative_token = representative_token
        self.states = torch.jit.annotate(List[StageState], [])  # the outermost first
        self.selections = torch.jit.annotate(List[Selection], [])  # the last one counts
        self.slow_idx = torch.jit.annotate(Optional[torch.Tensor], None)  # (B, N) slow token of each token
        self.keep_idx = torch.jit.annotate(Optional[torch.Tensor], None)  # (B, K) raster indices of informative patches
        self.member_idx = torch.jit.annotate(Optional[torch.Tensor], None)  # (B, P + M) tokens of the given sequence
        self.sizes = torch.jit.annotate(Optional[torch.Tensor], None)  # (B, P + M) number of patches of each token

    def begin_by_attention(
            self, block: int, x: torch.Tensor, keep_ratio: Tuple[int, int], global_attn: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Select informative patches of a complete sequence; returns slow tokens and their global class attention."""
        stage, keep_idx, kept_attn = split_tokens(
            x, global_attn, keep_ratio, self.num_prefix_tokens, self.representative_token)
        self.states.append(stage)
        self.keep_idx = keep_idx
        self.member_idx = stage.member_idx
        group_idx = stage.slow_idx[:, self.num_prefix_tokens:] - self.num_prefix_tokens
        self.selections.append(Selection(block, group_idx, num_kept(self.num_patches, keep_ratio), global_attn))
        return stage.slow, kept_attn

    def begin_by_similarity(
            self, block: int, x: torch.Tensor, keep_ratio: Tuple[int, int], rounds: int,
    ) -> torch.Tensor:
        """Group like tokens, also those of a stage that goes on; returns slow tokens."""
        P = self.num_prefix_tokens
        num_groups = num_kept(self.num_patches, keep_ratio)
        for _ in range(rounds):
            stage, sizes = group_tokens(x, self.sizes, larger(num_groups, (x.shape[1] - P) // 2), P)
            self.states.append(stage)
            self.sizes = sizes
            slow_idx, member_idx = stage.slow_idx, stage.member_idx
            slow_idx_before, member_idx_before = self.slow_idx, self.member_idx
            if slow_idx_before is not None and member_idx_before is not None:
                slow_idx = slow_idx.gather(1, slow_idx_before)
                member_idx = member_idx_before.gather(1, member_idx)
            self.slow_idx, self.member_idx = slow_idx, member_idx
            self.selections.append(Selection(block, slow_idx[:, P:] - P, num_groups, None))
            x = stage.slow
        return x

    def merge(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens inside the stages to the complete sequence (B, N, C) in raster order."""
        return merge_tokens(self.states, x) if len(self.states) > 0 else x

    def merge_attn(self, global_attn: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
        """Global class attention (B, K) of informative patches to (B, n): placeholders keep what they had."""
        keep_idx = self.keep_idx
        if global_attn is None or keep_idx is None:
            return global_attn
        attn_before = self.selections[-1].global_attn
        assert attn_before is not None
        return attn_before.scatter(1, keep_idx, global_attn)

    def attention_bias(self, x: torch.Tensor) -> Optional[torch.Tensor]:
        """Logarithm of the number of patches that each key stands for, (B, 1, 1, N)."""
        sizes = self.sizes
        if sizes is None:
            return None
        N = sizes.shape[1]
        # rows padded to a multiple of 8: otherwise fused attention on a GPU copies the bias in every block
        return F.pad(sizes.log().to(x.dtype), [0, 8 - N % 8])[:, None, None, :N]

    def divide_rope(self, rope: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of the complete sequence, (B or 1, heads or 1, N, d), to that of the slow tokens.

        An informative patch has its own. A group has that of the patch that the others have joined: the mean of the
        group, or the patch nearest to it, costs more and was no more accurate at keep ratios of 0.4 or more. The
        representative token stands for patches all over the image. It has that of the class token, which is not
        rotated.
        """
        member_idx = self.member_idx
        return rope if member_idx is None else take_rope(rope, member_idx)


class EvolvingSequential(nn.Sequential):
    """Transformer blocks that evolve slow and fast tokens, in place of the `nn.Sequential` of a dense model.

    A block maps (B, N, C) to (B, N, C). Where there is anything to tell its attention layer, it is called as
    `block(x, context)`. Each block has a module `grid`, an identity, that is called with the complete sequence where a
    stage starts at this block and no other goes on around it: a place for hooks. `tradeoff` is the weight of each
    block's class attention in the global class attention.
    """
    schedule: Schedule
    training_schedule: Schedule

    def __init__(
            self,
            *blocks: nn.Module,
            tradeoff: Sequence[float],
            num_prefix_tokens: int = 1,
            representative_token: bool = False,
    ) -> None:
        super().__init__(*blocks)
        for block in blocks:
            if not hasattr(block, 'grid'):  # a slice of a sequence keeps its hooks
                block.grid = nn.Identity()
        self.tradeoff = list(tradeoff)
        self.num_prefix_tokens = num_prefix_tokens
        self.representative_token = representative_token
        dense = Schedule.build(self.tradeoff, {})
        self.set_schedule(dense, dense)

    def set_schedule(self, schedule: Schedule, training_schedule: Schedule) -> None:
        """Set the schedule, and the one of training mode."""
        self.schedule = schedule
        self.training_schedule = training_schedule

    @torch.jit.unused
    def __getitem__(self, idx: Union[int, slice]) -> nn.Module:
        """A block, the first blocks with their evolution (as pruning and early stopping take them), or any others."""
        if not isinstance(idx, slice):
            return super().__getitem__(idx)
        blocks = list(self)[idx]
        start, _, step = idx.indices(len(self))
        if start or step != 1:
            return nn.Sequential(*blocks)
        part = EvolvingSequential(
            *blocks, tradeoff=self.tradeoff[idx], num_prefix_tokens=self.num_prefix_tokens,
            representative_token=self.representative_token)
        part.set_schedule(self.schedule.part(0, len(part)), self.training_schedule.part(0, len(part)))
        part.training = self.training  # not `part.train(...)`: each block keeps its own mode
        return part

    def forward(self, x: torch.Tensor, state: Optional[EvolutionState] = None) -> torch.Tensor:
        """Tokens (B, N, C) to tokens (B, N, C), complete and in raster order. `state` is updated."""
        if state is None:
            state = EvolutionState()
        schedule = self.training_schedule if self.training else self.schedule
        tradeoff, global_attn, rope = state.tradeoff, state.global_attn, state.rope
        stages = Stages(x, self.num_prefix_tokens, self.representative_token)
        bias: Optional[torch.Tensor] = None
        block_rope: Optional[torch.Tensor] = None
        for i, block in enumerate(self):
            keep_ratio = schedule.stage_keep_ratio[i]
            if keep_ratio is not None:
                if not schedule.nested[i]:
                    x, global_attn = stages.merge(x), stages.merge_attn(global_attn)
                    stages = Stages(x, self.num_prefix_tokens, self.representative_token)
                    x = block.grid(x)
                if keep_ratio[0] < keep_ratio[1]:
                    if schedule.matching_rounds[i] > 0:
                        x = stages.begin_by_similarity(i, x, keep_ratio, schedule.matching_rounds[i])
                    else:
                        assert global_attn is not None, 'tokens cannot be selected before any class attention is known'
                        x, global_attn = stages.begin_by_attention(i, x, keep_ratio, global_attn)
                    state.selections.append(stages.selections[-1])
                bias = stages.attention_bias(x)
            if not schedule.needs_class_attention[i]:
                global_attn = None
            needs_class_attn = schedule.needs_class_attention[i] and (
                global_attn is None or tradeoff is not None or self.tradeoff[i] > 0)
            if rope is not None and (i == 0 or keep_ratio is not None or state.rope_per_block):
                block_rope = stages.divide_rope(rope[i if state.rope_per_block else 0])
            class_attn: Optional[torch.Tensor] = None
            plain = not needs_class_attn and bias is None and block_rope is None
            if state.grad_checkpointing and not torch.jit.is_scripting():
                if plain:
                    x = checkpoint(block, x)
                else:
                    x, class_attn = checkpoint(partial(run_block, block), x, bias, block_rope, needs_class_attn)
            elif plain:
                x = block(x)
            else:
                context = AttentionContext(bias, block_rope, needs_class_attn)
                x = block(x, context)
                class_attn = context.class_attn
            if needs_class_attn:
                assert class_attn is not None, 'the block does not leave its class attention'
                if not self.representative_token:
                    class_attn = class_attn.detach()  # it decides which tokens are selected, and nothing else
                if global_attn is None:
                    global_attn = class_attn[:, self.num_prefix_tokens:]
                else:  # without the representative token, if there is one
                    class_attn = class_attn[:, self.num_prefix_tokens:self.num_prefix_tokens + global_attn.shape[1]]
                    global_attn = update_global_attn(
                        global_attn, class_attn, self.tradeoff[i], None if tradeoff is None else tradeoff[i])
            if i in state.take_indices:
                state.intermediates.append(stages.merge(x))
        state.global_attn = stages.merge_attn(global_attn)
        if tradeoff is not None:
            state.tradeoff = tradeoff[len(self.tradeoff):]
        return stages.merge(x)
