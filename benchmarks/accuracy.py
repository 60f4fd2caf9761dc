#!/usr/bin/env python3
"""Accuracy of Evo-ViT and its dense twins, trained from scratch on real pictures, and the speed of both.

    python benchmarks/accuracy.py train dense evo-stage evo-layer-to-stage --seeds 0 1 2 --data-dir cifar10
    python benchmarks/accuracy.py time dense evo-stage evo-layer-to-stage

`train` trains small models on an image folder or timm dataset. All variants of a seed see the same batches. Started
again, it goes on at the epoch it was in. `time` measures training and inference in turns with the first variant: run it
when the machine has nothing else to do. `report.py --accuracy` prints tables of both.

A variant is one of those below, `@RATIO` appended for another keep ratio, such as `evo-stage@0.7`:
"""
import argparse
import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import harness
import numpy as np
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset, create_transform
from timm.layers import set_fused_attn
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

from timm_evovit import AssistedLoss

Data = Tuple[torch.Tensor, torch.Tensor]  # pictures and labels
DEIT, EVO_DEIT = 'deit_tiny_patch16_224', 'evo_deit_tiny_patch16_224'
SIMILARITY = {'slow_tokens': 'similarity', 'global_pool': 'token'}
ELASTIC = (0.3, 0.4, 0.5, 0.7, 1.0)
VARIANTS: Dict[str, Tuple[str, Dict[str, Any], str]] = {
    'dense': (DEIT, {}, "timm's DeiT, class token readout"),
    'dense-avg': (DEIT, {'global_pool': 'avg'}, "timm's DeiT, average readout"),
    'dense-map': (
        DEIT, {'global_pool': 'map', 'class_token': False}, "timm's DeiT, attention pooling, no class token"),
    'dense-4-blocks': (DEIT, {'depth': 4}, "timm's DeiT with half of the blocks"),
    'dense-48-channels': (DEIT, {'embed_dim': 48, 'num_heads': 3}, "timm's DeiT of three quarters of the width"),
    'dense-32-channels': (DEIT, {'embed_dim': 32, 'num_heads': 2}, "timm's DeiT of half the width"),
    'dense-24-pixels': (DEIT, {'img_size': 24}, "timm's DeiT on smaller pictures, 24 pixels of 32"),
    'evo-stage': (EVO_DEIT, {}, 'Evo-DeiT, stage-wise selection, assisted loss'),
    'evo-layer-to-stage': (EVO_DEIT, {}, 'Evo-DeiT, layer-to-stage training, assisted loss'),
    'evo-representative': (EVO_DEIT, {'representative_token': True}, 'Evo-DeiT, stage-wise, representative token'),
    'evo-similarity': (EVO_DEIT, {**SIMILARITY, 'keep_ratio': 0.6}, 'Evo-DeiT, similar patches share a slow token'),
    'evo-similarity-avg': (
        EVO_DEIT, {**SIMILARITY, 'keep_ratio': 0.4, 'global_pool': 'avg', 'assisted_cls': False},
        'evo-similarity with average readout'),
    'evo-elastic': (
        EVO_DEIT, {**SIMILARITY, 'keep_ratio': 0.4, 'train_keep_ratio': ELASTIC},
        'evo-similarity trained at five keep ratios, and evaluated at each'),
    'levit': ('levit_128s', {}, "timm's LeViT"),
    'evo-levit': ('evo_levit_128s', {}, 'Evo-LeViT, stage-wise selection, assisted loss'),
}
# What all models and trainings have in common, recorded with every run. LeViT has a grid of a patch for every 8 x 8
# pixels, 2, 3 and 4 blocks, stages of one, two and three times the width, and heads that are 16 wide.
SETTINGS: Dict[str, Any] = dict(
    batch_size=128, patch_size=4, width=64, depth=8, heads=4, opt='adamw', lr=1e-3, weight_decay=0.05, warmup_epochs=2,
    smoothing=0.1, padding=4)


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    width = max(map(len, VARIANTS))
    parser = argparse.ArgumentParser(
        description=__doc__ + '\n'.join(f'    {name:{width}}  {text}' for name, (_, _, text) in VARIANTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument('variants', nargs='+', metavar='VARIANT', help='what to train or time, see above')
    shared.add_argument('--epochs', type=int, default=25)
    shared.add_argument('--img-size', type=int, help='32 for DeiT, 64 for LeViT')
    shared.add_argument('--amp', default='', choices=('', 'bfloat16'), help='autocast to this type')
    shared.add_argument('--no-fused-attn', action='store_true', help="timm's attention as products and softmax")
    shared.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    shared.add_argument('--output', type=Path, default=Path('benchmarks/results/accuracy'))
    train = commands.add_parser('train', parents=[shared], help='train variants')
    train.add_argument('--data-dir', default='', help='image folder, or where the dataset is or goes')
    train.add_argument('--dataset', default='', help="timm's name, such as torch/cifar10, to download; or image folder")
    train.add_argument('--seeds', type=int, nargs='+', default=[0])
    train.add_argument('--work-dir', type=Path, default=Path('output/accuracy'), help='checkpoints')
    timing = commands.add_parser('time', parents=[shared], help='time variants in turns, the first is the baseline')
    timing.add_argument('--rounds', type=int, default=9)

    args = parser.parse_args(argv)
    vars(args).update(SETTINGS)
    try:
        families = {'levit' if 'levit' in split_variant(variant)[0] else 'deit' for variant in args.variants}
    except ValueError as error:
        parser.error(str(error))
    if len(families) > 1 or len(set(args.variants)) < len(args.variants):
        parser.error(f"{' '.join(args.variants)}: each variant once, and one family, DeiT or LeViT, at a time")
    (args.family,) = families
    args.img_size = args.img_size or (32 if args.family == 'deit' else 64)
    return args


def split_variant(variant: str) -> Tuple[str, Dict[str, float]]:
    """Name, and the keep ratio as an argument of the model if there is one."""
    name, _, ratio = variant.partition('@')
    if name not in VARIANTS or (ratio and not name.startswith('evo')):
        raise ValueError(f"{variant}: there are {', '.join(VARIANTS)}, and @RATIO for Evo-ViT, such as evo-stage@0.7")
    return name, {'keep_ratio': float(ratio)} if ratio else {}


def create_model(variant: str, num_classes: int, args: argparse.Namespace) -> torch.nn.Module:
    """A variant, untrained; Evo-ViT returns the logits of both heads while training."""
    name, keep_ratio = split_variant(variant)
    model_name, overrides, _ = VARIANTS[name]
    kwargs: Dict[str, Any] = dict(
        patch_size=args.patch_size, embed_dim=args.width, depth=args.depth, num_heads=args.heads)
    if args.family == 'levit':
        widths = [args.width * i for i in (1, 2, 3)]
        kwargs = dict(stem_type='s8', embed_dim=tuple(widths), key_dim=16, num_heads=tuple(w // 32 for w in widths))
    kwargs.update({'img_size': args.img_size, **overrides, **keep_ratio})
    if name == 'evo-layer-to-stage':
        kwargs['layer_to_stage_epochs'] = 2 * args.epochs // 3  # as in the paper
    model = timm.create_model(model_name, num_classes=num_classes, **kwargs)
    if hasattr(model, 'set_assisted_training'):
        model.set_assisted_training(True)
    return model.to(args.device)


class Trainer:
    """A model with all that a training step takes."""

    def __init__(self, model: torch.nn.Module, updates_per_epoch: int, args: argparse.Namespace) -> None:
        self.model = model
        self.img_size = getattr(getattr(model, 'patch_embed', None), 'img_size', None)  # None for LeViT
        self.criterion = AssistedLoss(LabelSmoothingCrossEntropy(args.smoothing))
        self.optimizer = create_optimizer_v2(self.model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, sched='cosine', num_epochs=args.epochs, warmup_epochs=args.warmup_epochs, warmup_lr=1e-5,
            min_lr=1e-5, step_on_epochs=False, updates_per_epoch=updates_per_epoch)
        self.autocast = partial(torch.autocast, args.device.split(':')[0], torch.bfloat16, enabled=bool(args.amp))

    def step(self, epoch: int, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Update the model in the phase of layer-to-stage training that this epoch is in. Returns the loss."""
        self.model.train()
        if hasattr(self.model, 'set_epoch'):
            self.model.set_epoch(epoch)
        with self.autocast():
            output = self.model(images)
        output = tuple(x.float() for x in output) if isinstance(output, tuple) else output.float()
        loss = self.criterion(output, target)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    @torch.inference_mode()
    def infer(self, images: torch.Tensor) -> torch.Tensor:
        self.model.eval()
        with self.autocast():
            return self.model(images).float()


def load_pictures(split: str, args: argparse.Namespace) -> Data:
    """Pictures (N, H, W, 3) as uint8, and labels (N,) of a split."""
    dataset = create_dataset(args.dataset, root=args.data_dir or None, split=split, download=bool(args.dataset))
    dataset.transform = create_transform(
        args.img_size, is_training=False, interpolation='bicubic', crop_pct=1.0, normalize=False)
    images, labels = zip(*(dataset[i] for i in range(len(dataset))))
    images = torch.stack([torch.as_tensor(image) for image in images]).permute(0, 2, 3, 1).contiguous()
    return images.to(args.device), torch.tensor(labels)


def normalize(images: torch.Tensor, img_size: Optional[Tuple[int, int]] = None) -> torch.Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W), as timm normalizes by default, or of another height and width."""
    mean, std = (torch.tensor(x, device=images.device) for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    images = ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
    if img_size in (None, images.shape[2:]):
        return images
    return torch.nn.functional.interpolate(images, size=img_size, mode='bicubic', antialias=True)


def crop_and_flip(images: torch.Tensor, padding: int, generator: torch.Generator) -> torch.Tensor:
    """A random crop of each padded picture (B, H, W, 3), every second one mirrored by chance."""
    count, height, width, _ = images.shape
    padded = torch.nn.functional.pad(images, (0, 0, padding, padding, padding, padding))
    top, left = torch.randint(2 * padding + 1, (2, count, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    flip = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def batches(
        images: torch.Tensor, labels: torch.Tensor, epoch: int, seed: int, args: argparse.Namespace,
) -> Iterator[Data]:
    """Augmented batches of an epoch; seed and epoch say all about them."""
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(len(labels), generator=generator)
    for i in range(0, len(order) - args.batch_size + 1, args.batch_size):
        chosen = order[i:i + args.batch_size]
        yield crop_and_flip(images[chosen], args.padding, generator), labels[chosen].to(args.device)


def evaluate(trainer: Trainer, images: torch.Tensor, labels: torch.Tensor) -> Tuple[float, float, str]:
    """Top-1 in percent, cross entropy, and 1 for each picture that is classified rightly, 0 for the others."""
    logits = torch.cat([trainer.infer(normalize(batch, trainer.img_size)).cpu() for batch in images.split(256)])
    found = logits.argmax(1) == labels
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    return 100 * found.float().mean().item(), loss, ''.join(map(str, found.int().tolist()))


def configuration(args: argparse.Namespace) -> Dict[str, Any]:
    """What all variants of one comparison have in common."""
    return {k: getattr(args, k, '') for k in (
        'family', 'epochs', 'img_size', *SETTINGS, 'amp', 'no_fused_attn', 'dataset')}


def train_one(variant: str, seed: int, data: Dict[str, Data], args: argparse.Namespace) -> None:
    """Train a variant from a seed, or go on where its checkpoint is."""
    path = args.output / f'{variant}-seed{seed}.json'
    identity = {'variant': variant, 'seed': seed, 'configuration': configuration(args)}
    if path.exists():
        old = json.loads(path.read_text())
        if {**old['configuration'], **identity['configuration']} != old['configuration']:  # old files have more
            raise SystemExit(f'{path} is of another configuration, give another --output')
        if old['finished']:
            print(f'{variant}, seed {seed}: finished, {old["top1"][-1]:.2f} %', flush=True)
            return
    torch.manual_seed(seed)
    num_classes = int(max(labels.max() for _, labels in data.values())) + 1
    model = create_model(variant, num_classes, args)
    updates_per_epoch = len(data['train'][1]) // args.batch_size
    trainer = Trainer(model, updates_per_epoch, args)
    report: Dict[str, Any] = {
        **identity, 'finished': False, **harness.made_with('accuracy', args.argv, args.device),
        'parameters': sum(p.numel() for p in model.parameters()), 'num_classes': num_classes,
        'images': {split: len(data[split][1]) for split in ('train', 'validation')},
        'top1': [], 'validation_loss': [], 'train_loss': []}
    code = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    checkpoint = args.work_dir / f'{variant}-seed{seed}-{code}.pt'
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=args.device)
        model.load_state_dict(state['model'])
        trainer.optimizer.load_state_dict(state['optimizer'])
        report.update(state['report'])
    for epoch in range(len(report['top1']), args.epochs):
        losses = []
        for i, (images, target) in enumerate(batches(*data['train'], epoch, seed, args), epoch * updates_per_epoch + 1):
            trainer.scheduler.step_update(i)
            losses.append(trainer.step(epoch, normalize(images, trainer.img_size), target))
        report['train_loss'].append(torch.stack(losses).mean().item())
        top1, loss, report['right'] = evaluate(trainer, *data['validation'])
        report['top1'].append(top1)
        report['validation_loss'].append(loss)
        report['finished'] = epoch + 1 == args.epochs
        others = {*getattr(model, 'train_keep_ratio', ())} - {VARIANTS[split_variant(variant)[0]][1].get('keep_ratio')}
        for ratio in others if report['finished'] and '@' not in variant else ():
            model.set_keep_ratio(ratio)
            at_ratio, loss, right = evaluate(trainer, *data['validation'])
            name = f'{variant}@{ratio:g}'
            harness.write(args.output / f'{name}-seed{seed}.json', {
                **report, 'variant': name, 'top1': [at_ratio], 'validation_loss': [loss], 'right': right})
        harness.write(path, report)
        with harness.whole(checkpoint) as partial:
            torch.save(
                {'model': model.state_dict(), 'optimizer': trainer.optimizer.state_dict(), 'report': report}, partial)
        print(f'{variant}, seed {seed}, epoch {epoch + 1}/{args.epochs}: {top1:.2f} %', flush=True)


def train(args: argparse.Namespace) -> None:
    data = {split: load_pictures(split, args) for split in ('train', 'validation')}
    if args.batch_size > len(data['train'][1]):
        raise SystemExit(f"{len(data['train'][1])} training pictures are fewer than a batch, {args.batch_size}")
    for seed in args.seeds:
        for variant in args.variants:
            train_one(variant, seed, data, args)


def measure(args: argparse.Namespace) -> None:
    """Time training steps and inference in turns. Layer-to-stage training has the mean of its epochs in both phases."""
    torch.manual_seed(0)
    trainers = {v: Trainer(create_model(v, 10, args), 100, args) for v in args.variants}
    pictures = torch.randint(256, (args.batch_size, args.img_size, args.img_size, 3), dtype=torch.uint8)
    images = {v: normalize(pictures.to(args.device), trainer.img_size) for v, trainer in trainers.items()}
    target = torch.randint(10, (args.batch_size,), device=args.device)
    steps: Dict[Tuple[str, str], Callable[[], Any]] = {}
    for variant, trainer in trainers.items():
        steps[variant, 'train'] = partial(trainer.step, args.epochs - 1, images[variant], target)
        steps[variant, 'inference'] = partial(trainer.infer, images[variant])
        if getattr(trainer.model, 'layer_to_stage_epochs', 0):
            steps[variant, 'first'] = partial(trainer.step, 0, images[variant], target)
    times = harness.time_in_turns(steps, args.rounds, warmup=1, seconds=0.5, device=args.device)
    rows, baseline = [], {}
    for variant, trainer in trainers.items():
        share = getattr(trainer.model, 'layer_to_stage_epochs', 0) / args.epochs
        train, inference, first = (
            np.divide(times.get((variant, what), 0), args.batch_size) for what in ('train', 'inference', 'first'))
        seconds = {'train': (1 - share) * train + share * first, 'inference': inference}
        baseline = baseline or seconds
        rows.append({**configuration(args), 'variant': variant, **{
            what: harness.summarize(found, baseline[what], 1) for what, found in seconds.items()}})
    name = '-'.join(filter(None, ['time', args.family, args.amp, args.no_fused_attn and 'explicit']))
    harness.Report('accuracy', args.output / f'{name}.json', args.device, args.argv).add(*rows)


def title(run: Dict[str, Any]) -> str:
    """Model, training and number format of a run."""
    return '{} of width {width}, {img_size} x {img_size} pixels, {epochs} epochs, {}, {} attention'.format(
        'DeiT' if run['family'] == 'deit' else 'LeViT', run['amp'] or 'float32',
        'explicit' if run['no_fused_attn'] else 'fused', **run)


def main(argv: Optional[List[str]] = None) -> None:
    args = parse_args(argv)
    args.argv = argv
    set_fused_attn(not args.no_fused_attn)
    (train if args.command == 'train' else measure)(args)


if __name__ == '__main__':
    main()
