#!/usr/bin/env python3
"""Export Evo-ViT to ONNX, check the file against PyTorch in ONNX Runtime, and time both beside the dense twin.

    python examples/export_onnx.py --quickstart output/quickstart
    python examples/export_onnx.py evo_deit_small_patch16_224 --against deit_small_patch16_224

The first takes the trained models that examples/quickstart.py left there, and also tells the top-1 of each file on its
validation images. Checked are the logits, to 1e-4, and the informative tokens of every selection, for batches of
several sizes from the one file. Beside each `MODEL.onnx` stands `MODEL.int8.onnx`, whose weights are of 8 bits (dynamic
quantisation of the matrix products). Writes these and `result.json` to --output.
"""
import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import onnx
import onnxruntime
import timm
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from timm.utils import ParseKwargs, accuracy, reparameterize_model
from tqdm import tqdm

from quickstart import create_loaders, now, speed_up
from timm_evovit import informative_tokens

TOLERANCE = 1e-4
TIE = 1e-5  # patches whose class attention differs by less, relatively, rank by rounding
BATCHES = (1, 2, 5)


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', nargs='?', help='evolving model of timm')
    parser.add_argument(
        '--quickstart', type=Path, metavar='DIR', help="output of examples/quickstart.py, in place of a model")
    parser.add_argument('--against', metavar='MODEL', help='dense model to time beside it')
    parser.add_argument('--checkpoint', help='weights of the model')
    parser.add_argument('--pretrained', action='store_true', help="the models' pretrained weights")
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, help='arguments of the models')
    parser.add_argument('-b', '--batch-size', type=int, default=32, help='for the timing')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--seconds', type=float, default=0.5, help='at least so long is a model timed in a round')
    parser.add_argument('--output', type=Path, default=Path('output/export_onnx'))
    args = parser.parse_args(argv)
    if (args.model is None) == (args.quickstart is None):
        parser.error('give a model, or the output of the quick start with --quickstart')
    if args.quickstart and not (args.quickstart / 'result.json').is_file():
        parser.error(f'{args.quickstart} holds no result.json: run `python examples/quickstart.py` first')
    return args


def load(args: argparse.Namespace) -> Tuple[Dict[str, torch.nn.Module], Any]:
    """Models by name, the dense one first, batch norms folded; and validation images, if there are any."""
    models, validation = {}, None
    if args.quickstart:
        for name in json.loads((args.quickstart / 'result.json').read_text())['models']:
            models[name] = timm.create_model(f'local-dir:{args.quickstart / name}', pretrained=True)
        _, validation = create_loaders(args.quickstart / 'digits', image_size(models[name])[-1], args.batch_size)
    else:
        if args.against:
            models[args.against] = timm.create_model(args.against, args.pretrained, **args.model_kwargs)
        models[args.model] = timm.create_model(
            args.model, args.pretrained, checkpoint_path=args.checkpoint or '', **args.model_kwargs)
    return {name: reparameterize_model(model.eval()) for name, model in models.items()}, validation


def image_size(model: torch.nn.Module) -> Tuple[int, ...]:
    size = getattr(model, 'img_size', None) or getattr(getattr(model, 'patch_embed', None), 'img_size', None)
    return (model.pretrained_cfg['input_size'][0], *(size or model.pretrained_cfg['input_size'][1:]))


def export(model: torch.nn.Module, size: Tuple[int, ...], path: Path) -> None:
    """Write a model of images (batch, *size) to an ONNX file of any batch size."""
    torch.onnx.export(
        model, (torch.randn(2, *size),), path, dynamo=True, verbose=False, external_data=False,
        input_names=['images'], output_names=['logits'], dynamic_shapes=({0: torch.export.Dim('batch')},))


def quantize(path: Path, small: Path) -> None:
    """Write an ONNX file again with weights of 8 bits."""
    quant_pre_process(path, small, skip_symbolic_shape=True)
    quantize_dynamic(small, small, weight_type=QuantType.QInt8, op_types_to_quantize=['MatMul', 'Gemm'])


def session(file: Any) -> Callable[[torch.Tensor], List[np.ndarray]]:
    """What ONNX Runtime answers to images (B, C, H, W), on the CPU."""
    options = onnxruntime.SessionOptions()
    # idle threads that spin would slow down whatever runs next, here the model that is timed next
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    runtime = onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])
    return lambda images: runtime.run(None, {'images': images.numpy()})


def with_selections(path: Path) -> bytes:
    """The model with the indices of the informative tokens as further outputs: each selection is one TopK."""
    model = onnx.load(path)
    for node in model.graph.node:
        if node.op_type == 'TopK':
            model.graph.output.append(onnx.ValueInfoProto(name=node.output[1]))
    return model.SerializeToString()


class Check(NamedTuple):
    error: float  # largest difference of a logit, relative to the largest logit
    selections: int  # selections compared, all batches together
    differing: int  # of those the ones with another set of informative tokens
    tied: int  # images left out, because rounding decided between patches of the same class attention


