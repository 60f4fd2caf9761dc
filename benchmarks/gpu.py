#!/usr/bin/env python3
"""All that matters on a GPU in one run of limited time, the most important first.

    python benchmarks/gpu.py --output benchmarks/results/gpu-NAME.json
    python benchmarks/gpu.py --output benchmarks/results/gpu-NAME-2.json --skip 40
    python benchmarks/gpu.py --output gpu.json --also tome:deit_small_patch16_224:13 deit/evo_deit.py:FUNCTION

Checks of correctness, inference and training against timm's dense models, profiles. Every step has a limit of time,
and the result file is written after every step, so that nothing is lost when time runs out. A step that fails or takes
too long leaves its error. One call of ten minutes does not do them all: the next one goes on with --skip.
`benchmarks/report.py` makes tables and plots of the rows with `speed file=gpu-NAME`.

Other projects are timed with --also. Where there is no network, carry these along and put them on PYTHONPATH:

- facebookresearch/ToMe, 4 MB, of which the package tome is 36 kB. tome:deit_small_patch16_224:13 merges 13 tokens in
  every block.
- YifanXu74/Evo-ViT, 2 MB, of which deit/, levit/ and utils.py are 0.2 MB: deit/evo_deit.py:evo_deit_small_patch16_224
  and levit/evo_levit.py:EvoLeViT_256.
- youweiliang/evit, 3 MB, of which evit.py and helpers.py are 0.1 MB. Its functions need an old timm and the package
  torchprofile; its class does not: a file of one's own with a function that returns evit.EViT(patch_size=16,
  embed_dim=384, depth=12, num_heads=6, qkv_bias=True, keep_rate=(1, 1, 1, .7, 1, 1, .7, 1, 1, .7, 1, 1)).

On a CPU it runs in full with --device cpu --max-batch 4 --rounds 1 --seconds 0, with longer limits of time.
"""
import argparse
import copy
import signal
import sys
import time
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple
from unittest import mock

import harness
import speed
import timm
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from timm_evovit import attention, similarity

DEIT_S = ('deit_small_patch16_224', 'evo_deit_small_patch16_224')
DEIT_B_384 = ('deit_base_patch16_384', 'evo_deit_base_patch16_384')
LEVIT = ('levit_256', 'evo_levit_256')
EVOLVED = ('vit_small_patch16_224', 'evo_vit')  # by similarity, as `evolve` does
DEIT = [tuple(f'{evo}deit_{size}_patch16_224' for evo in ('', 'evo_')) for size in ('tiny', 'small', 'base')]
LEVITS = [(f'levit_{width}', f'evo_levit_{width}') for width in ('128s', '128', '192', '256', '384')]
MODEL_KWARGS = {'evo_vit': {'base': EVOLVED[0]}}
DENSE_KWARGS = {DEIT_S[0]: {'global_pool': 'avg'}}  # the dense model that an evolving one at keep ratio 1 equals
PARTS = {  # of a forward pass, and the functions that do them
    'class attention': [(attention, 'class_attention'), (attention.EvolutionState, 'track')],
    'selection': [(attention, 'split_tokens')],
    'grouping': [(similarity, 'group_tokens')],
    'restoration': [(attention, 'merge_tokens'), (attention, 'merge_attn'), (similarity.TokenGroups, 'restore')],
}
TINY = {  # arguments that make the models small, by the start of their names
    'deit': dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3),
    'levit': dict(img_size=64, embed_dim=(16, 24, 32), key_dim=8, num_heads=(2, 3, 4), depth=(3, 1, 1)),
}


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, required=True, metavar='JSON', help='result file')
    parser.add_argument('--also', nargs='*', default=[], metavar='MODEL',
                        help='models to time beside DeiT-S at batch 256: tome:NAME:R or FILE.py:FUNCTION')
    parser.add_argument('--skip', type=int, default=0, metavar='N', help='leave out the first N steps, done before')
    parser.add_argument('--steps', type=int, metavar='N', help='stop after N steps, default: all')
    parser.add_argument('--max-batch', type=int, default=256, metavar='N', help='larger batches are cut to N images')
    parser.add_argument('--minutes', type=float, default=9., help='no step starts after so long')
    parser.add_argument('--step-seconds', type=float, default=90., help='limit of one step, compilation included')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--seconds', type=float, default=0.2, help='minimum time of a model in a round')
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--tiny', action='store_true', help='tiny models, to test this program, on a CPU for example')
    args = parser.parse_args(argv)
    if args.tiny:
        args.max_batch = min(args.max_batch, 2)
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        parser.error(f'--device {args.device}: PyTorch finds no GPU; try --device cpu, see --help')
    for spec in args.also:
        try:
            harness.check_model(spec)
        except ValueError as error:
            parser.error(str(error))
    return args


