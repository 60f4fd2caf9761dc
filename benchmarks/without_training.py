#!/usr/bin/env python3
"""What evolving a trained model costs without further training, beside other methods by their authors' code.

    python benchmarks/accuracy.py train dense --data-dir cifar10
    python benchmarks/without_training.py output/accuracy/dense-seed*.pt --data-dir cifar10 --tome ToMe --evit evit

Accuracy is that of dense models which accuracy.py has trained. Speed is measured on DeiT-S with random weights and on
the first checkpoint, all methods in turns: run it when the machine has nothing else to do. docs/evolve.md describes the
methods, whose checkouts are those of github.com/facebookresearch/ToMe, /hchautran/PiToMe and /youweiliang/evit.
"""
import argparse
import copy
import importlib
import sys
import types
from itertools import chain
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple
from unittest import mock

import accuracy
import harness
import timm
import torch
from timm.layers import set_fused_attn
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from timm_evovit import evolve

Row = Dict[str, Any]
DEIT_S = 'deit_small_patch16_224'  # the model that is timed
MERGED = (0.5, 0.625, 0.75, 0.875, 1.)  # parts of the patches that ToMe merges
LEFT = (0.5, 0.4, 0.3, 0.25, 0.2)  # parts of the patches that are left by the last block of PiToMe
KEPT = (0.8, 0.7, 0.6, 0.5)  # parts of the patches that EViT keeps, three times


def methods(dense: nn.Module, args: argparse.Namespace) -> Dict[str, nn.Module]:
    """Models by method and setting, the dense one first."""
    models = {'dense': dense, **{f'similarity {ratio}': evolve(dense, ratio) for ratio in args.similarity}}
    models.update({f'attention {ratio}': evo_deit(dense, ratio) for ratio in args.attention})
    for name, create, checkout, settings in (
            ('ToMe', tome, args.tome, MERGED), ('PiToMe', pitome, args.pitome, LEFT), ('EViT', evit, args.evit, KEPT)):
        if checkout:
            models.update({f'{name} {setting}': create(dense, setting, checkout).eval() for setting in settings})
    for name in [name for name in models if args.fused and name.startswith(('ToMe', 'PiToMe'))]:
        models[name.replace(' ', ', fused ')] = fused(models[name])
    models.update({f'smaller pictures {part}': smaller_pictures(dense, part) for part in args.pictures})
    for part in args.blocks:
        model = models[f'fewer blocks {part}'] = copy.deepcopy(dense)
        model.blocks = model.blocks[:round(part * len(model.blocks))]
    return models


def fused(model: nn.Module) -> nn.Module:
    """ToMe or PiToMe with scaled_dot_product_attention."""
    def forward(self: Any, x: torch.Tensor, size: Optional[torch.Tensor] = None) -> Tuple[torch.Tensor, torch.Tensor]:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        mask = None if size is None else size.log()[:, None, None, :, 0]
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(y.transpose(1, 2).flatten(2)), k.mean(1)

    model = copy.deepcopy(model)
    for block in model.blocks:
        block.attn.forward = types.MethodType(forward, block.attn)
    return model


def smaller_pictures(dense: nn.Module, part: float) -> nn.Module:
    """The dense model on pictures of this part of their side, with the position embedding resampled by timm."""
    model, patch = copy.deepcopy(dense), dense.patch_embed.patch_size[0]
    size = [patch * round(part * side) for side in dense.patch_embed.grid_size]
    model.set_input_size(img_size=size)
    model.register_forward_pre_hook(lambda module, args: nn.functional.interpolate(
        args[0], size, mode='bicubic', antialias=True))
    return model


def evo_deit(dense: nn.Module, keep_ratio: float) -> nn.Module:
    """The paper's Evo-DeiT with its representative token and the weights of a DeiT."""
    model = timm.create_model(
        'evo_deit_tiny_patch16_224', img_size=dense.patch_embed.img_size, patch_size=dense.patch_embed.patch_size,
        num_classes=dense.num_classes, global_pool=dense.global_pool, embed_dim=dense.embed_dim,
        depth=len(dense.blocks), num_heads=dense.blocks[0].attn.num_heads,
        slow_tokens='attention', keep_ratio=keep_ratio, representative_token=True, assisted_cls=False)
    model.load_state_dict(dense.state_dict())
    return model.eval()


def tome(dense: nn.Module, merged: float, checkout: Path) -> nn.Module:
    """ToMe, which merges a part of the patches, equally many in each block."""
    module = import_from(checkout, 'tome')
    model = copy.deepcopy(dense)
    module.patch.timm(model)
    model.r = round(merged * model.patch_embed.num_patches / len(model.blocks))
    if model.global_pool == 'avg':  # weighted by their patches, as in its code for MAE
        model.pool = lambda x: (x * model._tome_info['size'])[:, 1:].sum(dim=1) / model.patch_embed.num_patches
    elif model.global_pool == 'map':  # so that it pools as its attention in the blocks does
        model.pool = lambda x: model.attn_pool(x, attn_mask=model._tome_info['size'].mT.unsqueeze(1).log())
    return model


