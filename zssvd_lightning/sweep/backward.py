"""Backward sweep: blocks and regions run again, from the last to the first, each on all batches."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zssvd_lightning._resources import counted
from zssvd_lightning.calibration.contexts import gradients_only_at
from zssvd_lightning.calibration.gradients import collect_gradients, send_back_drawn
from zssvd_lightning.calibration.hooks import Observation
from zssvd_lightning.distributed import LayerSet
from zssvd_lightning.errors import CalibrationError
from zssvd_lightning.sweep.calls import HIDDEN, WHOLE, output_of, tensors_of
from zssvd_lightning.sweep.forward import ForwardSweep, SharedState, refuse_gradients
from zssvd_lightning.sweep.records import DRAWN, LOSS, Batch, Receiver
from zssvd_lightning.sweep.seal import Seal, Step
from zssvd_lightning.whitening.moments import Moments

SAME = 1e-3
"""Largest difference of the output of a block that runs again, relative to its largest number."""


class BackwardSweep:
    """Backward passes through blocks and regions, from the last to the first."""

    def __init__(self, forward: ForwardSweep, progress: bool) -> None:
        self._of, self._structure, self._progress = forward, forward.structure, progress

    def run(self) -> None:
        """Send the gradients of all batches back to the first layer that needs them."""
        self._of.sides.forget()
        last = self._structure.outside(len(self._structure.chains))
        self._part(last, lambda layers: self._of.last_region)
        self._of.last_region = Moments()
        for chain in reversed(range(len(self._structure.chains))):
            self._through_chain(chain)
            if self._structure.has_layers_up_to(chain):
                self._part(self._structure.outside(chain), partial(self._through_region, chain))

    def _through_chain(self, chain: int) -> None:
        of, names = self._structure.chains[chain], list(self._structure.chains[chain].blocks)
        below = self._structure.has_layers_up_to(chain)
        numbers = reversed(range(len(of)))
        for number in counted(numbers, f"blocks of {of.name}", len(of), "block", shown=self._progress):
            passes_on = below or any(self._structure.inside[name] for name in names[:number])
            if passes_on or self._structure.inside[names[number]]:
                step, name = (chain, number), names[number]
                through = partial(self._through_block, step, name, of.blocks[name], passes_on, below)
                self._part(self._structure.inside[name], through)
            self._of.hidden.close((chain, number + 1))
            self._of.gradients.close((chain, number))

    def _part(self, names: Iterable[str], gathered: Callable[[LayerSet], Moments]) -> None:
        """Put away the statistics of some layers: those that an interrupted run has finished, or those gathered now."""
        layers = self._of.layers_of(names)
        if self._of.finished is None or not self._of.finished.take_up(self._of, layers):
            self._of.put_away(layers, gathered(layers))

    def _through_block(
        self, step: Step, name: str, block: nn.Module, passes_on: bool, below: bool, layers: LayerSet
    ) -> Moments:
        """Run a block again on all batches, and send the gradients of its output back through it."""
        of, (chain, number), moments = self._of, step, Moments()
        before = (chain, number - 1) if passes_on else None
        for batch in of.batches:
            receiver = Receiver(of.gradients, batch)
            tensors = _Arguments(of, batch, step, receiver, before, below)
            with torch.enable_grad(), of.observing(block, layers, moments, batch.masks) as observation:
                args, kwargs = batch.calls[step].with_tensors(tensors)
                with batch.calls[step].autocasting:
                    output = output_of(name, block(*args, **kwargs))
                observation.forward_done()
                if batch.number == 0:
                    _refuse_other(name, output, of.hidden.get((chain, number + 1), "0"))
                outputs = [(output, of.gradients.at(step, batch))]
                self._send_back(observation, layers, outputs, tensors.leaves, receiver)
                collect_gradients(layers, moments, batch.terms)
        of.gradients.close(step)
        return moments

    def _through_region(self, chain: int, layers: LayerSet) -> Moments:
        """Run the model again up to a chain, and send the gradients of its inputs back to the chain before."""
        of, moments = self._of, Moments()
        for batch in of.batches:
            receiver = Receiver(of.gradients, batch)
            with (
                torch.enable_grad(),
                of.observing(of.statistics.model, layers, moments, batch.mask) as observation,
                gradients_only_at(of.statistics.model, of.layers),
                _UpTo(chain, of, receiver) as stopped,
            ):
                try:
                    batch.loss()
                except _StoppedError:
                    observation.forward_done()
                inputs = dict(zip(batch.calls[chain, 0].slots, stopped.inputs, strict=True))
                outputs = [(t, of.gradients.at(("into", chain, slot), batch)) for slot, t in inputs.items()]
                self._send_back(observation, layers, outputs, list(stopped.leaves.values()), receiver)
                collect_gradients(layers, moments, batch.terms)
                refuse_gradients(of.layers)
        for slot in {slot for batch in of.batches for slot in batch.calls[chain, 0].slots}:
            of.gradients.close(("into", chain, slot))
        return moments

    def _send_back(
        self,
        observation: Observation,
        layers: LayerSet,
        outputs: Sequence[tuple[Tensor, Callable[[str], Tensor | None]]],
        leaves: Sequence[Tensor],
        receiver: Receiver,
    ) -> None:
        """Send gradients back from `outputs` to layers and leaves: first the drawn ones, then those of the loss."""
        draws = self._of.draws
        weights = [target.module.weight for target in layers.values()]
        for sent, weight in ((DRAWN, 1.0 if draws else None), (LOSS, None if draws else receiver.batch.terms)):
            found = [(t, g) for t, of in outputs if t.requires_grad and (g := of(sent)) is not None]
            if not found:
                continue
            tensors, gradients = zip(*found, strict=True)
            receiver.sent = sent
            observation.take_outputs(weight)
            terms = receiver.batch.terms
            observation.removal_weights = (0.0, 1.0) if sent == DRAWN else (terms, 0.0 if draws else terms)
            if sent == DRAWN:
                send_back_drawn(tensors, [*leaves, *weights], gradients)
            else:
                torch.autograd.backward(tensors, gradients)


class _Arguments:
    """Tensors of the call of a block, by the number of their slot.

    Attributes:
        leaves: tensors whose gradients are received.
    """

    def __init__(
        self, of: SharedState, batch: Batch, step: Step, receiver: Receiver, before: Hashable | None, below: bool
    ) -> None:
        self.leaves: list[Tensor] = []
        self._of, self._batch, self._step = of, batch, step
        self._receiver, self._before, self._below = receiver, before, below
        self._known: dict[int, Tensor] = {}

    def __call__(self, slot: int) -> Tensor:
        """Return the tensor of a slot, the same one each time."""
        if slot not in self._known:
            self._known[slot] = self._hidden() if slot == HIDDEN else self._side(slot)
        return self._known[slot]

    def _hidden(self) -> Tensor:
        found = self._of.hidden.get(self._step, str(self._batch.number))
        if found is None:
            raise RuntimeError("the hidden states of a block were not stored")
        return self._leaf(found, self._before)

    def _side(self, slot: int) -> Tensor:
        tensor = self._of.sides.read(self._batch.sides[slot])
        if slot not in self._batch.differentiable:
            return tensor
        return self._leaf(tensor, ("into", self._step[0], slot) if self._below else None)

    def _leaf(self, tensor: Tensor, key: Hashable | None) -> Tensor:
        leaf = tensor.requires_grad_()
        if key is not None:
            leaf.register_hook(partial(self._receiver.receive, key))  # type: ignore[no-untyped-call]
            self.leaves.append(leaf)
        return leaf.clone()  # not a leaf, so that blocks may change it in place


class _StoppedError(BaseException):
    """Signal that a forward pass has come as far as it must. No `Exception`, which the caller of a model may catch."""


class _UpTo(Seal):
    """Seal that stops at the first block of a chain, whose arguments are then in `inputs`."""

    def __init__(self, chain: int, of: SharedState, receiver: Receiver) -> None:
        super().__init__(*of.seal_arguments())
        self.inputs: list[Tensor] = []
        self._chain, self._receiver = chain, receiver

    def enter(self, step: Step, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Stop at the chain."""
        if step == (self._chain, 0):
            self.inputs = tensors_of((args, dict(kwargs)))
            raise _StoppedError

    def receive(self, step: Step, gradient: Tensor) -> None:
        """Add a gradient to that of the output of a block."""
        self._receiver.receive(step, gradient)


def _refuse_other(name: str, output: Tensor, first: Tensor | None) -> None:
    """Raise CalibrationError if a block returns something else than in the forward sweep."""
    if first is None:
        raise RuntimeError(f"the output of {name} was not stored")
    difference = float((output.detach() - first).abs().max())
    if difference > SAME * float(first.abs().max()):
        raise CalibrationError(
            f"{name} returns other numbers when it runs again (up to {difference:.3g}), so it depends on more than its "
            f"arguments, such as random numbers or a state; {WHOLE}"
        )
