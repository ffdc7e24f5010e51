"""Loss on batches kept back, by which a compression takes back what made the model worse.

A compression measures the loss of the dense model, of the model after the first truncation and after every correction,
on the same few batches. The final model is the state with the smallest loss.
"""

import logging
import math
from collections.abc import Callable, Mapping, MutableMapping
from copy import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from zssvd_lightning.calibration.terms import check_terms
from zssvd_lightning.compression import reach
from zssvd_lightning.decomposition.factors import Factors, TruncatedWeights
from zssvd_lightning.errors import DivergedError
from zssvd_lightning.model.heads import chance_loss
from zssvd_lightning.selection.components import Selection
from zssvd_lightning.serialization.kept_batches import batches_of_saved, batches_to_save
from zssvd_lightning.whitening.rounding import Importance

if TYPE_CHECKING:
    from zssvd_lightning.compression.engine import Compression

logger = logging.getLogger(__name__)

STANDARD_ERRORS = 2.0
"""Rise of the mean loss, in standard errors of its paired differences, from which a step counts as harmful."""


SHRINKAGE = 0.25
"""Factor of the length of natural steps after one was taken back. It doubles after each step that was not."""


LARGE_RISE = 0.5
"""Rise of the loss by the whole compression (nats) from which a warning is given."""


LARGE_PART = 0.1
"""Such a rise relative to the loss of the dense model, for losses of another scale. The larger of both counts."""


DIVERGED = 10.0
"""Ratio of the losses after and before from which a model that has also lost `LARGE_RISE` counts as destroyed."""


NEAR_CHANCE = 0.03
"""Distance of the dense loss from that of guessing, relative to it, at which a model seems untrained."""


class State(NamedTuple):
    """Truncated weights of all layers, and what belongs to them."""

    factors: MutableMapping[str, Factors]
    selection: Selection | None
    importances: Mapping[str, Importance] | None

    @classmethod
    def of(cls, compression: "Compression") -> "State":
        """Return the present state of a compression. Factors are shared, not copied."""
        return cls(copy(compression.truncated.held), compression.selection, compression.importances)

    def put_into(self, compression: "Compression") -> None:
        """Set the weights of a compression to this state. Collective."""
        run = compression
        run.truncated = TruncatedWeights(run.targets, run.config.storage, copy(self.factors))
        run.truncated.put_into_model(lambda name: run.narrowed.put_back(name, run.originals))
        run.selection = self.selection
        reach.forget_removed(run)
        run.importances = None if self.importances is None else dict(self.importances)


