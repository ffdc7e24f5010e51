"""Cost of a compression on several processes: formulas, measurements of small runs, and estimates for large models.

`python benchmarks/scaling.py` prints the figures in docs/scaling.md; give the machine nothing else to do meanwhile.

Letters: a layer is (m, n); an input that some layers share has width n; R processes; w bytes a weight; statistics are
in float32. Bytes moved are those that all processes send together for the compression, by ring algorithms; the
reduction to one process is gloo's.
"""

import functools
import os
import socket
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from zssvd_lightning import Schedule, ZSSVDCallback
from zssvd_lightning.callbacks.lifecycle import Lifecycle
from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.decomposition.work_sharing import share_out, svd_work, whitening_work
from zssvd_lightning.distributed import Shards
from zssvd_lightning.model.targets import find_targets
from zssvd_lightning.whitening.svd import thin_svd

STATISTIC = 4
"""Bytes of a number in a second moment or a gradient."""
GLOO_REDUCE_SCATTER = 2
"""What gloo moves for a reduce-scatter, as a multiple of a ring: it makes an all-reduce of it."""
PRUNE_RATIO = 0.2
BATCHES = 2


@dataclass(frozen=True)
class Llama:
    """Shapes of a Llama."""

    name: str
    hidden: int
    intermediate: int
    keys: int
    blocks: int
    weight: int
    """Bytes of a weight, w."""

    def config(self) -> LlamaConfig:
        """Return the config of transformers."""
        heads = max(1, self.hidden // 128)
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.blocks,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads * self.keys // self.hidden),
            vocab_size=64,
        )

    @functools.cached_property
    def targets(self) -> dict[str, Any]:
        """Linear layers of the model, on the meta device."""
        with torch.device("meta"):
            return find_targets(LlamaForCausalLM(self.config()))

    @functools.cached_property
    def leaders(self) -> dict[str, str]:
        """Layer -> first layer that reads the same input."""
        same = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
        return {name: _renamed(name, same) for name in self.targets}

    @property
    def weights(self) -> int:
        """Numbers in all layers: sum of m n."""
        return sum(m * n for m, n in (target.shape for target in self.targets.values()))

    @property
    def second_moments(self) -> int:
        """Numbers in all second moments: sum of n^2 over inputs."""
        return sum(self.targets[leader].shape[1] ** 2 for leader in set(self.leaders.values()))

    def spectra(self, size: int) -> int:
        """Return the numbers in the spectra of the process with most of them: sum of r (m + n + 1) over its layers."""
        shares = share_out(self.targets, self.leaders, size)
        shapes = [[self.targets[name].shape for name in share] for share in shares]
        most: int = max(sum(min(shape) * (sum(shape) + 1) for shape in share) for share in shapes)
        return most

    @property
    def statistics(self) -> tuple[int, int]:
        """Bytes of all second moments, and of all gradients."""
        return STATISTIC * self.second_moments, STATISTIC * self.weights

    @property
    def of_a_unit(self) -> int:
        """Numbers in the second moments of one block."""
        return self.second_moments // self.blocks

    def busiest(self, size: int) -> float:
        """Return the floating-point operations of the process with the most to decompose."""
        shares = share_out(self.targets, self.leaders, size)
        return max(self._work(share) for share in shares)

    def _work(self, share: list[str]) -> float:
        shapes = {name: self.targets[name].shape for name in share}
        inputs = {self.leaders[name] for name in share}
        return sum(svd_work(*s) for s in shapes.values()) + sum(
            whitening_work(self.targets[name].shape[1]) for name in inputs
        )


def moved(model: Llama, strategy: str, size: int, factors: float, low_rank: float) -> dict[str, float]:
    """Return the bytes moved for each step of a compression.

    Args:
        model: its shapes.
        strategy: `ddp` or `fsdp2`.
        size: processes, R.
        factors: bytes of all factors, w times the sum of k (m + n).
        low_rank: bytes of the low-rank model, which DDP sends when it wraps it.
    """
    (A, G), W = model.statistics, model.weight * model.weights
    others = size - 1
    if strategy == "ddp":
        return {
            "a batch": 0,
            "truncation": others * (1 + 1 / size) * (A + G) + others * factors,
            "correction": 2 * others * G,
            "line search": 0,
            "factorization": others * low_rank,
        }
    return {
        "a batch": others * A,
        "truncation": others / size * (A + G + W + factors) + others * factors,
        "correction": 0,
        "line search": others * factors,
        "factorization": others * factors,
    }


