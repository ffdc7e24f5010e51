"""The statistics of the batches between two steps of a compression, over all processes that see batches.

Shapes: W and G are (m, n), the second moment A is (n, n).
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zssvd_lightning.calibration import Observation, checked_loss, collect_gradients, observing
from zssvd_lightning.distributed import Team
from zssvd_lightning.errors import CalibrationError
from zssvd_lightning.statistics import Moments
from zssvd_lightning.targets import Target


class Gathering:
    """What the batches so far have given, and what those of an open accumulation window still owe.

    Args:
        model: the module the batches go through.
        targets: the layers to watch.
        team: the processes that compress the model together.

    Attributes:
        moments: of the batches whose gradients have come.
        may_discard: whether gradients may be discarded, which takes memory for a second set of second moments.
    """

    def __init__(self, model: nn.Module, targets: Mapping[str, Target], team: Team) -> None:
        self.moments = Moments()
        self.may_discard = False
        self._model = model
        self._targets = targets
        self._team = team
        self._window = Moments()
        self._pending: list[tuple[float, float]] = []

    @contextmanager
    def observing(self, mask: Tensor | None, inputs: bool = True) -> Iterator[Observation]:
        """One batch under observation; see `calibration.observing`."""
        into = self.moments
        if self.may_discard:
            into = self._window
            into.leaders |= self.moments.leaders
        with self._team.inputs(into, self._targets) as seen, observing(
            self._model, self._targets, seen, mask, inputs
        ) as observation:
            yield observation

    @property
    def pending(self) -> bool:
        """Whether losses wait for their gradients."""
        return bool(self._pending)

    def add_loss(self, loss: Tensor, terms: float) -> None:
        """Notes a batch's mean loss until its gradient comes. Raises CalibrationError or NonFiniteError."""
        if not terms > 0:
            raise CalibrationError(f"a calibration batch counts {terms} loss terms, but needs some; drop such batches")
        self._pending.append((checked_loss(loss).item(), terms))

    def collect_gradients(self, weight: float) -> None:
        """Adds the losses noted and `weight` times the gradients on the targets to the statistics, and clears both."""
        self.moments.absorb_inputs(self._window)
        for loss, terms in self._pending:
            self.moments.add_loss(loss, terms)
        self._pending = []
        collect_gradients(self._targets, self.moments, weight * self._team.gradients_divided_by)

    def discard_gradients(self) -> None:
        """Forgets the losses noted, the gradients on the targets and, with `may_discard`, the inputs seen with them."""
        self._pending = []
        self._window = Moments()
        for target in self._targets.values():
            target.module.weight.grad = None

    def start_afresh(self) -> None:
        """Forgets the statistics."""
        self.moments = Moments()

    def share_counts(self) -> None:
        """Replaces counts by those over all processes, once all batches are over. Collective.

        Raises:
            CalibrationError: layers share an input on one process and not on another.
        """
        self.moments.take_counts(self._team.gathered(self.moments.counts()))

    def layer_at(self, owner: int, name: str) -> tuple[Tensor, Moments] | None:
        """A layer's whole weight and statistics at its owner, None at the others; after `share_counts`. Collective."""
        target, moments = self._targets[name], self.moments
        leader = moments.leaders.get(name, name)
        A = self._inputs_at(owner, moments, leader) if moments.tokens.get(leader) else None
        G = self._gradient_at(owner, moments.gradient_sums, name) if name in moments.with_gradient else None
        weight = self._team.weight_at(owner, target.weight, target.shape[target.split], target.split)
        if weight is None:
            return None
        whole = Moments(dict(moments.leaders), tokens=moments.tokens, loss_terms=moments.loss_terms)
        whole.input_sums = {} if A is None else {leader: A}
        whole.gradient_sums = {} if G is None else {name: G}
        return weight, whole

    def mean_gradient(self, name: str) -> Tensor:
        """What this process holds of the mean gradient over all batches; after `share_counts`. Collective.

        Raises:
            ZeroGradientError: the loss does not depend on the layer.
            NonFiniteError: the gradient is NaN or infinite.
        """
        total = Moments(loss_terms=self.moments.loss_terms)
        if name in self.moments.with_gradient:
            own = self.moments.gradient_sums.get(name)
            total.gradient_sums[name] = self._team.sum_part(self._no_gradient(name) if own is None else own)
        return total.mean_gradient(name, self._team.over_parts)

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors, all of them on the first process and no tensors on the others. Collective."""
        counts = self._team.gathered(self.moments.counts() | {"window": self._window.counts()})
        pending = self._team.gathered(self._pending)
        losses = [_mean(entries) for entries in zip(*pending, strict=True)]
        weights = {name: target.gradient for name, target in self._targets.items()} if losses else {}
        open_gradients = {name: gradient for name, gradient in weights.items() if gradient is not None}
        has_open = set().union(*self._team.gathered(set(open_gradients)))
        return {
            "moments": self._of_all(self.moments, counts),
            "window": self._of_all(self._window, [each["window"] for each in counts]),
            "pending": [list(entry) for entry in losses],
            "gradients": self._gradients_at_first(open_gradients, has_open),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`; sums go to the first process, or in parts to all."""
        self.moments = self._own(state["moments"])
        self._window = self._own(state["window"])
        self._pending = [(loss, terms) if self._team.rank == 0 else (0.0, 0.0) for loss, terms in state["pending"]]
        for name, gradient in state["gradients"].items():
            if (part := self._team.share_of_sum(gradient, self._targets[name].split)) is not None:
                self._targets[name].leave_gradient(part)

    def _inputs_at(self, owner: int, moments: Moments, leader: str) -> Tensor | None:
        """`X^T X` over all batches at its owner. Collective."""
        n, W = self._targets[leader].shape[1], self._targets[leader].weight
        own = moments.input_sums.get(leader)
        if own is None:
            own = torch.zeros(n, n, dtype=torch.promote_types(W.dtype, torch.float32), device=W.device)
        return self._team.sum_at(owner, own, n, 0)

    def _gradient_at(self, owner: int, gradients: Mapping[str, Tensor], name: str) -> Tensor | None:
        """The summed gradient at its owner. Collective."""
        target, own = self._targets[name], gradients.get(name)
        part = self._no_gradient(name) if own is None else own
        return self._team.sum_at(owner, part, target.shape[target.split], target.split)

    def _no_gradient(self, name: str) -> Tensor:
        """What a process adds for a layer that did not run on it."""
        W = self._targets[name].weight
        return torch.zeros_like(W, dtype=torch.promote_types(W.dtype, torch.float32))

    def _gradients_at_first(self, gradients: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
        ordered = [name for name in self._targets if name in names]
        found = {name: self._gradient_at(0, gradients, name) for name in ordered}
        return {name: self._to_save(G) for name, G in found.items() if G is not None}

    def _of_all(self, moments: Moments, counts: list[dict[str, Any]]) -> dict[str, Any]:
        """The `state_dict` of the statistics over all processes."""
        total = Moments(dict(moments.leaders), batches=moments.batches)
        total.take_counts(counts)
        leaders = [name for name in self._targets if name in total.tokens]
        found = {leader: self._inputs_at(0, moments, leader) for leader in leaders}
        total.input_sums = {leader: self._to_save(A) for leader, A in found.items() if A is not None}
        total.gradient_sums = self._gradients_at_first(moments.gradient_sums, total.with_gradient)
        return total.state_dict()

    def _to_save(self, whole: Tensor) -> Tensor:
        return whole if self._team.size == 1 else whole.cpu()

    def _own(self, state: Mapping[str, Any]) -> Moments:
        """What is this process's of saved statistics: a part of each sum, and the counts where they are nobody else's."""
        moments = Moments(**{**state, "input_sums": {}, "gradient_sums": {}})
        if self._team.rank != 0:
            moments.tokens = dict.fromkeys(state["tokens"], 0)
            moments.loss_sum = moments.loss_terms = 0.0
        for kind, sums in (("input_sums", moments.input_sums), ("gradient_sums", moments.gradient_sums)):
            for name, whole in state[kind].items():
                split = self._targets[name].split if kind == "gradient_sums" else 0
                if (part := self._team.share_of_sum(whole, split)) is not None:
                    sums[name] = part.to(self._targets[name].weight.device, copy=True)
        return moments


def _mean(entries: tuple[tuple[float, float], ...]) -> tuple[float, float]:
    """(mean loss, terms) of the batches that several processes saw at the same time."""
    terms = sum(entry[1] for entry in entries)
    return sum(loss * weight for loss, weight in entries) / terms, terms
