#!/usr/bin/env python3
"""Speed of models side by side: images per second, peak memory and multiply-adds against a baseline.

    python examples/benchmark.py evo_deit_small_patch16_224 --against deit_small_patch16_224
    python examples/benchmark.py evo_deit_small_patch16_224 --against deit_small_patch16_224 --train --json figures.json
    python examples/benchmark.py evo_deit_small_patch16_224 --against deit_small_patch16_224 \\
        tome:deit_small_patch16_224:13 others.py:create_model --plot accuracy_speed.png

A model is a name that timm knows; `tome:NAME:R`, a Vision Transformer of timm that merges R tokens in every block, if
the package tome is installed; or `FILE.py:FUNCTION`, whatever model the function returns. The first one of --against
is the baseline, or the first of all without it; the models of --against get none of the --model-kwargs. Every round
times each model once, in turn, so that a machine whose speed drifts slows all of them alike; the speed-up is the
median over the rounds of the ratio within a round.
"""
import argparse
import importlib.util
import json
import platform
import resource
import statistics
import time
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import matplotlib
import timm
import torch
from matplotlib import pyplot as plt
from timm.utils import ParseKwargs, reparameterize_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from timm_evovit.hub import PUBLISHED

matplotlib.use('Agg')
TOP1 = {  # ImageNet-1k, as the papers of Evo-ViT, DeiT and LeViT have it; LeViT's are of 1000 epochs, Evo-LeViT's of 300
    **{name: top1 for name, (top1, _) in PUBLISHED.items()},
    'deit_tiny_patch16_224': 72.2, 'deit_small_patch16_224': 79.8, 'deit_base_patch16_224': 81.8,
    'deit_base_patch16_384': 83.1,
    'levit_128s': 76.6, 'levit_128': 78.6, 'levit_192': 80.0, 'levit_256': 81.6, 'levit_384': 82.6,
}


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='+', metavar='MODEL', help='models to time, see above')
    parser.add_argument(
        '--against', nargs='+', default=[], metavar='MODEL', help='models to compare with, the baseline first')
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
    parser.add_argument('--seconds', type=float, default=1., help='at least so long is a model timed in a round')
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs,
                        help='arguments of the models, not of those of --against')
    parser.add_argument('--json', type=Path, help='write all figures to this file')
    parser.add_argument('--plot', type=Path, metavar='PNG', help='draw top-1 from the papers against measured speed')
    args = parser.parse_args(argv)
    if args.model_kwargs and (both := set(args.models) & set(args.against)):
        parser.error(f"{', '.join(sorted(both))}: --model-kwargs is for the models alone, this one is in --against as well")
    args.models = list(dict.fromkeys(args.against + args.models))
    for spec in args.models:
        kind, name, rest = split(spec)
        if kind == 'file' and not Path(name).is_file():
            parser.error(f'{spec}: there is no file {name}')
        if kind == 'file' and not rest:
            parser.error(f'{spec}: name the function as well, {name}:FUNCTION')
        if kind != 'file' and not timm.is_model(name):
            parser.error(f'{spec}: unknown to timm, and neither tome:NAME:R nor FILE.py:FUNCTION')
        if kind == 'tome' and not rest.isdecimal():
            parser.error(f'{spec}: R must be the number of tokens to merge in every block, got {rest!r}')
        if kind == 'tome' and importlib.util.find_spec('tome') is None:
            parser.error(f'{spec}: the package tome is not installed')
    if args.reparam and args.train:
        parser.error('--reparam is for inference')
    return args


def split(spec: str) -> Tuple[str, str, str]:
    """Kind of a model ('timm', 'tome' or 'file'), name or file, and what is said beyond that."""
    kind, _, rest = spec.partition(':')
    if kind == 'tome':
        return (kind, *rest.partition(':')[::2])
    if kind.endswith('.py'):
        return 'file', kind, rest
    return 'timm', spec, ''


def create(spec: str, args: argparse.Namespace) -> torch.nn.Module:
    kind, name, rest = split(spec)
    kwargs = {} if spec in args.against else args.model_kwargs
    if kind == 'file':
        module = importlib.util.module_from_spec(found := importlib.util.spec_from_file_location(Path(name).stem, name))
        found.loader.exec_module(module)
        return getattr(module, rest)(**kwargs)
    size = {'img_size': args.img_size} if args.img_size else {}
    model = timm.create_model(name, num_classes=args.num_classes, **kwargs, **size)
    if kind == 'tome':
        import tome
        tome.patch.timm(model)
        model.r = int(rest)
    return model


def input_size(model: torch.nn.Module, args: argparse.Namespace) -> List[int]:
    chans, height, width = getattr(model, 'pretrained_cfg', {}).get('input_size', (3, 224, 224))
    return [chans, args.img_size or height, args.img_size or width]


def multiply_adds(model: torch.nn.Module, args: argparse.Namespace) -> float:
    """Multiply-adds of one image in inference, attention counted as the matrix products that it is."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.eval()(torch.zeros(1, *input_size(model, args)))
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
        self.forward: Callable = torch.compile(model, mode=args.compile) if args.compile else model
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


def resident_memory(peak: bool) -> int:
    """Bytes of this process in memory, now or at most so far."""
    status = Path('/proc/self/status')
    if status.exists():  # Linux counts what the parent process had into ru_maxrss
        lines = dict(line.split(':', 1) for line in status.read_text().splitlines())
        return int(lines['VmHWM' if peak else 'VmRSS'].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == 'Darwin' else 1024)


def peak_memory(name: str, args: argparse.Namespace) -> int:
    """Bytes that building a model and running two steps adds to what the process has before."""
    cuda = args.device.startswith('cuda')
    before = torch.cuda.memory_allocated() if cuda else resident_memory(peak=False)
    runner = Runner(name, args)
    runner.step()
    runner.step()
    return (torch.cuda.max_memory_allocated() if cuda else resident_memory(peak=True)) - before


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
    names = args.models
    with tqdm(total=len(names) * (2 + args.warmup + args.rounds), unit='step', disable=None) as progress:
        results = {}
        for name in names:
            progress.set_description(f'{name}: operations, memory')
            model = create(name, args)
            results[name] = {
                'params': sum(p.numel() for p in model.parameters()), 'gmacs': multiply_adds(model, args) / 1e9,
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
        'settings': {k: v for k, v in settings.items() if k not in ('models', 'against', 'json', 'plot')},
        'models': results,
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


def plot(report: Dict[str, Any], path: Path) -> None:
    """Draw top-1 as the papers have it against the speed measured; models without one are named and left out."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout='constrained')
    for name, r in report['models'].items():
        top1 = TOP1.get(name, TOP1.get(f'{name}_patch16_224'))
        if top1 is None:
            print(f'{name}: no top-1 is published under this name, it is not in the plot')
            continue
        evo = name.startswith('evo_')
        axis.plot(r['images_per_second'], top1, 'o' if evo else 's')
        axis.annotate(  # dense above, Evo below: the two of a pair are close to each other
            name, (r['images_per_second'], top1), xytext=(0, -6 if evo else 6), textcoords='offset points', fontsize=8,
            ha='center', va='top' if evo else 'bottom')
    axis.margins(x=0.25, y=0.15)
    axis.set(xlabel=f"images per second, measured ({report['machine']})", ylabel='ImageNet-1k top-1 in the papers (%)')
    axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Optional[List[str]] = None) -> None:
    args = parse_args(argv)
    report = measure(args)
    print(table(report))
    if args.plot:
        plot(report, args.plot)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2))


if __name__ == '__main__':
    main()
