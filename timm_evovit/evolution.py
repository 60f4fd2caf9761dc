"""Slow-fast token evolution: global class attention, token selection, split and merge.

'Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer', https://arxiv.org/abs/2108.01390.

Everything here works on sequences of prefix tokens (class token first) followed by patch tokens in raster order and
knows no model. Shapes use B images, N tokens of which P are prefix tokens, n = N - P patches, C channels.
"""
from fractions import Fraction
from functools import partial
from typing import List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from timm.models import checkpoint
from torch import nn


class Schedule(NamedTuple):
    """Where a sequence of blocks selects tokens and where it tracks global class attention, one entry per block."""
    stage_keep_ratio: List[Optional[Tuple[int, int]]]  # numerator and denominator where a stage starts, else None
    needs_class_attention: List[bool]  # a later selection reads the global class attention as it is after this block

    @classmethod
    def build(
            cls,
            tradeoff: Sequence[float],
            stages: Sequence[int],
            keep_ratio: Sequence[float],
            selection: str = 'stage',
    ) -> 'Schedule':
        """Lay out the evolution stages over the blocks (paper section 'Slow-fast token evolution').

        Args:
            tradeoff: Weight of each block's class attention in the global class attention.
            stages: First block of each evolution stage, ascending.
            keep_ratio: Ratio of informative patches in each stage, 1 for a stage that updates all of them.
            selection: 'stage', or 'layer' for stages of one block.
        """
        starts = dict(zip(stages, keep_ratio))
        stage_keep_ratio: List[Optional[Tuple[int, int]]] = []
        seen: List[float] = []  # ratio of the patches that a block sees
        for i in range(len(tradeoff)):
            seen.append(starts.get(i, seen[-1] if seen else 1.))
            selects = i in starts or (selection == 'layer' and seen[i] < 1)
            stage_keep_ratio.append(as_fraction(seen[i]) if selects else None)
        needs_class_attention = []
        read = False
        for i in reversed(range(len(tradeoff))):
            needs_class_attention.append(read)
            if seen[i] == 1 and tradeoff[i] == 1:
                read = False  # this block replaces every entry, what was there before is not read
            read = read or (stage_keep_ratio[i] is not None and seen[i] < 1)
        return cls(stage_keep_ratio, needs_class_attention[::-1])

    def part(self, start: int, stop: Optional[int] = None) -> 'Schedule':
        """The schedule of the blocks start .. stop - 1."""
        return Schedule(self.stage_keep_ratio[start:stop], self.needs_class_attention[start:stop])


class StageState(NamedTuple):
    """What a stage sets aside until its end."""
    x: torch.Tensor  # (B, N, C) the complete sequence as it was when the stage began
    global_attn: torch.Tensor  # (B, n) global class attention at that moment
    keep_idx: torch.Tensor  # (B, K) raster indices of the informative patches, in no order
    batch_idx: torch.Tensor  # (B, 1) and
    token_idx: torch.Tensor  # (B, P + K) where in x the slow tokens are
    representative: Optional[torch.Tensor]  # (B, 1, C) representative token before its slow update


class Selection(NamedTuple):
    """One token selection."""
    block: int  # the first block that runs on the informative tokens only
    keep_idx: torch.Tensor  # (B, K) raster indices of the informative patches, in no order
    global_attn: torch.Tensor  # (B, n) global class attention that they were selected by


class EvolutionState:
    """What goes through the blocks beside the tokens, during one forward pass.

    Modules get it as an argument and write to it. Each of them returns one tensor, as hooks and wrappers expect.
    """

    def __init__(
            self,
            tradeoff: Optional[torch.Tensor] = None,
            take_indices: Optional[List[int]] = None,
            global_attn: Optional[torch.Tensor] = None,
            class_attn: Optional[torch.Tensor] = None,
    ) -> None:
        """
        Args:
            tradeoff: Weights of the attention layers still to come in place of their fixed ones.
            take_indices: Blocks after which the complete sequence is wanted, also in the middle of a stage.
            global_attn: Global class attention (B, n), None where nothing later reads it.
            class_attn: Class attention (B, N) of the last attention layer that was given this state.
        """
        self.tradeoff = tradeoff
        self.take_indices = take_indices if take_indices is not None else torch.jit.annotate(List[int], [])
        self.global_attn = global_attn
        self.class_attn = class_attn
        self.intermediates = torch.jit.annotate(List[torch.Tensor], [])  # (B, N, C) each
        self.selections = torch.jit.annotate(List[Selection], [])


