"""Evo-ViT for timm: slow-fast token evolution, https://arxiv.org/abs/2108.01390.

Importing this package registers its models with timm, now or as soon as timm is imported. Its names are imported on
first use, so that PyTorch can load `timm_evovit.autoload` without importing timm.
"""
from importlib import import_module
from typing import TYPE_CHECKING, Any, List

from .autoload import autoload

if TYPE_CHECKING:
    from .evo_deit import EvoVisionTransformer as EvoVisionTransformer
    from .evo_levit import EvoLevit as EvoLevit
    from .evo_vit import evolve as evolve
    from .evo_vit import evolve_model as evolve_model
    from .training import AssistedLoss as AssistedLoss
    from .visualize import informative_tokens as informative_tokens

__version__ = '0.1.0'

_modules = {
    'EvoVisionTransformer': 'evo_deit',
    'EvoLevit': 'evo_levit',
    'AssistedLoss': 'training',
    'evolve': 'evo_vit',
    'evolve_model': 'evo_vit',
    'informative_tokens': 'visualize',
}
__all__ = ['__version__', *_modules]


def __getattr__(name: str) -> Any:
    if name not in _modules:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'.{_modules[name]}', __name__), name)


def __dir__() -> List[str]:
    return sorted({*globals(), *__all__})


autoload()
