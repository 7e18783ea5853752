"""Registering the quantizer with transformers without importing transformers.

``import loftq`` has to register ``quant_method: loftq``, but importing transformers and torch takes seconds that
``loftq --help`` should not. If transformers' registry is loaded already, registration happens at once; otherwise right
after the module that holds it has been imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"


def _register() -> None:
    importlib.import_module("loftq.hub.quantizer")


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then_register(module: ModuleType) -> None:
            execute(module)
            # the package around it is still being imported: what the quantizer needs of it is named explicitly there
            sys.modules[_REGISTRY] = module
            _register()

        spec.loader.exec_module = execute_then_register  # type: ignore[method-assign]
        return spec


def register_with_transformers() -> None:
    """Make transformers know ``quant_method: loftq``, now or as soon as its registry is imported."""
    if "loftq.hub.quantizer" in sys.modules:
        return
    if _REGISTRY in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _RegisterAfterImport())
