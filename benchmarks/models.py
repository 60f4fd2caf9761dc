#!/usr/bin/env python3
"""Parameters and multiply-adds of every Evo-ViT in the paper, and multiply-adds of its dense model at the same size.

    python benchmarks/models.py --output benchmarks/results/models.json
"""
import argparse
from pathlib import Path
from typing import List, Optional

import harness
import timm

from timm_evovit.hub import PUBLISHED

MODELS = list(PUBLISHED)
MODELS.insert(MODELS.index('evo_deit_base_patch16_224') + 1, 'evo_deit_small_patch16_384')


def dense_name(name: str) -> str:
    """timm's dense model, of another input size where timm has none of the same."""
    dense = name.removeprefix('evo_')
    if timm.is_model(dense):
        return dense
    return dense.replace('_384', '_224') if 'deit' in dense else dense.removesuffix('_384')


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='*', default=MODELS)
    parser.add_argument('--output', type=Path, metavar='JSON', help='result file')
    args = parser.parse_args(argv)
    report = harness.Report('models', args.output)
    for name in args.models:
        model = timm.create_model(name)
        size = harness.input_size(model)
        kwargs = {'img_size': size[1]} if timm.create_model(
            dense_name(name), device='meta').pretrained_cfg['input_size'][1] != size[1] else {}
        dense = timm.create_model(dense_name(name), **kwargs)
        row = dict(
            model=name, baseline=dense_name(name), img_size=size[1],
            parameters=sum(p.numel() for p in model.parameters()), multiply_adds=harness.multiply_adds(model, size),
            dense_multiply_adds=harness.multiply_adds(dense, size))
        report.add(row)
        print('{model}: {parameters:,} parameters, {multiply_adds:,} multiply-adds, {baseline} {dense_multiply_adds:,}'
              .format(**row))


if __name__ == '__main__':
    main()
