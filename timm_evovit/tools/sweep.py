"""Measure how much speed a model wins and how much accuracy it loses over keep ratios, and report it."""
import json
import math
import shlex
import signal
import statistics
import sys
import time
from contextlib import suppress
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_data_config, resolve_model_data_config
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ..base import check


class Pictures(Dataset):
    """Pictures (C, H, W) of a reader of timm, labels or -1, and '' or why a picture is empty, in one random order."""

    def __init__(self, reader: Any, transform: Any, chans: int = 3, limit: Optional[int] = None) -> None:
        self.reader, self.transform, self.mode = reader, transform, 'L' if chans == 1 else 'RGB'
        self.order = torch.randperm(len(reader), generator=torch.Generator().manual_seed(0))[:limit].tolist()

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> Tuple[Tensor, int, str]:
        index, error = self.order[i], ''
        try:
            image, target = self.reader[index]
            image = (image if isinstance(image, Image.Image) else Image.open(image)).convert(self.mode)
        except Exception as e:  # decoders raise errors of every kind
            name = self.reader.filename(index) if hasattr(self.reader, 'filename') else f'picture {index}'
            image, target, error = Image.new(self.mode, (1, 1)), None, f'{name} is skipped: {e}'
        return self.transform(image), -1 if target is None else target, error


