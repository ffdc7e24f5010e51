"""Second moments over all experts of a layer, toward which those of single experts are shrunk."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from zssvd_lightning.distributed import LayerSet
from zssvd_lightning.layers.apart.experts import expert_lists
from zssvd_lightning.whitening.shrinkage import shrunk_sum


def experts_beside(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return, by the name of a layer of an expert, the names of the same layer of all experts in its list."""
    found: dict[str, tuple[str, ...]] = {}
    for name, experts in expert_lists(model):
        for stack in {part for expert in experts.experts for part, _ in expert.named_children()}:
            names = tuple(f"{name}.{number}.{stack}" for number in range(len(experts.experts)))
            found |= dict.fromkeys(names, names)
    return found


class ExpertMeans:
    """Sums over all experts of a layer, on every process; those of one layer are kept at a time.

    Processes must hold statistics whole, as all but those of sharded weights do. Elsewhere nothing is shrunk.

    Args:
        model: the model, whose lists of experts may change between uses.
        layers: the layers that are watched, and the processes that hold them.
    """

    def __init__(self, model: nn.Module, layers: LayerSet) -> None:
        self._model, self._layers, self._team = model, layers, layers.team
        self._sums: dict[tuple[str, str], tuple[Tensor, int]] = {}
        self._beside: dict[str, tuple[str, ...]] | None = None

    def start_afresh(self) -> None:
        """Forget all sums, because the statistics change."""
        self._sums, self._beside = {}, None

    def shrunk(
        self,
        kind: str,
        name: str,
        total: Tensor | None,
        tokens: Mapping[str, int],
        own_of: Callable[[str], Tensor],
    ) -> Tensor | None:
        """Return a sum over the tokens of one expert, shrunk toward those of all; see `shrunk_sum`. Collective.

        Args:
            kind: side of the layer, `inputs` or `outputs`.
            name: layer of the expert. A sum of another layer is returned as it is.
            total: the sum over all processes on the process that needs it, None on the others.
            tokens: number of tokens by layer, over all processes.
            own_of: function that returns the sum of a layer over the batches of this process.
        """
        if not self._team.whole_everywhere:
            return total
        if self._beside is None:
            self._beside = experts_beside(self._model)
        members = [member for member in self._beside.get(name, ()) if member in self._layers and tokens.get(member)]
        if len(members) < 2 or name not in members:
            return total
        key = kind, members[0]
        if key not in self._sums:
            place = name.rsplit(".", 2)[0]
            self._sums = {k: v for k, v in self._sums.items() if k[1].rsplit(".", 2)[0] == place}
            mine = own_of(members[0]).clone()
            for member in members[1:]:
                mine += own_of(member)
            self._sums[key] = self._team.over_batches(mine), sum(tokens[member] for member in members)
        everyone, count = self._sums[key]
        return None if total is None else shrunk_sum(total, tokens[name], everyone, count)
