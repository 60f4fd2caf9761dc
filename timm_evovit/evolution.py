"""Slow-fast token evolution: global class attention, token selection, split and restore.

'Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer', https://arxiv.org/abs/2108.01390.

Everything here works on sequences of prefix tokens (class token first) followed by patch tokens in raster order and
knows no model. Shapes use B images, N tokens of which P are prefix tokens, n = N - P patches, C channels.
"""
from collections.abc import Sequence as SequenceABC
from numbers import Real
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import nn
from timm.models import checkpoint

__all__ = [
    'EvolvingSequential', 'Held', 'Schedule', 'Selection', 'class_attention', 'class_scores', 'mix', 'restore', 'select',
]


def _fractions(name: str, value: Any, count: int, per: str, zero: bool = False) -> Tuple[float, ...]:
    """Expand a number to `count` of them and check that each lies in (0, 1], or in [0, 1] with `zero`."""
    span = '[0, 1]' if zero else '(0, 1]'
    values = (value,) * count if isinstance(value, Real) else value
    if isinstance(values, str) or not isinstance(values, SequenceABC):
        raise TypeError(f'{name} must be a number in {span} or one per {per}, got {value!r}.')
    if len(values) != count:
        raise ValueError(f'{name} must be one number or {count}, one per {per}, got {len(values)}: {value!r}.')
    for v in values:
        if isinstance(v, bool) or not isinstance(v, Real):
            raise TypeError(f'{name} must be a number in {span} or one per {per}, got {value!r}.')
        if not (0 <= v <= 1 if zero else 0 < v <= 1):
            raise ValueError(f'{name} must lie in {span}, got {value!r}.')
    return tuple(float(v) for v in values)


def check_keep_ratio(value: Union[float, Sequence[float]], num_stages: int) -> Tuple[float, ...]:
    """`keep_ratio` as one ratio per evolution stage.

    Raises:
        TypeError, ValueError: Not one number in (0, 1], or one per stage.
    """
    return _fractions('keep_ratio', value, num_stages, 'evolution stage')


def check_tradeoff(value: Union[float, Sequence[float]], depth: int) -> Tuple[float, ...]:
    """`tradeoff` as one weight per block.

    Raises:
        TypeError, ValueError: Not one number in [0, 1], or one per block.
    """
    return _fractions('tradeoff', value, depth, 'block', zero=True)


def check_stages(value: Sequence[int], depth: int) -> Tuple[int, ...]:
    """`stages` as block indices: ascending, in 1 .. depth - 1, since some attention must come before a selection.

    Raises:
        TypeError: Not a sequence of integers.
        ValueError: Out of range or not ascending.
    """
    stages = (value,) if isinstance(value, int) else value
    if not isinstance(stages, SequenceABC) or any(isinstance(s, bool) or not isinstance(s, int) for s in stages):
        raise TypeError(f'stages must be block indices such as (4, 8), got {value!r}.')
    if any(not 0 < s < depth for s in stages):
        raise ValueError(f'stages must lie in 1 .. {depth - 1} for a model of {depth} blocks, got {value!r}.')
    if any(a >= b for a, b in zip(stages, stages[1:])):
        raise ValueError(f'stages must be in ascending order, got {value!r}.')
    return tuple(stages)


def check_selection(value: str) -> str:
    """`selection`, 'stage' or 'layer'.

    Raises:
        ValueError: Neither of them.
    """
    if value not in ('stage', 'layer'):
        raise ValueError(f"selection must be 'stage' or 'layer', got {value!r}.")
    return value


def check_flag(name: str, value: bool) -> bool:
    """A switch, which `--model-kwargs assisted_cls=false` is not: that is a string, and no empty one.

    Raises:
        TypeError: Neither True nor False.
    """
    if not isinstance(value, bool):
        raise TypeError(f'{name} must be True or False, got {value!r}.')
    return value


