"""Token selection by class attention: the paper's method, for Evo-DeiT and Evo-LeViT.

'Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer', https://arxiv.org/abs/2108.01390.

The patches of highest global class attention are informative and go through the blocks of a stage. The others, the
placeholders, are updated by one representative token, or wait. A `Schedule` says where stages start, `split_tokens` and
`merge_tokens` start and end one, and `run_blocks` is the loop over the blocks.

Sequences are prefix tokens (class token first), then patch tokens in raster order. Shapes use B images, N tokens of
which P (`num_prefix_tokens`) are prefix tokens, n = N - P patches, K informative ones, C channels.
"""
from itertools import accumulate
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from timm.layers import Attention
from timm.models import checkpoint
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional as F

from .slow_tokens import SlowTokens
from .tokens import as_fraction, at_least_float32, num_kept, offsets, take_rows


class Schedule(NamedTuple):
    """Where a model selects tokens and where it tracks global class attention, one entry per attention layer."""
    stage_keep_ratio: List[Optional[Tuple[int, int]]]  # numerator and denominator where a stage starts, else None
    needs_class_attention: List[bool]  # a later selection reads what this layer adds to the global class attention

    @classmethod
    def build(cls, tradeoff: Sequence[float], starts: Dict[int, float], selection: str = 'stage') -> 'Schedule':
        """Lay out the evolution stages over the layers (paper section 'Slow-fast token evolution').

        Args:
            tradeoff: Weight of each layer's class attention in the global class attention.
            starts: First layer of each evolution stage, and its ratio of informative patches, 1 to update them all.
            selection: 'stage', or 'layer' for stages of one layer.
        """
        ratios = list(accumulate(range(len(tradeoff)), lambda ratio, i: starts.get(i, ratio), initial=1.))[1:]
        selects = [i in starts or (selection == 'layer' and ratio < 1) for i, ratio in enumerate(ratios)]
        needs_class_attention, read = [], False
        for i in reversed(range(len(tradeoff))):
            needs_class_attention.append(read and (tradeoff[i] > 0 or i == 0))
            if ratios[i] == 1 and tradeoff[i] == 1:
                read = False  # this layer replaces every entry, what was there before is not read
            read = read or (selects[i] and ratios[i] < 1)
        fractions = [as_fraction(ratio) if select else None for ratio, select in zip(ratios, selects)]
        return cls(fractions, needs_class_attention[::-1])


class EvolutionState:
    """State of one forward pass, which goes through the layers of a model and is updated by them.

    `tradeoff` is the weight of each layer's class attention in the global one: numbers or a tensor. `take_indices` are
    blocks whose output is wanted, also inside a stage; `slow_tokens` receives what each stage selects, (B, n). This
    is not a dataclass: FSDP copies those, and updates would be lost.
    """

    def __init__(
            self, schedule: Schedule, tradeoff: Union[Sequence[float], torch.Tensor], num_prefix_tokens: int = 1,
            representative_token: bool = False, grad_checkpointing: bool = False, take_indices: Sequence[int] = (),
            slow_tokens: Optional[List[SlowTokens]] = None) -> None:
        self.schedule, self.tradeoff, self.num_prefix_tokens = schedule, tradeoff, num_prefix_tokens
        self.representative_token, self.grad_checkpointing = representative_token, grad_checkpointing
        self.take_indices, self.slow_tokens = take_indices, slow_tokens
        self.layer = 0  # attention layers that are done
        self.global_attn: Optional[torch.Tensor] = None  # (B, n), inside a stage (B, K)
        self.intermediates: List[torch.Tensor] = []  # (B, N, C) each, complete

    def track(self, class_attn: torch.Tensor) -> torch.Tensor:
        """Global class attention after the next layer, (B, n): `(1 - tradeoff) * global_attn + tradeoff * class_attn`.

        Without representative token it decides which tokens are selected, and nothing else: it has no gradient.
        """
        if not self.representative_token:
            class_attn = class_attn.detach()
        if self.global_attn is None:
            return class_attn
        tradeoff = self.tradeoff[self.layer]
        if not isinstance(tradeoff, (int, float)):
            tradeoff = tradeoff.to(class_attn.dtype)
        return self.global_attn.lerp(class_attn, tradeoff)


class Stage(NamedTuple):
    """What a stage sets aside until its end."""
    x: torch.Tensor  # (B, N, C) the complete sequence when the stage began
    global_attn: torch.Tensor  # (B, n) its global class attention
    slow: torch.Tensor  # (B, P + M, C) prefix and slow tokens
    slow_idx: torch.Tensor  # (B, N) where in `slow` each token of x belongs, P + K for placeholders
    keep_idx: torch.Tensor  # (B, K) raster indices of the informative patches


@torch.fx.wrap
def class_attention(scores: torch.Tensor) -> torch.Tensor:
    """Scaled dot products (B, heads, N) of the class token's query with all keys to class attention (B, N).

    It is the mean over the heads (paper eq. 3), in float32 at least: selection needs to tell close patches apart.
    """
    return scores.to(at_least_float32(scores)).softmax(dim=-1).mean(dim=1)


