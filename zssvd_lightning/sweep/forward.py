"""Forward sweep: the model runs once per batch, and what its blocks are called with is stored."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from zssvd_lightning._resources import trim_heap
from zssvd_lightning.calibration.batches import input_of
from zssvd_lightning.calibration.collector import StatisticsCollector
from zssvd_lightning.calibration.contexts import gradients_only_at
from zssvd_lightning.calibration.gradients import check_terms, checked_loss, collect_gradients
from zssvd_lightning.calibration.hooks import Observation, observing
from zssvd_lightning.calibration.masks import Masks, TokenMask
from zssvd_lightning.distributed import LayerSet
from zssvd_lightning.errors import CalibrationError
from zssvd_lightning.offload.pages import release_pages
from zssvd_lightning.offload.stores import Store
from zssvd_lightning.sweep.calls import WHOLE, BlockCall, tensors_of
from zssvd_lightning.sweep.chains import Structure, structure_of
from zssvd_lightning.sweep.finished import FinishedParts
from zssvd_lightning.sweep.records import DRAWN, LOSS, Batch, Gradients, Receiver, SideTensors, Streams
from zssvd_lightning.sweep.seal import Seal, Step
from zssvd_lightning.whitening.moments import Moments

Use = Callable[[LayerSet, Moments, Moments], None]
"""Function that uses the complete statistics of some layers, given the counts of all batches, before they are stored.

