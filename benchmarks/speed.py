#!/usr/bin/env python3
"""Speed of models side by side: images per second, peak memory and multiply-adds against a baseline.

    python benchmarks/speed.py evo_deit_small_patch16_224 --against deit_small_patch16_224
    python benchmarks/speed.py evo_deit_small_patch16_224 --against deit_small_patch16_224 --train
    python benchmarks/speed.py evo_levit_256 --against levit_256 --reparam --output benchmarks/results/speed-levit.json
    python benchmarks/speed.py model.onnx model.int8.onnx others.py:create_model --against deit_small_patch16_224
    python benchmarks/speed.py --suite benchmarks/suites/cpu.txt --output benchmarks/results/speed-cpu.json

A model is a name that timm knows; `FILE.py:FUNCTION`, the model that the function returns; `FILE.onnx`, run by ONNX
Runtime; or `FILE.xml`, run by OpenVINO in float32. The baseline is the first model of --against, or the first of all. A
suite is a file with the arguments of one run per line; each line is run in a process of its own, and all rows go to one
result file.

On Linux the C library returns large buffers to the system after each batch, which distorts timings. To switch that off:
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=1000000000
"""
import argparse
import importlib.util
import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import harness
import timm
import torch
from timm.utils import ParseKwargs, reparameterize_model
from torch import nn
from torch.nn import functional as F

SETTINGS = ('mode', 'batch_size', 'img_size', 'dtype', 'compile', 'reparam', 'device')  # recorded in every row


class OnnxModel(nn.Module):
    """An ONNX file in ONNX Runtime on the CPU, called as a model is."""

    def __init__(self, path: str) -> None:
        import onnxruntime
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # idle threads that spin would slow down the model that is timed next
        options.add_session_config_entry('session.intra_op.allow_spinning', '0')
        self.session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
        info = self.session.get_inputs()[0]
        self.input_name, self.pretrained_cfg = info.name, {'input_size': tuple(info.shape[1:])}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.session.run(None, {self.input_name: x.numpy()})[0])


class OpenVinoModel(nn.Module):
    """A file of OpenVINO on the CPU, called as a model is."""

    def __init__(self, path: str) -> None:
        import openvino
        super().__init__()
        self.compiled = openvino.Core().compile_model(  # on many processors the default is bfloat16
            path, 'CPU', {'INFERENCE_NUM_THREADS': torch.get_num_threads(), 'INFERENCE_PRECISION_HINT': 'f32'})
        self.pretrained_cfg = {'input_size': tuple(self.compiled.inputs[0].get_partial_shape().get_min_shape())[1:]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.compiled(x.numpy())[0])


FILES = {'.onnx': OnnxModel, '.xml': OpenVinoModel}  # models in files that are no modules of PyTorch, by suffix


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = harness.parser(__doc__)
    parser.add_argument('models', nargs='*', metavar='MODEL', help='models to time, see above')
    parser.add_argument('--against', nargs='+', default=[], metavar='MODEL', help='models to compare with')
    parser.add_argument('--train', action='store_true', help='time training steps (AdamW) instead of inference')
    parser.add_argument('-b', '--batch-size', type=int, default=32)
    parser.add_argument('--img-size', type=int, help="input size, each model's own by default")
    parser.add_argument('--num-classes', type=int, default=1000)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16', 'float16'),
                        help='of weights and input in inference, of autocast in training')
    parser.add_argument('--reparam', action='store_true', help='fold batch norms into linear layers (inference)')
    parser.add_argument('--compile', nargs='?', const='default', metavar='MODE', help='torch.compile every model')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--warmup', type=int, default=2, help='rounds that are not counted')
    parser.add_argument('--seconds', type=float, default=1., help='minimum time of a model in a round')
    parser.add_argument('--no-memory', action='store_true', help='do not measure memory, in a process per model')
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, help='not of those of --against')
    parser.add_argument('--suite', type=Path, metavar='TXT', help='file with the arguments of one run per line')
    args = parser.parse_args(argv)
    if bool(args.models) == bool(args.suite):
        parser.error('give one or more models, or a --suite')
    if args.model_kwargs and (both := set(args.models) & set(args.against)):
        parser.error(f"{', '.join(sorted(both))}: with --model-kwargs a model cannot be in --against as well")
    if args.reparam and args.train:
        parser.error('--reparam is for inference')
    args.mode = 'train' if args.train else 'inference'
    args.models = list(dict.fromkeys(args.against + args.models))
    for spec in args.models:  # all of them, before hours of work
        file, _, function = spec.partition(':')
        if file.endswith(('.py', *FILES)):
            if not Path(file).is_file():
                parser.error(f'{spec}: there is no file {file}')
            if file.endswith('.py') and not function:
                parser.error(f'{spec}: name the function as well, {file}:FUNCTION')
        elif file not in ('hf-hub', 'local-dir') and not timm.is_model(spec):
            parser.error(f'{spec}: unknown to timm, and neither FILE.py:FUNCTION, FILE.onnx nor FILE.xml')
        if spec.endswith(tuple(FILES)) and (
                args.train or args.compile or args.dtype != 'float32' or args.device != 'cpu'):
            parser.error(f'{spec}: such files are for inference in float32 on the CPU')
    return args


