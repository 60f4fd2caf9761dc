#!/usr/bin/env python3
"""Accuracy of Evo-ViT and its dense twins, trained from scratch on real pictures, and the speed of both.

    python benchmarks/accuracy.py train dense evo-stage evo-layer-to-stage --seeds 0 1 2 --data-dir cifar10
    python benchmarks/accuracy.py train dense evo-stage@0.7 --dataset torch/cifar10 --dataset-download --data-dir data
    python benchmarks/accuracy.py time dense evo-stage evo-layer-to-stage

`train` trains small models on any image folder or timm dataset for equal epochs; all variants of a seed see the same
batches. Pictures are decoded once, into a file of raw pixels in --work-dir that is mapped into memory. After every
epoch the checkpoint in --work-dir and a JSON file per variant and seed in --output are written anew; started again, it
goes on at the epoch it was in, and leaves alone what is finished. `time` measures training and inference in turns with
the first variant: run it when the machine has nothing else to do. `accuracy_report.py` makes the table and the plot.

A variant is one of those below, `@RATIO` appended for another keep ratio than 0.5, such as `evo-stage@0.7`:
"""
import argparse
import base64
import hashlib
import json
import os
import random
import statistics
import sys
import time
import zlib
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import harness
import numpy as np
import timm
import torch
from accuracy_report import TIMED
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup, create_dataset, create_transform
from timm.layers import set_fused_attn
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

from timm_evovit import AssistedLoss

