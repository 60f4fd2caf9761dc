#!/usr/bin/env python3
"""Evo-ViT as the backbone of a segmentation network: feature maps at several depths, each of the complete grid.

    python examples/dense_features.py --out-indices 3 7 11
    python examples/dense_features.py --model evo_levit_256

Prints the feature maps, then trains the network for a few steps on random rectangles, a stand-in for real data.
`benchmarks/segmentation.py` measures accuracy and speed of such a network.
"""
import argparse

import timm
import torch
from torch import nn
from torch.nn import functional as F

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--model', default='evo_deit_tiny')
parser.add_argument('--pretrained', action='store_true')
parser.add_argument(
    '--out-indices', type=int, nargs='+', help='blocks, or stages of Evo-LeViT (default: the last three)')
parser.add_argument('--num-classes', type=int, default=2)
parser.add_argument('--steps', type=int, default=20)
parser.add_argument('--batch-size', type=int, default=8)
parser.add_argument('--lr', type=float, default=1e-3)
parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')


class Segmenter(nn.Module):
    """One convolution on each feature map, their sum at the size of the image."""

    def __init__(self, name, pretrained, out_indices, num_classes, **kwargs):
        super().__init__()
        self.backbone = timm.create_model(
            name, pretrained, features_only=True, out_indices=out_indices or 3, **kwargs)
        channels = self.backbone.feature_info.channels()
        self.heads = nn.ModuleList(nn.Conv2d(c, num_classes, 3, padding=1) for c in channels)

    def forward(self, x):
        """Images (B, 3, H, W) to logits (B, num_classes, H, W)."""
        maps = [head(features) for head, features in zip(self.heads, self.backbone(x))]
        return sum(F.interpolate(m, x.shape[-2:], mode='bilinear') for m in maps)


def rectangles(batch_size, size, device):
    """Noise (B, 3, size, size) with a brighter rectangle in each image, and labels (B, size, size)."""
    labels = torch.zeros(batch_size, size, size, dtype=torch.long)
    for label in labels:
        top, left, height, width = (torch.randint(size // 8, size // 2, (4,))).tolist()
        label[top:top + height, left:left + width] = 1
    images = torch.randn(batch_size, 3, size, size) + labels.unsqueeze(1)
    return images.to(device), labels.to(device)


def main():
    args = parser.parse_args()
    for option, least in ('num_classes', 2), ('steps', 1), ('batch_size', 1), ('lr', 0):
        if not vars(args)[option] >= least:  # or it is no number
            parser.error(f"--{option.replace('_', '-')} must be {least} or more, got {vars(args)[option]}")
    try:
        model = Segmenter(args.model, args.pretrained, args.out_indices, args.num_classes).to(args.device)
    except AssertionError as e:  # timm's, with the indices that there are
        parser.error(f'--out-indices: {e}')
    except (OSError, RuntimeError, ValueError) as e:
        parser.error(str(e))
    size = model.backbone.pretrained_cfg['input_size'][-1]
    images, labels = rectangles(args.batch_size, size, args.device)
    for index, features in zip(model.backbone.feature_info.out_indices, model.backbone(images)):
        print(f'feature map {index}: {tuple(features.shape)}')

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    for step in range(args.steps):
        images, labels = rectangles(args.batch_size, size, args.device)
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f'step {step}: loss {loss.item():.3f}')


if __name__ == '__main__':
    main()
