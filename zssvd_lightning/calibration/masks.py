"""Which positions of a layer's input are not padding, in models of one stack or several.

A stack is a part of a model that is called with one sequence and its mask: an encoder, a decoder, a vision tower. Each
goes by the mask of its own call. Layers that read the output of another stack, such as the keys and values of
cross-attention, go by the mask of that stack.

Shapes: B sequences of T positions; a mask is (B, T); an input X is (B, T, n), (T, B, n) or (B T, n).
"""

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zssvd_lightning.calibration.batches import IGNORED_LABEL, tensors_in, token_mask
from zssvd_lightning.calibration.padding import warn_of_padding
from zssvd_lightning.calibration.routing.rows import RoutedRows
from zssvd_lightning.errors import CalibrationError

MASK = "attention_mask"
ANOTHER_S_STATES = ("encoder_hidden_states", "key_value_states")
"""Arguments by which modules of transformers get the output of another stack."""


class TokenMask(NamedTuple):
    """Mask of a batch, and where it comes from."""

    positions: Tensor | None
    """Positions (B, T) that are not padding; None to go by the masks that the model is called with."""
    asked: bool = False
    """True if the user's function gave it, so that it comes before the mask that the model is called with."""


@dataclass
class Stack:
    """A call of a stack.

    Attributes:
        arguments: arguments of the call, by name.
        sequence: the tensor that it reads.
        mask: positions (B, T) that are not padding; None for all.
        decodes: True if it also reads the output of another stack.
        shape: sizes (B, T) of its sequence; None if they are not known before it ends.
        read: outputs of other stacks that it reads, with their masks.
        latest: the stack inside that ended last.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    sequence: Tensor | None = None
    mask: Tensor | None = None
    decodes: bool = False
    shape: tuple[int, ...] | None = None
    read: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    latest: "Stack | None" = None


class Masks:
    """The masks of all stacks during one batch.

    A layer outside of every stack inside of another goes by the stack that ended last, whose output it reads.

    Args:
        mask: mask of the batch.

    Raises:
        CalibrationError: the mask is not of shape (B, T), or the batch is all padding.
    """

    def __init__(self, mask: TokenMask | Tensor | None) -> None:
        given = mask if isinstance(mask, TokenMask) else TokenMask(mask)
        positions = given.positions
        if positions is not None and (not isinstance(positions, Tensor) or positions.dim() != 2):
            found = tuple(positions.shape) if isinstance(positions, Tensor) else type(positions).__name__
            raise CalibrationError(f"the mask of a batch must be a tensor (B, T), but it is {found}; fix token_mask")
        self._asked = given.asked
        self._batch = Stack(mask=None if positions is None else positions.bool())
        self._whole: list[tuple[Tensor, bool]] = []
        if self._batch.mask is not None:
            self._batch.shape = tuple(self._batch.mask.shape)
            if not self._batch.mask.any():
                raise CalibrationError(
                    "a calibration batch is all padding (its attention_mask is 0); drop such batches"
                )
        self._open: list[Stack] = []
        self._outputs: list[tuple[weakref.ref[Tensor], Tensor | None]] = []
        self._used: dict[str, list[tuple[tuple[int, ...], Tensor | None]]] = {}
        self._hooks: ExitStack | None = None
        self._routed = RoutedRows()

    def watch(self, model: nn.Module) -> None:
        """Note the calls of the stacks of a model, until `close`."""
        self._hooks = ExitStack()
        self._routed.watch(model, self._found, self._hooks)
        for module in model.modules():
            signature = _signature(module)
            names = set() if signature is None else set(signature.parameters)
            if isinstance(module, PreTrainedModel) or names & {MASK, *ANOTHER_S_STATES}:
                entering = module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)
                leaving = module.register_forward_hook(self._leave, with_kwargs=True, always_call=True)
                self._hooks.callback(entering.remove)
                self._hooks.callback(leaving.remove)

    def close(self) -> None:
        """Remove all hooks. Masks of layers that run again are those of their first run."""
        if self._hooks is not None:
            self._hooks.close()
        self._hooks, self._open, self._outputs = None, [], []

    def known(self) -> "Masks":
        """Return the masks of the layers that have run, to run parts of the model again. It holds no activations."""
        again = Masks(None)
        again._used = self._used
        return again

    def argument(self, tensor: Tensor) -> str | None:
        """Return the name under which a stack was called with a tensor; None if none was."""
        for stack in self._open:
            for name, value in stack.arguments.items():
                if isinstance(value, Tensor) and _same(value, tensor):
                    return name
        return None

    def of(self, layer: str, X: Tensor) -> Tensor | None:
        """Return the mask of the input X of a layer; None if all positions count.

        Raises:
            CalibrationError: a layer that ran with different masks runs again, as under activation checkpointing.
        """
        shape = tuple(X.shape[:-1])
        if self._hooks is None and layer in self._used:
            masks = [mask for known, mask in self._used[layer] if known == shape]
            if any(mask is not masks[0] for mask in masks):
                raise CalibrationError(
                    f"{layer} runs in stacks of different masks, and again in the backward pass, so that it is not "
                    "known which masks its gradients go by; turn activation checkpointing off, or set memory to 'whole'"
                )
            return masks[0] if masks else None
        mask = self._routed.mask if self._routed.inside else self._partly(self._found(X))
        self._used.setdefault(layer, []).append((shape, mask))
        return mask

    def _found(self, X: Tensor) -> Tensor | None:
        for seen, mask in self._read():
            if _same(seen, X):
                return mask
        stack = self._open[-1] if self._open else self._batch
        if stack.latest is not None and stack.latest.shape is not None and _has_shape(X, stack.latest.shape):
            return stack.latest.mask
        if stack.shape is not None and not _has_shape(X, stack.shape):
            for seen, mask in stack.read:
                if _has_shape(X, tuple(seen.shape[:2])):
                    return mask
        return stack.mask

    def _read(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield all known outputs of stacks with their masks."""
        for stack in reversed(self._open):
            yield from stack.read
        for reference, mask in reversed(self._outputs):
            if (seen := reference()) is not None:
                yield seen, mask

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = _by_name(module, args, kwargs)
        outer = self._open[-1] if self._open else self._batch
        mask, sequence = _of_tokens(given.get(MASK)), _sequence(module, given)
        states = [given[name] for name in ANOTHER_S_STATES if isinstance(given.get(name), Tensor)]
        another_s = [state for state in states if sequence is None or not _same(state, sequence)]
        alone = sequence is not None and not states and mask is not None and sequence.shape[:2] == mask.shape
        if not isinstance(module, PreTrainedModel) and not alone:
            new = [state for state in another_s if not any(_same(state, seen) for seen, _ in outer.read)]
            outer.read += [(state, self._mask_of_read(state, given, outer)) for state in new]
            self._open.append(outer)
            return
        shape = None if sequence is None or not _holds_positions(sequence) else tuple(sequence.shape[:2])
        stack = Stack(given, sequence, None, bool(another_s), shape)
        self._open.append(stack)
        stack.mask = self._mask_of_stack(stack, outer)
        if stack.decodes and not outer.decodes and stack.mask is None and self._argument(f"decoder_{MASK}") is None:
            warn_of_padding(module, given)
        stack.read = [(state, self._mask_of_read(state, given, outer)) for state in another_s]

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._open:
            return
        stack = self._open.pop()
        outer = self._open[-1] if self._open else self._batch
        if stack is outer or output is None:
            return
        outputs = [tensor for _, tensor in tensors_in(output) if tensor.dim() >= 3]
        if outputs:
            stack.shape = tuple(outputs[0].shape[:2])
        self._outputs += [(weakref.ref(tensor), stack.mask) for tensor in outputs]
        outer.latest = stack

    def _mask_of_stack(self, stack: Stack, outer: Stack) -> Tensor | None:
        """Return the mask of a call, given the call around it or the batch."""
        mask, is_batch = stack.arguments.get(MASK), outer is self._batch
        if is_batch and self._asked and stack.shape == self._batch.shape and not self._reads_in_shape(stack):
            return self._batch.mask
        follows = outer.sequence is not None and stack.sequence is not None and _same(stack.sequence, outer.sequence)
        if follows and stack.decodes == outer.decodes and (mask is None or _equal(mask, outer.arguments.get(MASK))):
            return outer.mask
        if stack.decodes:
            return self._decoder_mask(stack, outer)
        if mask is None:
            of_embeddings = isinstance(stack.arguments.get("inputs_embeds"), Tensor) or is_batch
            return outer.mask if of_embeddings and stack.shape is not None and stack.shape == outer.shape else None
        own = _of_tokens(mask)
        return outer.mask if own is None or _equal(mask, outer.arguments.get(MASK)) else own

    def _decoder_mask(self, stack: Stack, outer: Stack) -> Tensor | None:
        """Return the mask of a decoder: its own, up to the last label if the caller of the model gave none."""
        mask = stack.arguments.get(MASK)
        own = _of_tokens(mask)
        if own is not None and outer is not self._batch and outer.decodes and _equal(mask, outer.arguments.get(MASK)):
            return outer.mask
        labels = self._argument("labels")
        if labels is None or tuple(labels.shape) != stack.shape or self._argument(f"decoder_{MASK}") is not None:
            return own
        up_to_last = (labels != IGNORED_LABEL).flip(1).cumsum(1).flip(1) > 0
        return up_to_last if own is None else own & up_to_last

    def _mask_of_read(self, state: Tensor, given: Mapping[str, Any], outer: Stack) -> Tensor | None:
        """Return the mask of the output of another stack, of which a module gets `state`."""
        for seen, known in self._read():
            if _same(seen, state):
                return known
        mask = _of_tokens(given.get(f"encoder_{MASK}"))
        if mask is not None and mask.shape == state.shape[:2]:
            return mask
        for seen, known in outer.read:
            if seen.shape[:2] == state.shape[:2]:
                return known
        return None

    def _argument(self, name: str) -> Tensor | None:
        """Return the argument of this name (B, T) of the innermost stack that has it."""
        for stack in reversed(self._open):
            if isinstance(value := stack.arguments.get(name), Tensor) and value.dim() == 2:
                return value
        return None

    def _reads_in_shape(self, stack: Stack) -> bool:
        """Return True if a stack reads outputs of another one in the shape of the batch's mask."""
        states = [stack.arguments.get(name) for name in ANOTHER_S_STATES]
        return any(isinstance(s, Tensor) and tuple(s.shape[:2]) == self._batch.shape for s in states)

    def _partly(self, mask: Tensor | None) -> Tensor | None:
        """Return the mask, or None if it hides nothing."""
        if mask is None:
            return None
        for known, whole in self._whole:
            if known is mask:
                return None if whole else mask
        self._whole.append((mask, bool(mask.all())))
        return self._partly(mask)


