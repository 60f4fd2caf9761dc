#!/usr/bin/env python3
"""Write the tables and plots of the documentation from the files in benchmarks/results.

    python benchmarks/report.py                              # README.md and all pages of docs/
    python benchmarks/report.py --accuracy output/cifar10    # only print the tables of runs of accuracy.py

README.md beside this file describes the marks in the pages.
"""
import argparse
import json
import math
import re
import statistics
from contextlib import suppress
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Union

import accuracy
import matplotlib
import numpy as np
import timm
from matplotlib.figure import Figure
from scipy import stats

from timm_evovit.hub import PUBLISHED
from timm_evovit.tools import sweep

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / 'benchmarks' / 'results'
TABLE = re.compile(r'(<!-- table: ([^>]*) -->\n).*?(<!-- end -->)', re.DOTALL)
PLOT = re.compile('<!-- plot: ([^ ]*) ([^ ]*)([^>]*) -->')
TOP1 = {  # ImageNet-1k in the papers; LeViT's of 1000 epochs, Evo-LeViT's of 300
    **{name: top1 for name, (top1, _) in PUBLISHED.items()},
    'deit_tiny_patch16_224': 72.2, 'deit_small_patch16_224': 79.8, 'deit_base_patch16_224': 81.8,
    'deit_base_patch16_384': 83.1, 'levit_128s': 76.6, 'levit_128': 78.6, 'levit_192': 80.0, 'levit_256': 81.6,
    'levit_384': 82.6,
}
RUNTIMES = {  # of files, by how their names end
    '.dynamic.onnx': 'ONNX Runtime, 8 bits, dynamic', '.int8.onnx': 'ONNX Runtime, 8 bits, static',
    '.onnx': 'ONNX Runtime', '.int8.xml': 'OpenVINO, 8 bits, static', '.xml': 'OpenVINO', '': 'PyTorch'}
LINES = {  # of the plot of accuracy.py, by what they are called
    'similarity, trained at each keep ratio': ('dense', *(f'evo-similarity@{r}' for r in (0.4, 0.3, 0.2))),
    'similarity, one model for all': tuple(f'evo-elastic{r}' for r in ('@1', '@0.7', '@0.5', '', '@0.3')),
    'dense, smaller pictures or fewer blocks': ('dense', 'dense-24-pixels', 'dense-4-blocks'),
    "class attention, the paper's": ('evo-stage@1', 'evo-stage@0.7', 'evo-stage')}
SPEED_UP = '**{speed_up:.2f}** ({speed_up_min:.2f} - {speed_up_max:.2f})'
LOST = '{lost:.2f} ± {lost_error:.2f}'
matplotlib.rcParams.update({
    'figure.figsize': (7.2, 4.2), 'figure.constrained_layout.use': True, 'axes.grid': True, 'grid.alpha': 0.3,
    'legend.frameon': False})
Row = Dict[str, Any]
Column = Union[str, Callable[[Row], str]]  # what it shows of a row, a format or a function


