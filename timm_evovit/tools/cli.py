"""The command timm-evovit."""
import argparse
import itertools
import json
import os
import sys
from operator import methodcaller
from pathlib import Path
from typing import Any, Dict, List, Optional, Set

import torch
from safetensors import SafetensorError
from timm.data import create_dataset, create_transform, resolve_model_data_config
from timm.utils import ParseKwargs
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import Compose
from tqdm import tqdm

from .. import __version__
from ..base import check
from ..evo_vit import evolve
from .convert import convert
from .load import load_model
from .sweep import choose, describe, plot, sweep, table
from .visualize import find_images, visualize


def _create(args: argparse.Namespace) -> Any:
    """The model that the command line describes."""
    model = load_model(args.model, args.pretrained, args.checkpoint, args.use_ema, vars(args), **args.model_kwargs)
    if not args.checkpoint and not args.pretrained:
        print('timm-evovit: the weights are random; --pretrained or --checkpoint give others', file=sys.stderr)
    return model.eval().to(args.device)


def _convert(args: argparse.Namespace) -> None:
    print(convert(args.model, args.checkpoint, args.output, args.use_ema, args.model_kwargs))


def _visualize(args: argparse.Namespace) -> int:
    paths = list(dict.fromkeys(path for name in args.images for path in find_images(name, args.output)))
    model = _create(args)
    model = model if hasattr(model, 'forward_slow_tokens') else evolve(model)
    args.output.mkdir(parents=True, exist_ok=True)
    names: Set[str] = set()
    for path, drawing in tqdm(visualize(model, paths), total=len(paths), unit='image', disable=None):
        if isinstance(drawing, Exception):
            tqdm.write(f'timm-evovit: {path} is skipped: {drawing}', file=sys.stderr)
            continue
        candidates = itertools.chain([path.stem], (f'{path.stem}-{i}' for i in itertools.count(2)))
        name = next(name for name in candidates if name not in names)  # images in several folders may have the same one
        names.add(name)
        drawing.save(args.output / f'{name}.png')
    print(f'{args.output}: {len(names)} of {len(paths)} images drawn')
    return int(len(names) < len(paths))


def _find_pictures(args: argparse.Namespace, model: Any, data: Dict[str, Any]) -> Any:
    """A dataset of pictures, found as timm's validate.py does. Their classes must be those of the model."""
    kind, place = args.dataset.partition('/')[0], args.data_dir
    check(kind in ('', 'torch', 'hfds'), '--dataset', 'torch/NAME or hfds/NAME', args.dataset)
    check(kind == 'hfds' or os.path.exists(place), '--data-dir', 'a folder or tar file', place)
    found = create_dataset(args.dataset, root=place, split=args.split, class_map=args.class_map or None)
    reader = getattr(found, 'reader', found)  # torch/NAME has none
    splits = [Path(place, name) for name in ('train', 'validation', 'val', 'test')]
    if getattr(reader, 'root', None) == place and any(f.is_dir() for s in splits for f in s.glob('*')):
        raise ValueError(f'{place} has no split {args.split!r}: timm would take the pictures of all splits.')
    classes = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None)
    if classes and not args.no_labels:
        count = 0 if set(classes) == {''} else max(classes.values()) + 1
        if count > model.num_classes or count < model.num_classes and not args.class_map:
            raise ValueError(f'{place} has folders of {count} classes, the model has {model.num_classes}: give weights '
                             f'for these classes, a --class-map if they are some of its own, or --no-labels.')
    to_mode = methodcaller('convert', 'L' if model.in_chans == 1 else 'RGB')
    found.transform = Compose([to_mode, create_transform(**data)])
    return Subset(found, torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:args.limit].tolist())


def _sweep(args: argparse.Namespace) -> None:
    args.max_drop = (5. if args.no_labels else 1.) if args.max_drop is None else args.max_drop
    check(args.limit is None or args.limit > 0, '--limit', '1 or more', args.limit)
    check(args.rounds > 0, '--rounds', '1 or more', args.rounds)
    check(args.max_drop >= 0, '--max-drop', '0 or more', args.max_drop)
    model = _create(args)
    check(model.num_classes > 0, 'num_classes', '1 or more', model.num_classes)
    data, evolves = resolve_model_data_config(model), hasattr(model, 'set_keep_ratio')
    model = model if evolves else evolve(model)
    ratios = sorted({1., *(args.keep_ratio or model.train_keep_ratio or (0.9, 0.7, 0.5, 0.3))}, reverse=True)
    for ratio in ratios:
        model.set_keep_ratio(ratio)  # a wrong one is refused before the work
    loader = DataLoader(_find_pictures(args, model, data), args.batch_size, num_workers=args.workers)
    batch = torch.randn(args.batch_size, *data['input_size'], device=args.device)
    amp_dtype = getattr(torch, args.amp_dtype) if args.amp_dtype else None
    args.output.mkdir(parents=True, exist_ok=True)
    rows = sweep(model, ratios, loader, batch, not args.no_labels, args.rounds, amp_dtype)
    report = {k: v for k, v in vars(args).items() if k not in ('run', 'output')}
    report.update(num_classes=model.num_classes, input_size=data['input_size'], images=len(loader.dataset), rows=rows)
    report.update(keep_ratio=ratios, evolves=evolves, chosen=choose(rows, args.max_drop))
    print(f'\n{table(rows)}\n\n{describe(report)}')
    (args.output / 'sweep.json').write_text(json.dumps(report, indent=1, default=str) + '\n', encoding='utf-8')
    try:
        plot(report).savefig(args.output / 'sweep.png', dpi=130)
    except ImportError:
        print('timm-evovit: sweep.png needs matplotlib (pip install matplotlib) and was not drawn', file=sys.stderr)