DEIT, EVO_DEIT = 'deit_tiny_patch16_224', 'evo_deit_tiny_patch16_224'
LEVIT, EVO_LEVIT = 'levit_128s', 'evo_levit_128s'
SCHEDULE = 'layer_to_stage'  # stands for layer_to_stage_epochs, two thirds of the epochs as in the paper
VARIANTS: Dict[str, Tuple[str, Dict[str, Any], str]] = {
    'dense': (DEIT, {}, "timm's DeiT, class token readout"),
    'dense-avg': (DEIT, {'global_pool': 'avg'}, "timm's DeiT, average readout"),
    'evo-stage': (EVO_DEIT, {}, 'Evo-DeiT, stage-wise selection, assisted loss'),
    'evo-layer-to-stage': (EVO_DEIT, {SCHEDULE: True}, 'Evo-DeiT, layer-to-stage training, assisted loss'),
    'evo-representative': (
        EVO_DEIT, {'representative_token': True}, 'Evo-DeiT, stage-wise, representative token, assisted loss'),
    'evo-similarity': (
        EVO_DEIT, {'slow_tokens': 'similarity', 'keep_ratio': 0.6, 'global_pool': 'token'},
        'Evo-DeiT, like patches share a slow token, class token readout'),
    'evo-unassisted': (EVO_DEIT, {'assisted_cls': False}, 'Evo-DeiT, stage-wise, no assisted loss'),
    'levit': (LEVIT, {}, "timm's LeViT"),
    'evo-levit': (EVO_LEVIT, {}, 'Evo-LeViT, stage-wise selection, assisted loss'),
    'evo-levit-layer-to-stage': (EVO_LEVIT, {SCHEDULE: True}, 'Evo-LeViT, layer-to-stage training, assisted loss'),
}


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    width = max(map(len, VARIANTS))
    parser = argparse.ArgumentParser(
        description=__doc__ + '\n'.join(f'    {name:{width}}  {text}' for name, (_, _, text) in VARIANTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument('variants', nargs='+', metavar='VARIANT', help='what to train or time, see above')
    shared.add_argument('--epochs', type=int, default=25)
    shared.add_argument('-b', '--batch-size', type=int, default=128)
    shared.add_argument('--img-size', type=int, help='32 for DeiT, 64 for LeViT')
    shared.add_argument('--patch-size', type=int, default=4, help='of DeiT; LeViT has a grid of img-size / 8')
    shared.add_argument('--width', type=int, default=64, help="of DeiT; LeViT's first stage, then two and three times")
    shared.add_argument('--depth', type=int, default=8, help='blocks of DeiT; LeViT has 2, 3 and 4')
    shared.add_argument('--heads', type=int, default=4, help="of DeiT; LeViT's heads are 16 wide")
    shared.add_argument('--opt', default='adamw')
    shared.add_argument('--lr', type=float, default=1e-3)
    shared.add_argument('--weight-decay', type=float, default=0.05)
    shared.add_argument('--warmup-epochs', type=int, default=2)
    shared.add_argument('--drop-path', type=float, default=0.)
    shared.add_argument('--smoothing', type=float, default=0.1)
    shared.add_argument('--mixup', type=float, default=0., help="alpha of timm's mixup, 0 for none")
    shared.add_argument('--amp', default='', choices=('', 'bfloat16', 'float16'), help='autocast to this type')
    shared.add_argument('--no-fused-attn', action='store_true', help="timm's attention as products and softmax")
    shared.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    shared.add_argument('--output', type=Path, default=Path('benchmarks/results/accuracy'))

    train = commands.add_parser('train', parents=[shared], help='train variants')
    train.add_argument('--data-dir', default='', help='image folder, or where the dataset is or goes')
    train.add_argument('--dataset', default='', help="timm's name of it, such as torch/cifar10; default: image folder")
    train.add_argument('--dataset-download', action='store_true')
    train.add_argument('--train-split', default='train')
    train.add_argument('--val-split', default='validation')
    train.add_argument('--seeds', type=int, nargs='+', default=[0])
    train.add_argument('--padding', type=int, default=4, help='of the random crop')
    train.add_argument('--limit', type=int, default=0, help='so many pictures of each split only')
    train.add_argument('--work-dir', type=Path, default=Path('output/accuracy'), help='decoded pictures, checkpoints')

    timing = commands.add_parser('time', parents=[shared], help='time variants in turns, the first is the baseline')
    timing.add_argument('--rounds', type=int, default=9)
    timing.add_argument('--steps', type=int, default=4, help='of each variant in a round')
    timing.add_argument('--num-classes', type=int, default=10)

    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    for variant in args.variants:
        try:
            split_variant(variant)
        except ValueError as error:
            parser.error(str(error))
    models = {family(variant) for variant in args.variants}
    if len(models) > 1:
        parser.error(f"{' '.join(args.variants)}: DeiT and LeViT have settings of their own, one family at a time")
    if len(set(args.variants)) < len(args.variants):
        parser.error(f"{' '.join(args.variants)}: each variant once")
    if args.img_size is None:
        args.img_size = 32 if models == {'deit'} else 64
    for name in ('epochs', 'batch_size', 'img_size', 'patch_size', 'width', 'depth', 'heads', 'rounds', 'steps'):
        if getattr(args, name, 1) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(args, name)}")
    for name in ('lr', 'weight_decay', 'warmup_epochs', 'mixup', 'padding', 'limit'):
        if getattr(args, name, 0) < 0:
            parser.error(f"--{name.replace('_', '-')} must be 0 or more, got {getattr(args, name)}")
    if args.warmup_epochs >= args.epochs and args.epochs > 1:
        parser.error(f'--warmup-epochs {args.warmup_epochs} must be fewer than --epochs {args.epochs}')
    if args.mixup and args.batch_size % 2:
        parser.error(f"timm's mixup takes an even --batch-size, got {args.batch_size}")
    if models == {'deit'} and args.img_size % args.patch_size:
        parser.error(f'--img-size {args.img_size} is no multiple of --patch-size {args.patch_size}')
    if models == {'deit'} and args.width % args.heads:
        parser.error(f'--width {args.width} is no multiple of --heads {args.heads}')
    if models == {'levit'} and args.width % 16:
        parser.error(f'--width {args.width} of LeViT must be a multiple of 16, the width of its heads')
    if args.command == 'train' and not args.dataset and not Path(args.data_dir).is_dir():
        parser.error(f'--data-dir {args.data_dir!r} is no folder, and there is no --dataset')
    return args


def split_variant(variant: str) -> Tuple[str, Optional[float]]:
    """Name and keep ratio, if given."""
    name, at, ratio = variant.partition('@')
    if name not in VARIANTS:
        raise ValueError(f"{variant}: no such variant, there are {', '.join(VARIANTS)}")
    if not at:
        return name, None
    try:
        keep_ratio = float(ratio)
    except ValueError:
        keep_ratio = 0.
    if not name.startswith('evo') or not 0 < keep_ratio <= 1:
        raise ValueError(f'{variant}: @RATIO is for Evo-ViT and must be in (0, 1], such as evo-stage@0.7')
    return name, keep_ratio


def family(variant: str) -> str:
    return 'levit' if 'levit' in VARIANTS[split_variant(variant)[0]][0] else 'deit'


def create_model(variant: str, num_classes: int, args: argparse.Namespace) -> torch.nn.Module:
    """A variant, untrained; Evo-ViT returns the logits of both heads while training."""
    name, keep_ratio = split_variant(variant)
    model_name, overrides, _ = VARIANTS[name]
    kwargs: Dict[str, Any] = dict(num_classes=num_classes, img_size=args.img_size)
    if family(variant) == 'deit':
        kwargs.update(
            patch_size=args.patch_size, embed_dim=args.width, depth=args.depth, num_heads=args.heads,
            drop_path_rate=args.drop_path)
    else:
        widths = [args.width * i for i in (1, 2, 3)]
        kwargs.update(
            stem_type='s8', embed_dim=tuple(widths), key_dim=16, num_heads=tuple(w // 16 // 2 for w in widths),
            drop_path_rate=args.drop_path)
    kwargs.update(overrides)
    if kwargs.pop(SCHEDULE, False):
        kwargs['layer_to_stage_epochs'] = 2 * args.epochs // 3
    if keep_ratio is not None:
        kwargs['keep_ratio'] = keep_ratio
    model = timm.create_model(model_name, **kwargs)
    if hasattr(model, 'set_assisted_training'):
        model.set_assisted_training(True)
    return model.to(args.device)


class Trainer:
    """A model with all that a training step takes."""

    def __init__(self, model: torch.nn.Module, updates_per_epoch: int, args: argparse.Namespace) -> None:
        self.model = model
        criterion = SoftTargetCrossEntropy() if args.mixup else LabelSmoothingCrossEntropy(args.smoothing)
        self.criterion = AssistedLoss(criterion)
        self.optimizer = create_optimizer_v2(self.model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, sched='cosine', num_epochs=args.epochs, warmup_epochs=args.warmup_epochs, warmup_lr=1e-5,
            min_lr=1e-5, step_on_epochs=False, updates_per_epoch=updates_per_epoch)
        self.scaler = torch.amp.GradScaler(args.device.split(':')[0], enabled=args.amp == 'float16')
        self.device = args.device
        self.amp = getattr(torch, args.amp) if args.amp else None

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.split(':')[0], self.amp, enabled=self.amp is not None)

    def set_epoch(self, epoch: int) -> None:
        """Training mode, in the phase of layer-to-stage training that this epoch is in."""
        self.model.train()
        if hasattr(self.model, 'set_epoch'):
            self.model.set_epoch(epoch)

    def step(self, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            output = self.model(images)
        output = tuple(x.float() for x in output) if isinstance(output, tuple) else output.float()
        loss = self.criterion(output, target)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss.detach()

    @torch.inference_mode()
    def infer(self, images: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            return self.model(images).float()


def decode(split: str, args: argparse.Namespace) -> Tuple[torch.Tensor, torch.Tensor]:
    """Pictures (N, H, W, 3) as uint8, mapped into memory, and labels (N,) of a split, decoded once per --work-dir.

    Raises:
        ValueError: There are no pictures.
    """
    where = str(Path(args.data_dir).resolve()) if args.data_dir else ''
    key = hashlib.sha256(json.dumps([args.dataset, where, split, args.img_size, args.limit]).encode()).hexdigest()[:12]
    paths = [args.work_dir / f'{split}-{args.img_size}-{key}-{kind}.npy' for kind in ('images', 'labels')]
    if not all(path.exists() for path in paths):
        dataset = create_dataset(
            args.dataset, root=args.data_dir or None, split=split, download=args.dataset_download)
        dataset.transform = create_transform(
            args.img_size, is_training=False, interpolation='bicubic', crop_pct=1.0, normalize=False)
        count = len(dataset)
        if not count:
            raise ValueError(f'no pictures in {split} of {args.dataset or args.data_dir}')
        indices = np.linspace(0, count - 1, min(args.limit or count, count)).astype(int)
        args.work_dir.mkdir(parents=True, exist_ok=True)
        partial = [path.with_suffix(f'.{os.getpid()}') for path in paths]
        images = np.lib.format.open_memmap(
            partial[0], mode='w+', dtype=np.uint8, shape=(len(indices), args.img_size, args.img_size, 3))
        labels = np.empty(len(indices), dtype=np.int64)
        for i, index in enumerate(indices):
            image, labels[i] = dataset[int(index)]
            images[i] = torch.as_tensor(image).permute(1, 2, 0).numpy()
        images.flush()
        with open(partial[1], 'wb') as file:
            np.save(file, labels)
        for old, new in zip(partial, paths):
            os.replace(old, new)
    images = np.load(paths[0], mmap_mode='c')
    return torch.from_numpy(images).to(args.device), torch.from_numpy(np.load(paths[1]))


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W), as timm normalizes by default."""
    mean = torch.tensor(IMAGENET_DEFAULT_MEAN, device=images.device)
    std = torch.tensor(IMAGENET_DEFAULT_STD, device=images.device)
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


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
        images: torch.Tensor,
        labels: torch.Tensor,
        epoch: int,
        seed: int,
        args: argparse.Namespace,
) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
    """Augmented batches of an epoch; seed and epoch say all about them."""
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(len(labels), generator=generator)
    for i in range(0, len(order) - args.batch_size + 1, args.batch_size):
        chosen = order[i:i + args.batch_size]
        yield crop_and_flip(images[chosen], args.padding, generator), labels[chosen].to(args.device)


def evaluate(
        trainer: Trainer,
        images: torch.Tensor,
        labels: torch.Tensor,
        args: argparse.Namespace,
) -> Tuple[float, float, torch.Tensor]:
    """Top-1 in percent, cross entropy and predicted classes."""
    trainer.model.eval()
    size = 2 * args.batch_size
    logits = torch.cat([
        trainer.infer(normalize(images[i:i + size])).cpu() for i in range(0, len(images), size)])
    predictions = logits.argmax(1)
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    return 100 * (predictions == labels).float().mean().item(), loss, predictions


def pack(classes: torch.Tensor, num_classes: int) -> str:
    """Class indices as text: base64 of the zlib-compressed bytes, one per picture, two of more than 256 classes."""
    dtype = np.uint8 if num_classes <= 256 else np.dtype('<u2')
    return base64.b64encode(zlib.compress(classes.numpy().astype(dtype).tobytes(), 9)).decode()


def configuration(args: argparse.Namespace) -> Dict[str, Any]:
    """What all variants of one comparison have in common."""
    left_out = (
        'command', 'variants', 'seeds', 'output', 'work_dir', 'data_dir', 'dataset_download', 'device', 'rounds',
        'steps', 'train_split', 'val_split', 'num_classes', 'argv')
    return {'family': family(args.variants[0]), **{k: v for k, v in vars(args).items() if k not in left_out}}


def train_one(variant: str, seed: int, data: Dict[str, Any], args: argparse.Namespace) -> None:
    """Train a variant from a seed, or go on where its checkpoint is."""
    path = args.output / f'{variant}-seed{seed}.json'
    identity = {'variant': variant, 'seed': seed, 'configuration': configuration(args)}
    if path.exists():
        old = json.loads(path.read_text())
        if any(old[k] != v for k, v in identity.items()):
            raise SystemExit(f'{path} is of another configuration, give another --output')
        if old['finished']:
            print(f'{variant}, seed {seed}: finished, {old["top1"][-1]:.2f} %', flush=True)
            return
    torch.manual_seed(seed)
    num_classes = data['num_classes']
    model = create_model(variant, num_classes, args)
    trainer = Trainer(model, len(data['train'][1]) // args.batch_size, args)
    mixup = Mixup(args.mixup, label_smoothing=args.smoothing, num_classes=num_classes) if args.mixup else None
    report: Dict[str, Any] = {
        **identity, 'finished': False, **harness.made_with(args.device),
        'command': harness.command('accuracy', args.argv),
        'parameters': sum(p.numel() for p in trainer.model.parameters()), 'num_classes': num_classes,
        'images': {split: len(data[split][1]) for split in ('train', 'validation')},
        'top1': [], 'validation_loss': [], 'train_loss': [], 'train_seconds': [], 'evaluation_seconds': [],
        'labels': pack(data['validation'][1], num_classes),
    }
    code = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    checkpoint = args.work_dir / f'{variant}-seed{seed}-{code}.pt'
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=args.device)
        trainer.model.load_state_dict(state['model'])
        trainer.optimizer.load_state_dict(state['optimizer'])
        trainer.scaler.load_state_dict(state['scaler'])
        report.update(state['report'])
    for epoch in range(len(report['top1']), args.epochs):
        for seeder in (random.seed, np.random.seed, torch.manual_seed):  # drop path, mixup: a resumed run is the same
            seeder(seed * 100_003 + epoch)
        trainer.set_epoch(epoch)
        start = time.perf_counter()
        losses = []
        updates = epoch * (len(data['train'][1]) // args.batch_size)
        for images, target in batches(*data['train'], epoch, seed, args):
            images = normalize(images)
            if mixup is not None:
                images, target = mixup(images, target)
            trainer.scheduler.step_update(updates := updates + 1)
            losses.append(trainer.step(images, target))
        report['train_loss'].append(torch.stack(losses).mean().item())
        trained = time.perf_counter()
        top1, loss, predictions = evaluate(trainer, *data['validation'], args)
        report['top1'].append(top1)
        report['validation_loss'].append(loss)
        report['train_seconds'].append(trained - start)
        report['evaluation_seconds'].append(time.perf_counter() - trained)
        report['finished'] = epoch + 1 == args.epochs
        report['predictions'] = pack(predictions, num_classes)
        partial = checkpoint.with_suffix(f'.{os.getpid()}')
        torch.save({
            'model': trainer.model.state_dict(), 'optimizer': trainer.optimizer.state_dict(),
            'scaler': trainer.scaler.state_dict(), 'report': report}, partial)
        os.replace(partial, checkpoint)
        harness.write(path, report)
        print(f'{variant}, seed {seed}, epoch {epoch + 1}/{args.epochs}: {top1:.2f} %, '
              f'loss {report["train_loss"][-1]:.4f}, {trained - start:.0f} s', flush=True)


def train(args: argparse.Namespace) -> None:
    data: Dict[str, Any] = {
        'train': decode(args.train_split, args), 'validation': decode(args.val_split, args)}
    images, labels = data['train']
    if args.batch_size > len(labels):
        raise SystemExit(f'--batch-size {args.batch_size} is more than the {len(labels)} training pictures')
    data['num_classes'] = int(labels.max()) + 1
    if int(data['validation'][1].max()) >= data['num_classes']:
        raise SystemExit(f'{args.val_split} has classes that {args.train_split} has not')
    for seed in args.seeds:
        for variant in args.variants:
            train_one(variant, seed, data, args)


def measure(args: argparse.Namespace) -> None:
    """Time training steps and inference of all variants in turns, and write `time-<family>.json`.

    Layer-to-stage training is timed in both phases and has the mean of its epochs. The files of finished runs of this
    configuration get the medians too.
    """
    torch.manual_seed(0)
    trainers = {v: Trainer(create_model(v, args.num_classes, args), 100, args) for v in args.variants}
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=args.device)
    target = torch.randint(args.num_classes, (args.batch_size,), device=args.device)
    if args.mixup:
        target = torch.nn.functional.one_hot(target, args.num_classes).float()

    def train_steps(trainer: Trainer, epoch: int) -> None:
        trainer.set_epoch(epoch)
        for _ in range(args.steps):
            trainer.step(images, target)

    def inference_steps(trainer: Trainer) -> None:
        trainer.model.eval()
        for _ in range(args.steps):
            trainer.infer(images)

    steps: Dict[Any, Callable[[], None]] = {}
    for variant, trainer in trainers.items():
        steps[variant, 'first'] = partial(train_steps, trainer, 0)
        steps[variant, 'last'] = partial(train_steps, trainer, args.epochs - 1)
        steps[variant, 'inference'] = partial(inference_steps, trainer)
        if not getattr(trainer.model, 'layer_to_stage_epochs', 0):
            del steps[variant, 'first']  # the same as the last one
    times = harness.time_in_turns(steps, args.rounds, warmup=1, seconds=0., device=args.device)
    results = {}
    for variant, trainer in trainers.items():
        seconds = {key: np.array(times[variant, key]) / args.steps / args.batch_size
                   for key in ('first', 'last', 'inference') if (variant, key) in times}
        share = getattr(trainer.model, 'layer_to_stage_epochs', 0) / args.epochs
        train = share * seconds.get('first', 0.) + (1 - share) * seconds['last']
        results[variant] = {'train': train.tolist(), 'inference': seconds['inference'].tolist()}
    report = {
        **harness.made_with(args.device), 'command': harness.command('accuracy', args.argv),
        'configuration': configuration(args), 'baseline': args.variants[0], 'seconds_per_image': results}
    baseline = results[args.variants[0]]
    for variant, times in results.items():
        ratios = {k: [a / b for a, b in zip(baseline[k], times[k])] for k in times}
        print(f'{variant:28}' + ''.join(
            f'  {k} {1e6 * statistics.median(times[k]):7.0f} us, {statistics.median(r):.2f} times as fast '
            f'({min(r):.2f} - {max(r):.2f})' for k, r in ratios.items()))
    settings = ('-' + args.amp if args.amp else '') + ('-explicit' if args.no_fused_attn else '')
    path = args.output / f"time-{report['configuration']['family']}{settings}.json"
    harness.write(path, report)
    add_to_runs(path)


def add_to_runs(path: Path) -> None:
    """Write the times of a file into those of the finished runs beside it that have its configuration."""
    timing = json.loads(path.read_text())
    medians = {variant: {what: statistics.median(seconds) for what, seconds in times.items()}
               for variant, times in timing['seconds_per_image'].items()}
    for of_run in path.parent.glob('*-seed*.json'):
        run = json.loads(of_run.read_text())
        same = all(run['configuration'].get(key) == timing['configuration'][key] for key in TIMED)
        if same and run['finished'] and run['variant'] in medians:
            run['timed'] = {
                'file': path.name, 'seconds_per_image': {v: medians[v] for v in (timing['baseline'], run['variant'])}}
            harness.write(of_run, run)


def main(argv: Optional[List[str]] = None) -> None:
    args = parse_args(argv)
    set_fused_attn(not args.no_fused_attn)
    (train if args.command == 'train' else measure)(args)


if __name__ == '__main__':
    main()
