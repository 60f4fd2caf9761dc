#!/usr/bin/env python3
"""Export a model to ONNX Runtime or OpenVINO, check the file, and compare its speed with that of the dense model.

    python examples/export_onnx.py evo_deit_small_patch16_224 --pretrained
    python examples/export_onnx.py evo_vit --model-kwargs base=vit_small_patch16_224 keep_ratio=0.5 --pretrained --int8
    python examples/export_onnx.py local-dir:output/finetune/model --pretrained --int8 --calibrate flowers/validation
    python examples/export_onnx.py evo_deit_small_patch16_224 --pretrained --output model.xml

The name of --output says for which runtime: `.onnx` for ONNX Runtime, `.xml` for OpenVINO. Files take any batch size,
and any height and width if the model does, as with `--model-kwargs dynamic_img_size=True` (for OpenVINO only models
without learned position embeddings). --int8 writes a second file, `*.int8.onnx` or `*.int8.xml`, with matrix products
in 8 bits: with --calibrate the ranges of activations are those of pictures in a folder, without it ONNX Runtime finds
them for each batch. Metadata say how to prepare pictures and, where the model knows it, what its classes are called.
"""
import argparse
import json
import logging
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
from timm.data import ImageNetInfo, create_dataset, create_transform, infer_imagenet_subset, resolve_model_data_config
from timm.utils import ParseKwargs, reparameterize_model

from timm_evovit.tools.load import load_model
from timm_evovit.tools.sweep import time_in_turns

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('model', help='any name that timm.create_model takes; evo_vit with base=NAME evolves a dense model')
parser.add_argument('--pretrained', action='store_true')
parser.add_argument('--checkpoint', metavar='FILE', help="weights of the model, such as those of timm's train.py")
parser.add_argument('--use-ema', action='store_true', help="the checkpoint's moving average of the weights")
parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, help='arguments of the model')
parser.add_argument('--int8', action='store_true', help='write a file with products in 8 bits as well')
parser.add_argument('--calibrate', metavar='DIR', help='pictures, in any folders, for the ranges of --int8')
parser.add_argument('--num-pictures', type=int, default=128, help='how many pictures of DIR, at random')
parser.add_argument('--batch-size', type=int, default=8, help='of the comparison of speed, fixed for it')
parser.add_argument('--output', type=Path, default=Path('model.onnx'), metavar='FILE', help='FILE.onnx or FILE.xml')


def to_onnx(model, images, dynamic, path):
    torch.onnx.export(
        model, (images,), path, dynamo=True, verbose=False, external_data=False, input_names=['images'],
        output_names=['logits'], dynamic_shapes=({i: ('batch', '', 'height', 'width')[i] for i in dynamic},))


class OnnxRuntime:
    """Files for ONNX Runtime."""

    def __init__(self):
        import onnx
        import onnxruntime
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process
        self.onnx, self.onnxruntime = onnx, onnxruntime
        self.quantization, self.quant_pre_process = quantization, quant_pre_process

    def export(self, model, images, dynamic, path, info):
        to_onnx(model, images, dynamic, path)
        self.describe(path, info)

    def quantize(self, path, small, pictures, info):
        q, options = self.quantization, dict(op_types_to_quantize=['MatMul', 'Gemm'])
        self.quant_pre_process(path, small, skip_symbolic_shape=True)
        if pictures is None:
            q.quantize_dynamic(small, small, **options)
        else:
            batches = iter([{'images': x.numpy()} for x in pictures.split(1)])
            reader = type('Reader', (q.CalibrationDataReader,), {'get_next': lambda self: next(batches, None)})()
            q.quantize_static(  # products of activations, attention and matching among them, stay in 32 bits
                small, small, reader, per_channel=True, extra_options={'MatMulConstBOnly': True}, **options)
        self.describe(small, info)

    def describe(self, path, info):
        file = self.onnx.load(path)
        self.onnx.helper.set_model_props(file, info)
        self.onnx.save(file, path)

    def load(self, path, batch_size=None):
        options = self.onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        if batch_size:
            options.add_free_dimension_override_by_name('batch', batch_size)
        # threads that spin between calls slow down the model that is called next
        options.add_session_config_entry('session.force_spinning_stop', '1')
        session = self.onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
        return lambda x: [torch.from_numpy(y) for y in session.run(None, {'images': x.numpy()})]


class OpenVino:
    """Files for OpenVINO, each with a second one, `*.bin`, that has the weights."""

    def __init__(self):
        import openvino
        self.openvino, self.core = openvino, openvino.Core()

    def export(self, model, images, dynamic, path, info):
        with tempfile.TemporaryDirectory() as folder:  # it converts more models from ONNX than from PyTorch
            file = Path(folder) / 'model.onnx'
            to_onnx(model, images, dynamic, file)
            self.save(self.openvino.convert_model(file), path, info)

    def quantize(self, path, small, pictures, info):
        import nncf
        nncf.set_log_level(logging.ERROR)
        model = self.core.read_model(path)
        products = [op for op in model.get_ops() if op.get_type_name() == 'MatMul' and not any(  # of activations
            value.get_node().get_type_name() == 'Constant' for value in op.input_values())]
        quantized = nncf.quantize(
            model, nncf.Dataset(pictures.split(1), lambda x: x.numpy()), subset_size=len(pictures),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(names=[op.get_friendly_name() for op in products]))
        self.save(quantized, small, info)

    def save(self, model, path, info):
        for key, value in info.items():
            model.set_rt_info(value, ['model_info', key])
        self.openvino.save_model(model, path, compress_to_fp16=False)

    def load(self, path, batch_size=None):
        model = self.core.read_model(path)
        if batch_size:
            model.reshape([batch_size, *list(model.input(0).partial_shape)[1:]])
        model = self.core.compile_model(  # on many processors the default is bfloat16
            model, 'CPU', {'INFERENCE_NUM_THREADS': torch.get_num_threads(), 'INFERENCE_PRECISION_HINT': 'f32'})
        return lambda x: [torch.from_numpy(y) for y in model(x.numpy()).values()]