It may remove sums of which nothing else is needed."""


class SharedState:
    """State that both sweeps share: the statistics, the structure of the model, and what is stored of the batches."""

    def __init__(
        self,
        statistics: StatisticsCollector,
        layers: LayerSet,
        store: Store,
        inputs: bool,
        use: Use | None = None,
        finished: FinishedParts | None = None,
    ) -> None:
        self.statistics, self.layers, self.inputs, self.use = statistics, layers, inputs, use
        self.finished = finished
        self.hidden, self.gradients, self.sides = Streams(store), Gradients(store), SideTensors()
        self.batches: list[Batch] = []
        self.stored_hidden = 0
        self.structure = Structure([], {}, {})

    @property
    def draws(self) -> bool:
        """True if output gradients are drawn from the logits and sent back beside those of the loss."""
        return self.inputs and self.statistics.draw is not None

    def layers_of(self, names: Iterable[str]) -> LayerSet:
        """Return some of the target layers."""
        return self.layers.without(self.layers.keys() - set(names))

    @contextmanager
    def observing(
        self, model: nn.Module, layers: LayerSet, moments: Moments, mask: TokenMask | Masks
    ) -> Iterator[Observation]:
        """Observe layers in a model or block; see `hooks.observing`."""
        outputs = moments if self.inputs and self.statistics.output_side is not None else None
        with observing(model, layers, moments, mask, self.inputs, outputs) as observation:
            if self.inputs and self.statistics.finds_widths:
                observation.watch_widths(self.statistics.free_widths)
            if (spectra := self.statistics.spectra) is not None:
                of_layers = {name: spectra[name].to(target.weight.device) for name, target in layers.items()}
                observation.watch_components(of_layers, moments)
            routed = [each for each in self.statistics.routed if not layers.keys().isdisjoint(chain(*each.layers))]
            observation.watch_removals(routed, moments, self.statistics.model)
            yield observation

    def seal_arguments(self) -> tuple[Any, ...]:
        """Return the arguments of a `Seal`."""
        outside = {name: self.layers[name].module for name in self.structure.region_of}
        return self.structure.chains, outside, self.structure.region_of

    def note(self, *values: Tensor | str | None) -> None:
        """Add values to the digest by which a run that goes on knows the passes of the interrupted one."""
        if self.finished is not None:
            self.finished.note(*values)

    def put_away(self, layers: LayerSet, moments: Moments) -> None:
        """Use the statistics of some layers, and move what is left of them to the scratch files."""
        total = self.statistics.moments
        trim_heap()
        if self.use is not None:
            self.use(layers, moments, total)
        if self.finished is not None:
            self.finished.keep(self, layers, moments)
        self.absorb(moments)
        release_pages(target.module.weight for target in layers.values())
        trim_heap()

    def absorb(self, moments: Moments) -> None:
        """Move the statistics of some layers to the scratch files."""
        total = self.statistics.moments
        total.tokens |= {leader: moments.tokens[leader] for leader in moments.tokens.keys() - moments.input_sums.keys()}
        total.absorb_moments(moments)
        for name, gradient in moments.gradient_sums.items():
            total.gradient_sums[name] = gradient


class ForwardSweep(SharedState):
    """Forward passes of all batches, which also send the loss back through what follows the last block."""

    def __init__(
        self,
        statistics: StatisticsCollector,
        layers: LayerSet,
        store: Store,
        inputs: bool,
        use: Use | None = None,
        finished: FinishedParts | None = None,
    ) -> None:
        super().__init__(statistics, layers, store, inputs, use, finished)
        self.last_region = Moments()

    def run(self, batch: Batch) -> None:
        """Run the model on a batch, record the blocks, and send the loss back to the output of the last one."""
        statistics = self.statistics
        if not self.batches:
            self.structure = structure_of(statistics.model, self.layers, batch.mask, batch.loss)
        last = self.layers_of(self.structure.outside(len(self.structure.chains)))
        within = self.layers_of(name for names in self.structure.inside.values() for name in names)
        self.sides.start()
        with (
            torch.enable_grad(),
            self.observing(statistics.model, last, self.last_region, batch.mask) as observation,
            gradients_only_at(statistics.model, self.layers),
            _Recording(self, batch) as recording,
        ):
            observation.check_operands(batch.number + 1)
            if self.draws and statistics.draw is not None:
                logits_model = statistics.logits_model(statistics.model)
                observation.watch_logits(logits_model, statistics.draw, statistics.generator())
            with _noting_masks(observation.masks, within):
                loss = batch.loss()
            recording.refuse_unfinished()
            observation.forward_done()
            check_terms(batch.terms)
            mean = checked_loss(loss).item()
            self.note(str(batch.terms), str(mean), batch.mask.positions)
            statistics.moments.add_loss(mean, batch.terms)
            observation.gradient_weight = batch.terms
            observation.leaves = lambda: list(recording.leaves.values())
            recording.receiver.sent = DRAWN
            observation.send_back(loss)
            recording.receiver.sent = LOSS
            loss.backward()  # type: ignore[no-untyped-call]
            collect_gradients(last, self.last_region, batch.terms)
            refuse_gradients(self.layers)
            batch.masks = observation.masks.known()
        if not self.structure.has_layers_up_to(len(self.structure.chains) - 1):
            batch.loss = _run_already  # and the batch itself need not be kept
        batch.sides, batch.differentiable = self.sides.places, self.sides.differentiable
        self.batches.append(batch)


class _Recording(Seal):
    """Seal that stores what each block is called with."""

    def __init__(self, of: SharedState, batch: Batch) -> None:
        super().__init__(*of.seal_arguments())
        self.receiver = Receiver(of.gradients, batch)
        self._of, self._batch = of, batch

    def enter(self, step: Step, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Store the arguments of a block."""
        from_before = hidden if step[1] else None
        if step[1] == 0:
            self._of.note(*tensors_of((args, dict(kwargs))))
        self._batch.calls[step] = BlockCall.of(args, kwargs, from_before, self._of.sides.number_of, hidden.device)
        if from_before is not None:
            self._of.hidden.put(step, str(self._batch.number), from_before)
            self._of.stored_hidden += from_before.nbytes

    def leave(self, step: Step, hidden: Tensor) -> None:
        """Store the output of the last block of the first batch, for comparison; others are inputs of the next."""
        chain, block = step
        if block + 1 == len(self._of.structure.chains[chain]) and self._batch.number == 0:
            self._of.hidden.put((chain, block + 1), "0", hidden)

    def receive(self, step: Step, gradient: Tensor) -> None:
        """Add a gradient to that of the output of a block."""
        self._of.note(gradient)
        self.receiver.receive(step, gradient)


def refuse_gradients(layers: LayerSet) -> None:
    """Raise CalibrationError if layers other than those of the region have got a gradient."""
    for name, target in layers.items():
        if target.gradient is not None:
            raise CalibrationError(
                f"the loss depends on {name} other than in the first batch, and not through the blocks alone, so the "
                f"model cannot be run block by block; {WHOLE}"
            )


def _run_already() -> Tensor:
    raise RuntimeError("a batch is not run again, because no layer needs it")


@contextmanager
def _noting_masks(masks: Masks, layers: LayerSet) -> Iterator[None]:
    """Note the masks that the inputs of layers go by, for when they run again."""

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        masks.of(name, input_of(args, kwargs))

    with ExitStack() as hooks:
        for name, target in layers.items():
            hooks.callback(target.module.register_forward_pre_hook(partial(note, name), with_kwargs=True).remove)
        yield
