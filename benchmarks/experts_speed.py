"""Time of one layer of experts, dense and of low rank, in each form in which they run.

`python benchmarks/experts_speed.py` prints a table of milliseconds: 8 and 32 experts, two for each token, with 1 to 512
tokens, on a CPU with as many threads as torch takes (`OMP_NUM_THREADS`). Options set the layer.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from zssvd_lightning.layers.apart.experts import ExpertList
from zssvd_lightning.layers.apart.grouped_experts import forward_by_stacks
from zssvd_lightning.layers.apart.stacks import Stacks
from zssvd_lightning.layers.base import own_memory
from zssvd_lightning.layers.registry import form_for

TOKENS = (1, 64, 256, 512)
LEAST_SECONDS, LEAST_RUNS = 0.2, 5


def stacked_layer(count: int, given: argparse.Namespace) -> nn.Module:
    """Return a module of stacked experts with random weights."""
    config = MixtralConfig(
        hidden_size=given.hidden,
        intermediate_size=given.intermediate,
        num_local_experts=count,
        num_experts_per_tok=given.top,
    )
    module = MixtralExperts(config)
    for stack in module.parameters():
        nn.init.normal_(stack, std=0.02)
    return module.to(getattr(torch, given.dtype)).requires_grad_(False).eval()


def low_rank_layer(stacked: nn.Module, given: argparse.Namespace, kind: str) -> ExpertList:
    """Return the same experts with random matrices of a rank."""
    found = ExpertList(stacked)
    for expert in found.experts:
        for name in list(dict(expert.named_children())):
            (m, n), dtype = expert.get_parameter(f"{name}.weight").shape, getattr(torch, given.dtype)
            up, down = torch.randn(m, given.rank, dtype=dtype) * 0.02, torch.randn(given.rank, n, dtype=dtype) * 0.02
            setattr(expert, name, form_for(kind, m, n).from_factors(up, down, None).requires_grad_(False))
    own_memory(found)
    return found.eval()


def milliseconds(run: Callable[[], Tensor]) -> float:
    """Return the least time of a call, which other work on the machine disturbs least."""
    run()
    times: list[float] = []
    while sum(times) < LEAST_SECONDS or len(times) < LEAST_RUNS:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--top", type=int, default=2)
    given = parser.parse_args()
    print(vars(given), f"{torch.get_num_threads()} threads")
    for count in given.experts:
        stacked = stacked_layer(count, given)
        config: Any = stacked.config
        layers: dict[str, Any] = {kind: low_rank_layer(stacked, given, kind) for kind in ("low_rank", "pivoted")}
        for tokens in TOKENS:
            x = torch.randn(tokens, given.hidden, dtype=getattr(torch, given.dtype))
            chosen = torch.stack([torch.randperm(count)[: given.top] for _ in range(tokens)])
            arguments = (x, chosen, torch.rand(tokens, given.top, dtype=x.dtype))
            row = [f"{count} experts, {tokens} tokens"]
            for form in ("eager", "grouped_mm"):
                config._experts_implementation = form
                row.append(f"dense {form} {milliseconds(partial(stacked, *arguments)):.2f}")
            for kind, layer in layers.items():
                row.append(f"{kind} one by one {milliseconds(partial(layer.one_by_one, *arguments)):.2f}")
                if (stacks := Stacks.of(layer.experts)) is None:
                    raise RuntimeError("grouped products need torch 2.10 or later, and sizes that are multiples of 8")
                row.append(f"grouped {milliseconds(partial(forward_by_stacks, layer, stacks, *arguments)):.2f}")
                own_memory(layer)
            print(", ".join(row), flush=True)


if __name__ == "__main__":
    main()
