#!/usr/bin/env python3
"""Which of timm's architectures evolve, by family: every VisionTransformer, VisionTransformerDistilled and Eva.

    python benchmarks/families.py --output benchmarks/results/families.json

Models are built without weights on the meta device. A model is counted as refused for the reason that `evolve` gives.
"""
import argparse
import re
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

import harness
import timm
import torch
from timm.models import model_entrypoint
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from timm_evovit import evolve

CLASSES = (VisionTransformer, VisionTransformerDistilled, Eva)
FAMILIES = {  # the first whose pattern is found in the name of an architecture
    'DINOv3': 'dinov3', 'DINOv2': 'dinov2', 'DeiT III': 'deit3', 'DeiT': 'deit', 'EVA-02': 'eva02', 'EVA': 'eva',
    'Perception Encoder': '_pe_', 'Sapiens2': 'sapiens2', 'RoPE-ViT': 'rope', 'SigLIP': 'siglip', 'AIMv2': 'aimv2',
    'BEiT-3': 'beit3', 'CLIP': 'clip', 'FlexiViT': 'flexivit', 'ViT with a convolutional stem': r'_r\d*_|_r\d+|resnet',
    'ViT': '',
}


class Architecture(NamedTuple):
    name: str
    family: str
    refused: Optional[str]  # why it does not evolve
    by_attention: bool  # evolves with slow_tokens='attention' too


def evolves(model: torch.nn.Module, **kwargs: str) -> Optional[str]:
    """None, or why not."""
    try:
        evolve(model, **kwargs)
    except (TypeError, ValueError) as e:
        return str(e)
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
            found.append(Architecture(
                name, family, evolves(model), evolves(model, slow_tokens='attention') is None))
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
            by_attention=sum(m.by_attention for m in members), such_as=members[0].name,
            refused={m.name: m.refused for m in members if m.refused})
        report.add(row)
        print('{model}: {evolve} of {architectures} evolve, {by_attention} also by class attention'.format(**row))


if __name__ == '__main__':
    main()
