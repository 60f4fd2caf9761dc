"""Make timm find plugin models by itself.

PyTorch loads the entry points of the group `torch.backends` when it has been imported, and timm imports PyTorch before
`timm.models`. `autoload`, declared there, waits for `timm.models` and then loads every entry point of the group
`timm.models`: modules that register models when they are imported. Neither torch nor timm is imported here.
"""
import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import entry_points
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Optional, Sequence

__all__ = ['autoload']

TARGET = 'timm.models'
_loaded = False


def _load_plugins() -> None:
    """Load the plugins once. One that fails costs a warning, never timm."""
    global _loaded
    if _loaded:
        return
    _loaded = True
    for entry_point in entry_points(group=TARGET):
        try:
            entry_point.load()
        except Exception as e:
            warnings.warn(f'timm plugin {entry_point.name} ({entry_point.value}) could not be loaded: {e!r}', stacklevel=2)


class _PluginLoader(Loader):
    """The loader of `timm.models`, followed by the plugins."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> Optional[ModuleType]:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _load_plugins()


class _Imported(Loader):
    """The loader of a module that has been imported since its import began."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__
        module.__spec__ = None  # or the import would go by it and run the module again

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


class _PluginFinder(MetaPathFinder):
    """Watches for the import of `timm.models`, once, and has it come before that of any module of this package.

    A module that imported timm by itself would be needed by the plugins when it is half imported.
    """

    def find_spec(
            self,
            fullname: str,
            path: Optional[Sequence[str]],
            target: Optional[ModuleType] = None,
    ) -> Optional[ModuleSpec]:
        if fullname.startswith(f'{__package__}.'):
            import_module(TARGET)
            module = sys.modules.get(fullname)
            return None if module is None else ModuleSpec(fullname, _Imported(module))
        if fullname != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _PluginLoader(spec.loader)
        return spec


def autoload() -> None:
    """Load the plugins as soon as timm can take them: at once if `timm.models` is imported, else when it is."""
    if TARGET in sys.modules:
        _load_plugins()
    elif not any(isinstance(finder, _PluginFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PluginFinder())