def compare_tokens(tokens: List[Any], kept: List[np.ndarray], batch: int) -> Tuple[int, torch.Tensor]:
    """Compare the informative tokens that a model selects with the ones that a file does.

    Args:
        tokens: Selections of the model, as `informative_tokens` gives them.
        kept: Indices (batch, K) of each selection of the file.
        batch: Number of images.

    Returns:
        The number of selections that differ and, (batch,), the images in which rounding decided between patches of the
        same class attention: what follows there is not to be compared.
    """
    differing, tied = 0, torch.zeros(batch, dtype=torch.bool)
    for t, indices in zip(tokens, kept):
        mask, attention = t.mask.flatten(1), t.attention.flatten(1)
        unlike = mask ^ torch.zeros_like(mask).scatter(1, torch.from_numpy(indices), True)
        highest = attention.masked_fill(~unlike, -torch.inf).amax(dim=1)
        lowest = attention.masked_fill(~unlike, torch.inf).amin(dim=1)
        differs, close = unlike.any(dim=1) & ~tied, highest - lowest <= TIE * highest
        differing += int((differs & ~close).any())
        tied |= differs & close
    return differing, tied


@torch.inference_mode()
def check(model: torch.nn.Module, size: Tuple[int, ...], path: Path) -> Check:
    """Compare an exported file with the model that it was made of.

    Raises:
        RuntimeError: Logits differ by more than TOLERANCE, informative tokens differ, or they tie in every image.
    """
    run = session(with_selections(path))
    evolves = hasattr(model, 'set_keep_ratio')
    error, selections, differing, tied = 0., 0, 0, 0
    for batch in BATCHES:
        images = torch.randn(batch, *size, generator=torch.Generator().manual_seed(batch))
        logits, *kept = run(images)
        expected = model(images)
        tokens = informative_tokens(model, images) if evolves else []
        if len(tokens) != len(kept):
            raise RuntimeError(f'{path} selects tokens {len(kept)} times, the model {len(tokens)} times.')
        unlike, left_out = compare_tokens(tokens, kept, batch)
        selections, differing, tied = selections + len(kept), differing + unlike, tied + int(left_out.sum())
        apart = (torch.from_numpy(logits) - expected).abs().amax(dim=1)[~left_out]
        error = max([error, *(apart / expected.abs().max()).tolist()])
    if error > TOLERANCE or differing:
        raise RuntimeError(f'{path}: logits differ by {error:.1e}, tokens in {differing} of {selections} selections.')
    if tied == sum(BATCHES):
        raise RuntimeError(f'{path}: in every image patches tie in class attention, there is nothing to compare.')
    return Check(error, selections, differing, tied)


def seconds_per_call(run: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, seconds: float) -> float:
    """Mean over as many calls as fill `seconds`."""
    calls, start = 0, now('cpu')
    while not calls or now('cpu') - start < seconds:
        run(images)
        calls += 1
    return (now('cpu') - start) / calls


def top1(run: Callable[[torch.Tensor], torch.Tensor], validation: Any) -> float:
    logits, targets = zip(*((run(images), target) for images, target in validation))
    return accuracy(torch.cat(logits), torch.cat(targets))[0].item()


def main(argv: Optional[List[str]] = None) -> Dict[str, Any]:
    args = parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    models, validation = load(args)
    names = list(models)
    runs: Dict[Tuple[str, str], Callable[[torch.Tensor], torch.Tensor]] = {}
    checks = {}
    for name, model in models.items():
        # hf-hub:ORG/NAME and local-dir:FOLDER are names of models too
        path, size = args.output / f"{re.sub(r'[^-.0-9A-Za-z]+', '_', name)}.onnx", image_size(model)
        export(model, size, path)
        checks[name] = check(model, size, path)
        print(f'{path}: {path.stat().st_size / 1e6:.1f} MB, batches of {BATCHES}: logits within {checks[name].error:.1e}'
              + (f', the same tokens in {checks[name].selections} selections' if checks[name].selections else '')
              + (f', {checks[name].tied} images left out for patches that tie' if checks[name].tied else ''))
        small = path.with_suffix('.int8.onnx')
        quantize(path, small)
        print(f'{small}: {small.stat().st_size / 1e6:.1f} MB')
        runs['PyTorch', name] = model
        for kind, file in (('ONNX Runtime', path), ('ONNX Runtime, int8', small)):
            runs[kind, name] = lambda images, answer=session(str(file)): torch.from_numpy(answer(images)[0])

    images = torch.randn(args.batch_size, *image_size(models[names[-1]]))
    seconds: Dict[Tuple[str, str], List[float]] = {key: [] for key in runs}
    result: Dict[str, Any] = {
        'batch_size': args.batch_size, 'checks': {name: c._asdict() for name, c in checks.items()}, 'runs': [],
    }
    with torch.inference_mode():
        for i in tqdm(range(args.rounds + 1), unit='round', disable=None):
            for key in list(runs) if i % 2 else reversed(list(runs)):
                elapsed = seconds_per_call(runs[key], images, args.seconds)
                if i:
                    seconds[key].append(elapsed)
        for (kind, name), times in seconds.items():
            result['runs'].append({
                'runtime': kind, 'model': name, 'images_per_second': args.batch_size / statistics.median(times),
                'speed_up': speed_up(seconds[kind, names[0]], times),
                'top1': top1(runs[kind, name], validation) if validation else None,
            })
    (args.output / 'result.json').write_text(json.dumps(result, indent=2))
    print(f'\n{"":20} {"model":28} {"img/s":>8} {"speed-up":>9}' + (f' {"top-1 %":>8}' if validation else ''))
    for r in result['runs']:
        print(f'{r["runtime"]:20} {r["model"]:28} {r["images_per_second"]:8.1f} {r["speed_up"]:9.2f}'
              + (f' {r["top1"]:8.2f}' if validation else ''))
    return result


if __name__ == '__main__':
    main()
