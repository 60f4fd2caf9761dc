#!/usr/bin/env python3
"""Write the tables and plots of the documentation from the files in benchmarks/results.

    python benchmarks/report.py            # write them
    python benchmarks/report.py --check    # fail if a page or a plot is not what the results say

A page marks where a table or a plot goes; what is between the marks is replaced:

    <!-- table: speed mode=inference model=evo_deit_* -->
    <!-- end -->
    <!-- plot: speed speed.png file=speed-cpu -->
    <!-- end -->

The first word names one of the tables (speed, dense_features, flops, models, families, families_refused,
without_training, finetuned, kernels, newcomer, sweep, accuracy, accuracy_speed) or plots (speed, top1,
without_training, sweep, accuracy). A plot goes to the file named next, beside the page. Conditions choose rows:
`KEY=PATTERN[,PATTERN]` compares a value of the row with shell patterns, `file=` the name of the result file without
`.json`. By default all files are taken whose name starts with that of the benchmark, for accuracy all in the folder of
that name. A mark stays empty as long as there is no such file.
"""
import argparse
import hashlib
import json
import math
import re
import statistics
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import accuracy_report
import matplotlib
import numpy as np
import timm
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator
from PIL import Image

from timm_evovit.tools import sweep

matplotlib.use('Agg')
ROOT = Path(__file__).parent.parent
MARK = re.compile(r'(<!-- (table|plot): ([^>]*?) -->\n)(.*?)(<!-- end -->)', re.DOTALL)
TOP1 = {  # ImageNet-1k in the papers of Evo-ViT, DeiT and LeViT; LeViT's of 1000 epochs, Evo-LeViT's of 300
    'evo_deit_tiny_patch16_224': 72.0, 'evo_deit_small_patch16_224': 79.4, 'evo_deit_base_patch16_224': 81.3,
    'evo_deit_base_patch16_384': 82.0, 'evo_levit_128s': 73.0, 'evo_levit_128': 74.4, 'evo_levit_192': 76.8,
    'evo_levit_256': 78.8, 'evo_levit_384': 80.7, 'evo_levit_256_384': 81.1, 'evo_levit_384_384': 82.2,
    'deit_tiny_patch16_224': 72.2, 'deit_small_patch16_224': 79.8, 'deit_base_patch16_224': 81.8,
    'deit_base_patch16_384': 83.1,
    'levit_128s': 76.6, 'levit_128': 78.6, 'levit_192': 80.0, 'levit_256': 81.6, 'levit_384': 82.6,
}
FILES = {'top1': 'speed*', 'families_refused': 'families*', 'accuracy': 'accuracy/*', 'accuracy_speed': 'accuracy/*'}
LABELS = {'similarity': 'evolve, by similarity', 'attention': "Evo-DeiT, by class attention (paper's)"}
Row = Dict[str, Any]


class Mark(NamedTuple):
    """What a page asks for."""
    kind: str  # 'table' or 'plot'
    name: str
    file: Optional[str]  # of a plot
    conditions: Dict[str, str]


def parse_mark(kind: str, text: str) -> Mark:
    name, *words = text.split()
    known = TABLES if kind == 'table' else PLOTS
    if name not in known:
        raise ValueError(f"<!-- {kind}: {text} -->: there is no {kind} {name!r}, but {', '.join(known)}")
    file = words.pop(0) if kind == 'plot' and words and words[0].endswith('.png') else None
    if kind == 'plot' and file is None:
        raise ValueError(f'<!-- {kind}: {text} -->: name a PNG file after {name!r}')
    if wrong := [word for word in words if '=' not in word]:
        raise ValueError(f'<!-- {kind}: {text} -->: conditions are KEY=PATTERN, got {wrong[0]!r}')
    return Mark(kind, name, file, dict(word.split('=', 1) for word in words))


def matches(value: Any, patterns: str) -> bool:
    text = '' if value is None else str(value)
    return any(fnmatchcase(text, pattern) for pattern in patterns.split(','))