def _signature(module: nn.Module) -> inspect.Signature | None:
    """Return the signature of the forward method; None if it has none."""
    own = getattr(module.forward, "__func__", None)
    try:
        return inspect.signature(module.forward) if own is None else _signature_of_method(own)
    except (TypeError, ValueError):
        return None


@functools.cache
def _signature_of_method(method: Any) -> inspect.Signature:
    signature = inspect.signature(method)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name."""
    signature = _signature(module)
    try:
        bound = None if signature is None else signature.bind_partial(*args, **kwargs)
    except TypeError:  # the call itself will raise it
        bound = None
    if bound is None:
        return dict(kwargs)
    given = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    return given


def _sequence(module: nn.Module, given: Mapping[str, Any]) -> Tensor | None:
    """Return the sequence that a module is called with: its main input, or the first other tensor that is no mask."""
    main = getattr(module, "main_input_name", None)
    names = [main] if isinstance(main, str) else []
    names += ["inputs_embeds", *(name for name in given if not name.endswith("mask") and name not in ANOTHER_S_STATES)]
    return next((given[name] for name in names if isinstance(given.get(name), Tensor)), None)


def _of_tokens(mask: Any) -> Tensor | None:
    """Return a mask (B, T) of zeros and ones as booleans; None for all else."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    if mask.is_floating_point() and not bool(((mask == 0) | (mask == 1)).all()):
        return None
    return mask.bool()


