"""Correction steps of a compression. Each changes the truncated weights in place, given the statistics since then."""

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from zssvd_lightning._numerics import accumulated, exact_products
from zssvd_lightning.calibration.recorded_calls import together
from zssvd_lightning.compression.course import Act
from zssvd_lightning.compression.safeguard import State
from zssvd_lightning.correction.batch_norms import NORM, SumsBehind, set_statistics, total
from zssvd_lightning.correction.paired_forward import run_side_by_side
from zssvd_lightning.correction.refit import Refit
from zssvd_lightning.correction.steps import (
    best_fraction,
    linear_decay,
    natural_lengths,
    projected_step,
    trusted_radius,
)
from zssvd_lightning.decomposition.decompose import gradient_squares
from zssvd_lightning.distributed import LayerSet
from zssvd_lightning.errors import ConfigError, NonFiniteError
from zssvd_lightning.layers.apart.convolutions import unfolded
from zssvd_lightning.layers.apart.grouped import grouped
from zssvd_lightning.layers.base import CompressedLinear
from zssvd_lightning.whitening.spectrum import Step

if TYPE_CHECKING:
    from zssvd_lightning.compression.engine import Compression

logger = logging.getLogger(__name__)

ATTEMPTS = 4
"""Number of lengths at which a natural step is tried before it is left out."""


LONGEST = 2.0
"""Bound of the length of later natural steps in a layer, relative to its first step."""


CorrectionStep = Callable[["Compression"], None]
"""Function that changes the weights of a compression in place."""


def carry_out(compression: "Compression", step: CorrectionStep) -> None:
    """Complete the statistics since the last stage and take a correction step with them; see `Compression.correct`."""
    run = compression
    if not run.originals:
        raise RuntimeError("correct() needs a truncate() before it")
    with run.stopwatch("correct"):
        run.gathering.complete()
    truncates, done = run.config.correction.truncates, run.truncations
    if step not in (descend, refit):  # these change what they truncate alone
        run.originals.keep()
    run.may_truncate = truncates
    try:
        step(run)
    finally:
        run.may_truncate = True
    if run.truncations != done + truncates:
        raise ConfigError(f"{step_name(run)} states truncates=True, so it must call truncate() once")
    refuse_non_finite(run.targets, step_name(run))


def step_name(compression: "Compression") -> str:
    """Return the setting of the correction step, for error messages."""
    return f"correction_step {compression.config.correction_step!r}"


def projected(compression: "Compression") -> None:
    """Take one projected gradient step per matrix from the truncated toward the original weights."""
    gathering, over_rows = compression.gathering, compression.team.over_rows
    with compression.stopwatch("correct"):
        slopes = []
        for name, target in compression.reached.items():
            g = gathering.mean_gradient(name)
            W = target.weight.to(accumulated(target.weight.dtype))
            stepped = projected_step(W, compression.originals[name], g, over_rows)
            slopes.append((g * (stepped - W)).sum())
            target.assign(stepped)
        slope = float(over_rows(torch.stack(slopes).sum()))
        compression.last_step = (gathering.moments.mean_loss, slope)
        compression.fractions.append(1.0)


def shorten_step(compression: "Compression") -> None:
    """Scale the last projected step to the estimated minimum of the loss, given the loss after the full step."""
    if compression.last_step is None:
        raise RuntimeError("shorten_step() needs a projected() before it")
    with compression.stopwatch("correct"):
        fraction = best_fraction(*compression.last_step, compression.gathering.moments.mean_loss)
        for name in compression.truncated:
            target = compression.targets[name]
            target.assign(torch.lerp(compression.truncated.truncated(name), target.weight, fraction))
        compression.last_step = None
        compression.fractions[-1] = fraction


def descend(compression: "Compression") -> None:
    """Take one projected step per matrix along the natural gradient at the truncated weights, then truncate.

    The gradient and the projection are computed in the coordinates of the metric, where step and truncation happen
    together. `natural_lengths` sets the lengths at the first step; they then decay by `linear_decay`. A step that
    raises the loss on the batches kept back is taken back and repeated at a quarter of its length
    (Levenberg-Marquardt).
    """
    config, guard, done = compression.config, compression.safeguard, compression.truncations
    if compression.first_steps is None:
        compression.first_steps = _first_steps(compression)
    part = linear_decay(compression.rounds, config.corrections)
    compares = guard is not None and guard.compares(compression)
    before = State.of(compression)
    for _ in range(ATTEMPTS):
        trust = part if guard is None else part * guard.trust
        compression.truncate({name: step.shortened(trust) for name, step in compression.first_steps.items()})
        compression.truncations = done + 1
        if guard is None or not compares or guard.accepts(compression):
            return
        before.put_into(compression)
        compression.truncations = done
    compression.truncations = done + 1
    if guard is not None:
        guard.judged = compression.truncations