class Schedule(NamedTuple):
    """Where a sequence of blocks selects tokens and where it tracks global class attention.

    One entry per block, so that layer-wise selection is stage-wise selection with stages of one block.
    """
    keep: List[float]  # ratio of patches that a stage starting at this block keeps, 0 where none starts
    live: List[bool]  # a later selection reads the global class attention as it is after this block

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
            selection: 'stage' selects once per stage, 'layer' before each of its blocks.
        """
        depth = len(tradeoff)
        ratios = dict(zip(stages, keep_ratio))
        keep = [0.] * depth
        seen = [1.] * depth  # ratio of the patches that a block sees
        for i in range(depth):
            if i in ratios:
                keep[i] = seen[i] = float(ratios[i])
            elif i > 0:
                seen[i] = seen[i - 1]
                keep[i] = seen[i] if selection == 'layer' and seen[i] < 1 else 0.
        live = [False] * depth
        read = False
        for i in reversed(range(depth)):
            live[i] = read
            if seen[i] == 1 and tradeoff[i] == 1:
                read = False  # this block replaces every entry, what was there before is not read
            if 0 < keep[i] < 1:
                read = True
        return cls(keep, live)


class Held(NamedTuple):
    """What a stage sets aside until its end."""
    x: torch.Tensor  # (B, N, C) the complete sequence as it was when the stage began
    attention: torch.Tensor  # (B, n) global class attention at that moment
    kept: torch.Tensor  # (B, K) raster indices of the informative patches, in no order
    rows: torch.Tensor  # (B * (P + K),) rows of x.flatten(0, 1) that hold the slow tokens
    representative: Optional[torch.Tensor]  # (B, 1, C) representative token before its slow update


class Selection(NamedTuple):
    """One token selection."""
    block: int  # the first block that runs on the informative tokens only
    kept: torch.Tensor  # (B, K) raster indices of the informative patches, in no order
    attention: torch.Tensor  # (B, n) global class attention that they were selected by


def class_scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Scaled dot products of the class token's query with all keys, where fused attention does not give them.

    Args:
        q: Queries (B, heads, N, d), the class token first.
        k: Keys (B, heads, N, d).
        scale: Factor of the dot products, 1 / sqrt(d).

    Returns:
        (B, heads, N).
    """
    # keys first: where they are a part of a projection they are copied, by rows, which is several times faster on a CPU
    return (k @ q[:, :, :1].transpose(-2, -1)).squeeze(-1) * scale


@torch.fx.wrap
def class_attention(scores: torch.Tensor) -> torch.Tensor:
    """Attention of the class token over all tokens, averaged over the heads (paper eq. 3).

    Args:
        scores: Scaled dot products (B, heads, N) of the class token's query with all keys.

    Returns:
        (B, N), in float32 at least: selection needs to tell close patches apart.
    """
    if scores.dtype != torch.float64:
        scores = scores.float()
    return scores.softmax(dim=-1).mean(dim=1)


