"""Which patches a model gives slow tokens of their own, and which share one."""
from typing import List

import torch
from timm.models._features import FeatureGetterNet
from torch import nn

from .base import eval_mode
from .tokens import InformativeTokens


@torch.no_grad()
def informative_tokens(model: nn.Module, images: torch.Tensor) -> List[InformativeTokens]:
    """Find out which patches a model gives slow tokens of their own, and which share one, stage by stage.

    Args:
        model: Evolving model, also in the wrapper of `features_only=True`. Used in evaluation mode and left as it was.
        images: (B, in_chans, H, W), transformed as the model wants them.

    Raises:
        TypeError: The model does not evolve tokens.
    """
    if isinstance(model, FeatureGetterNet):
        model = model.model
    if not hasattr(model, 'forward_selections'):  # a compiled model has it too
        raise TypeError(f'model must evolve, as that of timm_evovit.evolve(model) does, got {type(model).__name__}.')
    with eval_mode(model):
        return model.forward_selections(images)