def as_fraction(ratio: float) -> Tuple[int, int]:
    """Numerator and denominator of the decimal that a float was written as: 0.7 is 7 / 10.

    With integers the number of kept patches is exact, and symbolic where the grid is. The limit of the denominator
    keeps products with a number of patches within 64 bits.
    """
    return Fraction(str(ratio)).limit_denominator(10 ** 12).as_integer_ratio()


def num_kept(num_patches: int, keep_ratio: Tuple[int, int]) -> int:
    """Number K of informative patches: `num_patches * keep_ratio`, rounded down, at least one."""
    k = num_patches * keep_ratio[0] // keep_ratio[1]
    if torch.jit.is_scripting() or torch.jit.is_tracing():
        return max(1, k)
    return torch.sym_max(1, k)


@torch.fx.wrap
def class_attention(scores: torch.Tensor) -> torch.Tensor:
    """Scaled dot products (B, heads, N) of the class token's query with all keys to class attention (B, N).

    It is the mean over the heads (paper eq. 3), in float32 at least: selection needs to tell close patches apart.
    """
    if scores.dtype != torch.float64:
        scores = scores.float()
    return scores.softmax(dim=-1).mean(dim=1)


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


@torch.fx.wrap
def split_tokens(
        x: torch.Tensor,
        global_attn: torch.Tensor,
        keep_ratio: Tuple[int, int],
        num_prefix_tokens: int,
        representative_token: bool,
) -> Tuple[torch.Tensor, torch.Tensor, StageState]:
    """Split a complete sequence into slow tokens and what is set aside (paper section 'Token selection').

    Args:
        x: Tokens (B, N, C).
        global_attn: Global class attention (B, n).
        keep_ratio: Ratio of informative patches, numerator and denominator.
        num_prefix_tokens: Number of tokens in front of the patches, P.
        representative_token: Append the mean of the placeholders, weighted by `global_attn`, if there are any.

    Returns:
        Slow tokens (B, P + K [+ 1], C), their global class attention (B, K) and the rest.
    """
    B, N, _ = x.shape
    n = N - num_prefix_tokens
    K = num_kept(n, keep_ratio)
    kept_attn, keep_idx = global_attn.topk(K, dim=1, sorted=False)
    prefix_idx = torch.arange(num_prefix_tokens, device=x.device).expand(B, -1)
    token_idx = torch.cat([prefix_idx, keep_idx + num_prefix_tokens], dim=1)
    batch_idx = torch.arange(B, device=x.device).unsqueeze(1)
    slow = x[batch_idx, token_idx]  # whole rows: about twice as fast on a CPU as gather by element
    representative: Optional[torch.Tensor] = None
    if representative_token and n > K:
        weight = global_attn.scatter(1, keep_idx, 0.)
        weight = weight / weight.sum(dim=1, keepdim=True).clamp_min(1e-37)
        mean = weight.to(x.dtype).unsqueeze(1) @ x[:, num_prefix_tokens:]
        slow = torch.cat([slow, mean], dim=1)
        representative = slow[:, -1:]
    return slow, kept_attn, StageState(x, global_attn, keep_idx, batch_idx, token_idx, representative)


@torch.fx.wrap
def merge_tokens(stage: StageState, slow: torch.Tensor) -> torch.Tensor:
    """Slow tokens (B, P + K [+ 1], C) after any number of blocks to the complete sequence (B, N, C) in raster order.

    Slow tokens return to their places. Placeholders receive what the blocks added to the representative token, or stay
    as they were if there is none (paper section 'Slow-fast token updating').
    """
    x, representative = stage.x, stage.representative
    if representative is None:
        x = x.clone()
    else:
        x = x + (slow[:, -1:] - representative)
        slow = slow[:, :-1]
    x[stage.batch_idx, stage.token_idx] = slow
    return x


def with_class_attention(block: nn.Module, x: torch.Tensor) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """Output of a block and its class attention. Checkpointing needs a function without side effects."""
    state = EvolutionState()
    x = block(x, state)
    return x, state.class_attn


