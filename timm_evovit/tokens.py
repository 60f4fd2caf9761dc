"""How many slow tokens there are, and operations on tokens by index.

Shapes use B images, N tokens of which P are prefix tokens (class token first), n = N - P patches, C channels.
"""
from fractions import Fraction
from functools import cache
from typing import Optional, Tuple

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
    return max(a, b) if isinstance(a, int) and isinstance(b, int) or torch.jit.is_tracing() else torch.sym_max(a, b)


def num_kept(num_patches: int, keep_ratio: Tuple[int, int]) -> int:
    """Number of slow tokens: `num_patches * keep_ratio`, rounded down, at least one."""
    return larger(1, num_patches * keep_ratio[0] // keep_ratio[1])


def at_least_float32(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def offsets(x: torch.Tensor) -> torch.Tensor:
    """Row of the first token of each image in `x.flatten(0, 1)`, (B, 1), of x (B, N, ...)."""
    return x.shape[1] * torch.arange(x.shape[0], device=x.device).unsqueeze(1)


def take_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Tokens (B, M, C) at rows (B, M) of `x.flatten(0, 1)`: faster on a CPU than gather or x[i, j]."""
    return F.embedding(rows, x.flatten(0, 1))


def product(a: torch.Tensor, b: torch.Tensor, base: Optional[torch.Tensor] = None) -> torch.Tensor:
    """a @ b, (B, n, m) and (B, m, C), with autocast off. It is added to `base` (B, n, C), in place, if there is one."""
    if not torch.jit.is_scripting():  # its autocast takes a constant device only
        device = 'cpu' if a.is_meta else a.device.type  # meta has no autocast
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return product(a, b, base)
    return a.bmm(b) if base is None else base.baddbmm_(a, b)  # torch.export would guard the sizes of a @ b


def take_and_add(x: torch.Tensor, rows: torch.Tensor, changed_rows: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Take tokens (B, M, C) at rows (B, M) of x, and add `change` (B, R, C) at `changed_rows` (B, R) of the result."""
    taken = take_rows(x, rows).to(change.dtype)
    B, M, C = taken.shape
    by_product = x.device.type != 'cpu'  # which is deterministic on a GPU too
    if not torch.jit.is_scripting() and (torch.jit.is_tracing() or torch.compiler.is_compiling()):
        by_product = True  # faster than what compilers and exporters make of the sum
    if by_product:
        adds = (torch.arange(M, device=x.device) + offsets(taken)).unsqueeze(2) == changed_rows.unsqueeze(1)
        taken = product(adds.to(change.dtype), change, taken)
    else:
        taken.view(B * M, C).index_add_(0, changed_rows.flatten(), change.flatten(0, 1))
    return taken.to(x.dtype)


def take_rope(rope: torch.Tensor, patch_idx: torch.Tensor) -> torch.Tensor:
    """Rotary embeddings (B, heads or 1, M, d), by index (B, M), of (B or 1, heads or 1, n, d) or fewer dimensions."""
    for_all = rope.ndim < 4
    rope = rope.reshape([1] * (4 - rope.ndim) + list(rope.shape))
    rows = rope.transpose(1, 2).flatten(2)
    rows = rows if for_all else rows.expand(patch_idx.shape[0], -1, -1)
    taken = take_rows(rows, patch_idx if for_all else patch_idx + offsets(rows))
    return taken.unflatten(2, (rope.shape[1], rope.shape[3])).transpose(1, 2)


def align_rows(mask: torch.Tensor) -> torch.Tensor:
    """With rows padded to a multiple of 8 in memory: fused attention on a GPU would copy the mask in every block."""
    return mask if mask.device.type == 'cpu' else F.pad(mask, [0, 8 - mask.shape[3] % 8])[..., :mask.shape[3]]
