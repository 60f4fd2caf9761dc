#!/usr/bin/env python3
"""Models as they are deployed: files for ONNX Runtime and OpenVINO in 32 and 8 bits, and the accuracy of those.

    python benchmarks/deploy.py files --pictures flowers/validation --output output/deploy
    python benchmarks/speed.py --suite benchmarks/suites/deploy.txt --output benchmarks/results/deploy-speed.json
    python benchmarks/deploy.py accuracy CHECKPOINT --pictures cifar10 --output benchmarks/results/deploy-accuracy.json

`files` writes what the suite times: NAME.onnx, NAME.xml, and in 8 bits NAME.dynamic.onnx, NAME.int8.onnx and
NAME.int8.xml, the last two with ranges of activations from --pictures. `accuracy` takes a checkpoint of accuracy.py,
dense or grouped by similarity. Pairs are patches that share a slow token at the end.
"""
import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import accuracy
import harness
import timm
import torch
from speed import export_onnx
from timm.utils import reparameterize_model
from torch import nn
from without_training import compare
from without_training import load as load_checkpoint

from timm_evovit import evolve

DENSE = 'deit_small_patch16_224', 'vit_base_patch16_224', 'vit_small_patch16_dinov3', 'levit_256'
MODELS: Dict[str, Dict[str, Any]] = {  # by the names of their files
    **{name: dict(model_name=name) for name in (*DENSE, 'evo_deit_small_patch16_224', 'evo_levit_256')},
    **{f'{name}-{ratio}': dict(model_name='evo_vit', base=name, keep_ratio=ratio)
       for name, ratio in ((DENSE[0], 0.6), (DENSE[0], 0.5), (DENSE[1], 0.6), (DENSE[2], 0.6))}}
CALIBRATION = 64  # pictures


class WithGroups(nn.Module):
    """Logits, and the slow token that each patch of an evolving model shares at the end, (B, n)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        return self.model(x), *(stage.groups.flatten(1) for stage in self.model.forward_slow_tokens(x)[-1:])


def write_files(path: Path, model: nn.Module, pictures: torch.Tensor) -> List[Path]:
    """All files of a model, path.onnx and the like."""
    dynamic, runtimes = {0: torch.export.Dim.DYNAMIC}, (export_onnx.OnnxRuntime(), export_onnx.OpenVino())
    path.parent.mkdir(parents=True, exist_ok=True)
    for runtime, suffix in zip(runtimes, ('.onnx', '.xml')):
        runtime.export(model, pictures[:2], dynamic, Path(f'{path}{suffix}'), {})
        runtime.quantize(Path(f'{path}{suffix}'), Path(f'{path}.int8{suffix}'), pictures, {})
    runtimes[0].quantize(Path(f'{path}.onnx'), Path(f'{path}.dynamic.onnx'), None, {})
    return [Path(f'{path}{suffix}') for suffix in ('.onnx', '.dynamic.onnx', '.int8.onnx', '.xml', '.int8.xml')]


def ways_to_run(model: nn.Module, pictures: torch.Tensor, folder: Path) -> Dict[str, Callable[[torch.Tensor], Any]]:
    """Functions from pictures to outputs, by what they are called."""
    half = copy.deepcopy(model).bfloat16()
    files = write_files(folder / 'model', model, pictures)
    loaded = [export_onnx.RUNTIMES[file.suffix]().load(file) for file in files]
    return {
        'PyTorch, float32': model, 'PyTorch, bfloat16': lambda x: half(x.bfloat16()),
        'ONNX Runtime, 8 bits, dynamic': loaded[1], 'ONNX Runtime, 8 bits, static': loaded[2],
        'OpenVINO, 8 bits, static': loaded[4]}


def same_pairs(groups: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the pairs of patches that share a slow token, the percentage that still does."""
    pairs, old = (torch.tril(g.unsqueeze(2) == g.unsqueeze(1), -1) for g in (groups, expected))
    return 100 * (pairs & old).sum().item() / old.sum().item()


@torch.inference_mode()
def measure(checkpoint: Path, args: argparse.Namespace) -> Iterator[Dict[str, Any]]:
    model, _, settings = load_checkpoint(checkpoint, args)
    images, labels = accuracy.load_pictures('validation', settings)
    calibration = accuracy.normalize(accuracy.load_pictures('train', settings)[0][::50_000 // CALIBRATION])
    expected = None
    with_groups = WithGroups(model if hasattr(model, 'set_keep_ratio') else evolve(model)).eval()
    for keep_ratio in (1, 0.7, 0.4):
        with_groups.model.set_keep_ratio(keep_ratio)
        groups = None
        with tempfile.TemporaryDirectory() as folder:
            for name, run in ways_to_run(with_groups, calibration, Path(folder)).items():
                outputs = [tuple(run(accuracy.normalize(batch))) for batch in images.split(250)]
                logits, *found = (torch.cat(parts) for parts in zip(*outputs))
                logits = logits.float().log_softmax(1)
                expected = logits if expected is None else expected
                row = dict(model=f'keep ratio {keep_ratio}', method=name, **compare(logits, expected, labels))
                if found:
                    groups = found[0] if groups is None else groups
                    row['same_pairs'] = same_pairs(found[0], groups)
                yield row


def main(argv: Optional[List[str]] = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument('command', choices=('files', 'accuracy'))
    parser.add_argument('checkpoint', nargs='?', type=Path, help='of a model that accuracy.py has trained')
    parser.add_argument('--pictures', type=Path, required=True, help='folder, for accuracy as accuracy.py takes it')
    args = parser.parse_args(argv)
    args.data_dir = args.pictures
    if args.command == 'files':
        for name, kwargs in MODELS.items():
            model = reparameterize_model(timm.create_model(**kwargs).eval())
            write_files(args.output / name, model, export_onnx.read_pictures(args.pictures, model, CALIBRATION))
    else:
        report = harness.Report('deploy', args.output, argv=argv)
        for row in measure(args.checkpoint, args):
            report.add(row)


if __name__ == '__main__':
    main()
