"""Hooks for Lightning checkpoints of compressed modules.

Saved checkpoints contain a note, so that a load without support for low-rank layers reports what is missing. On
loading, the names and shapes of the weights determine which layers are low-rank. `save_weights_only` checkpoints
therefore load as well.
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
    """Override the module's checkpoint hooks: it takes the structure of loaded checkpoints, and saved ones get a note.

    Args:
        module: the module of a Trainer.
        check: called with every checkpoint before it is loaded; raises to refuse the checkpoint.
        replace: function that replaces a layer, `replace(model, old, new)`.
        prepared: called once the module has the structure of a checkpoint, with the checkpoint and True if the module
            had adapters before.

    Yields:
        A function that gives the module the structure of a checkpoint.
    """
    load = _Load(module, module.on_load_checkpoint, check, replace, prepared)
    with overridden(module, on_load_checkpoint=load, on_save_checkpoint=_Save(module, module.on_save_checkpoint)):
        yield load.prepare


@dataclass
class _Load:
    """Load hook that calls the module's hook, then adopts the structure of the weights. Copied with the module."""

    module: L.LightningModule
    own: Callable[[dict[str, Any]], None]
    check: Callable[[Mapping[str, Any]], None] | None
    replace: Callable[[nn.Module, nn.Module, nn.Module], None]
    prepared: Callable[[Mapping[str, Any], bool], None] | None

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        self.own(checkpoint)
        if "state_dict" in checkpoint:  # strategies that load weights themselves call prepare
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
    """Save hook that calls the module's hook, then adds the note for loads without support for low-rank layers."""

    module: L.LightningModule
    own: Callable[[dict[str, Any]], None]

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        self.own(checkpoint)
        checkpoint["state_dict"].update(note(self.module))
