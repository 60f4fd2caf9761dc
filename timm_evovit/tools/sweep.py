"""Measure how much speed a model wins and how much accuracy it loses over keep ratios, and report it."""
import json
import math
import shlex
import statistics
import time
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ..base import check


def multiply_adds(model: Callable[..., Any], images: Tensor) -> int:
    """Multiply-adds of a call, attention counted as matrix products."""
    counter = FlopCounterMode(display=False)
    # with gradients: its hooks fail on views of parameters without, as in attention pooling
    with torch.inference_mode(False), torch.enable_grad(), counter, sdpa_kernel(SDPBackend.MATH):
        model(images.clone())
    return counter.get_total_flops() // 2


def time_in_turns(
        steps: Dict[Any, Callable[[], Any]], rounds: int, warmup: int = 2, seconds: float = 1.,
        device: Union[str, torch.device] = 'cpu',
) -> Dict[Any, List[float]]:
    """Seconds per call of functions by name: the median of the calls of each round.

    In a round they take turns, for `seconds` each or once, so that what else the machine does slows all of them. On a
    GPU a turn is ten calls, after which the host waits. The first `warmup` rounds do not count.
    """
    device = torch.device(device)
    times: Dict[Any, List[float]] = {name: [] for name in steps}
    at_once, order = 1 if device.type == 'cpu' else 10, list(steps)

    def now() -> float:
        getattr(torch, device.type).synchronize()
        return time.perf_counter()

    for i in tqdm(range(-warmup, rounds), 'speed', unit='round', disable=None):
        calls: Dict[Any, List[float]] = {name: [] for name in steps}
        end = now() + seconds * len(steps)
        while not calls[order[0]] or now() < end:
            order.reverse()
            for name in order:
                start = now()
                for _ in range(at_once):
                    steps[name]()
                calls[name].append((now() - start) / at_once)
        for name in steps if i >= 0 else ():
            times[name].append(statistics.median(calls[name]))
    return times


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


def compare(top5: Tensor, dense: Tensor, target: Optional[Tensor]) -> Dict[str, Any]:
    """Accuracy of predictions (n, 5), best first, beside those of the dense model.

    `lost` is by how many points top-1 is below that of the dense model. Without labels (n) it is the percentage of
    predictions that differ from its predictions, which no loss of top-1 can exceed.
    """
    n, lost, gained = len(top5), int((top5[:, 0] != dense[:, 0]).sum()), 0
    row = {'agreement': 100 - 100 * lost / n}
    if target is None:
        low, high = interval_of_ratio(lost, n)
    else:
        right, dense_right = top5 == target[:, None], dense[:, 0] == target
        row.update(top1=100 * right[:, 0].sum().item() / n, top5=100 * right.sum().item() / n)
        gained, lost = int((right[:, 0] & ~dense_right).sum()), int((dense_right & ~right[:, 0]).sum())
        low, high = interval_of_difference(lost, gained, n)
    return {**row, 'lost': 100 * (lost - gained) / n, 'lost_interval': [100 * low, 100 * high]}


def sweep(
        model: Any, keep_ratios: Sequence[float], loader: Any, batch: Tensor, labels: bool, rounds: int,
        amp_dtype: Optional[torch.dtype] = None,
) -> List[Dict[str, Any]]:
    """Measure a model at keep ratios, first 1: speed on a batch, accuracy on a loader's. Returns a row for each."""
    def run(keep_ratio: float, images: Tensor) -> Tensor:
        model.set_keep_ratio(keep_ratio)
        with torch.autocast(images.device.type, amp_dtype, enabled=amp_dtype is not None):
            return model(images)

    with torch.inference_mode():
        counts = [multiply_adds(partial(run, ratio), batch[:1]) for ratio in keep_ratios]
        found = []
        for images, target in tqdm(loader, 'accuracy', unit='batch', disable=None):
            outputs = torch.stack([run(ratio, images.to(batch.device)).cpu() for ratio in keep_ratios])
            for label in target.tolist() if labels else ():
                check(0 <= label < outputs.shape[-1], 'label', f'in 0 .. {outputs.shape[-1] - 1}', label)
            found.append((outputs.topk(min(5, outputs.shape[-1])).indices, target))
        times = time_in_turns({r: partial(run, r, batch) for r in keep_ratios}, rounds, 1, 0.3, batch.device)
    top5, targets = torch.cat([classes for classes, _ in found], dim=1), torch.cat([target for _, target in found])
    rows = []
    for ratio, count, classes in zip(keep_ratios, counts, top5):
        speed_ups = [dense / own for dense, own in zip(times[keep_ratios[0]], times[ratio])]  # of each round
        rows.append(dict(
            keep_ratio=ratio, **compare(classes, top5[0], targets if labels else None),
            images_per_second=len(batch) / statistics.median(times[ratio]), speed_up=statistics.median(speed_ups),
            speed_up_range=[min(speed_ups), max(speed_ups)], multiply_adds=count))
    rows[0].update(lost_interval=None, speed_up_range=None)
    return rows


