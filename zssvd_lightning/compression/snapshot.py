"""State of a compression in a checkpoint: saving, checking and loading."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from zssvd_lightning.calibration.widths.free_widths import FreeWidths
from zssvd_lightning.compression import reach
from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.config.compression import CompressionConfig, settings_of_saved
from zssvd_lightning.config.placement import PLACES
from zssvd_lightning.decomposition.decompose import Decomposition
from zssvd_lightning.decomposition.trace import Trace
from zssvd_lightning.errors import CheckpointError
from zssvd_lightning.layers.storage import Shape
from zssvd_lightning.selection.components import Selection
from zssvd_lightning.whitening.rounding import Importance
from zssvd_lightning.whitening.spectrum import Spectrum, Step


def state_of(compression: Compression, *, statistics: bool = True, weights: bool = True) -> dict[str, Any]:
    """Return the state of a running compression as plain types and tensors, for `take_up`. Collective.

    The model's weights are not included. The team determines which process gets which tensors.

    Args:
        compression: the running compression.
        statistics: True to include the batches gathered so far. False restarts the current gathering.
        weights: True to include the original weights, and those that stand in for low-rank layers.
    """
    run = compression
    return {
        "config": asdict(run.config),
        "shapes": {name: list(shape) for name, shape in run.shapes.items()},
        "left_dense": dict(run.left_dense),
        "model_parameters": run.coverage.model_parameters,
        "gathering": run.gathering.state_dict(so_far=statistics),
        "widths": FreeWidths.of_all(run.team.gathered(run.gathering.free_widths.state_dict())).state_dict(),
        "originals": run.originals.state_dict() if weights else None,
        "stand_ins": _stand_ins_of(run) if weights else {},
        "factors": run.truncated.state_dict(),
        "narrowed": run.narrowed.state_dict(),
        "found": None if run.decomposition is None else run.decomposition.state_dict(run.targets),
        "selection": None if run.selection is None else run.selection.state_dict(),
        "importances": None
        if run.importances is None
        else {name: list(pair) for name, pair in run.importances.items()},
        "step": None if run.last_step is None else list(run.last_step),
        "lengths": None if run.first_steps is None else {name: list(step) for name, step in run.first_steps.items()},
        "losses": list(run.losses),
        "fractions": list(run.fractions),
        "truncations": run.truncations,
        "truncation_loss": run.truncation_loss,
        "trace": run.trace.to_dict(),
        "safeguard": None if run.safeguard is None else run.safeguard.state_dict(run, statistics=statistics),
        "seconds": dict(run.stopwatch.seconds),
    }


def take_up(compression: Compression, state: Mapping[str, Any]) -> None:
    """Continue from a `state_of` of a compression of the same model with the same settings.

    The number of processes may differ.

    Raises:
        CheckpointError: the settings or the target layers differ.
    """
    run = compression
    refuse_other(state, run.config, run.shapes)
    run.leave_dense(state.get("left_dense", {}))
    if state["found"] is not None:
        run.decomposition = Decomposition.of_state(state["found"], run.targets, run.store.tuples(Spectrum))
        run.gathering.spectra = run.decomposition.spectra
    run.gathering.load_state_dict(state["gathering"])
    run.gathering.free_widths.load_state_dict(state.get("widths", []))
    run.originals.load_state_dict(state["originals"])
    run.truncated.load_state_dict(state["factors"])
    for name, W in state.get("stand_ins", {}).items():
        run.targets[name].assign(W)
    run.selection = None if state["selection"] is None else Selection.of_state(state["selection"])
    if run.selection is not None:
        run.narrowed.load_state_dict(state.get("narrowed", {}), run.selection.narrowed)
    reach.forget_removed(run)
    if (found := state.get("importances")) is not None:
        run.importances = {name: Importance(*pair) for name, pair in found.items()}
    run.last_step = None if state["step"] is None else (state["step"][0], state["step"][1])
    run.first_steps = None if state["lengths"] is None else {n: _step(saved) for n, saved in state["lengths"].items()}
    run.truncations = state["truncations"]
    unknown = math.inf if run.truncations else 0.0  # steps are not bounded by a truncation of an earlier release
    run.truncation_loss = state.get("truncation_loss", unknown)
    if run.safeguard is not None and (run.truncations or state.get("safeguard") is not None):
        run.safeguard.load_state_dict(state.get("safeguard"), run)
    run.trace = Trace.of_dict(state.get("trace"))
    run.gathering.calls_to_record = run.calls_to_record
    run.losses, run.fractions = list(state["losses"]), list(state["fractions"])
    run.stopwatch.seconds = dict(state["seconds"])


def _stand_ins_of(run: Compression) -> dict[str, Tensor]:
    """Return the present weights of the layers that stand in for low-rank ones; empty before the first truncation.

    A checkpoint holds the low-rank layers in their place, so that it has the structure and optimizer of before.
    """
    if not run.originals:
        return {}
    return {name: run.targets[name].weight.cpu().clone() for name in run.budget.present}


def _step(saved: float | Sequence[float]) -> Step:
    return Step(*saved) if isinstance(saved, Sequence) else Step(saved)  # older checkpoints hold the factor alone


def put_back(compression: Compression, state: Mapping[str, Any]) -> None:
    """Restore the weights from before the compression whose state is `state`.

    Raises:
        CheckpointError: the state belongs to other layers.
    """
    if state["originals"] is not None:
        _refuse_other_layers(state, compression.shapes)
        compression.leave_dense(state.get("left_dense", {}))
        compression.originals.load_state_dict(state["originals"])
        compression.restore()


def refuse_other(
    state: Mapping[str, Any], config: CompressionConfig, shapes: Mapping[str, Shape] | None = None
) -> None:
    """Raise CheckpointError if a saved compression had other settings or other layers; `PLACES` may differ."""
    mine = asdict(config)
    saved = settings_of_saved(state["config"])
    differing = [
        f"{key} was {saved[key]!r} and is {mine[key]!r}"
        for key in mine
        if saved[key] != mine[key] and key not in PLACES
    ]
    if differing:
        raise CheckpointError(
            f"the checkpoint was taken in the middle of a compression with other settings ({'; '.join(differing)}); "
            "go on with the same, or start from a checkpoint of before it"
        )
    if shapes is not None:
        _refuse_other_layers(state, shapes)


def _refuse_other_layers(state: Mapping[str, Any], shapes: Mapping[str, Shape]) -> None:
    before = {name: tuple(shape) for name, shape in state["shapes"].items()}
    if before != dict(shapes):
        others = sorted(name for name in before.keys() | shapes.keys() if before.get(name) != shapes.get(name))
        raise CheckpointError(
            f"the checkpoint was taken in the middle of a compression of other layers: {len(others)} differ "
            f"({', '.join(others[:3])}); go on with the model it was taken of"
        )
