#!/usr/bin/env python3
"""Export a model to ONNX for any batch size and compare the file with PyTorch in ONNX Runtime.

    python examples/export_onnx.py evo_deit_small_patch16_224 --pretrained
    python examples/export_onnx.py local-dir:output/finetune/model --pretrained --int8

Writes --output, and with --int8 a second file `*.int8.onnx` whose matrix products have weights of 8 bits. Both say in
their metadata how to prepare pictures and, where the model knows it, what its classes are called. To time the files
beside the models: `python benchmarks/speed.py model.onnx model.int8.onnx --against evo_deit_small_patch16_224`.
"""
import argparse
import json
from pathlib import Path

import onnx
import onnxruntime
import torch
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from timm.utils import ParseKwargs, reparameterize_model

from timm_evovit.tools.load import load_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    'model', nargs='?', help="any name that timm.create_model takes (default: that of args.yaml beside the checkpoint)")
parser.add_argument('--pretrained', action='store_true')
parser.add_argument('--checkpoint', metavar='FILE', help="weights of the model, such as those of timm's train.py")
parser.add_argument('--use-ema', action='store_true', help="the checkpoint's moving average of the weights")
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


def describe(path, model, pretrained):
    """Write into the metadata of a file timm's data configuration and the names of the classes, lists as JSON."""
    info = {**resolve_model_data_config(model), 'num_classes': model.num_classes}
    names = model.pretrained_cfg.get('label_names')
    if not names and pretrained and (subset := infer_imagenet_subset(model)):
        names = ImageNetInfo(subset).label_names()
    if names and len(names) == model.num_classes:
        info['label_names'] = names
    file = onnx.load(path)
    onnx.helper.set_model_props(file, {k: v if isinstance(v, str) else json.dumps(v) for k, v in info.items()})
    onnx.save(file, path)


def main():
    args = parser.parse_args()
    try:
        model, _, _ = load_model(args.model, args.pretrained, args.checkpoint, args.use_ema, **args.model_kwargs)
    except (OSError, RuntimeError, TypeError, ValueError) as e:
        parser.error(str(e))
    size = resolve_model_data_config(model.eval())['input_size']
    model = reparameterize_model(model)  # folds LeViT's batch norms into its linear layers
    args.output.parent.mkdir(parents=True, exist_ok=True)

    torch.onnx.export(
        model, (torch.randn(2, *size),), args.output, dynamo=True, verbose=False, external_data=False,
        input_names=['images'], output_names=['logits'], dynamic_shapes=({0: torch.export.Dim('batch')},))
    describe(args.output, model, args.pretrained)
    error = compare(model, args.output, size, tolerance=1e-4)
    print(f'{args.output}: {args.output.stat().st_size / 1e6:.1f} MB, logits within {error:.1e} of PyTorch')

    if args.int8:
        small = args.output.with_suffix('.int8.onnx')
        quant_pre_process(args.output, small, skip_symbolic_shape=True)
        quantize_dynamic(small, small, op_types_to_quantize=['MatMul', 'Gemm'])
        describe(small, model, args.pretrained)
        error = compare(model, small, size, tolerance=float('inf'))
        print(f'{small}: {small.stat().st_size / 1e6:.1f} MB, logits within {error:.1e} of PyTorch')


if __name__ == '__main__':
    main()
