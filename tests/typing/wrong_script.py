"""Mistakes that mypy must find, each in a line of its own with the kind of error: see test_types.py."""
import timm
import torch

from timm_evovit import EvoLevit, evolve, find_slow_tokens

fast = evolve(timm.create_model('vit_small_patch16_224'))
fast.set_keep_ratio('0.7')  # arg-type
fast.set_keep_ratios(0.7)  # operator
evolve(fast, keep='0.7')  # call-arg
EvoLevit(keep_ratio='0.7')  # arg-type
print(find_slow_tokens(fast, torch.zeros(1, 3, 224, 224))[0].scores)  # attr-defined
