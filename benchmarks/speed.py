#!/usr/bin/env python3
"""Speed of models side by side: images per second, peak memory and multiply-adds against a baseline.

    python benchmarks/speed.py evo_deit_small_patch16_224 --against deit_small_patch16_224
    python benchmarks/speed.py evo_levit_256 --against levit_256 --reparam --output benchmarks/results/speed-levit.json
    python benchmarks/speed.py model.onnx model.int8.onnx --against deit_small_patch16_224
    python benchmarks/speed.py --suite benchmarks/suites/cpu.txt --output benchmarks/results/speed-cpu.json

A model is a name that timm knows; `FILE.onnx`, run by ONNX Runtime; or `FILE.xml`, run by OpenVINO in float32, of 224
pixels or of --img-size. The baseline is the first model of --against, or the first of all. A suite is a file with the
arguments of one run per line; each line is run in a process of its own, and all rows go to one result file.

docs/speed.md says how to keep the C library's allocator from distorting timings.
"""
import argparse
import shlex
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import harness
import timm
import torch
from timm.utils import ParseKwargs, reparameterize_model
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / 'examples'))
import export_onnx  # noqa: E402

FILES = tuple(export_onnx.RUNTIMES)  # suffixes of models that are no modules of PyTorch
SETTINGS = ('mode', 'batch_size', 'img_size', 'dtype', 'compile', 'reparam', 'device')  # recorded in every row


class FileModel(nn.Module):
    """A file in ONNX Runtime or OpenVINO on the CPU, called as a model is, with batches of one size."""

    def __init__(self, path: str, batch_size: int) -> None:
        super().__init__()
        self.run = export_onnx.RUNTIMES[Path(path).suffix]().load(path, batch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)[0]


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = harness.parser(__doc__)
    parser.add_argument('models', nargs='*', metavar='MODEL', help='models to time, see above')
    parser.add_argument('--against', nargs='+', default=[], metavar='MODEL', help='models to compare with')
    parser.add_argument('--train', action='store_true', help='time training steps (AdamW) instead of inference')
    parser.add_argument('--blocks', action='store_true', help='time the blocks alone, on the tokens that they get')
    parser.add_argument('-b', '--batch-size', type=int, default=32)
    parser.add_argument('--img-size', type=int, help="input size, each model's own by default, 224 of files")
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'),
                        help='of weights and input in inference, of autocast in training')
    parser.add_argument('--reparam', action='store_true', help='fold batch norms into linear layers (inference)')
    parser.add_argument('--compile', nargs='?', const='default', metavar='MODE', help='torch.compile every model')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--warmup', type=int, default=2, help='rounds that are not counted')
    parser.add_argument('--seconds', type=float, default=1., help='time of a model in a round, one call or more')
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
    if args.blocks and (args.train or args.compile):
        parser.error('--blocks is for inference without --compile')
    args.mode = 'train' if args.train else 'blocks' if args.blocks else 'inference'
    args.models = list(dict.fromkeys(args.against + args.models))
    for spec in args.models:  # all of them, before hours of work
        if not spec.endswith(FILES):
            if not spec.startswith(('hf-hub:', 'local-dir:')) and not timm.is_model(spec):
                parser.error(f"{spec}: unknown to timm, and neither FILE{' nor FILE'.join(FILES)}")
        elif not Path(spec).is_file():
            parser.error(f'there is no file {spec}')
        elif args.train or args.compile or args.dtype != 'float32' or args.device != 'cpu':
            parser.error(f'{spec}: such files are for inference in float32 on the CPU')
    return args


def create(spec: str, args: argparse.Namespace) -> nn.Module:
    if spec.endswith(FILES):
        return FileModel(spec, args.batch_size)
    kwargs = {} if spec in args.against else dict(args.model_kwargs)
    if args.img_size:
        kwargs['img_size'] = args.img_size
    return timm.create_model(spec, num_classes=1000, **kwargs)


def blocks_alone(model: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    """A function that calls the blocks of a model as they are called for images x, and nothing else."""
    calls: List[Any] = []
    hooks = [block.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True)
             for block in model.blocks]
    with torch.inference_mode():
        model(x)
    for hook in hooks:
        hook.remove()
    return torch.inference_mode()(lambda: [block(*args, **kwargs) for block, args, kwargs in calls])


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
    if args.blocks:
        return blocks_alone(model, x)
    if not args.train:
        return torch.inference_mode()(lambda: forward(x))

    target = torch.randint(1000, (args.batch_size,), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(forward(x).float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_memory(spec: str, args: argparse.Namespace) -> int:
    """Bytes that building a model and running it twice adds to a new process, or takes of a GPU."""
    before = harness.memory(peak=False)
    step = build_step(spec, args)
    step()
    step()
    return torch.cuda.max_memory_allocated() if args.device.startswith('cuda') else harness.memory(peak=True) - before


def measure(args: argparse.Namespace) -> List[Dict[str, Any]]:
    """One row per model, the baseline first."""
    rows = []
    for spec in args.models:
        model = create(spec, args)
        size = harness.input_size(model, args.img_size)
        of_torch = not isinstance(model, FileModel)
        rows.append({
            'model': harness.without_folders(spec), 'baseline': harness.without_folders(args.models[0]),
            **{k: getattr(args, k) for k in SETTINGS}, 'img_size': size[-1],
            'model_kwargs': {} if spec in args.against else args.model_kwargs,
            'params': sum(p.numel() for p in model.parameters()) if of_torch else None,
            'multiply_adds': harness.multiply_adds(model, size) if of_torch else None,
            'peak_memory': None if args.no_memory else harness.in_new_process(peak_memory, spec, args)})
    steps = {spec: build_step(spec, args) for spec in args.models}
    times = harness.time_in_turns(steps, args.rounds, args.warmup, args.seconds, args.device)
    for spec, row in zip(args.models, rows):
        row.update(harness.summarize(times[spec], times[args.models[0]], args.batch_size))
    return rows


def main(argv: Optional[List[str]] = None) -> None:
    args = parse_args(argv)
    runs = [args]
    if args.suite:
        lines = [shlex.split(line, comments=True) for line in args.suite.read_text().splitlines()]
        runs = [parse_args(line) for line in lines if line]  # all of them are checked before the first one starts
    report = harness.Report('speed', args.output, args.device, argv)
    for i, run in enumerate(runs):
        rows = harness.in_new_process(measure, run) if args.suite else measure(run)
        report.add(*({'run': i, **row} for row in rows))


if __name__ == '__main__':
    main()