def select(mark: Mark, results: Path) -> List[Row]:
    """Rows of the result files that a mark asks for, each with what its run was made with under 'of'.

    Raises:
        FileNotFoundError: There are no such files.
        ValueError: They have no such rows.
    """
    conditions = dict(mark.conditions)
    files = conditions.pop('file', FILES.get(mark.name, f'{mark.name}*'))
    paths = [path for path in sorted(results.rglob('*.json'))
             if matches(path.relative_to(results).as_posix().removesuffix('.json'), files)]
    if not paths:
        raise FileNotFoundError(f'{results.name} has no file {files}.json')
    rows = []
    for path in paths:
        report = json.loads(path.read_text())
        if 'rows' not in report:  # of accuracy.py
            rows.append({**report['configuration'], 'report': report})
            continue
        of = {key: value for key, value in report.items() if key != 'rows'}
        of['by_run'] = {(row.get('run'), row.get('seed'), row.get('model')): row for row in report['rows']}
        rows += [{**row, 'of': of} for row in report['rows']]
    unknown = [key for key in conditions if not any(key in row for row in rows)]
    if rows and unknown:
        raise ValueError(f'{mark.kind} {mark.name}: no row has {unknown[0]!r}')
    rows = [row for row in rows if all(key in row and matches(row[key], p) for key, p in conditions.items())]
    if not rows:
        raise ValueError(f'{mark.kind} {mark.name}: no row of {results.name}/*.json fits {mark.conditions}')
    return rows


def baseline(row: Row) -> Row:
    return row['of']['by_run'][row.get('run'), row.get('seed'), row['baseline']]


def number(value: float) -> str:
    """Three significant digits."""
    return f'{value:.0f}' if value >= 100 else f'{value:.3g}'


def setting(row: Row) -> str:
    """How a model was run, where it differs from inference in float32."""
    words = [
        'training step' if row['mode'] == 'train' else '',
        'layer-wise' if row.get('model_kwargs', {}).get('selection') == 'layer' else '',
        row['dtype'] if row['dtype'] != 'float32' else '',
        'compiled' if row['compile'] else '',
        row['compile'] if row['compile'] not in (None, 'default') else '',
        f"{row['img_size']} x {row['img_size']}" if row['img_size'] != 224 else '',
    ]
    others = {k: v for k, v in row.get('model_kwargs', {}).items() if (k, v) != ('selection', 'layer')}
    return ', '.join([word for word in words if word] + [f'{k}={v}' for k, v in others.items()])


def made_with(rows: List[Row]) -> str:
    """One sentence per result file: hardware, versions, commit."""
    lines = []
    for of in {id(row['of']): row['of'] for row in rows}.values():
        m, v = of['machine'], of['versions']
        where = m['gpu'] or f"{m['cpu']} ({m['instructions']}), {m['threads']} of {m['cores']} cores"
        memory = ', memory kept by the allocator' if 'MALLOC_TRIM_THRESHOLD_' in of['environment'] else ''
        commit = (of['commit'] or 'unknown')[:10]
        lines.append(f"{where}{memory}; torch {v['torch']}, timm {v['timm']}, {of['date']}, commit {commit}.")
    return '\n'.join(dict.fromkeys(lines))


def markdown(header: List[str], rows: List[List[str]]) -> str:
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in [header, ['---'] * len(header), *rows])


def speed_table(rows: List[Row]) -> str:
    rows = [row for row in rows if row['model'] != row['baseline']]
    lines = []
    for r in rows:
        b = baseline(r)
        ratio = f"{b['multiply_adds'] / r['multiply_adds']:.3f}" if b['multiply_adds'] and r['multiply_adds'] else ''
        memory = f"{b['peak_memory'] / 1e6:.0f} / {r['peak_memory'] / 1e6:.0f}" if r.get('peak_memory') else ''
        lines.append([
            f"`{r['model']}`", setting(r), str(r['batch_size']), ratio,
            f"**{r['speed_up']:.2f}** ({r['speed_up_min']:.2f} - {r['speed_up_max']:.2f})",
            f"{number(b['images_per_second'])} / {number(r['images_per_second'])}", memory])
    return markdown(['model', '', 'batch', 'multiply-adds ratio', 'speed-up (lowest - highest)', 'img/s, dense / this',
                     'peak memory (MB), dense / this'], lines) + '\n\n' + made_with(rows)