def _key_value(text: str) -> str:
    if '=' not in text:
        raise argparse.ArgumentTypeError(f'must be KEY=VALUE, got {text!r}')
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='timm-evovit', description='Evo-ViT for timm.')
    parser.add_argument('--version', action='version', version=f'timm-evovit {__version__}')
    commands = parser.add_subparsers(title='commands', required=True, metavar='COMMAND')

    def command(run: Any, parent: argparse.ArgumentParser, text: str) -> Any:
        command = commands.add_parser(run.__name__[1:], parents=[parent], help=text, description=text)
        command.set_defaults(run=run)
        return command.add_argument

    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add('--output', metavar='DIR', required=True, type=Path, help='folder to write to')
    add('--use-ema', action='store_true', help="the checkpoint's moving average of the weights")
    add('--model-kwargs', metavar='KEY=VALUE', nargs='*', default={}, type=_key_value, action=ParseKwargs)
    model = argparse.ArgumentParser(add_help=False, parents=[common])
    model.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    add = model.add_mutually_exclusive_group().add_argument
    add('--checkpoint', metavar='FILE', help="weights, of timm's train.py or of the authors")
    add('--pretrained', action='store_true', help="the model's pretrained weights")

    add = command(_convert, common, "convert the authors' checkpoints to folders that timm loads as local-dir:DIR")
    add('model', metavar='MODEL', help='name of the model, such as evo_deit_small_patch16_224')
    add('checkpoint', metavar='CHECKPOINT', nargs='?', help='default: the published one, downloaded by gdown')

    add = command(_visualize, model, 'draw the slow tokens that a model makes of pictures')
    add('images', metavar='IMAGE', nargs='+', help='image file or folder of images')
    add('--model', metavar='NAME', required=True, help='Evo-ViT, or Vision Transformer to be evolved')

    add = command(_sweep, model, 'measure speed and accuracy over keep ratios, on your model and pictures')
    add('model', metavar='MODEL', help='Evo-ViT, or Vision Transformer to be evolved')
    add('--data-dir', metavar='DIR', required=True, help='folder of pictures, tar file, or dataset')
    add('--dataset', metavar='TYPE/NAME', default='', help='torch/NAME or hfds/NAME')
    add('--split', metavar='NAME', default='validation', help='default: validation')
    add('--class-map', metavar='FILE', default='', help='numbers of the classes')
    add('--no-labels', action='store_true', help="only compare predictions with the dense model's")
    add('--limit', metavar='N', type=int, help='take N pictures, drawn at random but always the same')
    add('--keep-ratio', type=float, nargs='+', help='beside 1 (default: train_keep_ratio, or 0.9 0.7 0.5 0.3)')
    add('--max-drop', type=float, help='points of top-1 (default: 1), without labels percentage of predictions (5)')
    add('-b', '--batch-size', metavar='N', type=int, default=64, help='default: 64')
    add('-j', '--workers', metavar='N', type=int, default=min(4, os.cpu_count() or 1), help='default: 4, or all cores')
    add('--rounds', metavar='N', type=int, default=7, help='rounds of timing (default: 7)')
    add('--amp-dtype', choices=['bfloat16', 'float16'], help='mixed precision (default: float32)')
    add('--crop-pct', metavar='RATIO', type=float, help="this and the next replace the model's data configuration")
    add('--interpolation', choices=['bicubic', 'bilinear', 'nearest', 'lanczos', 'hamming', 'box'])
    add('--mean', metavar='VALUE', type=float, nargs='+')
    add('--std', metavar='VALUE', type=float, nargs='+')
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command with `argv`, by default that of the process, and return the exit status."""
    try:
        args = _parser().parse_args(argv)
        return args.run(args) or 0
    except (AssertionError, ImportError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as e:
        print(f'timm-evovit: {str(e) or type(e).__name__}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('timm-evovit: interrupted', file=sys.stderr)
        return 130
