#!/usr/bin/env python3
"""All that matters on a GPU in one run of limited time, the most important first.

    python benchmarks/gpu.py --output benchmarks/results/gpu-NAME.json
    python benchmarks/gpu.py --output gpu.json --also tome:deit_small_patch16_224:13 evit.py:create_model

Checks of correctness, inference and training against timm's dense models, profiles. Every step has a limit of time,
and the result file is written after every step, so that nothing is lost when time runs out. A step that fails or takes
too long leaves its error. `benchmarks/report.py` makes tables and plots of the rows with `speed file=gpu-NAME`.
"""
import argparse
import copy
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import harness
import speed
import timm
import torch
from torch.profiler import ProfilerActivity, profile

DEIT_S = ('deit_small_patch16_224', 'evo_deit_small_patch16_224')
DEIT_B_384 = ('deit_base_patch16_384', 'evo_deit_base_patch16_384')
LEVIT = ('levit_256', 'evo_levit_256')
DEIT = [tuple(f'{evo}deit_{size}_patch16_224' for evo in ('', 'evo_')) for size in ('tiny', 'small', 'base')]
LEVITS = [(f'levit_{width}', f'evo_levit_{width}') for width in ('128s', '128', '192', '256', '384')]
TINY = {  # arguments that make the models small, by the start of their names
    'deit': dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3),
    'levit': dict(img_size=64, embed_dim=(16, 24, 32), key_dim=8, num_heads=(2, 3, 4), depth=(3, 1, 1)),
}


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, required=True, metavar='JSON', help='result file')
    parser.add_argument('--also', nargs='*', default=[], metavar='MODEL',
                        help='models to time beside DeiT-S at batch 256: tome:NAME:R or FILE.py:FUNCTION')
    parser.add_argument('--minutes', type=float, default=9., help='no step starts after so long')
    parser.add_argument('--step-seconds', type=float, default=60., help='limit of one step, compilation included')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--seconds', type=float, default=0.2, help='minimum time of a model in a round')
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--tiny', action='store_true', help='tiny models, to test this program, on a CPU for example')
    args = parser.parse_args(argv)
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        parser.error(f'--device {args.device}: PyTorch finds no GPU; --device cpu --tiny tests the program')
    for spec in args.also:
        try:
            harness.check_model(spec)
        except ValueError as error:
            parser.error(str(error))
    return args


def model_kwargs(name: str, args: argparse.Namespace) -> Dict[str, Any]:
    return TINY['levit' if 'levit' in name else 'deit'] if args.tiny else {}


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """
    Raises:
        TimeoutError: The block takes longer.
    """
    def stop(*_: Any) -> None:
        raise TimeoutError(f'more than {seconds:g} seconds')

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def compile_args(mode: Optional[str], args: argparse.Namespace) -> Dict[str, Any]:
    return dict(backend='aot_eager') if args.tiny else dict(mode=mode)


@torch.inference_mode()
def check(name: str, dense_name: Optional[str], dtype: str, compiled: bool, args: argparse.Namespace) -> Dict[str, Any]:
    """Largest differences of the logits, relative to the largest logit.

    From those of the same model in float64 on the CPU, which may select other tokens where attention nearly ties; and,
    at keep ratio 1, from those of the dense model of timm on the same device.
    """
    torch.manual_seed(0)
    kwargs = model_kwargs(name, args)
    model = timm.create_model(name, **kwargs).eval()
    x = torch.randn(4, *harness.input_size(model, kwargs.get('img_size')))
    expected = copy.deepcopy(model).double()(x.double())
    model, x = (y.to(args.device, getattr(torch, dtype)) for y in (model, x))

    def difference(forward: Any, expected: torch.Tensor) -> float:
        logits = forward(x).double().cpu()
        return ((logits - expected.double().cpu()).abs().max() / expected.abs().max()).item()

    def forward(model: torch.nn.Module) -> Any:
        return torch.compile(model, fullgraph=True, **compile_args(None, args)) if compiled else model

    row: Dict[str, Any] = {'model': name, 'dtype': dtype, 'compiled': compiled}
    row['from_float64_on_cpu'] = difference(forward(model), expected)
    if args.device.startswith('cuda') and not compiled:  # raises at what would make the host wait for the device
        torch.cuda.set_sync_debug_mode('error')
        try:
            model(x)
            row['synchronizes'] = False
        except RuntimeError as error:
            row['synchronizes'] = str(error)
        finally:
            torch.cuda.set_sync_debug_mode('default')
    if dense_name:
        dense = timm.create_model(dense_name, global_pool='avg', **kwargs).eval()
        dense.load_state_dict({k: v for k, v in model.state_dict().items() if k in dense.state_dict()})
        model.set_keep_ratio(1.)
        row['from_dense_at_keep_ratio_1'] = difference(forward(model), dense.to(x)(x))
    return row