class Setting:
    """A model at one keep ratio, and how fast it is. At 1 it is the dense model."""

    def __init__(self, model: Any, keep_ratio: float, amp_dtype: Optional[str] = None) -> None:
        self.model, self.keep_ratio = model, keep_ratio
        self.dtype = getattr(torch, amp_dtype) if amp_dtype else None
        self.multiply_adds = 0  # of a picture, attention as matrix products
        self.seconds: List[float] = []  # per batch, one of each round

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, C, H, W)."""
        self.model.set_keep_ratio(self.keep_ratio)
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype is not None):
            return self.model(images)


def multiply_adds(model: Callable[..., Any], images: Tensor) -> int:
    """Multiply-adds of a call, attention counted as matrix products."""
    def in_place(base: Any, a: Any, b: Any, **kwargs: Any) -> int:  # PyTorch counts only that which is not
        return 2 * math.prod(a) * b[2]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: in_place})
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(images)
    return counter.get_total_flops() // 2


def time_in_turns(
        steps: Dict[Any, Callable[[], Any]], rounds: int, warmup: int = 2, seconds: float = 1.,
        device: Union[str, torch.device] = 'cpu', times: Optional[Dict[Any, List[float]]] = None,
) -> Dict[Any, List[float]]:
    """Seconds per call of functions by name, in rounds, in which they take turns, forwards and backwards.

    Each is called again in a round for `seconds` at least. Unless they work on the CPU, the host waits for the device
    after ten calls only. The first `warmup` rounds do not count. `times` is what is returned, filled round by round.
    """
    device, times = torch.device(device), times or {name: [] for name in steps}
    at_once = 1 if device.type == 'cpu' else 10

    def now() -> float:
        if device.type != 'cpu':
            getattr(torch, device.type).synchronize()
        return time.perf_counter()

    for i in tqdm(range(-warmup, rounds), 'speed', unit='round', disable=None):
        for name in list(steps) if i % 2 == 0 else reversed(list(steps)):
            calls, elapsed, start = 0, 0., now()
            while not calls or elapsed < seconds:
                for _ in range(at_once):
                    steps[name]()
                calls, elapsed = calls + at_once, now() - start
            if i >= 0:
                times[name].append(elapsed / calls)
    return times


def measure_speed(settings: Sequence[Setting], images: Tensor, rounds: int, seconds: float = 0.3) -> None:
    """Count multiply-adds, and time a batch in rounds, in which the settings take turns."""
    for setting in settings:
        setting.multiply_adds = multiply_adds(setting, images[:1])
    steps: Dict[Any, Any] = {setting: partial(setting, images) for setting in settings}
    time_in_turns(steps, rounds, 1, seconds, images.device, {setting: setting.seconds for setting in settings})


def interval_of_difference(lost: int, gained: int, n: int) -> Tuple[float, float]:
    """95 % confidence interval of (lost - gained) / n, n pairs, by Agresti and Min (Statistics in Medicine, 2005)."""
    d, n = lost - gained, n + 2
    half = 1.96 * math.sqrt(lost + gained + 1 - d * d / n)
    return max((d - half) / n, -1.), min((d + half) / n, 1.)


def interval_of_ratio(count: int, n: int) -> Tuple[float, float]:
    """95 % confidence interval of count / n, by Agresti and Coull (The American Statistician, 1998)."""
    n, p = n + 4, (count + 2) / (n + 4)
    half = 1.96 * math.sqrt(p * (1 - p) / n)
    return max(p - half, 0.), min(p + half, 1.)


def summarize(
        settings: Sequence[Setting], batch: int, top5: Optional[Tensor], target: Optional[Tensor],
) -> List[Dict[str, Any]]:
    """A row per setting from times of a batch of this size and `top5` (settings, n, 5) of n pictures, the dense first.

    `lost` is by how many points top-1 is below that of the dense model. Without labels (n) it is the percentage of
    predictions that differ from its predictions, which no loss of top-1 can exceed. What was not measured is not there.
    """
    rows, dense = [], settings[0]
    for i, s in enumerate(settings):
        row: Dict[str, Any] = {'keep_ratio': s.keep_ratio}
        if top5 is not None:
            n, classes = top5.shape[1], top5[i]
            lost = int((classes[:, 0] != top5[0, :, 0]).sum())
            row['agreement'], span = 100 - 100 * lost / n, interval_of_ratio(lost, n)
            if target is not None:
                right, dense_right = classes == target[:, None], top5[0, :, 0] == target
                row.update(top1=100 * right[:, 0].sum().item() / n, top5=100 * right.sum().item() / n)
                gained = int((right[:, 0] & ~dense_right).sum())
                lost = int((dense_right & ~right[:, 0]).sum())
                lost, span = lost - gained, interval_of_difference(lost, gained, n)
            row.update(lost=100 * lost / n, lost_interval=None if s is dense else [100 * bound for bound in span])
        if s.seconds:
            ratios = [b / t for b, t in zip(dense.seconds, s.seconds)]  # of each round
            row.update(
                images_per_second=batch / statistics.median(s.seconds), speed_up=statistics.median(ratios),
                speed_up_range=None if s is dense else [min(ratios), max(ratios)])
        rows.append({**row, 'multiply_adds': s.multiply_adds})
    return rows


def choose(rows: Sequence[Dict[str, Any]], max_drop: float, images: int) -> Tuple[Optional[Dict[str, Any]], int]:
    """The fastest row whose interval of the loss ends at `max_drop` or below, or the dense model if none can be meant.

    Where one may be meant and the pictures are too few to tell, it is None and about the number of pictures needed.
    """
    fits, needed = [rows[0]], []
    for row in rows[1:]:
        lost, (low, high) = row['lost'], row['lost_interval']
        # what `max_drop` leaves to chance; all of it where the loss is greater, which may be chance as well
        margin = max_drop - lost if 0 <= lost < max_drop else max_drop or -lost
        if row['speed_up'] > 1 and high <= max_drop:
            fits.append(row)
        elif row['speed_up'] > 1 and low < max_drop and high - lost > margin > 0:
            needed.append(images * ((high - lost) / margin) ** 2)
    if len(fits) == 1 and needed:
        return None, int(float(f'{min(needed):.1e}'))
    return max(fits, key=lambda row: row['speed_up']), 0


def start(loader: Any) -> Any:
    """An iterator over a loader, whose processes leave Ctrl-C to this one."""
    if not hasattr(signal, 'pthread_sigmask'):  # on Windows
        return iter(loader)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the processes inherit it, this one hears of it later
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@torch.inference_mode()
def sweep(
        settings: Sequence[Setting], loader: Any, batch: Tensor, labels: bool, max_drop: float, rounds: int,
) -> Dict[str, Any]:
    """Measure speed on a batch, keep ratio 1 first, then accuracy on `Pictures`, until the end or an interruption."""
    found, skipped, complete = [], [], False
    with suppress(KeyboardInterrupt):
        measure_speed(settings, batch, rounds)
        for images, target, errors in tqdm(start(loader), 'accuracy', len(loader), unit='batch', disable=None):
            for error in filter(None, errors):
                tqdm.write(f'timm-evovit: {error}', file=sys.stderr)
                skipped.append(error)
            if not all(errors):
                read = torch.tensor([not error for error in errors])
                images, target = images[read].to(batch.device), target[read]
                outputs = torch.stack([setting(images).cpu() for setting in settings])
                for label in target.tolist() if labels else ():
                    check(0 <= label < outputs.shape[-1], 'label', f'in 0 .. {outputs.shape[-1] - 1}', label)
                found.append((outputs.topk(min(5, outputs.shape[-1])).indices, target))
        complete = True
    settings = [s for s in settings if s.multiply_adds]  # those that were reached
    if not found and (complete or not settings):
        raise ValueError(f'None of the {len(skipped)} pictures can be read.') if complete else KeyboardInterrupt
    top5 = torch.cat([classes for classes, _ in found], dim=1) if found else None
    target = torch.cat([target for _, target in found]) if found and labels else None
    rows, images = summarize(settings, len(batch), top5, target), 0 if top5 is None else top5.shape[1]
    chosen, needed = choose(rows, max_drop, images) if images else (None, 0)
    return dict(images=images, skipped=skipped, complete=complete, rows=rows, chosen=chosen, pictures_needed=needed)


def table(rows: Sequence[Dict[str, Any]]) -> str:
    """Rows as text."""
    columns = [
        ('keep ratio', 'keep_ratio', '{:g}'), ('top-1 %', 'top1', '{:.2f}'), ('top-5 %', 'top5', '{:.2f}'),
        ('agreement %', 'agreement', '{:.2f}'), ('points lost' if 'top1' in rows[0] else '% differ', 'lost', '{:.2f}'),
        ('95 % interval', 'lost_interval', '{0[0]:.2f} to {0[1]:.2f}'), ('img/s', 'images_per_second', '{:.1f}'),
        ('speed-up', 'speed_up', '{:.2f}'), ('lowest - highest', 'speed_up_range', '{0[0]:.2f} - {0[1]:.2f}'),
        ('M multiply-adds', 'multiply_adds', '{:.1f}')]
    columns = [column for column in columns if column[1] in rows[0]]
    cells = [[title for title, _, _ in columns]]
    for row in rows:
        row = {**row, 'multiply_adds': row['multiply_adds'] / 1e6}
        cells.append(['' if row.get(key) is None else form.format(row[key]) for _, key, form in columns])
    widths = [max(map(len, column)) for column in zip(*cells)]
    return '\n'.join('  '.join(cell.rjust(width) for cell, width in zip(line, widths)) for line in cells)


def describe(report: Dict[str, Any]) -> str:
    """The choice in words, and how to use it."""
    dense, chosen, drop, top1 = report['rows'][0], report['chosen'], report['max_drop'], 'top1' in report['rows'][0]
    limit = f'lose at most {drop} points of top-1' if top1 else f'change at most {drop} % of predictions'
    if report['pictures_needed']:
        return (f'Nothing is chosen: {report["images"]} pictures are too few to tell which keep ratios {limit}. '
                f'It takes about {report["pictures_needed"]}, or a greater --max-drop.')
    if chosen is None:
        return 'Nothing is chosen, since accuracy was not measured.'
    text = f'No keep ratio below 1 is faster than the dense model (1) and sure to {limit}. To use the dense model:'
    if chosen != dense:
        result = (f'top-1 is {chosen["top1"]:.2f} %, that of the dense model {dense["top1"]:.2f} %' if top1 else
                  f'{chosen["lost"]:.2f} % of predictions change')
        text = (f'The fastest keep ratio that is sure (95 %) to {limit} is {chosen["keep_ratio"]:g}, '
                f'{chosen["speed_up"]:.2f} times as fast as the dense model; {result}.')
    return f"{text}\n\nIn Python:\n{report['python']}\n\nFor timm's scripts:\n{report['arguments']}"


def plot(report: Dict[str, Any]) -> Any:
    """Draw accuracy, or without labels agreement with the dense model, against speed. Returns matplotlib's figure."""
    from matplotlib.figure import Figure
    rows, drop = sorted(report['rows'], key=lambda row: row['images_per_second']), report['max_drop']
    dense = report['rows'][0].get('top1', 100.)
    speed, value = [row['images_per_second'] for row in rows], [dense - row['lost'] for row in rows]
    low, high = np.array([row['lost_interval'] or (0., 0.) for row in rows]).T

    axis: Any = Figure(figsize=(7.2, 4.6), layout='constrained').add_subplot()
    axis.vlines(speed, dense - high, dense - low, colors='0.65', label='95 % interval')
    axis.plot(speed, value, 'o', color='C0', mfc='none', label='keep ratio')
    axis.plot(speed[rows.index(report['rows'][0])], dense, 's', color='black', mfc='none', ms=8, label='dense model')
    if report['chosen']:
        chosen = rows.index(report['chosen'])
        axis.plot(speed[chosen], value[chosen], 'o', color='black', mfc='none', ms=14, label='chosen')
    axis.axhline(dense - drop, color='0.3', ls='--', lw=1, label=f'{drop} points less')
    # names stand above the axes, where they hide nothing, at least one step apart
    left, right = axis.get_xlim()
    steps = np.arange(len(rows)) * min(0.06, 1 / len(rows))
    places = np.maximum.accumulate((np.array(speed) - left) / (right - left) - steps) + steps
    for row, *point, place in zip(rows, speed, value, np.minimum(places, 1 - steps[::-1])):
        axis.annotate(f'{row["keep_ratio"]:g}', point, (place, 1.02), textcoords='axes fraction', ha='center',
                      arrowprops=dict(arrowstyle='-', color='C0', ls=':', lw=0.8))
    axis.set_title(f'{report["model"]}, {report["images"]} pictures', fontsize=10, wrap=True, pad=22)
    axis.set_xlabel(f'images per second, batch {report["batch_size"]}, {report["device"]}')
    axis.set_ylabel('top-1 (%)' if 'top1' in rows[0] else 'same prediction as the dense model (%)')
    axis.figure.legend(loc='outside lower center', ncols=5, frameon=False, fontsize=8)
    return axis.figure


