"""What the benchmarks share: memory, what a run was made with, result files."""
import argparse
import datetime
import json
import os
import platform
import re
import resource
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Sequence, Tuple

import torch
from torch import nn

from timm_evovit.tools import sweep

ENVIRONMENT = ('MALLOC_', 'OMP_', 'KMP_', 'MKL_', 'LD_PRELOAD', 'PYTORCH_')  # variables that may change the speed
PACKAGES = ('timm', 'timm_evovit', 'onnxruntime', 'openvino', 'nncf')
Arguments = Optional[Sequence[str]]  # of a program, by default those of the process
time_in_turns = sweep.time_in_turns


def parser(description: str) -> argparse.ArgumentParser:
    """A parser of a program, with the option that is common to all."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument('--output', type=Path, metavar='JSON', help='result file')
    return found


def input_size(model: nn.Module, img_size: Optional[int] = None) -> Tuple[int, int, int]:
    """Channels, height and width of the images that a model takes."""
    channels, height, width = getattr(model, 'pretrained_cfg', {}).get('input_size', (3, 224, 224))
    return channels, img_size or height, img_size or width


def multiply_adds(model: nn.Module, size: Sequence[int]) -> int:
    """Multiply-adds of one image in inference, attention counted as matrix products."""
    return sweep.multiply_adds(model.eval(), torch.zeros(1, *size))


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
        return 1024 * int(re.search(r'VmHWM:\s*(\d+)' if peak else r'VmRSS:\s*(\d+)', status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == 'Darwin' else 1024)


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a process of its own, so that it shares neither memory nor compiler caches with others."""
    with ProcessPoolExecutor(1, get_context('spawn')) as pool:
        return pool.submit(function, *args).result()


def without_folders(text: str) -> str:
    """An argument without the folders of absolute paths, which say more about a machine than a result file should."""
    return re.sub(r'(^|[=:])[/~][^=:]*/', r'\1', text)


def made_with(program: str, argv: Arguments = None, device: str = 'cpu') -> Dict[str, Any]:
    """Date, machine, versions, commit, environment and command."""
    info = Path('/proc/cpuinfo')
    cpu = re.search(r'model name\s*: (.*)', info.read_text() if info.exists() else '')
    machine = {
        'cpu': cpu[1] if cpu else platform.machine(), 'cores': os.cpu_count(), 'threads': torch.get_num_threads(),
        'instructions': torch.backends.cpu.get_cpu_capability(), 'system': platform.system(),
        'gpu': torch.cuda.get_device_name(device) if device.startswith('cuda') else None}
    versions = {'python': platform.python_version(), 'torch': str(torch.__version__), 'cuda': torch.version.cuda}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    commit = None
    with suppress(OSError, subprocess.CalledProcessError):  # no git; -dirty if files that git tracks have changed
        commit = subprocess.run(
            ['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*'], cwd=Path(__file__).parent,
            capture_output=True, text=True, check=True).stdout.strip()
    arguments = map(without_folders, sys.argv[1:] if argv is None else argv)
    return {
        'date': datetime.date.today().isoformat(), 'machine': machine, 'versions': versions, 'commit': commit,
        'environment': {k: without_folders(v) for k, v in os.environ.items() if k.startswith(ENVIRONMENT)},
        'command': shlex.join(['python', f'benchmarks/{program}.py', *arguments])}


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place to write a file to, which is then put in its own: all of it, or none after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f'.{os.getpid()}')
    yield partial
    partial.replace(path)


def write(path: Path, data: Dict[str, Any]) -> None:
    with whole(path) as partial:
        partial.write_text(json.dumps(data, indent=1) + '\n')


class Report:
    """Rows of one run and what they were measured with, printed, and as a JSON file that is written anew for each."""

    def __init__(self, benchmark: str, path: Optional[Path], device: str = 'cpu', argv: Arguments = None) -> None:
        self.path = path
        self.data: Dict[str, Any] = {'benchmark': benchmark, **made_with(benchmark, argv, device), 'rows': []}
        self.add()

    def add(self, *rows: Dict[str, Any]) -> None:
        self.data['rows'] += rows
        if self.path is not None:
            write(self.path, self.data)
        for row in rows:
            print(*(f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}' for k, v in row.items() if k != 'seconds'),
                  sep=', ', flush=True)