@torch.fx.wrap
def split_tokens(
        x: torch.Tensor, global_attn: torch.Tensor, keep_ratio: Tuple[int, int], num_prefix_tokens: int,
        representative_token: bool) -> Tuple[Stage, torch.Tensor]:
    """Start a stage (paper section 'Token selection').

    Args:
        x: Complete sequence (B, N, C).
        global_attn: Global class attention (B, n).
        keep_ratio: Ratio of informative patches, numerator and denominator.
        representative_token: Append the mean of the placeholders, weighted by `global_attn`, if there are any.

    Returns the stage, and the global class attention (B, K) of the informative patches.
    """
    B, N, _ = x.shape
    n, P = N - num_prefix_tokens, num_prefix_tokens
    K = num_kept(n, keep_ratio)
    kept_attn, keep_idx = global_attn.topk(K, dim=1, sorted=False)
    order = torch.arange(P + K, device=x.device).expand(B, -1)
    token_idx = torch.cat([order[:, :P], keep_idx + P], dim=1)
    slow = take_rows(x, token_idx + offsets(x))
    slow_idx = torch.full((B, N), P + K, dtype=torch.int64, device=x.device).scatter(1, token_idx, order)
    if representative_token and n > K:
        weight = global_attn.scatter(1, keep_idx, 0.)
        weight = weight / weight.sum(dim=1, keepdim=True).clamp_min(1e-37)
        mean = weight.to(x.dtype).unsqueeze(1) @ x[:, P:]
        slow = torch.cat([slow, mean], dim=1)
    return Stage(x, global_attn, slow, slow_idx, keep_idx), kept_attn


@torch.fx.wrap
def merge_tokens(stage: Stage, slow: torch.Tensor) -> torch.Tensor:
    """End a stage: slow tokens (B, P + M, C) to the complete sequence (B, N, C), in raster order.

    Each token receives what the blocks added to its slow token (paper section 'Slow-fast token updating').
    """
    update = F.pad(slow - stage.slow, [0, 0, 0, 1])  # none for placeholders that wait
    return stage.x + take_rows(update, stage.slow_idx + offsets(update))


def merge_attn(stage: Stage, global_attn: torch.Tensor) -> torch.Tensor:
    """Global class attention (B, K) of informative patches to (B, n): placeholders keep what they had."""
    return stage.global_attn.scatter(1, stage.keep_idx, global_attn)


class EvoAttention(Attention):
    """timm's Attention, which can also give class attention."""

    def forward(self, x: torch.Tensor, class_attn: Optional[List[torch.Tensor]] = None) -> torch.Tensor:
        """Tokens (B, N, C), the class token first. A list `class_attn` receives class attention (B, N)."""
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if class_attn is not None:
            # keys first: they are copied by rows, which is several times faster on a CPU
            class_attn.append(class_attention((k @ q[:, :, :1].transpose(-2, -1)).squeeze(-1) * self.scale))
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.)
        else:
            out = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        out = self.norm(out.transpose(1, 2).reshape(B, N, self.num_heads * self.head_dim))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


class EvoBlock(Block):
    """timm's Block, which hands `class_attn` to its attention layer."""

    @classmethod
    def convert(cls, block: nn.Module, name: str) -> None:
        """Make a Block give class attention. Raises TypeError for another kind of block or attention layer."""
        kinds = tuple(type(part) for part in (block, getattr(block, 'attn', None)))
        if kinds != (Block, Attention):
            raise TypeError(
                f"{name} must be timm's Block with its Attention to find slow tokens by class attention, got "
                f"{kinds[0].__name__} with {kinds[1].__name__}. slow_tokens='similarity' takes any block.")
        block.__class__, block.attn.__class__ = cls, EvoAttention
        block.grid = nn.Identity()  # called with the complete sequence where a stage starts: a place for hooks
        for key, default in dict(gate=None, head_dim=block.attn.proj.in_features // block.attn.num_heads).items():
            if not hasattr(block.attn, key):  # in older versions of timm
                setattr(block.attn, key, default)

    def forward(self, x: torch.Tensor, class_attn: Optional[List[torch.Tensor]] = None) -> torch.Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), class_attn)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def run_with_class_attention(block: nn.Module, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Output of a block and its class attention. Checkpointing needs a function without side effects."""
    class_attn: List[torch.Tensor] = []
    x = block(x, class_attn)
    return x, class_attn[0]


def run_blocks(blocks: Iterable[nn.Module], x: torch.Tensor, state: EvolutionState) -> torch.Tensor:
    """Run blocks that evolve slow and fast tokens.

    Args:
        blocks: Map (B, N, C) to (B, N, C). Where its class attention is wanted, a block is called as
            `block(x, class_attn)` with a list to append it to. Where a stage starts at a block, `block.grid` is called.
        x: Complete sequence (B, N, C).
        state: Updated.

    Returns the complete sequence (B, N, C), in raster order.
    """
    P = state.num_prefix_tokens
    stage: Optional[Stage] = None
    for i, block in enumerate(blocks):
        keep_ratio = state.schedule.stage_keep_ratio[state.layer]
        if keep_ratio is not None:
            if stage is not None:
                x, state.global_attn, stage = merge_tokens(stage, x), merge_attn(stage, state.global_attn), None
            x = block.grid(x)
            if keep_ratio[0] < keep_ratio[1]:
                stage, kept_attn = split_tokens(x, state.global_attn, keep_ratio, P, state.representative_token)
                if state.slow_tokens is not None:
                    groups = stage.slow_idx[:, P:] - P
                    state.slow_tokens.append(SlowTokens(i, groups < kept_attn.shape[1], groups, state.global_attn))
                x, state.global_attn = stage.slow, kept_attn
        if state.schedule.needs_class_attention[state.layer]:
            run = run_with_class_attention
            x, class_attn = checkpoint(run, block, x) if state.grad_checkpointing else run(block, x)
            # without the representative token, if there is one
            last = None if state.global_attn is None else P + state.global_attn.shape[1]
            state.global_attn = state.track(class_attn[:, P:last])
        else:
            x = checkpoint(block, x) if state.grad_checkpointing else block(x)
        state.layer += 1
        if i in state.take_indices:
            state.intermediates.append(x if stage is None else merge_tokens(stage, x))
    if stage is not None:
        x, state.global_attn = merge_tokens(stage, x), merge_attn(stage, state.global_attn)
    return x