def how_to_use(report: Dict[str, Any], name: str, kwargs: Dict[str, Any], model: Any) -> Tuple[str, str]:
    """Python code and arguments of timm's scripts that build a model with the data configuration of `model`."""
    data = resolve_model_data_config(model)
    changed, options = ({  # from what the configuration of the model's name says, in Python and in scripts
        k: v for k, v in data.items() if not np.array_equal(
            v, resolve_data_config(pretrained_cfg=model.default_cfg, use_test_size=test)[k])} for test in (False, True))
    weights = {'pretrained': True} if report['pretrained'] else {}
    words = [f'{k}={v!r}' for k, v in {**weights, **kwargs}.items()]
    code = f'import timm\nmodel = timm.create_model({", ".join([repr(name), *words])}).eval()'
    arguments = ['--model', name, *(f'--{k}' for k in weights)]
    if checkpoint := report['checkpoint']:
        code += f'\ntimm.models.load_checkpoint(model, {checkpoint!r}, use_ema={report["use_ema"]})'
        arguments += ['--checkpoint', checkpoint, *(['--use-ema'] if report['use_ema'] else [])]
    if words := [f'{k}={v!r}' for k, v in changed.items()]:
        code += f'\nmodel.pretrained_cfg.update({", ".join(words)})'

    flags = {'num_classes': '--num-classes', 'in_chans': '--in-chans', 'global_pool': '--gp'}
    options.update({} if model.in_chans == 3 else {'in_chans': model.in_chans})  # the scripts' default is 3
    options.update((k, v) for k, v in kwargs.items() if k in flags)
    defaults = dict(data_dir='', dataset='', split='validation', class_map='', device='cuda')
    options.update((k, report[k]) for k, v in defaults.items() if report[k] != v)
    for key, value in options.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        arguments += [flags.get(key, f'--{key.replace("_", "-")}'), *map(str, values)]
    if report['amp_dtype']:
        arguments += ['--amp', '--amp-dtype', report['amp_dtype']]
    # scripts of timm 1.0.25 take names as they are, but other strings, such as local-dir:FOLDER, in quotes only
    quoted = {k for k, v in kwargs.items() if isinstance(v, str) and not v.replace('.', '_').isidentifier()}
    if words := [f'{k}={json.dumps(v) if k in quoted else v}' for k, v in kwargs.items() if k not in flags]:
        arguments += ['--model-kwargs', *words]
    return code, shlex.join(arguments)
