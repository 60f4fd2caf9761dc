"""What exists only while training: assisted CLS token loss and layer-to-stage schedule.

Assisted CLS token loss (paper section of that name): the paper trains with the mean of two losses, one for the
averaged-patch head and one for the class token head, L = (1 / B) sum_i [l(a_i, y_i) + l(c_i, y_i)] / 2. A script that
knows one tensor of logits computes (1 / B) sum_i l(z_i, y_i); with z_i = a_i for even i and z_i = c_i for odd i, each
sample is answered by either head with probability 1 / 2 over the orderings of an even batch, so the expected gradient
is that of L, for every criterion that averages over samples. The mean of both logits would not do: its cross entropy is
that of L less the Bhattacharyya distance between the predictions of the heads, which pays them to disagree.
"""
from contextlib import contextmanager
from typing import Any, Dict, Iterator, Optional, Tuple, Union

import torch
from torch import nn

__all__ = ['AssistedLoss', 'LayerToStage', 'alternate_heads', 'check_epochs', 'evaluating']


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


def check_epochs(name: str, value: int) -> int:
    """A number of epochs.

    Raises:
        TypeError: Not an integer.
        ValueError: Negative.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f'{name} must be a number of epochs such as 200, got {value!r}.')
    if value < 0:
        raise ValueError(f'{name} must be 0 or more epochs, got {value!r}.')
    return value


class LayerToStage(nn.Module):
    """Layer-to-stage training schedule (paper section of that name), to be inherited from by a model.

    In the first `layer_to_stage_epochs` epochs of training tokens are selected before every block, from then on, and in
    evaluation always, as the model's `selection` says. A training script tells a model nothing about epochs, but calls
    `train()` at the start of each: those calls are counted, in a buffer, so that the count goes where the weights go.
    A loop that calls it more often, or not at all, says the epoch with `set_epoch`. TorchScript keeps the phase in which
    a model is scripted.
    """
    epochs_started: Optional[torch.Tensor]
    layerwise_phase: bool = False

    def _init_layer_to_stage(self, epochs: int, selection: str, device: Any = None) -> None:
        if check_epochs('layer_to_stage_epochs', epochs) and selection != 'stage':
            raise ValueError(
                f"layer_to_stage_epochs={epochs} goes from layer-wise to stage-wise selection and needs "
                f"selection='stage', got {selection!r}.")
        self.layer_to_stage_epochs = epochs
        self.layerwise_phase = False
        self._count_epochs = True
        # no schedule, no buffer: the state dict is then that of a model which has never heard of it
        self.register_buffer('epochs_started', torch.zeros((), dtype=torch.int64, device=device) if epochs else None)
        self._update_phase()

    def _set_schedule(self) -> None:
        """Schedule the evolution anew, layer-wise if `layerwise_phase`; the model's part."""
        raise NotImplementedError

    def _update_phase(self) -> None:
        """Follow the mode and the count of epochs."""
        count = self.epochs_started
        if count is not None:
            self.layerwise_phase = self.training and (count.is_meta or count.item() <= self.layer_to_stage_epochs)
            self._set_schedule()

    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        super().init_weights(*args, **kwargs)
        if getattr(self, 'epochs_started', None) is not None:  # also called while the model is built
            self.epochs_started.zero_()
            self._update_phase()

    @torch.jit.ignore
    def set_epoch(self, epoch: int) -> None:
        """Say which epoch it is, instead of having calls of `train()` counted from here on.

        Args:
            epoch: Index of the epoch, from 0.

        Raises:
            TypeError, ValueError: Not a number of epochs.
        """
        epoch = check_epochs('epoch', epoch)
        self._count_epochs = False
        if self.epochs_started is not None:
            self.epochs_started.fill_(epoch + 1)
            self._update_phase()

    def train(self, mode: bool = True) -> 'LayerToStage':
        super().train(mode)
        if self.epochs_started is not None:
            if mode and self._count_epochs:
                self.epochs_started.add_(1)
            self._update_phase()
        return self

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        # weights fit with a count and without one
        key = prefix + 'epochs_started'
        if self.epochs_started is None:
            state_dict.pop(key, None)
        else:
            count = self.epochs_started
            state_dict.setdefault(key, torch.zeros((), dtype=torch.int64) if count.is_meta else count)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._update_phase()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while: each module is then as it was, and no epoch has been started."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for module in modes:
            if isinstance(module, LayerToStage):
                module._update_phase()
