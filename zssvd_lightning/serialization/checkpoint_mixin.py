"""Loading of compressed weights into a module that has dense layers, or layers of other ranks.

`load_state_dict` loads weights into any module, and `load_from_checkpoint` loads a checkpoint of any LightningModule.
A class that inherits `LowRankCheckpointMixin` loads them with its own methods of these names.
"""

from collections.abc import Callable, Mapping
from os import PathLike
from typing import IO, Any, TypeVar, cast

from torch import nn

from zssvd_lightning._contexts import method_replaced
from zssvd_lightning.model import adapters
from zssvd_lightning.serialization.state_dict import match_structure
from zssvd_lightning.serialization.transformers_config import mark

M = TypeVar("M", bound=nn.Module)


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
        return _load(self, super().load_state_dict, state_dict, strict, assign)


def load_state_dict(module: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
    """Load compressed weights into `module`, whose layers are first made low-rank or dense to match them.

    Args:
        module: the module the weights were saved from, as it was built: dense, or with layers of other ranks. It needs
            no base class. Its layers are replaced in place.
        state_dict: `state_dict()` of the compressed module, or `torch.load(path)["state_dict"]` of its checkpoint.
            Dense weights load too. Adapters that are not merged load only from a checkpoint, which describes them.
        strict: whether missing and unexpected names are errors, as in `nn.Module.load_state_dict`.
        assign: whether to use the given tensors themselves, as in `nn.Module.load_state_dict`.

    Returns:
        What `module.load_state_dict` returns: missing and unexpected names.

    Raises:
        CheckpointError: the weights belong to another model; the module is then unchanged.

    Example:
        >>> import torch
        >>> from zssvd_lightning import LowRankLinear, load_state_dict
        >>> weights = {"0.up.weight": torch.zeros(8, 2), "0.down.weight": torch.zeros(2, 6)}
        >>> model = nn.Sequential(nn.Linear(6, 8, bias=False))
        >>> load_state_dict(model, weights)
        <All keys matched successfully>
        >>> model[0].rank
        2
    """
    return _load(module, module.load_state_dict, state_dict, strict, assign)


def load_from_checkpoint(module_class: type[M], path: str | PathLike[str] | IO[bytes], **settings: Any) -> M:
    """Return the module of a Lightning checkpoint, compressed or dense, without a change of its class.

    It is `module_class.load_from_checkpoint(path, **settings)`, except that layers are made low-rank to match the
    weights.

    Args:
        module_class: the LightningModule that was saved.
        path: checkpoint file.
        settings: arguments of `load_from_checkpoint`, such as `weights_only=True`, and of `module_class`.

    Raises:
        CheckpointError: the weights belong to another model.

    Example:
        >>> from zssvd_lightning import load_from_checkpoint
        >>> module = load_from_checkpoint(MyModule, "last.ckpt")  # doctest: +SKIP
    """
    original = module_class.load_state_dict

    def load(module: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        return _load(module, original.__get__(module), state_dict, strict, assign)

    with method_replaced(module_class, "load_state_dict", load):
        return cast("M", module_class.load_from_checkpoint(path, **settings))  # type: ignore[attr-defined]


def _load(
    module: nn.Module, load: Callable[..., Any], state_dict: Mapping[str, Any], strict: bool, assign: bool
) -> Any:
    """Give `module` the layers of the weights, call `load`, and merge adapters that the module did not have."""
    had_adapters = bool(adapters.on(module))
    match_structure(module, state_dict, strict=strict)
    mark(module)
    # methods that override that of `nn.Module` may be older than `assign`
    loaded = load(state_dict, strict=strict, **({"assign": True} if assign else {}))
    if not had_adapters:
        adapters.merge_adapters(module)
    return loaded
