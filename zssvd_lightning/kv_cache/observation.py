"""Calibration pass: queries, keys and values of every attention layer that caches all tokens.

Keys and values are seen where the model hands them to its cache, and queries where it hands them to the attention
function of transformers together with the tensors that the cache has returned. No name of a model or module is needed.
"""

import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from zssvd_lightning._contexts import evaluation_mode, method_replaced, uncompiled
from zssvd_lightning._resources import counted
from zssvd_lightning.calibration.batches import refuse_malformed, token_mask
from zssvd_lightning.errors import CalibrationError, RankDeficientWarning, UnsupportedCacheError
from zssvd_lightning.kv_cache.moments import LayerMoments
from zssvd_lightning.kv_cache.output_projection import OutputProjections, Waiting

logger = logging.getLogger(__name__)

NOT_PASSED = ("labels", "past_key_values", "use_cache")
"""Keys of a batch that the model is not called with."""


def cached_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model that caches keys and values: the model itself, or the first inside of it.

    Raises:
        UnsupportedCacheError: there is none, or its cache is of another form, or has no layer that keeps all tokens.
    """
    found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise UnsupportedCacheError(f"{type(model).__name__} holds no model of transformers, whose cache is compressed")
    name = type(found).__name__
    if getattr(found.config, "is_encoder_decoder", False):
        raise UnsupportedCacheError(f"{name} is an encoder-decoder; only caches of decoders alone are compressed")
    if "past_key_values" not in inspect.signature(found.forward).parameters:
        raise UnsupportedCacheError(f"{name} takes no past_key_values, and so keeps no cache")
    if not compressible_layers(found.config):
        raise UnsupportedCacheError(
            f"no layer of {name} caches all tokens: {kinds_of_layers(found.config)}; their caches do not grow without "
            "bound, so use the model's own cache"
        )
    return found


def compressible_layers(config: PreTrainedConfig) -> list[int]:
    """Return the numbers of the layers whose cache holds the keys and values of all tokens, and nothing else."""
    layers = DynamicCache(config=config).layers
    return [number for number, layer in enumerate(layers) if type(layer) is DynamicLayer]


def kinds_of_layers(config: PreTrainedConfig) -> str:
    """Return the names of the kinds of the layers in a model's cache."""
    return ", ".join(sorted({type(layer).__name__ for layer in DynamicCache(config=config).layers}))


class Seen(NamedTuple):
    """Keys and values that the cache has returned last."""

    layer: int
    keys: Tensor
    values: Tensor


class ObservedCache(DynamicCache):
    """Cache that remembers what it has returned last."""

    seen: Seen | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Cache keys and values (B, H, T, d) of a layer, and return those of all tokens."""
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.seen = Seen(layer_idx, keys, values)
        return keys, values


class Observer:
    """Sums of queries, keys and values by layer, over batches."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.layers = set(compressible_layers(model.config))
        self.moments: dict[int, LayerMoments] = {}
        self._cache: ObservedCache | None = None
        self._mask: Tensor | None = None
        self._projections = OutputProjections()

    def run(self, batch: Mapping[str, Any]) -> None:
        """Run a batch, and add its tokens."""
        self._mask, self._cache = token_mask(batch), ObservedCache(config=self.model.config)
        if self._mask is not None and self._mask.all():
            self._mask = None
        inputs = {key: value for key, value in batch.items() if key not in NOT_PASSED}
        original = AttentionInterface.get_interface

        @wraps(original)
        def get_interface(interface: AttentionInterface, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
            return self._observed(original(interface, name, default))

        try:
            with self._projections, method_replaced(AttentionInterface, "get_interface", get_interface):
                self.model(**inputs, past_key_values=self._cache, use_cache=True)
        finally:
            self._cache = None

    def _observed(self, attention: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(attention)
        def observed(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._see(module, query, key, value, kwargs.get("scaling"))
            return attention(module, query, key, value, *args, **kwargs)

        return observed

    def _see(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> None:
        """Add the tokens of an attention layer, if its keys and values are what the cache has just returned."""
        seen = None if self._cache is None else self._cache.seen
        if seen is None or seen.layer not in self.layers or seen.keys is not key or seen.values is not value:
            return
        moments = self.moments.setdefault(seen.layer, LayerMoments())
        moments.scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if self._mask is not None and self._mask.shape != (key.shape[0], key.shape[2]):
            raise CalibrationError(
                f"attention layer {seen.layer} has {tuple(key.shape[:1] + key.shape[2:3])} tokens, but attention_mask "
                f"is {tuple(self._mask.shape)}, so that it is not known which are padding; calibrate without padding"
            )
        moments.add(query, key, value, self._mask)
        if moments.output is None:
            width = value.shape[-1]

            def found(squares: Tensor) -> None:
                moments.output = squares

            self._projections.wait(Waiting(module, query.shape[1] * width, value.shape[1], width, found))


@torch.no_grad()
def observe(model: nn.Module, batches: Iterable[Mapping[str, Any]], *, progress: bool) -> dict[int, LayerMoments]:
    """Run batches through a model and return the sums of each layer that caches all tokens, by its number.

    The model, its modes and its hooks are as before on any exit.

    Raises:
        UnsupportedCacheError: the model has no cache that can be compressed.
        CalibrationError: there is no batch, or one is not a mapping that the model takes.
        NonFiniteError: queries, keys or values are NaN or infinite.

    Warns:
        RankDeficientWarning: there are not more tokens than directions of a head.
    """
    held = cached_model(model)
    observer = Observer(held)
    device = next(held.parameters()).device
    number = 0
    total = len(batches) if isinstance(batches, list | tuple) else None
    with evaluation_mode(held), uncompiled():
        for number, batch in enumerate(counted(batches, "keys and values", total, "batch", shown=progress), 1):
            _refuse_batch(batch, number)
            observer.run(move_data_to_device(dict(batch), device))
            _refuse_unseen(held, observer)
    if number == 0:
        raise CalibrationError("there is no calibration batch; give a list or a DataLoader of mappings")
    for layer, moments in observer.moments.items():
        moments.refuse_non_finite(layer)
    _warn_of_few_tokens(observer.moments)
    return observer.moments


def _refuse_batch(batch: Any, number: int) -> None:
    if not isinstance(batch, Mapping):
        raise CalibrationError(
            f"calibration batch {number} is a {type(batch).__name__}; give mappings such as {{'input_ids': ...}}"
        )
    refuse_malformed(batch, number)


def _warn_of_few_tokens(by_layer: Mapping[int, LayerMoments]) -> None:
    """Issue a RankDeficientWarning if a head has seen fewer tokens than directions, some of which then look unused."""
    tokens = min(moments.keys.count for moments in by_layer.values())
    width = max(sums.mean().shape[-1] for moments in by_layer.values() for sums in (moments.keys, moments.values))
    if tokens <= width:
        warnings.warn(
            f"keys and values have {width} directions, but there are {tokens} calibration tokens; calibrate on more",
            RankDeficientWarning,
            stacklevel=3,
        )


def _refuse_unseen(model: PreTrainedModel, observer: Observer) -> None:
    """Raise UnsupportedCacheError if no attention layer was seen, and say once which were not."""
    unseen = sorted(observer.layers - observer.moments.keys())
    if not observer.moments:
        raise UnsupportedCacheError(
            f"{type(model).__name__} keeps no cache, or does not hand its keys to an attention function of "
            "transformers, so that its queries cannot be seen; use the model's own cache"
        )
    if unseen:
        logger.warning("attention layers %s do not show their queries, and stay uncompressed", unseen)
        observer.layers -= set(unseen)