def _holds_positions(sequence: Tensor) -> bool:
    """Return True for ids (B, T) and embeddings (B, T, n)."""
    return sequence.dim() == 3 or (sequence.dim() == 2 and not sequence.is_floating_point())


def _has_shape(X: Tensor, shape: tuple[int, ...]) -> bool:
    return tuple(X.shape[:-1]) in (shape, shape[::-1], (shape[0] * shape[1],))


def _same(one: Tensor, other: Tensor) -> bool:
    """Return True if two tensors are one, or views of the same numbers."""
    if one is other:
        return True
    return one.shape == other.shape and one.stride() == other.stride() and _address(one) == _address(other)


def _address(tensor: Tensor) -> Any:
    try:
        return tensor.device, tensor.data_ptr() or id(tensor)
    except RuntimeError:  # tensors without storage of their own
        return id(tensor)


def _equal(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    return _same(one, other) or (one.shape == other.shape and torch.equal(one, other.to(one.dtype)))


def mask_of(batch: Any, read: Callable[[Any], Tensor | None]) -> TokenMask:
    """Return the mask of a batch that `read` returns, and whether it is another than that of its `attention_mask`."""
    mask, default = read(batch), token_mask(batch)
    if not isinstance(mask, Tensor):
        return TokenMask(mask)
    return TokenMask(mask, default is None or mask.shape != default.shape or not torch.equal(mask.bool(), default))
