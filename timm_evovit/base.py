"""What every evolving model shares: checks of arguments, the keep ratio."""
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, Iterator, Optional, Sequence, Tuple, Type, TypeGuard, Union

import torch
from timm.layers.typing import disable_compiler
from timm.models import get_notrace_functions
from torch import distributed, fx, nn

from .hub import SavedArgs


def check(ok: bool, name: str, wanted: str, value: Any, error: Type[Exception] = ValueError) -> None:
    if not ok:
        raise error(f'{name} must be {wanted}, got {value!r}.')


def is_number(value: Any, kind: Any = Real) -> TypeGuard[float]:
    return isinstance(value, kind) and not isinstance(value, bool)


def is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def check_flag(name: str, value: bool) -> bool:
    """Reject strings such as 'false', which are truthy."""
    check(isinstance(value, bool), name, 'True or False', value, TypeError)
    return value


def check_epochs(name: str, value: int) -> int:
    check(is_number(value, Integral), name, 'a number of epochs such as 200', value, TypeError)
    check(value >= 0, name, '0 or more epochs', value)
    return int(value)


def check_ratios(name: str, value: Any, count: Optional[int], per: str, zero: bool = False) -> Tuple[float, ...]:
    """One number or `count` of them, None for any, to a tuple. All are in (0, 1], or in [0, 1] with `zero`."""
    span = '[0, 1]' if zero else '(0, 1]'
    values = (value,) * (1 if count is None else count) if is_number(value) else value
    listed = is_list(values) and all(map(is_number, values))
    check(listed, name, f'a number in {span} or one per {per}', value, TypeError)
    fits = len(values) > 0 if count is None else len(values) == count
    check(fits, name, f"one number or {'more' if count is None else count}, one per {per}", value)
    check(all(0 <= v <= 1 and (zero or v > 0) for v in values), name, f'in {span}', value)
    return tuple(float(v) for v in values)


def check_stages(stages: Any, depth: int, first: int) -> Tuple[int, ...]:
    """First blocks of the stages, or one number for one stage, to a tuple. They ascend from `first` on."""
    starts: Any = (stages,) if is_number(stages) else stages
    listed = is_list(starts) and all(is_number(s, Integral) for s in starts)
    check(listed, 'stages', 'block indices such as (4, 8)', stages, TypeError)
    wanted = f'in {first} .. {depth - 1} for a model of {depth} blocks'
    check(all(first <= s < depth for s in starts), 'stages', wanted, stages)
    check(all(a < b for a, b in zip(starts, starts[1:])), 'stages', 'in ascending order', stages)
    return tuple(map(int, starts))


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


@disable_compiler
def draw(count: int) -> int:
    """0 ... count - 1 by torch's random numbers, those of the first process in a distributed run."""
    drawn = [int(torch.randint(count, (), device='cpu'))]
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast_object_list(drawn)
    return drawn[0]


class EvolvingModel(SavedArgs):
    """A model with slow-fast token evolution, to be inherited from before a model of timm.

    A model adds `_build_schedule`, which turns keep ratios, one per stage, into what its `run_blocks` takes, in
    training mode or not, and `forward_slow_tokens`, which returns the `SlowTokens` of images (B, in_chans, H, W), stage
    by stage.
    """
    keep_ratio: Tuple[float, ...]
    train_keep_ratio: Tuple[float, ...] = ()  # if there are any, each forward pass in training mode draws one

    def _set_schedule(self) -> None:
        """Bring the keep ratios to where they are used."""
        self.eval_schedule = self._build_schedule(self.keep_ratio, False)
        self.training_schedule = self._build_schedule(self.keep_ratio, True)
        drawn = (self._stage_ratios(ratio, len(self.keep_ratio)) for ratio in self.train_keep_ratio)
        self.elastic_schedules = [self._build_schedule(ratios, True) for ratios in drawn]

    def _draw_schedule(self, x: Any) -> Any:
        """The schedule of a forward pass. Graphs that are traced or exported have that of `keep_ratio`."""
        exported = torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()  # is_exporting is newer
        traced = isinstance(x, fx.Proxy) or torch.jit.is_tracing() or exported
        if not (self.training and self.elastic_schedules) or traced:
            return self.training_schedule if self.training else self.eval_schedule
        return self.elastic_schedules[draw(len(self.elastic_schedules))]

    def _stage_ratios(self, keep_ratio: Union[float, Sequence[float]], num_stages: int) -> Tuple[float, ...]:
        return check_ratios('keep_ratio', keep_ratio, num_stages, 'evolution stage')

    def set_keep_ratio(self, keep_ratio: Union[float, Sequence[float]]) -> None:
        """Change the ratio of slow tokens to patches, weights untouched. At 1 the model is its dense baseline.

        One in (0, 1] for all evolution stages or one per stage. With `train_keep_ratio`, training mode ignores it. A
        TypeError or ValueError leaves the model unchanged.
        """
        self.keep_ratio = self._stage_ratios(keep_ratio, len(self.keep_ratio))
        self._remember_args(keep_ratio=self.keep_ratio)
        self._set_schedule()

    def extra_repr(self) -> str:
        return f'keep_ratio={self.keep_ratio}'

    def __prepare_scriptable__(self) -> nn.Module:
        """What TorchScript compiles: the graph of this model in evaluation mode."""
        with eval_mode(self):
            return fx.GraphModule(self, fx.Tracer(autowrap_functions=tuple(get_notrace_functions())).trace(self))
