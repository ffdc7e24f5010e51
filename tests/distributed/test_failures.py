"""A process that fails, or does nothing any more: the others say so instead of waiting for ever."""

import dataclasses
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from support import processes
from support.callbacks import scheduled
from support.models import loader, trainer
from support.parallel import SHORT, Replicated, Run, Sharded, fit, whole_weights

from zssvd_lightning import Phase, ZSSVDCallback
from zssvd_lightning.decomposition.decompose import Spectrum
from zssvd_lightning.errors import UnfinishedError


class OnOne(L.Callback):
    """Does something on the second process, after the second batch of the calibration."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_rank == 1 and batch_idx == 1:
            self.act(pl_module)

    def act(self, module):
        raise NotImplementedError


class Poisons(OnOne):
    def act(self, module):
        step = module.training_step
        module.training_step = lambda *batch: step(*batch) * torch.nan


class Hangs(OnOne):
    def act(self, module):
        time.sleep(100)


class BreaksDecomposition(OnOne):
    def act(self, module):
        def fails(*_):
            raise torch.linalg.LinAlgError("did not converge")

        Spectrum.of = fails


class BreaksSelection(L.Callback):
    """Fails on the first process, which selects for all."""

    def setup(self, trainer, pl_module, stage):
        if trainer.global_rank == 0:
            from zssvd_lightning.config.compression import CompressionConfig
            from zssvd_lightning.selection.rules import Rule

            CompressionConfig.rule = property(lambda _: Rule(lambda *_: 1 / 0))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("breaks", "said_by_others"),
    [
        (Poisons, None),
        (Hangs, None),
        (BreaksDecomposition, "ProcessFailedError: process 1 of 2 failed: CalibrationError: the SVD of model.model."),
        (BreaksSelection, "ProcessFailedError: process 0 of 2 failed: ZeroDivisionError"),
    ],
)
def test_all_processes_end_within_the_timeout(tmp_path, strategy, breaks, said_by_others):
    healthy = 1 if breaks is BreaksSelection else 0
    described = Run(strategy=strategy, callbacks=(breaks,), timeout=4)
    wait_for = [healthy] if breaks is Hangs else None
    codes = processes.start(tmp_path, 2, fit, described, timeout=240, wait_for=wait_for)
    assert codes[healthy] == 1
    assert codes[1 - healthy] == (None if breaks is Hangs else 1)
    if said_by_others is not None:
        assert said_by_others in (tmp_path / f"{healthy}.log").read_text()


class StepsBackAtTheEnd(L.Callback):
    """Notes the parameters before compression, and has the last thing that is done fail."""

    def on_train_start(self, trainer, pl_module):
        self.before = {n: p.to_local().clone() for n, p in pl_module.named_parameters()}

        def fails(trainer):
            raise ValueError("no optimizers")

        trainer.strategy.setup_optimizers = fails

    def on_exception(self, trainer, pl_module, exception):
        after = {n: p.to_local() for n, p in pl_module.named_parameters()}
        assert after.keys() == self.before.keys()
        assert all(torch.equal(after[n], p) for n, p in self.before.items())
        for module in pl_module.modules():
            if hasattr(module, "_get_fsdp_state"):
                group = module._get_fsdp_state()._fsdp_param_group
                assert {p.sharded_param for p in group.fsdp_params} <= set(pl_module.parameters())
        print("everything is back")


def test_layers_go_back_into_their_units_when_the_last_step_fails(tmp_path):
    codes = processes.start(tmp_path, 2, fit, Run(strategy="fsdp2", callbacks=(StepsBackAtTheEnd,)))
    assert codes == [1, 1]
    for rank in (0, 1):
        log = (tmp_path / f"{rank}.log").read_text()
        assert "everything is back" in log
        assert "ValueError: no optimizers" in log


class Unfinished(ZSSVDCallback):
    def batches_needed(self, *_):
        return 0


def run_out(rank: int, size: int, folder: Path, strategy: str) -> None:
    """A fit that ends in the correction, after a truncation."""
    described = Run(strategy=strategy)
    module = (Sharded if strategy == "fsdp2" else Replicated)()
    callback = Unfinished(prune_ratio=0.4, schedule={"calibration_batches": 2}, correction_batches=4, progress=False)
    fitted = trainer(callback, devices=size, strategy=described.strategy_for(size), use_distributed_sampler=False)
    with pytest.raises(UnfinishedError, match="in phase 'correct' after 1 of"):
        fitted.fit(module, loader(described.batches(rank, size)[:3]))
    assert callback.phase is Phase.WAIT
    expected = Replicated().state_dict()
    assert all(torch.equal(w, expected[n]) for n, w in whole_weights(module).items())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_fit_that_ends_too_soon_puts_the_weights_back(tmp_path, strategy):
    processes.check(tmp_path, processes.start(tmp_path, 2, run_out, strategy))


class BreaksForward(L.Callback):
    """Fails in the middle of the model while the weights are truncated; notes what is there afterwards."""

    def on_train_start(self, trainer, pl_module):
        self.before = {n: p.to_local().clone() for n, p in pl_module.named_parameters()}

    at = 5

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.at:
            pl_module.model.model.layers[1].mlp.act_fn.register_forward_hook(lambda *_: int("none"))

    def on_exception(self, trainer, pl_module, exception):
        after = dict(pl_module.named_parameters())
        assert all(torch.equal(after[n].to_local(), p) for n, p in self.before.items())
        assert not any(module._forward_pre_hooks for module in pl_module.modules() if type(module) is torch.nn.Linear)
        print("everything is back")


class BreaksCalibration(BreaksForward):
    """The same while inputs are watched."""

    at = 9


@pytest.mark.parametrize("breaks", [BreaksForward, BreaksCalibration])
def test_sharded_weights_go_back_when_a_forward_pass_fails_halfway(tmp_path, breaks):
    assert processes.start(tmp_path, 2, fit, Run(strategy="fsdp2", callbacks=(breaks,))) == [1, 1]
    for rank in (0, 1):
        log = (tmp_path / f"{rank}.log").read_text()
        assert "everything is back" in log
        assert "ValueError: invalid literal" in log


class LosesPlan(L.Callback):
    """Has the second process look for the plan where there is none, as on another node."""

    def setup(self, trainer, pl_module, stage):
        (compression,) = [c for c in trainer.callbacks if isinstance(c, ZSSVDCallback)]
        name = "missing.yaml" if trainer.global_rank == 1 else "plan.yaml"
        life = compression.run.life
        life.config = dataclasses.replace(life.config, plan=f"{life.config.plan}/{name}")


def test_a_plan_that_one_process_cannot_read_is_an_error_on_all(tmp_path):
    callback = ZSSVDCallback(**scheduled(SHORT | {"dry_run": tmp_path / "plan.yaml"}))
    trainer(callback, max_epochs=9).fit(Replicated(), loader(Run().batches(0, 1)))
    described = Run(callbacks=(LosesPlan,), compression={"plan": str(tmp_path)}, timeout=30)
    assert processes.start(tmp_path, 2, fit, described, timeout=25) == [1, 1]
    assert "ProcessFailedError: process 1 of 2 failed: PlanError" in (tmp_path / "0.log").read_text()