RUNTIMES = {'.onnx': OnnxRuntime, '.xml': OpenVino}


def metadata(model, pretrained):
    """timm's data configuration and the names of the classes, lists as JSON."""
    info = {**resolve_model_data_config(model), 'num_classes': model.num_classes}
    names = model.pretrained_cfg.get('label_names')
    if not names and pretrained and (subset := infer_imagenet_subset(model)):
        names = ImageNetInfo(subset).label_names()
    if names and len(names) == model.num_classes:
        info['label_names'] = names
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in info.items()}


def read_pictures(folder, model, count):
    """Pictures of a folder, prepared as the model takes them, (N, C, H, W)."""
    dataset = create_dataset('', root=folder)
    dataset.input_img_mode = 'RGB' if model.in_chans == 3 else 'L'
    dataset.transform = create_transform(**resolve_model_data_config(model), is_training=False)
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count]
    return torch.stack([dataset[i][0] for i in chosen.tolist()])


@torch.inference_mode()
def difference(run, model, images, dynamic):
    """Largest difference of the logits of batches of 1, 2 and 5 images, relative to the largest logit.

    If height and width vary, the last batch is of images of half the width.
    """
    batches = [*torch.cat([images] * 8)[:8].split((1, 2, 5))]
    if 3 in dynamic:
        patch = model.patch_embed.patch_size[1]
        batches[2] = batches[2][..., :images.shape[3] // patch // 2 * patch]
    pairs = [(run(x)[0], model(x)) for x in batches]
    errors = [(found - expected).abs().max() / expected.abs().max() for found, expected in pairs]
    return torch.stack(errors).max().item()


def write(runtime, model, pictures, dynamic, path, args):
    """Export a model, and quantize it if that is asked for.

    Returns of each file the path, a function that runs it on args.batch_size images, and the error.
    """
    info, paths, size = metadata(model, args.pretrained), [path], resolve_model_data_config(model)['input_size']
    runtime.export(model, torch.randn(2, *size), dynamic, path, info)
    if args.int8:
        paths.append(path.with_suffix(f'.int8{path.suffix}'))
        runtime.quantize(path, paths[1], pictures, info)
    images = torch.randn(8, *size) if pictures is None else pictures  # ranges of --calibrate do not fit noise
    return [(path, runtime.load(path, args.batch_size), difference(runtime.load(path), model, images, dynamic))
            for path in paths]


def main():
    args = parser.parse_args()
    if args.output.suffix not in RUNTIMES:
        parser.error(f"--output must end with {' or '.join(RUNTIMES)}, got {args.output}")
    if args.calibrate and not args.int8:
        parser.error('--calibrate is for --int8')
    if args.calibrate and not Path(args.calibrate).is_dir():
        parser.error(f'--calibrate {args.calibrate}: there is no such folder')
    if args.int8 and args.output.suffix == '.xml' and not args.calibrate:
        parser.error('--int8 for OpenVINO needs pictures: --calibrate DIR')
    for option in ('num_pictures', 'batch_size'):
        if vars(args)[option] < 1:
            parser.error(f"--{option.replace('_', '-')} must be 1 or more, got {vars(args)[option]}")
    try:
        model = load_model(args.model, args.pretrained, args.checkpoint, args.use_ema, **args.model_kwargs)
        model = reparameterize_model(model.eval())  # folds LeViT's batch norms into its linear layers
        size = resolve_model_data_config(model)['input_size']
        pictures = read_pictures(args.calibrate, model, args.num_pictures) if args.calibrate else None
        args.output.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError, TypeError, ValueError) as e:
        parser.error(str(e))
    if not args.pretrained and not args.checkpoint:
        print('The weights are random; --pretrained or --checkpoint give others.')
    dynamic = {0: torch.export.Dim.DYNAMIC}
    if getattr(model, 'dynamic_img_size', False):
        dynamic.update({2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC})

    written = []  # the files of the model, then those of it at keep ratio 1, which computes as much as the dense model
    with tempfile.TemporaryDirectory() as folder:
        try:
            runtime = RUNTIMES[args.output.suffix]()
            written.append(write(runtime, model, pictures, dynamic, args.output, args))
            if hasattr(model, 'set_keep_ratio'):
                model.set_keep_ratio(1)
                written.append(write(runtime, model, pictures, dynamic, Path(folder) / args.output.name, args))
        except ModuleNotFoundError as e:
            parser.error(f'{args.output.name} needs the package {e.name}: pip install {e.name}')
        images = torch.randn(args.batch_size, *size)
        times = time_in_turns(
            {path: partial(run, images) for files in written for path, run, _ in files}, rounds=5, seconds=0.5)
        for files in zip(*written):
            for path, _, error in files:
                name = path if path is files[0][0] else '  at keep ratio 1'
                milliseconds = 1000 * statistics.median(times[path]) / args.batch_size
                print(f'{name}: {milliseconds:.1f} ms per picture, logits within {error:.1e} of PyTorch')
            if len(files) > 1:
                ratios = [a / b for a, b in zip(*(times[path] for path, _, _ in reversed(files)))]
                print(f'  {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})')
    if not written[0][0][2] <= 1e-3:  # or it is no number
        raise SystemExit(f'{args.output}: its logits are not those of PyTorch, do not use it.')


if __name__ == '__main__':
    main()
