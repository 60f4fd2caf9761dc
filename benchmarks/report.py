#!/usr/bin/env python3
"""Write the tables and plots of the documentation from the files in benchmarks/results.

    python benchmarks/report.py                              # README.md and all pages of docs/
    python benchmarks/report.py --accuracy output/cifar10    # only print the tables of runs of accuracy.py

A page marks where a table goes, which replaces what is between the marks, and which file a plot is drawn to:

    <!-- table: speed file=speed-cpu batch_size=32,8 -->
    <!-- end -->
    <!-- plot: speed docs/speed.png file=speed-cpu -->

The first word is a key of TABLES or PLOTS; the name of a plot's file follows. The others choose rows by their values,
and `file` result files by how their names begin, by default like the first word.

Runs of accuracy.py with one configuration make one table, each paired with the dense baseline of the same seed. Of the
difference to that there are two 95 % intervals: over seeds says how much another seed might change it; over images, by
the paired predictions averaged over the seeds, how much other pictures might.
"""
import argparse
import base64
import json
import math
import re
import statistics
import zlib
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

import harness
import matplotlib
import numpy as np
import timm
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator
from scipy import stats

from timm_evovit.hub import PUBLISHED
from timm_evovit.tools import sweep

matplotlib.use('Agg')
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / 'benchmarks' / 'results'
TABLE = re.compile(r'(<!-- table: ([^>]*) -->\n).*?(<!-- end -->)', re.DOTALL)
PLOT = re.compile('<!-- plot: ([^ ]*) ([^ ]*)([^>]*) -->')
TOP1 = {  # ImageNet-1k in the papers; LeViT's of 1000 epochs, Evo-LeViT's of 300
    **{name: top1 for name, (top1, _) in PUBLISHED.items()},
    'deit_tiny_patch16_224': 72.2, 'deit_small_patch16_224': 79.8, 'deit_base_patch16_224': 81.8,
    'deit_base_patch16_384': 83.1,
    'levit_128s': 76.6, 'levit_128': 78.6, 'levit_192': 80.0, 'levit_256': 81.6, 'levit_384': 82.6,
}
TIMED = ('family', 'epochs', 'batch_size', 'img_size', 'patch_size', 'width', 'depth', 'heads', 'amp', 'no_fused_attn')
RUNTIMES = {  # of files, by how their names end
    '.dynamic.onnx': 'ONNX Runtime, 8 bits, dynamic', '.int8.onnx': 'ONNX Runtime, 8 bits, static',
    '.onnx': 'ONNX Runtime',
    '.int8.xml': 'OpenVINO, 8 bits, static', '.xml': 'OpenVINO'}
LINES = {  # of the plot of accuracy.py, by what they are called
    'similarity, trained at each keep ratio': ('dense', *(f'evo-similarity@{r}' for r in (0.4, 0.3, 0.2))),
    'similarity, one model for all': tuple(f'evo-elastic{r}' for r in ('@1', '@0.7', '@0.5', '', '@0.3')),
    'dense, smaller models and pictures': ('dense', 'dense-24-pixels', 'dense-4-blocks'),
    "class attention, the paper's": ('evo-stage@1', 'evo-stage@0.7', 'evo-stage')}
Row = Dict[str, Any]


def read(results: Path, name: str, **conditions: str) -> List[Row]:
    """Rows that a mark asks for, each with its file under 'of' and its baseline under 'dense'.

    Baselines of speed.py are in the rows of others only. A run of accuracy.py is one row.

    Raises:
        ValueError: There are none.
    """
    prefix, rows = conditions.pop('file', name), []
    for path in sorted(results.rglob('*.json')):
        if path.relative_to(results).as_posix().startswith(prefix):
            of = json.loads(path.read_text())
            found = of.get('rows', [of.get('configuration')])
            by_run = {(row.get('run'), row.get('seed'), row.get('model')): row for row in found}
            rows += [{**row, 'of': of, 'dense': by_run.get((row.get('run'), row.get('seed'), row.get('baseline')))}
                     for row in found if of.get('benchmark') != 'speed' or row['model'] != row['baseline']]
    rows = [row for row in rows if all(str(row[k]) in values.split(',') for k, values in conditions.items())]
    if not rows:
        raise ValueError(f'{name}: {results.name}/{prefix}*.json has no rows of {conditions}')
    return rows