def held(model: Llama, strategy: str, size: int, factors: float) -> dict[str, float]:
    """Return the bytes that a process holds in addition to those of training.

    Args:
        model: its shapes.
        strategy: `ddp` or `fsdp2`.
        size: processes, R.
        factors: bytes of all factors, w times the sum of k (m + n).
    """
    (A, G), W = model.statistics, model.weight * model.weights
    share = 1 if strategy == "ddp" else 1 / size
    return {"statistics": share * (A + G), "originals and factors": share * (W + factors)}


# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def measured(step: str, found: dict[str, float]) -> Iterator[None]:
    """Add what goes over the loopback device while all processes are in the block, and the CPU time of this one."""
    dist.barrier()
    before, busy = _sent(), time.process_time()
    yield
    found[f"{step}: CPU seconds"] += time.process_time() - busy
    dist.barrier()
    found[step] += _sent() - before


def _sent() -> int:
    (line,) = [line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.split()[9])


class Module(L.LightningModule):
    """Small Llama."""

    def __init__(self, shapes: Llama) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(shapes.config())

    def configure_model(self) -> None:
        """Shard the model under FSDP2."""
        if self.device_mesh is not None:
            for block in self.model.model.layers:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy."""
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain gradient descent."""
        return torch.optim.SGD(self.parameters(), 1e-3)


def work(rank: int, size: int, port: int, strategy: str, shapes: Llama, folder: str) -> None:
    """Run one process of a measured fit."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    torch.set_num_threads(1)
    found: dict[str, float] = defaultdict(float)

    def watch(owner: Any, name: str, step: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            with measured(step, found):
                return original(*args, **kwargs)

        setattr(owner, name, watched)

    watch(Compression, "_select", "decomposition")
    watch(Compression, "truncate", "truncation")
    watch(Compression, "correct", "correction")
    watch(Shards, "_absorb", "a batch")
    watch(Compression, "shorten_step", "line search")
    factorize = Lifecycle.factorize

    def look(life: Lifecycle, step: int, set_up_optimizers: Any) -> None:
        self = life.compression
        found["originals and factors"] = _bytes(self.originals) + _bytes(self.truncated.held)
        ranks = {name: layer.rank or 0 for name, layer in self.report().layers.items()}
        found["factors"] = shapes.weight * sum(ranks[name] * sum(t.shape) for name, t in self.targets.items())
        with measured("factorization", found):
            factorize(life, step, set_up_optimizers)
        found["low-rank model"] = _bytes([*self.model.parameters(), *self.model.buffers()])

    Lifecycle.factorize = look  # type: ignore[method-assign, assignment]
    decompose = Compression._select

    def count(self: Compression, *args: Any) -> Any:
        moments = self.gathering.moments
        found["statistics"] = _bytes(moments.input_sums) + _bytes(moments.gradient_sums)
        return decompose(self, *args)

    Compression._select = count  # type: ignore[method-assign, assignment]
    running: Strategy = (
        DDPStrategy(process_group_backend="gloo")
        if strategy == "ddp"
        else ModelParallelStrategy(size, 1, process_group_backend="gloo")
    )
    callback = ZSSVDCallback(
        PRUNE_RATIO,
        "zs-svd-line-search",
        schedule=Schedule(calibration_batches=BATCHES),
        correction_batches=1,
        progress=False,
    )
    ids = torch.randint(64, (2 * BATCHES + 2, 4, 128), generator=torch.Generator().manual_seed(rank))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=size,
        strategy=running,
        max_epochs=1,
        callbacks=[callback],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches: Any = [{"input_ids": i, "labels": i} for i in ids]
    trainer.fit(Module(shapes), DataLoader(batches, batch_size=None))
    torch.save(dict(found), Path(folder) / f"{rank}.pt")


def _bytes(held: Any) -> int:
    tensors = [held] if isinstance(held, Tensor) else held.values() if isinstance(held, Mapping) else held
    return sum(t.numel() * t.element_size() if isinstance(t, Tensor) else _bytes(t) for t in tensors)


def run(strategy: str, size: int, shapes: Llama) -> list[dict[str, float]]:
    """Return the measurements of every process."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        spawn(work, (size, port, strategy, shapes, folder), nprocs=size)  # type: ignore[no-untyped-call]
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(size)]


# ---------------------------------------------------------------------------------------------------------------------

SMALL = Llama("small", hidden=512, intermediate=1376, keys=256, blocks=4, weight=4)
LARGE = (
    Llama("7B", hidden=4096, intermediate=11008, keys=4096, blocks=32, weight=2),
    Llama("70B", hidden=8192, intermediate=28672, keys=1024, blocks=80, weight=2),
)


