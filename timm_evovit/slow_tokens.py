"""Which patches a model gives slow tokens of their own, and which share one."""
from typing import List, NamedTuple, Optional, Tuple

import torch
from timm.models._features import FeatureGetterNet
from torch import nn

from .base import eval_mode


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
    model = model.model if isinstance(model, FeatureGetterNet) else model
    if not hasattr(model, 'forward_slow_tokens'):  # a compiled model has it too
        raise TypeError(f'model must evolve, as that of timm_evovit.evolve(model) does, got {type(model).__name__}.')
    with eval_mode(model):
        return model.forward_slow_tokens(images)
