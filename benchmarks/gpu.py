"""Measurements that need a CUDA machine, in one command of less than 8 minutes.

    python benchmarks/gpu.py               # writes docs/benchmarks/gpu-NAME.json
    python benchmarks/gpu.py --cpu-smoke   # everything at tiny sizes on the CPU, to see that it runs; writes nothing

Every part is a process of its own with a time limit. Each result is printed, and the file written anew, as soon as it
is there, so that a part that fails or takes too long costs no other.

- `layers`: time of single layers over dense on CUDA graphs, beside bytes and FLOPs, in bfloat16 at the shapes of
  Llama-7B, for 1 token and for 4096.
- `presets`: ranks and logits of all presets on a tiny trained Llama, on the CPU and on the GPU.
- `best-2`, `best-4`, `zs-svd-2`, `zs-svd-4`: a compression at the width of Llama-7B with 2 and 4 blocks of random
  weights: seconds by stage and peak memory. `best` is one-shot.
"""

import argparse
import copy
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from zssvd_lightning import CompressionConfig, compress
from zssvd_lightning._files import replacing_file
from zssvd_lightning.app.bench.counts import flops_of, weight_bytes
from zssvd_lightning.app.bench.forms import layers_at
from zssvd_lightning.app.bench.results import machine
from zssvd_lightning.app.bench.timing import Quartiles, turns
from zssvd_lightning.config.presets import PRESETS
from zssvd_lightning.errors import ZSSVDError

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"

Row = dict[str, Any]

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
"""Shapes (m, n) of the layers of Llama-7B."""
KEPT = (0.8, 0.6, 0.4)
TOKENS = (1, 4096)
ROUNDS = 30
MEMORY = 2**28
"""Bytes of dense layers that a graph of one token runs through, more than the cache of a GPU holds."""
SEQUENCE = 2048
"""Length of the calibration windows at the width of Llama-7B."""


