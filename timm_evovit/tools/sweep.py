"""Measure how much speed a model wins and how much accuracy it loses over keep ratios."""
import math
import statistics
import sys
import time
from contextlib import suppress
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from PIL import Image
from timm.data.readers.reader import Reader
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ..base import check


class Pictures(Dataset):
    """Pictures of a reader of timm in a random order that is always the same, so that any first part is a sample.

    An item is a picture (C, H, W), its label, -1 if it has none, and ''. timm puts the next picture in the place of one
    that cannot be read. Here it is an empty one, label -1, and its name with the reason.
    """

    def __init__(self, reader: Any, mode: str = 'RGB', limit: Optional[int] = None) -> None:
        self.reader = reader
        self.mode = mode
        self.order = torch.randperm(len(reader), generator=torch.Generator().manual_seed(0))[:limit].tolist()
        self.transform: Callable[[Any], torch.Tensor]  # create_loader sets it

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> Tuple[torch.Tensor, int, str]:
        index, error = self.order[i], ''
        try:
            image, target = self.reader[index]
            image = (image if isinstance(image, Image.Image) else Image.open(image)).convert(self.mode)
        except Exception as e:  # decoders raise errors of every kind
            name = self.reader.filename(index) if isinstance(self.reader, Reader) else f'picture {index}'
            image, target, error = Image.new(self.mode, (1, 1)), None, f'{name} is skipped: {e}'
        return self.transform(image), -1 if target is None else target, error


class Setting:
    """A model at one keep ratio, or one that does not evolve, and what was measured of it."""

    def __init__(self, model: nn.Module, keep_ratio: Optional[float] = None, amp_dtype: Optional[str] = None) -> None:
        self.model = model
        self.keep_ratio = keep_ratio
        self.amp_dtype = amp_dtype
        self.multiply_adds = 0  # of a picture
        self.seconds: List[float] = []  # per batch, one of each round
        # numbers of pictures; the last two are those that only one of this and the dense model gets right
        self.top1 = self.top5 = self.agree = self.only_dense_right = self.only_right = 0

    def prepare(self) -> None:
        if self.keep_ratio is not None:
            self.model.set_keep_ratio(self.keep_ratio)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        dtype = self.amp_dtype and getattr(torch, self.amp_dtype)
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            return self.model(images)

    def count(self, image: torch.Tensor) -> None:
        """Count the multiply-adds of a picture (1, C, H, W), attention as matrix products."""
        self.prepare()
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self.model(image)
        self.multiply_adds = counter.get_total_flops() // 2


@torch.inference_mode()
def time_in_turns(settings: Sequence[Setting], images: torch.Tensor, rounds: int = 7, seconds: float = 0.3) -> None:
    """Time a batch in rounds, each setting once in every round and in reverse order in every second one.

    A round before them warms up, counts multiply-adds and finds out how many calls fill `seconds`.
    """
    def measure(setting: Setting, calls: int) -> float:
        setting.prepare()
        start = time.perf_counter()
        for _ in range(calls):
            setting(images)
        if images.device.type != 'cpu':
            getattr(torch, images.device.type).synchronize()
        return (time.perf_counter() - start) / calls

    calls: Dict[Setting, int] = {}
    for i in tqdm(range(rounds + 1), 'speed', unit='round', disable=None):
        for setting in settings if i % 2 else reversed(settings):
            if i == 0:
                setting.count(images[:1])
                measure(setting, 1)
                calls[setting] = math.ceil(seconds / measure(setting, 1)) or 1
            else:
                setting.seconds.append(measure(setting, calls[setting]))


@torch.inference_mode()
def compare(settings: Sequence[Setting], images: torch.Tensor, target: Optional[torch.Tensor] = None) -> None:
    """Count a batch (B, C, H, W), with labels (B) or without, for every setting. The first is the dense model."""
    dense = None
    for setting in settings:
        setting.prepare()
        output = setting(images)
        top5 = output.topk(min(5, output.shape[-1])).indices
        dense = top5 if dense is None else dense
        setting.agree += int((top5[:, 0] == dense[:, 0]).sum())
        if target is not None:
            for label in (int(target.min()), int(target.max())):
                check(0 <= label < output.shape[-1], 'label', f'in 0 .. {output.shape[-1] - 1}', label)
            right, dense_right = top5[:, 0] == target, dense[:, 0] == target
            setting.top1 += int(right.sum())
            setting.top5 += int((top5 == target[:, None]).sum())
            setting.only_dense_right += int((dense_right & ~right).sum())
            setting.only_right += int((right & ~dense_right).sum())


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