def tiny_kwargs(name: str) -> Dict[str, Any]:
    """Arguments that make a model small."""
    return TINY['levit' if 'levit' in name else 'deit']


def model_kwargs(name: str, args: argparse.Namespace) -> Dict[str, Any]:
    return {**MODEL_KWARGS.get(name, {}), **(tiny_kwargs(name) if args.tiny else {})}


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
@torch.backends.cudnn.flags(allow_tf32=False)
def check(names: Tuple[str, str], dtype: str, compiled: bool, args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Largest differences of the logits of the second model, relative to the largest logit.

    From those of the same model in float64 on the CPU, which may select other tokens where attention nearly ties: the
    tests hold the CPU to figures of the authors' code. And, at keep ratio 1, from those of the dense model of timm on
    the same device, except for LeViT: Evo-LeViT has a class token and no attention biases, so no dense model equals it.
    """
    torch.manual_seed(0)
    dense_name, name = names
    kwargs = model_kwargs(name, args)
    model = timm.create_model(name, **kwargs).eval()
    x = torch.randn(min(4, args.max_batch), *harness.input_size(model, kwargs.get('img_size')))
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
    if names != LEVIT:
        kwargs = {**model_kwargs(dense_name, args), **DENSE_KWARGS.get(dense_name, {})}
        dense = timm.create_model(dense_name, **kwargs).eval()
        dense.load_state_dict({k: v for k, v in model.state_dict().items() if k in dense.state_dict()})
        model.set_keep_ratio(1.)
        row['from_dense_at_keep_ratio_1'] = difference(forward(model), dense.to(x)(x))
    return [row]


def time_models(names: Tuple[str, ...], args: argparse.Namespace, **settings: Any) -> List[Dict[str, Any]]:
    """Rows as speed.py has them, the first model being the baseline; memory is that of the device.

    Settings are those of `plan`.
    """
    cuda = args.device.startswith('cuda')
    rows, steps = [], {}
    for name in names:
        kwargs = {**MODEL_KWARGS.get(name, {}), **(settings['model_kwargs'] if name != names[0] else {})}
        run = argparse.Namespace(**settings, num_classes=1000, device=args.device, against=[])
        run.model_kwargs = {**kwargs, **model_kwargs(name, args)}
        run.img_size = run.model_kwargs.get('img_size')
        run.backend = 'aot_eager' if args.tiny else None
        model = speed.create(name, run)
        size = harness.input_size(model, run.img_size)
        rows.append({
            'model': harness.without_folders(name), 'baseline': names[0], 'mode': 'train' if run.train else 'inference',
            **{k: getattr(run, k) for k in ('batch_size', 'dtype', 'compile', 'reparam', 'device')},
            'img_size': size[-1], 'model_kwargs': kwargs, 'params': sum(p.numel() for p in model.parameters()),
            'multiply_adds': harness.multiply_adds(model, size), 'peak_memory': None})
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
        row.update(harness.summarize(times[name], times[names[0]], settings['batch_size']))
    return rows


# other projects' files register their models by names that are ours or timm's
@mock.patch('timm.models.registry.register_model', lambda function: function)
def time_others(names: Tuple[str, ...], args: argparse.Namespace, **settings: Any) -> List[Dict[str, Any]]:
    return time_models(names, args, **settings)


@contextmanager
def recorded_parts() -> Iterator[None]:
    """Functions of PARTS are ranges of the profiler, by the name of their part.

    For eager models only: compiled ones do not call the functions, and their kernels may do work of several parts.
    """
    def recorded(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(part):
                return function(*args, **kwargs)
        return call

    with ExitStack() as stack:
        for part, functions in PARTS.items():
            for owner, name in functions:
                stack.enter_context(mock.patch.object(owner, name, recorded(part, getattr(owner, name))))
        yield


def part_times(events: List[Any], cuda: bool) -> Dict[str, float]:
    """Microseconds of each part in a profile with shapes, on the GPU those of its kernels."""
    times = {part: 0. for part in PARTS}
    scores: List[List[int]] = []  # shapes of the class token's scores, which an attention layer computes by itself
    for event in events:
        part = event.name if event.name in PARTS else None
        shapes = event.input_shapes
        if event.name == 'aten::matmul' and len(shapes[1]) == 4 and shapes[1][3] == 1:  # all keys by one query
            part = 'class attention'
            scores.append(shapes[0][:3])
        elif event.name == 'aten::mul' and shapes[0] in scores:
            part = 'class attention'
        if part and event.device_type == DeviceType.CPU:
            times[part] += event.device_time_total if cuda else event.cpu_time_total
    return times


@torch.inference_mode()
def profile_model(name: str, batch_size: int, args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Share of each part in a forward pass, eager and in bfloat16, and the kernels, on a CPU operators, that take most.

    On a GPU shares are of the time of all kernels.
    """
    kwargs = model_kwargs(name, args)
    model = timm.create_model(name, **kwargs).eval().to(args.device, torch.bfloat16)
    x = torch.randn(batch_size, *harness.input_size(model, kwargs.get('img_size')), device=args.device).bfloat16()
    cuda = args.device.startswith('cuda')
    for _ in range(3):
        model(x)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with recorded_parts(), profile(activities=activities, record_shapes=True) as found:
        for _ in range(10):
            model(x)
        harness.now(args.device)
    key = 'self_device_time_total' if cuda else 'self_cpu_time_total'
    averages = [a for a in found.key_averages() if not cuda or (  # kernels only: operators have their time as well
        a.device_type == DeviceType.CUDA and not a.is_user_annotation)]
    total = sum(getattr(a, key) for a in averages)
    parts = {part: time / total for part, time in part_times(found.events(), cuda).items() if time}
    largest = sorted(averages, key=lambda a: -getattr(a, key))[:30]
    operators = [{'name': a.key[:120], 'calls': a.count / 10, 'share': getattr(a, key) / total} for a in largest]
    return [{'model': name, 'batch_size': batch_size, 'microseconds': total / 10, 'parts': parts,
             'operators': operators}]


class Step(NamedTuple):
    kind: str  # the list of the result file that its rows go to
    function: Callable[..., List[Dict[str, Any]]]
    values: Tuple[Any, ...]  # its arguments in front of those of the program
    settings: Dict[str, Any]  # and after them


def plan(args: argparse.Namespace) -> List[Step]:
    """Steps in order of importance, each of them once."""
    steps: List[Step] = []

    def add(*step: Any) -> None:
        if Step(*step) not in steps:
            steps.append(Step(*step))

    def timing(names: Tuple[str, ...], batch_size: int, function: Any = time_models, **more: Any) -> None:
        settings = dict(train=False, dtype='bfloat16', compile=None, model_kwargs={})
        settings['reparam'] = 'levit' in names[0] and not more.get('train')
        add('rows', function, (names,), {**settings, 'batch_size': min(batch_size, args.max_batch), **more})

    def checking(dtypes: Tuple[str, ...], compiled: bool) -> None:
        for dtype in dtypes:
            for names in main_pairs:
                add('checks', check, (names, dtype, compiled), {})

    main_pairs = (DEIT_S, EVOLVED, LEVIT)
    all_dtypes = ('float32', 'bfloat16', 'float16')
    checking(all_dtypes, compiled=False)
    for names in main_pairs:
        timing(names, 256)
    for names in (DEIT_S, LEVIT):
        timing(names, 256, train=True)
    for names in main_pairs:
        for batch_size in (256, 1):
            add('profiles', profile_model, (names[1], min(batch_size, args.max_batch)), {})
    if args.also:
        timing((DEIT_S[0], *args.also), 256, time_others)
    for names in main_pairs:
        timing(names, 256, compile='default')
        timing(names, 1, compile='reduce-overhead')
        timing(names, 1)
        timing(names, 32)
    for compiled in ('default', None):
        for names in (DEIT_S, LEVIT):
            timing(names, 256, train=True, compile=compiled)
            timing(names, 256, train=True, compile=compiled, model_kwargs={'selection': 'layer'})
    checking(all_dtypes, compiled=True)
    pairs = [*main_pairs, *DEIT, DEIT_B_384, *LEVITS]
    for dtype, compiled, batch_size, names in product(
            ('bfloat16', 'float32'), (None, 'default', 'reduce-overhead'), (256, 1, 32), pairs):
        if compiled != 'reduce-overhead' or batch_size == 1:
            timing(names, batch_size, dtype=dtype, compile=compiled)
    return steps[args.skip:][:args.steps]


def main(argv: Optional[List[str]] = None) -> Dict[str, Any]:
    args = parse_args(argv)
    started = time.monotonic()
    results = harness.Report('gpu', args.output, args.device, sys.argv[1:] if argv is None else argv)
    results.data.update(checks=[], profiles=[], errors=[])
    for i, (kind, function, values, settings) in enumerate(plan(args), args.skip):
        what = ' '.join(map(str, (function.__name__, *values, *settings.items())))
        for name in args.also:
            what = what.replace(name, harness.without_folders(name))
        left = 60 * args.minutes - (time.monotonic() - started)
        if left <= 0:
            results.data['errors'].append({'step': i, 'what': what, 'error': 'not started, no time left'})
            continue
        try:
            with time_limit(min(args.step_seconds, left)):
                found = function(*values, args, **settings)
        except Exception as error:  # the steps after this one matter too
            results.data['errors'].append({'step': i, 'what': what, 'error': f'{type(error).__name__}: {error}'[:500]})
            print(f'step {i}, {what}: {type(error).__name__}: {str(error)[:200]}')
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