def check() -> None:
    """Print measured against computed figures, and then what they make of large models."""
    print(f"\n{SMALL.weights * 4 / 1e6:.1f} MB of weights, {SMALL.second_moments * 4 / 1e6:.1f} MB of second moments\n")
    print("| strategy | processes | step | computed | measured |\n|---|---|---|---|---|")
    run("ddp", 1, SMALL)  # whatever is slow the first time
    alone = {strategy: run(strategy, 1, SMALL) for strategy in ("ddp", "fsdp2")}
    rate = SMALL.busiest(1) / min(_seconds(ranks) for ranks in alone.values())
    for strategy, of_one in alone.items():
        for size in (1, 2, 4):
            ranks = of_one if size == 1 else run(strategy, size, SMALL)
            factors, low_rank = ranks[0]["factors"], ranks[0]["low-rank model"]
            seen = {step: ranks[0].get(step, 0.0) for step in moved(SMALL, strategy, size, factors, low_rank)}
            seen["truncation"] /= 2  # one before and one after the correction
            seen["a batch"] /= 2 * BATCHES
            for step, ring in moved(SMALL, strategy, size, factors, low_rank).items():
                computed = ring * (GLOO_REDUCE_SCATTER if step == "a batch" else 1)
                if size > 1:
                    _row(strategy, size, f"{step}, MB moved", computed / 1e6, seen[step] / 1e6)
            for kind, computed in held(SMALL, strategy, size, factors).items():
                most = max(found[kind] for found in ranks)
                _row(strategy, size, f"{kind}, MB held", computed / 1e6, most / 1e6)
            what = "decomposition, CPU seconds of the busiest"
            _row(strategy, size, what, SMALL.busiest(size) / rate, _seconds(ranks))
    print(f"\n{rate / 1e9:.1f} GFLOP/s of one core in the decomposition of the small model")
    large = _rate_of_a_large_svd()
    print(f"{large / 1e9:.1f} GFLOP/s in one SVD of (4096, 4096) on {torch.get_num_threads()} cores\n")
    project(large)


def project(rate: float) -> None:
    """Print what the formulas say of large models."""
    columns = ("a batch", "truncation", "correction", "line search", "factorization")
    print(f"| model | strategy | ranks | {' | '.join(columns)} | statistics | originals, factors | spectra |")
    print("|---" * (len(columns) + 6) + "|")
    for model in LARGE:
        factors = (1 - PRUNE_RATIO) * model.weight * model.weights
        for strategy in ("ddp", "fsdp2"):
            for size in (1, 8, 64):
                steps = moved(model, strategy, size, factors, factors)
                sent = {step: value / size / 1e9 for step, value in steps.items()}
                kept = {kind: value / 1e9 for kind, value in held(model, strategy, size, factors).items()}
                print(
                    f"| {model.name} | {strategy} | {size} | {' | '.join(f'{sent[step]:.1f}' for step in columns)} | "
                    f"{kept['statistics']:.1f} | {kept['originals and factors']:.1f} | "
                    f"{4 * model.spectra(size) / 1e9:.1f} |"
                )
    print("\n| model | ranks | TFLOP of the busiest | seconds at the rate above |\n|---|---|---|---|")
    for model in LARGE:
        for size in (1, 8, 64):
            busiest = model.busiest(size)
            print(f"| {model.name} | {size} | {busiest / 1e12:.0f} | {busiest / rate:.0f} |")
        print(f"second moments of one block: {STATISTIC * model.of_a_unit / 1e9:.2f} GB")


def _rate_of_a_large_svd() -> float:
    W = torch.randn(4096, 4096)
    start = time.perf_counter()
    thin_svd(W)
    return svd_work(4096, 4096) / (time.perf_counter() - start)


def _seconds(ranks: list[dict[str, float]]) -> float:
    """Return the CPU seconds of the busiest process in one decomposition of two."""
    return max(found["decomposition: CPU seconds"] for found in ranks) / 2


def _row(strategy: str, size: int, what: str, computed: float, seen: float) -> None:
    print(f"| {strategy} | {size} | {what} | {computed:.2f} | {seen:.2f} |", flush=True)


def _renamed(name: str, same: dict[str, str]) -> str:
    parent, _, last = name.rpartition(".")
    return f"{parent}.{same.get(last, last)}"


if __name__ == "__main__":
    check()
