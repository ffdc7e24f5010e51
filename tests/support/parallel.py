"""Training runs with compression in them under DDP and FSDP2, for one process of several."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torchdata.stateful_dataloader import StatefulDataLoader

from support import processes
from support.callbacks import scheduled
from support.killed_run import Kill
from support.models import FAMILIES, CausalLM, loader, padded_batches, trainer
from zssvd_lightning import ZSSVDCallback
from zssvd_lightning.whitening import spectrum

SHORT = {
    "prune_ratio": 0.4,
    "preset": "zs-svd-line-search",
    "calibration_batches": 4,
    "correction_batches": 2,
    "progress": False,
}
NEEDED = 12
"""Batches that a `SHORT` compression takes of each process."""


NATURAL = {
    "metric": "two_sided",
    "selection": "curvature",
    "corrections": 2,
    "correction_step": "natural",
    "fresh_moments": False,
}
"""Steps along the natural gradient, by the second moments of the first batches."""
REFIT = NATURAL | {"correction_step": "refit", "corrections": 1}
"""A closed-form refit, truncated again by the same second moments."""


def batches_of(family: str, count: int, rank: int, size: int) -> list[dict[str, Tensor]]:
    """Every `size`-th of `count` batches from `rank` on; those of tokens differ in how many they hold."""
    if family in ("llama", "gpt2", "bert"):
        return padded_batches(count)[rank::size]
    return (FAMILIES[family].batches() * count)[rank:count:size]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The members of the outermost lists of modules."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    names = [f"{name}." for name, _ in lists]
    return [block for name, blocks in lists if not any(name.startswith(n) for n in names) for block in blocks]


class Replicated(CausalLM):
    """Has the same weights on every process and in every run."""

    def __init__(self, family: str = "llama", **settings: Any) -> None:
        torch.manual_seed(0)
        super().__init__(FAMILIES[family].build(), **settings)


class Sharded(Replicated):
    """Shards blocks, and what is left of the model."""

    policy = MixedPrecisionPolicy()

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for block in blocks_of(self.model):
            fully_shard(block, mesh=mesh, mp_policy=self.policy)
        fully_shard(self.model, mesh=mesh, mp_policy=self.policy)


class InBfloat16(Sharded):
    """Runs in bfloat16, and keeps and reduces in float32."""

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


@dataclass
class Run:
    """What is run on every process. Callbacks are made there, by functions that are given nothing."""

    strategy: str = "ddp"
    family: str = "llama"
    module: Callable[..., L.LightningModule] | None = None
    count: int = 0
    """Batches of all processes together; as many as compression takes when 0."""
    compression: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the strategy."""
    timeout: float = 60
    scale: float | None = None
    """Loss scale of 16-mixed precision."""
    callbacks: tuple[Callable[[], L.Callback], ...] = ()
    ckpt_path: str | None = None

    def strategy_for(self, size: int) -> Any:
        shared = {"process_group_backend": "gloo", "timeout": timedelta(seconds=self.timeout)} | self.settings
        if self.scale is not None:
            scaler = torch.amp.GradScaler("cpu", init_scale=self.scale, growth_interval=10**9)
            shared["precision_plugin"] = MixedPrecision("16-mixed", "cpu", scaler)
        return DDPStrategy(**shared) if self.strategy == "ddp" else ModelParallelStrategy(size, 1, **shared)

    def batches(self, rank: int, size: int) -> list[dict[str, Tensor]]:
        return batches_of(self.family, self.count or NEEDED * size, rank, size)