def summarize(settings: Sequence[Setting], n: int, batch_size: int, labels: bool) -> List[Dict[str, Any]]:
    """One row per setting after n pictures were compared and a batch was timed. The first is the dense model.

    `lost` is by how many points top-1 is below that of the dense model. Without labels it is the percentage of
    predictions that differ from its predictions, which no loss of top-1 can exceed.
    """
    def speed_up(base: Setting) -> float:
        return statistics.median(b / t for b, t in zip(base.seconds, s.seconds))

    rows = []
    for s in settings:
        lost = s.only_dense_right - s.only_right if labels else n - s.agree
        span = interval_of_difference(s.only_dense_right, s.only_right, n) if labels else interval_of_ratio(lost, n)
        rows.append({
            'keep_ratio': s.keep_ratio,
            **({'top1': 100 * s.top1 / n, 'top5': 100 * s.top5 / n} if labels else {}),
            'agreement': 100 * s.agree / n,
            'lost': 100 * lost / n,
            'lost_interval': None if s is settings[0] else [100 * bound for bound in span],
            'images_per_second': batch_size / statistics.median(s.seconds),
            'speed_up': speed_up(settings[0]),
            'speed_up_over_keep_ratio_1': speed_up(next(s for s in settings if s.keep_ratio == 1)),
            'multiply_adds': s.multiply_adds,
        })
    return rows


def choose(rows: Sequence[Dict[str, Any]], max_drop: float) -> Dict[str, Any]:
    """The fastest row that loses at most `max_drop` points, either the dense model or one at a keep ratio below 1."""
    fit = [r for r in rows[1:] if r['keep_ratio'] < 1 and r['lost'] <= max_drop]
    return max([rows[0], *fit], key=lambda r: r['speed_up'])


def sweep(
        settings: Sequence[Setting],
        loader: Any,
        batch: torch.Tensor,
        labels: bool = True,
        max_drop: float = 0.5,
        rounds: int = 7,
        save: Callable[[Dict[str, Any]], None] = lambda result: None,
) -> Dict[str, Any]:
    """Measure the speed of the settings, then their accuracy, all of them on each batch of pictures.

    Args:
        settings: The dense model first, keep ratio 1 among them.
        loader: Batches of `Pictures`.
        batch: What is timed, (B, C, H, W) on the device of the models.
        labels: Use the labels.
        max_drop: Points that the chosen setting may lose.
        rounds: Rounds of timing.
        save: Called with the result so far after each batch of pictures.

    Returns:
        Rows of `summarize`, the chosen one, the number of images, the errors of those that were skipped, and whether it
        is complete; it is not if it was interrupted after the first batch of pictures.

    Raises:
        ValueError: No picture can be read, or a label is none of the model's classes.
    """
    time_in_turns(settings, batch, rounds)
    result: Dict[str, Any] = {'images': 0, 'skipped': [], 'complete': False}
    with suppress(KeyboardInterrupt):
        for images, target, errors in tqdm(loader, 'accuracy', unit='batch', disable=None):
            read = torch.tensor([not error for error in errors])
            for error in filter(None, errors):
                tqdm.write(f'timm-evovit: {error}', file=sys.stderr)
                result['skipped'].append(error)
            if read.any():
                images, target = images[read].to(batch.device), target[read].to(batch.device)
                compare(settings, images, target if labels else None)
                n = result['images'] + len(images)
                rows = summarize(settings, n, len(batch), labels)
                result.update(images=n, rows=rows, chosen=choose(rows, max_drop))
                save(result)
        result['complete'] = True
    if not result['images']:
        if not result['complete']:
            raise KeyboardInterrupt
        raise ValueError(f'None of the {len(result["skipped"])} pictures can be read.')
    return result
