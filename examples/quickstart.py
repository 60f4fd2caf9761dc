#!/usr/bin/env python3
"""Train a small Evo-ViT and its dense twin on handwritten digits, compare them, and draw what Evo-ViT looked at.

    python examples/quickstart.py

The digits are scikit-learn's, written out as an image folder; loaders, transforms, optimizer, schedule, loss and task
are timm's. Both models start from the same seed and take turns on the same batches. Writes to --output: the image
folder, a folder for each model, which `timm.create_model('local-dir:FOLDER', pretrained=True)` loads, `result.json` and
`informative_tokens.png`.
"""
import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import matplotlib
import numpy as np
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import accuracy
from torchvision.transforms import InterpolationMode, RandomRotation
from tqdm import tqdm

from timm_evovit import AssistedLoss, informative_tokens

MODELS = {  # evolving model, its dense twin, what makes either small enough for digits and two CPU cores, epochs
    'evo_deit': ('evo_deit_tiny_patch16_224', 'deit_tiny_patch16_224', dict(
        num_classes=10, img_size=32, patch_size=4, embed_dim=64, depth=6, num_heads=4, mlp_ratio=2, global_pool='avg',
        weight_init='jax'), 30),
    'evo_levit': ('evo_levit_128s', 'levit_128s', dict(
        num_classes=10, img_size=160, embed_dim=(48, 64, 96), key_dim=8, num_heads=(3, 4, 6), depth=(4, 2, 2)), 15),
}
MEAN = STD = (0.5,) * 3


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='evo_deit', choices=sorted(MODELS))
    parser.add_argument('--epochs', type=int, help=', '.join(f'{m[3]} for {name}' for name, m in MODELS.items()))
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--lr', type=float, default=3e-3)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--output', type=Path, default=Path('output/quickstart'))
    args = parser.parse_args(argv)
    if args.epochs is None:
        args.epochs = MODELS[args.model][3]
    return args


