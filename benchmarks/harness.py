"""What the benchmarks share: building models, timing in turns, memory, what a run was made with, result files.

Models are timed in rounds. Every round times each model once, in turn, so that a machine whose speed drifts slows all
of them alike. The speed-up is the median over the rounds of the ratio within a round, its spread the lowest and the
highest ratio.
"""
import datetime
import importlib.util
import json
import os
import platform
import re
import resource
import shlex
import statistics
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import timm_evovit

ENVIRONMENT = ('MALLOC_', 'OMP_', 'KMP_', 'MKL_', 'LD_PRELOAD', 'PYTORCH_')  # variables that may change the speed


class OnnxModel(nn.Module):
    """An ONNX file in ONNX Runtime on the CPU, called as a model is."""

    def __init__(self, path: Path) -> None:
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


def check_model(spec: str) -> None:
    """
    Raises:
        ValueError: `create_model` cannot build a model from `spec`.
    """
    kind, _, rest = spec.partition(':')
    if kind.endswith(('.py', '.onnx')):
        if not Path(kind).is_file():
            raise ValueError(f'{spec}: there is no file {kind}')
        if kind.endswith('.py') and not rest:
            raise ValueError(f'{spec}: name the function as well, {kind}:FUNCTION')
    elif kind == 'tome':
        name, _, r = rest.partition(':')
        if not timm.is_model(name) or not r.isdecimal():
            raise ValueError(f'{spec}: must be tome:NAME:R with a model of timm and a number of tokens to merge')
        if importlib.util.find_spec('tome') is None:
            raise ValueError(f'{spec}: the package tome is not installed')
    elif kind not in ('hf-hub', 'local-dir') and not timm.is_model(spec):
        raise ValueError(f'{spec}: unknown to timm, and neither tome:NAME:R nor FILE.py:FUNCTION nor FILE.onnx')


def create_model(spec: str, **kwargs: Any) -> nn.Module:
    """Build a model.

    Args:
        spec: Name that timm knows; `tome:NAME:R`, a Vision Transformer of timm that merges R tokens in every block, by
            the package tome; `FILE.py:FUNCTION`, the model that the function returns; or `FILE.onnx`.
        **kwargs: Arguments of the model, ignored for `FILE.onnx`.
    """
    kind, _, rest = spec.partition(':')
    if kind.endswith('.onnx'):
        return OnnxModel(Path(spec))
    if kind.endswith('.py'):
        found = importlib.util.spec_from_file_location(Path(kind).stem, kind)
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        return getattr(module, rest)(**kwargs)
    if kind != 'tome':
        return timm.create_model(spec, **kwargs)
    import tome
    name, _, r = rest.partition(':')
    model = timm.create_model(name, **kwargs)
    tome.patch.timm(model)
    model.r = int(r)
    return model


def input_size(model: nn.Module, img_size: Optional[int] = None) -> Tuple[int, int, int]:
    """Channels, height and width of the images that a model takes."""
    channels, height, width = getattr(model, 'pretrained_cfg', {}).get('input_size', (3, 224, 224))
    return channels, img_size or height, img_size or width


def multiply_adds(model: nn.Module, size: Sequence[int]) -> Optional[int]:
    """Multiply-adds of one image in inference, attention counted as matrix products. None for ONNX Runtime."""
    if isinstance(model, OnnxModel):
        return None
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.eval()(torch.zeros(1, *size))
    return counter.get_total_flops() // 2


def now(device: str = 'cpu') -> float:
    """Seconds, once the device has done all that it was given."""
    if device.startswith('cuda'):
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_per_call(step: Callable[[], Any], seconds: float, device: str = 'cpu') -> float:
    """Mean over as many calls as fill `seconds`, one at least; on a GPU between events, ten calls at a time."""
    calls, elapsed = 0, 0.
    if device.startswith('cuda'):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        while not calls or elapsed < seconds:
            start.record()
            for _ in range(10):
                step()
            end.record()
            end.synchronize()
            calls, elapsed = calls + 10, elapsed + start.elapsed_time(end) / 1000
        return elapsed / calls
    begin = now(device)
    while not calls or elapsed < seconds:
        step()
        calls, elapsed = calls + 1, now(device) - begin
    return elapsed / calls


def time_in_turns(
        steps: Dict[str, Callable[[], Any]],
        rounds: int,
        warmup: int = 2,
        seconds: float = 1.,
        device: str = 'cpu',
) -> Dict[str, List[float]]:
    """Time functions in rounds, each of them once in every round and in reverse order in every second one.

    Args:
        steps: Functions by name.
        rounds: Number of rounds that count.
        warmup: Number of rounds before those.
        seconds: How long a function is called again in a round, at least.
        device: Where the functions do their work.

    Returns:
        Seconds per call in each round, by name.
    """
    times: Dict[str, List[float]] = {name: [] for name in steps}
    for i in range(-warmup, rounds):
        for name in list(steps) if i % 2 == 0 else reversed(list(steps)):
            elapsed = seconds_per_call(steps[name], seconds, device)
            if i >= 0:
                times[name].append(elapsed)
    return times


