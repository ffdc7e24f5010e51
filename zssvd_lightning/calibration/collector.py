"""Collection of the statistics between two steps of a compression, over the batches of all processes.

Shapes: W and G are (m, n), the second moments A (n, n) and B (m, m).
"""

from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zssvd_lightning._numerics import accumulated
from zssvd_lightning.calibration.gradients import check_terms, checked_loss, collect_gradients, mean_loss
from zssvd_lightning.calibration.hooks import Observation, observing
from zssvd_lightning.calibration.masks import TokenMask
from zssvd_lightning.calibration.recorded_calls import Call, own_calls
from zssvd_lightning.calibration.routing.means import ExpertMeans
from zssvd_lightning.calibration.routing.removals import own_removals, removals_to_save
from zssvd_lightning.calibration.widths.free_widths import FreeWidths
from zssvd_lightning.distributed import LayerSet
from zssvd_lightning.model.apart.routers import Routed
from zssvd_lightning.whitening.kept_roots import KeptRoots
from zssvd_lightning.whitening.moments import Moments
from zssvd_lightning.whitening.output_gradients import OUTPUT_GRADIENTS
from zssvd_lightning.whitening.spectrum import Spectrum


class StatisticsCollector:
    """Collector of statistics, including batches of an open accumulation window whose gradients are not collected yet.

    Args:
        model: the module that the batches run through.
        layers: the layers to watch, and the processes that hold them.
        output_side: source of the output gradients, a key of `OUTPUT_GRADIENTS`; None to leave out their second
            moments.
        keep: True to reuse second moments in later steps that gather none, also as attribute `keeps`.
        sums: maker of the mappings that hold sums by layer.

    Attributes:
        model: the module that the batches run through.
        draw: function that draws output gradients from logits; None if they come from the labels, or are left out.
        moments: statistics of the batches whose gradients are collected.
        calls_to_record: number of batches per step whose forward passes are recorded, to be run again.
        calls: the recorded forward passes.
        routed: lists of experts of which removals are weighed.
        spectra: spectra along whose components the curvature is measured; None if it is not.
        can_overflow: True if gradients may be discarded, which takes memory for a second set of second moments.
        free_widths: hidden widths that batches have reached; they are tried only with `finds_widths`.
        roots: roots of the second moments that are kept, with `keep`.
        logits_model: function that returns the part of the model that takes the batches and returns the logits.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: LayerSet,
        output_side: str | None = None,
        keep: bool = False,
        sums: Callable[[], MutableMapping[str, Tensor]] = dict,
    ) -> None:
        self._sums = sums
        self.moments, self._window, self._counts_shared = self._no_moments(), self._no_moments(), False
        self.calls_to_record, self.calls = 0, list[Call]()
        self.routed: Collection[Routed] = ()
        self.spectra: Mapping[str, Spectrum] | None = None
        self.can_overflow, self.finds_widths, self.free_widths = False, False, FreeWidths()
        self.logits_model: Callable[[Any], nn.Module] = lambda model: model
        self.model, self.output_side, self.keeps = model, output_side, keep
        self._targets, self._team, self._means = layers, layers.team, ExpertMeans(model, layers)
        self.draw = None if output_side is None else OUTPUT_GRADIENTS[output_side]
        self._kept: Moments | None = None
        self.roots = KeptRoots(active=keep)
        self._pending: list[tuple[float, float]] = []
        self._observation: Observation | None = None

    @contextmanager
    def observing(self, mask: TokenMask, inputs: bool = True) -> Iterator[Observation]:
        """Observe one batch; see `hooks.observing`."""
        into = self.moments
        if self.can_overflow:
            into = self._window
            into.leaders |= self.moments.leaders
        outputs = into if inputs and self.output_side is not None else None
        with (
            self._team.inputs(into, self._targets) if inputs else nullcontext(into) as seen,
            observing(self.model, self._targets, seen, mask, inputs, outputs) as observation,
        ):
            if self._team.whole_everywhere and not self.can_overflow:
                observation.watch_gradients(self.moments, self._team.gradients_divided_by)
            observation.check_operands(self._batch + 1)
            if inputs and self.finds_widths:
                observation.watch_widths(self.free_widths)
            if self.spectra is not None:
                observation.watch_components(self.spectra, into)
            observation.watch_removals(self.routed, into)
            if outputs is not None and self.draw is not None:
                observation.watch_logits(self.logits_model(self.model), self.draw, self.generator())
            if self._batch < self.calls_to_record:
                observation.note_calls(self.logits_model(self.model), self.calls, mask)
            self._observation = observation
            yield observation

    @property
    def pending(self) -> bool:
        """True if losses were added whose gradients are not collected yet."""
        return bool(self._pending)

    def add_loss(self, loss: Tensor, terms: float, gradient_weight: float) -> None:
        """Record the mean loss of the observed batch, until its gradients are collected.

        Args:
            loss: mean loss, with its graph.
            terms: number of terms in the mean.
            gradient_weight: factor that turns the gradients of the next backward pass into those of the sum of terms.

        Raises:
            CalibrationError: there are no terms, or the loss is no scalar with a graph.
            NonFiniteError: the loss is NaN or infinite.
            LogitsError: output gradients are drawn from logits on which the loss does not depend.
        """
        check_terms(terms)
        self._team.inputs_seen()
        self._pending.append((checked_loss(loss).item(), terms))
        if self._observation is not None:
            self._observation.gradient_weight = gradient_weight
            self._observation.send_back(loss)

    def collect_gradients(self, weight: float) -> None:
        """Add the recorded losses and `weight` times the gradients on the targets to the statistics, and clear both."""
        self.moments.absorb_moments(self._window)
        for loss, terms in self._pending:
            self.moments.add_loss(loss, terms)
        self._pending = []
        collect_gradients(self._targets, self.moments, weight * self._team.gradients_divided_by)
        if self._observation is not None:
            self._observation.refuse_unusable(self.moments, alone=self._team.size == 1)

    def discard_gradients(self) -> None:
        """Discard the recorded losses, the gradients on the targets and, with `can_overflow`, the matching inputs."""
        self._pending, self._window = [], self._no_moments()
        for target in self._targets.values():
            target.module.weight.grad = None

    def start_afresh(self) -> None:
        """Reset the statistics for the next step. With `keeps`, second moments are stored for reuse."""
        if self.keeps and self.moments.input_sums:
            self._kept = self.moments.second_moments(counted=self._team.rank == 0)
        self.moments, self.calls, self._counts_shared = self._no_moments(), [], False

    def component_curvature(self, name: str) -> Tensor:
        """Return the curvature of the loss along each unit-size component (r,); after `complete`. Collective."""
        if self.spectra is None:
            raise RuntimeError("the curvature along components was not watched")
        return self._team.over_batches(self._components(self.moments, name)) / self.moments.loss_terms

    def forget(self) -> None:
        """Discard all statistics, including reusable second moments."""
        self._kept, self.moments, self.calls, self._counts_shared = None, self._no_moments(), [], False
        self.spectra, self.calls_to_record = None, 0
        self.roots.clear()

    def complete(self) -> None:
        """Replace counts by totals over all processes, and reuse stored second moments if these batches have none.

        Call it after the last batch. Further calls do nothing. Collective.

        Raises:
            CalibrationError: layers share an input on one process but not on another.
        """
        if self._counts_shared:
            return
        if self._kept is not None and not self.moments.leaders:
            self.moments.reuse(self._kept.second_moments())
        self._counts_shared = True
        self._means.start_afresh()
        self.moments.take_counts(self._team.gathered(self.moments.counts()))

    def layer_at(self, owner: int, name: str, *, inputs: bool) -> tuple[Tensor, Moments] | None:
        """Return a layer's whole weight and statistics on its owner, None elsewhere; after `complete`. Collective.

        Second moments of experts are shrunk toward those of all experts of the layer; see `ExpertMeans`.

        Args:
            owner: rank of the process that needs the layer.
            name: layer name.
            inputs: True to include the input second moment.
        """
        target, moments = self._targets[name], self.moments
        leader = moments.leaders.get(name, name)
        length, split = target.shape[target.split], target.split
        A = G = B = None
        if inputs and moments.tokens.get(leader):
            A = self._team.sum_at(owner, self._inputs(moments, leader), target.shape[1], 0)
            A = self._means.shrunk("inputs", leader, A, moments.tokens, partial(self._inputs, moments))
        if name in moments.with_gradient:
            G = self._team.sum_at(owner, self._gradient(moments.gradient_sums, name), length, split)
        if name in moments.with_outputs:
            B = self._team.total_at(owner, self._output_sum(moments, name))
            B = self._means.shrunk("outputs", name, B, moments.tokens, partial(self._output_sum, moments))
        weight = self._team.weight_at(owner, target.weight, length, split)
        if weight is None:
            return None
        return weight, moments.with_sums_of(name, A, G, B)

    def second_moment(self, leader: str) -> Tensor:
        """Return `A` (n, n) over all batches, where processes have whole weights; after `complete`. Collective.

        Raises:
            CalibrationError: the layer never ran.
            NonFiniteError: an activation was NaN or infinite.
        """
        total = Moments({leader: leader}, tokens=self.moments.tokens)
        if self.moments.tokens.get(leader):
            total.input_sums[leader] = self._team.over_batches(self._inputs(self.moments, leader))
        return total.second_moment(leader)

    def mean_gradient(self, name: str) -> Tensor:
        """Return this process's part of the mean gradient over all batches; after `complete`. Collective.

        Raises:
            ZeroGradientError: the loss does not depend on the layer.
            NonFiniteError: the gradient is NaN or infinite.
        """
        total = Moments(loss_terms=self.moments.loss_terms)
        if name in self.moments.with_gradient:
            total.gradient_sums[name] = self._team.over_batches(self._gradient(self.moments.gradient_sums, name))
        return total.mean_gradient(name, self._team.over_rows)

    def state_dict(self, *, so_far: bool = True) -> dict[str, Any]:
        """Return plain types and tensors in the form the team saves. Collective.

        Args:
            so_far: True to include the batches since the last step. False discards them, so that the step restarts.
        """
        kept = None if self._kept is None else self._of_all(self._kept, self._team.gathered(self._kept.counts()))
        if not so_far:
            empty = Moments().state_dict()
            return {"moments": empty, "window": empty, "kept": kept, "pending": [], "gradients": {}, "calls": []}
        counts = self._team.gathered(self.moments.counts() | {"window": self._window.counts()})
        pending = self._team.gathered(self._pending)
        losses = [mean_loss(entries) for entries in zip(*pending, strict=True)]
        weights = {name: target.gradient for name, target in self._targets.items()} if losses else {}
        open_gradients = {name: gradient for name, gradient in weights.items() if gradient is not None}
        has_open = set().union(*self._team.gathered(set(open_gradients)))
        return {
            "moments": self._of_all(self.moments, counts),
            "window": self._of_all(self._window, [each["window"] for each in counts]),
            "kept": kept,
            "pending": [list(entry) for entry in losses],
            "gradients": self._gradients_to_save(open_gradients, has_open),
            "calls": [call.to("cpu") for calls in self._team.gathered(self.calls) for call in calls],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a `state_dict`. Sums go to the first process, or to all processes in parts."""
        self.moments = self._own(state["moments"])
        self._window = self._own(state["window"])
        self._kept = None if state.get("kept") is None else self._own(state["kept"])
        self.calls = own_calls(state["calls"], self._team, self._device)
        self._pending = [(loss, terms) if self._team.rank == 0 else (0.0, 0.0) for loss, terms in state["pending"]]
        for name, gradient in state["gradients"].items():
            if (part := self._team.share_of_sum(gradient, self._targets[name].split)) is not None:
                self._targets[name].leave_gradient(part)

    @property
    def _device(self) -> torch.device:
        return next(iter(self._targets.values())).weight.device

    def generator(self) -> torch.Generator:
        """Return a generator seeded by batch and process; draws are the same after a restart and on every device."""
        return torch.Generator().manual_seed(self._batch * self._team.size + self._team.rank)

    def _no_moments(self) -> Moments:
        return Moments(input_sums=self._sums(), gradient_sums=self._sums(), output_sums=self._sums())

    @property
    def _batch(self) -> int:
        """Number of batches in this step whose loss was added."""
        return self.moments.batches + len(self._pending)

    def _inputs(self, moments: Moments, leader: str) -> Tensor:
        """Return `X^T X` over the batches of this process."""
        n, W = self._targets[leader].shape[1], self._targets[leader].weight
        own = moments.input_sums.get(leader)
        return torch.zeros(n, n, dtype=accumulated(W.dtype), device=W.device) if own is None else own

    def _output_sum(self, moments: Moments, name: str) -> Tensor:
        """Return `D^T D` over the batches of this process."""
        m, W = self._targets[name].shape[0], self._targets[name].weight
        own = moments.output_sums.get(name)
        return W.new_zeros(m, m, dtype=accumulated(W.dtype)) if own is None else own

    def _components(self, moments: Moments, name: str) -> Tensor:
        """Return the summed squared derivatives by component (r,), over the batches of this process."""
        own, sigma = moments.component_sums.get(name), (self.spectra or {})[name].sigma
        return torch.zeros_like(sigma) if own is None else own

    def _gradient(self, gradients: Mapping[str, Tensor], name: str) -> Tensor:
        """Return the summed gradient over the batches of this process; 0 if none of them reached the layer."""
        W, own = self._targets[name].weight, gradients.get(name)
        return torch.zeros_like(W, dtype=accumulated(W.dtype)) if own is None else own

    def _of_all(self, moments: Moments, counts: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the `state_dict` of the statistics over all processes."""
        total = Moments(dict(moments.leaders), batches=moments.batches)
        total.take_counts(counts)
        for leader in [name for name in self._targets if name in total.tokens]:
            inputs = self._inputs(moments, leader)
            if (A := self._team.sum_to_save(inputs, self._targets[leader].shape[1])) is not None:
                total.input_sums[leader] = A
        total.gradient_sums = self._gradients_to_save(moments.gradient_sums, total.with_gradient)
        for name in [name for name in self._targets if name in total.with_outputs]:
            if (B := self._team.total_to_save(self._output_sum(moments, name))) is not None:
                total.output_sums[name] = B
        for name in self.spectra or ():
            if (squares := self._team.total_to_save(self._components(moments, name))) is not None:
                total.component_sums[name] = squares
        total.removal_sums = removals_to_save(self.routed, moments, self._team, self._device)
        return total.state_dict()

    def _gradients_to_save(self, gradients: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
        to_save = {}
        for name, target in self._targets.items():
            if name in names:
                gradient = self._gradient(gradients, name)
                G = self._team.sum_to_save(gradient, target.shape[target.split], target.split)
                if G is not None:
                    to_save[name] = G
        return to_save

    def _own(self, state: Mapping[str, Any]) -> Moments:
        """Return this process's part of saved statistics. Only the first process gets the counts."""
        empty = {kind: self._sums() for kind in ("input_sums", "gradient_sums", "output_sums")}
        moments = Moments(**{**state, **empty, "component_sums": {}})
        if self._team.rank != 0:
            moments.tokens = dict.fromkeys(state["tokens"], 0)
            moments.loss_sum = moments.loss_terms = moments.output_terms = 0.0
        for kind, sums in (("input_sums", moments.input_sums), ("gradient_sums", moments.gradient_sums)):
            for name, whole in state[kind].items():
                split = self._targets[name].split if kind == "gradient_sums" else 0
                if (part := self._team.share_of_sum(whole, split)) is not None:
                    sums[name] = part.to(self._targets[name].weight.device, copy=True)
        for kind, sums in (("output_sums", moments.output_sums), ("component_sums", moments.component_sums)):
            for name, saved in state[kind].items():
                if (own := self._team.own_total(saved)) is not None:
                    sums[name] = own.to(self._targets[name].weight.device, copy=True)
        moments.removal_sums = own_removals(state, self._team, self._device)
        return moments
