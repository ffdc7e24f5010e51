"""Low-Rank Prehab on several processes: the same term on all, from the second moments of the batches of all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import processes
from support.models import CausalLM, loader, padded_batches, token_batches, trainer
from support.parallel import KeepsLast, Replicated, Run, Sharded
from torchdata.stateful_dataloader import StatefulDataLoader

from zssvd_lightning.prehab import LowRankPrehab

STEPS = 8
"""Optimizer steps of a run, of which the first 3 are for second moments."""


class Plain(Replicated):
    """In float64 from the start, since Lightning loads weights before it changes their type."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.double()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def prehab(**settings: Any) -> LowRankPrehab:
    return LowRankPrehab(**({"steps": 4, "moment_batches": 3, "weight": 0.3, "regularizer": "nuclear"} | settings))


def fit(rank: int, size: int, folder: Path, lr: float, strategy: str = "ddp", resume_from: str | None = None) -> None:
    """Trains on this process's share, with a checkpoint of every step, and leaves `RANK.pt`."""
    module = (Plain if strategy == "ddp" else Sharded)(lr=lr)
    callback, described = prehab(), Run(strategy=strategy)
    distribution = {"devices": size, "strategy": described.strategy_for(size), "use_distributed_sampler": False}
    saving = KeepsLast(folder)
    saving.save_last, saving.save_top_k, saving.filename = False, -1, "{step}"
    fitted = trainer(callback, saving, enable_checkpointing=True, **distribution)
    batches = batches_of(lr)[rank::size]
    fitted.fit(module, StatefulDataLoader(batches, batch_size=None), ckpt_path=resume_from)
    torch.save(outcome(module, callback), folder / f"{rank}.pt")


def outcome(module: CausalLM, callback: LowRankPrehab) -> dict[str, Any]:
    return {"weights": module.state_dict(), "whitening": callback.state_dict()["whitening"]}


def batches_of(lr: float) -> list[dict[str, torch.Tensor]]:
    """Those of a still model differ in how many tokens they hold."""
    return (token_batches if lr else padded_batches)(2 * STEPS)


def alone(lr: float) -> dict[str, Any]:
    """On one process, two batches a step."""
    module, callback = Plain(lr=lr), prehab(moment_batches=6)
    fitted = trainer(callback, accumulate_grad_batches=2)
    fitted.fit(module, loader(batches_of(lr)))
    return outcome(module, callback)


def run(folder: Path, *args: Any) -> list[dict[str, Any]]:
    processes.check(folder, processes.start(folder, 2, fit, *args))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("lr", [0.0, 0.1])
def test_processes_add_the_term_of_one_process_over_all_batches(tmp_path, lr):
    ours, theirs = run(tmp_path, lr)
    for part in ("weights", "whitening"):
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in ours[part])
        torch.testing.assert_close(ours[part], alone(lr)[part], rtol=1e-7, atol=1e-10)
    assert len(ours["whitening"]) == 8


@pytest.mark.parametrize("step", [2, 5])
def test_processes_go_on_from_a_checkpoint(tmp_path, step):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    whole.mkdir(), resumed.mkdir()
    expected = run(whole, 0.1)
    ours, theirs = run(resumed, 0.1, "ddp", str(whole / f"step={step}.ckpt"))
    assert all(torch.equal(ours["weights"][name], theirs["weights"][name]) for name in ours["weights"])
    torch.testing.assert_close(ours["weights"], expected[0]["weights"], rtol=1e-9, atol=1e-12)


def test_weights_in_rows_are_refused(tmp_path):
    assert processes.start(tmp_path, 2, fit, 0.1, "fsdp2") == [1, 1]
    told = (tmp_path / "1.log").read_text()
    assert "UnsupportedTrainingError: under ModelParallelStrategy no process has whole weights" in told
    assert "in a first fit on one device or with strategy='ddp'" in told