class VisionTransformer04(VisionTransformer):
    """What PiToMe expects of timm 0.4."""
    dist_token = None
    pre_logits = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.forward_features(x))


def pitome(dense: nn.Module, left: float, checkout: Path) -> nn.Module:
    """PiToMe, which merges equal parts in each block until a part of the patches is left."""
    # the __init__ files import text models, which need other packages: leave them out
    for name in ('pitome', 'pitome.patch'):
        package = sys.modules.setdefault(name, types.ModuleType(name))
        package.__path__ = [str(checkout.joinpath('algo', *name.split('.')))]
    model = copy.deepcopy(dense)
    model.__class__ = VisionTransformer04
    importlib.import_module('pitome.patch.deit').apply_patch(model)
    model.ratio = left ** (1 / len(model.blocks))
    model.register_forward_hook(lambda module, images, output: output[0])  # without their count of operations
    return model


def evit(dense: nn.Module, kept: float, checkout: Path) -> nn.Module:
    """EViT with fused tokens, which keeps a part of the patches at a quarter, half and three quarters of the depth."""
    sys.modules.setdefault('torchprofile', types.ModuleType('torchprofile')).profile_macs = None  # not needed here
    with mock.patch('timm.models.registry.register_model', lambda create: create):  # its models have timm's names
        module = import_from(checkout, 'evit')
    depth = len(dense.blocks)
    model = module.EViT(
        img_size=dense.patch_embed.img_size, patch_size=dense.patch_embed.patch_size, num_classes=dense.num_classes,
        embed_dim=dense.embed_dim, depth=depth, num_heads=dense.blocks[0].attn.num_heads, fuse_token=True,
        keep_rate=[kept if i in (depth // 4, depth // 2, 3 * depth // 4) else 1 for i in range(depth)])
    model.load_state_dict(dense.state_dict())
    return model


def import_from(folder: Path, name: str) -> types.ModuleType:
    with mock.patch.object(sys, 'path', [str(folder), *sys.path]):
        return importlib.import_module(name)


def share(model: nn.Module, dense: nn.Module) -> float:
    size = dense.in_chans, *dense.patch_embed.img_size
    return harness.multiply_adds(model, size) / harness.multiply_adds(dense, size)


@torch.inference_mode()
def predict(model: nn.Module, images: torch.Tensor, batch_size: int = 250) -> torch.Tensor:
    """Logarithms of the probabilities of the classes."""
    return torch.cat([model(accuracy.normalize(batch)).log_softmax(1) for batch in images.split(batch_size)])


def load(checkpoint: Path, args: argparse.Namespace) -> Tuple[nn.Module, Dict[str, Any], argparse.Namespace]:
    """Dense model of a checkpoint of accuracy.py, the report of its training and the settings."""
    state = torch.load(checkpoint, map_location='cpu', weights_only=True)
    report = state['report']
    if not report['finished']:
        raise SystemExit(f"{checkpoint} is of epoch {len(report['top1'])}, its training is not finished")
    settings = accuracy.parse_args(['train', report['variant'], '--data-dir', str(args.data_dir)])
    vars(settings).update(report['configuration'])
    dense = accuracy.create_model(report['variant'], report['num_classes'], settings).eval()
    dense.load_state_dict(state['model'])
    return dense, report, settings


def compare(found: torch.Tensor, dense: torch.Tensor, labels: torch.Tensor) -> Dict[str, float]:
    """Top-1 in percent, the points lost to the dense model, and the divergence from its predictions in thousandths.

    Of both the standard error of the mean over the pictures, which are paired.
    """
    correct, dense_correct = (100. * (p.argmax(dim=1) == labels) for p in (found, dense))
    lost, divergence = dense_correct - correct, 1000 * (dense.exp() * (dense - found)).sum(dim=1)
    return dict(top1=correct.mean().item(), lost=lost.mean().item(), lost_error=lost.std().item() / len(lost) ** 0.5,
                kl=divergence.mean().item(), kl_error=divergence.std().item() / len(lost) ** 0.5)


def finetune(model: nn.Module, teacher: Optional[nn.Module], data: accuracy.Data, report: Row, settings: Any) -> None:
    """Train more epochs by labels or by the predictions of a teacher, with the batches that all models get."""
    trainer = accuracy.Trainer(model, len(data[1]) // settings.batch_size, settings)
    epochs = range(len(report['top1']), len(report['top1']) + settings.epochs)
    batches = chain.from_iterable(accuracy.batches(*data, epoch, report['seed'], settings) for epoch in epochs)
    torch.manual_seed(report['seed'])
    for update, (batch, target) in enumerate(batches):
        trainer.scheduler.step_update(update)
        images = accuracy.normalize(batch)
        if teacher is not None:
            trainer.criterion = nn.CrossEntropyLoss()
            with torch.no_grad(), trainer.autocast():
                target = teacher(images).float().softmax(1)
        trainer.step(0, images, target)


def measure_accuracy(checkpoint: Path, args: argparse.Namespace) -> Iterator[Row]:
    """Of the dense model and each method, after --finetune more epochs. All are compared with the checkpoint."""
    dense, report, settings = load(checkpoint, args)
    vars(settings).update(epochs=args.finetune, lr=3e-4, warmup_epochs=0)
    images, labels = accuracy.load_pictures('validation', settings)
    expected, models = predict(dense, images), methods(dense, args)
    if args.finetune:
        set_fused_attn(not settings.no_fused_attn)
        models = methods(load(checkpoint, args)[0], args)
        models.update({f'{k}, self-distilled': m for k, m in models.items() if k.startswith('similarity')})
        models['elastic, self-distilled'] = evolve(models['dense'], train_keep_ratio=accuracy.ELASTIC)
        train = accuracy.load_pictures('train', settings)
    for method, model in models.items():
        row = dict(model=checkpoint.name.rpartition('-')[0], epochs=args.finetune, images=len(labels))
        if args.finetune:
            model = copy.deepcopy(model)  # evolve shares its parameters with the model that it returns
            finetune(model, dense if 'distilled' in method else None, train, report, settings)
        for ratio in getattr(model, 'train_keep_ratio', ()) or (None,):
            if ratio is not None:
                model.set_keep_ratio(ratio)
            row.update(method=method.replace('elastic', f'elastic {ratio}'), share=share(model, dense))
            yield {**row, **compare(predict(model.eval(), images), expected, labels)}


def measure_speed(dense: nn.Module, name: str, batch_size: int, args: argparse.Namespace) -> Iterator[Row]:
    models = methods(dense, args)
    images = torch.randn(batch_size, dense.in_chans, *dense.patch_embed.img_size)
    with torch.inference_mode():
        steps = {method: lambda model=model: model(images) for method, model in models.items()}
        times = harness.time_in_turns(steps, args.rounds, warmup=1, seconds=0.)
    for method, model in models.items():
        yield dict(model=name, method=method, share=share(model, dense), batch_size=batch_size,
                   **harness.summarize(times[method], times['dense'], batch_size))


def main(argv: Optional[List[str]] = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument('checkpoints', nargs='*', type=Path, metavar='CHECKPOINT')
    parser.add_argument('--data-dir', type=Path, help='pictures, as accuracy.py takes them')
    parser.add_argument('--similarity', type=float, nargs='*', default=[0.7, 0.6, 0.5, 0.4], help='keep ratios')
    parser.add_argument('--attention', type=float, nargs='*', default=[0.7, 0.5, 0.3], help='those of an Evo-DeiT')
    parser.add_argument('--tome', type=Path, metavar='CHECKOUT', help='of ToMe')
    parser.add_argument('--pitome', type=Path, metavar='CHECKOUT', help='of PiToMe')
    parser.add_argument('--evit', type=Path, metavar='CHECKOUT', help='of EViT')
    parser.add_argument('--fused', action='store_true', help='ToMe and PiToMe with fused attention as well')
    parser.add_argument('--pictures', type=float, nargs='*', default=[0.875, 0.75], help='parts of their side')
    parser.add_argument('--blocks', type=float, nargs='*', default=[0.75, 0.625], help='parts of the blocks')
    parser.add_argument('--finetune', type=int, default=0, metavar='EPOCHS', help='train by every method, time nothing')
    parser.add_argument('--rounds', type=int, default=7, help='rounds of timing, 0 for none')
    parser.add_argument('--time-only', action='store_true', help='no accuracy')
    args = parser.parse_args(argv)
    report = harness.Report('without_training', args.output, argv=argv)
    for checkpoint in args.checkpoints if not args.time_only else ():
        for row in measure_accuracy(checkpoint, args):
            report.add(row)
    if args.rounds and not args.finetune:
        report.add(*measure_speed(timm.create_model(DEIT_S).eval(), DEIT_S, 32, args))
        for checkpoint in args.checkpoints[:1]:
            report.add(*measure_speed(load(checkpoint, args)[0], checkpoint.name.rpartition('-')[0], 128, args))


if __name__ == '__main__':
    main()
