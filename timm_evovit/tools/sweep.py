"""Measure how much speed a model wins and how much accuracy it loses over keep ratios, and report it."""
import json
import math
import shlex
import statistics
import sys
import time
from contextlib import suppress
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image
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

    def __call__(self, images: Tensor, calls: int = 1) -> Tuple[Tensor, float]:
        """Logits (B, num_classes) of images (B, C, H, W), and the mean seconds of so many calls."""
        self.model.set_keep_ratio(self.keep_ratio)
        start = time.perf_counter()
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype is not None):
            for _ in range(calls):
                output = self.model(images)
        if images.device.type != 'cpu':
            getattr(torch, images.device.type).synchronize()
        return output, (time.perf_counter() - start) / calls


@torch.inference_mode()
def time_in_turns(settings: Sequence[Setting], images: Tensor, rounds: int = 7, seconds: float = 0.3) -> None:
    """Count multiply-adds, warm up, and time a batch in rounds, in which the settings take turns of about `seconds`."""
    calls = {}
    for setting in settings:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            setting(images[:1])
        setting.multiply_adds = counter.get_total_flops() // 2
        setting(images)
        calls[setting] = math.ceil(seconds / setting(images)[1]) or 1
    for i in tqdm(range(rounds), 'speed', unit='round', disable=None):
        for setting in reversed(settings) if i % 2 else settings:
            setting.seconds.append(setting(images, calls[setting])[1])


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


def summarize(settings: Sequence[Setting], batch: int, top5: Tensor, target: Optional[Tensor]) -> List[Dict[str, Any]]:
    """A row per setting from times of a batch of this size and `top5` (settings, n, 5) of n pictures, the dense first.

    `lost` is by how many points top-1 is below that of the dense model. Without labels (n) it is the percentage of
    predictions that differ from its predictions, which no loss of top-1 can exceed.
    """
    rows, n, dense = [], top5.shape[1], settings[0]
    for s, classes in zip(settings, top5):
        lost = int((classes[:, 0] != top5[0, :, 0]).sum())
        row: Dict[str, Any] = {'keep_ratio': s.keep_ratio, 'agreement': 100 - 100 * lost / n}
        span = interval_of_ratio(lost, n)
        if target is not None:
            right, dense_right = classes == target[:, None], top5[0, :, 0] == target
            row.update(top1=100 * right[:, 0].sum().item() / n, top5=100 * right.sum().item() / n)
            gained = int((right[:, 0] & ~dense_right).sum())
            lost = int((dense_right & ~right[:, 0]).sum())
            lost, span = lost - gained, interval_of_difference(lost, gained, n)
        row.update(
            lost=100 * lost / n, lost_interval=None if s is dense else [100 * bound for bound in span],
            images_per_second=batch / statistics.median(s.seconds),
            speed_up=statistics.median(b / t for b, t in zip(dense.seconds, s.seconds)), multiply_adds=s.multiply_adds)
        rows.append(row)
    return rows


def choose(rows: Sequence[Dict[str, Any]], max_drop: float) -> Dict[str, Any]:
    """The fastest row that loses at most `max_drop` points, either the dense model or one at a keep ratio below 1."""
    return max([rows[0], *(r for r in rows[1:] if r['lost'] <= max_drop)], key=lambda r: r['speed_up'])


@torch.inference_mode()
def sweep(
        settings: Sequence[Setting], loader: Any, batch: Tensor, labels: bool, max_drop: float, rounds: int,
) -> Dict[str, Any]:
    """Measure speed on a batch, keep ratio 1 first, then accuracy on `Pictures`, until the end or an interruption."""
    time_in_turns(settings, batch, rounds)
    found, skipped, complete = [], [], False
    with suppress(KeyboardInterrupt):
        for images, target, errors in tqdm(loader, 'accuracy', unit='batch', disable=None):
            for error in filter(None, errors):
                tqdm.write(f'timm-evovit: {error}', file=sys.stderr)
                skipped.append(error)
            if not all(errors):
                read = torch.tensor([not error for error in errors])
                images, target = images[read].to(batch.device), target[read]
                outputs = torch.stack([setting(images)[0].cpu() for setting in settings])
                for label in target.tolist() if labels else ():
                    check(0 <= label < outputs.shape[-1], 'label', f'in 0 .. {outputs.shape[-1] - 1}', label)
                found.append((outputs.topk(min(5, outputs.shape[-1])).indices, target))
        complete = True
    if not found:
        raise ValueError(f'None of the {len(skipped)} pictures can be read.') if complete else KeyboardInterrupt
    top5, targets = torch.cat([classes for classes, _ in found], dim=1), torch.cat([target for _, target in found])
    rows = summarize(settings, len(batch), top5, targets if labels else None)
    return dict(images=len(targets), skipped=skipped, complete=complete, rows=rows, chosen=choose(rows, max_drop))


