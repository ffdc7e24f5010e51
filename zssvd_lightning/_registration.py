"""Make transformers read compressed folders once this package is imported, without importing transformers for it.

transformers keeps its config classes and its quantizers in two registries. Each of ours is entered as soon as the
module of its registry is loaded: at once where it is, and otherwise right after its import.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

REGISTRIES = {
    "transformers.models.auto.configuration_auto": "zssvd_lightning.serialization.saved_config",
    "transformers.quantizers.auto": "zssvd_lightning.serialization.quantizer",
}
"""Modules of transformers, and the modules here that enter their classes in them when they are imported."""


def register_with_transformers() -> None:
    """Import each registering module now if its registry is loaded, else right after the registry is imported."""
    for registry, ours in REGISTRIES.items():
        if registry in sys.modules:
            import_module(ours)
    if not all(registry in sys.modules for registry in REGISTRIES):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Find the registries as Python does, and import the module that registers with each once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in REGISTRIES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run: Any = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                import_module(REGISTRIES[fullname])

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