def dense_features_table(rows: List[Row]) -> str:
    """One line per model, all seeds in it."""
    lines = []
    for name in dict.fromkeys(r['model'] for r in rows):
        of = [r for r in rows if r['model'] == name]
        share = of[0]['multiply_adds'] / baseline(of[0])['multiply_adds']
        lost = ', '.join(f"{baseline(r)['mean_iou'] - r['mean_iou']:.2f}" for r in of)
        lines.append([
            name, f'{share:.3f}', ', '.join(f"{r['mean_iou']:.2f}" for r in of),
            '' if name == of[0]['baseline'] else lost, f"{statistics.median(r['speed_up'] for r in of):.2f}"])
    header = ['backbone', 'share of multiply-adds', 'mean IoU %', 'points lost', 'speed-up']
    return markdown(header, lines) + '\n\n' + made_with(rows)


def flops_table(rows: List[Row]) -> str:
    """One line per counter: the dense model, the other and their ratio, with fused attention and without."""
    counts = {(r['counter'], r['fused_attn'], r['model']): r['multiply_adds'] for r in rows}
    dense, evo = (next(r['model'] for r in rows if (r['model'] == r['baseline']) == b) for b in (True, False))
    lines = []
    for counter in dict.fromkeys(r['counter'] for r in rows):
        line = [counter]
        for fused in (True, False):
            a, b = (counts[counter, fused, model] for model in (dense, evo))
            line += [f'{a / 1e9:.3f} / {b / 1e9:.3f}', f'{a / b:.3f}']
        lines.append(line)
    header = ['', 'fused attention: G multiply-adds', 'ratio', '`set_fused_attn(False)`: G multiply-adds', 'ratio']
    v = rows[0]['of']['versions']
    tools = ', '.join(f'{name} {v[name]}' for name in ('torch', 'timm', 'fvcore', 'ptflops', 'torchinfo'))
    return markdown(header, lines) + f'\n\n`{dense}` / `{evo}`, one image; {tools}.'


def tags_of(model: str) -> List[str]:
    """Tags of the weights that a model may have, those on the Hub first."""
    tags = [name.partition('.')[2] for name in timm.models.get_arch_pretrained_cfgs(model)]
    return sorted((tag for tag in tags if tag != 'untrained'), key=lambda tag: tag != 'fb_in1k')


def models_table(rows: List[Row]) -> str:
    header = ['model', 'parameters', 'G multiply-adds (dense model)', 'top-1 in the paper (dense model)', 'weights']
    dense = {name: f' ({top1})' for name, top1 in TOP1.items()}
    return markdown(header, [[
        f"`{r['model']}`", f"{r['parameters'] / 1e6:.2f} M",
        f"{r['multiply_adds'] / 1e9:.3f} ({r['dense_multiply_adds'] / 1e9:.3f})",
        str(TOP1.get(r['model'], 'not published')) + dense.get(r['model'].removeprefix('evo_'), ''),
        ', '.join(f'`{tag}`' for tag in tags_of(r['model']))]
        for r in rows])


def without_training_table(rows: List[Row]) -> str:
    """Accuracy of trained models at the share of multiply-adds that a method leaves, and speed of another."""
    def speed(method: str, small: bool) -> str:
        timed = [r for r in rows if 'speed_up' in r and r['model'].startswith('dense') == small]
        return ', '.join(
            f"**{r['speed_up']:.2f}** ({r['speed_up_min']:.2f} - {r['speed_up_max']:.2f}) of {1 / r['share']:.2f}"
            for r in timed if r['method'] == method)

    lines = []
    for method in dict.fromkeys(r['method'] for r in rows if r['method'] != 'dense'):
        of = [r for r in rows if r['method'] == method and 'top1' in r]
        lines.append([
            method, f"{of[0]['share']:.3f}" if of else '',
            ', '.join(f"{r['lost']:.2f} ± {r['lost_error']:.2f}" for r in of),
            ', '.join(f"{r['kl']:.1f} ± {r['kl_error']:.1f}" for r in of), speed(method, True), speed(method, False)])
    models = ', '.join(f"{r['top1']:.2f} %" for r in rows if r['method'] == 'dense' and 'top1' in r)
    header = ['method', 'share of multiply-adds', f'points lost, of {models}', 'divergence, thousandths',
              'speed-up of the first of these models, of 1 / share', 'speed-up of DeiT-S, of 1 / share']
    return markdown(header, lines) + '\n\n' + made_with(rows)


def accuracy_comparisons(rows: List[Row]) -> List[Dict[str, Any]]:
    return accuracy_report.compare(*accuracy_report.split(row['report'] for row in rows))


