"""What exists only while training by the paper: assisted CLS token loss, layer-to-stage training schedule.

The assisted CLS token loss (paper section of that name) is the mean of those of the averaged-patch head and of the
class token head, L = (1 / B) sum_i [l(a_i, y_i) + l(c_i, y_i)] / 2. A script that knows one tensor of logits computes
(1 / B) sum_i l(z_i, y_i). With z_i drawn from a_i and c_i, each with probability 1 / 2 and independent of i and y_i,
the expected gradient is that of L for every criterion that averages over samples.
"""
from typing import Any, Callable, Dict, Optional, Tuple, Union

import torch
from torch import nn

from .base import EvolvingModel, check, check_epochs, check_flag


@torch.fx.wrap
def mix_heads(logits: torch.Tensor, logits_cls: torch.Tensor) -> torch.Tensor:
    """Logits (B, ..., num_classes) of the averaged-patch head and of the class token head to logits of the same shape.

    A random half of the samples is answered by the one head and the rest by the other; in an odd batch either may get
    the extra one. A head that does not fit, because the user has replaced the other one, is left out.
    """
    if logits.shape != logits_cls.shape:
        return logits + 0. * logits_cls.sum()  # a gradient, of zero: DistributedDataParallel expects one
    B = logits.shape[0]
    draw = torch.randperm(B + B % 2, device=logits.device)[:B] % 2 == 0
    return torch.where(draw.view([B] + [1] * (logits.ndim - 1)), logits, logits_cls)


class AssistedLoss(nn.Module):
    """The paper's loss, exactly: the mean of the losses of both heads.

    For a model with `set_assisted_training(True)`, in a training loop of one's own or with timm's
    `ClassificationTask(model, AssistedLoss(criterion))`. `criterion` takes logits and a target; with
    `set_distilled_training(True)` as well, Evo-LeViT returns two pairs, and the criterion gets a pair. With distilled
    training alone the two outputs are those of the heads for labels and for distillation: do not use this class.
    """

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(
            self, output: Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]], target: torch.Tensor) -> torch.Tensor:
        """Loss of the logits (B, num_classes) of both heads, or of one tensor, as in evaluation, the plain loss."""
        if isinstance(output, torch.Tensor):
            return self.criterion(output, target)
        two = isinstance(output, (tuple, list)) and len(output) == 2
        check(two, 'output', 'the logits of two heads, see set_assisted_training(True)', type(output))
        return 0.5 * self.criterion(output[0], target) + 0.5 * self.criterion(output[1], target)


class PaperModel(EvolvingModel):
    """A model that can be trained as in the paper, to be inherited from before a model of timm.

    In the first `layer_to_stage_epochs` epochs of training, tokens are selected before every block. Later, and in
    evaluation always, they are selected as `selection` says (paper section 'Layer-to-stage training schedule'). Each
    call of `train()` counts as the start of an epoch, as in timm's scripts, in a buffer that is saved with the weights.
    A loop that calls it more or less often uses `set_epoch`.
    """
    epochs_started: Optional[torch.Tensor]
    rename_authors: Callable[[Dict[str, torch.Tensor]], Dict[str, torch.Tensor]]  # of weights, a static method

    def _init_training(self, selection: str, assisted_cls: bool, layer_to_stage_epochs: int) -> None:
        """Check and keep the arguments. Blocks and keep ratio must be there."""
        check(selection in ('stage', 'layer'), 'selection', "'stage' or 'layer'", selection)
        self.selection = selection
        self.assisted_cls = check_flag('assisted_cls', assisted_cls)
        self.head_cls: Any = None
        self.assisted_training = False  # must set this True to train w/ both heads' logits
        self.layer_to_stage_epochs = check_epochs('layer_to_stage_epochs', layer_to_stage_epochs)
        fits = not layer_to_stage_epochs or selection == 'stage'
        check(fits, 'selection', "'stage' with layer_to_stage_epochs, which ends stage-wise", selection)
        self._count_epochs = True
        device = next(self.parameters()).device
        epochs = torch.zeros((), dtype=torch.int64, device=device) if layer_to_stage_epochs else None
        self.register_buffer('epochs_started', epochs)
        self._update_schedule()

    def _selection(self, training: bool) -> str:
        return 'layer' if training and self.layerwise_epochs else self.selection

    def _update_schedule(self) -> None:
        count = self.epochs_started
        self.layerwise_epochs = count is not None and (count.is_meta or int(count) <= self.layer_to_stage_epochs)
        self._set_schedule()

    def set_epoch(self, epoch: int) -> None:
        """Set the index of the epoch, from 0, and do not count the calls of `train()` from here on."""
        epoch = check_epochs('epoch', epoch)
        self._count_epochs = False
        if self.epochs_started is not None:
            self.epochs_started.fill_(epoch + 1)
            self._update_schedule()

    def train(self, mode: bool = True) -> 'PaperModel':
        super().train(mode)
        if mode and self.epochs_started is not None and self._count_epochs:
            self.epochs_started.add_(1)
            self._update_schedule()
        return self

    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        super().init_weights(*args, **kwargs)
        count = getattr(self, 'epochs_started', None)  # this is also called while the model is built
        if count is not None:
            count.zero_()
            self._update_schedule()

    def set_assisted_training(self, enable: bool = True) -> None:
        """While training with a class token head, return (averaged-patch logits, its logits), for `AssistedLoss`."""
        self.assisted_training = check_flag('enable', enable)

    def is_assisted(self) -> bool:
        """Whether the class token is classified too: in training mode, unless only `get_classifier()` is trained."""
        return self.training and self.head_cls is not None and any(p.requires_grad for p in self.head_cls.parameters())

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        # the authors' files load like timm's own where no filter comes first: `validate.py --checkpoint`
        own = {k[len(prefix):]: v for k, v in state_dict.items() if k.startswith(prefix)}
        renamed = self.rename_authors(own)
        if renamed is not own:
            for key in own:
                del state_dict[prefix + key]
            state_dict.update((prefix + k, v) for k, v in renamed.items())
        # weights fit with a count of epochs and without one
        key, count = prefix + 'epochs_started', self.epochs_started
        if count is None:
            state_dict.pop(key, None)
        else:
            state_dict.setdefault(key, torch.zeros((), dtype=torch.int64) if count.is_meta else count)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._update_schedule()