def fit(rank: int, size: int, folder: Path, run: Run) -> None:
    """Trains over this process's share of the batches, and leaves `RANK.pt`."""
    torch.manual_seed(0)
    module = (run.module or {"ddp": Replicated, "fsdp2": Sharded}[run.strategy])(run.family)
    compression, seen = ZSSVDCallback(**scheduled(SHORT | run.compression)), Witness()
    distribution = {"devices": size, "strategy": run.strategy_for(size), "use_distributed_sampler": False}
    fitted = trainer(
        compression,
        seen,
        *(make() for make in run.callbacks),
        **(distribution | {"default_root_dir": folder} | run.trainer),
    )
    batches = StatefulDataLoader(run.batches(rank, size), batch_size=None)  # knows where a resumed run goes on
    fitted.fit(module, batches, ckpt_path=run.ckpt_path)
    torch.save(seen.statement(module, compression), folder / f"{rank}.pt")


def alone(run: Run, size: int) -> dict[str, Any]:
    """The same on one process that sees the batches of `size`, step by step."""
    module = (run.module or Replicated)(run.family)
    gathered = {"calibration_batches": 4 * size, "correction_batches": 2 * size}
    compression, seen = ZSSVDCallback(**scheduled(SHORT | gathered | run.compression)), Witness()
    batches = batches_of(run.family, run.count or NEEDED * size, 0, 1)
    trainer(compression, seen, **run.trainer).fit(module, loader(batches))
    return seen.statement(module, compression)


class KeepsLast(ModelCheckpoint):
    """Saves after every step, to one file or folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, every_n_train_steps=1, save_top_k=0, save_last=True)

    @staticmethod
    def newest(folder: Path) -> Path:
        """Which has another name once the model is low-rank."""
        return max(folder.glob("last*.ckpt"), key=lambda path: path.stat().st_mtime)


class Witness(L.Callback):
    """Counts decompositions, and keeps the weights as they are when the factors begin to train."""

    def __init__(self) -> None:
        self.svds, self.weights, self.losses = 0, None, []
        self._svd = spectrum.thin_svd

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        spectrum.thin_svd = self._counting

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        spectrum.thin_svd = self._svd

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._keep(trainer, pl_module)

    def on_train_end(self, trainer, pl_module):
        self._keep(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())

    def statement(self, module: L.LightningModule, compression: ZSSVDCallback) -> dict[str, Any]:
        report = compression.report
        return {
            "at_factorization": self.weights,
            "weights": whole_weights(module),
            "ranks": {name: layer.rank for name, layer in report.layers.items()},
            "losses": report.losses,
            "drift": report.first_order_sum,
            "svds": self.svds,
            "seen": self.losses,
        }

    def _counting(self, *args: Any, **kwargs: Any) -> Any:
        self.svds += 1
        return self._svd(*args, **kwargs)

    def _keep(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (compression,) = [c for c in trainer.callbacks if isinstance(c, ZSSVDCallback)]
        if self.weights is None and compression.report is not None:
            self.weights = whole_weights(pl_module)


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all weights, also of those in parts. Collective."""
    state = module.state_dict()
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for n, t in state.items()}


def multiplied_out(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The dense weights that low-rank ones stand for: factors are the same but for signs."""
    dense = {n: t for n, t in weights.items() if not n.endswith(("up.weight", "down.weight"))}
    ups = [n.removesuffix("up.weight") for n in weights if n.endswith("up.weight")]
    return dense | {f"{n}weight": weights[f"{n}up.weight"] @ weights[f"{n}down.weight"] for n in ups}


def killed(folder: Path, size: int, described: Run, phase: str, batches: int) -> Path:
    """Kills all processes of a run after so many batches of a phase; the newest checkpoint it left."""
    saving = functools.partial(KeepsLast, folder / "saved")
    dying = functools.partial(Kill, batches, "on_train_batch_end", [phase])
    settings = {"enable_checkpointing": True} | described.trainer
    doomed = dataclasses.replace(described, callbacks=(saving, dying), trainer=settings)
    assert processes.start(folder, size, fit, doomed) == [-9] * size
    return KeepsLast.newest(folder / "saved")


def run(folder: Path, size: int, described: Run, **settings: Any) -> list[dict[str, Any]]:
    """What each of `size` processes has to say of a run."""
    processes.check(folder, processes.start(folder, size, fit, described, **settings))
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]
