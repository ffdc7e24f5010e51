"""Dense stand-ins for low-rank layers, so that a model is compressed a second time like a dense one.

Shapes: W (m, n).
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from zssvd_lightning._numerics import exact_products
from zssvd_lightning.errors import TargetError
from zssvd_lightning.layers.apart.removed import RemovedLinear
from zssvd_lightning.layers.base import CompressedLinear, Dense, carry_hooks
from zssvd_lightning.layers.narrow import NarrowLinear
from zssvd_lightning.layers.registry import Factored, dense_like, layer_like
from zssvd_lightning.layers.storage import Kept, Present
from zssvd_lightning.model.apart.kinds import KINDS, not_asked
from zssvd_lightning.model.apart.taken import TakenApart
from zssvd_lightning.model.peft_layers import wraps_by_peft
from zssvd_lightning.model.replace import replace_module
from zssvd_lightning.model.targets import Patterns, is_selected, refuse_adapted

logger = logging.getLogger(__name__)


def low_rank_targets(
    model: nn.Module, include: Patterns = None, ignore: Patterns = None, opted: Collection[str] = ()
) -> dict[str, Factored]:
    """Return the selected layers that are low-rank already, by qualified name in module order.

    Args:
        model: any module.
        include: as in `find_targets`.
        ignore: as in `find_targets`.
        opted: as in `StandIns`. Layers in modules of other kinds that are taken apart on request are left out.

    Raises:
        TargetError: a selected layer cannot be compressed again, or has an adapter of PEFT. The message says why, and
            what to do.
    """
    refuse_adapted(model, include, ignore)
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    left = not_asked(model, opted)
    found: dict[str, Factored] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, CompressedLinear) or not is_selected(name, include, ignore):
            continue
        if isinstance(layer, RemovedLinear | NarrowLinear) or id(layer) in left:  # stays so
            continue
        reason = _why_not(layer, owners)
        if reason is not None or not isinstance(layer, Factored):
            raise TargetError(
                f"{name} ({type(layer).__name__}) is compressed already, and {reason}; or add it to ignore"
            )
        found[name] = layer
    return found


class StandIns:
    """Linear layers that stand in for what else is selected in a model, with the same weights.

    Dense layers stand in for low-rank layers. They take the memory of the dense weights. The low-rank layers are kept
    aside, with their factors as they are. Linear layers stand in for the matrices of stacked experts, attentions and
    convolutions, and share their memory.

    Args:
        model: any module.
        include: as in `find_targets`.
        ignore: as in `find_targets`.
        replace: function that replaces a layer, `replace(model, old, new)`.
        opted: names of settings on whose request more kinds of modules are taken apart, such as `convolutions`.

    Attributes:
        layers: the low-rank layers, by qualified name.
        apart: the modules of each kind that is taken apart.

    Raises:
        TargetError: see `low_rank_targets`.
    """

    def __init__(
        self,
        model: nn.Module,
        include: Patterns = None,
        ignore: Patterns = None,
        replace: Callable[[nn.Module, nn.Module, nn.Module], None] = replace_module,
        opted: Collection[str] = (),
    ) -> None:
        self.layers = low_rank_targets(model, include, ignore, opted)
        kinds = [kind for kind in KINDS if kind.opt_in is None or kind.opt_in in opted]
        self.apart = [
            TakenApart(each, model, lambda name: is_selected(name, include, ignore), replace) for each in kinds
        ]
        self._model, self._replace = model, replace
        self._dense: dict[str, Dense] = {}

    @property
    def present(self) -> dict[str, Present]:
        """Rank and numbers of each low-rank layer."""
        return {name: Present(layer.rank, _numbers_of(layer)) for name, layer in self.layers.items()}

    def put_in(self) -> None:
        """Replace what is selected by its stand-ins. On an error, the model is as before."""
        try:
            for taken in self.apart:
                taken.put_in()
            for name, layer in self.layers.items():
                self._dense[name] = _stand_in(layer)
                self._replace(self._model, layer, self._dense[name])
        except BaseException:
            self.put_back()
            raise
        if self.layers:
            size = sum(dense.weight.nbytes for dense in self._dense.values())
            logger.info("%d low-rank layers are dense during the compression (%.1f MB)", len(self.layers), size / 1e6)

    def copy_of(self, name: str) -> Factored:
        """Return a copy of a low-rank layer, which shares its hooks."""
        old = self.layers[name]
        new = layer_like(old, old.spec).to_empty(device=next(old.parameters()).device)
        new.load_state_dict(old.state_dict())
        carry_hooks(new, old)
        return cast("Factored", new)

    def write_low_rank(self, weights: dict[str, Any]) -> None:
        """In a state dict of the model, replace the entries of stand-ins by those of what they stand for."""
        for taken in self.apart:
            taken.write_whole(weights)
        names = {id(dense): name for name, dense in self._dense.items()}
        for place, module in self._model.named_modules(remove_duplicate=False):
            if id(module) in names:
                for key in module.state_dict():
                    weights.pop(f"{place}.{key}", None)
                low_rank = self.layers[names[id(module)]].state_dict()
                weights.update({f"{place}.{key}": value for key, value in low_rank.items()})

    def put_back(self, leave: Collection[str] = ()) -> None:
        """Replace every stand-in that is in the model by what it stands for; see `TakenApart.put_back`."""
        for taken in self.apart:
            taken.put_back(leave)
        present = {id(module) for module in self._model.modules()} if self._dense else set()
        for name, dense in self._dense.items():
            if id(dense) in present:
                self._replace(self._model, dense, self.layers[name])

    @contextmanager
    def meanwhile(self, *, keep: bool = False) -> Iterator[None]:
        """Put the stand-ins in within the context, and put back the layers of those that are still there on any exit.

        Args:
            keep: leave the stand-ins in unless there is an error.
        """
        self.put_in()
        try:
            yield
        except BaseException:
            self.put_back()
            raise
        if not keep:
            self.put_back()


def left_whole(stand_ins: StandIns | None) -> dict[str, str]:
    """Return the selected modules that cannot be taken apart, by name with the reason."""
    return {} if stand_ins is None else {name: why for taken in stand_ins.apart for name, why in taken.left.items()}


def _why_not(layer: CompressedLinear, owners: Counter[int]) -> str | None:
    """Return why a layer cannot be compressed again and what to do, or None if it can."""
    parameters = list(layer.parameters())
    reasons = (
        (
            not isinstance(layer, Factored),
            "its form, such as 8 bits, has no factors to truncate; compress the model from before it was quantized",
        ),
        (
            isinstance(layer, Factored) and layer.adapter is not None,
            "has an adapter from a recovery; merge_adapters(model) first",
        ),
        (
            any(map(wraps_by_peft, layer.modules())),
            "has an adapter of PEFT on its factors; model = model.merge_and_unload() first",
        ),
        (
            any(isinstance(parameter, DTensor) for parameter in parameters),
            "its factors are spread over processes; compress the model on one process",
        ),
        (
            any(value.is_meta for value in layer.state_dict().values()),
            "its values are not in memory; load the model without device_map",
        ),
        (
            any(owners[id(parameter)] > 1 for parameter in parameters),
            "one of its factors is tied to another module's, and replacing it would untie them",
        ),
    )
    return next((reason for holds, reason in reasons if holds), None)


@torch.no_grad()
def _stand_in(layer: Factored) -> Dense:
    """Return a dense layer with the weight, hooks and training mode of `layer`, which shares its bias."""
    new = dense_like(layer).to_empty(device=next(layer.parameters()).device)
    with exact_products(), torch.autocast(new.weight.device.type, enabled=False):
        W = layer.weight
    new.weight.copy_(W.T if isinstance(new, Conv1D) else W)
    new.bias = layer.bias  # type: ignore[assignment]
    carry_hooks(new, layer)
    return new


def _numbers_of(layer: Factored) -> Kept:
    """Count the numbers that store the weight of a low-rank layer."""
    wide = sum(p.numel() for name, p in layer.named_parameters() if name.rpartition(".")[2] != "bias")
    return Kept(wide=wide, beside=sum(buffer.nbytes for buffer in layer.buffers()), products=wide)
