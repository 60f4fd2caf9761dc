#!/usr/bin/env python3
"""Export a model to ONNX for any batch size and compare the file with PyTorch in ONNX Runtime.

    python examples/export_onnx.py evo_deit_small_patch16_224 --pretrained
    python examples/export_onnx.py local-dir:output/finetune/model --pretrained --int8

Writes --output, and with --int8 a second file `*.int8.onnx` whose matrix products have weights of 8 bits. To time the
files beside the models: `python benchmarks/speed.py model.onnx model.int8.onnx --against evo_deit_small_patch16_224`.
"""
import argparse
from pathlib import Path

import onnxruntime
import timm
import torch
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from timm.utils import ParseKwargs, reparameterize_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('model', help='any name that timm.create_model takes')
parser.add_argument('--pretrained', action='store_true')
parser.add_argument('--checkpoint', default='', help='file with weights of the model')
parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, help='arguments of the model')
parser.add_argument('--int8', action='store_true', help='write a file with weights of 8 bits as well')
parser.add_argument('--output', type=Path, default=Path('model.onnx'))


def compare(model, path, size, tolerance):
    """Largest difference of the logits of batches of 1, 2 and 5 images, relative to the largest logit.

    Raises:
        RuntimeError: It is greater than `tolerance`.
    """
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    error = 0.
    for batch in (1, 2, 5):
        images = torch.randn(batch, *size)
        with torch.inference_mode():
            expected = model(images)
        logits, = session.run(None, {'images': images.numpy()})
        error = max(error, ((torch.from_numpy(logits) - expected).abs().max() / expected.abs().max()).item())
    if error > tolerance:
        raise RuntimeError(f'{path}: logits differ from PyTorch by {error:.1e} of the largest, more than {tolerance}.')
    return error


def main():
    args = parser.parse_args()
    model = timm.create_model(
        args.model, args.pretrained, checkpoint_path=args.checkpoint, **args.model_kwargs).eval()
    # img_size in --model-kwargs changes the model, not its pretrained_cfg
    img_size = getattr(model, 'img_size', None) or getattr(getattr(model, 'patch_embed', None), 'img_size', None)
    size = (model.pretrained_cfg['input_size'][0], *(img_size or model.pretrained_cfg['input_size'][1:]))
    model = reparameterize_model(model)  # folds LeViT's batch norms into its linear layers
    args.output.parent.mkdir(parents=True, exist_ok=True)

    torch.onnx.export(
        model, (torch.randn(2, *size),), args.output, dynamo=True, verbose=False, external_data=False,
        input_names=['images'], output_names=['logits'], dynamic_shapes=({0: torch.export.Dim('batch')},))
    error = compare(model, args.output, size, tolerance=1e-4)
    print(f'{args.output}: {args.output.stat().st_size / 1e6:.1f} MB, logits within {error:.1e} of PyTorch')

    if args.int8:
        small = args.output.with_suffix('.int8.onnx')
        quant_pre_process(args.output, small, skip_symbolic_shape=True)
        quantize_dynamic(small, small, op_types_to_quantize=['MatMul', 'Gemm'])
        error = compare(model, small, size, tolerance=float('inf'))
        print(f'{small}: {small.stat().st_size / 1e6:.1f} MB, logits within {error:.1e} of PyTorch')


if __name__ == '__main__':
    main()
