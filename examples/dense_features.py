#!/usr/bin/env python3
"""Segmentation with the complete patch grid: an Evo-ViT and its dense twin as backbones, from scratch.

    python examples/dense_features.py

scikit-learn's handwritten zeros and ones are scattered over textures that come with scikit-image; every pixel is
background, zero or one. Both backbones are timm's `features_only` models under the same small head; they train in
turns on the same pictures. Prints mean IoU and speed and writes `result.json` and `segmentation.png` to --output.
"""
import argparse
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import matplotlib
import numpy as np
import skimage.data
import timm
import torch
from sklearn.datasets import load_digits
from skimage.transform import resize
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from quickstart import draw_rows, now, speed_up

SIZE = 64
CLASSES = ('background', 'zero', 'one')
BACKBONES = {'deit': 'deit_tiny_patch16_224', 'evo_deit': 'evo_deit_tiny_patch16_224'}


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=400)
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--lr', type=float, default=2e-3)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--output', type=Path, default=Path('output/dense_features'))
    return parser.parse_args(argv)


class Scenes:
    """Pictures (B, 3, SIZE, SIZE) in [-1, 1] with labels (B, SIZE, SIZE), drawn from one part of the digits."""

    def __init__(self, part: slice, seed: int) -> None:
        digits = load_digits()
        chosen = np.flatnonzero(digits.target[part] < 2)
        self.digits, self.targets = digits.images[part][chosen] / 16, digits.target[part][chosen]
        self.textures = [getattr(skimage.data, name)() / 255 for name in ('brick', 'grass', 'gravel')]
        self.generator = np.random.default_rng(seed)

    def draw(self) -> Tuple[np.ndarray, np.ndarray]:
        g = self.generator
        texture = self.textures[g.integers(3)]
        y, x = g.integers(0, texture.shape[0] - SIZE), g.integers(0, texture.shape[1] - SIZE)
        image = 0.6 * texture[y:y + SIZE, x:x + SIZE]
        label = np.zeros((SIZE, SIZE), dtype=np.int64)
        for _ in range(g.integers(2, 5)):
            i, side = g.integers(len(self.digits)), int(g.integers(16, 29))
            stroke = resize(self.digits[i], (side, side), order=1)
            y, x = g.integers(0, SIZE - side + 1, size=2)
            window = np.s_[y:y + side, x:x + side]
            image[window] = image[window] * (1 - stroke) + stroke
            label[window][stroke > 0.4] = 1 + self.targets[i]
        return image, label

    def batch(self, size: int, device: str) -> Tuple[torch.Tensor, torch.Tensor]:
        images, labels = map(np.stack, zip(*(self.draw() for _ in range(size))))
        x = torch.from_numpy(images).float().unsqueeze(1).expand(-1, 3, -1, -1) * 2 - 1
        return x.contiguous().to(device), torch.from_numpy(labels).to(device)


class Segmenter(nn.Module):
    """Maps of two depths of a backbone, one convolution on each, their sum upsampled to the pixels."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.backbone = timm.create_model(
            name, features_only=True, out_indices=(2, 5), img_size=SIZE, patch_size=4, embed_dim=64, depth=6,
            num_heads=4, weight_init='jax')
        self.heads = nn.ModuleList(
            nn.Conv2d(c, 4 * len(CLASSES), 3, padding=1) for c in self.backbone.feature_info.channels())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = sum(head(f) for head, f in zip(self.heads, self.backbone(x)))
        return F.interpolate(F.pixel_shuffle(maps, 2), x.shape[-2:], mode='bilinear')


def mean_iou(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> List[float]:
    """Intersection over union of each class, in percent."""
    with torch.inference_mode():
        predicted = torch.cat([model(x).argmax(dim=1) for x in images.split(32)])
    return [
        100 * ((predicted == c) & (labels == c)).sum().item() / ((predicted == c) | (labels == c)).sum().item()
        for c in range(len(CLASSES))
    ]


def draw(models: Dict[str, nn.Module], images: torch.Tensor, labels: torch.Tensor, path: Path) -> None:
    """Pictures above what is true of their pixels and what each model says."""
    colours = matplotlib.colormaps['viridis']
    maps = [('truth', labels)]
    with torch.inference_mode():
        maps += [(name, model(images).argmax(dim=1)) for name, model in models.items()]
    rows = [('picture', images.permute(0, 2, 3, 1).cpu() / 2 + 0.5)]
    rows += [(name, colours(m.cpu().numpy() / (len(CLASSES) - 1))[..., :3]) for name, m in maps]
    draw_rows(rows, path)


def main(argv: Optional[List[str]] = None) -> Dict[str, Any]:
    args = parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)

    scenes = Scenes(slice(0, 1437), args.seed)
    models, optimizers, schedulers, seconds = {}, {}, {}, {}
    for name, backbone in BACKBONES.items():
        torch.manual_seed(args.seed)
        models[name] = Segmenter(backbone).to(args.device).train()
        optimizers[name] = torch.optim.AdamW(models[name].parameters(), lr=args.lr, weight_decay=0.05)
        schedulers[name] = torch.optim.lr_scheduler.OneCycleLR(optimizers[name], args.lr, total_steps=args.steps)
        seconds[name] = {'training': [], 'inference': []}
    progress = tqdm(range(args.steps), unit='step', disable=None)
    for step in progress:
        images, labels = scenes.batch(args.batch_size, args.device)
        for name in list(models) if step % 2 else reversed(list(models)):
            start = now(args.device)
            loss = F.cross_entropy(models[name](images), labels)
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            seconds[name]['training'].append(now(args.device) - start)
            schedulers[name].step()
        progress.set_description(f'loss {loss.item():.3f}')

    images, labels = Scenes(slice(1437, None), 1).batch(256, args.device)
    for model in models.values():
        model.eval()
    for i in range(9):
        for name in list(models) if i % 2 else reversed(list(models)):
            start = now(args.device)
            with torch.inference_mode():
                models[name](images[:64])
            if i:
                seconds[name]['inference'].append(now(args.device) - start)
    result: Dict[str, Any] = {'steps': args.steps, 'seed': args.seed, 'models': {}}
    for name, model in models.items():
        iou = mean_iou(model, images, labels)
        result['models'][name] = {'iou': dict(zip(CLASSES, iou)), 'mean_iou': sum(iou) / len(iou)} | {
            f'{kind}_speed_up': speed_up(seconds['deit'][kind], seconds[name][kind])
            for kind in ('training', 'inference')}
    (args.output / 'result.json').write_text(json.dumps(result, indent=2))
    picture = args.output / 'segmentation.png'
    draw(models, images[:8], labels[:8], picture)

    print(f'\n{"backbone":10} {"mean IoU %":>10} ' + ' '.join(f'{c:>12}' for c in CLASSES)
          + f' {"speed-up, training":>19} {"inference":>10}')
    for name, r in result['models'].items():
        print(f'{name:10} {r["mean_iou"]:10.2f} ' + ' '.join(f'{v:12.2f}' for v in r['iou'].values())
              + f' {r["training_speed_up"]:19.2f} {r["inference_speed_up"]:10.2f}')
    print(f'256 pictures with digits that were not trained on; picture: {picture}')
    return result


if __name__ == '__main__':
    main()
