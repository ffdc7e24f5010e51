"""Checks of the state of a recovery in a checkpoint."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from zssvd_lightning._state_checks import (
    anything,
    entries,
    listed,
    mapped,
    number,
    optional,
    tensor,
    text,
    whole,
    yes_or_no,
)
from zssvd_lightning.errors import CheckpointError
from zssvd_lightning.recovery.run import RecoveryRun

RECOVERY = entries(
    {
        "settings": mapped(anything),
        "active": yes_or_no,
        "over": yes_or_no,
        "stage": whole,
        "began": whole,
        "horizon": optional(listed(optional(number), 3)),
        "were_trainable": listed(text),
        "teacher": mapped(anything),
        "stored": mapped(mapped(anything)),
        "first_step": whole,
        "steps": optional(whole),
        "judge": optional(
            entries(
                {
                    "batches": whole,
                    "start": number,
                    "best": number,
                    "best_step": whole,
                    "steps": whole,
                    "worse": whole,
                    "held": mapped(tensor),
                }
            )
        ),
    },
    ("stored", "first_step", "steps", "judge"),  # not in checkpoints of earlier releases
)
"""`RecoveryRun.state_dict`."""


def refuse_other_recovery(state: Mapping[str, Any] | None, mine: RecoveryRun | None) -> None:
    """Raise CheckpointError if a checkpoint was saved during another recovery, or after its recovery had ended.

    Args:
        state: state of the recovery in the checkpoint; None if the module's optimizer trained the factors.
        mine: the recovery that would continue.
    """
    if state is not None and state["over"]:
        raise CheckpointError(
            "the checkpoint was saved after its fit, when the recovery was over; go on from a checkpoint of the fit "
            "itself"
        )
    settings = None if mine is None else mine.settings.to_dict()
    saved = None if state is None or not state["active"] else _with_defaults(state["settings"], mine)
    if saved != settings and (saved is not None or state is None):
        raise CheckpointError(
            f"the checkpoint is of a training of the factors with recovery={saved}, and this callback has {settings}; "
            "go on with the same, or start from a checkpoint of before it"
        )


def _with_defaults(saved: Mapping[str, Any], mine: RecoveryRun | None) -> dict[str, Any]:
    """Return saved settings, with the defaults of those that the release that saved them did not have."""
    known = () if mine is None else fields(mine.settings)
    return {field.name: field.default for field in known if field.default is not MISSING} | dict(saved)
