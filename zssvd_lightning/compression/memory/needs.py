"""Bytes that a compression takes on the device, on the host and on disk: the formulas of docs/scaling.md.

The check of the disk, the limits of memory and `zssvd plan --memory` all use them.

Notation: layers (m, n), r = min(m, n), w bytes per weight, rank k of a layer at its share of the budget.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from zssvd_lightning.compression.memory.extent import Extent
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.layers.storage import dense_weight
from zssvd_lightning.offload.parking import parked_in
from zssvd_lightning.selection.budget import Budget
from zssvd_lightning.whitening.output_gradients import OUTPUT_GRADIENTS

PROGRAM = 650_000_000
"""Bytes of Python, torch, transformers and this package in host memory, with what the allocator does not give back."""

WIDE = 4
"""Bytes per number of statistics, spectra and scores, which are float32, or float64 for weights in float64."""


class Needs(NamedTuple):
    """Peaks of a compression in bytes."""

    device: int
    """On the device of the model."""
    host: int
    """In host memory beside it, with the program."""
    together: int
    """In the one memory of a machine without a GPU. The peaks of device and host need not be at the same time."""
    disk: int
    """In scratch files."""
    folder: int = 0
    """In the folder by which an interrupted run goes on, beside the scratch files."""


class _Moment(NamedTuple):
    """Bytes in use at one time of the whole way, beside the weights."""

    device: int
    """Bytes that are on the device in any case."""
    held: int = 0
    """Bytes that `offload` moves: statistics, original weights and factors."""
    spectra: int = 0
    """Spectra, which are in host memory if nothing is offloaded."""


@dataclass(frozen=True)
class Formulas:
    """Formulas for one model and one set of settings.

    Args:
        extent: sizes of the model.
        config: settings of the compression.
        budget: its budget.
    """

    extent: Extent
    config: CompressionConfig
    budget: Budget

    @property
    def wide(self) -> int:
        """Bytes per number of statistics, spectra and scores."""
        return max(WIDE, self.extent.width)

    def second_moments(self, names: Iterable[str]) -> int:
        """Return the bytes of `X^T X` and, if the metric needs it, `D^T D` of layers: 4 (sum n^2 + sum m^2)."""
        names, shapes = list(names), self.extent.shapes
        inputs = {self.extent.leaders[name]: shapes[name][1] for name in names}
        outputs = [shapes[name][0] for name in names] if self.config.watches_outputs is not None else []
        return self.wide * sum(side * side for side in [*inputs.values(), *outputs])

    def gradients(self, names: Iterable[str]) -> int:
        """Return the bytes of the summed gradients of layers: 4 sum m n."""
        return self.wide * sum(m * n for m, n in (self.extent.shapes[name] for name in names))

    def decomposition(self, name: str) -> int:
        """Return the bytes that the decomposition of a layer takes beside its statistics.

        They are the largest of 20 n^2 (root of A), 8 n^2 + 20 m^2 (root of B) and 8 (n^2 + m^2) + 26 m n + 30 r^2
        (whitened weight and its SVD), without the terms of m^2 if the metric has no output side.
        """
        m, n = self.extent.shapes[name]
        outputs = m * m if self.config.watches_outputs is not None else 0
        return max(20 * n * n, 8 * n * n + 20 * outputs, 8 * (n * n + outputs) + 26 * m * n + 30 * min(m, n) ** 2)

    @property
    def spectra(self) -> int:
        """Bytes of the spectra of all layers: 4 sum r (m + n + 1)."""
        return self.wide * sum(min(m, n) * (m + n + 1) for m, n in self.extent.shapes.values())

    @cached_property
    def stored_spectra(self) -> int:
        """Bytes of the spectra in scratch files: of the components that truncation may keep; see `stored_components`.

        4 sum k (m + n + 1) with the highest payable rank k.
        """
        stored = stored_components(self.config, self.budget)
        ranks = {name: min(m, n) for name, (m, n) in self.extent.shapes.items()} if stored is None else stored
        return self.wide * sum(ranks[name] * (m + n + 1) for name, (m, n) in self.extent.shapes.items())

    @property
    def originals(self) -> int:
        """Bytes of the weights before the first truncation: w sum m n."""
        return self.extent.width * sum(m * n for m, n in self.extent.shapes.values())

    @cached_property
    def factors(self) -> int:
        """Bytes of the factors of all layers: w sum k (m + n), or 4 sum k (m + n) if pivots are chosen from them."""
        width = self.wide if self.config.form.has_pivots else self.extent.width
        budget, known = self.budget, dict[tuple[Any, ...], int]()
        numbers = 0
        for name, shape in self.extent.shapes.items():
            alike = (shape, budget.present.get(name))
            if alike not in known:
                share = (1 - budget.prune_ratio) * budget.reference(name)
                k = bisect_right(budget.costs(name), share + 1e-9) - 1
                known[alike] = k * sum(shape) if budget.is_low_rank(name, k) else 0
            numbers += known[alike]
        return width * numbers

    @property
    def new_layers(self) -> int:
        """Bytes of the low-rank layers: w times the numbers that the budget allows."""
        dense = sum(dense_weight(m, n).wide for m, n in self.extent.shapes.values())
        return round(self.extent.width * dense * (1 - self.config.prune_ratio))

    @property
    def sets_of_factors(self) -> int:
        """Number of sets of factors at once: those of the best state, of the present and of the next."""
        return min(3, 1 + self.rounds)

    @property
    def rounds(self) -> int:
        """Number of truncations after the first."""
        return max(self.config.corrections, self.config.truncations - 1)

    @property
    def kept_roots(self) -> int:
        """Bytes of the roots of second moments that corrections use again: 4 (sum n^2 + sum m^2).

        They are kept while there is room for them, and never if anything is offloaded.
        """
        config = self.config
        keeps = config.corrections > 0 and not config.fresh_moments and not config.refits
        direct = config.weighs_rows or self.budget.chooses_bits  # these use roots in float64
        keeps &= config.metric_used.of_second_moments and not direct
        return self.second_moments(self.extent.shapes) if keeps else 0

    @property
    def kept_moments(self) -> int:
        """Bytes of the statistics that later steps need after the first truncation."""
        every = self.extent.shapes
        if not self.config.corrections:
            return 0
        second = self.config.correction.truncates or not self.config.fresh_moments
        return self.gradients(every) + (self.second_moments(every) if second else 0)

    @property
    def disk(self) -> int:
        """Bytes of the scratch files of `memory: blocks` at their peak.

        Spectra grow while hidden states are removed. Truncation reads the spectra and adds originals and factors.
        """
        config, every, stored = self.config, self.extent.shapes, self.extent.stored
        kept = self.second_moments(every) if config.corrections and not config.fresh_moments else 0
        sweep = stored + self.stored_spectra + kept
        truncation = self.stored_spectra + self.originals + self.factors + kept
        return max(sweep, truncation, self._disk_of_corrections if config.corrections else 0)

    @property
    def _disk_of_corrections(self) -> int:
        every, stored, spectra = self.extent.shapes, self.extent.stored, self.stored_spectra
        beside = self.originals + self.sets_of_factors * self.factors
        if self.config.correction.truncates or not self.config.fresh_moments:
            return beside + self.second_moments(every) + self.gradients(every) + max(stored, spectra)
        step = self.originals + self.factors + self.gradients(every) + stored
        return max(step, beside - self.factors + stored + spectra, beside + spectra)

    @property
    def folder(self) -> int:
        """Bytes of the folder for an interrupted run at their peak, while the state after a stage is written.

        The blocks of the sweep are in it then, and the state after the stage before.
        """
        config, every = self.config, self.extent.shapes
        kept = self.second_moments(every) if config.corrections and not config.fresh_moments else 0
        state = self.originals + 2 * self.factors + kept  # those of the present and of the best state
        side = config.watches_outputs
        sent = 1 if side is None or OUTPUT_GRADIENTS[side] is None else 2  # gradients of the loss, and drawn ones
        passed = 2 * sent * self.extent.stored // max(1, len(self.extent.blocks) - 1)  # those before are there too
        first = self.stored_spectra + kept + passed
        later = max(self.stored_spectra, self.kept_moments) + passed
        return max(first + state, later + 2 * state if self.rounds else 0)

    def needs(self, *, roots: bool = True) -> Needs:
        """Return the needs of the settings: their `memory` and `offload`, where `auto` is `whole` and `none`.

        Args:
            roots: False to count none of the roots that are kept while there is room.
        """
        return self._blocks() if self.config.by_blocks else self._whole(roots)

    def _whole(self, roots: bool) -> Needs:
        """Return the needs of `memory: whole`."""
        place, times = self.config.place, self._times()
        kept = self.kept_roots if roots and place == "none" else 0
        if place == "none":
            with_roots = [time.device + time.held + kept for time in times]
            device, host = max(with_roots), max(time.spectra for time in times)
            together = max(size + time.spectra for size, time in zip(with_roots, times, strict=True))
            return self._of(device, host, together, 0)
        on_device = max(time.device for time in times)
        moved = max(time.held + time.spectra for time in times)
        if place == "disk":
            return self._of(on_device, self.largest_statistic, on_device, moved)
        return self._of(on_device, moved, max(sum(time) for time in times), 0)

    @property
    def largest_statistic(self) -> int:
        """Bytes of the largest sum of a layer, which a batch is added to: 4 max(n^2, m n, m^2)."""
        outputs = self.config.watches_outputs is not None
        shapes = self.extent.shapes.values()
        return self.wide * max(max(n * n, m * n, m * m if outputs else 0) for m, n in shapes)

    def _times(self) -> list[_Moment]:
        """Return what is in use at each time of the whole way, of which any may be the peak."""
        extent, every, P = self.extent, self.extent.shapes, self.spectra
        statistics = self.second_moments(every) + self.gradients(every)
        backward = extent.whole_pass + extent.width * max(m * n for m, n in every.values())
        decomposed, sets = max(map(self.decomposition, every)), self.sets_of_factors
        if self.config.place != "none":  # what is offloaded comes back one layer at a time
            backward += self.largest_statistic
            decomposed = max(
                self.decomposition(name) + self.second_moments([name]) + self.gradients([name]) for name in every
            )
        truncated = self.originals + sets * self.factors
        before = self.originals + (sets - 1) * self.factors
        later = self.kept_moments if self.config.refits else statistics
        on_device = 0
        times = [_Moment(backward, statistics), _Moment(decomposed, statistics, P)]
        if self.config.reestimate:
            on_device = P if self.config.place == "none" else 0
            times.append(_Moment(backward + on_device, self.gradients(every), P))
        times += [
            _Moment(on_device, statistics + self.originals + self.factors, P),
            _Moment(self.new_layers, truncated),
        ]
        if self.rounds:
            times += [
                _Moment(backward, later + before),
                _Moment(decomposed, later + before, P),
                _Moment(0, later + truncated, P),
            ]
        return times

    def _blocks(self) -> Needs:
        """Return the needs of `memory: blocks`."""
        extent, times = self.extent, [self.extent.part_pass]
        for names in extent.blocks:
            of_block = self.second_moments(names) + self.gradients(names)
            gradients = extent.width * sum(m * n for m, n in (extent.shapes[name] for name in names))
            largest = max((self.decomposition(name) for name in names), default=0)
            times += [of_block + gradients + extent.part_pass, of_block + largest]
        together = max(times)
        if extent.mapped:  # new layers take memory, where those of other models take that of the weights they replace
            together = max(together + max(extent.mapped), self.new_layers) - sum(extent.mapped)
        return self._of(max(times), 0, together, self.disk)._replace(folder=self.folder)

    def _of(self, device: int, host: int, together: int, disk: int) -> Needs:
        """Return needs, given those beside the weights, the program and what else is on the device.

        In one memory, these may be less than 0 where not all weights are resident.
        """
        weights, (state, parks) = self.extent.weights, self.extent.beside
        away, away_from_cpu = (parked_in(parks, self.config.place, on_cpu=on_cpu) for on_cpu in (False, True))
        return Needs(
            weights + (max(device, state) if away else device + state),
            PROGRAM + host + (state if away == "cpu" else 0),
            PROGRAM + weights + (max(together, state) if away_from_cpu else together + state),
            disk + (state if away == "disk" else 0),
        )


def stored_components(config: CompressionConfig, budget: Budget) -> Mapping[str, int] | None:
    """Return the number of components of each layer whose factors a sweep stores; None for all.

    No low-rank form has more of them, unless a rule keeps others than the largest. The curvature is measured along all.
    """
    largest = config.plan is not None or config.rule.keeps_largest
    return budget.most_components if largest and not config.reestimate else None
