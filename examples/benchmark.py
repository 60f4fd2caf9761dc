#!/usr/bin/env python3
"""Speed of timm models side by side: images per second, peak memory and multiply-adds against a baseline.

    python examples/benchmark.py deit_small_patch16_224 evo_deit_small_patch16_224
    python examples/benchmark.py deit_small_patch16_224 evo_deit_small_patch16_224 --train --json figures.json

The first model is the baseline. Every round times each model once, in turn, so that a machine whose speed drifts slows
all of them alike; the speed-up is the median over the rounds of the ratio within a round.
"""
import argparse
import json
import platform
import resource
import statistics
import time
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import timm
import torch
from timm.utils import ParseKwargs, reparameterize_model
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='+', help='timm models, the baseline first')
    parser.add_argument('--train', action='store_true', help='time training steps (AdamW) instead of inference')
    parser.add_argument('-b', '--batch-size', type=int, default=32)
    parser.add_argument('--img-size', type=int, help="input size, each model's own by default")
    parser.add_argument('--num-classes', type=int, default=1000)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16', 'float16'),
                        help='of weights and input in inference, of autocast in training')
    parser.add_argument('--reparam', action='store_true', help='fold batch norms into linear layers (inference)')
    parser.add_argument('--compile', action='store_true', help='torch.compile every model')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--warmup', type=int, default=2, help='rounds that are not counted')
    parser.add_argument('--seconds', type=float, default=1., help='at least so long is a model timed in a round')
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, help='arguments of all models')
    parser.add_argument('--json', type=Path, help='write all figures to this file')
    args = parser.parse_args(argv)
    unknown = [name for name in args.models if not timm.is_model(name)]
    if unknown:
        parser.error(f"unknown to timm: {', '.join(unknown)}")
    if args.reparam and args.train:
        parser.error('--reparam is for inference')
    return args


def create(name: str, args: argparse.Namespace, **kwargs: Any) -> torch.nn.Module:
    if args.img_size:
        kwargs['img_size'] = args.img_size
    return timm.create_model(name, num_classes=args.num_classes, **args.model_kwargs, **kwargs)


def input_size(model: torch.nn.Module, args: argparse.Namespace) -> List[int]:
    chans, height, width = model.pretrained_cfg['input_size']
    return [chans, args.img_size or height, args.img_size or width]


def parameters(name: str, args: argparse.Namespace) -> int:
    """Number of parameters, batch norms not folded."""
    return sum(p.numel() for p in create(name, args, device='meta').parameters())


def multiply_adds(name: str, args: argparse.Namespace) -> float:
    """Multiply-adds of one image in inference; counted on the meta device, where attention is plain matrix products."""
    model = create(name, args, device='meta').eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, *input_size(model, args), device='meta'))
    return counter.get_total_flops() / 2