def grouped(rows: Iterable[Row], key: str) -> Dict[Any, List[Row]]:
    groups: Dict[Any, List[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def setting(row: Row) -> str:
    """How a model was run, where it differs from inference in float32."""
    kwargs = dict(row['model_kwargs'])
    layerwise = kwargs.pop('selection', '') == 'layer'
    words = [
        'training step' if row['mode'] == 'train' else '', 'layer-wise' if layerwise else '',
        row['dtype'].replace('float32', ''), 'compiled' if row['compile'] else '',
        (row['compile'] or '').replace('default', ''),
        f"{row['img_size']} x {row['img_size']}" if row['img_size'] != 224 else '',
        *(f'{k}={v}' for k, v in kwargs.items())]
    return ', '.join(filter(None, words))


def made_with(rows: List[Row]) -> str:
    """One sentence per result file: hardware, versions, commit."""
    lines = []
    for of in (row['of'] for row in rows):
        m, v, commit = of['machine'], of['versions'], (of['commit'] or 'unknown')[:10]
        where = m['gpu'] or f"{m['cpu']} ({m['instructions']}), {m['threads']} of {m['cores']} cores"
        memory = ', memory kept by the allocator' if 'MALLOC_TRIM_THRESHOLD_' in of['environment'] else ''
        lines.append(f"{where}{memory}; torch {v['torch']}, timm {v['timm']}, {of['date']}, commit {commit}.")
    return '\n'.join(dict.fromkeys(lines))


def markdown(header: Iterable[str], lines: Iterable[Iterable[Any]]) -> str:
    header = list(header)
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in [header, ['---'] * len(header), *lines])


def table(columns: Dict[str, Callable[[Row], Any]], key: str = '') -> Callable[[List[Row]], str]:
    """A table with a line for each row, or for each value of `key`, whose rows share the first two columns.

    Columns are given by what they show of a row, None for nothing.
    """
    def text(rows: List[Row]) -> str:
        lines = []
        for of in grouped(rows, key).values() if key else [[row] for row in rows]:
            cells = [[str(cell(row)) for row in of if cell(row) is not None] for cell in columns.values()]
            lines.append([', '.join(cell if i > 1 else cell[:1]) for i, cell in enumerate(cells)])
        return f'{markdown(columns, lines)}\n\n{made_with(rows)}'

    return text


def ratio(r: Row) -> float:
    """Multiply-adds of the dense model over those of this one, which are not known of an ONNX file."""
    return r['dense']['multiply_adds'] / (r['multiply_adds'] or math.nan)


def speed_up(r: Row) -> str:
    return f"**{r['speed_up']:.2f}** ({r['speed_up_min']:.2f} - {r['speed_up_max']:.2f})"


def with_error(r: Row, key: str, digits: int = 2) -> Optional[str]:
    return f"{r[key]:.{digits}f} ± {r[f'{key}_error']:.{digits}f}" if key in r and r['method'] != 'dense' else None


def in_runtime(r: Row) -> Tuple[str, str]:
    """Name of a model in a file, and what runs it."""
    suffix = next(suffix for suffix in RUNTIMES if r['model'].endswith(suffix))
    return Path(r['model']).name.removesuffix(suffix), RUNTIMES[suffix]


speed_table = table({
    'model': lambda r: f"`{r['model']}`", '': setting, 'batch': lambda r: r['batch_size'],
    'multiply-adds ratio': lambda r: f'{ratio(r):.3f}'.replace('nan', ''),
    'speed-up (lowest - highest)': speed_up,
    'img/s, dense / this': lambda r: ' / '.join(
        f"{x['images_per_second']:{'.0f' if x['images_per_second'] >= 100 else '.3g'}}" for x in (r['dense'], r)),
    'peak memory (MB), dense / this': lambda r: ' / '.join(f"{x['peak_memory'] / 1e6:.0f}" for x in (r['dense'], r))})
dense_features_table = table({
    'backbone': lambda r: r['model'],
    'share of multiply-adds': lambda r: f'{1 / ratio(r):.3f}',
    'mean IoU %': lambda r: f"{r['mean_iou']:.2f}",
    'points lost': lambda r: f"{r['dense']['mean_iou'] - r['mean_iou']:.2f}" if r['model'] != r['baseline'] else None,
    'speed-up': lambda r: f"{r['speed_up']:.2f}"}, 'model')
finetuned_table = table({
    'method': lambda r: r['method'], 'share of multiply-adds': lambda r: f"{r['share']:.3f}",
    'top-1 %, before': lambda r: f"{r['before']:.2f}", 'fine-tuned': lambda r: f"{r['top1']:.2f}",
    'points lost to dense, fine-tuned': lambda r: with_error(r, 'lost')}, 'method')
photographs_table = table({  # of features, the ratio of the means and the geometric mean over the pictures
    'method': lambda r: r['method'], 'share of multiply-adds': lambda r: f"{r['share']:.3f}",
    **{header: lambda r, key=key: f"{r[f'{key}, of ToMe']:.2f}, {r[f'{key}, geometric']:.2f} ± "
       f"{100 * r[f'{key}, geometric error']:.0f} %" for header, key in (
           ('class token', 'class token'), ('patches', 'patches'), ('average of the patches', 'average'))},
    'saliency map': lambda r: f"{r['saliency']:.3f}"})


deploy_accuracy_table = table({
    'model': lambda r: r['model'], 'in': lambda r: r['method'], 'top-1 %': lambda r: f"{r['top1']:.2f}",
    'points lost': lambda r: with_error(r, 'lost'), 'divergence, thousandths': lambda r: f"{r['kl']:.1f}",
    'pairs as in float32': lambda r: f"{r['same_pairs']:.1f} %" if 'same_pairs' in r else None})


def deploy_speed_table(rows: List[Row]) -> str:
    """Speed-up of files by batch size, in the order of names and runtimes."""
    return table({
        'model': lambda r: f'`{in_runtime(r)[0]}`', 'in': lambda r: in_runtime(r)[1],
        **{f'batch of {b}': lambda r, b=b: speed_up(r) if r['batch_size'] == b else None for b in (1, 8, 32)},
        'ms per picture at these, dense / this': lambda r: ' / '.join(
            f"{1000 / x['images_per_second']:.0f}" for x in (r['dense'], r))}, 'model')(
        sorted(rows, key=lambda r: (*in_runtime(r), r['batch_size'])))


def without_training_table(rows: List[Row]) -> str:
    """Accuracy of trained models at the share of multiply-adds that a method leaves, and speed of another."""
    def speed(small: bool) -> Callable[[Row], Optional[str]]:
        return lambda r: f"{speed_up(r)} of {1 / r['share']:.2f}" if (
            'speed_up' in r and r['model'].startswith('dense') == small) else None

    models = ', '.join(f"{r['top1']:.2f} %" for r in rows if r['method'] == 'dense' and 'top1' in r)
    return table({
        'method': lambda r: r['method'],
        'share of multiply-adds': lambda r: f"{r['share']:.3f}" if 'top1' in r else None,
        f'points lost, of {models}': lambda r: with_error(r, 'lost'),
        'divergence, thousandths': lambda r: with_error(r, 'kl', 1),
        'speed-up of the first of these models, of 1 / share': speed(small=True),
        'speed-up of DeiT-S, of 1 / share': speed(small=False)}, 'method')([r for r in rows if r['method'] != 'dense'])


def models_table(rows: List[Row]) -> str:
    def top1(r: Row) -> str:
        dense = TOP1.get(r['model'].removeprefix('evo_'))
        return str(TOP1.get(r['model'], 'not published')) + (f' ({dense})' if dense else '')

    def tags(r: Row) -> str:
        names = (name.partition('.')[2] for name in timm.models.get_arch_pretrained_cfgs(r['model']))
        return ', '.join(f'`{tag}`' for tag in sorted(names, reverse=True) if tag != 'untrained')

    lines = [[
        f"`{r['model']}`", f"{r['params'] / 1e6:.2f} M",
        f"{r['multiply_adds'] / 1e9:.3f} ({r['dense']['multiply_adds'] / 1e9:.3f})", top1(r), tags(r)] for r in rows]
    return markdown(['model', 'parameters', 'G multiply-adds (dense model)', 'top-1 in the paper (dense model)',
                     'weights'], lines)


def families_table(rows: List[Row]) -> str:
    """Architectures that evolve by family, and those that do not by the reason."""
    lines = [[r['model'], r['architectures'], r['evolve'], f"`{r['such_as']}`"] for r in rows]
    total = [sum(r[key] for r in rows) for key in ('architectures', 'evolve')]
    refused = [{'name': f'`{k}`', 'reason': reason.rstrip('.')} for r in rows for k, reason in r['refused'].items()]
    reasons = [[', '.join(r['name'] for r in of), reason] for reason, of in grouped(refused, 'reason').items()]
    families = markdown(['family', 'architectures', 'evolve', 'such as'], [*lines, ['all', *total, '']])
    return families + '\n\n' + markdown(['not', 'because'], reasons)


def sweep_table(rows: List[Row]) -> str:
    """What `timm-evovit sweep` has printed."""
    return '\n'.join(['```text', sweep.table(rows[0]['of']['rows']), '', sweep.describe(rows[0]['of']), '```'])


def interval(differences: Sequence[float]) -> Optional[Tuple[float, float]]:
    """95 % interval of their mean, by Student's t."""
    if len(differences) < 2:
        return None
    mean, half = np.mean(differences), stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return mean - half, mean + half


def right(run: Row) -> np.ndarray:
    """100 for each picture that is classified rightly, 0 for the others."""
    dtype = np.uint8 if run['num_classes'] <= 256 else np.dtype('<u2')
    predictions, labels = (
        np.frombuffer(zlib.decompress(base64.b64decode(run[key])), dtype) for key in ('predictions', 'labels'))
    return 100. * (predictions == labels)


def timed(timing: Row, variant: str) -> Dict[str, Row]:
    """What was measured of a variant in training and inference, over the baseline. Nothing if it was not timed."""
    times = timing.get('seconds_per_image', {})
    return {what: harness.summarize(found, times[timing['baseline']][what], 1)
            for what, found in times.get(variant, {}).items()}


def number_format(configuration: Row) -> str:
    attention = 'explicit' if configuration['no_fused_attn'] else 'fused'
    return f"{configuration['amp'] or 'float32'}, {attention} attention"


def title(configuration: Row) -> str:
    c = configuration
    model = f"LeViT, widths {', '.join(str(c['width'] * i) for i in (1, 2, 3))}, stem s8"
    if c['family'] == 'deit':
        model = f"DeiT, width {c['width']}, depth {c['depth']}, {c['heads']} heads, patch {c['patch_size']}"
    return f"{model}, {c['img_size']} x {c['img_size']}: {c['epochs']} epochs, lr {c['lr']:g}, {number_format(c)}"


def compare(rows: List[Row]) -> Dict[str, Dict[str, Row]]:
    """By the title of a configuration and the variant, the baseline first, figures of all finished runs.

    Raises:
        ValueError: The runs of a seed were validated on different pictures.
    """
    timings = [row['of'] for row in rows if 'seconds_per_image' in row['of']]
    timings.sort(key=lambda timing: timing.get('date', ''), reverse=True)
    runs = [{**row['of'], 'title': title(row)} for row in rows if row['of'].get('finished')]
    runs.sort(key=lambda run: (run['variant'] not in ('dense', 'levit'), run['variant'], run['seed']))
    comparisons: Dict[str, Dict[str, Row]] = {}
    for name, of_title in grouped(runs, 'title').items():
        c, variants = of_title[0]['configuration'], grouped(of_title, 'variant')
        fitting = [t for t in timings if all(t['configuration'][k] == c[k] for k in TIMED)]
        baselines = {run['seed']: run for run in next(iter(variants.values()))}
        comparisons[name] = {}
        for variant, of in variants.items():
            pairs = [(run, baselines[run['seed']]) for run in of if run is not baselines.get(run['seed'], run)]
            if any(run['labels'] != dense['labels'] for run, dense in pairs):
                raise ValueError(f'{variant} and the dense model were validated on different pictures')
            differences = [run['top1'][-1] - dense['top1'][-1] for run, dense in pairs]
            by_image = np.mean([right(run) - right(dense) for run, dense in pairs], axis=0) if pairs else ()
            timing = next((t for t in fitting if variant in t['seconds_per_image']), {})
            comparisons[name][variant] = {
                'runs': of, 'top1': [run['top1'][-1] for run in of], 'differences': differences,
                'over_seeds': interval(differences), 'over_images': interval(by_image), 'timed': timed(timing, variant)}
    return comparisons


def accuracy_table(rows: List[Row]) -> str:
    """Accuracy and speed of every configuration."""
    header = ['', 'seeds', 'top-1 %, mean (each)', 'points above dense', '95 % over seeds', '95 % over images',
              'training, times as fast', 'inference, times as fast']
    return '\n\n'.join(f'**{name}**\n\n' + markdown(header, [[
        variant, ', '.join(str(run['seed']) for run in v['runs']),
        f"**{statistics.mean(v['top1']):.2f}** ({', '.join(f'{top1:.2f}' for top1 in v['top1'])})",
        f"{statistics.mean(v['differences']):+.2f}" if v['differences'] else '',
        *('{:+.2f} to {:+.2f}'.format(*v[over]) if v[over] else '' for over in ('over_seeds', 'over_images')),
        *(f"{v['timed'][what]['speed_up']:.2f}" if v['timed'] else '' for what in ('train', 'inference'))]
        for variant, v in variants.items()]) for name, variants in compare(rows).items())


def accuracy_speed_table(rows: List[Row]) -> str:
    """Microseconds per image of every timing, medians, and the ratios within a round."""
    header = ['', 'training, us per image', 'times as fast (lowest - highest)', 'inference, us per image',
              'times as fast (lowest - highest)']
    tables = []
    for row in sorted((row for row in rows if 'seconds_per_image' in row['of']), key=lambda row: row['img_size']):
        of, m, v = row['of'], row['of']['machine'], row['of']['versions']
        lines = [[variant, *(cell for r in timed(of, variant).values() for cell in (
            f"{1e6 / r['images_per_second']:.0f}", speed_up(r)))] for variant in of['seconds_per_image']]
        tables.append(
            f"**{title(row).split(',')[0]} {row['img_size']} x {row['img_size']}, batch {row['batch_size']}, "
            f"{number_format(row)}** ({m['gpu'] or m['cpu']}, {m['threads']} of {m['cores']} cores; "
            f"torch {v['torch']}, timm {v['timm']}, commit {of['commit'][:10]})\n\n{markdown(header, lines)}")
    return '\n\n'.join(tables)


def accuracy_plot(rows: List[Row]) -> plt.Figure:
    """Top-1 of small models against their speed in inference, the mean of the seeds and each of them."""
    (variants,) = compare(rows).values()
    figure, axis = plt.subplots(figsize=(7.2, 4.2), layout='constrained')
    for (label, names), marker, line in zip(LINES.items(), 'osD^', ('-', '--', ':', '-.')):
        found = [variants[name] for name in names if variants.get(name, {}).get('timed')]
        points = sorted((v['timed']['inference']['speed_up'], statistics.mean(v['top1'])) for v in found)
        axis.plot(*zip(*points), marker=marker, ls=line, ms=8, label=label)
        for v in found:
            axis.plot([v['timed']['inference']['speed_up']] * len(v['top1']), v['top1'], 'k.', ms=3)
    axis.set(xlabel='times as fast as dense in inference, measured', ylabel='top-1 on CIFAR-10 (%)')
    axis.grid(alpha=0.3)
    figure.legend(handlelength=4, frameon=False, loc='outside upper center', ncols=2)
    return figure


def speed_plot(rows: List[Row]) -> plt.Figure:
    """Speed-up of each row with its range, and the ratio of multiply-adds."""
    y = range(len(rows))
    figure, axis = plt.subplots(figsize=(7.2, 1.2 + 0.27 * len(rows)), layout='constrained')
    axis.hlines(y, [r['speed_up_min'] for r in rows], [r['speed_up_max'] for r in rows], color='C0', lw=2, alpha=0.4)
    axis.plot([r['speed_up'] for r in rows], y, 'o', color='C0', label='measured, with its range')
    axis.plot([ratio(r) for r in rows], y, '|', color='C3', ms=11, mew=2, label='ratio of multiply-adds')
    axis.axvline(1, color='0.5', lw=1)
    names = [', '.join(filter(None, [r['model'], setting(r), f"batch {r['batch_size']}"])) for r in rows]
    axis.set_yticks(y, names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel('times as fast as the dense model')
    axis.grid(axis='x', alpha=0.3)
    figure.legend(loc='outside upper center', ncols=2, frameon=False, fontsize=8)
    return figure


def without_training_plot(rows: List[Row]) -> plt.Figure:
    """Points of top-1 that trained models lose against measured speed-up, by method."""
    timed = {r['method']: r['speed_up'] for r in rows if 'speed_up' in r and not r['model'].startswith('dense')}
    points: Dict[str, List[Tuple[float, float, float]]] = {}
    for method, of in grouped((r for r in rows if 'lost' in r and r['method'] in timed), 'method').items():
        mean, error = statistics.mean(r['lost'] for r in of), math.hypot(*(r['lost_error'] for r in of)) / len(of)
        points.setdefault(method.rpartition(' ')[0], []).append((timed[method], mean, error))
    points.pop('', None)  # the dense model itself
    figure, axis = plt.subplots(figsize=(7.2, 4.2), layout='constrained')
    axis.plot(1, 0, 'k*', ms=10, ls='', label='dense')
    labels = {'similarity': 'evolve, by similarity', 'attention': "Evo-DeiT, by class attention (paper's)"}
    lines = ['-', '--', '-.', ':', (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (4, 4))]
    for (name, of), marker, line in zip(points.items(), 'os^DvPX', lines):
        axis.errorbar(*zip(*sorted(of)), marker=marker, ls=line, lw=2.2 if name == 'similarity' else 1.4, capsize=2,
                      label=labels.get(name, name))
    # a square root gives room to small losses, and shows the large ones too
    axis.set_yscale('function', functions=(lambda y: np.sign(y) * np.abs(y) ** 0.5, lambda y: np.sign(y) * y ** 2))
    axis.yaxis.set_major_locator(FixedLocator((0, 1, 2, 5, 10, 20, 50)))
    axis.invert_yaxis()
    axis.set(xlabel='times as fast as the dense model, measured', ylabel='points of top-1 lost (square root scale)')
    axis.grid(alpha=0.3)
    figure.legend(handlelength=4, frameon=False, loc='outside upper center', ncols=3)
    return figure


TABLES: Dict[str, Callable[[List[Row]], str]] = {
    'speed': speed_table, 'models': models_table, 'dense_features': dense_features_table, 'families': families_table,
    'without_training': without_training_table, 'finetuned': finetuned_table, 'photographs': photographs_table,
    'sweep': sweep_table, 'deploy-speed': deploy_speed_table, 'deploy-accuracy': deploy_accuracy_table,
    'accuracy': accuracy_table, 'accuracy_speed': accuracy_speed_table}
PLOTS: Dict[str, Callable[[List[Row]], plt.Figure]] = {
    'speed': speed_plot, 'without_training': without_training_plot, 'accuracy': accuracy_plot,
    'sweep': lambda rows: sweep.plot(rows[0]['of'])}


def read_mark(results: Path, text: str) -> List[Row]:
    name, *words = text.split()
    return read(results, name, **dict(word.split('=', 1) for word in words))


def fill(page: Path, results: Path = RESULTS) -> str:
    """The text of a page with its tables as the results say."""
    return TABLE.sub(lambda mark: mark[1] + TABLES[mark[2].split()[0]](read_mark(results, mark[2])) + '\n' + mark[3],
                     page.read_text())


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('pages', nargs='*', type=Path, default=[ROOT / 'README.md', *sorted(ROOT.glob('docs/*.md'))])
    parser.add_argument('--results', type=Path, default=RESULTS)
    parser.add_argument('--accuracy', type=Path, metavar='DIR', help='print the tables of runs of accuracy.py')
    args = parser.parse_args(argv)
    if args.accuracy:
        rows = read(args.accuracy, 'accuracy', file='')
        print(accuracy_table(rows), accuracy_speed_table(rows), sep='\n\n')
    for page in args.pages if not args.accuracy else ():
        page.write_text(fill(page, args.results))
        for name, file, conditions in PLOT.findall(page.read_text()):
            PLOTS[name](read_mark(args.results, name + conditions)).savefig(page.parent / file, dpi=130)


if __name__ == '__main__':
    main()