class Safeguard:
    """Comparison of the states of one compression on the batches kept back.

    If batches cannot be run again, it warns and gives up: corrections are then not compared.

    Args:
        measure: function that returns the mean loss of a batch and its number of terms at the present weights.
        refuses: True to raise an error for a destroyed model; False to warn, where training follows.

    Attributes:
        measure, refuses: the arguments given.
        batches: copies of the batches kept back in this process.
        dense: mean loss of the dense model (nats); None before it was measured.
        truncated: mean loss of the first state with the whole prune ratio.
        best: smallest mean loss of a state with the whole prune ratio.
        taken_back: number of steps that were taken back.
        trust: factor of the length of natural steps.
        judged: number of truncations after which the present state was measured.
    """

    def __init__(self, measure: Callable[[Any], tuple[float, float]], *, refuses: bool = False) -> None:
        self.batches: list[Any] = []
        self.dense: float | None = None
        self.truncated: float | None = None
        self.best = math.inf
        self.taken_back = 0
        self.trust = 1.0
        self.judged = 0
        self.measure = measure
        self.refuses = refuses
        self._losses: Tensor | None = None
        self._best: tuple[State, Tensor | None] | None = None
        self._given_up = False

    @property
    def wants_batches(self) -> bool:
        """True until the dense model was measured."""
        return self.dense is None and not self._given_up

    def give_up(self, reason: object) -> None:
        """Warn that corrections are not compared, and do nothing from now on."""
        if not self._given_up:
            logger.warning(
                "the loss cannot be measured on batches kept back (%s), so that corrections are not checked and may "
                "make the model worse; compare the loss before and after",
                reason,
            )
        self._given_up, self.batches = True, []

    def check_terms(self, compression: "Compression") -> None:
        """Warn if the batches kept back show that the number of loss terms is wrong; see `check_terms`. Collective."""
        with compression.stopwatch("measure"):
            check_terms(self.measure, self.batches, compression.team)

    def measure_dense(self, compression: "Compression") -> None:
        """Measure the loss before the first truncation."""
        if (losses := self._measured(compression)) is None:
            return
        if not len(losses) or not losses.isfinite().all():
            self.give_up("there are no batches" if not len(losses) else f"it is {_mean(losses)} before truncation")
            return
        self.check_terms(compression)
        self.dense = _mean(losses)
        chance = chance_loss(compression.model)
        if chance is not None and abs(self.dense - chance) < NEAR_CHANCE * chance and compression.team.rank == 0:
            logger.warning(
                "the loss before compression is %.4g nats, and guessing gives %.4g, so the model seems untrained; "
                "compress a trained one, or start later in the fit, as with schedule=Schedule(start_epoch=1)",
                self.dense,
                chance,
            )

    def compares(self, compression: "Compression") -> bool:
        """Return True if the present state has the whole prune ratio and can be compared with the next. Collective.

        After a resume, the present and the best state are measured again.
        """
        if self._given_up or compression.truncations < compression.config.truncations:
            return False
        if self._losses is None and self.truncated is not None:
            present, best = State.of(compression), self._best
            if best is not None:
                best[0].put_into(compression)
                measured = self._measured(compression)
                self._best = None if measured is None else (best[0], measured)
                self.best = self.best if measured is None else _mean(measured)
                present.put_into(compression)
            self._losses = self._measured(compression)
        return self._losses is not None

    def accepts(self, compression: "Compression") -> bool:
        """Measure the present state. Return False if a step has raised the loss beyond noise, or to a value not finite.

        The losses of accepted states are those that the next state is compared with.
        """
        losses = self._measured(compression)
        if losses is None:
            return True
        if self._losses is not None and _is_worse(losses, self._losses):
            self.taken_back += 1
            self.trust *= SHRINKAGE
            compression.trace.measured(_mean(losses), taken_back=True)
            logger.warning(
                "a step raised the loss on the batches kept back from %.6g to %.6g nats and was taken back",
                _mean(self._losses),
                _mean(losses),
            )
            return False
        self.trust = min(1.0, 2 * self.trust)
        self._consider(compression, losses)
        return True

    def consider(self, compression: "Compression") -> None:
        """Measure the present state after a truncation, and keep it if it is the best so far.

        Raises:
            DivergedError: the loss of the first state with the whole prune ratio is not finite.
            NonFiniteError: neither are the factors of a layer.
        """
        if self._given_up:
            return
        if self.truncated is not None:
            self.compares(compression)
        if (losses := self._measured(compression)) is None:
            return
        if self.truncated is None and not losses.isfinite().all():
            compression.truncated.refuse_non_finite()  # which names the layer
            raise DivergedError(
                f"the loss on the batches kept back is {_mean(losses)} after the truncation (dense: {self.dense} "
                "nats); lower prune_ratio, or compress in float32 or bfloat16"
            )
        self._consider(compression, losses)

    def settle(self, compression: "Compression") -> None:
        """Return to the best state if the present one is another, and warn if the model has lost much.

        Raises:
            DivergedError: the model is destroyed, and no training follows; see `DIVERGED`.
        """
        if self._given_up or self._best is None or self._losses is None:
            return
        (state, best), present = self._best, self._losses
        if not _mean(present) <= self.best:
            if best is None or _is_worse(present, best):
                self.taken_back += 1
                logger.warning(
                    "corrections raised the loss on the batches kept back from %.6g to %.6g nats and were taken back",
                    self.best,
                    _mean(present),
                )
            state.put_into(compression)
        if self.dense is None or self.best - self.dense <= max(LARGE_RISE, LARGE_PART * abs(self.dense)):
            return
        rise = f"compression raised the loss on the batches kept back from {self.dense:.4g} to {self.best:.4g} nats"
        remedy = "lower prune_ratio, take preset 'best' if it was another, or train the factors (recovery)"
        if self.refuses and self.dense >= 0 and self.best >= DIVERGED * self.dense:
            raise DivergedError(f"{rise}; the model is as it was; {remedy}, in your own loop by refuse_diverged=False")
        logger.warning("%s; %s", rise, remedy)

    def mean_loss(self, compression: "Compression", batches: list[Any] | None = None) -> float | None:
        """Return the mean loss of the model on `batches`, by default all; None after giving up. Collective."""
        losses = self._measured(compression, batches)
        return None if losses is None or not len(losses) else _mean(losses)

    def report(self) -> dict[str, float] | None:
        """Return the losses (nats) by state for the report; None if they were not measured."""
        if self._given_up or self.dense is None or self.truncated is None:
            return None
        return {
            "batches": 0 if self._losses is None else len(self._losses),
            "dense": self.dense,
            "truncated": self.truncated,
            "final": self.best,
            "taken_back": self.taken_back,
        }

    def state_dict(self, compression: "Compression", *, statistics: bool = True) -> dict[str, Any] | None:
        """Return plain types and tensors, in the form the team saves; None if it has given up. Collective.

        Args:
            compression: the compression.
            statistics: False if the current gathering will be restarted, and with it the choice of batches.
        """
        if self._given_up:
            return None
        best = None if self._best is None else self._best[0]
        held = None if best is None else copy(best.factors)
        factors = TruncatedWeights(compression.targets, compression.config.storage, held)
        kept = self.batches if statistics or self.dense is not None else []
        return {
            "batches": compression.team.gathered(batches_to_save(kept)),
            "dense": self.dense,
            "truncated": self.truncated,
            "best": self.best,
            "taken_back": self.taken_back,
            "trust": self.trust,
            "judged": self.judged,
            "factors": None if best is None else factors.state_dict(),
            "selection": None if best is None or best.selection is None else best.selection.state_dict(),
            "importances": None
            if best is None or best.importances is None
            else {name: list(importance) for name, importance in best.importances.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any] | None, compression: "Compression") -> None:
        """Load a `state_dict`. Give up if the batches could not be saved, or there are too few for all processes."""
        if state is None:
            self.give_up("the checkpoint has none")
            return
        size, rank = compression.team.size, compression.team.rank
        every = [batch for batches in state["batches"] for batch in batches or []]
        each = len(every) // size
        self.batches = batches_of_saved(every[rank * each : (rank + 1) * each])
        self.dense, self.truncated, self.best = state["dense"], state["truncated"], state["best"]
        self.taken_back, self.trust, self.judged = state["taken_back"], state["trust"], state["judged"]
        if self.dense is not None and not each:
            self.give_up("the checkpoint has none: they are too large, of an unusual type, or too few for processes")
        elif state["factors"] is not None:
            factors = TruncatedWeights(
                compression.targets, compression.config.storage, compression.store.tuples(Factors)
            )
            factors.load_state_dict(state["factors"])
            found = state["importances"]
            best = State(
                factors.held,
                None if state["selection"] is None else Selection.of_state(state["selection"]),
                None if found is None else {name: Importance(*pair) for name, pair in found.items()},
            )
            self._best = best, None

    def _consider(self, compression: "Compression", losses: Tensor) -> None:
        self._losses, mean = losses, _mean(losses)
        compression.trace.measured(mean)
        self.judged = compression.truncations
        if self.truncated is None:
            self.truncated = mean
            if compression.team.rank == 0:
                logger.info("loss on the batches kept back: %.4f dense, %.4f after truncation", self.dense, mean)
        if mean < self.best:
            self.best, self._best = mean, (State.of(compression), losses)

    def _measured(self, compression: "Compression", batches: list[Any] | None = None) -> Tensor | None:
        """Return loss and terms (b, 2) of every batch of all processes; None after giving up. Collective."""
        if self._given_up:
            return None
        mine: list[tuple[float, float]] = []
        with compression.stopwatch("measure"):
            try:
                with compression.team.together():
                    mine = [self.measure(batch) for batch in (self.batches if batches is None else batches)]
            except Exception as error:  # noqa: BLE001  user code that runs a second time, without gradients
                self.give_up(f"{type(error).__name__}: {error}")
                return None
            every = [pair for theirs in compression.team.gathered(mine) for pair in theirs]
        return torch.tensor(every, dtype=torch.float64).reshape(-1, 2)


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