def table(rows: Sequence[Dict[str, Any]]) -> str:
    """Rows as text."""
    columns = [
        ('keep ratio', 'keep_ratio', '{:g}'), ('top-1 %', 'top1', '{:.2f}'), ('top-5 %', 'top5', '{:.2f}'),
        ('agreement %', 'agreement', '{:.2f}'), ('points lost' if 'top1' in rows[0] else '% differ', 'lost', '{:.2f}'),
        ('95 % interval', 'lost_interval', '{0[0]:.2f} to {0[1]:.2f}'), ('img/s', 'images_per_second', '{:.1f}'),
        ('speed-up', 'speed_up', '{:.2f}'), ('M multiply-adds', 'multiply_adds', '{:.1f}')]
    columns = [column for column in columns if column[1] in rows[0]]
    cells = [[title for title, _, _ in columns]]
    for row in rows:
        row = {**row, 'multiply_adds': row['multiply_adds'] / 1e6}
        cells.append(['' if row[key] is None else form.format(row[key]) for _, key, form in columns])
    widths = [max(map(len, column)) for column in zip(*cells)]
    return '\n'.join('  '.join(cell.rjust(width) for cell, width in zip(line, widths)) for line in cells)


def describe(report: Dict[str, Any]) -> str:
    """The choice in words, and how to use it."""
    dense, chosen, drop, top1 = report['rows'][0], report['chosen'], report['max_drop'], 'top1' in report['rows'][0]
    limit = f'loses at most {drop:g} points of top-1' if top1 else f'changes at most {drop:g} % of predictions'
    text = f'No keep ratio below 1 is faster than the dense model (1) and {limit}. To use the dense model:'
    if chosen != dense:
        result = (f'top-1 is {chosen["top1"]:.2f} %, that of the dense model {dense["top1"]:.2f} %' if top1 else
                  f'{chosen["lost"]:.2f} % of predictions change')
        text = (f'The fastest keep ratio that {limit} is {chosen["keep_ratio"]:g}, {chosen["speed_up"]:.2f} times as '
                f'fast as the dense model; {result}.')
        if report['images'] < 1000:
            span = '{:.2f} to {:.2f}'.format(*chosen['lost_interval'])
            span = f'loss may be {span} points' if top1 else f'change may be {span} %'
            text += f'\nWith only {report["images"]} pictures the true {span} (95 % interval).'
    return f"{text}\n\nIn Python:\n{report['python']}\n\nFor timm's scripts:\n{report['arguments']}"


def plot(report: Dict[str, Any]) -> Any:
    """Draw accuracy, or without labels agreement with the dense model, against speed. Returns matplotlib's figure."""
    from matplotlib.figure import Figure
    rows, drop = report['rows'], report['max_drop']
    dense, chosen = rows[0].get('top1', 100.), rows.index(report['chosen'])
    speed, value = [row['images_per_second'] for row in rows], [dense - row['lost'] for row in rows]
    low, high = np.array([row['lost_interval'] or (0., 0.) for row in rows]).T

    axis: Any = Figure(figsize=(7.2, 4.6), layout='constrained').add_subplot()
    axis.vlines(speed, dense - high, dense - low, colors='0.65', label='95 % interval')
    axis.plot(speed, value, 'o-', color='C0', label='keep ratio')
    axis.plot(speed[0], dense, 's', color='black', mfc='white', ms=8, label='dense model')
    axis.plot(speed[chosen], value[chosen], 'o', color='black', mfc='none', ms=14, label='chosen')
    axis.axhline(dense - drop, color='0.3', ls='--', lw=1, label=f'{drop:g} points less')
    style = dict(textcoords='offset points', ha='center', va='top', bbox={'color': 'white', 'pad': 0.5})
    for row, *point in zip(rows, speed, value):
        axis.annotate(f'{row["keep_ratio"]:g}', point, (0, -9), **style)
    axis.set_title(f'{report["model"]}, {report["images"]} pictures', fontsize=10, wrap=True)
    axis.set_xlabel(f'images per second, batch {report["batch_size"]}, {report["device"]}')
    axis.set_ylabel('top-1 (%)' if 'top1' in rows[0] else 'same prediction as the dense model (%)')
    axis.figure.legend(loc='outside lower center', ncols=5, frameon=False, fontsize=8)
    return axis.figure


def how_to_use(report: Dict[str, Any], name: str, kwargs: Dict[str, Any], data: Dict[str, Any]) -> Tuple[str, str]:
    """Python code and arguments of timm's scripts that build a model; `data` are options of the scripts only."""
    weights = {'pretrained': True} if report['pretrained'] else {}
    words = [f'{k}={v!r}' for k, v in {**weights, **kwargs}.items()]
    code, arguments = f'model = timm.create_model({", ".join([repr(name), *words])})', ['--model', name]
    arguments += [f'--{k}' for k in weights]
    if checkpoint := report['checkpoint']:
        code += f'\ntimm.models.load_checkpoint(model, {checkpoint!r}, use_ema={report["use_ema"]})'
        arguments += ['--checkpoint', checkpoint, *(['--use-ema'] if report['use_ema'] else [])]
    flags = {'num_classes': '--num-classes', 'in_chans': '--in-chans', 'global_pool': '--gp'}
    for key, value in {**{k: v for k, v in kwargs.items() if k in flags}, **data}.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        arguments += [flags.get(key, f'--{key.replace("_", "-")}'), *map(str, values)]
    # scripts of timm 1.0.25 take names as they are, but other strings, such as local-dir:FOLDER, in quotes only
    quoted = {k for k, v in kwargs.items() if isinstance(v, str) and not v.replace('.', '_').isidentifier()}
    if words := [f'{k}={json.dumps(v) if k in quoted else v}' for k, v in kwargs.items() if k not in flags]:
        arguments += ['--model-kwargs', *words]
    return code, shlex.join(arguments)