@torch.fx.wrap
def mix(
        attention: torch.Tensor,
        row: torch.Tensor,
        tradeoff: float,
        learned_tradeoff: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Global class attention after one more attention layer: `(1 - tradeoff) * attention + tradeoff * row`.

    Args:
        attention: Global class attention (B, n) so far.
        row: Class attention (B, n) of the layer.
        tradeoff: Weight of the layer.
        learned_tradeoff: Scalar tensor that takes the place of `tradeoff`.
    """
    if learned_tradeoff is not None:
        return attention.lerp(row, learned_tradeoff.to(attention.dtype))
    return attention.lerp(row, tradeoff)


@torch.fx.wrap
def select(
        x: torch.Tensor,
        attention: torch.Tensor,
        keep_ratio: float,
        num_prefix_tokens: int,
        representative_token: bool,
) -> Tuple[torch.Tensor, torch.Tensor, Held]:
    """Token selection: split a complete sequence into slow tokens and what is held back (paper section 'Token selection').

    Args:
        x: Tokens (B, N, C).
        attention: Global class attention (B, n).
        keep_ratio: Ratio of informative patches, in (0, 1); K = int(n * keep_ratio), at least one.
        num_prefix_tokens: Number of tokens in front of the patches, P.
        representative_token: Append the mean of the placeholders, weighted by `attention`, if there are any.

    Returns:
        Slow tokens (B, P + K [+ 1], C), their global class attention (B, K) and the rest.
    """
    B, N, C = x.shape
    n = N - num_prefix_tokens
    num_kept = max(1, int(n * keep_ratio))
    kept_attention, kept = attention.topk(num_kept, dim=1, sorted=False)
    prefix = torch.arange(num_prefix_tokens, device=x.device).expand(B, -1)
    offset = torch.arange(0, B * N, N, device=x.device).unsqueeze(1)
    # whole rows of a flat view: several times faster on a CPU than gather and scatter by element
    rows = (torch.cat([prefix, kept + num_prefix_tokens], dim=1) + offset).flatten()
    slow = x.flatten(0, 1).index_select(0, rows).view(B, num_prefix_tokens + num_kept, C)
    representative: Optional[torch.Tensor] = None
    if representative_token and num_kept < n:
        weight = attention.scatter(1, kept, 0.)
        weight = weight / weight.sum(dim=1, keepdim=True).clamp_min(1e-37)
        mean = weight.to(x.dtype).unsqueeze(1) @ x[:, num_prefix_tokens:]
        slow = torch.cat([slow, mean], dim=1)
        representative = slow[:, -1:]
    return slow, kept_attention, Held(x, attention, kept, rows, representative)


@torch.fx.wrap
def restore(held: Held, slow: torch.Tensor) -> torch.Tensor:
    """Put the complete sequence back together (paper section 'Slow-fast token updating').

    Slow tokens return to their places; placeholders receive what the blocks added to the representative token, or
    stay as they were if there is none.

    Args:
        held: What `select` held back.
        slow: Slow tokens (B, P + K [+ 1], C) after any number of blocks.

    Returns:
        Tokens (B, N, C) in raster order.
    """
    x = held.x
    B, N, C = x.shape
    representative = held.representative
    if representative is None:
        return x.flatten(0, 1).index_copy(0, held.rows, slow.flatten(0, 1)).view(B, N, C)
    x = x + (slow[:, -1:] - representative)
    return x.flatten(0, 1).index_copy_(0, held.rows, slow[:, :-1].flatten(0, 1)).view(B, N, C)


@torch.fx.wrap
def restore_attention(held: Held, attention: torch.Tensor) -> torch.Tensor:
    """Global class attention (B, n) of the complete grid: placeholders keep the entries they had."""
    return held.attention.scatter(1, held.kept, attention)


@torch.fx.wrap
def patch_attention(attention: torch.Tensor, num_prefix_tokens: int, num_patches: int) -> torch.Tensor:
    """Columns of the patches in class attention (B, N) that may end with the representative token."""
    return attention[:, num_prefix_tokens:num_prefix_tokens + num_patches]


class EvolvingSequential(nn.Sequential):
    """Transformer blocks that evolve slow and fast tokens; drop-in for the `nn.Sequential` of a dense model.

    A block maps (B, N, C) to (B, N, C). Where class attention is needed it is called as `block(x, class_attention=True)`
    and returns that attention, (B, N), as well; under TorchScript this is `block.forward_class_attention(x)`.
    """

    def __init__(
            self,
            *blocks: nn.Module,
            schedule: Schedule,
            tradeoff: Sequence[float],
            num_prefix_tokens: int = 1,
            representative_token: bool = False,
    ) -> None:
        """
        Args:
            blocks: Transformer blocks.
            schedule: Where to select and what to track.
            tradeoff: Weight of each block's class attention in the global class attention.
            num_prefix_tokens: Number of tokens in front of the patches, the class token first.
            representative_token: Update placeholders by a representative token.
        """
        super().__init__(*blocks)
        self.keep, self.live = schedule
        self.tradeoff = list(tradeoff)
        self.num_prefix_tokens = num_prefix_tokens
        self.representative_token = representative_token
        self.grad_checkpointing = False

    @torch.jit.ignore
    def __getitem__(self, idx: Union[int, slice]) -> nn.Module:
        """A block, the first blocks with their evolution (as pruning and early stopping take them), or any others."""
        if not isinstance(idx, slice):
            return super().__getitem__(idx)
        blocks = list(self)[idx]
        start, _, step = idx.indices(len(self))
        if start or step != 1:
            return nn.Sequential(*blocks)
        part = EvolvingSequential(
            *blocks,
            schedule=Schedule(self.keep[idx], self.live[idx]),
            tradeoff=self.tradeoff[idx],
            num_prefix_tokens=self.num_prefix_tokens,
            representative_token=self.representative_token,
        )
        part.grad_checkpointing = self.grad_checkpointing
        return part

    @torch.jit.ignore
    def set_schedule(self, schedule: Schedule) -> None:
        """Replace the schedule, weights untouched."""
        self.keep, self.live = schedule

    def evolve(
            self,
            x: torch.Tensor,
            attention: Optional[torch.Tensor],
            tradeoff: Optional[torch.Tensor],
            indices: List[int],
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor], List[torch.Tensor], List[Selection]]:
        """Run the blocks.

        Args:
            x: Tokens (B, N, C).
            attention: Global class attention (B, n) so far, if any.
            tradeoff: Weights (len(self),) that take the place of the fixed ones, if given.
            indices: Blocks after which the complete sequence is wanted, also in the middle of a stage.

        Returns:
            Tokens (B, N, C), global class attention (B, n) or None if nothing later reads it, the intermediate
            sequences asked for and the selections made.
        """
        held: Optional[Held] = None
        intermediates: List[torch.Tensor] = []
        selections: List[Selection] = []
        for i, block in enumerate(self):
            if self.keep[i] > 0:
                if held is not None:
                    x = restore(held, x)
                    if attention is not None:
                        attention = restore_attention(held, attention)
                    held = None
                if self.keep[i] < 1:
                    assert attention is not None, 'tokens cannot be selected before any class attention is known'
                    x, attention, held = select(
                        x, attention, self.keep[i], self.num_prefix_tokens, self.representative_token)
                    selections.append(Selection(i, held.kept, held.attention))
            if self.live[i] and (attention is None or tradeoff is not None or self.tradeoff[i] > 0):
                if torch.jit.is_scripting():
                    x, row = block.forward_class_attention(x)
                elif self.grad_checkpointing:
                    x, row = checkpoint(block, x, True)  # reentrant checkpoints take no keywords
                else:
                    x, row = block(x, class_attention=True)
                if not self.representative_token:
                    row = row.detach()  # it decides which tokens are selected, and nothing else
                if attention is None:
                    attention = row[:, self.num_prefix_tokens:]
                else:
                    row = patch_attention(row, self.num_prefix_tokens, attention.shape[1])
                    attention = mix(attention, row, self.tradeoff[i], None if tradeoff is None else tradeoff[i])
            elif self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
            if not self.live[i]:
                attention = None
            if i in indices:
                intermediates.append(x if held is None else restore(held, x))
        if held is not None:
            x = restore(held, x)
            if attention is not None:
                attention = restore_attention(held, attention)
        return x, attention, intermediates, selections

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.evolve(x, None, None, [])[0]

    def forward_intermediates(self, x: torch.Tensor, indices: List[int]) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        """Tokens (B, N, C) after the last block and, complete as well, after each of the blocks `indices`."""
        x, _, intermediates, _ = self.evolve(x, None, None, indices)
        return x, intermediates
