"""Parts of a backward sweep that are finished: blocks and regions, kept in a folder in case the run is interrupted."""

from collections.abc import Mapping
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from zssvd_lightning._contexts import random_states, set_random_states
from zssvd_lightning.distributed import LayerSet
from zssvd_lightning.errors import CalibrationError
from zssvd_lightning.serialization.integrity import add_to_digest
from zssvd_lightning.serialization.unfinished import UnfinishedFolder
from zssvd_lightning.whitening.moments import Moments

if TYPE_CHECKING:
    from zssvd_lightning.sweep.forward import SharedState

BEGIN, GRADIENTS, PASSES = "begin", "gradients", "passes"
"""Names in the folder: the states of random number generators before the forward passes, the gradients at the boundary
that is reached, and the digest of the forward passes."""


class Findings(Protocol):
    """Result of the statistics of parts."""

    def state_of(self, part: LayerSet) -> dict[str, Any]:
        """Return what was found of some layers, as plain types and tensors."""

    def take_up(self, part: LayerSet, state: Mapping[str, Any]) -> None:
        """Add what an interrupted run has found of some layers: its `state_of`."""


class FinishedParts:
    """Parts of one backward sweep, in the order in which they come.

    Args:
        folder: folder whose entries of parts are all of this sweep.
        findings: what the statistics of parts are used for; None if they are only gathered.

    Attributes:
        count: number of parts that an interrupted run has finished.
        begins: states of random number generators before the forward passes; empty before `begin`.
    """

    def __init__(self, folder: UnfinishedFolder, findings: Findings | None) -> None:
        self._folder, self._findings = folder, findings
        self.count = sum(entry.startswith("part ") for entry in folder.entries)
        self.begins: dict[str, Any] = {}
        self._next, self._passes = 0, sha256()

    def begin(self) -> None:
        """Note the states of random number generators, or set them to those before the passes of the interrupted run.

        Call it before the first batch is read.
        """
        if self.count:
            set_random_states(self._folder.load(BEGIN))
        self.begins = random_states()

    def note(self, *values: Tensor | str | None) -> None:
        """Add what backward passes depend on to the digest of the forward passes."""
        for value in values:
            if isinstance(value, Tensor):
                add_to_digest(self._passes, value)
            else:
                self._passes.update(str(value).encode())

    def refuse_other_passes(self) -> None:
        """Raise CalibrationError if the forward passes differ from those of the interrupted run."""
        before = self._folder.facts.get(PASSES)
        if self.count and before != self._passes.hexdigest():
            raise CalibrationError(
                "the batches give other hidden states, losses or gradients than in the interrupted run whose finished "
                f"blocks are in {self._folder.path}; give the same batches in the same order and the same functions, "
                "or delete that folder to begin again"
            )

    def take_up(self, of: "SharedState", layers: LayerSet) -> bool:
        """Take up the next part if the interrupted run has finished it; return False if not."""
        if self._next >= self.count:
            return False
        state = self._folder.load(f"part {self._next}")
        self._next += 1
        if self._findings is not None:
            self._findings.take_up(layers, state["findings"])
        of.statistics.free_widths.take_up(state["widths"])
        of.absorb(Moments(**_on_devices(state["moments"], layers)))
        if self._next == self.count:
            of.gradients.load_state_dict(self._folder.load(GRADIENTS))
            set_random_states(state["random"])
        return True

    def keep(self, of: "SharedState", layers: LayerSet, moments: Moments) -> None:
        """Keep a part that is finished, and the gradients that the next ones need.

        Raises:
            OutputError: the folder cannot be written, as on a full disk.
        """
        state = {
            "findings": None if self._findings is None else self._findings.state_of(layers),
            "widths": of.statistics.free_widths.progress(),
            "moments": moments.state_dict() | {kind: dict(getattr(moments, kind)) for kind in _SUMS},
            "random": random_states(),
        }
        begin = {} if BEGIN in self._folder.entries else {BEGIN: self.begins}
        self._folder.commit(
            {f"part {self._next}": state, GRADIENTS: of.gradients.state_dict(), **begin},
            facts={PASSES: self._passes.hexdigest()},
        )
        self._next += 1


_SUMS = ("input_sums", "gradient_sums", "output_sums", "component_sums")


def _on_devices(moments: Mapping[str, Any], layers: LayerSet) -> dict[str, Any]:
    """Return the fields of `Moments` with each sum on the device of its layer."""
    moved = {
        kind: {name: total.to(layers[name].weight.device) for name, total in moments[kind].items()} for kind in _SUMS
    }
    device = next((target.weight.device for target in layers.values()), None)
    removals = {name: sums if device is None else sums.to(device) for name, sums in moments["removal_sums"].items()}
    return {**moments, **moved, "removal_sums": removals}
