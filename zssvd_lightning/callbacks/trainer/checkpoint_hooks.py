"""Lightning checkpoints of compressed modules: saved so that a plain load says what it lacks, loaded by shape.

Weights tell by their names and shapes which layers are low-rank, so `save_weights_only` checkpoints load as well.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
from torch import nn

from zssvd_lightning._contexts import overridden
from zssvd_lightning.model import adapters
from zssvd_lightning.model.replace import replace_module
from zssvd_lightning.serialization.state_dict import match_structure, note
from zssvd_lightning.serialization.transformers_config import mark


@contextmanager
def borrowed_checkpoint_hooks(
    module: L.LightningModule,
    check: Callable[[Mapping[str, Any]], None],
    replace: Callable[[nn.Module, nn.Module, nn.Module], None] = replace_module,
    prepared: Callable[[Mapping[str, Any], bool], None] | None = None,
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Has the module's structure follow the checkpoints it loads, and low-rank ones carry a note, within the context.

    Args:
        module: the module that a Trainer runs.
        check: is given every checkpoint that is to be loaded, and raises when it should not be.
        replace: puts a layer in the place of another, `replace(model, old, new)`.
        prepared: is given every such checkpoint once the structure is its own, and whether there were adapters before.

    Returns:
        What makes the structure that of a checkpoint.
    """
    load = _Load(module, module.on_load_checkpoint, check, replace, prepared)
    with overridden(module, on_load_checkpoint=load, on_save_checkpoint=_Save(module, module.on_save_checkpoint)):
        yield load.prepare


@dataclass
class _Load:
    """The module's own hook, and then its structure made that of the weights. Copies go with copies of the module."""

    module: L.LightningModule
    own: Callable[[dict[str, Any]], None]
    check: Callable[[Mapping[str, Any]], None] | None
    replace: Callable[[nn.Module, nn.Module, nn.Module], None]
    prepared: Callable[[Mapping[str, Any], bool], None] | None

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        self.own(checkpoint)
        if "state_dict" in checkpoint:  # strategies that load weights themselves have prepared for it
            self.prepare(checkpoint)

    def prepare(self, checkpoint: Mapping[str, Any]) -> None:
        if self.check is not None:
            self.check(checkpoint)
        had_adapters = bool(adapters.on(self.module))
        match_structure(self.module, checkpoint["state_dict"], strict=self.module.strict_loading, replace=self.replace)
        mark(self.module)
        if self.prepared is not None:
            self.prepared(checkpoint, had_adapters)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"check": None, "replace": replace_module, "prepared": None}


@dataclass
class _Save:
    """The module's own hook, and then a note for loads that know nothing of low-rank layers."""

    module: L.LightningModule
    own: Callable[[dict[str, Any]], None]

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        self.own(checkpoint)
        checkpoint["state_dict"].update(note(self.module))
