"""Low-Rank Prehab on several processes: the same term on all, from the second moments of the batches of all."""

from pathlib import Path
from typing import Any

import torch
from support import processes
from support.models import CausalLM, loader, padded_batches, trainer
from support.parallel import KeepsLast, Replicated, Run, Sharded
from torchdata.stateful_dataloader import StatefulDataLoader

from zssvd_lightning.callbacks.prehab import LowRankPrehab

STEPS = 8
"""Optimizer steps of a run, of which the first 3 are for second moments."""


class Plain(Replicated):
    """In float64 from the start, since Lightning loads weights before it changes their type."""

    def __init__(self) -> None:
        super().__init__(lr=0.1)
        self.double()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def prehab(**settings: Any) -> LowRankPrehab:
    return LowRankPrehab(**({"steps": 4, "moment_batches": 3, "weight": 0.3, "regularizer": "nuclear"} | settings))


def batches() -> list[dict[str, torch.Tensor]]:
    """Which differ in how many tokens they hold, but not in how many terms their losses have."""
    return [batch | {"labels": batch["input_ids"]} for batch in padded_batches(2 * STEPS)]


def fit(rank: int, size: int, folder: Path, strategy: str = "ddp", resume_from: str | None = None) -> None:
    """Trains on this process's share, with a checkpoint of every step, and leaves `RANK.pt`."""
    module = Plain() if strategy == "ddp" else Sharded()
    callback, described = prehab(), Run(strategy=strategy)
    distribution = {"devices": size, "strategy": described.strategy_for(size), "use_distributed_sampler": False}
    saving = KeepsLast(folder)
    saving.save_last, saving.save_top_k, saving.filename = False, -1, "{step}"
    fitted = trainer(callback, saving, enable_checkpointing=True, **distribution)
    data = StatefulDataLoader(batches()[rank::size], batch_size=None)
    fitted.fit(module, data, ckpt_path=resume_from)
    torch.save(outcome(module, callback), folder / f"{rank}.pt")


def outcome(module: CausalLM, callback: LowRankPrehab) -> dict[str, Any]:
    return {"weights": module.state_dict(), "kept": callback.state_dict()["kept"]}


def run(folder: Path, *args: Any) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    processes.check(folder, processes.start(folder, 2, fit, *args))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_processes_add_the_term_of_one_process_over_all_batches_and_go_on_from_checkpoints(tmp_path):
    module, callback = Plain(), prehab(moment_batches=6)
    trainer(callback, accumulate_grad_batches=2).fit(module, loader(batches()))
    alone = outcome(module, callback)
    resumed_from = [None, *(str(tmp_path / "None" / f"step={step}.ckpt") for step in (2, 5))]
    for path in resumed_from:
        ours, theirs = run(tmp_path / str(path and Path(path).stem), "ddp", path)
        for part in ("weights", "kept"):
            assert ours[part].keys() == theirs[part].keys()
            assert all(torch.equal(ours[part][name], theirs[part][name]) for name in ours[part])
            torch.testing.assert_close(ours[part], alone[part], rtol=1e-7, atol=1e-10)
        assert len(ours["kept"]) == 8


def test_weights_in_rows_are_refused(tmp_path):
    assert processes.start(tmp_path, 2, fit, "fsdp2") == [1, 1]
    told = (tmp_path / "1.log").read_text()
    assert "UnsupportedTrainingError: under ModelParallelStrategy no process has whole weights" in told
    assert "in a first fit on one device or with strategy='ddp'" in told
