#!/usr/bin/env python3
"""Which of timm's architectures evolve, by family: every VisionTransformer, VisionTransformerDistilled, Eva, NaFlexVit,
and Beit and VisionTransformerRelPos, which do not.

    python benchmarks/families.py --output benchmarks/results/families.json

Models are built without weights on the meta device. A model evolves if it runs forward with groups of patches in its
last block. It is refused for the reason that `evolve` gives.
"""
import argparse
import re
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import harness
import timm
import torch
from timm.models import model_entrypoint
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos

from timm_evovit import evolve

CLASSES = (VisionTransformer, VisionTransformerDistilled, Eva, NaFlexVit, Beit, VisionTransformerRelPos)
FAMILIES = {  # the first whose pattern is found in the name of an architecture
    'NaFlexViT': 'naflexvit', 'ViT with relative positions': 'relpos', 'BEiT, BEiT v2': '^beit(v2)?_',
    'DINOv3': 'dinov3', 'DINOv2': 'dinov2', 'DeiT III': 'deit3', 'DeiT': 'deit', 'EVA-02': 'eva02', 'EVA': 'eva',
    'Perception Encoder': '_pe_', 'Sapiens2': 'sapiens2', 'RoPE-ViT': 'rope', 'SigLIP': 'siglip', 'AIMv2': 'aimv2',
    'BEiT-3': 'beit3', 'CLIP': 'clip', 'FlexiViT': 'flexivit', 'ViT with a convolutional stem': r'_r\d*_|_r\d+|resnet',
    'ViT': '',
}


class Architecture(NamedTuple):
    name: str
    family: str
    refused: Optional[str]  # why it does not evolve


@torch.inference_mode()
def why_refused(model: torch.nn.Module) -> Optional[str]:
    """Why a model on the meta device does not evolve, None if it does.

    Raises:
        RuntimeError: It evolves, but its last block runs on all patches.
    """
    try:
        evolved = evolve(model.eval())
    except (TypeError, ValueError) as e:
        return str(e)
    lengths: List[int] = []

    def note_length(module: torch.nn.Module, args: Any) -> None:
        lengths.append(args[0].shape[1])

    for block in (evolved.blocks[0], evolved.blocks[-1]):
        block.register_forward_pre_hook(note_length)
    evolved(torch.empty(1, *harness.input_size(model), device='meta'))
    first, last = lengths
    if last >= first:
        raise RuntimeError(f'{type(model).__name__}: the last block runs on {last} tokens, the first on {first}.')
    return None


def walk() -> List[Architecture]:
    """Every architecture of these classes that timm registers."""
    found = []
    for name in timm.list_models():
        module = sys.modules[model_entrypoint(name).__module__]
        if module.__name__.startswith('timm_evovit') or not any(hasattr(module, c.__name__) for c in CLASSES):
            continue
        model = timm.create_model(name, device='meta')
        if type(model) in CLASSES:
            family = next(f for f, pattern in FAMILIES.items() if re.search(pattern, name))
            found.append(Architecture(name, family, why_refused(model)))
    return found


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, metavar='JSON', help='result file')
    args = parser.parse_args(argv)
    report = harness.Report('families', args.output)
    families: Dict[str, List[Architecture]] = {}
    for architecture in walk():
        families.setdefault(architecture.family, []).append(architecture)
    for family, members in sorted(families.items()):
        row = dict(
            model=family, architectures=len(members), evolve=sum(m.refused is None for m in members),
            such_as=members[0].name, refused={m.name: m.refused for m in members if m.refused})
        report.add(row)
        print('{model}: {evolve} of {architectures} evolve'.format(**row))


if __name__ == '__main__':
    main()
