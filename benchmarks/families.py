#!/usr/bin/env python3
"""Which of timm's architectures evolve, by family: every VisionTransformer, VisionTransformerDistilled, Eva, NaFlexVit,
and Beit and VisionTransformerRelPos, which do not.

    python benchmarks/families.py --output benchmarks/results/families.json

Models are built without weights on the meta device, and their first four blocks are run. A model evolves if the fourth
one runs on groups of patches. It is refused for the reason that `evolve` gives.
"""
import re
from typing import Any, Dict, List, Optional

import harness
import timm
import torch

from timm_evovit import evolve

MODULES = [
    'vision_transformer', 'vision_transformer_hybrid', 'vitamin', 'deit', 'eva', 'naflexvit', 'beit',
    'vision_transformer_relpos']
FAMILIES = {  # the first whose pattern is found in the name of an architecture
    'NaFlexViT': 'naflexvit', 'ViT with relative positions': 'relpos', 'BEiT, BEiT v2': '^beit(v2)?_',
    'DINOv3': 'dinov3', 'DINOv2': 'dinov2', 'DeiT III': 'deit3', 'DeiT': 'deit', 'EVA-02': 'eva02', 'EVA': 'eva',
    'Perception Encoder': '_pe_', 'Sapiens2': 'sapiens2', 'RoPE-ViT': 'rope', 'SigLIP': 'siglip', 'AIMv2': 'aimv2',
    'BEiT-3': 'beit3', 'CLIP': 'clip', 'FlexiViT': 'flexivit', 'ViT with a convolutional stem': r'_r\d*_|_r\d+|resnet',
    'ViT': '',
}


@torch.inference_mode()
def why_refused(model: torch.nn.Module) -> Optional[str]:
    """Why a model on the meta device does not evolve, None if it does."""
    model.blocks = model.blocks[:4]
    try:
        evolved = evolve(model.eval())
    except (TypeError, ValueError) as e:
        return str(e)
    lengths: List[int] = []
    for block in (evolved.blocks[0], evolved.blocks[-1]):
        block.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    evolved(torch.empty(1, *harness.input_size(model), device='meta'))
    first, last = lengths
    if last >= first:
        raise RuntimeError(f'{type(model).__name__}: the last block runs on {last} tokens, the first on {first}.')
    return None


def main(argv: Optional[List[str]] = None) -> None:
    args = harness.parser(__doc__).parse_args(argv)
    families: Dict[str, Dict[str, Any]] = {}
    for name in timm.list_models(module=MODULES):
        family = next(f for f, pattern in FAMILIES.items() if re.search(pattern, name))
        row = families.setdefault(family, dict(model=family, architectures=0, evolve=0, such_as=name, refused={}))
        reason = why_refused(timm.create_model(name, device='meta'))
        row['architectures'] += 1
        row['evolve'] += reason is None
        row['refused'].update({name: reason} if reason else {})
    harness.Report('families', args.output, argv=argv).add(*(row for _, row in sorted(families.items())))


if __name__ == '__main__':
    main()
