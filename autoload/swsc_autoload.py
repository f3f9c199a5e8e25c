"""Import hook that imports `swsc_core.hf` right after a program imports the quantizer table of transformers.

A `.pth` file imports this module at the start of every Python process of the environment. The module therefore does
almost
nothing: it adds one finder, which compares module names with one name. Programs that never import transformers pay only
for that comparison.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_QUANTIZER_TABLE = "transformers.quantizers.auto"


class _RegisteringLoader(Loader):
    """Loads the module with its original loader, then registers swsc."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        try:
            import swsc_core.hf  # noqa: F401
        except ModuleNotFoundError as error:
            if error.name != "swsc_core":
                raise
            # transformers has to remain importable after swsc was uninstalled without swsc-autoload
            remedy = "compressed checkpoints cannot be opened: pip install swsc, or pip uninstall swsc-autoload"
            warnings.warn(f"swsc-autoload: swsc is not installed, {remedy}", stacklevel=2)


class _Finder(MetaPathFinder):
    """Finds the quantizer table of transformers and no other module."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _QUANTIZER_TABLE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


sys.meta_path.insert(0, _Finder())