def layers(smoke: bool) -> Iterator[Row]:
    """Yield the time of each form of a layer over dense."""
    device, dtype = ("cpu", torch.float32) if smoke else ("cuda", torch.bfloat16)
    shapes, tokens_of, rounds = (((24, 16),), (1, 8), 2) if smoke else (SHAPES, TOKENS, ROUNDS)
    for m, n in shapes:
        for kept in KEPT:
            every = dict(layers_at(m, n, kept, dtype, device))
            size = {name: weight_bytes(each) for name, each in every.items()}
            for tokens in tokens_of:
                x = torch.randn(tokens, n, device=device, dtype=dtype)
                copies = 2 if smoke or tokens > 1 else -(-MEMORY // size["dense"])
                with torch.no_grad():
                    flops = {name: flops_of(partial(each, x)) for name, each in every.items()}
                    calls = {name: _repeated(each, x, copies) for name, each in every.items()}
                    seconds = _seconds(calls, rounds, device)
                for name in every:
                    over = Quartiles.of([a / b for a, b in zip(seconds[name], seconds["dense"], strict=True)])
                    yield {
                        "shape": [m, n], "kept": kept, "tokens": tokens, "form": name,
                        "microseconds": 1e6 * Quartiles.of(seconds[name]).median / copies,
                        "time_over_dense": over._asdict(), "bytes_over_dense": size[name] / size["dense"],
                        "flops_over_dense": flops[name] / flops["dense"],
                    }  # fmt: skip


def _repeated(layer: nn.Module, x: Tensor, copies: int) -> Callable[[], None]:
    """Return a function that calls copies of a layer one after the other: on CUDA as one graph."""
    every = [layer, *(copy.deepcopy(layer) for _ in range(copies - 1))]

    def call() -> None:
        for each in every:
            each(x)

    if x.device.type != "cuda":
        return call
    aside: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # kernels are loaded before they are recorded
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay(kept: Any = every) -> None:  # the graph reads the weights, so that they are kept
        graph.replay()

    return replay


def _seconds(calls: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Return the seconds of every call in each round, in which all take turns. The first round does not count."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for names in turns(list(calls), rounds + 1):
        for name in names:
            _wait(device)
            start = time.perf_counter()
            calls[name]()
            _wait(device)
            found[name].append(time.perf_counter() - start)
    return {name: each[1:] for name, each in found.items()}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def presets(smoke: bool) -> Iterator[Row]:
    """Yield, for each preset, how ranks and logits on the GPU differ from those on the CPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=16 if smoke else 64, intermediate_size=24 if smoke else 96,
        num_hidden_layers=1 if smoke else 3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, 97, (3, 2, 24) if smoke else (6, 4, 24), generator=torch.Generator().manual_seed(1))
    _train(model, ids, steps=6 if smoke else 60)
    for preset in PRESETS:
        settings = CompressionConfig.of(preset, prune_ratio=0.4, correction_batches=1)
        ranks, logits = [], []
        for device in ("cpu", "cpu" if smoke else "cuda"):
            torch.manual_seed(0)
            mine = nn.Module.to(copy.deepcopy(model), device)
            batches = [{"input_ids": each.to(device), "labels": each.to(device)} for each in ids]
            report = compress(mine, batches, settings, progress=False)
            ranks.append({name: layer.rank for name, layer in report.layers.items()})
            with torch.no_grad():
                logits.append(mine(input_ids=ids[0].to(device)).logits.cpu())
        different = [name for name, rank in ranks[0].items() if rank != ranks[1][name]]
        yield {
            "preset": preset,
            "layers": len(ranks[0]),
            "layers_of_other_rank": len(different),
            "largest_difference_of_logits": float((logits[0] - logits[1]).abs().max()),
            "largest_logit": float(logits[0].abs().max()),
        }


def _train(model: LlamaForCausalLM, ids: Tensor, steps: int) -> None:
    """Let a model learn these windows, so that truncation and corrections change its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        window = ids[step % len(ids)]
        model(input_ids=window, labels=window).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    nn.Module.eval(model)


def compression(preset: str, blocks: int, smoke: bool) -> Iterator[Row]:
    """Yield seconds by stage and peak memory of a compression at the width of Llama-7B."""
    torch.manual_seed(0)
    width = 32 if smoke else 4096
    config = LlamaConfig(
        vocab_size=97 if smoke else 32000, hidden_size=width, intermediate_size=48 if smoke else 11008,
        num_hidden_layers=blocks, num_attention_heads=4 if smoke else 32, max_position_embeddings=4096,
    )  # fmt: skip
    device, length = ("cpu", 24) if smoke else ("cuda", SEQUENCE)
    with torch.device(device):
        model: Any = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    ids = torch.randint(0, config.vocab_size, (4 if smoke else 8, 1, length)).to(device)
    changes: dict[str, Any] = {"corrections": 0} if preset == "best" else {"correction_batches": 2}
    settings = CompressionConfig.of(preset, prune_ratio=0.4, **changes)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = weight_bytes(model)
    start = time.perf_counter()
    report = compress(model, [{"input_ids": each, "labels": each} for each in ids], settings, progress=False)
    _wait(device)
    yield {
        "preset": preset,
        "one_shot": preset == "best",
        "blocks": blocks,
        "tokens": ids.numel(),
        "seconds": time.perf_counter() - start,
        "seconds_by_stage": dict(report.seconds),
        "weight_bytes": {"before": before, "after": weight_bytes(model)},
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


PARTS: dict[str, tuple[Callable[[bool], Iterator[Row]], int]] = {
    "layers": (layers, 75),
    "presets": (presets, 75),
    "best-2": (partial(compression, "best", 2), 70),
    "zs-svd-2": (partial(compression, "zs-svd", 2), 70),
    "best-4": (partial(compression, "best", 4), 90),
    "zs-svd-4": (partial(compression, "zs-svd", 4), 90),
}
"""Function and time limit (seconds) of each part. The limits add up to less than 8 minutes."""


def in_time(command: Sequence[str], limit: float) -> Iterator[Row]:
    """Yield the JSON objects that a process prints, a line each, and an error if it fails or is ended at the limit."""
    late = threading.Event()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603  (this file)

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(limit, end)
        timer.start()
        try:
            for line in process.stdout or ():
                if line.startswith("{"):
                    yield json.loads(line)
            code = process.wait()
        finally:
            timer.cancel()
            process.kill()
    if late.is_set():
        yield {"error": f"took longer than its limit of {limit:g} seconds"}
    elif code:
        yield {"error": f"exit code {code}; the reason is on stderr"}


def main(arguments: list[str] | None = None) -> None:
    """Run all parts, or one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-smoke", action="store_true")
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(arguments)
    if not asked.cpu_smoke and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; --cpu-smoke shows that everything runs")
    if asked.part is not None:
        for row in PARTS[asked.part][0](asked.cpu_smoke):
            print(json.dumps(row), flush=True)
        return
    results: Row = {"machine": machine("cpu" if asked.cpu_smoke else "cuda"), "torch": torch.__version__, "parts": {}}
    name = re.sub(r"[^a-z0-9]+", "-", str(results["machine"]["device"]).lower()).strip("-")
    out = asked.out or (None if asked.cpu_smoke else FOLDER / f"gpu-{name}.json")
    for part, (function, limit) in PARTS.items():
        rows = results["parts"][part] = []
        command = [sys.executable, __file__, "--part", part]
        for row in _guarded(function(True)) if asked.cpu_smoke else in_time(command, limit):
            rows.append(row)
            print(part, json.dumps(row), flush=True)
            if out is not None:
                with replacing_file(out) as file:
                    file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if any("error" in row for rows in results["parts"].values() for row in rows):
        raise SystemExit(1)


def _guarded(rows: Iterator[Row]) -> Iterator[Row]:
    """Yield rows, and the error that ends them, as a process of its own would."""
    try:
        yield from rows
    except (ZSSVDError, RuntimeError) as error:
        yield {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    main()
