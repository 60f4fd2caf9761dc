#!/usr/bin/env python3
"""Speed of a model in a service: processes side by side, threads of Python that share one model, busy neighbours.

    python benchmarks/service.py evo_vit --model-kwargs base=vit_small_patch16_224 --against vit_small_patch16_224

Options are those of speed.py. Both models take turns in every round, each for --seconds at least; images per second
are those of all processes together.
"""
import argparse
import itertools
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe, get_context
from typing import Any, Dict, List, Optional

import harness
import speed
import torch

# processes, threads of OpenMP in each, threads of Python that call its model, other processes that are busy
SETTINGS = ((1, 1, 1, 0), (2, 1, 1, 0), (8, 1, 1, 0), (1, 1, 8, 0), (1, 2, 1, 0), (1, 2, 1, 1), (1, 2, 1, 4))


def serve(connection: Any, args: argparse.Namespace, threads: int, callers: int) -> None:
    """Receive the names of models, and send how many images per second each has taken."""
    torch.set_num_threads(threads)
    models = {name: speed.create(name, args).eval() for name in args.models}
    x = torch.randn(args.batch_size, *harness.input_size(models[args.models[0]], args.img_size))

    @torch.inference_mode()
    def call(name: str) -> float:
        start, elapsed = time.perf_counter(), 0.
        for count in itertools.count(1):
            models[name](x)
            elapsed = time.perf_counter() - start
            if elapsed >= args.seconds:
                return count * args.batch_size / elapsed

    with ThreadPoolExecutor(callers) as pool:
        while True:
            connection.send(sum(pool.map(call, [connection.recv()] * callers)))


def measure(args: argparse.Namespace, processes: int, threads: int, callers: int, busy: int) -> Dict[str, Any]:
    """A row, of rounds of which the first does not count."""
    pipes = [Pipe() for _ in range(processes)]
    services = [get_context('spawn').Process(target=serve, args=(end, args, threads, callers)) for _, end in pipes]
    for service in services:
        service.start()
    services += [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(busy)]
    times: Dict[str, List[float]] = {name: [] for name in args.models}  # seconds per image
    for _ in range(1 + args.rounds):
        for name, found in times.items():
            for connection, _ in pipes:
                connection.send(name)
            found.append(1 / sum(connection.recv() for connection, _ in pipes))
    for service in services:
        service.kill()
    dense, evolved = (harness.summarize(times[name][1:], times[args.models[0]][1:], 1) for name in args.models)
    return {
        'model': args.models[1], 'model_kwargs': args.model_kwargs, 'baseline': args.models[0],
        'batch_size': args.batch_size, 'processes': processes, 'threads': threads, 'callers': callers, 'busy': busy,
        'dense_images_per_second': dense['images_per_second'], **evolved}


def main(argv: Optional[List[str]] = None) -> Dict[str, Any]:
    args = speed.parse_args(argv)
    report = harness.Report('service', args.output, argv=argv)
    for setting in SETTINGS:
        report.add(measure(args, *setting))
    return report.data


if __name__ == '__main__':
    main()
