#!/usr/bin/env python3
"""Table and plot of what `accuracy.py` has trained and timed.

    python benchmarks/accuracy_report.py output/cifar10 --plot accuracy.png

Runs of one configuration make one table, each paired with the dense baseline of the same seed. Of the difference to
that there are two 95 % intervals: over seeds, by the t distribution, says how much another seed might change it (it
takes two seeds, and is wide for two); over images, by the paired predictions on the validation pictures averaged over
the seeds, says how much other pictures might. A run that has not finished is named below the table and not in it.
"""
import argparse
import base64
import json
import math
import statistics
import zlib
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Tuple

import numpy as np

BASELINES = {'deit': 'dense', 'levit': 'levit'}
TIMED = ('family', 'epochs', 'batch_size', 'img_size', 'patch_size', 'width', 'depth', 'heads', 'amp', 'no_fused_attn')
Interval = Optional[Tuple[float, float]]


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('results', type=Path, nargs='?', default=Path('benchmarks/results/accuracy'))
    parser.add_argument('--plot', type=Path, metavar='PNG')
    args = parser.parse_args(argv)
    if not args.results.is_dir():
        parser.error(f'{args.results} is no folder')
    return args


def unpack(run: Dict[str, Any], what: str) -> np.ndarray:
    """Class indices from what `accuracy.py` has packed, one byte each or two."""
    dtype = np.uint8 if run['num_classes'] <= 256 else np.dtype('<u2')
    return np.frombuffer(zlib.decompress(base64.b64decode(run[what])), dtype=dtype)


def t_quantile(df: int) -> float:
    """The 97.5 % quantile of Student's t distribution, by bisection of its integrated density."""
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)

    def beyond_half(t: float) -> float:
        angle = np.linspace(0, math.atan(t / math.sqrt(df)), 2001)  # x = sqrt(df) tan(angle) makes the density smooth
        values = scale * np.cos(angle) ** (df - 1)
        return float((values[1:] + values[:-1]).sum() / 2 * (angle[1] - angle[0]))

    low, high = 0., 20.
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if beyond_half(middle) < 0.475 else (low, middle)
    return low


def seed_interval(differences: List[float]) -> Interval:
    """95 % interval of the mean of one difference per seed."""
    count = len(differences)
    if count < 2:
        return None
    half = t_quantile(count - 1) * statistics.stdev(differences) / math.sqrt(count)
    mean = statistics.mean(differences)
    return mean - half, mean + half


def image_interval(runs: List[Dict[str, Any]], baselines: List[Dict[str, Any]]) -> Interval:
    """95 % interval of the mean difference of right answers in points, over the pictures.

    Raises:
        ValueError: The runs were validated on different pictures.
    """
    differences = []
    for run, baseline in zip(runs, baselines):
        if run['labels'] != baseline['labels']:
            raise ValueError(f"{run['variant']} and {baseline['variant']} were validated on different pictures")
        right = [(unpack(r, 'predictions') == unpack(r, 'labels')).astype(float) for r in (run, baseline)]
        differences.append(right[0] - right[1])
    by_image = 100 * np.mean(differences, axis=0)
    half = 1.959964 * by_image.std(ddof=1) / math.sqrt(len(by_image))
    return float(by_image.mean() - half), float(by_image.mean() + half)


def split(reports: Iterable[Dict[str, Any]]) -> Tuple[List[Dict[str, Any]], List[Dict[str, Any]]]:
    """Runs and timings."""
    reports = list(reports)
    return [r for r in reports if 'variant' in r], [r for r in reports if 'seconds_per_image' in r]


def load(folder: Path) -> Tuple[List[Dict[str, Any]], List[Dict[str, Any]]]:
    """Runs and timings below a folder."""
    return split(json.loads(path.read_text()) for path in sorted(folder.rglob('*.json')))


def speed_up(timing: Optional[Dict[str, Any]], variant: str, what: str) -> Optional[float]:
    """Median of the ratios within a round."""
    times = timing['seconds_per_image'] if timing else {}
    if variant not in times:
        return None
    return statistics.median(a / b for a, b in zip(times[timing['baseline']][what], times[variant][what]))


