"""What a sweep over keep ratios has found: table, words, plot and the files."""
import json
import shlex
import tempfile
from pathlib import Path
from typing import Any, Dict, Sequence, Tuple

import numpy as np

FLAGS = {'num_classes': '--num-classes', 'in_chans': '--in-chans', 'global_pool': '--gp'}  # of timm's scripts


def table(rows: Sequence[Dict[str, Any]]) -> str:
    """Rows as text, with speed-up over keep ratio 1 if that is not the dense model."""
    columns = [
        ('keep ratio', 'keep_ratio', '{:g}'), ('top-1 %', 'top1', '{:.2f}'), ('top-5 %', 'top5', '{:.2f}'),
        ('agreement %', 'agreement', '{:.2f}'), ('points lost' if 'top1' in rows[0] else '% differ', 'lost', '{:.2f}'),
        ('95 % interval', 'lost_interval', '{0[0]:.2f} to {0[1]:.2f}'), ('img/s', 'images_per_second', '{:.1f}'),
        ('speed-up', 'speed_up', '{:.2f}'), ('over ratio 1', 'speed_up_over_keep_ratio_1', '{:.2f}'),
        ('M multiply-adds', 'multiply_adds', '{:.1f}')]
    absent = {'keep_ratio': 'dense', 'lost_interval': ''}
    if rows[0]['keep_ratio'] is not None:
        columns.pop(-2)  # keep ratio 1 is the dense model
    columns = [column for column in columns if column[1] in rows[0]]
    cells = [[title for title, _, _ in columns]]
    for row in rows:
        row = {**row, 'multiply_adds': row['multiply_adds'] / 1e6}
        cells.append([absent[key] if row[key] is None else form.format(row[key]) for _, key, form in columns])
    widths = [max(map(len, column)) for column in zip(*cells)]
    return '\n'.join('  '.join(cell.rjust(width) for cell, width in zip(line, widths)) for line in cells)


def describe(report: Dict[str, Any]) -> str:
    """The choice in words, and how to use it."""
    dense, chosen, most = report['rows'][0], report['chosen'], report['max_drop']
    limit = 'loses at most {:g} points of top-1' if 'top1' in dense else 'changes at most {:g} % of predictions'
    limit = limit.format(most)
    if chosen == dense:
        lines = [f'No keep ratio below 1 is faster than the dense model and {limit}. To use the dense model:']
    else:
        result = 'top-1 is {:.2f} %, that of the dense model {:.2f} %'.format(
            chosen['top1'], dense['top1']) if 'top1' in dense else f'{chosen["lost"]:.2f} % of predictions change'
        lines = [f'The fastest keep ratio that {limit} is {chosen["keep_ratio"]:g}, '
                 f'{chosen["speed_up"]:.2f} times as fast as the dense model; {result}.']
        if report['images'] < 1000:
            low, high = chosen['lost_interval']
            what = 'loss may be {:.2f} to {:.2f} points' if 'top1' in dense else 'change may be {:.2f} to {:.2f} %'
            lines += [f'With only {report["images"]} pictures the true {what.format(low, high)} (95 % interval).']
    return '\n'.join([*lines, '', 'In Python:', report['python'], '', "For timm's scripts:", report['arguments']])


def plot(report: Dict[str, Any]) -> Any:
    """Draw accuracy, or without labels agreement with the dense model, against speed. Returns matplotlib's figure."""
    from matplotlib.figure import Figure
    rows, max_drop = report['rows'], report['max_drop']
    dense = rows[0].get('top1', 100.)
    speed, lost = (np.array([row[key] for row in rows]) for key in ('images_per_second', 'lost'))
    low, high = np.array([row['lost_interval'] or (0., 0.) for row in rows]).T
    chosen, first = rows.index(report['chosen']), 0 if rows[0]['keep_ratio'] else 1

    figure = Figure(figsize=(7.2, 4.6), layout='constrained')
    axis = figure.add_subplot()
    axis.vlines(speed, dense - high, dense - low, colors='0.65', label='95 % interval')
    axis.plot(speed[first:], dense - lost[first:], 'o-', color='C0', label='keep ratio')
    axis.plot(speed[0], dense, 's', color='black', mfc='white', ms=8, label='dense model')
    axis.plot(speed[chosen], dense - lost[chosen], 'o', color='black', mfc='none', ms=14, label='chosen')
    axis.axhline(dense - max_drop, color='0.3', ls='--', lw=1, label=f'{max_drop:g} points less')
    for x, y, row in list(zip(speed, dense - lost, rows))[first:]:
        axis.annotate(
            f'{row["keep_ratio"]:g}', (x, y), (0, -9), textcoords='offset points', ha='center', va='top',
            bbox={'color': 'white', 'pad': 0.5})
    axis.set_title(f'{report["model"]}, {report["images"]} pictures', fontsize=10, wrap=True)
    axis.set_xlabel(f'images per second, batch {report["batch_size"]}, {report["device"]}')
    axis.set_ylabel('top-1 (%)' if 'top1' in rows[0] else 'same prediction as the dense model (%)')
    axis.margins(0.1)
    axis.grid(alpha=0.3)
    figure.legend(loc='outside lower center', ncols=5, frameon=False, fontsize=8)
    return figure


def write(path: Path, content: Any) -> None:
    """Write JSON or a figure of matplotlib beside its place and move it there when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{path.name}.', dir=path.parent) as folder:
        partial = Path(folder, path.name)
        if path.suffix == '.json':
            partial.write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
        else:
            content.savefig(partial, dpi=130)
        partial.replace(path)


def how_to_use(report: Dict[str, Any], name: str, kwargs: Dict[str, Any], data: Dict[str, Any]) -> Tuple[str, str]:
    """Python code and arguments of timm's scripts that build a model; `data` are options of the scripts only."""
    pretrained, checkpoint, use_ema = (report[k] for k in ('pretrained', 'checkpoint', 'use_ema'))
    words = [repr(name), *(['pretrained=True'] if pretrained else []), *(f'{k}={v!r}' for k, v in kwargs.items())]
    code = f'model = timm.create_model({", ".join(words)})'
    arguments = ['--model', name, *(['--pretrained'] if pretrained else [])]
    if checkpoint:
        code += f'\ntimm.models.load_checkpoint(model, {checkpoint!r}, use_ema={use_ema})'
        arguments += ['--checkpoint', checkpoint, *(['--use-ema'] if use_ema else [])]
    options = {FLAGS[k]: v for k, v in kwargs.items() if k in FLAGS}
    options.update((f'--{k.replace("_", "-")}', v) for k, v in data.items())
    for flag, value in options.items():
        arguments += [flag, *map(str, value if isinstance(value, (list, tuple)) else [value])]
    # scripts of timm 1.0.25 take names as they are, but other strings, such as local-dir:FOLDER, in quotes only
    names = {k for k, v in kwargs.items() if not isinstance(v, str) or v.replace('.', '_').isidentifier()}
    words = [f'{k}={v if k in names else json.dumps(v)}' for k, v in kwargs.items() if k not in FLAGS]
    if words:
        arguments += ['--model-kwargs', *words]
    return code, shlex.join(arguments)
