"""Assisted CLS token loss (paper section of that name), which exists only while training.

The paper trains with the mean of two losses, one for the averaged-patch head and one for the class token head,
L = (1 / B) sum_i [l(a_i, y_i) + l(c_i, y_i)] / 2. A training script that knows one tensor of logits computes
(1 / B) sum_i l(z_i, y_i). With z_i drawn from a_i and c_i, each with probability 1 / 2 and independent of i and y_i,
the expected gradient is that of L for every criterion that averages over samples. The draw is half and half within a
batch, which lowers the variance and keeps the probability of each sample. The mean of both logits would not do: its
cross entropy is that of L less the Bhattacharyya distance between the predictions of the heads, which rewards the heads
for disagreeing.
"""
from typing import Tuple, Union

import torch
from torch import nn


@torch.fx.wrap
def mix_heads(logits: torch.Tensor, logits_cls: torch.Tensor) -> torch.Tensor:
    """Logits (B, ..., num_classes) of the averaged-patch head and of the class token head to logits of the same shape.

    A random half of the samples is answered by the one head and the rest by the other. In an odd batch either head gets
    the extra sample with probability 1 / 2. A head that does not fit, because the user has replaced the other one, is
    left out.
    """
    if logits.shape != logits_cls.shape:
        return logits + 0. * logits_cls.sum()  # a gradient, of zero: DistributedDataParallel expects one
    B = logits.shape[0]
    draw = torch.randperm(B + B % 2, device=logits.device)[:B] % 2 == 0
    return torch.where(draw.view([B] + [1] * (logits.ndim - 1)), logits, logits_cls)


@torch.fx.wrap
def stack_heads(logits: torch.Tensor, logits_dist: torch.Tensor) -> torch.Tensor:
    """Logits (B, num_classes) of a head and of the one for distillation, as one tensor (B, 2, num_classes).

    Raises:
        ValueError: The heads do not fit each other, because the user has replaced one.
    """
    if logits.shape != logits_dist.shape:
        raise ValueError(
            f'The head gives logits {list(logits.shape)} and the one for distillation {list(logits_dist.shape)}, but '
            f'their mean is wanted. Replace both, best by reset_classifier(num_classes).')
    return torch.stack([logits, logits_dist], dim=1)


class AssistedLoss(nn.Module):
    """The paper's loss, exactly: the mean of the losses of both heads.

    For a model with `set_assisted_training(True)`, in a training loop of one's own or with timm's
    `ClassificationTask(model, AssistedLoss(criterion))`.

    Args:
        criterion: Loss of one tensor of logits and a target. With `set_distilled_training(True)` as well, Evo-LeViT
            returns two pairs, and the criterion gets a pair.
    """

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(
            self,
            output: Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]],
            target: torch.Tensor,
    ) -> torch.Tensor:
        """
        Args:
            output: Logits (B, num_classes) of both heads; or one tensor, as in evaluation, for the plain loss.
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
