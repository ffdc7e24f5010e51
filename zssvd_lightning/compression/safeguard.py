"""Loss on batches kept back, by which a compression takes back what made the model worse.

A compression measures the loss of the dense model, of the model after the first truncation and after every correction,
on the same few batches. The final model is the state with the smallest loss.
"""

import logging
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from zssvd_lightning.decomposition.factors import Factors, TruncatedWeights
from zssvd_lightning.errors import DivergedError
from zssvd_lightning.selection.components import Selection
from zssvd_lightning.whitening.rounding import Importance

if TYPE_CHECKING:
    from zssvd_lightning.compression.engine import Compression

logger = logging.getLogger(__name__)

KEPT_BACK = 8
"""Number of batches per process to keep back, if there are four times as many; a quarter of them otherwise."""


STANDARD_ERRORS = 2.0
"""Rise of the mean loss, in standard errors of its paired differences, from which a step counts as harmful."""


SHRINKAGE = 0.25
"""Factor of the length of natural steps after one was taken back. It doubles after each step that was not."""


LARGE_RISE = 0.5
"""Rise of the loss by the whole compression (nats) from which a warning is given."""


class State(NamedTuple):
    """Truncated weights of all layers, and what belongs to them."""

    factors: Mapping[str, Factors]
    selection: Selection | None
    importances: Mapping[str, Importance] | None

    @classmethod
    def of(cls, compression: "Compression") -> "State":
        """Return the present state of a compression. Factors are shared, not copied."""
        return cls(dict(compression.truncated.held), compression.selection, compression.importances)

    def put_into(self, compression: "Compression") -> None:
        """Set the weights of a compression to this state. Collective."""
        compression.truncated = TruncatedWeights(compression.targets, compression.config.storage)
        compression.truncated.held = dict(self.factors)
        for name, target in compression.targets.items():
            held = name in self.factors
            target.assign(compression.truncated.truncated(name) if held else compression.originals[name])
        compression.selection = self.selection
        compression.importances = None if self.importances is None else dict(self.importances)