def _first_steps(compression: "Compression") -> dict[str, Step]:
    """Return the first natural step of each layer. Collective."""
    with compression.stopwatch("correct"), exact_products():
        gathering, progress = compression.gathering, compression.progress
        squares = gradient_squares(compression.reached, gathering, compression.metric, progress=progress)
        radius = trusted_radius(compression.config.step_radius, compression.truncation_loss)
        factors = natural_lengths(_reaches(compression), squares, radius)
    return {name: Step(t, LONGEST * abs(t) * math.sqrt(squares[name])) for name, t in factors.items()}


def refit(compression: "Compression") -> None:
    """Fit each truncated weight in closed form to the outputs of its dense layer on the same batches, at its rank.

    Layers are fitted in order, given their current inputs after the refit of earlier layers; see `refitted_weight`.

    Raises:
        CalibrationError: the batches cannot be run again.
    """
    gathering, targets, originals = compression.gathering, compression.targets, compression.originals
    with compression.stopwatch("correct"), exact_products():
        layers = {name: targets[name] for name in compression.truncated if name not in compression.passed_over}
        calls, gathering.calls = gathering.calls, []
        with compression.team.together():
            call = together(calls)
        model = gathering.logits_model(compression.model)
        refit = Refit(targets, originals, gathering, compression.truncated, compression.metric)
        run_side_by_side(model, call, layers, originals, refit.meet)
    compression.truncations += 1


def refuse_non_finite(layers: LayerSet, step: str) -> None:
    """Raise NonFiniteError if a step has left a weight that is NaN or infinite. Collective."""
    with layers.team.together():
        for name, target in layers.items():
            if not target.weight.isfinite().all():
                raise NonFiniteError(f"{step} left a weight of {name} that is NaN or infinite")


def reestimate_batch_norms(compression: "Compression") -> None:
    """Estimate the running statistics of batch norms behind compressed convolutions again, if that lowers the loss.

    Half of the batches kept back in each process give the statistics, and the others judge them. Call it once the
    layers are replaced. Collective: all processes run as many batches, since forward passes may wait for each other.
    """
    run, guard = compression, compression.safeguard
    apart = [*grouped(run.model), *(module for _, module in unfolded(run.model))]
    layers = [layer for layer in apart if any(isinstance(part, CompressedLinear) for part in layer.modules())]
    if not layers or not any(isinstance(module, NORM) for module in run.model.modules()):
        return
    held = [] if guard is None else guard.batches
    counts = run.team.gathered(len(held))
    if guard is None or min(counts) < 2 or max(counts) > min(counts):
        logger.warning("batch norms keep the statistics of the dense model, as fewer than two batches are kept back")
        return
    judging, giving = held[::2], held[1::2]
    if (before := guard.mean_loss(run, judging)) is None:
        return
    measure = guard.measure
    try:
        with SumsBehind(run.model, layers) as behind:
            guard.measure = behind.in_each(measure)
            guard.mean_loss(run, giving)
    finally:
        guard.measure = measure
    every = run.team.gathered(behind.sums)
    names = list(dict.fromkeys(name for theirs in every for name in theirs))
    undo = set_statistics(run.model, {name: total([each[name] for each in every if name in each]) for name in names})
    try:
        after = guard.mean_loss(run, judging)
        better = after is not None and after < before
        final = guard.mean_loss(run) if better else None
    except BaseException:
        undo()
        raise
    if not better:
        undo()
    elif final is not None:
        guard.best = final
    if run.team.rank == 0 and names:
        logger.info(
            "estimated %d batch norms behind convolutions again: judged by a loss of %.4f before, %s after%s",
            len(names),
            before,
            "unknown" if after is None else f"{after:.4f}",
            "" if better else "; they are as they were",
        )


STEPS: dict[Act, CorrectionStep] = {
    Act.CORRECT: projected,
    Act.SHORTEN_STEP: shorten_step,
    Act.DESCEND: descend,
    Act.REFIT: refit,
}
"""Steps by their names in the course."""


def _reaches(compression: "Compression") -> dict[str, float]:
    """Return `<G, D>` of each layer, where D is the original minus the truncated weight. Collective."""
    products = []
    for name, target in compression.reached.items():
        g = compression.gathering.mean_gradient(name)
        products.append((g * (compression.originals[name].to(g) - target.weight.to(g))).sum())
    sums = compression.team.over_rows(torch.stack(products))
    return dict(zip(compression.reached, sums.tolist(), strict=True))