def accuracy_table(rows: List[Row]) -> str:
    return accuracy_report.table(accuracy_comparisons(rows))


def accuracy_speed_table(rows: List[Row]) -> str:
    _, timings = accuracy_report.split(row['report'] for row in rows)
    return accuracy_report.speed_table(timings)


def accuracy_plot(rows: List[Row]) -> plt.Figure:
    """Top-1 on CIFAR-10 by epoch, and against the speed of training and inference, dense and evolving."""
    return accuracy_report.plot(accuracy_comparisons(rows))


def newcomer_table(rows: List[Row]) -> str:
    """What the commands for a newcomer print."""
    lines = [line for r in rows for line in (f"$ {r['command']}", r['output'])]
    machine = rows[0]['of']['machine']
    lines[0] += f"    # {machine['cpu']}, {machine['cores']} cores"
    return '\n'.join(['```text', *lines, '```'])


def kernels_table(rows: List[Row]) -> str:
    """Kernels of the dense model / the evolving one, by kind."""
    kinds = {
        'all kernels': 'kernels', 'matrix products': 'matmul', 'attention': 'attention', 'convolutions': 'convolution',
        'fused pointwise': 'pointwise', 'with a reduction': 'reduction', 'not fused': 'other'}
    evolving = [row for row in rows if row['model'] != row['baseline']]
    lines = [[
        f"`{r['model']}`" + (f" of `{r['baseline']}`" if r['model'] == 'evo_vit' else ''), str(r['batch_size']),
        *(f'{baseline(r)[kind]} / {r[kind]}' for kind in kinds.values())] for r in evolving]
    v = rows[0]['of']['versions']
    return markdown(['model', 'batch', *kinds], lines) + (
        f"\n\nDense model / this one, bfloat16, lowered for an H100, not run; torch {v['torch']}, timm {v['timm']}.")


def photographs_table(rows: List[Row]) -> str:
    """Errors of features over ToMe's, ratio of the means and geometric mean over the pictures."""
    def cell(row: Row, name: str) -> str:
        error = 100 * row[f'{name}, geometric error']
        return f"{row[f'{name}, of ToMe']:.2f}, {row[f'{name}, geometric']:.2f} ± {error:.0f} %"

    header = ['method', 'share of multiply-adds', 'class token', 'patches', 'average of the patches', 'saliency map']
    return markdown(header, [
        [r['method'], f"{r['share']:.3f}", *(cell(r, name) for name in ('class token', 'patches', 'average')),
         f"{r['saliency']:.3f}"] for r in rows]) + '\n\n' + made_with(rows)


def finetuned_table(rows: List[Row]) -> str:
    """Top-1 of each method before and after more epochs, and what it loses to the dense model of as many."""
    lines = []
    for method in dict.fromkeys(r['method'] for r in rows):
        of = [r for r in rows if r['method'] == method]
        lines.append([
            method, f"{of[0]['share']:.3f}", ', '.join(f"{r['before']:.2f}" for r in of),
            ', '.join(f"{r['top1']:.2f}" for r in of),
            ', '.join(f"{r['lost']:.2f} ± {r['lost_error']:.2f}" for r in of) if method != 'dense' else ''])
    header = ['method', 'share of multiply-adds', 'top-1 %, before', 'fine-tuned', 'points lost to dense, fine-tuned']
    return markdown(header, lines) + '\n\n' + made_with(rows)


def families_table(rows: List[Row]) -> str:
    total = {key: sum(row[key] for row in rows) for key in ('architectures', 'evolve')}
    return markdown(['family', 'architectures', 'evolve', 'such as'], [[
        r['model'], str(r['architectures']), str(r['evolve']), f"`{r['such_as']}`" if 'such_as' in r else '']
        for r in [*rows, {'model': 'all', **total}]])


def refused_table(rows: List[Row]) -> str:
    """One line per reason."""
    names: Dict[str, List[str]] = {}
    for r in rows:
        for name, reason in r['refused'].items():
            names.setdefault(reason.rstrip('.'), []).append(f'`{name}`')
    return markdown(['not', 'because'], [[', '.join(found), reason] for reason, found in names.items()])


def sweep_contents(rows: List[Row]) -> Dict[str, Any]:
    """The contents of sweep.json again."""
    return {**rows[0]['of'], 'rows': [{key: value for key, value in row.items() if key != 'of'} for row in rows]}


