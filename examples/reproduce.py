#!/usr/bin/env python3
"""What each part of Evo-ViT's training contributes: accuracy and speed of small models over several seeds.

    python examples/reproduce.py --seeds 0 1 2

Two data sets of real pictures: scikit-learn's handwritten digits, and crops of the photographs that come with
scikit-image (which photograph is this crop from? Trained on the left half of each, tested on the right). Dense twin and
variants of Evo-DeiT train for equal epochs and take turns on the same batches, so that time ratios come from one run.
Writes `result.json`, after each seed, and `accuracy_speed.png` to --output.
"""
import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

import matplotlib
import numpy as np
import skimage.data
import timm
import torch
from PIL import Image

from benchmark import machine
from quickstart import MODELS, Run, create_loaders, speed_up, time_in_turns, train_in_turns, write_digits

PHOTOGRAPHS = (
    'astronaut', 'brick', 'camera', 'chelsea', 'coffee', 'coins', 'grass', 'gravel', 'hubble_deep_field', 'rocket')
DENSE = 'dense'
VARIANTS = {  # what differs from the model's defaults, by the name in the table; the dense twin comes first
    DENSE: None,
    'stage-wise': {},
    'layer-to-stage': dict(schedule=True),
    'layer-to-stage, no assisted CLS loss': dict(schedule=True, assisted_cls=False),
    'layer-to-stage, representative token': dict(schedule=True, representative_token=True),
}


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', nargs='+', default=['digits', 'photographs'], choices=('digits', 'photographs'))
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--epochs', type=int, default=MODELS['evo_deit'][3])
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--lr', type=float, default=3e-3)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--output', type=Path, default=Path('output/reproduce'))
    return parser.parse_args(argv)


def write_photographs(root: Path, size: int = 48, train: int = 100, validation: int = 40) -> Path:
    """Crops of `size` pixels as root/{train,validation}/<photograph>/*.png, one half of a photograph each."""
    generator = np.random.default_rng(0)
    for name in PHOTOGRAPHS:
        picture = Image.fromarray(getattr(skimage.data, name)()).convert('RGB')
        picture.thumbnail((384, 384))
        width, height = picture.size
        for split, left, count in (('train', 0, train), ('validation', width - width // 2, validation)):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                x = left + int(generator.integers(0, width // 2 - size + 1))
                y = int(generator.integers(0, height - size + 1))
                picture.crop((x, y, x + size, y + size)).save(folder / f'{i:03d}.png')
    return root


def create_runs(num_classes: int, updates_per_epoch: int, args: argparse.Namespace) -> Dict[str, Run]:
    evo_name, dense_name, model_args, _ = MODELS['evo_deit']
    runs = {}
    for label, variant in VARIANTS.items():
        kwargs = {**model_args, 'num_classes': num_classes, **(variant or {})}
        if kwargs.pop('schedule', False):
            kwargs['layer_to_stage_epochs'] = 2 * args.epochs // 3
        runs[label] = Run(dense_name if variant is None else evo_name, kwargs, updates_per_epoch, args)
        runs[label].name = label
    return runs


def run_seed(root: Path, seed: int, args: argparse.Namespace) -> Dict[str, Dict[str, float]]:
    """Train and time every variant from one seed."""
    args = argparse.Namespace(**{**vars(args), 'seed': seed})
    random.seed(seed)
    np.random.seed(seed)
    train, validation = create_loaders(root, MODELS['evo_deit'][2]['img_size'], args.batch_size)
    runs = create_runs(len(list((root / 'train').iterdir())), len(train), args)
    train_in_turns(list(runs.values()), train, args.epochs, f'{root.name}, seed {seed}, ')
    images = torch.cat([x for x, _ in validation])[:256].to(args.device)
    time_in_turns(list(runs.values()), images)
    dense = runs[DENSE]
    return {
        label: {
            'top1': run.top1(validation),
            'training_speed_up': dense.train_seconds / run.train_seconds,
            'speed_up': speed_up(dense.inference_seconds, run.inference_seconds),
        }
        for label, run in runs.items()
    }


def table(results: Dict[str, Any]) -> str:
    lines = []
    for data, by_variant in results.items():
        count = len(by_variant[DENSE])
        lines += ['', f'| {data}, {count} seeds | top-1 % (spread) | to dense | training speed-up | inference speed-up |',
                  '|---|---|---|---|---|']
        dense = statistics.mean(r['top1'] for r in by_variant[DENSE])
        for label, seeds in by_variant.items():
            top1 = [r['top1'] for r in seeds]
            mean = statistics.mean(top1)
            lines.append(
                f"| {label} | {mean:.2f} ({min(top1):.2f} - {max(top1):.2f}) | {mean - dense:+.2f} | "
                f"{statistics.median(r['training_speed_up'] for r in seeds):.2f} | "
                f"{statistics.median(r['speed_up'] for r in seeds):.2f} |")
    return '\n'.join(lines)


def plot(results: Dict[str, Any], path: Path) -> None:
    """Top-1 of every seed, and their mean, against training speed."""
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(5.2 * len(results), 4.6), squeeze=False)
    for axis, (data, by_variant) in zip(axes[0], results.items()):
        for i, (label, seeds) in enumerate(by_variant.items()):
            speed = [r['training_speed_up'] for r in seeds]
            top1 = [r['top1'] for r in seeds]
            axis.plot(speed, top1, '.', color=f'C{i}', alpha=0.4)
            axis.plot(statistics.mean(speed), statistics.mean(top1), 'os^Dv'[i % 5], color=f'C{i}', ms=9, label=label)
        axis.set(title=data, xlabel='training speed-up over dense', ylabel='top-1 (%)')
        axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='lower center', ncols=3 if len(results) > 1 else 1, frameon=False)
    figure.tight_layout(rect=(0, 0.12 if len(results) > 1 else 0.25, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Optional[List[str]] = None) -> Dict[str, Any]:
    args = parse_args(argv)
    start = time.perf_counter()
    writers = {'digits': write_digits, 'photographs': write_photographs}
    roots = {name: writers[name](args.output / name) for name in args.data}
    results: Dict[str, Any] = {name: {label: [] for label in VARIANTS} for name in roots}
    for seed in args.seeds:
        for name, root in roots.items():
            for label, figures in run_seed(root, seed, args).items():
                results[name][label].append(figures)
        report = {
            'machine': machine(args), 'torch': torch.__version__, 'timm': timm.__version__, 'epochs': args.epochs,
            'batch_size': args.batch_size, 'seeds': args.seeds, 'seconds': time.perf_counter() - start,
            'results': results,
        }
        (args.output / 'result.json').write_text(json.dumps(report, indent=2))
    picture = args.output / 'accuracy_speed.png'
    plot(results, picture)
    print(table(results))
    print(f"\n{args.epochs} epochs, {report['seconds']:.0f} s in all\nplot: {picture}")
    return report


if __name__ == '__main__':
    main()
