"""Assisted CLS token loss: what exists only while training (paper section 'Assisted CLS token loss').

The paper trains with the mean of two losses, one for the averaged-patch head and one for the class token head,
L = (1 / B) sum_i [l(a_i, y_i) + l(c_i, y_i)] / 2. A script that knows one tensor of logits computes
(1 / B) sum_i l(z_i, y_i); with z_i = a_i for even i and z_i = c_i for odd i, each sample is answered by either head with
probability 1 / 2 over the orderings of an even batch, so the expected gradient is that of L, for every criterion that
averages over samples. (The mean of both logits would not do: it makes disagreement of the heads cheaper than L does.)
"""
from typing import Tuple, Union

import torch
from torch import nn

__all__ = ['AssistedLoss', 'alternate_heads']


@torch.fx.wrap
def alternate_heads(logits: torch.Tensor, logits_cls: torch.Tensor) -> torch.Tensor:
    """Rows of `logits` (B, K) for even samples, of `logits_cls` (B, K) for odd ones."""
    even = torch.arange(logits.shape[0], device=logits.device) % 2 == 0
    return torch.where(even.unsqueeze(1), logits, logits_cls)


class AssistedLoss(nn.Module):
    """The paper's loss, exactly: the mean of the losses of both heads.

    For a model with `set_assisted_training(True)`, in a training loop of one's own or with timm's
    `ClassificationTask(model, AssistedLoss(criterion))`.
    """

    def __init__(self, criterion: nn.Module) -> None:
        """
        Args:
            criterion: Loss of one tensor of logits and a target.
        """
        super().__init__()
        self.criterion = criterion

    def forward(
            self,
            output: Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]],
            target: torch.Tensor,
    ) -> torch.Tensor:
        """
        Args:
            output: Logits of both heads, (B, K) each; or one tensor, as in evaluation, for the plain loss.
            target: What `criterion` takes.

        Raises:
            ValueError: `output` is neither.
        """
        if isinstance(output, torch.Tensor):
            return self.criterion(output, target)
        if not isinstance(output, (tuple, list)) or len(output) != 2:
            raise ValueError(
                f'AssistedLoss takes the logits of two heads, see set_assisted_training(True), got {type(output)}.')
        return 0.5 * self.criterion(output[0], target) + 0.5 * self.criterion(output[1], target)
