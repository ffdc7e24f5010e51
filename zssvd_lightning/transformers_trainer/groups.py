"""Parameter groups of an optimizer, after layers of its model were replaced."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from zssvd_lightning.errors import UnsupportedTrainingError
from zssvd_lightning.layers.base import CompressedLinear


class OpenGroups:
    """Parameter groups of an optimizer, by the names that parameters have before layers are replaced.

    Args:
        optimizer: a torch optimizer, or a wrapper that has it as `optimizer`.
        model: the model that it trains.

    Raises:
        UnsupportedTrainingError: the optimizer is of another kind, or trains parameters outside of the model.
    """

    def __init__(self, optimizer: Any, model: nn.Module) -> None:
        plain = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(plain, torch.optim.Optimizer):
            raise UnsupportedTrainingError(
                f"{type(plain).__name__} is no torch.optim.Optimizer, so its parameters cannot be replaced by factors; "
                "call compress(model, batches) before the Trainer is made"
            )
        self.optimizer = plain
        self._model = model
        self._named = dict(model.named_parameters())
        names = {id(parameter): name for name, parameter in self._named.items()}
        grouped = [parameter for group in plain.param_groups for parameter in group["params"]]
        if any(id(parameter) not in names for parameter in grouped):
            raise UnsupportedTrainingError(
                f"{type(plain).__name__} trains parameters that are not in {type(model).__name__}. It works layer by "
                "layer, or was made before the model became low-rank: leave the optimizer to the Trainer, or call "
                "compress(model, batches) or from_pretrained(checkpoint) before you make it"
            )
        self._names = [[names[id(parameter)] for parameter in group["params"]] for group in plain.param_groups]

    def follow(self) -> None:
        """Put the parameters of new layers in the places of those they replace, without state.

        The factors of a layer go where its weight was, and its bias goes where its bias was: what was not trained is
        not trained afterward. Parameters that remain keep their state.
        """
        successors = self._successors()
        for group, names in zip(self.optimizer.param_groups, self._names, strict=True):
            group["params"] = [new for name in names for new in successors.get(name, [self._named[name]])]
        present = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        for parameter in [known for known in self.optimizer.state if id(known) not in present]:
            del self.optimizer.state[parameter]

    def _successors(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters of each replaced layer, by the name of the former one whose place they take."""
        known = {id(parameter) for parameter in self._named.values()}
        found: dict[str, list[nn.Parameter]] = {}
        for place, layer in self._model.named_modules():
            if not isinstance(layer, CompressedLinear):
                continue
            own = dict(layer.named_parameters())
            if own and all(id(parameter) in known for parameter in own.values()):
                continue
            before = [name for name in self._named if name.startswith(f"{place}.")]
            biases = [name for name in before if _is_bias(name)]
            weights = [name for name in before if not _is_bias(name)]
            found |= {name: [] for name in before}
            found |= _at_first(weights, (parameter for name, parameter in own.items() if not _is_bias(name)))
            found |= _at_first(biases, (parameter for name, parameter in own.items() if _is_bias(name)))
        return found


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2] == "bias"


def _at_first(names: list[str], parameters: Iterable[nn.Parameter]) -> Mapping[str, list[nn.Parameter]]:
    return {names[0]: list(parameters)} if names else {}
