"""Which tokens were informative."""
from typing import List, NamedTuple

import torch
from torch import nn

from .training import evaluating

__all__ = ['InformativeTokens', 'informative_tokens']


class InformativeTokens(NamedTuple):
    """One token selection, on the grid of patches."""
    block: int  # the first block that runs on the informative tokens only
    mask: torch.Tensor  # (B, H, W) bool, True where a patch is informative
    attention: torch.Tensor  # (B, H, W) global class attention that decided


@torch.no_grad()
def informative_tokens(model: nn.Module, images: torch.Tensor) -> List[InformativeTokens]:
    """Find out which patches a model calls informative.

    Args:
        model: Evolving model. Used in evaluation mode and left as it was.
        images: (B, in_chans, H, W), transformed as the model wants them.

    Returns:
        One entry per token selection, in order.

    Raises:
        TypeError: The model does not evolve tokens.
    """
    if not hasattr(model, 'forward_selections'):
        raise TypeError(f'informative_tokens takes a model that evolves tokens, got {type(model).__name__}.')
    found = []
    with evaluating(model):
        for selection, (H, W) in model.forward_selections(images):
            mask = torch.zeros_like(selection.attention, dtype=torch.bool).scatter(1, selection.kept, True)
            found.append(InformativeTokens(
                selection.block, mask.unflatten(1, (H, W)), selection.attention.unflatten(1, (H, W))))
    return found
