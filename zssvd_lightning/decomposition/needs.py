"""Bytes that a compression takes on the device, on the host and on disk: the formulas of docs/scaling.md.

Notation: layers (m, n), r = min(m, n), w bytes per weight, rank k of a layer at its share of the budget.
"""

from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.layers.storage import dense_weight
from zssvd_lightning.selection.budget import Budget, Shape

PROGRAM = 600_000_000
"""Bytes of Python, torch, transformers and this package in host memory, with what the allocator does not give back."""

WIDE = 4
"""Bytes per number of statistics, spectra and scores, which are float32."""


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


class _Moment(NamedTuple):
    """Bytes in use at one time."""

    device: int
    host: int = 0


@dataclass(frozen=True)
class Extent:
    """Sizes of a model and of its calibration, from which the needs of a compression follow.

    Attributes:
        shapes: shape (m, n) of every target.
        leaders: target -> the first target that reads the same input.
        blocks: targets of each block, and last those outside of all blocks.
        weights: bytes of all weights of the model.
        width: bytes w of one weight.
        stored: bytes of the hidden states and other arguments of all blocks on all batches.
        whole_pass: bytes that a forward and backward pass of one batch through the whole model keeps.
        part_pass: the same through one block, or from the last block to the loss, whichever is larger.
    """

    shapes: Mapping[str, Shape]
    leaders: Mapping[str, str]
    blocks: tuple[Collection[str], ...]
    weights: int
    width: int
    stored: int = 0
    whole_pass: int = 0
    part_pass: int = 0

    @classmethod
    def of_layers(cls, shapes: Mapping[str, Shape], width: int) -> "Extent":
        """Return the extent of layers of which nothing else is known, as if each read an input of its own."""
        weights = width * sum(m * n for m, n in shapes.values())
        return cls(shapes, {name: name for name in shapes}, (tuple(shapes),), weights, width)


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

    def second_moments(self, names: Iterable[str]) -> int:
        """Return the bytes of `X^T X` and, if the metric needs it, `D^T D` of layers: 4 (sum n^2 + sum m^2)."""
        names, shapes = list(names), self.extent.shapes
        inputs = {self.extent.leaders[name]: shapes[name][1] for name in names}
        outputs = [shapes[name][0] for name in names] if self.config.watches_outputs is not None else []
        return WIDE * sum(side * side for side in [*inputs.values(), *outputs])

    def gradients(self, names: Iterable[str]) -> int:
        """Return the bytes of the summed gradients of layers: 4 sum m n."""
        return WIDE * sum(m * n for m, n in (self.extent.shapes[name] for name in names))

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
        return WIDE * sum(min(m, n) * (m + n + 1) for m, n in self.extent.shapes.values())

    @property
    def stored_spectra(self) -> int:
        """Bytes of the spectra in scratch files: of the components that truncation may keep; see `stored_components`.

        4 sum k (m + n + 1) with the highest payable rank k.
        """
        stored = stored_components(self.config, self.budget)
        ranks = {name: min(m, n) for name, (m, n) in self.extent.shapes.items()} if stored is None else stored
        return WIDE * sum(ranks[name] * (m + n + 1) for name, (m, n) in self.extent.shapes.items())

    @property
    def originals(self) -> int:
        """Bytes of the weights before the first truncation: w sum m n."""
        return self.extent.width * sum(m * n for m, n in self.extent.shapes.values())

    @property
    def factors(self) -> int:
        """Bytes of the factors of all layers: w sum k (m + n), or 4 sum k (m + n) if pivots are chosen from them."""
        width = max(WIDE, self.extent.width) if self.config.form.has_pivots else self.extent.width
        budget, numbers = self.budget, 0
        for name, (m, n) in self.extent.shapes.items():
            share = (1 - budget.prune_ratio) * budget.reference(name)
            k = bisect_right(budget.costs(name), share + 1e-9) - 1
            numbers += k * (m + n) if budget.is_low_rank(name, k) else 0
        return width * numbers

    @property
    def new_layers(self) -> int:
        """Bytes of the low-rank layers: w times the numbers that the budget allows."""
        dense = sum(dense_weight(m, n).wide for m, n in self.extent.shapes.values())
        return round(self.extent.width * dense * (1 - self.config.prune_ratio))

    @property
    def sets_of_factors(self) -> int:
        """Number of sets of factors at once: those of the best state, of the present and of the next."""
        return min(3, 1 + self.config.corrections)

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
    def whole(self) -> Needs:
        """Needs of `memory: whole`."""
        extent, every = self.extent, self.extent.shapes
        statistics = self.second_moments(every) + self.gradients(every)
        truncated = self.originals + self.sets_of_factors * self.factors
        times = [
            _Moment(statistics + self.originals + extent.whole_pass),  # gradients of a batch are as large as originals
            _Moment(statistics + max(map(self.decomposition, every)), self.spectra),
            _Moment(statistics + truncated, self.spectra),
            _Moment(truncated + self.new_layers),
        ]
        if self.config.corrections:
            decomposed = max(map(self.decomposition, every))
            times.append(_Moment(self.kept_moments + truncated + decomposed, self.spectra))
        return self._needs(times, 0)

    @property
    def blocks(self) -> Needs:
        """Needs of `memory: blocks`."""
        extent, times = self.extent, [_Moment(self.extent.part_pass)]
        for names in extent.blocks:
            of_block = self.second_moments(names) + self.gradients(names)
            gradients = extent.width * sum(m * n for m, n in (extent.shapes[name] for name in names))
            times.append(_Moment(of_block + gradients + extent.part_pass))
            largest = max((self.decomposition(name) for name in names), default=0)
            times.append(_Moment(of_block + largest))
        return self._needs(times, self.disk)

    def _needs(self, times: Iterable[_Moment], disk: int) -> Needs:
        times, weights = list(times), self.extent.weights
        return Needs(
            weights + max(time.device for time in times),
            PROGRAM + max(time.host for time in times),
            PROGRAM + weights + max(time.device + time.host for time in times),
            disk,
        )


def stored_components(config: CompressionConfig, budget: Budget) -> Mapping[str, int] | None:
    """Return the number of components of each layer whose factors a sweep stores; None for all.

    No low-rank form has more of them, unless a rule keeps others than the largest. The curvature is measured along all.
    """
    largest = config.plan is not None or config.rule.keeps_largest
    return budget.most_components if largest and not config.reestimate else None
