"""Lightning checkpoints of compressed modules: saved so that a plain load says what it lacks, loaded by shape.

Weights tell by their names and shapes which layers are low-rank, so `save_weights_only` checkpoints load as well.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
from torch import nn

from zssvd_lightning import adapters
from zssvd_lightning.borrowing import overridden
from zssvd_lightning.hub import mark
from zssvd_lightning.structure import match_structure, note
from zssvd_lightning.targets import replace_module


class LowRankCheckpointMixin(nn.Module):
    """Lets a LightningModule load checkpoints of its compressed self, on its own and without a callback.

    It is what `MyModule.load_from_checkpoint(path)` of a compressed checkpoint takes. Weights of dense modules load
    as ever, and so do those of other ranks: layers become what the weights are of. Adapters of a recovery are merged,
    unless the module has such adapters already.

    Raises:
        CheckpointError: on loading, when the weights are of another model; the module is then as it was.

    Example:
        >>> class MyModule(LowRankCheckpointMixin, L.LightningModule): ...
        >>> class Theirs(LowRankCheckpointMixin, MyModule): ...  # for a class that is not yours
    """

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Makes layers low-rank or dense as the weights have them, and loads them; see `nn.Module`."""
        had_adapters = bool(adapters.on(self))
        match_structure(self, state_dict, strict=strict)
        mark(self)
        loaded = super().load_state_dict(state_dict, strict=strict, assign=assign)
        if not had_adapters:
            adapters.merge_adapters(self)
        return loaded


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