def compare(runs: List[Dict[str, Any]], timings: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """One entry per configuration: its variants, each with figures and those of its seeds, the baseline first."""
    groups: Dict[str, List[Dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run['configuration'], sort_keys=True), []).append(run)
    comparisons = []
    for group in groups.values():
        configuration = group[0]['configuration']
        name = BASELINES[configuration['family']]
        finished = [run for run in group if run['finished']]
        baseline = {run['seed']: run for run in finished if run['variant'] == name}
        timing = next((t for t in timings if all(t['configuration'][k] == configuration[k] for k in TIMED)), None)
        variants = {}
        for variant in sorted({run['variant'] for run in finished}, key=lambda v: (v != name, v)):
            of_variant = sorted((run for run in finished if run['variant'] == variant), key=lambda run: run['seed'])
            paired = [run for run in of_variant if run['seed'] in baseline and variant != name]
            against = [baseline[run['seed']] for run in paired]
            differences = [run['top1'][-1] - other['top1'][-1] for run, other in zip(paired, against)]
            variants[variant] = {
                'runs': of_variant, 'top1': statistics.mean(run['top1'][-1] for run in of_variant),
                'seeds': [run['seed'] for run in of_variant], 'differences': differences,
                'seed_interval': seed_interval(differences),
                'image_interval': image_interval(paired, against) if paired else None,
                'train': speed_up(timing, variant, 'train'), 'inference': speed_up(timing, variant, 'inference'),
            }
        comparisons.append({
            'configuration': configuration, 'variants': variants, 'runs': group, 'timing': timing,
            'unfinished': [run for run in group if not run['finished']]})
    return comparisons


def setting(configuration: Dict[str, Any]) -> str:
    """Number format and kind of attention, in words."""
    return f"{configuration['amp'] or 'float32'}, {'explicit' if configuration['no_fused_attn'] else 'fused'} attention"


def title(configuration: Dict[str, Any]) -> str:
    c = configuration
    if c['family'] == 'deit':
        model = f"DeiT, width {c['width']}, depth {c['depth']}, {c['heads']} heads, patch {c['patch_size']}"
    else:
        model = f"LeViT, widths {', '.join(str(c['width'] * i) for i in (1, 2, 3))}, stem s8"
    return f"{model}, {c['img_size']} x {c['img_size']}: {c['epochs']} epochs, lr {c['lr']:g}, {setting(c)}"


def table(comparisons: List[Dict[str, Any]]) -> str:
    """Accuracy and speed of every configuration, as markdown."""

    def interval(value: Interval) -> str:
        return '' if value is None else f'{value[0]:+.2f} to {value[1]:+.2f}'

    def ratio(value: Optional[float]) -> str:
        return '' if value is None else f'{value:.2f}'

    lines = []
    for comparison in comparisons:
        lines += ['', f"**{title(comparison['configuration'])}**", '']
        if comparison['variants']:
            lines += [
                '| | seeds | top-1 %, mean (each) | points above dense | 95 % over seeds | 95 % over images | '
                'training, times as fast | inference, times as fast |',
                '|---|---|---|---|---|---|---|---|']
        for variant, v in comparison['variants'].items():
            each = ', '.join(f"{run['top1'][-1]:.2f}" for run in v['runs'])
            difference = f"{statistics.mean(v['differences']):+.2f}" if v['differences'] else ''
            lines.append(
                f"| {variant} | {', '.join(map(str, v['seeds']))} | **{v['top1']:.2f}** ({each}) | {difference} | "
                f"{interval(v['seed_interval'])} | {interval(v['image_interval'])} | {ratio(v['train'])} | "
                f"{ratio(v['inference'])} |")
        if comparison['unfinished']:
            lines += ['', 'Not finished: ' + '; '.join(
                f"{run['variant']}, seed {run['seed']}: {run['top1'][-1]:.2f} % after {len(run['top1'])} of "
                f"{run['configuration']['epochs']} epochs" for run in comparison['unfinished']) + '.']
    return '\n'.join(lines).strip()


def speed_table(timings: List[Dict[str, Any]]) -> str:
    """Microseconds per image of every timing, medians, and the ratios within a round."""
    lines = []
    for timing in sorted(timings, key=lambda timing: timing['configuration']['img_size']):
        c, machine = timing['configuration'], timing['machine']
        what = 'DeiT' if c['family'] == 'deit' else 'LeViT'
        lines += [
            '', f"**{what} {c['img_size']} x {c['img_size']}, batch {c['batch_size']}, {setting(c)}** "
            f"({machine['gpu'] or machine['cpu']}, {machine['threads']} of {machine['cores']} cores; torch "
            f"{timing['versions']['torch']}, timm {timing['versions']['timm']}, commit {timing['commit'][:10]})", '',
            '| | training, us per image | times as fast (lowest - highest) | inference, us per image | '
            'times as fast (lowest - highest) |', '|---|---|---|---|---|']
        baseline = timing['seconds_per_image'][timing['baseline']]
        for variant, times in timing['seconds_per_image'].items():
            line = f'| {variant} |'
            for k in ('train', 'inference'):
                ratios = [a / b for a, b in zip(baseline[k], times[k])]
                line += (f' {1e6 * statistics.median(times[k]):.0f} | **{statistics.median(ratios):.2f}** '
                         f'({min(ratios):.2f} - {max(ratios):.2f}) |')
            lines.append(line)
    return '\n'.join(lines).strip()


def plot(comparisons: List[Dict[str, Any]]) -> Any:
    """Draw top-1 by epoch, dotted if unfinished, and against the speed of training and of inference.

    Returns a figure of matplotlib, with a row per configuration.
    """
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    if not comparisons:
        raise SystemExit('no run has begun, there is nothing to plot')
    columns = 3 if any(comparison['variants'] for comparison in comparisons) else 1  # speed is that of finished runs
    figure, axes = plt.subplots(
        len(comparisons), columns, figsize=(3.5 * columns, 3.8 * len(comparisons)), squeeze=False, layout='constrained')
    for row, comparison in zip(axes, comparisons):
        for i, (variant, v) in enumerate(comparison['variants'].items()):
            style = dict(color=f'C{i}', label=variant)
            curve = np.mean([run['top1'] for run in v['runs']], axis=0)
            row[0].plot(np.arange(1, len(curve) + 1), curve, **style)
            for axis, what in zip(row[1:], ('train', 'inference')):
                if v[what] is not None:
                    top1 = [run['top1'][-1] for run in v['runs']]
                    axis.plot([v[what]] * len(top1), top1, '.', color=f'C{i}', alpha=0.5)
                    axis.plot(v[what], v['top1'], 'os^Dv<>p'[i % 8], ms=8, **style)
        for i, run in enumerate(comparison['unfinished'], len(comparison['variants'])):
            label = f"{run['variant']}, seed {run['seed']}, unfinished"
            row[0].plot(np.arange(1, len(run['top1']) + 1), run['top1'], ':', color=f'C{i}', label=label)
        row[0].set(xlabel='epoch', ylabel='top-1 (%)', title='top-1 by epoch\n(mean of the seeds)')
        row[0].legend(frameon=False, loc='lower right', fontsize='small', labelspacing=0.2)
        for axis, what in zip(row[1:], ('training', 'inference')):
            axis.set(
                xlabel=f'{what}, times as fast as dense', ylabel='top-1 (%)',
                title=f'top-1 against {what} speed\n(small: one seed)')
        for axis in row:
            axis.grid(alpha=0.3)
            axis.set_visible(axis.has_data())
    return figure


def main(argv: Optional[List[str]] = None) -> List[Dict[str, Any]]:
    args = parse_args(argv)
    runs, timings = load(args.results)
    comparisons = compare(runs, timings)
    print(table(comparisons) + '\n\n' + speed_table(timings))
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(comparisons).savefig(args.plot, dpi=130)
    return comparisons


if __name__ == '__main__':
    main()
