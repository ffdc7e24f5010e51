"""Check of the callback's state in a checkpoint, before anything is loaded from it."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from zssvd_lightning._state_checks import (
    Check,
    FaultError,
    entries,
    fault,
    listed,
    number,
    optional,
    positive,
    text,
    whole,
)
from zssvd_lightning.compression.phase import GATHERING, Phase, phase_is_after
from zssvd_lightning.compression.snapshot import refuse_other
from zssvd_lightning.errors import CheckpointError
from zssvd_lightning.recovery.saved_state import RECOVERY, refuse_other_recovery
from zssvd_lightning.serialization.checkpoint_content import IMPORTANCES, check_compression
from zssvd_lightning.serialization.report_content import REPORT

if TYPE_CHECKING:
    from zssvd_lightning.callbacks.lifecycle import Lifecycle

VERSION = 3


SAVED = (Phase.WAIT, *GATHERING, Phase.RECOVER, Phase.DONE)
"""Phases that a checkpoint can be of."""


def _phase(value: Any, key: str) -> None:
    if not isinstance(value, str) or value not in SAVED:
        raise fault(key, value, f"one of {', '.join(SAVED)}")


LIFECYCLE = entries(
    {
        "phase": _phase,
        "position": whole,
        "calibration": listed(number, 2),
        "terms_unit": optional(positive),
        "batches_into_epoch": whole,
        "epoch_length": number,
        "first_losses": optional(listed(number)),
        "compression": optional(check_compression),
        "report": optional(REPORT),
        "recovery": optional(RECOVERY),
        "importances": IMPORTANCES,
    }
)
"""`Lifecycle.state_dict`."""


RUN = entries(
    {
        "allowance": entries({"steps": whole, "batches": whole, "epochs": whole}),
        "recovers_from": optional(whole),
    }
)
"""Entries that `CompressionRun.state_dict` adds."""


def refuse_damaged(check: Check, state: Any, key: str = "") -> None:
    """Raise CheckpointError, with the key and what it holds, if a state is not as it was written."""
    try:
        check(state, key)
    except FaultError as error:
        raise CheckpointError(
            f"the callback's state in the checkpoint is damaged: {error}; resume from another checkpoint, or start "
            "afresh"
        ) from error


def refuse_state(state: Any, mine: "Lifecycle", calibration: tuple[int, int]) -> None:
    """Raise CheckpointError unless a lifecycle can load a state.

    Args:
        state: the state in the checkpoint.
        mine: the lifecycle.
        calibration: its numbers of batches and epochs.
    """
    if not isinstance(state, Mapping) or "version" not in state:
        raise CheckpointError("the checkpoint holds no state of a ZSSVDCallback of this release; start afresh")
    refuse_damaged(entries({"version": whole}), state)
    if (version := state["version"]) != VERSION:
        advice = "upgrade zssvd-lightning" if version > VERSION else "go on with the release that wrote it"
        raise CheckpointError(
            f"the checkpoint holds callback state of version {version}, this release reads {VERSION}; {advice}"
        )
    refuse_damaged(LIFECYCLE, state)
    if phase_is_after(state):
        refuse_damaged(_after, state)
        _refuse_other_form(state, mine)
    if Phase(state["phase"]) in GATHERING:
        refuse_damaged(_gathering, state)
        refuse_other(state["compression"], mine.config)
        if tuple(state["calibration"]) != calibration:
            raise CheckpointError(
                "the checkpoint was taken in the middle of a compression with other settings (calibration_batches "
                f"and calibration_epochs were {state['calibration']} and are {list(calibration)}); go on with the "
                "same, or start from a checkpoint of before it"
            )
        phases = mine.phases
        if state["position"] >= len(phases) or phases[state["position"]] != state["phase"]:
            refuse_damaged(_at(phases), state["position"], "position")


def _after(state: Any, _: str) -> None:
    """Check that there is a report of a model that is low-rank."""
    if state["report"] is None:
        raise fault("report", None, f"the report, in phase {state['phase']}")
    compression = state["report"]["config"].get("compression")
    entries({"storage": text, "rows_in_16_bits": text})(compression, "report.config.compression")


def _gathering(state: Any, _: str) -> None:
    """Check that there is the state of the compression that gathers."""
    if state["compression"] is None:
        raise fault("compression", None, f"the state of the compression, in phase {state['phase']}")


def _at(phases: list[Phase]) -> Check:
    def checked(value: Any, key: str) -> None:
        raise fault(key, value, f"that of the phase, among {', '.join(phases)} from 0 on")

    return checked


def _last_stage(number: int) -> Check:
    def checked(value: Any, key: str) -> None:
        raise fault(key, value, f"below {number}, the number of stages")

    return checked


def _refuse_other_form(state: Mapping[str, Any], mine: "Lifecycle") -> None:
    """Raise CheckpointError if the model was compressed for another storage, or its factors are trained otherwise."""
    refuse_other_recovery(state["recovery"], mine.recovery)
    stages = () if mine.recovery is None else mine.recovery.settings.stages
    if state["recovery"] is not None and state["recovery"]["stage"] >= len(stages):
        refuse_damaged(_last_stage(len(stages)), state["recovery"]["stage"], "recovery.stage")
    compressed, settings = state["report"]["config"]["compression"], asdict(mine.config)
    for key in ("storage", "rows_in_16_bits"):
        if compressed[key] != settings[key]:
            raise CheckpointError(
                f"the checkpoint is of a model compressed for {key} {compressed[key]!r}, and this callback has "
                f"{settings[key]!r}; go on with the same"
            )


def refuse_rounded(checkpoint: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a checkpoint has layers in 8 bits."""
    if any(name.endswith(("_codes", ".codes")) for name in checkpoint.get("state_dict", {})):
        raise CheckpointError(
            "the checkpoint was saved after its fit, with layers in 8 bits, which are not trained; go on from a "
            "checkpoint of the fit itself"
        )