def write_digits(root: Path) -> Path:
    """1,797 digits of 8 x 8 pixels as root/{train,validation}/{0..9}/*.png, 80 % of each class for training."""
    digits = load_digits()
    parts = train_test_split(np.arange(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0)
    for split, indices in zip(('train', 'validation'), parts):
        for i in indices:
            path = root / split / str(digits.target[i]) / f'{i:04d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[i] * (255 / 16)).astype(np.uint8)).save(path)
    return root


def create_loaders(root: Path, img_size: int, batch_size: int) -> Tuple[Any, Any]:
    """timm's loaders of the folders root/train, augmented, and root/validation."""
    data = dict(
        input_size=(3, img_size, img_size), batch_size=batch_size, use_prefetcher=False, num_workers=0,
        persistent_workers=False, mean=MEAN, std=STD, interpolation='bicubic', crop_pct=1.0)
    train = create_loader(
        create_dataset('', root=root, split='train'), is_training=True, scale=(0.85, 1.0), hflip=0., color_jitter=None,
        **data)
    train.dataset.transform.transforms.insert(0, RandomRotation(10, InterpolationMode.BILINEAR))
    return train, create_loader(create_dataset('', root=root, split='validation'), **data)


def now(device: str) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.startswith('cuda'):
        torch.cuda.synchronize()
    return time.perf_counter()


class Run:
    """One model in training."""

    def __init__(self, name: str, model_args: Dict[str, Any], updates_per_epoch: int, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.name = name
        cfg = dict(input_size=(3, model_args['img_size'], model_args['img_size']), mean=MEAN, std=STD, crop_pct=1.0)
        self.model = timm.create_model(name, pretrained_cfg_overlay=cfg, **model_args).to(args.device)
        criterion: torch.nn.Module = LabelSmoothingCrossEntropy(0.1)
        if hasattr(self.model, 'set_assisted_training'):  # the paper's loss: one for the patches, one for the class token
            self.model.set_assisted_training()
            criterion = AssistedLoss(criterion)
        self.task = ClassificationTask(self.model, criterion, device=torch.device(args.device), verbose=False)
        self.optimizer = create_optimizer_v2(self.model, opt='adamw', lr=args.lr, weight_decay=0.05)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, sched='cosine', num_epochs=args.epochs, warmup_epochs=3, warmup_lr=1e-5, min_lr=1e-5,
            step_on_epochs=False, updates_per_epoch=updates_per_epoch)
        self.device = args.device
        self.updates = 0
        self.train_seconds = 0.
        self.inference_seconds: List[float] = []

    def train_step(self, images: torch.Tensor, target: torch.Tensor) -> float:
        start = now(self.device)
        loss = self.task(images, target)['loss']
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.train_seconds += now(self.device) - start
        self.updates += 1
        self.scheduler.step_update(self.updates)
        return loss.item()

    @torch.inference_mode()
    def top1(self, loader: Any) -> float:
        self.model.eval()
        logits, targets = zip(*((self.model(x.to(self.device)), y.to(self.device)) for x, y in loader))
        return accuracy(torch.cat(logits), torch.cat(targets))[0].item()

    @torch.inference_mode()
    def time_inference(self, images: torch.Tensor) -> None:
        self.model.eval()
        start = now(self.device)
        self.model(images)
        self.inference_seconds.append(now(self.device) - start)


def train_in_turns(runs: List[Run], loader: Any, epochs: int, description: str = '') -> None:
    """Train all models on the same batches, in turns."""
    with tqdm(total=epochs * len(loader), unit='step', disable=None) as progress:
        for epoch in range(epochs):
            for run in runs:
                run.task.train()
            for i, (images, target) in enumerate(loader):
                images, target = images.to(runs[0].device), target.to(runs[0].device)
                for run in runs if i % 2 else reversed(runs):
                    loss = run.train_step(images, target)
                progress.update()
            progress.set_description(f'{description}epoch {epoch + 1}/{epochs} loss {loss:.3f}')


def time_in_turns(runs: List[Run], images: torch.Tensor, rounds: int = 8) -> None:
    """Time inference of all models in turns, after one round that does not count."""
    for i in range(rounds + 1):
        for run in runs if i % 2 else reversed(runs):
            run.time_inference(images)
    for run in runs:
        del run.inference_seconds[0]


def speed_up(dense: List[float], evo: List[float]) -> float:
    """Median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(dense, evo))


def draw_rows(rows: List[Tuple[str, Any]], path: Path) -> None:
    """Write rows of pictures (B, H, W, 3) in [0, 1], each with a label on its left, to a PNG."""
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    count = len(rows[0][1])
    figure, axes = plt.subplots(len(rows), count, figsize=(1.2 * count + 1, 1.25 * len(rows)), squeeze=False)
    for (label, pictures), line in zip(rows, axes):
        for axis, picture in zip(line, pictures):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha='right', va='center', fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw(model: torch.nn.Module, images: torch.Tensor, path: Path) -> None:
    """Digits above the same digits with only the informative patches of each selection left bright."""
    selections = informative_tokens(model, images.to(next(model.parameters()).device))
    pixels = (images * STD[0] + MEAN[0]).clamp(0, 1)
    dark = torch.tensor([0.35, 0.0, 0.25]).view(3, 1, 1)
    rows = [('digit', pixels.permute(0, 2, 3, 1))]
    for s in selections:
        keep = torch.nn.functional.interpolate(s.mask[:, None].float().cpu(), pixels.shape[-2:])
        faded = (pixels * keep + (0.35 * pixels + dark) * (1 - keep)).clamp(0, 1)
        rows.append((f'informative\nfrom block {s.block}', faded.permute(0, 2, 3, 1)))
    draw_rows(rows, path)


def main(argv: Optional[List[str]] = None) -> Dict[str, Any]:
    args = parse_args(argv)
    start = time.perf_counter()
    random.seed(args.seed)
    np.random.seed(args.seed)
    root = write_digits(args.output / 'digits')
    evo_name, dense_name, model_args, _ = MODELS[args.model]
    train, validation = create_loaders(root, model_args['img_size'], args.batch_size)
    evo_args = dict(model_args, layer_to_stage_epochs=2 * args.epochs // 3)  # as the paper trains
    runs = [Run(dense_name, model_args, len(train), args), Run(evo_name, evo_args, len(train), args)]
    train_in_turns(runs, train, args.epochs)
    images = torch.cat([x for x, _ in validation])
    time_in_turns(runs, images[:256].to(args.device))

    dense, evo = runs
    result = {
        'epochs': args.epochs, 'seed': args.seed, 'validation_images': len(validation.dataset), 'models': {},
    }
    for run in runs:
        result['models'][run.name] = {
            'top1': run.top1(validation),
            'images_per_second': min(len(images), 256) / statistics.median(run.inference_seconds),
            'train_seconds': run.train_seconds,
        }
        timm.models.save_for_hf(run.model, args.output / run.name, model_args=model_args, safe_serialization=True)
    result['speed_up'] = speed_up(dense.inference_seconds, evo.inference_seconds)
    result['training_speed_up'] = dense.train_seconds / evo.train_seconds
    picture = args.output / 'informative_tokens.png'
    draw(evo.model, images[::len(images) // 8][:8], picture)
    result['seconds'] = time.perf_counter() - start
    (args.output / 'result.json').write_text(json.dumps(result, indent=2))

    print(f'\n{"model":28} {"top-1 %":>8} {"img/s":>8} {"training s":>11}')
    for name, r in result['models'].items():
        print(f'{name:28} {r["top1"]:8.2f} {r["images_per_second"]:8.0f} {r["train_seconds"]:11.1f}')
    print(f'\nspeed-up of {evo.name}: {result["speed_up"]:.2f} in inference, '
          f'{result["training_speed_up"]:.2f} in training')
    print(f'{result["validation_images"]} validation images, {args.epochs} epochs, {result["seconds"]:.0f} s in all')
    print(f'picture: {picture}')
    return result


if __name__ == '__main__':
    main()
