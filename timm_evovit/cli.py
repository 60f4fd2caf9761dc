"""The command timm-evovit."""
import argparse
import sys
from typing import List, Optional

from timm.utils import ParseKwargs

from .convert import convert, upload

__all__ = ['main']


def _convert(args: argparse.Namespace) -> None:
    conversion = convert(args.model, args.checkpoint, args.output, args.use_ema, args.model_kwargs)
    print(conversion.report())
    if args.push_to_hub:
        upload(conversion, args.push_to_hub)
        print(f"{args.push_to_hub}: uploaded, timm.create_model('hf-hub:{args.push_to_hub}', pretrained=True)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='timm-evovit', description='Evo-ViT for timm.')
    commands = parser.add_subparsers(title='commands', required=True, metavar='COMMAND')

    command = commands.add_parser(
        'convert', help="authors' checkpoint to a folder that timm loads",
        description="Convert a checkpoint of the authors' code to model.safetensors, config.json and a model card, for "
                    "timm.create_model('local-dir:DIR', pretrained=True). No code in a checkpoint is run.")
    command.set_defaults(run=_convert)
    command.add_argument('model', metavar='MODEL', help='name of the model, evo_deit_small_patch16_224 for one')
    command.add_argument(
        'checkpoint', metavar='CHECKPOINT', nargs='?',
        help='file to convert; without it, the published one is downloaded from Google Drive, which needs gdown')
    command.add_argument('--output', metavar='DIR', required=True, help='folder to write, new or empty')
    command.add_argument('--use-ema', action='store_true', help='take model_ema, not model')
    command.add_argument(
        '--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE',
        help='arguments of the model that the weights were trained with, where they differ from the published ones')
    command.add_argument(
        '--push-to-hub', metavar='ORG/NAME',
        help='upload to the Hugging Face Hub as well, with the token of `hf auth login`')
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command.

    Args:
        argv: Arguments, those of the process by default.

    Returns:
        Exit status, 1 if what was asked for could not be done.
    """
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (OSError, RuntimeError, ValueError) as e:
        print(f'timm-evovit: {e}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('timm-evovit: interrupted', file=sys.stderr)
        return 130
    return 0
