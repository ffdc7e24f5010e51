"""Observation of a model during a batch, through hooks that are removed on any exit."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zssvd_lightning._contexts import evaluation_mode, no_cache, uncompiled
from zssvd_lightning._numerics import exact_products
from zssvd_lightning.calibration.batches import input_of, rows_that_count
from zssvd_lightning.calibration.contexts import (
    gradients_from_embeddings_on,
    gradients_only_at,
    in_reentrant_checkpoint,
)
from zssvd_lightning.calibration.gradients import (
    collect_at_once,
    drawn_in_place_of,
    refuse_no_gradient,
    send_back_drawn,
)
from zssvd_lightning.calibration.masks import Masks, TokenMask
from zssvd_lightning.calibration.operands import CheckedOperands
from zssvd_lightning.calibration.recorded_calls import Call
from zssvd_lightning.calibration.routing.removals import watch_removals
from zssvd_lightning.calibration.widths.free_widths import FreeWidths
from zssvd_lightning.calibration.widths.trials import hooked_modules
from zssvd_lightning.errors import CalibrationError, LogitsError, ZeroGradientError
from zssvd_lightning.model.apart.routers import Routed
from zssvd_lightning.model.logits import logits_of
from zssvd_lightning.model.targets import Target
from zssvd_lightning.whitening.moments import Moments
from zssvd_lightning.whitening.output_gradients import Draw
from zssvd_lightning.whitening.shared_inputs import SharedInputs
from zssvd_lightning.whitening.spectrum import Spectrum


class Observation:
    """Observation of one batch in the model.

    Args:
        model: the model that the batch runs through.
        targets: layers to watch, by name.
        moments: receives the second moments of the inputs.
        mask: mask of the batch, or the `Masks` of an earlier run. Each stack of the model goes by its own; see `masks`.

    Attributes:
        masks: masks of the layers.
        leaves: function that returns tensors, besides the weights, to which drawn gradients are sent back.
        gradient_weight: number by which gradients are multiplied to become gradients of the sum over the batch's loss
            terms.
        removal_weights: the same for removals of experts, in their first and in their second order; None to go by
            `gradient_weight` and by the output gradients that are taken.

    Raises:
        CalibrationError: the batch is all padding.
    """

    def __init__(
        self, model: nn.Module, targets: Mapping[str, Target], moments: Moments, mask: TokenMask | Masks | Tensor | None
    ) -> None:
        self._model = model
        self.removal_weights: tuple[float, float] | None = None
        self._targets = targets
        self._moments = moments
        self.masks = mask if isinstance(mask, Masks) else Masks(mask)
        self._runs_again = isinstance(mask, Masks)
        self.leaves: Callable[[], list[Tensor]] = list
        self._inputs = SharedInputs(moments)
        self._hooked = hooked_modules(model)
        self._hooks = ExitStack()
        self._output_hooks = ExitStack()
        self._logits: Tensor | None = None
        self._drawn: tuple[Draw, torch.Generator] | None = None
        self._taking_outputs = True
        self._loss_known = False
        self._has_graph: dict[str, bool] = {}
        self._without_graph: list[str] = []
        self._checkpointed: set[str] = set()
        self.gradient_weight = 1.0

    def watch_inputs(self) -> None:
        """Add each target's input to the second moments, until `forward_done`."""
        for name, target in self._targets.items():
            handle = target.module.register_forward_pre_hook(self._hook(name), with_kwargs=True)
            self._hooks.callback(handle.remove)

    def watch_masks(self) -> None:
        """Note the masks of the stacks, until `forward_done`."""
        if not self._runs_again:
            self.masks.watch(self._model)
            self._hooks.callback(self.masks.close)

    def watch_widths(self, widths: FreeWidths) -> None:
        """Try the hidden widths that the batch reaches, until `forward_done`; see `FreeWidths.watching`."""
        self._hooks.enter_context(widths.watching(self._model, self._targets, self._moments.leaders, self._hooked))

    def check_operands(self, number: int) -> None:
        """Refuse ids and labels out of range in batch `number`, until `forward_done`; see `operands`."""
        self._hooks.enter_context(CheckedOperands(number, self.masks.argument))

    def watch_outputs(self, into: Moments) -> None:
        """Add the gradients of each target's output, times `gradient_weight`, to `into`, until `close`."""
        for name, target in self._targets.items():
            handle = target.module.register_forward_hook(self._output_hook(name, into), with_kwargs=True)
            self._output_hooks.callback(handle.remove)

    def watch_gradients(self, into: Moments, divided_by: float) -> None:
        """Add the gradient of each weight, times `gradient_weight * divided_by`, and clear it, until `close`."""

        def weight() -> float | None:
            return self.gradient_weight * divided_by if self._loss_known else None

        for target in self._targets.values():
            self._output_hooks.callback(collect_at_once(target, into, weight).remove)

    def watch_components(self, spectra: Mapping[str, Spectrum], into: Moments) -> None:
        """Add the squared derivative of the loss with respect to each component at each token, until `close`.

        Args:
            spectra: spectrum of each target, by name.
            into: receives the sums over tokens.
        """
        for name, target in self._targets.items():
            handle = target.module.register_forward_hook(self._component_hook(name, spectra, into), with_kwargs=True)
            self._output_hooks.callback(handle.remove)

    def watch_removals(self, routed: Collection[Routed], into: Moments, model: nn.Module | None = None) -> None:
        """Add the changes of the loss by removing each expert to `into`, until `close`.

        Args:
            routed: lists of experts.
            into: receives the sums.
            model: model in which these have their names; None if it is the one that the batch runs through.
        """
        watch_removals(model or self._model, routed, self._weights, into, self._output_hooks)

    def _weights(self) -> tuple[float, float]:
        """Return by what gradients of the loss, and output gradients for the metric, are multiplied now."""
        if self.removal_weights is not None:
            return self.removal_weights
        weight = self.gradient_weight if self._loss_known else 0.0
        return weight * (self._drawn is None or not self._taking_outputs), weight * self._taking_outputs

    def note_calls(self, model: nn.Module, calls: list[Call], mask: TokenMask) -> None:
        """Append the forward passes of `model` to `calls`, with the mask of the batch, until `forward_done`."""

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.is_grad_enabled():
                calls.append(Call.of(args, kwargs, mask.positions, mask.asked))

        self._hooks.callback(model.register_forward_pre_hook(note, with_kwargs=True).remove)

    def watch_logits(self, model: nn.Module, draw: Draw, generator: torch.Generator) -> None:
        """Replace output gradients by gradients that `draw` computes from the logits; see `send_back`.

        Args:
            model: the model that returns the logits.
            draw: function that draws gradients from logits.
            generator: random number generator of the CPU for `draw`.
        """

        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if torch.is_grad_enabled():
                self._logits = logits_of(output)

        self._taking_outputs, self._drawn = False, (draw, generator)
        self._hooks.callback(model.register_forward_hook(note).remove)

    def send_back(self, loss: Tensor) -> None:
        """Begin to take output gradients. If `watch_logits` was called, backpropagate the drawn ones from the logits.

        Gradients are drawn only at the positions on which the loss depends.

        Args:
            loss: loss of the batch.

        Raises:
            LogitsError: the loss does not depend on the logits that were seen.
            CalibrationError: the drawn gradients cannot be sent back, as under reentrant checkpointing.
        """
        self._loss_known = True
        if self._drawn is None:
            return
        (draw, generator), logits, found, self._logits = self._drawn, self._logits, None, None
        if logits is not None and logits.requires_grad:
            (found,) = torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)
        if found is None or logits is None:
            raise LogitsError(
                "the loss does not come from the logits that the model returned, so none can be drawn instead of it; "
                "set output_side to 'empirical', or override ZSSVDCallback.student to name the model that returns them"
            )
        drawn = drawn_in_place_of(found, logits, draw, generator)
        self._without_graph = [name for name, has_graph in self._has_graph.items() if not has_graph]
        weights = [target.module.weight for target in self._targets.values()] + self.leaves()
        before, self.gradient_weight, self._taking_outputs = self.gradient_weight, 1.0, True
        send_back_drawn([logits], weights, [drawn])
        self.gradient_weight, self._taking_outputs = before, False

    def take_outputs(self, weight: float | None) -> None:
        """Take output gradients times `weight` from now on, or no more (None)."""
        self._loss_known, self._taking_outputs = True, weight is not None
        self.gradient_weight = 1.0 if weight is None else weight

    def refuse_unusable(self, moments: Moments, *, alone: bool) -> None:
        """Refuse gradients that show at once that statistics will be missing; call it once they are collected.

        Args:
            moments: the statistics so far, with the gradients.
            alone: True if no other process has batches. Otherwise a layer may get gradients there.

        Raises:
            ZeroGradientError: layers ran, but none has got a gradient so far, or those under reentrant checkpointing
                have not.
            CalibrationError: gradients of the loss have reached layers that drawn ones have not, as under reentrant
                checkpointing.
        """
        if without := [name for name in self._targets if name in self._checkpointed - moments.gradient_sums.keys()]:
            raise ZeroGradientError(
                f"the loss has no gradient at {', '.join(without[:3])} ({len(without)} layers), because they run under "
                "activation checkpointing that passes none on; set use_reentrant=False, or add them to ignore"
            )
        if alone:
            refuse_no_gradient(moments)
        if without := [name for name in self._without_graph if name in moments.gradient_sums]:
            raise CalibrationError(
                f"{without[0]} ran without a graph ({len(without)} layers), so drawn gradients cannot be sent back to "
                "it; if activations are checkpointed, set use_reentrant=False, else set output_side to 'empirical'"
            )

    def forward_done(self) -> None:
        """Stop watching inputs, so that forward passes that activation checkpointing repeats are not counted."""
        self._inputs.done()
        self._hooks.close()

    def close(self) -> None:
        """Remove all hooks."""
        self._logits = None
        self._hooks.close()
        self._output_hooks.close()

    def _output_hook(self, name: str, into: Moments) -> Any:
        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            mask = self.masks.of(name, input_of(args, kwargs))

            def see(gradient: Tensor) -> None:
                if self._loss_known and self._taking_outputs:
                    into.add_outputs(name, rows_that_count(gradient, mask), self.gradient_weight)

            self._has_graph[name] = self._has_graph.get(name, False) or output.requires_grad
            if output.requires_grad:  # False in the first of two passes under reentrant checkpointing
                output.register_hook(see)  # type: ignore[no-untyped-call]

        return watch

    def _component_hook(self, name: str, spectra: Mapping[str, Spectrum], into: Moments) -> Any:
        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            X = input_of(args, kwargs).detach()
            mask = self.masks.of(name, X)

            def see(gradient: Tensor) -> None:
                if not self._loss_known:
                    return
                spectrum = spectra[name]  # only now, because it may be read from a disk
                with torch.autocast(gradient.device.type, enabled=False), exact_products():
                    D, there = (rows_that_count(rows, mask).to(spectrum.left) for rows in (gradient, X))
                    into.add_components(name, spectrum.squared_derivatives(there, D * self.gradient_weight))

            if output.requires_grad:
                output.register_hook(see)  # type: ignore[no-untyped-call]

        return watch

    def _hook(self, name: str) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            X = input_of(args, kwargs)
            self._inputs.add(name, X, lambda: rows_that_count(X, self.masks.of(name, X)))
            if not torch.is_grad_enabled() and in_reentrant_checkpoint():
                self._checkpointed.add(name)

        return see


