"""The command timm-evovit."""
import argparse
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import timm
import torch
from timm.data import create_dataset, create_loader
from timm.utils import ParseKwargs
from tqdm import tqdm

from ..base import check
from ..evo_vit import evolve
from .convert import convert, count_classes, load_exactly, read_weights, upload
from .sweep import Pictures, Setting, sweep
from .sweep_report import describe, how_to_use, plot, table, write
from .visualize import data_config, find_images, sheet, visualize


class _ModelKwargs(ParseKwargs):
    """timm's KEY=VALUE arguments, with an error for others."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None) -> None:
        if wrong := [value for value in values if '=' not in value]:
            raise argparse.ArgumentError(self, f'must be KEY=VALUE, got {wrong[0]!r}')
        super().__call__(parser, namespace, values, option)


def _create(args: argparse.Namespace) -> Tuple[Any, Dict[str, Any]]:
    """The model that the command line describes, and the arguments that it was created with."""
    sizes = {k: v for k in ('img_size', 'num_classes') if (v := getattr(args, k)) is not None}
    kwargs, loading = {**args.model_kwargs, **sizes}, {}
    if args.checkpoint:
        weights = read_weights(args.checkpoint, args.use_ema)
        if classes := count_classes(weights):
            kwargs.setdefault('num_classes', classes)
        cfg = dict(state_dict=weights, source=None, num_classes=kwargs.get('num_classes', 1000))
        loading['pretrained_cfg_overlay'] = cfg  # timm resamples what depends on the image size
    elif not args.pretrained:
        print('timm-evovit: the weights are random; --pretrained or --checkpoint give others', file=sys.stderr)
    model: Any = timm.create_model(args.model, pretrained=args.pretrained or bool(loading), **kwargs, **loading)
    return model.to(args.device), kwargs


def _convert(args: argparse.Namespace) -> int:
    print(convert(args.model, args.checkpoint, args.output, args.use_ema, args.model_kwargs))
    if args.push_to_hub:
        upload(args.output, args.push_to_hub)
        print(f"{args.push_to_hub}: uploaded, timm.create_model('hf-hub:{args.push_to_hub}', pretrained=True)")
    return 0


def _visualize(args: argparse.Namespace) -> int:
    paths = find_images(args.images, args.output)
    model, _ = _create(args)
    if not hasattr(model, 'forward_selections'):
        model = evolve(model, slow_tokens='attention' if args.attention else 'similarity')
    if args.attention and model.slow_tokens != 'attention':
        raise ValueError(f"--attention needs slow_tokens='attention', the model has {model.slow_tokens!r}")

    args.output.mkdir(parents=True, exist_ok=True)
    drawings, names = [], {'sheet'}
    found = visualize(model, paths, args.attention, classes=args.pretrained or args.checkpoint is not None)
    for path, drawing in tqdm(found, total=len(paths), unit='image', disable=None):
        if isinstance(drawing, Exception):
            tqdm.write(f'timm-evovit: {path} is skipped: {drawing}', file=sys.stderr)
            continue
        name, count = path.stem, 1
        while name in names:  # images of the same name in several folders
            count += 1
            name = f'{path.stem}-{count}'
        names.add(name)
        drawing.save(args.output / f'{name}.png')
        if args.sheet:
            drawings.append(drawing)
    if drawings:
        sheet(drawings).save(args.output / 'sheet.png')
    drawn = len(names) - 1
    print(f'{args.output}: {drawn} of {len(paths)} images drawn')
    return int(drawn < len(paths))


def _find_pictures(args: argparse.Namespace, model: Any) -> Pictures:
    """Find pictures as timm's validate.py does, and check that their classes are those of the model."""
    kind = args.dataset.partition('/')[0]
    check(kind in ('', 'torch', 'hfds'), '--dataset', 'torch/NAME or hfds/NAME', args.dataset)
    if kind != 'hfds' and not os.path.exists(args.data_dir):
        raise FileNotFoundError(f'{args.data_dir}: there is no such folder or tar file.')
    found = create_dataset(args.dataset, root=args.data_dir, split=args.split, class_map=args.class_map or None)
    reader = getattr(found, 'reader', found)  # torch/NAME has none
    splits = [Path(args.data_dir, name) for name in ('train', 'validation', 'val', 'test')]
    if getattr(reader, 'root', None) == args.data_dir and any(f.is_dir() for s in splits for f in s.glob('*')):
        raise ValueError(f'{args.data_dir} has no split {args.split!r}: timm would take the pictures of all splits.')
    classes = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None)
    if classes and not args.no_labels:
        place = getattr(reader, 'root', args.data_dir)
        if set(classes) == {''}:
            raise ValueError(f'{place} has no folder for each class; --no-labels compares predictions without labels.')
        count = max(classes.values()) + 1
        if count > model.num_classes or count < model.num_classes and not args.class_map:
            raise ValueError(
                f'{place} has {count} classes, but the model has {model.num_classes}: give weights for these classes, '
                f'a --class-map if they are some of those of the model, or --no-labels.')
    return Pictures(reader, 'L' if model.in_chans == 1 else 'RGB', args.limit)


