#!/usr/bin/env python3
"""Segmentation on the feature maps of Evo-DeiT and of dense DeiT, trained from scratch: mean IoU and speed.

    python benchmarks/segmentation.py --seeds 0 1 2 --tome ToMe --output benchmarks/results/segmentation.json

scikit-learn's handwritten zeros and ones are scattered over textures of scikit-image; every pixel is background, zero
or one. Both backbones are trained on the same images under the head of examples/dense_features.py.

Then the dense backbone evolves without training. Beside it runs ToMe by its authors' code, a checkout of
github.com/facebookresearch/ToMe: each patch of its maps gets the token that it was merged into. Its speed is that
without finding out which one that is, as fast as any code that does can be.
"""
import argparse
import copy
import sys
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import harness
import numpy as np
import skimage.data
import torch
from skimage.transform import resize
from sklearn.datasets import load_digits
from sklearn.metrics import jaccard_score
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from without_training import fused, tome

from timm_evovit import evolve

sys.path.insert(0, str(Path(__file__).parent.parent / 'examples'))
from dense_features import Segmenter  # noqa: E402

SIZE = 64
CLASSES = ('background', 'zero', 'one')
BACKBONES = ('deit_tiny_patch16_224', 'evo_deit_tiny_patch16_224')
MERGED = (0.5, 0.625, 0.75, 0.875, 0.95)  # parts of the patches that ToMe merges


class Scenes:
    """Images (B, 3, SIZE, SIZE) in [-1, 1] with labels (B, SIZE, SIZE), drawn from one part of the digits."""

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

    def batch(self, size: int) -> Tuple[torch.Tensor, torch.Tensor]:
        images, labels = map(np.stack, zip(*(self.draw() for _ in range(size))))
        x = torch.from_numpy(images).float().unsqueeze(1).expand(-1, 3, -1, -1) * 2 - 1
        return x.contiguous(), torch.from_numpy(labels)


class MergedMaps(nn.Module):
    """Complete maps of a model that merges tokens by ToMe; without `trace`, of tokens in any place."""
    trace = True

    def __init__(self, model: nn.Module, out_indices: Sequence[int]) -> None:
        super().__init__()
        self.model, self.out_indices = model, out_indices

    def forward(self, x: torch.Tensor) -> List[torch.Tensor]:
        model = self.model
        model._tome_info.update(r=[model.r] * len(model.blocks), size=None, source=None, trace_source=self.trace)
        x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        B, N, C = x.shape
        maps = []
        for i, block in enumerate(model.blocks):
            x = block(x)
            if i in self.out_indices:
                source = model._tome_info['source']
                idx = torch.arange(N).expand(B, N) % x.shape[1] if source is None else source.argmax(dim=1)
                full = x.gather(1, idx.unsqueeze(2).expand(-1, -1, C))[:, 1:]
                maps.append(full.transpose(1, 2).unflatten(2, model.patch_embed.grid_size))
        return maps


def without_training(dense: Segmenter, args: argparse.Namespace) -> Dict[str, Segmenter]:
    """The dense model with other backbones, by method."""
    models = {f'similarity {ratio}': copy.deepcopy(dense) for ratio in args.similarity}
    for model, ratio in zip(models.values(), args.similarity):
        model.backbone = evolve(model.backbone, ratio)
    for merged in MERGED if args.tome else ():
        merging = tome(dense.backbone.model, merged, args.tome).eval()
        for name, model in (('ToMe', merging), ('ToMe, fused', fused(merging))):
            models[f'{name} {merged}'] = copy.deepcopy(dense)
            models[f'{name} {merged}'].backbone = MergedMaps(model, dense.backbone.out_indices)
    return models


def train(name: str, seed: int, args: argparse.Namespace) -> Segmenter:
    """A model with this backbone, trained on the images of a seed."""
    torch.manual_seed(seed)
    model = Segmenter(
        name, False, (2, 5), len(CLASSES), img_size=SIZE, patch_size=4, embed_dim=64, depth=6, num_heads=4,
        weight_init='jax')
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.steps)
    scenes = Scenes(slice(0, 1437), seed)
    for _ in tqdm(range(args.steps), f'{name}, seed {seed}', unit='step', disable=None):
        x, y = scenes.batch(16)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return model.eval()


def main(argv: Optional[List[str]] = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument('--steps', type=int, default=400)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--images', type=int, default=256, help='number of images to validate on')
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--similarity', type=float, nargs='*', default=[0.7, 0.6, 0.5, 0.4], help='keep ratios')
    parser.add_argument('--tome', type=Path, metavar='CHECKOUT', help='of ToMe')
    args = parser.parse_args(argv)
    report = harness.Report('segmentation', args.output, argv=argv)
    images, labels = Scenes(slice(1437, None), 1).batch(args.images)
    for seed in args.seeds:
        models = {name: train(name, seed, args) for name in BACKBONES}
        models.update(without_training(models[BACKBONES[0]], args))
        with torch.inference_mode():
            MergedMaps.trace = True
            predicted = {name: torch.cat([model(x).argmax(dim=1) for x in images.split(32)])
                         for name, model in models.items()}
            MergedMaps.trace = False
            times = harness.time_in_turns(
                {name: lambda model=model: model(images[:64]) for name, model in models.items()}, args.rounds, 1, 0.)
        for name in models:
            iou = 100 * jaccard_score(labels.flatten(), predicted[name].flatten(), labels=(0, 1, 2), average=None)
            report.add({
                'model': name, 'baseline': BACKBONES[0], 'seed': seed, 'steps': args.steps,
                'iou': dict(zip(CLASSES, iou.tolist())), 'mean_iou': iou.mean().item(),
                'multiply_adds': harness.multiply_adds(models[name], (3, SIZE, SIZE)),
                **harness.summarize(times[name], times[BACKBONES[0]], min(64, args.images))})


if __name__ == '__main__':
    main()