@contextmanager
def observing(
    model: nn.Module,
    targets: Mapping[str, Target],
    moments: Moments,
    mask: TokenMask | Masks | Tensor | None,
    inputs: bool = True,
    outputs: Moments | None = None,
) -> Iterator[Observation]:
    """Yield the observation of one batch, with dropout and the cache off and gradients only for the targets.

    On any exit, training mode, `requires_grad` flags and the cache setting are restored, and all hooks are removed.

    Args:
        model: the model that the batch runs through.
        targets: the layers to watch, by name.
        moments: receives the second moments of the inputs.
        mask: `TokenMask` or mask (B, T) of the batch, or `Masks` of an earlier run; None to go by those of the calls.
        inputs: whether to take the second moments of the inputs; if False, only gradients are computed.
        outputs: receives the second moments of the output gradients; None to leave them out.

    Raises:
        CalibrationError: the batch is all padding, or layers stop sharing an input.
    """
    with ExitStack() as restored:
        observation = Observation(model, targets, moments, mask)
        restored.callback(observation.close)
        restored.enter_context(uncompiled())
        restored.enter_context(evaluation_mode(model))
        restored.enter_context(gradients_only_at(model, targets))
        restored.enter_context(no_cache(model))
        restored.enter_context(gradients_from_embeddings_on(model))
        observation.watch_masks()
        if inputs:
            observation.watch_inputs()
        if outputs is not None:
            observation.watch_outputs(outputs)
        yield observation