def _sweep(args: argparse.Namespace) -> int:
    for ratio in args.keep_ratio:
        check(0 < ratio <= 1, '--keep-ratio', 'in (0, 1]', ratio)
    check(args.max_drop >= 0, '--max-drop', '0 or more points', args.max_drop)
    for name in ('limit', 'batch_size', 'rounds'):
        value = getattr(args, name)
        check(value is None or value > 0, f'--{name.replace("_", "-")}', '1 or more', value)
    existing = next(path for path in (args.output, *args.output.parents) if path.exists())
    check(existing.is_dir() and os.access(existing, os.W_OK), '--output', 'a folder to write to', str(args.output))
    dense, kwargs = _create(args)
    if args.checkpoint:  # as the code printed at the end does
        load_exactly(dense, dense.pretrained_cfg['state_dict'], args.checkpoint)
    check(dense.num_classes > 0, 'num_classes', '1 or more', dense.num_classes)
    dense.eval()
    evolves = hasattr(dense, 'set_keep_ratio')
    model = dense if evolves else evolve(dense)
    settings = [Setting(model, ratio, args.amp_dtype) for ratio in sorted({1., *args.keep_ratio}, reverse=True)]
    if not evolves:
        settings.insert(0, Setting(dense, None, args.amp_dtype))

    replaced = ('crop_pct', 'interpolation', 'mean', 'std')
    options = {k: getattr(args, k) for k in replaced if getattr(args, k) is not None}
    data = data_config(dense, options)
    pictures = _find_pictures(args, dense)
    loader = create_loader(
        pictures, batch_size=args.batch_size, num_workers=args.workers, persistent_workers=False, use_prefetcher=False,
        **data)

    report: Dict[str, Any] = {k: getattr(args, k) for k in (
        'model', 'checkpoint', 'use_ema', 'pretrained', 'data_dir', 'split', 'batch_size', 'device', 'amp_dtype',
        'max_drop')}
    report.update(timm=timm.__version__, torch=torch.__version__)
    if torch.device(args.device).type == 'cuda':
        report['device'] = torch.cuda.get_device_name(args.device)
    report.update(sweep(
        settings, loader, torch.randn(args.batch_size, *data['input_size'], device=args.device), not args.no_labels,
        args.max_drop, args.rounds, lambda result: write(args.output / 'sweep.json', {**report, **result})))

    name, ratio = args.model, report['chosen']['keep_ratio']
    if ratio is not None:
        if not evolves:
            name, kwargs = 'evo_vit', {'base': args.model, **kwargs}
        kwargs['keep_ratio'] = ratio
    if data['input_size'] != tuple(dense.pretrained_cfg['input_size']):
        options['input_size'] = data['input_size']
    report['python'], report['arguments'] = how_to_use(report, name, kwargs, options)
    write(args.output / 'sweep.json', report)
    try:
        write(args.output / 'sweep.png', plot(report))
    except ImportError:
        print('timm-evovit: sweep.png needs matplotlib (pip install matplotlib) and was not drawn', file=sys.stderr)
    print(f'\n{report["images"]} of {len(pictures)} pictures, {len(report["skipped"])} skipped')
    print(f'\n{table(report["rows"])}\n\n{describe(report)}')
    if not report['complete']:
        raise KeyboardInterrupt
    return int(bool(report['skipped']))


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument('--output', metavar='DIR', required=True, type=Path, help='folder to write to')
    common.add_argument('--use-ema', action='store_true', help="the checkpoint's moving average of the weights")
    common.add_argument(
        '--model-kwargs', nargs='*', default={}, action=_ModelKwargs, metavar='KEY=VALUE',
        help='arguments of the model')

    model = argparse.ArgumentParser(add_help=False, parents=[common])
    weights = model.add_mutually_exclusive_group()
    weights.add_argument('--checkpoint', metavar='FILE', help="weights, of timm's train.py or of the authors")
    weights.add_argument('--pretrained', action='store_true', help="the model's pretrained weights")
    model.add_argument('--img-size', metavar='N', type=int, help="input size, the model's own by default")
    model.add_argument('--num-classes', metavar='N', type=int, help="the checkpoint's or the model's own by default")
    model.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')

    parser = argparse.ArgumentParser(prog='timm-evovit', description='Evo-ViT for timm.')
    commands = parser.add_subparsers(title='commands', required=True, metavar='COMMAND')

    command = commands.add_parser(
        'convert', parents=[common], help="convert the authors' checkpoints to folders that timm loads",
        description="Convert a checkpoint of the authors' code to model.safetensors, config.json and a model card, for "
                    "timm.create_model('local-dir:DIR', pretrained=True). No code in a checkpoint is run.")
    command.set_defaults(run=_convert)
    command.add_argument('model', metavar='MODEL', help='name of the model, such as evo_deit_small_patch16_224')
    command.add_argument(
        'checkpoint', metavar='CHECKPOINT', nargs='?', help='default: the published one, downloaded by gdown')
    command.add_argument('--push-to-hub', metavar='ORG/NAME', help='also upload, as the user of `hf auth login`')

    command = commands.add_parser(
        'visualize', parents=[model], help='draw which patches a model calls informative, or which share a slow token',
        description='Draw one PNG per image: the picture and, for each stage, the picture with uninformative patches '
                    'faded, or with the patches that share a slow token in one colour. An image that cannot be read is '
                    'named and skipped; the exit status is then 1.')
    command.set_defaults(run=_visualize)
    command.add_argument('images', metavar='IMAGE', nargs='+', help='image file, folder of images or glob pattern')
    command.add_argument('--model', metavar='NAME', required=True, help='Evo-ViT, or Vision Transformer to be evolved')
    command.add_argument('--attention', action='store_true', help='also draw the class attention behind each selection')
    command.add_argument('--sheet', action='store_true', help='also write sheet.png, all drawings one below the other')

    command = commands.add_parser(
        'sweep', parents=[model], help='measure speed and accuracy over keep ratios, on your model and pictures',
        description='Compare keep ratios with the dense model, without training, and name the fastest that loses no '
                    'more accuracy than --max-drop. Writes sweep.json and, with matplotlib, sweep.png. A picture that '
                    'cannot be read is named and skipped; the exit status is then 1. Interrupted, it leaves what it '
                    'has measured.')
    command.set_defaults(run=_sweep)
    command.add_argument('model', metavar='MODEL', help='Evo-ViT, or Vision Transformer to be evolved')
    command.add_argument('--data-dir', metavar='DIR', required=True, help='folder of pictures, tar file, or dataset')
    command.add_argument('--dataset', metavar='TYPE/NAME', default='', help='torch/NAME or hfds/NAME')
    command.add_argument('--split', metavar='NAME', default='validation', help='default: validation')
    command.add_argument('--class-map', metavar='FILE', default='', help='numbers of the classes')
    command.add_argument('--no-labels', action='store_true', help="only compare predictions with the dense model's")
    command.add_argument('--limit', metavar='N', type=int, help='take N pictures, drawn at random but always the same')
    command.add_argument(
        '--keep-ratio', metavar='R', type=float, nargs='+', default=[1., 0.9, 0.7, 0.5, 0.3],
        help='default: 1 0.9 0.7 0.5 0.3; 1 is always measured')
    command.add_argument(
        '--max-drop', metavar='POINTS', type=float, default=0.5,
        help='top-1 that may be lost, or with --no-labels the percentage of predictions that may differ (default: 0.5)')
    command.add_argument('-b', '--batch-size', metavar='N', type=int, default=64, help='default: 64')
    command.add_argument(
        '-j', '--workers', metavar='N', type=int, default=min(4, os.cpu_count() or 1),
        help='processes that read pictures (default: 4, fewer on a machine with fewer cores)')
    command.add_argument('--rounds', metavar='N', type=int, default=7, help='rounds of timing (default: 7)')
    command.add_argument('--amp-dtype', choices=['bfloat16', 'float16'], help='mixed precision (default: float32)')
    replace = command.add_argument_group("options that replace the model's data configuration, as in timm's scripts")
    replace.add_argument('--crop-pct', metavar='RATIO', type=float)
    replace.add_argument('--interpolation', choices=['bicubic', 'bilinear', 'nearest', 'lanczos', 'hamming', 'box'])
    replace.add_argument('--mean', metavar='VALUE', type=float, nargs='+')
    replace.add_argument('--std', metavar='VALUE', type=float, nargs='+')
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command with `argv`, by default that of the process, and return the exit status."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (AssertionError, ImportError, OSError, RuntimeError, TypeError, ValueError) as e:
        print(f'timm-evovit: {e}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('timm-evovit: interrupted', file=sys.stderr)
        return 130
