"""Make timm find plugin models by itself.

PyTorch loads the entry points of the group `torch.backends` at the end of `import torch`, and timm imports PyTorch
before `timm.models`. `autoload`, declared there, waits for `timm.models` and then loads every entry point of the group
`timm.models`. It is outside the package because that imports timm, which `import torch` must not.
"""
import sys
import warnings
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any, Callable

TARGET = 'timm.models'


def _guard(what: str, function: Callable[[], Any]) -> None:
    """An exception of a plugin must not make an import of torch or timm fail: it costs a warning."""
    try:
        function()
    except Exception as e:
        warnings.warn(f'{what} could not be loaded: {e!r}', stacklevel=3)


def _load_plugins() -> None:
    for plugin in entry_points(group=TARGET):
        _guard(f'timm plugin {plugin.name} ({plugin.value})', plugin.load)


class _Finder:
    """Finds `timm.models` once, with a loader that loads the plugins afterwards."""

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname == TARGET:
            sys.meta_path.remove(cls)
            spec: Any = find_spec(fullname)
            if spec is None or spec.loader is None:
                return spec
            loader, exec_module = spec.loader, spec.loader.exec_module

            def exec_module_and_plugins(module: Any) -> None:
                del loader.exec_module  # its own method again: a loader may serve other modules too
                exec_module(module)
                _guard('timm plugins', _load_plugins)

            loader.exec_module = exec_module_and_plugins
            return spec


def autoload() -> None:
    """Load the plugins once `timm.models` is imported. PyTorch calls this, once per process."""
    if TARGET in sys.modules:
        _guard('timm plugins', _load_plugins)
    elif _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
