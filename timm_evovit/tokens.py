"""What both ways of finding slow tokens share: how many there are, and tokens by index.

Shapes use B images, N tokens of which P are prefix tokens (class token first), n = N - P patches, C channels.
"""
from fractions import Fraction
from functools import cache
from typing import Tuple

import torch
from torch.nn import functional as F


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
    first = x.shape[1] * torch.arange(x.shape[0], device=x.device).unsqueeze(1)  # of each image
    return F.embedding(token_idx + first, x.flatten(0, 1))