def sweep_table(rows: List[Row]) -> str:
    """What `timm-evovit sweep` has printed."""
    report = sweep_contents(rows)
    return f"```text\n{sweep.table(report['rows'])}\n\n{sweep.describe(report)}\n```"


def sweep_plot(rows: List[Row]) -> plt.Figure:
    """Top-1 of each keep ratio against images per second."""
    return sweep.plot(sweep_contents(rows))


def speed_plot(rows: List[Row]) -> plt.Figure:
    """Speed-up of each row with its range, and the ratio of multiply-adds."""
    rows = [row for row in rows if row['model'] != row['baseline']]
    figure, axis = plt.subplots(figsize=(7.2, 1.2 + 0.27 * len(rows)), layout='constrained')
    for y, r in enumerate(rows):
        b = baseline(r)
        axis.plot([r['speed_up_min'], r['speed_up_max']], [y, y], color='C0', lw=2, alpha=0.4, solid_capstyle='butt')
        axis.plot(r['speed_up'], y, 'o', color='C0', label=None if y else 'measured, with its range')
        if b['multiply_adds'] and r['multiply_adds']:
            axis.plot(b['multiply_adds'] / r['multiply_adds'], y, '|', color='C3', ms=11, mew=2,
                      label=None if y else 'ratio of multiply-adds')
    axis.axvline(1, color='0.5', lw=1)
    axis.set_yticks(range(len(rows)), [
        ', '.join(filter(None, [r['model'], setting(r), f"batch {r['batch_size']}"])) for r in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel('times as fast as the dense model')
    axis.grid(axis='x', alpha=0.3)
    figure.legend(loc='outside upper center', ncols=2, frameon=False, fontsize=8)
    return figure


def top1_plot(rows: List[Row]) -> plt.Figure:
    """Top-1 in the papers against measured speed, a line from each dense model that has one to its Evo-ViT."""
    figure, axis = plt.subplots(figsize=(7.2, 4.6), layout='constrained')
    for r in rows:
        if r['model'] == r['baseline'] or r['model'] not in TOP1:
            continue
        # a dense model's top-1 is of images of its own size
        has_dense = timm.get_pretrained_cfg(r['baseline']).input_size[2] == r['img_size']
        points = [(r, 'C0', 'o', -7 if has_dense else 7)] + [(baseline(r), 'C1', 's', 7)] * has_dense
        axis.plot(
            [q['images_per_second'] for q, *_ in points], [TOP1[q['model']] for q, *_ in points], color='0.7', zorder=1)
        for q, colour, marker, dy in points:
            axis.plot(q['images_per_second'], TOP1[q['model']], marker, color=colour)
            axis.annotate(
                q['model'].replace('_patch16', '').removesuffix('_224'), (q['images_per_second'], TOP1[q['model']]),
                xytext=(0, dy), textcoords='offset points', fontsize=7, ha='center', va='bottom' if dy > 0 else 'top')
    axis.set_xscale('log')
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter('{x:g}')
    axis.xaxis.set_minor_locator(NullLocator())
    axis.margins(x=0.12, y=0.12)
    axis.set(xlabel='images per second, measured', ylabel='ImageNet-1k top-1 in the papers (%)')
    axis.grid(alpha=0.3)
    return figure


def without_training_plot(rows: List[Row]) -> plt.Figure:
    """Points of top-1 that trained models lose against measured speed-up, by method."""
    timed = {r['method']: r['speed_up'] for r in rows if 'speed_up' in r and not r['model'].startswith('dense')}
    lost: Dict[str, Dict[str, List[Row]]] = {}
    for r in rows:
        name = r['method'].rpartition(' ')[0]
        if 'lost' in r and name and r['method'] in timed:
            lost.setdefault(name, {}).setdefault(r['method'], []).append(r)
    figure, axis = plt.subplots(figsize=(7.2, 4.2), layout='constrained')
    axis.plot(1, 0, 'k*', ms=10, ls='', label='dense')
    styles = [
        ('o', '-'), ('s', '--'), ('^', '-.'), ('D', ':'), ('v', (0, (6, 1, 1, 1, 1, 1))), ('P', (0, (1, 3))),
        ('X', (0, (4, 4)))]
    for (name, settings), (marker, line) in zip(lost.items(), styles):
        points = [(
            timed[method], statistics.mean(r['lost'] for r in of),
            math.hypot(*(r['lost_error'] for r in of)) / len(of)) for method, of in settings.items()]
        speed_up, mean, error = zip(*sorted(points))
        axis.errorbar(
            speed_up, mean, error, marker=marker, ls=line, lw=2.2 if name == 'similarity' else 1.4, capsize=2,
            label=LABELS.get(name, name))
    # a square root gives room to small losses, and shows the large ones too
    axis.set_yscale('function', functions=(lambda y: np.sign(y) * np.abs(y) ** 0.5, lambda y: np.sign(y) * y ** 2))
    axis.yaxis.set_major_locator(FixedLocator((0, 1, 2, 5, 10, 20, 50)))
    axis.invert_yaxis()
    axis.set(xlabel='times as fast as the dense model, measured', ylabel='points of top-1 lost (square root scale)')
    axis.grid(alpha=0.3)
    figure.legend(handlelength=4, frameon=False, loc='outside upper center', ncols=3)
    return figure


TABLES: Dict[str, Callable[[List[Row]], str]] = {
    'speed': speed_table, 'dense_features': dense_features_table,
    'flops': flops_table, 'models': models_table, 'families': families_table, 'families_refused': refused_table,
    'without_training': without_training_table, 'finetuned': finetuned_table, 'photographs': photographs_table,
    'kernels': kernels_table,
    'newcomer': newcomer_table, 'sweep': sweep_table, 'accuracy': accuracy_table,
    'accuracy_speed': accuracy_speed_table}
PLOTS: Dict[str, Callable[[List[Row]], plt.Figure]] = {
    'speed': speed_plot, 'top1': top1_plot, 'without_training': without_training_plot, 'sweep': sweep_plot,
    'accuracy': accuracy_plot}


def digest(mark: Mark, rows: List[Row]) -> str:
    """Stands for the data of a plot, stored in its file: pixels differ between versions of matplotlib."""
    data = [{key: value for key, value in row.items() if key != 'of'} for row in rows]
    return hashlib.sha256(json.dumps([mark.name, data], sort_keys=True).encode()).hexdigest()


def stored_digest(path: Path) -> Optional[str]:
    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.info.get('Data')


def fill(page: Path, results: Path, check: bool) -> List[str]:
    """Write the tables and plots of a page, or with `check` only find out which would change.

    Returns:
        What changed.
    """
    changed = []

    def replace(match: re.Match) -> str:
        mark = parse_mark(match[2], match[3])
        try:
            rows = select(mark, results)
        except FileNotFoundError as error:  # not measured yet
            print(f'{page.name}: {mark.kind} {mark.name} is empty: {error}')
            if match[4]:
                changed.append(f'{page.name}: {mark.kind} {mark.name}')
            return match[1] + match[5]
        if mark.kind == 'table':
            content = TABLES[mark.name](rows)
        else:
            path, expected = page.parent / mark.file, digest(mark, rows)
            content = f'![{PLOTS[mark.name].__doc__.strip()}]({mark.file})'
            if stored_digest(path) != expected:
                changed.append(f'{page.name}: plot {mark.file}')
                if not check:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    figure = PLOTS[mark.name](rows)
                    figure.savefig(path, dpi=130, facecolor='white', metadata={'Data': expected})
                    plt.close(figure)
        content = f'{content}\n'
        if content != match[4]:
            changed.append(f'{page.name}: {mark.kind} {mark.name}')
        return match[1] + content + match[5]

    text = page.read_text()
    new = MARK.sub(replace, text)
    if new != text and not check:
        page.write_text(new)
    return changed


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('pages', nargs='*', type=Path, help="default: README.md and all pages of docs/")
    parser.add_argument('--results', type=Path, default=ROOT / 'benchmarks' / 'results')
    parser.add_argument('--check', action='store_true', help='write nothing, fail if something would change')
    args = parser.parse_args(argv)
    changed = []
    for page in args.pages or [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]:
        try:
            changed += fill(page, args.results, args.check)
        except ValueError as error:
            parser.error(f'{page}: {error}')
    for line in changed:
        print(line)
    if args.check and changed:
        print('not what benchmarks/results says: run `python benchmarks/report.py`')
    return int(args.check and bool(changed))


if __name__ == '__main__':
    raise SystemExit(main())
