#!/usr/bin/env python3
"""Accuracy and speed of a model over keep ratios, on images of your own, without training.

    python benchmarks/keep_ratio.py vit_small_patch16_224.augreg_in21k_ft_in1k --pretrained --data-dir imagenet
    python benchmarks/keep_ratio.py evo_deit_small --checkpoint output/finetune/checkpoint.pth --data-dir flowers \\
        --model-kwargs num_classes=102 --output benchmarks/results/keep_ratio-flowers.json

A model that evolves is measured at each keep ratio, a Vision Transformer is evolved first. The baseline of the speed-up
is the dense Vision Transformer, or the model at keep ratio 1.
"""
import argparse
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import harness
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.utils import ParseKwargs
from tqdm import tqdm

from timm_evovit import evolve


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', help='evo_* model or Vision Transformer, by any name that timm takes')
    parser.add_argument('--pretrained', action='store_true')
    parser.add_argument('--checkpoint', default='', help='weights of the model')
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs)
    parser.add_argument('--evolve-kwargs', nargs='*', default={}, action=ParseKwargs,
                        help='arguments of evolve for a Vision Transformer, such as representative_token=False')
    parser.add_argument('--data-dir', type=Path, required=True, help='image folder, or where the --dataset is')
    parser.add_argument('--dataset', default='', help='timm dataset, such as torch/cifar10 (default: image folder)')
    parser.add_argument('--split', default='validation')
    parser.add_argument('--img-size', type=int, help="the model's own by default")
    parser.add_argument('--crop-pct', type=float, help="the model's own by default")
    parser.add_argument(
        '--keep-ratios', type=float, nargs='+', default=[1., 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    parser.add_argument('-b', '--batch-size', type=int, default=64)
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--warmup', type=int, default=1, help='rounds that are not counted')
    parser.add_argument('--seconds', type=float, default=0.5, help='minimum time of a keep ratio in a round')
    parser.add_argument('--output', type=Path, metavar='JSON', help='result file')
    args = parser.parse_args(argv)
    for ratio in args.keep_ratios:
        if not 0 < ratio <= 1:
            parser.error(f'--keep-ratios must be in (0, 1], got {ratio}')
    return args


def main(argv: Optional[List[str]] = None) -> Dict[str, Any]:
    args = parse_args(argv)
    kwargs = dict(args.model_kwargs, **({'img_size': args.img_size} if args.img_size else {}))
    dense = harness.create_model(
        args.model, pretrained=args.pretrained, checkpoint_path=args.checkpoint, **kwargs).to(args.device).eval()
    evolves = hasattr(dense, 'set_keep_ratio')
    model = dense if evolves else evolve(dense, **args.evolve_kwargs)

    data = resolve_data_config({'img_size': args.img_size, 'crop_pct': args.crop_pct}, model=dense)
    dataset = create_dataset(args.dataset, root=args.data_dir, split=args.split)
    loader = create_loader(
        dataset, batch_size=args.batch_size, num_workers=args.workers, persistent_workers=False, use_prefetcher=False,
        input_size=data['input_size'], interpolation=data['interpolation'], mean=data['mean'], std=data['std'],
        crop_pct=data['crop_pct'])

    correct = dict.fromkeys(['dense', *args.keep_ratios], 0)

    def predict(ratio: Any, images: torch.Tensor) -> torch.Tensor:
        if ratio == 'dense' and not evolves:
            return dense(images)
        model.set_keep_ratio(1. if ratio == 'dense' else ratio)
        return model(images)

    def step(ratio: Any, images: torch.Tensor) -> Callable[[], Any]:
        return torch.inference_mode()(lambda: predict(ratio, images))

    total, first = 0, None
    with torch.inference_mode():
        for images, target in tqdm(loader, 'accuracy', disable=None):
            images, target = images.to(args.device), target.to(args.device)
            first = images if first is None else first
            total += len(target)
            for ratio in correct:
                correct[ratio] += (predict(ratio, images).argmax(dim=1) == target).sum().item()
    times = harness.time_in_turns(
        {ratio: step(ratio, first) for ratio in correct}, args.rounds, args.warmup, args.seconds, args.device)

    report = harness.Report('keep_ratio', args.output, args.device, sys.argv[1:] if argv is None else argv)
    print(f'\n{args.model}, {total} images, batch {len(first)}')
    print(f'{"keep ratio":>10} {"top-1 %":>8} {"img/s":>9} {"speed-up":>9}')
    for ratio in correct:
        row = {
            'model': harness.without_folders(args.model), 'keep_ratio': None if ratio == 'dense' else ratio,
            'top1': 100 * correct[ratio] / total, 'images': total, 'batch_size': len(first),
            'img_size': first.shape[-1], 'device': args.device, 'evolve_kwargs': args.evolve_kwargs,
            **harness.summarize(times[ratio], times['dense'], len(first)),
        }
        report.add(row)
        print(f'{ratio:>10} {row["top1"]:8.2f} {row["images_per_second"]:9.1f} {row["speed_up"]:9.2f}')
    return report.data


if __name__ == '__main__':
    main()
