"""Imports `swsc_core.hf` right after transformers' table of quantizers, whenever a program imports that.

A `.pth` file imports this module at the start of every Python of the environment, so it does next to nothing: one more finder,
which looks at names and waits for one. A program that never imports transformers pays for a comparison of strings.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_AWAITED = "transformers.quantizers.auto"


class _Registering(Loader):
    """The module's own loader, and then the registration."""

    def __init__(self, own: Loader) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._own.exec_module(module)
        try:
            import swsc_core.hf  # noqa: F401
        except ModuleNotFoundError as error:
            if error.name != "swsc_core":
                raise
            # swsc was uninstalled and this was not: that is no reason for transformers not to be imported
            remedy = "compressed checkpoints cannot be opened: pip install swsc, or pip uninstall swsc-autoload"
            warnings.warn(f"swsc-autoload: swsc is not installed, {remedy}", stacklevel=2)


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _AWAITED:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


sys.meta_path.insert(0, _Finder())
