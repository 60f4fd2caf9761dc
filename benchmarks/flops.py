#!/usr/bin/env python3
"""Multiply-adds of DeiT and Evo-DeiT as several tools count them, with fused attention and without.

    python benchmarks/flops.py --output benchmarks/results/flops.json

Needs fvcore, ptflops and torchinfo.
"""
import argparse
from importlib.metadata import version
from pathlib import Path
from typing import Callable, Dict, List, Optional

import harness
import torch
from fvcore.nn import FlopCountAnalysis
from ptflops import get_model_complexity_info
from timm.layers import set_fused_attn
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchinfo import summary


def flop_counter_mode(model: nn.Module, size: List[int]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *size))
    return counter.get_total_flops() // 2


def fvcore(model: nn.Module, size: List[int]) -> int:
    analysis = FlopCountAnalysis(model, torch.zeros(1, *size))
    return round(analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total())


def ptflops(model: nn.Module, size: List[int]) -> int:
    return round(get_model_complexity_info(
        model, tuple(size), as_strings=False, print_per_layer_stat=False, verbose=False)[0])


def torchinfo(model: nn.Module, size: List[int]) -> int:
    return int(summary(model, (1, *size), verbose=0).total_mult_adds)


COUNTERS: Dict[str, Callable[[nn.Module, List[int]], int]] = {
    'FlopCounterMode': flop_counter_mode, 'fvcore': fvcore, 'ptflops': ptflops, 'torchinfo': torchinfo}


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', nargs='?', default='evo_deit_small_patch16_224')
    parser.add_argument('--against', default='deit_small_patch16_224', metavar='MODEL')
    parser.add_argument('--output', type=Path, metavar='JSON', help='result file')
    args = parser.parse_args(argv)
    report = harness.Report('flops', args.output, argv=[args.model, '--against', args.against])
    report.data['versions'].update({name: version(name) for name in ('fvcore', 'ptflops', 'torchinfo')})
    for name, counter in COUNTERS.items():
        for fused in (True, False):
            set_fused_attn(fused)
            found = {}
            for model in (args.against, args.model):
                built = harness.create_model(model).eval()
                found[model] = counter(built, list(harness.input_size(built)))
                report.add(dict(
                    model=model, baseline=args.against, counter=name, fused_attn=fused, multiply_adds=found[model]))
            print(f'{name:16} fused attention {"on" if fused else "off":3} ' + ', '.join(
                f'{model} {count / 1e9:.3f} G' for model, count in found.items()))


if __name__ == '__main__':
    main()
