"""The command timm-evovit."""
import argparse
import sys
from pathlib import Path
from typing import Any, List, Optional

import timm
from huggingface_hub.utils import validate_repo_id
from timm.utils import ParseKwargs
from tqdm import tqdm

from ..evo_vit import evolve
from .convert import convert, count_classes, read_weights, upload
from .visualize import find_images, sheet, visualize

__all__ = ['main']


def _convert(args: argparse.Namespace) -> int:
    if args.push_to_hub:
        validate_repo_id(args.push_to_hub)
    print(convert(args.model, args.checkpoint, args.output, args.use_ema, args.model_kwargs))
    if args.push_to_hub:
        upload(args.output, args.push_to_hub)
        print(f"{args.push_to_hub}: uploaded, timm.create_model('hf-hub:{args.push_to_hub}', pretrained=True)")
    return 0


def _visualize(args: argparse.Namespace) -> int:
    paths = find_images(args.images, args.output)
    sizes = {k: getattr(args, k) for k in ('img_size', 'num_classes') if getattr(args, k) is not None}
    kwargs = {**args.model_kwargs, **sizes}
    if args.checkpoint:
        _, weights = read_weights(args.checkpoint)
        if classes := count_classes(weights):
            kwargs.setdefault('num_classes', classes)
        kwargs['pretrained_cfg_overlay'] = dict(
            state_dict=weights, source=None, num_classes=kwargs.get('num_classes', 1000))
    trained = args.pretrained or bool(args.checkpoint)
    if not trained:
        print('timm-evovit: the weights are random; --pretrained or --checkpoint give others', file=sys.stderr)
    model: Any = timm.create_model(args.model, pretrained=trained, **kwargs)
    if not hasattr(model, 'forward_selections'):
        model = evolve(model, slow_tokens='attention' if args.attention else 'similarity')
    if args.attention and model.slow_tokens != 'attention':
        raise ValueError(f"--attention needs slow_tokens='attention', the model has {model.slow_tokens!r}")
    model = model.to(args.device)

    args.output.mkdir(parents=True, exist_ok=True)
    drawings, unread, names = [], 0, {'sheet'}
    progress = tqdm(visualize(model, paths, args.attention, trained), total=len(paths), unit='image', disable=None)
    for path, drawing in progress:
        if isinstance(drawing, Exception):
            tqdm.write(f'timm-evovit: {path} is skipped: {drawing}', file=sys.stderr)
            unread += 1
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
    print(f'{args.output}: {len(paths) - unread} of {len(paths)} images drawn')
    return int(unread > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='timm-evovit', description='Evo-ViT for timm.')
    commands = parser.add_subparsers(title='commands', required=True, metavar='COMMAND')

    command = commands.add_parser(
        'convert', help="convert the authors' checkpoints to folders that timm loads",
        description="Convert a checkpoint of the authors' code to model.safetensors, config.json and a model card, for "
                    "timm.create_model('local-dir:DIR', pretrained=True). No code in a checkpoint is run.")
    command.set_defaults(run=_convert)
    command.add_argument('model', metavar='MODEL', help='name of the model, such as evo_deit_small_patch16_224')
    command.add_argument(
        'checkpoint', metavar='CHECKPOINT', nargs='?',
        help='file to convert; by default the published one, downloaded from Google Drive, which needs gdown')
    command.add_argument('--output', metavar='DIR', required=True, help='folder to write, new or empty')
    command.add_argument('--use-ema', action='store_true', help='take model_ema, not model')
    command.add_argument(
        '--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE',
        help='arguments of the model, if they differ from the published ones')
    command.add_argument(
        '--push-to-hub', metavar='ORG/NAME', help='also upload to the Hugging Face Hub, as the user of `hf auth login`')

    command = commands.add_parser(
        'visualize', help='draw which patches a model calls informative, or which share a slow token',
        description='Draw one PNG per image: the picture and, for each stage, the picture with uninformative patches '
                    'faded, or with the patches that share a slow token in one colour. An image that cannot be read is '
                    'named and skipped; the exit status is then 1.')
    command.set_defaults(run=_visualize)
    command.add_argument('images', metavar='IMAGE', nargs='+', help='image file, folder of images or glob pattern')
    command.add_argument(
        '--model', metavar='NAME', required=True, help='Evo-ViT, or a Vision Transformer of timm, which is evolved')
    weights = command.add_mutually_exclusive_group()
    weights.add_argument('--checkpoint', metavar='FILE', help="weights, of timm's train.py or of the authors")
    weights.add_argument('--pretrained', action='store_true', help="the model's pretrained weights")
    command.add_argument('--output', metavar='DIR', required=True, type=Path, help='folder to write to')
    command.add_argument('--attention', action='store_true', help='also draw the class attention behind each selection')
    command.add_argument('--sheet', action='store_true', help='also write sheet.png, all drawings one below the other')
    command.add_argument('--img-size', metavar='N', type=int, help="input size, the model's own by default")
    command.add_argument('--num-classes', metavar='N', type=int, help="the checkpoint's or the model's own by default")
    command.add_argument('--device', default='cpu')
    command.add_argument(
        '--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE', help='arguments of the model')
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command with `argv`, by default that of the process, and return the exit status."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as e:
        print(f'timm-evovit: {e}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('timm-evovit: interrupted', file=sys.stderr)
        return 130
