"""The public names as the documentation uses them, and at the end mistakes that mypy must find, each with the kind of
error. mypy checks this file, nothing runs it: see test_packaging.py.
"""
from typing import Any, Dict, List

import timm
import torch
from torch import nn

from timm_evovit import AssistedLoss, EvoLevit, EvoVisionTransformer, evolve, find_slow_tokens

images = torch.randn(2, 3, 224, 224)
target = torch.tensor([0, 1])

# evolve a model of timm
model = timm.create_model('vit_small_patch16_224')
fast = evolve(model)
fast.set_keep_ratio(0.7)
fast.set_keep_ratio([0.7, 0.5])
evolve(timm.create_model('vit_small_patch16_224')).set_keep_ratio(0.7)
evolve(model, keep_ratio=(0.7, 0.5), stages=(4, 8))
logits: torch.Tensor = fast(images)
weights: Dict[str, Any] = fast.state_dict()
compiled = torch.compile(fast, fullgraph=True)
modules: List[nn.Module] = [fast, fast.eval(), fast.to('cpu')]

# behind features_only
features = evolve(timm.create_model('vit_small_patch16_224', features_only=True))
maps: List[torch.Tensor] = features(images)

# which patches were informative
for tokens in find_slow_tokens(fast, images):
    block: int = tokens.block
    share: float = tokens.mask.float().mean().item()
    groups: torch.Tensor = tokens.groups.amax()
    if tokens.attention is not None:
        highest: torch.Tensor = tokens.attention.amax()

# Evo-DeiT and Evo-LeViT, built by name or by their classes
created = timm.create_model('evo_deit_small', num_classes=10)
assert isinstance(created, EvoVisionTransformer)
deit = EvoVisionTransformer(
    img_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6, num_classes=10, keep_ratio=(0.5, 0.7),
    stages=(4, 8), tradeoff=0.5, selection='stage', representative_token=True, assisted_cls=True,
    layer_to_stage_epochs=200)
levit = EvoLevit(num_classes=10, keep_ratio=0.5, assisted_cls=True, layer_to_stage_epochs=200)

criterion = AssistedLoss(nn.CrossEntropyLoss())
deit.set_assisted_training(True)
deit.set_epoch(0)
deit.set_keep_ratio(0.7)
criterion(deit(images), target).backward()
arguments: Dict[str, Any] = deit.model_args
deit.push_to_hf_hub('organisation/name', private=True)
levit.set_distilled_training(False)

# mistakes
fast.set_keep_ratio('0.7')  # arg-type
fast.set_keep_ratios(0.7)  # operator
evolve(fast, keep='0.7')  # call-arg
EvoLevit(keep_ratio='0.7')  # arg-type
print(find_slow_tokens(fast, images)[0].scores)  # attr-defined