def choose(rows: Sequence[Dict[str, Any]], max_drop: float) -> Dict[str, Any]:
    """The fastest row whose interval of the loss ends at `max_drop` or below, the dense model if there is none."""
    fits = [row for row in rows[1:] if row['lost_interval'][1] <= max_drop]
    return max([rows[0], *fits], key=lambda row: row['speed_up'])


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
        cells.append(['' if row[key] is None else form.format(row[key]) for _, key, form in columns])
    widths = [max(map(len, column)) for column in zip(*cells)]
    return '\n'.join('  '.join(cell.rjust(width) for cell, width in zip(line, widths)) for line in cells)


def describe(report: Dict[str, Any]) -> str:
    """The choice in words, and how to use it."""
    chosen, drop, name, images = (report[key] for key in ('chosen', 'max_drop', 'model', 'images'))
    ratio, use, base = chosen['keep_ratio'], 'model.set_keep_ratio(', {}
    limit = f'lose at most {drop} points of top-1' if 'top1' in chosen else f'change at most {drop} % of predictions'
    if ratio == 1:
        return f'No keep ratio below 1 is faster than dense and, with these {images} pictures, sure (95 %) to {limit}.'
    if not report['evolves']:
        name, use, base = 'evo_vit', 'model = timm_evovit.evolve(model, keep_ratio=', {'base': name}
    kwargs = {**base, **report['model_kwargs'], 'keep_ratio': ratio}
    settings = {**report, 'gp': kwargs.pop('global_pool', None)}  # what timm's scripts take as options of their own
    options = [name, *('--' + key.replace('_', '-') for key in ('pretrained', 'use_ema') if report[key])]
    for key in ('checkpoint', 'num_classes', 'input_size', 'gp', 'crop_pct', 'interpolation', 'mean', 'std'):
        if settings[key] is not None:
            options += ['--' + key.replace('_', '-'), *map(str, np.atleast_1d(settings[key]))]
    kwargs = {k: v for k, v in kwargs.items() if k not in ('num_classes', 'in_chans')}
    options += ['--model-kwargs', *(f'{k}={json.dumps(v) if ":" in str(v) else v}' for k, v in kwargs.items())]
    return (f'The fastest keep ratio sure (95 %) to {limit}: {ratio}, {chosen["speed_up"]:.2f} times as fast as dense.'
            f"\n\nIn Python:           {use}{ratio})\nFor timm's scripts:  --model {shlex.join(options)}")


def plot(report: Dict[str, Any]) -> Any:
    """Draw accuracy, or without labels agreement with the dense model, against speed. Returns matplotlib's figure."""
    from matplotlib.figure import Figure
    rows, dense = report['rows'], report['rows'][0].get('top1', 100.)
    speed, lost = [row['images_per_second'] for row in rows], np.array([row['lost'] for row in rows])
    low, high = np.array([row['lost_interval'] or (0., 0.) for row in rows]).T
    axis: Any = Figure(figsize=(7.2, 4.6), layout='constrained').add_subplot()
    axis.errorbar(speed, dense - lost, (high - lost, lost - low), fmt='o', label='keep ratio, 95 % interval')
    axis.axhline(dense - report['max_drop'], color='0.3', ls='--', lw=1, label=f'--max-drop {report["max_drop"]}')
    axis.margins(0.1)
    for i, (x, y, ratio) in enumerate(sorted(zip(speed, dense - lost, (row['keep_ratio'] for row in rows)))):
        axis.annotate(f'{ratio:g}', (x, y), (5, -13 if i % 2 else 5), textcoords='offset points')  # neighbours apart
    axis.set_title(f'{report["model"]}, {report["images"]} pictures', fontsize=10, wrap=True)
    axis.set_xlabel(f'images per second, batch {report["batch_size"]}, {report["device"]}')
    axis.set_ylabel('top-1 (%)' if 'top1' in rows[0] else 'same prediction as the dense model (%)')
    axis.figure.legend(loc='outside lower center', ncols=2, frameon=False)
    return axis.figure