class EvolvingSequential(nn.Sequential):
    """Transformer blocks that evolve slow and fast tokens, in place of the `nn.Sequential` of a dense model.

    A block maps (B, N, C) to (B, N, C). Where class attention is needed, it is called as `block(x, state)` and writes
    that attention, (B, N), to `state.class_attn`. Each block has a module `grid`, an identity, that is called with the
    complete sequence where a stage starts at this block: a place for hooks. `tradeoff` is the weight of each block's
    class attention in the global class attention.
    """
    schedule: Schedule
    layerwise_schedule: Optional[Schedule]

    def __init__(
            self,
            *blocks: nn.Module,
            tradeoff: Sequence[float],
            num_prefix_tokens: int = 1,
            representative_token: bool = False,
    ) -> None:
        super().__init__(*blocks)
        self.tradeoff = list(tradeoff)
        self.num_prefix_tokens = num_prefix_tokens
        self.representative_token = representative_token
        self.grad_checkpointing = False
        self.set_schedule(Schedule.build(self.tradeoff, (), ()))

    @torch.jit.unused
    def set_schedule(self, schedule: Schedule, layerwise: Optional[Schedule] = None) -> None:
        """Set the schedule, and the one that takes its place in training mode, if any."""
        self.schedule = schedule
        self.layerwise_schedule = layerwise

    @torch.jit.unused
    def __getitem__(self, idx: Union[int, slice]) -> nn.Module:
        """A block, the first blocks with their evolution (as pruning and early stopping take them), or any others."""
        if not isinstance(idx, slice):
            return super().__getitem__(idx)
        blocks = list(self)[idx]
        start, stop, step = idx.indices(len(self))
        if start or step != 1:
            return nn.Sequential(*blocks)
        part = EvolvingSequential(
            *blocks,
            tradeoff=self.tradeoff[idx],
            num_prefix_tokens=self.num_prefix_tokens,
            representative_token=self.representative_token,
        )
        layerwise = self.layerwise_schedule
        part.set_schedule(self.schedule.part(0, stop), None if layerwise is None else layerwise.part(0, stop))
        part.grad_checkpointing = self.grad_checkpointing
        part.training = self.training  # and not that of the blocks, each of which has its own
        return part

    def forward(self, x: torch.Tensor, state: Optional[EvolutionState] = None) -> torch.Tensor:
        """Tokens (B, N, C) to tokens (B, N, C), complete and in raster order. `state` is updated."""
        if state is None:
            state = EvolutionState()
        schedule, layerwise = self.schedule, self.layerwise_schedule
        if self.training and layerwise is not None:
            schedule = layerwise
        tradeoff, global_attn = state.tradeoff, state.global_attn
        stage: Optional[StageState] = None
        for i, block in enumerate(self):
            keep_ratio = schedule.stage_keep_ratio[i]
            if keep_ratio is not None:
                if stage is not None:
                    x = merge_tokens(stage, x)
                    if global_attn is not None:  # placeholders keep the entries they had
                        global_attn = stage.global_attn.scatter(1, stage.keep_idx, global_attn)
                    stage = None
                x = block.grid(x)
                if keep_ratio[0] < keep_ratio[1]:
                    assert global_attn is not None, 'tokens cannot be selected before any class attention is known'
                    x, global_attn, stage = split_tokens(
                        x, global_attn, keep_ratio, self.num_prefix_tokens, self.representative_token)
                    state.selections.append(Selection(i, stage.keep_idx, stage.global_attn))
            if not schedule.needs_class_attention[i]:
                global_attn = None
            if schedule.needs_class_attention[i] and (
                    global_attn is None or tradeoff is not None or self.tradeoff[i] > 0):
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x, class_attn = checkpoint(partial(with_class_attention, block), x)
                else:
                    x = block(x, state)
                    class_attn = state.class_attn
                    state.class_attn = None
                assert class_attn is not None, 'the block does not write its class attention'
                if not self.representative_token:
                    class_attn = class_attn.detach()  # it decides which tokens are selected, and nothing else
                if global_attn is None:
                    global_attn = class_attn[:, self.num_prefix_tokens:]
                else:  # without the representative token, if there is one
                    class_attn = class_attn[:, self.num_prefix_tokens:self.num_prefix_tokens + global_attn.shape[1]]
                    global_attn = update_global_attn(
                        global_attn, class_attn, self.tradeoff[i], None if tradeoff is None else tradeoff[i])
            elif self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
            if i in state.take_indices:
                state.intermediates.append(x if stage is None else merge_tokens(stage, x))
        if stage is not None:
            x = merge_tokens(stage, x)
            if global_attn is not None:
                global_attn = stage.global_attn.scatter(1, stage.keep_idx, global_attn)
        state.global_attn = global_attn
        if tradeoff is not None:
            state.tradeoff = tradeoff[len(self.tradeoff):]
        return x