class Runner:
    """A model with all that one step of it takes."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        device = torch.device(args.device)
        dtype = getattr(torch, args.dtype)
        model = create(name, args).train(args.train)
        if args.reparam:
            model = reparameterize_model(model)
        model = model.to(device)
        x = torch.randn(args.batch_size, *input_size(model, args), device=device)
        if not args.train:
            model, x = model.to(dtype), x.to(dtype)
        self.cuda = device.type == 'cuda'
        self.forward: Callable = torch.compile(model) if args.compile else model
        self.x = x
        self.train = args.train
        if args.train:
            self.target = torch.randint(args.num_classes, (args.batch_size,), device=device)
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
            self.amp = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()

    def step(self) -> None:
        if not self.train:
            with torch.inference_mode():
                self.forward(self.x)
            return
        with self.amp:
            loss = torch.nn.functional.cross_entropy(self.forward(self.x).float(), self.target)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def time(self, seconds: float) -> float:
        """Seconds per step, over as many steps as fill `seconds`."""
        steps = 0
        start = now = self._now()
        while not steps or now - start < seconds:
            self.step()
            steps += 1
            now = self._now()
        return (now - start) / steps

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def peak_memory(name: str, args: argparse.Namespace) -> int:
    """Bytes that building a model and running two steps adds to what the process has before."""
    if args.device.startswith('cuda'):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    runner = Runner(name, args)
    runner.step()
    runner.step()
    if args.device.startswith('cuda'):
        return torch.cuda.max_memory_allocated() - before
    unit = 1 if platform.system() == 'Darwin' else 1024
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit


def peak_memory_alone(name: str, args: argparse.Namespace) -> int:
    """The same in a process of its own, so that models do not share a peak."""
    with get_context('spawn').Pool(1) as pool:
        return pool.apply(peak_memory, (name, args))


def machine(args: argparse.Namespace) -> str:
    if args.device.startswith('cuda'):
        return torch.cuda.get_device_name()
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        cpu = next(line.split(':', 1)[1].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return f'{cpu}, {torch.get_num_threads()} threads'


def measure(args: argparse.Namespace) -> Dict[str, Any]:
    names = list(dict.fromkeys(args.models))
    with tqdm(total=len(names) * (2 + args.warmup + args.rounds), unit='step', disable=None) as progress:
        results = {}
        for name in names:
            progress.set_description(f'{name}: operations, memory')
            results[name] = {
                'params': parameters(name, args), 'gmacs': multiply_adds(name, args) / 1e9,
                'peak_memory': peak_memory_alone(name, args), 'seconds': [],
            }
            progress.update()
        runners = {}
        for name in names:
            progress.set_description(f'{name}: build')
            runners[name] = Runner(name, args)
            progress.update()
        for i in range(-args.warmup, args.rounds):
            for name in names if i % 2 == 0 else reversed(names):
                progress.set_description(f"{name}: {'warm-up' if i < 0 else f'round {i + 1}'}")
                seconds = runners[name].time(args.seconds)
                if i >= 0:
                    results[name]['seconds'].append(seconds)
                progress.update()
    baseline = results[names[0]]
    for result in results.values():
        ratios = [a / b for a, b in zip(baseline['seconds'], result['seconds'])]
        result.update(
            images_per_second=args.batch_size / statistics.median(result['seconds']),
            speed_up=statistics.median(ratios), speed_up_min=min(ratios), speed_up_max=max(ratios),
            gmacs_ratio=baseline['gmacs'] / result['gmacs'],
        )
    settings = {k: v if isinstance(v, (int, float, str, dict, type(None))) else str(v) for k, v in vars(args).items()}
    return {
        'machine': machine(args), 'torch': torch.__version__, 'timm': timm.__version__,
        'settings': {k: v for k, v in settings.items() if k not in ('models', 'json')}, 'models': results,
    }


def table(report: Dict[str, Any]) -> str:
    settings = report['settings']
    mode = 'training step' if settings['train'] else 'inference'
    lines = [
        f"{report['machine']}; torch {report['torch']}, timm {report['timm']}; {mode}, {settings['dtype']}, "
        f"batch {settings['batch_size']}, {settings['rounds']} rounds",
        '',
        '| model | params (M) | GMACs | ratio | img/s | speed-up (min - max) | peak memory (MB) |',
        '|---|---|---|---|---|---|---|',
    ]
    for name, r in report['models'].items():
        lines.append(
            f"| {name} | {r['params'] / 1e6:.2f} | {r['gmacs']:.3f} | {r['gmacs_ratio']:.3f} | "
            f"{r['images_per_second']:.1f} | {r['speed_up']:.3f} ({r['speed_up_min']:.3f} - {r['speed_up_max']:.3f}) | "
            f"{r['peak_memory'] / 1e6:.0f} |")
    return '\n'.join(lines)


def main(argv: Optional[List[str]] = None) -> None:
    args = parse_args(argv)
    report = measure(args)
    print(table(report))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2))


if __name__ == '__main__':
    main()