def create(spec: str, args: argparse.Namespace) -> nn.Module:
    file, _, function = spec.partition(':')
    if (suffix := Path(file).suffix) in FILES:
        return FILES[suffix](file)
    kwargs = {} if spec in args.against else dict(args.model_kwargs)
    if suffix == '.py':
        found = importlib.util.spec_from_file_location(Path(file).stem, file)
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        return getattr(module, function)(**kwargs)
    if args.img_size:
        kwargs['img_size'] = args.img_size
    return timm.create_model(spec, num_classes=args.num_classes, **kwargs)


def build_step(spec: str, args: argparse.Namespace) -> Callable[[], Any]:
    """A function that runs a model once, forward or a step of training."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model = create(spec, args).train(args.train)
    size = harness.input_size(model, args.img_size)
    if args.reparam:
        model = reparameterize_model(model)
    model = model.to(device)
    x = torch.randn(args.batch_size, *size, device=device)
    if not args.train:
        model, x = model.to(dtype), x.to(dtype)
    forward = torch.compile(model, mode=args.compile) if args.compile else model
    if not args.train:
        return torch.inference_mode()(lambda: forward(x))

    target = torch.randint(args.num_classes, (args.batch_size,), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    amp = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def step() -> None:
        with amp:
            loss = F.cross_entropy(forward(x).float(), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def peak_memory(spec: str, args: argparse.Namespace) -> int:
    """Bytes that building a model and running it twice adds to a process, or to what is in use of a GPU."""
    cuda = args.device.startswith('cuda')
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else harness.memory(peak=False)
    step = build_step(spec, args)
    step()
    step()
    return (torch.cuda.max_memory_allocated() if cuda else harness.memory(peak=True)) - before


def measure(args: argparse.Namespace) -> List[Dict[str, Any]]:
    """One row per model, the baseline first."""
    rows = []
    for spec in args.models:
        model = create(spec, args)
        size = harness.input_size(model, args.img_size)
        of_torch = not isinstance(model, tuple(FILES.values()))
        rows.append({
            'model': harness.without_folders(spec), 'baseline': harness.without_folders(args.models[0]),
            **{k: getattr(args, k) for k in SETTINGS}, 'img_size': size[-1],
            'model_kwargs': {} if spec in args.against else args.model_kwargs,
            'params': sum(p.numel() for p in model.parameters()) if of_torch else None,
            'multiply_adds': harness.multiply_adds(model, size) if of_torch else None,
            'peak_memory': None if args.no_memory else peak_memory(spec, args) if args.device.startswith('cuda') else (
                harness.in_new_process(peak_memory, spec, args))})
    steps = {spec: build_step(spec, args) for spec in args.models}
    times = harness.time_in_turns(steps, args.rounds, args.warmup, args.seconds, args.device)
    for spec, row in zip(args.models, rows):
        row.update(harness.summarize(times[spec], times[args.models[0]], args.batch_size))
    return rows


def main(argv: Optional[List[str]] = None) -> Dict[str, Any]:
    args = parse_args(argv)
    runs = [args]
    if args.suite:
        lines = [shlex.split(line, comments=True) for line in args.suite.read_text().splitlines()]
        runs = [parse_args(line) for line in lines if line]  # all of them are checked before the first one starts
    report = harness.Report('speed', args.output, args.device, argv)
    for i, run in enumerate(runs):
        rows = harness.in_new_process(measure, run) if args.suite else measure(run)
        report.add(*({'run': i, **row} for row in rows))
    return report.data


if __name__ == '__main__':
    main()