def time_models(names: Tuple[str, ...], args: argparse.Namespace, **settings: Any) -> List[Dict[str, Any]]:
    """Rows as speed.py has them, the first model being the baseline; memory is that of the device."""
    batch_size = settings.pop('batch_size')
    if args.tiny:
        batch_size = min(batch_size, 2)
    cuda = args.device.startswith('cuda')
    rows, steps = [], {}
    for name in names:
        kwargs = {**model_kwargs(name, args), **(settings.get('model_kwargs', {}) if name != names[0] else {})}
        run = argparse.Namespace(
            train=False, dtype='bfloat16', compile=None, reparam=False, num_classes=1000, img_size=None)
        for key, value in settings.items():
            setattr(run, key, value)
        run.device, run.batch_size, run.against = args.device, batch_size, []
        run.model_kwargs, run.img_size = kwargs, kwargs.get('img_size')
        run.backend = 'aot_eager' if args.tiny else None
        model = speed.create(name, run)
        size = harness.input_size(model, run.img_size)
        rows.append({
            'model': harness.without_folders(name), 'baseline': names[0], 'mode': 'train' if run.train else 'inference',
            **{k: getattr(run, k) for k in ('batch_size', 'dtype', 'compile', 'reparam', 'device')},
            'img_size': size[-1], 'model_kwargs': settings.get('model_kwargs', {}) if name != names[0] else {},
            'params': sum(p.numel() for p in model.parameters()), 'multiply_adds': harness.multiply_adds(model, size),
            'peak_memory': None})
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        steps[name] = speed.build_step(name, run)
        for _ in range(3):
            steps[name]()
        if cuda:
            torch.cuda.synchronize()
            rows[-1]['peak_memory'] = torch.cuda.max_memory_allocated() - before
    times = harness.time_in_turns(steps, args.rounds, 1, args.seconds, args.device)
    for name, row in zip(names, rows):
        row.update(harness.summarize(times[name], times[names[0]], batch_size))
    return rows


@torch.inference_mode()
def profile_model(name: str, batch_size: int, args: argparse.Namespace) -> Dict[str, Any]:
    """The operators that take most of the time."""
    kwargs = model_kwargs(name, args)
    model = timm.create_model(name, **kwargs).eval().to(args.device, torch.bfloat16)
    batch_size = min(batch_size, 2) if args.tiny else batch_size
    x = torch.randn(batch_size, *harness.input_size(model, kwargs.get('img_size')), device=args.device).bfloat16()
    cuda = args.device.startswith('cuda')
    for _ in range(3):
        model(x)
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as found:
        for _ in range(10):
            model(x)
        harness.now(args.device)
    averages = found.key_averages()
    key = 'self_device_time_total' if cuda else 'self_cpu_time_total'
    total = sum(getattr(a, key) for a in averages)
    largest = sorted(averages, key=lambda a: -getattr(a, key))[:30]
    operators = [{'name': a.key[:120], 'calls': a.count / 10, 'share': getattr(a, key) / total} for a in largest]
    return {'model': name, 'batch_size': batch_size, 'microseconds': total / 10, 'operators': operators}


def plan(args: argparse.Namespace) -> Iterator[Tuple[str, Any]]:
    """Steps in order of importance: the list of the result file that they go to, and a function without arguments."""
    def timing(names: Tuple[str, ...], **settings: Any) -> Tuple[str, Any]:
        return 'rows', lambda: time_models(names, args, **settings)

    def checking(*values: Any) -> Tuple[str, Any]:
        return 'checks', lambda: [check(*values, args)]

    yield checking(DEIT_S[1], DEIT_S[0], 'float32', False)
    yield checking(LEVIT[1], None, 'float32', False)
    yield timing(DEIT_S, batch_size=256)
    yield timing(LEVIT, batch_size=256, reparam=True)
    yield timing(DEIT_S, batch_size=256, train=True)
    yield timing(LEVIT, batch_size=256, train=True)
    for names in (DEIT_S, LEVIT):
        yield timing(names, batch_size=256, compile='default', reparam=names == LEVIT)
        yield timing(names, batch_size=1, compile='reduce-overhead', reparam=names == LEVIT)
        yield timing(names, batch_size=1, reparam=names == LEVIT)
        yield timing(names, batch_size=32, reparam=names == LEVIT)
    for name in (DEIT_S[1], LEVIT[1]):
        for batch_size in (256, 1):
            yield 'profiles', lambda name=name, batch_size=batch_size: [profile_model(name, batch_size, args)]
    if args.also:
        yield timing((DEIT_S[0], *args.also), batch_size=256)
    for names in (DEIT_S, LEVIT):
        yield timing(names, batch_size=256, train=True, model_kwargs={'selection': 'layer'})
        yield timing(names, batch_size=256, train=True, compile='default')
    for dtype in ('bfloat16', 'float16'):
        for compiled in (False, True):
            yield checking(DEIT_S[1], DEIT_S[0], dtype, compiled)
            yield checking(LEVIT[1], None, dtype, compiled)
    for names in [*DEIT, DEIT_B_384, *LEVITS]:
        if names not in (DEIT_S, LEVIT):
            yield timing(names, batch_size=64 if names == DEIT_B_384 else 256, reparam='levit' in names[0])
    for names in (DEIT_S, LEVIT):
        yield timing(names, batch_size=256, dtype='float32', reparam=names == LEVIT)


def main(argv: Optional[List[str]] = None) -> Dict[str, Any]:
    args = parse_args(argv)
    started = time.monotonic()
    results = harness.Report('gpu', args.output, args.device, sys.argv[1:] if argv is None else argv)
    results.data.update(checks=[], profiles=[], errors=[])
    for i, (kind, step) in enumerate(plan(args)):
        left = 60 * args.minutes - (time.monotonic() - started)
        if left <= 0:
            results.data['errors'].append({'step': i, 'error': 'not started, no time left'})
            continue
        try:
            with time_limit(min(args.step_seconds, left)):
                found = step()
        except Exception as error:  # the steps after this one matter too
            results.data['errors'].append({'step': i, 'error': f'{type(error).__name__}: {error}'[:500]})
            print(f'step {i}: {type(error).__name__}: {str(error)[:200]}')
        else:
            results.data[kind] += [{'run': i, **row} for row in found]
            if kind == 'rows':
                speed.show(found)
            else:
                print(kind, *({k: v for k, v in row.items() if k != 'operators'} for row in found))
        results.write()
        if args.device.startswith('cuda'):
            torch.cuda.empty_cache()
        torch._dynamo.reset()
    results.write()
    return results.data


if __name__ == '__main__':
    main()
