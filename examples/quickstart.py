#!/usr/bin/env python3
"""Train a small dense model and its Evo-ViT counterpart on handwritten digits, compare accuracy and speed.

    python examples/quickstart.py
    python examples/quickstart.py --model evo_levit

Both models start from the same seed and take turns on the same batches. Written to --output: the image folder `digits`,
a folder for each model, which `timm.create_model('local-dir:FOLDER', pretrained=True)` loads, and a picture.
"""
import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from torch import nn
from tqdm import tqdm

from timm_evovit import AssistedLoss
from timm_evovit.tools.visualize import visualize

MODELS = {  # dense model, Evo-ViT model, arguments that make both small, epochs
    'evo_deit': ('deit_tiny_patch16_224', 'evo_deit_tiny_patch16_224', dict(
        img_size=32, patch_size=4, embed_dim=64, depth=6, num_heads=4, mlp_ratio=2, global_pool='avg',
        weight_init='jax'), 30),
    'evo_levit': ('levit_128s', 'evo_levit_128s', dict(
        img_size=160, embed_dim=(48, 64, 96), key_dim=8, num_heads=(3, 4, 6), depth=(4, 2, 2)), 15),
}
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--model', default='evo_deit', choices=sorted(MODELS))
parser.add_argument('--epochs', type=int, help='default: 30 for evo_deit, 15 for evo_levit')
parser.add_argument('--output', type=Path, default=Path('output/quickstart'))


def write_digits(root):
    """Write scikit-learn's 1797 digits to root/{train,validation}/{0..9}/*.png, 80 % of each class for training."""
    digits = load_digits()
    parts = train_test_split(range(1797), test_size=0.2, stratify=digits.target, random_state=0)
    for split, indices in zip(('train', 'validation'), parts):
        for i in indices:
            path = root / split / str(digits.target[i]) / f'{i:04d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[i] * (255 / 16)).astype(np.uint8)).save(path)


def seconds(function, *args):
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def main():
    args = parser.parse_args()
    dense, evo, model_args, epochs = MODELS[args.model]
    epochs = epochs if args.epochs is None else args.epochs
    if epochs < 1:
        parser.error(f'--epochs must be 1 or more, got {epochs}')
    cfg = dict(input_size=(3, model_args['img_size'], model_args['img_size']), mean=(0.5,) * 3, std=(0.5,) * 3,
               crop_pct=1.0, interpolation='bicubic')
    digits = args.output / 'digits'
    write_digits(digits)
    train, validation = (create_loader(
        create_dataset('', root=digits, split=split), batch_size=64, is_training=split == 'train', scale=(0.85, 1.0),
        hflip=0., color_jitter=None, num_workers=0, persistent_workers=False, use_prefetcher=False, **cfg)
        for split in ('train', 'validation'))

    models, optimizers, schedulers, training = {}, {}, {}, {dense: 0., evo: 0.}
    for name in (dense, evo):
        random_seed(0)
        # as in the paper: tokens are selected before every block for two thirds of the epochs, then once per stage
        schedule = dict(layer_to_stage_epochs=2 * epochs // 3) if name == evo else {}
        models[name] = timm.create_model(name, num_classes=10, pretrained_cfg_overlay=cfg, **model_args, **schedule)
        optimizers[name] = create_optimizer_v2(models[name], opt='adamw', lr=3e-3, weight_decay=0.05)
        schedulers[name], _ = create_scheduler_v2(
            optimizers[name], num_epochs=epochs, warmup_epochs=min(3, epochs - 1), warmup_lr=1e-5, min_lr=1e-5)
    models[evo].set_assisted_training()  # also as in the paper: the class token is classified, too
    loss = AssistedLoss(nn.CrossEntropyLoss(label_smoothing=0.1))

    def step(name, images, target):
        loss(models[name](images), target).backward()
        optimizers[name].step()
        optimizers[name].zero_grad()

    for epoch in tqdm(range(epochs), unit='epoch', disable=None):
        for name in models:
            models[name].train()
            schedulers[name].step(epoch)
        for images, target in train:
            for name in models:
                training[name] += seconds(step, name, images, target)

    images, target = (torch.cat(part) for part in zip(*validation))
    with torch.inference_mode():
        correct = {name: (model.eval()(images).argmax(dim=1) == target).float() for name, model in models.items()}
        rounds = [[seconds(model, images) for model in models.values()] for _ in range(7)]
    print(f'{"model":28} {"top-1 %":>8} {"img/s":>8} {"training s":>11}')
    for name, times in zip(models, zip(*rounds)):
        print(f'{name:28} {100 * correct[name].mean().item():8.2f} {len(images) / statistics.median(times):8.0f} '
              f'{training[name]:11.1f}')
        timm.models.save_for_hf(models[name], args.output / name, model_args=model_args, safe_serialization=True)
    drawn = [min(folder.iterdir()) for folder in sorted((digits / 'validation').glob('[2358]'))]
    picture = args.output / 'slow_tokens.png'
    Image.fromarray(np.vstack([np.asarray(drawing) for _, drawing in visualize(models[evo], drawn)])).save(picture)
    print(f'{statistics.median(a / b for a, b in rounds):.2f} times as fast in inference, '
          f'{training[dense] / training[evo]:.2f} in training; picture: {picture}')


if __name__ == '__main__':
    main()
