"""Time of single layers over dense, beside their bytes and FLOPs over dense.

    python benchmarks/speed.py [--json FILE] [--rounds 15] [--device cpu] [--dtype float32] [--shapes llama,smollm2]

Every form of a layer that can be made at a rank (`layers.registry.KINDS`) takes turns with the dense layer, at the
shapes of a Llama of width 2048 and of SmolLM2-135M, with 0.8, 0.6 and 0.4 of the bytes kept, on one token (decode) and
on 512 (prefill). Decode is bound by bytes, and prefill by FLOPs. The targets: time over dense within 1.10 times that
share at width 2048, and within 1.20 times at the shapes of SmolLM2.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zssvd_lightning._files import replacing_file
from zssvd_lightning.app.bench.counts import flops_of, weight_bytes
from zssvd_lightning.app.bench.forms import layers_at
from zssvd_lightning.app.bench.results import machine
from zssvd_lightning.app.bench.timing import Quartiles, turns

SHAPES: dict[str, dict[str, tuple[int, int]]] = {
    "llama": {"q_proj": (2048, 2048), "k_proj": (512, 2048), "up_proj": (5632, 2048), "down_proj": (2048, 5632)},
    "smollm2": {"q_proj": (576, 576), "k_proj": (192, 576), "up_proj": (1536, 576), "down_proj": (576, 1536)},
}
"""Shapes (m, n) by family and layer."""

TARGETS = {"llama": 1.10, "smollm2": 1.20}
"""Largest time over dense, as a multiple of the share of bytes (decode) or FLOPs (prefill)."""

KEPT = (0.8, 0.6, 0.4)
TOKENS = {"decode": 1, "prefill": 512}

MEMORY = 2**28
"""Bytes of dense layers that one turn in decode runs through, one copy after the other. They are more than caches hold,
so that weights come from memory, as in a model."""


def measure(
    layers: dict[str, list[nn.Module]], x: Tensor, rounds: int, wait: Callable[[], None]
) -> dict[str, list[float]]:
    """Return the seconds of a call of each form in each round, in which all forms take turns.

    Args:
        layers: copies of each form, which are called one after the other.
        x: input of all calls.
        rounds: number of rounds, after one that does not count.
        wait: function that waits for the device.
    """
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for names in turns(list(layers), rounds + 1):
        for name in names:
            wait()
            start = time.perf_counter()
            for layer in layers[name]:
                layer(x)
            wait()
            seconds[name].append((time.perf_counter() - start) / len(layers[name]))
    return {name: each[1:] for name, each in seconds.items()}


@torch.no_grad()
def rows(family: str, device: str, dtype: torch.dtype, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield one row for each layer of a family, share kept, phase and form."""

    def wait() -> None:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)

    for layer, (m, n) in SHAPES[family].items():
        for kept in KEPT:
            every = dict(layers_at(m, n, kept, dtype, device))
            for phase, tokens in TOKENS.items():
                x = torch.randn(tokens, n, device=device, dtype=dtype)
                flops = {name: flops_of(partial(each, x)) for name, each in every.items()}
                copies = -(-MEMORY // weight_bytes(every["dense"])) if phase == "decode" else 1
                layers = {name: [copy.deepcopy(each) for _ in range(copies)] for name, each in every.items()}
                seconds = measure(layers, x, rounds, wait)
                for name, each in every.items():
                    over = Quartiles.of([a / b for a, b in zip(seconds[name], seconds["dense"], strict=True)])
                    shares = {
                        "bytes": weight_bytes(each) / weight_bytes(every["dense"]),
                        "flops": flops[name] / flops["dense"],
                    }
                    limit = shares["bytes" if phase == "decode" else "flops"]
                    yield {
                        "family": family, "layer": layer, "shape": [m, n], "kept": kept, "phase": phase, "form": name,
                        "rank": getattr(each, "rank", None), "time_over_dense": over._asdict(),
                        "bytes_over_dense": shares["bytes"], "flops_over_dense": shares["flops"],
                        "time_over_limit": over.median / limit, "copies": copies, "target": TARGETS[family],
                        "met": over.median / limit <= TARGETS[family],
                        "seconds": [float(f"{each:.4g}") for each in seconds[name]],
                    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """Return a row for a terminal."""
    over = row["time_over_dense"]
    return (
        f"{row['family']:8} {row['layer']:10} {row['kept']:.1f} {row['phase']:8} {row['form']:28} "
        f"{over['median']:6.2f} ({over['lower']:.2f}-{over['upper']:.2f})  bytes {row['bytes_over_dense']:.2f}  "
        f"FLOPs {row['flops_over_dense']:.2f}  over limit {row['time_over_limit']:5.2f}  "
        f"target {row['target']:.2f} {'met' if row['met'] else 'missed'}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Print a line for each row, and the share of targets met by each form; write all as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    asked = parser.parse_args(arguments)
    found = []
    for family in asked.shapes.split(","):
        for row in rows(family, asked.device, getattr(torch, asked.dtype), asked.rounds):
            found.append(row)
            if row["form"] != "dense":
                print(line(row), flush=True)
    groups: dict[tuple[str, str, str], list[bool]] = {}
    for row in found:
        if row["form"] != "dense":
            groups.setdefault((row["family"], row["phase"], row["form"]), []).append(row["met"])
    met = {", ".join(key): f"{sum(values)} of {len(values)}" for key, values in groups.items()}
    print("\ntargets met (time over dense within the target times the limit):")
    for name, share in met.items():
        print(f"  {name}: {share}")
    if asked.json is not None:
        told = {"machine": machine(asked.device), "torch": torch.__version__, "dtype": asked.dtype, "targets": TARGETS}
        with replacing_file(asked.json) as file:
            head = json.dumps({**told, "met": met}, indent=1).removesuffix("\n}")
            body = ",\n".join(map(json.dumps, found))  # a row in each line
            file.write_text(f'{head},\n "rows": [\n{body}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
