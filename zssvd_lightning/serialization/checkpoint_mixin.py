"""Mixin that lets `load_from_checkpoint` rebuild the compressed layers of a LightningModule."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from zssvd_lightning.model import adapters
from zssvd_lightning.serialization.state_dict import match_structure
from zssvd_lightning.serialization.transformers_config import mark


class LowRankCheckpointMixin(nn.Module):
    """Mixin with which a LightningModule loads checkpoints of its compressed form, without a callback.

    `MyModule.load_from_checkpoint(path)` needs it to load a compressed checkpoint. Layers are replaced to match the
    saved weights, so dense weights and weights of other ranks load too. Adapters from a recovery are merged, unless
    the module already has such adapters.

    Raises:
        CheckpointError: on loading, if the weights belong to another model; the module is then unchanged.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> class MyModule(LowRankCheckpointMixin, L.LightningModule): ...
        >>> class Theirs(LowRankCheckpointMixin, BoringModel): ...  # for a class that you cannot change
    """

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Make layers low-rank or dense to match the weights, then load them; see `nn.Module`."""
        had_adapters = bool(adapters.on(self))
        match_structure(self, state_dict, strict=strict)
        mark(self)
        loaded = super().load_state_dict(state_dict, strict=strict, assign=assign)
        if not had_adapters:
            adapters.merge_adapters(self)
        return loaded
