"""Evo-ViT for timm: slow-fast token evolution, https://arxiv.org/abs/2108.01390.

Importing this package registers its models with timm.
"""
import timm.models  # noqa: F401 first: where plugins load by themselves, it imports the models below

from .evo_deit import EvoVisionTransformer
from .evo_levit import EvoLevit
from .evo_vit import evolve
from .slow_tokens import find_slow_tokens
from .training import AssistedLoss

__version__ = '0.1.0'
__all__ = ['AssistedLoss', 'EvoLevit', 'EvoVisionTransformer', 'evolve', 'find_slow_tokens']