def summarize(times: Sequence[float], baseline: Sequence[float], batch_size: int) -> Dict[str, Any]:
    """Images per second, speed-up over a baseline timed in the same rounds, and its spread."""
    ratios = [a / b for a, b in zip(baseline, times)]
    return {
        'images_per_second': batch_size / statistics.median(times), 'speed_up': statistics.median(ratios),
        'speed_up_min': min(ratios), 'speed_up_max': max(ratios), 'seconds': [float(f'{t:.5g}') for t in times],
    }


def memory(peak: bool) -> int:
    """Bytes of this process in memory, now or at most so far."""
    status = Path('/proc/self/status')
    if status.exists():  # on Linux, ru_maxrss starts with what the parent process had
        lines = dict(line.split(':', 1) for line in status.read_text().splitlines())
        return int(lines['VmHWM' if peak else 'VmRSS'].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == 'Darwin' else 1024)


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a process of its own, so that it shares neither memory nor compiler caches with others."""
    with ProcessPoolExecutor(1, get_context('spawn')) as pool:
        return pool.submit(function, *args).result()


def machine(device: str = 'cpu') -> Dict[str, Any]:
    """The hardware, by model and size."""
    cpu = platform.processor() or platform.machine()
    info = Path('/proc/cpuinfo')
    if info.exists():
        names = [line.partition(':')[2] for line in info.read_text().splitlines() if line.startswith('model name')]
        cpu = names[0].strip() if names else cpu
    try:
        memory_gb = round(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9)
    except (ValueError, OSError):
        memory_gb = None
    found = {'cpu': cpu, 'cores': os.cpu_count(), 'threads': torch.get_num_threads(), 'memory_gb': memory_gb,
             'instructions': torch.backends.cpu.get_cpu_capability(), 'system': platform.system(), 'gpu': None}
    if device.startswith('cuda'):
        properties = torch.cuda.get_device_properties(device)
        found.update(gpu=properties.name, gpu_memory_gb=round(properties.total_memory / 1e9))
    return found


def versions() -> Dict[str, Optional[str]]:
    found = {'python': platform.python_version(), 'torch': str(torch.__version__), 'timm': timm.__version__,
             'timm_evovit': timm_evovit.__version__}
    if torch.version.cuda:
        found['cuda'] = torch.version.cuda
    for package in ('onnxruntime', 'tome'):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def commit() -> Optional[str]:
    """Commit of this repository, followed by '-dirty' if files that git tracks have changed. None without git."""
    try:
        done = subprocess.run(
            ['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*'], cwd=Path(__file__).parent,
            capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def without_folders(text: str) -> str:
    """An argument without the folders of absolute paths, which say more about a machine than a result file should."""
    return re.sub(r'(^|[=:])[/~][^=:]*/', r'\1', text)


def made_with(device: str = 'cpu') -> Dict[str, Any]:
    """Date, machine, versions, commit and environment."""
    return {
        'date': datetime.date.today().isoformat(), 'machine': machine(device), 'versions': versions(),
        'commit': commit(),
        'environment': {k: without_folders(v) for k, v in os.environ.items() if k.startswith(ENVIRONMENT)}}


def command(benchmark: str, argv: Sequence[str]) -> str:
    return shlex.join(['python', f'benchmarks/{benchmark}.py', *map(without_folders, argv)])


def write(path: Path, data: Dict[str, Any]) -> None:
    """Write JSON, all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f'.{os.getpid()}')
    partial.write_text(json.dumps(data, indent=1) + '\n')
    partial.replace(path)


class Report:
    """Rows of one run and what they were measured with, as a JSON file that is written anew after every row."""

    def __init__(self, benchmark: str, path: Optional[Path], device: str = 'cpu', argv: Sequence[str] = ()) -> None:
        """
        Args:
            benchmark: Name of the program.
            path: File to write, none if None.
            device: Device that is measured.
            argv: Arguments of the program.
        """
        self.path = path
        self.data: Dict[str, Any] = {
            'benchmark': benchmark, **made_with(device), 'command': command(benchmark, argv), 'rows': [],
        }
        self.write()

    def add(self, *rows: Dict[str, Any]) -> None:
        self.data['rows'] += rows
        self.write()

    def write(self) -> None:
        if self.path is not None:
            write(self.path, self.data)
