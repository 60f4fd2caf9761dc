#!/usr/bin/env python3
"""Accuracy and speed of a trained Vision Transformer over keep ratios, without training it again.

    python examples/keep_ratio.py

Trains a small ViT of timm with its class token readout on scikit-learn's handwritten digits, as examples/quickstart.py
does, then hands it to `timm_evovit.evolve`, with a representative token and without, and measures it at one keep ratio
after the other. Writes `result.json` and `keep_ratio.png` to --output.
"""
import argparse
import json
import random
from pathlib import Path
from typing import Any, Dict, List, Optional

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt

from benchmark import machine
from quickstart import MODELS, Run, create_loaders, now, speed_up, train_in_turns, write_digits
from timm_evovit import evolve

matplotlib.use('Agg')
KEEP_RATIOS = (1., 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
VARIANTS = {'representative token': True, 'no representative token': False}


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--epochs', type=int, default=30)
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--lr', type=float, default=3e-3)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--output', type=Path, default=Path('output/keep_ratio'))
    return parser.parse_args(argv)


def measure(dense: torch.nn.Module, validation: Any, args: argparse.Namespace) -> Dict[str, List[Dict[str, float]]]:
    """Top-1 and speed-up of each variant at each keep ratio, the dense model timed in every round as well."""
    batches = [(x.to(args.device), y.to(args.device)) for x, y in validation]
    images = torch.cat([x for x, _ in batches])[:256]
    evolved = {label: evolve(dense, representative_token=token) for label, token in VARIANTS.items()}
    seconds: Dict[Any, List[float]] = {}
    correct = {}
    with torch.inference_mode():
        for i in range(args.rounds + 1):
            for label, ratio in [(None, 1.)] + [(label, r) for label in evolved for r in KEEP_RATIOS]:
                model = evolved.get(label, dense)
                if label is not None:
                    model.set_keep_ratio(ratio)
                    if not i:
                        correct[label, ratio] = sum((model(x).argmax(dim=1) == y).sum().item() for x, y in batches)
                start = now(args.device)
                model(images)
                if i:  # the first round warms up
                    seconds.setdefault((label, ratio), []).append(now(args.device) - start)
    return {
        label: [
            {'keep_ratio': ratio, 'top1': 100 * correct[label, ratio] / len(validation.dataset),
             'speed_up': speed_up(seconds[None, 1.], seconds[label, ratio])}
            for ratio in KEEP_RATIOS
        ]
        for label in evolved
    }


def draw(curves: Dict[str, List[Dict[str, float]]], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(8.8, 3.8), layout='constrained')
    for label, points in curves.items():
        for axis, key in zip(axes, ('top1', 'speed_up')):
            axis.plot([p['keep_ratio'] for p in points], [p[key] for p in points], 'o-', label=label)
    for axis, ylabel in zip(axes, ('top-1 (%)', 'speed-up in inference over the dense ViT')):
        axis.set(xlabel='keep ratio', ylabel=ylabel, xlim=(1.05, 0.05))
        axis.grid(alpha=0.3)
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(min(low, high - 5), high + 0.2)  # a difference of one image is not to look like a cliff
    axes[1].legend()
    figure.suptitle('A trained ViT that evolves, not trained again')
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Optional[List[str]] = None) -> Dict[str, Any]:
    args = parse_args(argv)
    random.seed(args.seed)
    np.random.seed(args.seed)
    _, dense_name, model_args, _ = MODELS['evo_deit']
    model_args = dict(model_args, global_pool='token')  # class attention means something where the class token is read
    root = write_digits(args.output / 'digits')
    train, validation = create_loaders(root, model_args['img_size'], args.batch_size)
    run = Run(dense_name, model_args, len(train), args)
    train_in_turns([run], train, args.epochs, f'{dense_name} ')
    curves = measure(run.model.eval(), validation, args)

    result = {'machine': machine(args), 'epochs': args.epochs, 'seed': args.seed, 'curves': curves}
    (args.output / 'result.json').write_text(json.dumps(result, indent=2))
    picture = args.output / 'keep_ratio.png'
    draw(curves, picture)
    for label, points in curves.items():
        print(f'\n{label}\n{"keep ratio":>10} {"top-1 %":>8} {"speed-up":>9}')
        for p in points:
            print(f'{p["keep_ratio"]:10.1f} {p["top1"]:8.2f} {p["speed_up"]:9.2f}')
    print(f'\n{len(validation.dataset)} validation images; picture: {picture}')
    return result


if __name__ == '__main__':
    main()