def read(mark: str, results: Path) -> List[Row]:
    """Rows that a mark asks for, each with its file under 'of' and its baseline under 'dense'.

    Baselines of speed.py are in the rows of others only. Of accuracy.py, a run is a row, and a variant that was timed.
    """
    name, *words = mark.split()
    conditions = dict(word.split('=', 1) for word in words)
    prefix, rows = conditions.pop('file', name), []
    for path in sorted(results.rglob('*.json')):
        if path.relative_to(results).as_posix().startswith(tuple(prefix.split(','))):
            of = json.loads(path.read_text())
            found = of['rows'] if 'rows' in of else [{**of['configuration'], **of}]
            by_run = {(row.get('run'), row.get('seed'), row.get('model')): row for row in found}
            rows += [{**row, 'of': of, 'dense': by_run.get((row.get('run'), row.get('seed'), row.get('baseline')))}
                     for row in found if of.get('benchmark') != 'speed' or row['model'] != row['baseline']]
    rows = [row for row in rows if all(str(row[k]) in values.split(',') for k, values in conditions.items())]
    if not rows:
        raise ValueError(f'{results.name}/{prefix}*.json has no rows of {conditions}')
    for row in rows:
        if row['dense'] and row.get('multiply_adds'):  # which are not known of an ONNX file
            row['ratio'] = row['dense']['multiply_adds'] / row['multiply_adds']
    return rows


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> Dict[Any, List[Row]]:
    groups: Dict[Any, List[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def markdown(header: Sequence[str], lines: Iterable[Iterable[Any]]) -> str:
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in [header, ['---'] * len(header), *lines])


def table(columns: Dict[str, Column], rows: List[Row], key: Callable[[Row], Any] = id) -> str:
    """A line for the rows of each `key`, by default one for each row. They share the first two columns.

    A column shows nothing of a row that does not have what it asks for. One that shows nothing at all is left out.
    """
    def cells(column: Column, of: List[Row]) -> Iterator[str]:
        for row in of:
            with suppress(KeyError):
                yield column.format_map(row) if isinstance(column, str) else column(row)

    lines = []
    for of in grouped(rows, key).values():
        found = [list(filter(None, cells(column, of))) for column in columns.values()]
        lines.append([', '.join(cell if i > 1 else cell[:1]) for i, cell in enumerate(found)])
    shown = [i for i, column in enumerate(zip(*lines)) if any(column)]
    return markdown([[*columns][i] for i in shown], [[line[i] for i in shown] for line in lines])


def measured(columns: Dict[str, Column], rows: List[Row], key: Callable[[Row], Any] = id) -> str:
    """A table, and below it one sentence per result file: hardware, versions, commit."""
    lines = []
    for of in (row['of'] for row in rows if 'of' in row):
        m, v, commit = of['machine'], of['versions'], (of['commit'] or 'unknown')[:10]
        where = m['gpu'] or f"{m['cpu']} ({m['instructions']}), {m['threads']} of {m['cores']} cores"
        memory = ', memory kept by the allocator' if 'MALLOC_TRIM_THRESHOLD_' in of['environment'] else ''
        date = of.get('date', 'no date')
        lines.append(f"{where}{memory}; torch {v['torch']}, timm {v['timm']}, {date}, commit {commit}.")
    return '\n'.join([table(columns, rows, key), '', *dict.fromkeys(lines)])


def setting(row: Row) -> str:
    """How a model was run, where it differs from inference in float32."""
    words = [
        {'train': 'training step', 'blocks': 'the blocks alone'}.get(row['mode'], ''),
        row['dtype'].replace('float32', ''),
        'compiled' if row['compile'] else '', (row['compile'] or '').replace('default', ''),
        '{img_size} x {img_size}'.format_map(row) if row['img_size'] != 224 else '',
        *(f'{k}={v}'.replace('selection=layer', 'layer-wise') for k, v in row['model_kwargs'].items())]
    return ', '.join(filter(None, words))


def deployed(rows: List[Row]) -> List[Row]:
    """Rows in the order of models, runtimes and batch sizes, with names of the first two."""
    for r in rows:
        suffix = next(suffix for suffix in RUNTIMES if r['model'].endswith(suffix))
        model = '{base}-{keep_ratio}'.format_map(r['model_kwargs']) if r['model_kwargs'] else r['model']
        runtime = RUNTIMES[suffix] + (', compiled' if r['compile'] else '')
        r.update(name=Path(model).name.removesuffix(suffix), runtime=runtime)
    return sorted(rows, key=itemgetter('name', 'runtime', 'batch_size'))


def deploy_speed_table(rows: List[Row]) -> str:
    """Speed-up by batch size."""
    return measured({
        'model': '`{name}`', 'in': '{runtime}',
        **{f'batch of {b}': lambda r, b=b: SPEED_UP.format_map(r) if r['batch_size'] == b else '' for b in (1, 8, 32)},
        'ms per picture at these, dense / this': lambda r: ' / '.join(
            f"{1000 / x['images_per_second']:.0f}" for x in (r['dense'], r)),
    }, deployed(rows), key=itemgetter('name', 'runtime'))


def without_training_table(rows: List[Row]) -> str:
    """Accuracy of trained models at the share of multiply-adds that a method leaves, and speed of another."""
    def speed(r: Row, small: bool) -> str:
        return f"{SPEED_UP} of {1 / r['share']:.2f}".format_map(r) if r['model'].startswith('dense') == small else ''

    models = ', '.join(f"{r['top1']:.2f} %" for r in rows if r['method'] == 'dense' and 'top1' in r)
    return measured({
        'method': '{method}', 'share of multiply-adds': lambda r: f"{r['share']:.3f}" if 'top1' in r else '',
        f'points lost, of {models}': LOST, 'divergence, thousandths': '{kl:.1f} ± {kl_error:.1f}',
        'speed-up of the first of these models, of 1 / share': lambda r: speed(r, small=True),
        'speed-up of DeiT-S, of 1 / share': lambda r: speed(r, small=False),
    }, [r for r in rows if r['method'] != 'dense'], key=itemgetter('method'))


def models_table(rows: List[Row]) -> str:
    for r in rows:
        dense = TOP1.get(r['model'].removeprefix('evo_'))
        tags = {name.partition('.')[2] for name in timm.models.get_arch_pretrained_cfgs(r['model'])} - {'untrained'}
        r.update(top1=f"{TOP1.get(r['model'], 'not published')}{f' ({dense})' if dense else ''}",
                 tags=', '.join(f'`{tag}`' for tag in sorted(tags, reverse=True)))
    return table({
        'model': '`{model}`', 'parameters': lambda r: f"{r['params'] / 1e6:.2f} M",
        'G multiply-adds (dense model)': lambda r: '{:.3f} ({:.3f})'.format(
            *(x['multiply_adds'] / 1e9 for x in (r, r['dense']))),
        'top-1 in the paper (dense model)': '{top1}', 'weights': '{tags}'}, rows)


def families_table(rows: List[Row]) -> str:
    """Architectures that evolve by family, and those that do not by the reason."""
    total = f"{sum(r['evolve'] for r in rows)} of {sum(r['architectures'] for r in rows)} architectures evolve"
    columns = {'family': '{model}', total: '{evolve} of {architectures}', 'such as': '`{such_as}`'}
    refused = grouped([item for r in rows for item in r['refused'].items()], itemgetter(1))
    reasons = [[', '.join(f'`{name}`' for name, _ in of), reason.rstrip('.')] for reason, of in refused.items()]
    return table(columns, rows) + '\n\n' + markdown(['not', 'because'], reasons)


def compare(rows: List[Row]) -> Dict[str, List[Row]]:
    """By configuration, figures of the finished runs of each variant, the baseline first.

    Of the difference to the baseline of the same seed there are two 95 % intervals: over seeds says how much another
    seed might change it; over images, averaged over the seeds, how much other pictures might.
    """
    runs = [row for row in rows if row.get('finished')]
    runs.sort(key=lambda run: (run['variant'] not in ('dense', 'levit'), run['variant'], run['seed']))
    timings = sorted((row for row in rows if 'inference' in row), key=lambda row: row['of'].get('date', ''))
    latest = {(accuracy.title(timing), timing['variant']): timing for timing in timings}
    compared: Dict[str, List[Row]] = {}
    for (name, variant), of in grouped(runs, lambda run: (accuracy.title(run), run['variant'])).items():
        found = compared.setdefault(name, [])
        v = {**latest.get((name, variant), {}), 'variant': variant, 'runs': of, 'top1': [run['top1'][-1] for run in of]}
        baselines = found[0]['runs'] if found else ()
        pairs = [(run, dense) for run in of for dense in baselines if run['seed'] == dense['seed']]
        if pairs:
            gained = np.array([[100 * (int(a) - int(b)) for a, b in zip(run['right'], dense['right'], strict=True)]
                               for run, dense in pairs])
            v['gained'] = gained.mean()
            v['over_images'] = stats.ttest_1samp(gained.mean(axis=0), 0).confidence_interval()
        if len(pairs) > 1:
            v['over_seeds'] = stats.ttest_1samp(gained.mean(axis=1), 0).confidence_interval()
        found.append(v)
    return compared


def accuracy_table(rows: List[Row]) -> str:
    """Accuracy and speed of every configuration."""
    columns = {
        '': '{variant}', 'seeds': lambda v: ', '.join(str(run['seed']) for run in v['runs']),
        'top-1 %, mean (each)': lambda v: '**{:.2f}** ({})'.format(
            statistics.mean(v['top1']), ', '.join(f'{top1:.2f}' for top1 in v['top1'])),
        'points above dense': '{gained:+.2f}', '95 % over seeds': '{over_seeds[0]:+.2f} to {over_seeds[1]:+.2f}',
        '95 % over images': '{over_images[0]:+.2f} to {over_images[1]:+.2f}',
        **{f'{name}, times as fast (lowest - highest)': lambda v, key=key: SPEED_UP.format_map(v[key])
           for name, key in (('training', 'train'), ('inference', 'inference'))}}
    return '\n\n'.join(f'**{name}**\n\n{measured(columns, v)}' for name, v in compare(rows).items())


def accuracy_plot(rows: List[Row]) -> Figure:
    """Top-1 of small models against their speed in inference, the mean of the seeds and each of them."""
    (variants,) = compare(rows).values()
    axis = Figure().add_subplot()
    timed = [v for v in variants if 'inference' in v]
    for (label, names), marker, line in zip(LINES.items(), 'osD^', ['-', '--', ':', '-.'], strict=True):
        found = [(v['inference']['speed_up'], v['top1']) for v in timed if v['variant'] in names]
        means = sorted((speed_up, statistics.mean(top1)) for speed_up, top1 in found)
        axis.plot(*zip(*means), marker=marker, ls=line, ms=8, label=label)
        axis.plot(*zip(*((speed_up, x) for speed_up, top1 in found for x in top1)), 'k.', ms=3)
    axis.set(xlabel='times as fast as dense in inference, measured', ylabel='top-1 on CIFAR-10 (%)')
    axis.figure.legend(handlelength=4, loc='outside upper center', ncols=2)
    return axis.figure


def speed_plot(rows: List[Row]) -> Figure:
    """Speed-up of each row with its range, and the ratio of multiply-adds."""
    y = range(len(rows))
    axis = Figure(figsize=(7.2, 1.2 + 0.27 * len(rows))).add_subplot()
    axis.hlines(y, [r['speed_up_min'] for r in rows], [r['speed_up_max'] for r in rows], color='C0', lw=2, alpha=0.4)
    axis.plot([r['speed_up'] for r in rows], y, 'o', color='C0', label='measured, with its range')
    ratios = [r.get('ratio', math.nan) for r in rows]
    axis.plot(ratios, y, '|', color='C3', ms=11, mew=2, label='ratio of multiply-adds')
    axis.axvline(1, color='0.5', lw=1)
    names = [', '.join(filter(None, [r['model'], setting(r), f"batch {r['batch_size']}"])) for r in rows]
    axis.set_yticks(y, names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel('times as fast as the dense model')
    axis.figure.legend(loc='outside upper center', ncols=2, fontsize=8)
    return axis.figure


def deploy_speed_plot(rows: List[Row]) -> Figure:
    """Speed-up of each model in each runtime by batch size, and the ratio of multiply-adds."""
    figure = Figure(figsize=(9, 5.2))
    axes = figure.subplots(2, 3, sharex=True, sharey=True)
    for axis, (name, of) in zip(axes.flat, grouped(deployed(rows), itemgetter('name')).items()):
        for batch_size, marker in ((1, 'o'), (8, 's'), (32, '^')):
            found = [(r['speed_up'], r['runtime']) for r in of if r['batch_size'] == batch_size]
            axis.plot(*zip(*found), marker, mfc='none', label=f'batch of {batch_size}')
        axis.axvline(next(r['ratio'] for r in of if 'ratio' in r), color='C3', label='ratio of multiply-adds')
        axis.set_title(name, fontsize=9)
    axes[0, 0].invert_yaxis()
    figure.supxlabel('times as fast as the dense model in the same runtime')
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside upper center', ncols=4)
    return figure


def without_training_plot(rows: List[Row]) -> Figure:
    """Points of top-1 that trained models lose against measured speed-up, by method."""
    timed = {r['method']: r['speed_up'] for r in rows if 'speed_up' in r and not r['model'].startswith('dense')}
    timed.update({k.replace(', fused', ''): v for k, v in timed.items() if ', fused' in k})  # as the other methods
    lost = [r for r in rows if 'lost' in r and r['method'] != 'dense' and r['method'] in timed]
    axis = Figure().add_subplot()
    axis.plot(1, 0, 'k*', ms=10, ls='', label='dense')
    labels = {'similarity': 'evolve, by similarity', 'attention': "Evo-DeiT, by class attention (paper's)"}
    lines = ['-', '--', '-.', ':', (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (4, 4))]
    methods = grouped(lost, lambda r: r['method'].rpartition(' ')[0])
    for (name, of), marker, line in zip(methods.items(), 'os^DvPX', lines):
        points = [
            (timed[method], statistics.mean(r['lost'] for r in found),
             math.hypot(*(r['lost_error'] for r in found)) / len(found))
            for method, found in grouped(of, itemgetter('method')).items()]
        axis.errorbar(*zip(*sorted(points)), marker=marker, ls=line, lw=2.2 if name == 'similarity' else 1.4, capsize=2,
                      label=labels.get(name, name))
    # a square root gives room to small losses, and shows the large ones too
    axis.set_yscale('function', functions=(lambda y: np.sign(y) * np.abs(y) ** 0.5, lambda y: np.sign(y) * y ** 2))
    axis.invert_yaxis()
    axis.set(xlabel='times as fast as the dense model, measured', ylabel='points of top-1 lost (square root scale)',
             yticks=(0, 1, 2, 5, 10, 20))
    axis.figure.legend(handlelength=4, loc='outside upper center', ncols=3)
    return axis.figure


TABLES: Dict[str, Callable[[List[Row]], str]] = {
    'speed': partial(measured, {
        'model': '`{model}`', '': setting, 'batch': '{batch_size}',
        'multiply-adds ratio': '{ratio:.3f}', 'speed-up (lowest - highest)': SPEED_UP,
        'img/s, dense / this': lambda r: ' / '.join(
            f"{x['images_per_second']:{'.0f' if x['images_per_second'] >= 100 else '.3g'}}" for x in (r['dense'], r)),
        'peak memory (MB), dense / this': lambda r: ' / '.join(
            f"{x['peak_memory'] / 1e6:.0f}" for x in (r['dense'], r) if x['peak_memory'])}),
    'segmentation': partial(measured, {
        'backbone': '{model}', 'share of multiply-adds': lambda r: f"{1 / r['ratio']:.3f}",
        'mean IoU %': '{mean_iou:.2f}',
        'points lost': lambda r: f"{r['dense']['mean_iou'] - r['mean_iou']:.2f}" if r['model'] != r['baseline'] else '',
        'speed-up': '{speed_up:.2f}'}, key=itemgetter('model')),
    'finetuned': partial(measured, {
        'method': '{method}', 'share of multiply-adds': '{share:.3f}', 'top-1 %, fine-tuned': '{top1:.2f}',
        'points lost to the dense model before': LOST, 'divergence from it, thousandths': '{kl:.1f}'},
        key=itemgetter('method')),
    'photographs': partial(measured, {  # of features, the ratio of the means and the geometric mean over the pictures
        'method': '{method}', 'share of multiply-adds': '{share:.3f}',
        **{header: lambda r, key=key: f"{r[f'{key}, of ToMe']:.2f}, {r[f'{key}, geometric']:.2f} ± "
           f"{100 * r[f'{key}, geometric error']:.0f} %" for header, key in (
               ('class token', 'class token'), ('patches', 'patches'), ('average of the patches', 'average'))},
        'saliency map': '{saliency:.3f}'}),
    'deploy-accuracy': partial(measured, {
        'model': '{model}', 'in': '{method}', 'top-1 %': '{top1:.2f}', 'points lost': LOST,
        'divergence, thousandths': '{kl:.1f}', 'pairs as in float32': '{same_pairs:.1f} %'}),
    'service': partial(measured, {
        'model': '`{model}`', '': '{model_kwargs[base]}', 'processes': '{processes}', 'threads of each': '{threads}',
        'callers of each': '{callers}', 'busy processes beside': '{busy}', 'speed-up (lowest - highest)': SPEED_UP,
        'img/s, dense / this': '{dense_images_per_second:.3g} / {images_per_second:.3g}'}),
    'deploy-speed': deploy_speed_table, 'without_training': without_training_table, 'models': models_table,
    'families': families_table, 'accuracy': accuracy_table,
    'sweep': lambda rows: f"```text\n{sweep.table(rows[0]['of']['rows'])}\n\n{sweep.describe(rows[0]['of'])}\n```"}
PLOTS: Dict[str, Callable[[List[Row]], Figure]] = {
    'speed': speed_plot, 'without_training': without_training_plot, 'accuracy': accuracy_plot,
    'deploy-speed': deploy_speed_plot, 'sweep': matplotlib.rc_context({'axes.grid': False, 'legend.frameon': True})(
        lambda rows: sweep.plot(rows[0]['of']))}  # as the command draws it


def fill(page: Path) -> str:
    """The text of a page with its tables as the results say."""
    return TABLE.sub(lambda mark: f'{mark[1]}{TABLES[mark[2].split()[0]](read(mark[2], RESULTS))}\n{mark[3]}',
                     page.read_text())


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('pages', nargs='*', type=Path, default=[ROOT / 'README.md', *sorted(ROOT.glob('docs/*.md'))])
    parser.add_argument('--accuracy', type=Path, metavar='DIR', help='print the tables of runs of accuracy.py')
    args = parser.parse_args(argv)
    if args.accuracy:
        print(accuracy_table(read('accuracy file=', args.accuracy)))
    for page in args.pages if not args.accuracy else ():
        page.write_text(fill(page))
        for name, file, conditions in PLOT.findall(page.read_text()):
            PLOTS[name](read(name + conditions, RESULTS)).savefig(page.parent / file, dpi=130)


if __name__ == '__main__':
    main()
