"""`LowRankCache`: the key-value cache of a model in low-rank bases, and how many bytes a token takes in it."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig

from zssvd_lightning._types import of_type
from zssvd_lightning._validation import require
from zssvd_lightning.kv_cache import saving
from zssvd_lightning.kv_cache.bases import Bases, key_spectra, value_spectra
from zssvd_lightning.kv_cache.cache_layer import LayerBases, LowRankLayer
from zssvd_lightning.kv_cache.moments import LayerMoments
from zssvd_lightning.kv_cache.observation import cached_model, observe
from zssvd_lightning.kv_cache.ranks import ranks_under

logger = logging.getLogger(__name__)


class BytesPerToken(NamedTuple):
    """Bytes that one token of one sequence takes in the layers that are compressed."""

    low_rank: int
    dense: int
    """Bytes in the model's own cache."""


class LowRankCache(DynamicCache):
    """Key-value cache that keeps the keys and values of each head in a low-rank basis, for `generate` and `forward`.

    Layers that are not in `bases`, such as those of a sliding window, are cached as in the model's own cache.

    Args:
        config: config of the model.
        bases: bases of the keys and values of each compressed layer, by its number.

    Example:
        >>> cache = LowRankCache.from_calibration(model, batches, ratio=0.5)  # doctest: +SKIP
        >>> model.generate(**inputs, past_key_values=cache.new())  # doctest: +SKIP
    """

    def __init__(self, config: PreTrainedConfig, bases: Mapping[int, LayerBases]) -> None:
        super().__init__(config=config)
        self.config = config
        self.bases = dict(bases)
        for number, of_layer in self.bases.items():
            self.layers[number] = LowRankLayer(number, of_layer)

    @classmethod
    def from_calibration(
        cls, model: nn.Module, batches: Iterable[Mapping[str, Any]], ratio: float = 0.5, *, progress: bool = True
    ) -> "LowRankCache":
        """Return an empty cache with the bases of least error on calibration batches (KQ-SVD, arXiv 2512.05916).

        Ranks are chosen for all layers and heads at once: the components of largest error are kept. Tokens count by
        the attention that they receive, from queries and keys alone, under a causal mask.

        Args:
            model: causal language model of transformers, or a module that holds one. It is not changed.
            batches: mappings with `input_ids` (B, T), and `attention_mask` (B, T) if there is padding, at best of as
                many tokens as the cache will hold. Labels are not used.
            ratio: part of the bytes per token to keep, in (0, 1], over the layers that cache all tokens. At 1, all is
                kept as it is.
            progress: whether to draw a progress bar.

        Raises:
            ConfigError: `ratio` is not in (0, 1].
            BudgetError: `ratio` leaves nothing to a head.
            UnsupportedCacheError: the model keeps no cache of the standard form, no layer of it caches all tokens, or
                it does not show its queries.
            CalibrationError: there are no batches, or they do not suit the model.
            NonFiniteError: queries, keys or values are NaN or infinite.
        """
        ratio = of_type(float, ratio, "ratio")
        require(0 < ratio <= 1, "ratio", ratio, "above 0 and at most 1")
        cache = cls.from_moments(cached_model(model).config, observe(model, batches, progress=progress), ratio)
        logger.info("%s", cache)
        return cache

    @classmethod
    def from_moments(
        cls, config: PreTrainedConfig, moments: Mapping[int, LayerMoments], ratio: float
    ) -> "LowRankCache":
        """Return an empty cache from what `observation.observe` has returned; errors as in `from_calibration`."""
        spectra = {
            layer: (key_spectra(seen, layer), value_spectra(seen, layer)) for layer, seen in sorted(moments.items())
        }
        heads = [head for pair in spectra.values() for part in pair for head in part]
        ranks = iter(ranks_under([head.errors for head in heads], ratio))
        bases = {
            layer: LayerBases(*(Bases.of(part, tuple(next(ranks) for _ in part)) for part in pair))
            for layer, pair in spectra.items()
        }
        unweighted = [layer for layer, seen in moments.items() if seen.output is None]
        if unweighted:
            logger.warning(
                "attention layers %s show no output projection; all directions of their values count alike",
                unweighted,
            )
        return cls(config, bases)

    def new(self) -> "LowRankCache":
        """Return an empty cache with the same bases, which are not copied."""
        return type(self)(self.config, self.bases)

    @property
    def left(self) -> list[int]:
        """Numbers of the layers that are cached as in the model's own cache."""
        return [number for number in range(len(self.layers)) if number not in self.bases]

    def ranks(self) -> dict[int, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Return the ranks of the keys and of the values of each head, by layer."""
        return {number: (keys.ranks, values.ranks) for number, (keys, values) in self.bases.items()}

    def bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> BytesPerToken:
        """Return the bytes that one token of one sequence takes in the compressed layers.

        Args:
            dtype: type of the keys and values, which is that of the model.
        """
        parts = [part for pair in self.bases.values() for part in pair]
        low_rank, dense = sum(sum(part.ranks) for part in parts), sum(part.mean.numel() for part in parts)
        return BytesPerToken(low_rank * dtype.itemsize, dense * dtype.itemsize)

    def save(self, folder: str | Path) -> Path:
        """Write the bases into a folder, at best that of the model, and return the file.

        Raises:
            OutputError: the file cannot be written. An earlier one is then untouched.
        """
        return saving.save(self.bases, self.config, folder)

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module) -> "LowRankCache":
        """Return an empty cache with the bases that `save` wrote.

        Raises:
            SavedModelError: the folder has no bases, or they are damaged or those of another type of model.
            UnsupportedCacheError: the model keeps no cache that can be compressed.
        """
        config = cached_model(model).config
        return cls(config, saving.load(folder, config))

    def __repr__(self) -> str:
        """Return what is compressed, and by how much."""
        low_rank, dense = self.bytes_per_token()
        said = f"{len(self.bases)} layers in {low_rank / dense:.3f} of the bytes per token"
        left = f", layers {self.left} as in the model's own cache" if self.left else ""
        return f"LowRankCache({said}{left}; {self.get_seq_length()} tokens)"
