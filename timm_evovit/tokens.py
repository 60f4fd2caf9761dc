"""What both ways of finding slow tokens share: how many there are, tokens by index, which patches share one.

Shapes use B images, N tokens of which P are prefix tokens (class token first), n = N - P patches, C channels.
"""
from fractions import Fraction
from functools import cache
from typing import List, NamedTuple, Optional, Tuple

import torch
from timm.models._features import FeatureGetterNet
from torch import nn

from .base import eval_mode


@cache
def as_fraction(ratio: float) -> Tuple[int, int]:
    """Numerator and denominator of a float as it was written: 0.7 gives (7, 10).

    With integers the number of kept patches is exact, and symbolic where the grid is.
    """
    limit = 10 ** 12  # of the denominator: products with a number of patches stay within 64 bits
    return max(Fraction(str(ratio)).limit_denominator(limit), Fraction(1, limit)).as_integer_ratio()


def larger(a: int, b: int) -> int:
    """max(a, b), also of symbolic integers."""
    return max(a, b) if torch.jit.is_scripting() or torch.jit.is_tracing() else torch.sym_max(a, b)


def num_kept(num_patches: int, keep_ratio: Tuple[int, int]) -> int:
    """Number of slow tokens: `num_patches * keep_ratio`, rounded down, at least one."""
    return larger(1, num_patches * keep_ratio[0] // keep_ratio[1])


def at_least_float32(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def take_tokens(x: torch.Tensor, token_idx: torch.Tensor) -> torch.Tensor:
    """Tokens (B, M, C) of x (B, N, C), by index (B, M): faster on a CPU than gather or x[i, j]."""
    first = x.shape[1] * torch.arange(token_idx.shape[0], device=x.device).unsqueeze(1)  # of each image
    rows = x.flatten(0, 1).index_select(0, (token_idx + first).flatten())
    return rows.view(token_idx.shape[0], token_idx.shape[1], x.shape[2])


class SlowTokens(NamedTuple):
    """One division of the patches among slow tokens, on the grid of patches."""
    block: int  # the first block that runs on the slow tokens only
    mask: torch.Tensor  # (B, H, W) bool, True where a patch is a slow token of its own
    groups: torch.Tensor  # (B, H, W) number of the slow token that each patch belongs to
    attention: Optional[torch.Tensor]  # (B, H, W) global class attention that decided, None by similarity

    def on_grid(self, grid_size: Tuple[int, int]) -> 'SlowTokens':
        """From patches in raster order, (B, n)."""
        return SlowTokens(self.block, *(x if x is None else x.unflatten(1, grid_size) for x in self[1:]))


@torch.no_grad()
def find_slow_tokens(model: nn.Module, images: torch.Tensor) -> List[SlowTokens]:
    """Find out which patches a model gives slow tokens of their own, and which share one, stage by stage.

    Args:
        model: Evolving model, also in the wrapper of `features_only=True`. Used in evaluation mode and left as it was.
        images: (B, in_chans, H, W), transformed as the model wants them.

    Raises:
        TypeError: The model does not evolve tokens.
    """
    if isinstance(model, FeatureGetterNet):
        model = model.model
    if not hasattr(model, 'forward_slow_tokens'):  # a compiled model has it too
        raise TypeError(f'model must evolve, as that of timm_evovit.evolve(model) does, got {type(model).__name__}.')
    with eval_mode(model):
        return model.forward_slow_tokens(images)
