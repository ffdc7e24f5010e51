"""A mixin that lets `load_from_checkpoint` rebuild the compressed layers of a LightningModule."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from zssvd_lightning.model import adapters
from zssvd_lightning.serialization.state_dict import match_structure
from zssvd_lightning.serialization.transformers_config import mark


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