class Safeguard:
    """Comparison of the states of one compression on the batches kept back.

    Args:
        measure: function that returns the mean loss of a batch and its number of terms at the present weights.

    Attributes:
        batches: batches kept back in this process, on the CPU.
        dense: mean loss of the dense model (nats); None before it was measured.
        truncated: mean loss after the first truncation to the whole prune ratio.
        best: smallest mean loss of a truncated state.
        taken_back: number of steps that were taken back.
        trust: factor of the length of natural steps.
    """

    def __init__(self, measure: Callable[[Any], tuple[float, float]]) -> None:
        self.batches: list[Any] = []
        self.dense: float | None = None
        self.truncated: float | None = None
        self.best = math.inf
        self.taken_back = 0
        self.trust = 1.0
        self._measure = measure
        self._losses: Tensor | None = None
        self._best_state: State | None = None

    @property
    def wants_batches(self) -> bool:
        """True before the first measurement, also of a resumed run."""
        return self.dense is None or self._losses is None

    def measure_dense(self, compression: "Compression") -> None:
        """Measure the loss before the first truncation. If the batches cannot be run again, warn and give up."""
        try:
            with compression.team.together():
                self.dense = _mean(self._measured(compression))
        except Exception as error:  # noqa: BLE001  user code that runs a second time
            compression.safeguard = None
            logger.warning(
                "calibration batches cannot be run again (%s: %s), so that corrections are not checked and may make "
                "the model worse; compare the loss before and after",
                type(error).__name__,
                error,
            )

    def accepts(self, compression: "Compression") -> bool:
        """Measure the present state. Return False if a step has raised the loss beyond noise, or to a value not finite.

        The losses of accepted states are those that the next state is compared with.
        """
        losses = self._measured(compression)
        if self._losses is not None and _is_worse(losses, self._losses):
            self.taken_back += 1
            self.trust *= SHRINKAGE
            logger.warning(
                "a step raised the loss on the batches kept back from %.4g to %.4g nats and was taken back",
                _mean(self._losses),
                _mean(losses),
            )
            return False
        self.trust = min(1.0, 2 * self.trust)
        self._consider(compression, losses)
        return True

    def start_from(self, compression: "Compression") -> None:
        """Measure the present and the best state again after a resume, so that all losses are of the same batches."""
        if self._losses is not None or self.truncated is None:
            return
        present, best = State.of(compression), self._best_state
        if best is not None:
            best.put_into(compression)
            self.best = _mean(self._measured(compression))
            present.put_into(compression)
        self._losses = self._measured(compression)

    def consider(self, compression: "Compression") -> None:
        """Measure the present state after a truncation, and keep it if it is the best so far.

        Raises:
            DivergedError: the loss after the first truncation is not finite.
        """
        self.start_from(compression)
        losses = self._measured(compression)
        if self.truncated is None and not math.isfinite(_mean(losses)):
            raise DivergedError(
                f"the loss on the batches kept back is {_mean(losses)} after the truncation (dense: {self.dense:.4g} "
                "nats); lower prune_ratio, or compress in float32 or bfloat16"
            )
        self._consider(compression, losses)

    def settle(self, compression: "Compression") -> None:
        """Return to the best state if the present one is another, and warn if the model has lost much."""
        self._go_back(compression)
        if self.dense is not None and self.best - self.dense > LARGE_RISE:
            logger.warning(
                "compression raised the loss on the batches kept back from %.4g to %.4g nats; lower prune_ratio, use "
                "preset='best', or train the factors (recovery)",
                self.dense,
                self.best,
            )

    def _go_back(self, compression: "Compression") -> None:
        if self._best_state is None or self._losses is None or _mean(self._losses) <= self.best:
            return
        logger.warning(
            "the loss on the batches kept back rose from %.4g to %.4g nats by corrections, which are taken back",
            self.best,
            _mean(self._losses),
        )
        self.taken_back += 1
        self._best_state.put_into(compression)

    def report(self) -> dict[str, float] | None:
        """Return the losses (nats) by state for the report; None if nothing was measured."""
        if self.dense is None or self.truncated is None:
            return None
        return {
            "batches": len(self.batches),
            "dense": self.dense,
            "truncated": self.truncated,
            "final": self.best,
            "taken_back": self.taken_back,
        }

    def state_dict(self, compression: "Compression", *, statistics: bool = True) -> dict[str, Any]:
        """Return plain types and tensors, in the form the team saves. Collective.

        Args:
            compression: the compression.
            statistics: False if the current gathering will be restarted, and with it the choice of batches.
        """
        kept = self.batches if statistics or self.dense is not None else []
        best = self._best_state
        factors = TruncatedWeights(compression.targets, compression.config.storage)
        factors.held = {} if best is None else dict(best.factors)
        return {
            "batches": [batches if _is_plain(batches) else [] for batches in compression.team.gathered(kept)],
            "dense": self.dense,
            "truncated": self.truncated,
            "best": self.best,
            "taken_back": self.taken_back,
            "trust": self.trust,
            "factors": None if best is None else factors.state_dict(),
            "selection": None if best is None or best.selection is None else best.selection.state_dict(),
            "importances": None
            if best is None or best.importances is None
            else {name: list(importance) for name, importance in best.importances.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], compression: "Compression") -> None:
        """Load a `state_dict`. Batches that could not be saved are to be kept back anew."""
        team, saved = compression.team, state["batches"]
        every = [batch for batches in saved for batch in batches]
        self.batches = saved[team.rank] if len(saved) == team.size else every[team.rank :: team.size]
        self.dense, self.truncated, self.best = state["dense"], state["truncated"], state["best"]
        self.taken_back, self.trust = state["taken_back"], state["trust"]
        if state["factors"] is not None:
            factors = TruncatedWeights(compression.targets, compression.config.storage)
            factors.load_state_dict(state["factors"])
            found = state["importances"]
            self._best_state = State(
                factors.held,
                None if state["selection"] is None else Selection.of_state(state["selection"]),
                None if found is None else {name: Importance(*pair) for name, pair in found.items()},
            )

    def _consider(self, compression: "Compression", losses: Tensor) -> None:
        self._losses, mean = losses, _mean(losses)
        if self.truncated is None:
            self.truncated = mean
        if mean < self.best:
            self.best, self._best_state = mean, State.of(compression)

    def _measured(self, compression: "Compression") -> Tensor:
        """Return loss and terms (b, 2) of every batch of all processes, in float64. Collective."""
        with compression.stopwatch("measure"):
            mine = [self._measure(batch) for batch in self.batches]
            every = [pair for theirs in compression.team.gathered(mine) for pair in theirs]
        return torch.tensor(every, dtype=torch.float64).reshape(-1, 2)


def number_to_keep_back(batches: float) -> int:
    """Return how many of the calibration batches to keep back.

    Example:
        >>> [number_to_keep_back(batches) for batches in (1, 4, 16, 1000)]
        [1, 1, 4, 8]
    """
    return int(max(1, min(KEPT_BACK, batches // 4)))


def _mean(losses: Tensor) -> float:
    """Return the mean loss over all terms of losses and terms (b, 2)."""
    loss, terms = losses.unbind(1)
    return float((loss * terms).sum() / terms.sum())


def _is_worse(losses: Tensor, before: Tensor) -> bool:
    """Return whether the mean loss is not finite, or risen by more than `STANDARD_ERRORS`."""
    if not losses.isfinite().all():
        return True
    terms = losses[:, 1]
    differences = losses[:, 0] - before[:, 0]
    rise = float((differences * terms).sum() / terms.sum())
    noise = float(differences.std() / math.sqrt(len(differences))) if len(differences) > 1 else 0.0
    return rise > STANDARD_ERRORS * noise


def _is_plain(value: Any) -> bool:
    """Return True for nested lists, tuples and dictionaries of tensors, numbers and strings, which checkpoints hold."""
    if type(value) is dict:
        return all(map(_is_plain, [*value.keys(), *value.values()]))
    if type(value) in {list, tuple}:
        return all(map(_is_plain, value))
    return value is None or type(value) in {Tensor, bool, int, float, str}
