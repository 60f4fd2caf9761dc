"""What every evolving model shares: keep ratio, schedule, epochs, training switches, saved arguments."""
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Type, Union

import timm.models
import torch
from timm.models._features import FeatureGetterNet
from torch import nn

from .checkpoints import rename_authors
from .evolution import Schedule

NOT_MODEL_ARGS = (
    'device', 'dtype', 'cache_dir', 'num_classes', 'pretrained_cfg', 'pretrained_cfg_overlay', 'pretrained_model_args',
    'pretrained_strict', 'weight_init')


def check(ok: bool, name: str, wanted: str, value: Any, error: Type[Exception] = ValueError) -> None:
    if not ok:
        raise error(f'{name} must be {wanted}, got {value!r}.')


def is_number(value: Any, kind: Any = Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def check_flag(name: str, value: bool) -> bool:
    """Reject strings such as 'false', which are truthy."""
    check(isinstance(value, bool), name, 'True or False', value, TypeError)
    return value


def check_epochs(name: str, value: int) -> int:
    check(is_number(value, Integral), name, 'a number of epochs such as 200', value, TypeError)
    check(value >= 0, name, '0 or more epochs', value)
    return int(value)


def check_ratios(name: str, value: Any, count: int, per: str, zero: bool = False) -> Tuple[float, ...]:
    """One ratio in (0, 1], or in [0, 1] with `zero`, for each stage or block, given so or as one number for all."""
    span = '[0, 1]' if zero else '(0, 1]'
    values = (value,) * count if is_number(value) else value
    listed = isinstance(values, Sequence) and not isinstance(values, str) and all(map(is_number, values))
    check(listed, name, f'a number in {span} or one per {per}', value, TypeError)
    check(len(values) == count, name, f'one number or {count}, one per {per}', value)
    check(all(0 <= v <= 1 and (zero or v > 0) for v in values), name, f'in {span}', value)
    return tuple(float(v) for v in values)


def check_slow_tokens(slow_tokens: str, **by_attention: Any) -> None:
    """Check how slow tokens are found. Arguments of the other way must be as if they were not given."""
    check(slow_tokens in ('attention', 'similarity'), 'slow_tokens', "'attention' or 'similarity'", slow_tokens)
    for name, value in by_attention.items() if slow_tokens == 'similarity' else ():
        neutral = {'selection': 'stage', 'tradeoff': 'learned', 'layer_to_stage_epochs': 0}.get(name)
        left_out = value is None or value is False or (type(value) is type(neutral) and value == neutral)
        check(left_out, name, "left out with slow_tokens='similarity'", value)


def recast(module: nn.Module, cls: Any) -> Any:
    """A module of another class, usually a subclass, restored from the state of `module`, which it shares."""
    out = cls.__new__(cls)
    out.__setstate__(vars(module))
    return out


class EvolvingModel(nn.Module):
    """A model with slow-fast token evolution, to be inherited from before a model of timm.

    In the first `layer_to_stage_epochs` epochs of training, tokens are selected before every block. Later, and in
    evaluation always, they are selected as `selection` says (paper section 'Layer-to-stage training schedule'). Which
    it is depends on the `training` flag and the epoch. Each call of `train()` counts as the start of an epoch, as in
    timm's scripts, in a buffer that is saved with the weights. A loop that calls it more or less often uses
    `set_epoch`. TorchScript keeps the epoch at which a model is scripted.

    A model adds three methods. `_set_schedule` gives each sequence of blocks the schedules of `_build_schedules`,
    `_current_args` returns the arguments that timm's own methods may have changed since construction, and
    `forward_selections` the selections made in images (B, in_chans, H, W), each with the size of its grid.
    """
    epochs_started: Optional[torch.Tensor]

    def _init_evolution(
            self,
            keep_ratio: Union[float, Sequence[float]],
            num_stages: int,
            slow_tokens: str = 'attention',
            selection: str = 'stage',
            assisted_cls: bool = False,
            layer_to_stage_epochs: int = 0,
    ) -> None:
        """Check and keep the arguments. The blocks must be there."""
        check_slow_tokens(slow_tokens, selection=selection, layer_to_stage_epochs=layer_to_stage_epochs)
        self.slow_tokens = slow_tokens
        self.keep_ratio = self._stage_ratios(keep_ratio, num_stages)
        check(selection in ('stage', 'layer'), 'selection', "'stage' or 'layer'", selection)
        self.selection = selection
        self.assisted_cls = check_flag('assisted_cls', assisted_cls)
        self.head_cls: Any = None
        self.assisted_training = False  # must set this True to train w/ both heads' logits
        self.layer_to_stage_epochs = check_epochs('layer_to_stage_epochs', layer_to_stage_epochs)
        check(
            not layer_to_stage_epochs or selection == 'stage', 'selection',
            f"'stage' with layer_to_stage_epochs={layer_to_stage_epochs}, which ends stage-wise", selection)
        self._count_epochs = True
        device = next(self.parameters()).device
        # without the schedule there is no buffer: the state dict is the same as that of a model without this feature
        epochs = torch.zeros((), dtype=torch.int64, device=device) if layer_to_stage_epochs else None
        self.register_buffer('epochs_started', epochs)
        self._update_schedule()

    def _stage_ratios(self, keep_ratio: Union[float, Sequence[float]], num_stages: int) -> Tuple[float, ...]:
        """The ratio of each stage."""
        return check_ratios('keep_ratio', keep_ratio, num_stages, 'evolution stage')

    def set_keep_ratio(self, keep_ratio: Union[float, Sequence[float]]) -> None:
        """Change the ratio of slow tokens to patches, weights untouched. At 1 the model is its dense baseline.

        Args:
            keep_ratio: Ratio in (0, 1], one for all evolution stages or one per stage. A TypeError or ValueError, as at
                construction, leaves the model unchanged.
        """
        self.keep_ratio = self._stage_ratios(keep_ratio, len(self.keep_ratio))
        self._remember_args(keep_ratio=self.keep_ratio)
        self._set_schedule()

    def _build_schedules(self, tradeoff: Sequence[float], starts: Dict[int, float]) -> Tuple[Schedule, Schedule]:
        """The schedule, and the one of training mode."""
        schedule = Schedule.build(tradeoff, starts, self.selection, self.slow_tokens)
        return schedule, Schedule.build(tradeoff, starts, 'layer') if self.layerwise_epochs else schedule

    def _update_schedule(self) -> None:
        count = self.epochs_started
        self.layerwise_epochs = count is not None and (count.is_meta or int(count) <= self.layer_to_stage_epochs)
        self._set_schedule()

    def set_epoch(self, epoch: int) -> None:
        """Set the index of the epoch, from 0, and from here on do not count the calls of `train()`."""
        epoch = check_epochs('epoch', epoch)
        self._count_epochs = False
        if self.epochs_started is not None:
            self.epochs_started.fill_(epoch + 1)
            self._update_schedule()

    def train(self, mode: bool = True) -> 'EvolvingModel':
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
        self.assisted_training = enable

    def is_assisted(self) -> bool:
        """Whether the class token is classified too: in training mode, unless its head is frozen.

        A script that freezes everything but `get_classifier()` trains the averaged-patch head only. TorchScript cannot
        look at that: a scripted model trains both.
        """
        if not self.training or self.head_cls is None:
            return False
        if torch.jit.is_scripting():
            return True
        return any(p.requires_grad for p in self.head_cls.parameters())

    @property
    @torch.jit.unused
    def model_args(self) -> Dict[str, Any]:
        """Arguments that make `timm.create_model` build this model as it is now.

        timm's `push_to_hf_hub` and `save_for_hf` write them into config.json if they are given them. Device, dtype,
        number of classes and drop rates are left out.
        """
        args = {**getattr(self, '_model_args', {}), **self._current_args()}
        return {k: v for k, v in args.items() if k not in NOT_MODEL_ARGS and not k.endswith('_rate')}

    def _remember_args(self, **args: Any) -> None:
        """Record arguments in the attribute in which newer versions of timm record and look for them."""
        args = {k: v for k, v in args.items() if k not in NOT_MODEL_ARGS}
        self._model_args = {**getattr(self, '_model_args', {}), **args}

    def push_to_hf_hub(self, repo_id: str, *, model_args: Optional[Dict[str, Any]] = None, **kwargs: Any) -> Any:
        """Upload with timm's function of this name, `model_args` included; those given replace the model's own."""
        return timm.models.push_to_hf_hub(self, repo_id, model_args={**self.model_args, **(model_args or {})}, **kwargs)

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        # the authors' files load like timm's own where no filter comes first: `validate.py --checkpoint`
        own = {k[len(prefix):]: v for k, v in state_dict.items() if k.startswith(prefix)}
        renamed = rename_authors(own)
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


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while. Afterwards each module is in its own mode again, and no epoch has been counted."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class InformativeTokens(NamedTuple):
    """One division of the patches among slow tokens, on the grid of patches."""
    block: int  # the first block that runs on the slow tokens only
    mask: torch.Tensor  # (B, H, W) bool, True where a patch is a slow token of its own
    groups: torch.Tensor  # (B, H, W) number of the slow token that each patch belongs to
    attention: Optional[torch.Tensor]  # (B, H, W) global class attention that decided, None by similarity


@torch.no_grad()
def informative_tokens(model: nn.Module, images: torch.Tensor) -> List[InformativeTokens]:
    """Find out which patches a model gives slow tokens of their own, and which share one.

    Args:
        model: Evolving model, also in the wrapper of `features_only=True`. Used in evaluation mode and left as it was.
        images: (B, in_chans, H, W), transformed as the model wants them.

    Returns:
        One entry per evolution stage, in order.

    Raises:
        TypeError: The model does not evolve tokens.
    """
    if isinstance(model, FeatureGetterNet):
        model = model.model
    if not hasattr(model, 'forward_selections'):  # a compiled model has it too
        raise TypeError(
            f'{type(model).__name__} does not evolve tokens. timm.list_models("evo_*") names models that do, and '
            f'timm_evovit.evolve makes one of a Vision Transformer.')
    found = []
    with eval_mode(model):
        for (block, group_idx, num_groups, attention), grid_size in model.forward_selections(images):
            sizes = torch.zeros_like(group_idx).scatter_add(1, group_idx, torch.ones_like(group_idx))
            mask = (group_idx < num_groups) & (sizes.gather(1, group_idx) == 1)
            if attention is not None:
                attention = attention.unflatten(1, grid_size)
            found.append(InformativeTokens(
                block, mask.unflatten(1, grid_size), group_idx.unflatten(1, grid_size), attention))
    return found
