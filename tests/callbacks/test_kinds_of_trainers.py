"""Trainers with unusual settings: the compression works in them, or they are refused before the first batch."""

import lightning as L
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelPruning
from lightning.pytorch.loggers import CSVLogger
from support.callbacks import short
from support.models import CausalLM, assert_same_state, loader, state_of, tiny_llama, token_batches, trainer
from torch import nn

from zssvd_lightning import LoRARecovery, LowRankPrehab, Phase, Schedule, ZSSVDCallback, scheduled_steps
from zssvd_lightning.errors import UnsupportedTrainingError
from zssvd_lightning.serialization.specs import ranks_of


class Warmed(CausalLM):
    """With a schedule that ends with the training."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, int(scheduled_steps(self.trainer)))
        return [optimizer], [{"scheduler": rates, "interval": "step"}]


class Batches(L.Callback):
    def __init__(self):
        self.phases = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        (callback,) = [each for each in trainer.callbacks if isinstance(each, ZSSVDCallback)]
        self.phases.append(callback.phase.value)


SETTINGS = {
    "defaults": {},
    "no correction": {"corrections": 0},
    "many": {"corrections": 5, "truncations": 3, "schedule": Schedule(start_step=100, start_epoch=3)},
    "best": {"preset": "best"},
    "refit": {"metric": "two_sided", "correction_step": "refit", "output_side": "sampled"},
    "reestimate": {"metric": "two_sided", "selection": "curvature", "reestimate": True},
    "8 bits": {"storage": "hq", "prune_ratio": 0.7},
    "lora": {"recovery": LoRARecovery(rank=2, lr=1e-3), "min_rank_fraction": 0.3},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_fast_dev_run_goes_through_all_phases(case, caplog):
    module, seen = Warmed(), Batches()
    callback = ZSSVDCallback(**({"prune_ratio": 0.4, "progress": False} | SETTINGS[case]))
    fitted = trainer(
        callback,
        seen,
        EarlyStopping("val_loss"),
        fast_dev_run=True,
        max_epochs=-1,
        enable_checkpointing=True,
        logger=True,
    )
    fitted.fit(module, loader(token_batches()), loader(token_batches(2)))
    assert callback.phase is Phase.DONE
    assert ranks_of(module)
    assert seen.phases.count("recover") == 1
    assert set(seen.phases) == {"calibrate", "recover"} | ({"correct"} if "correct" in seen.phases else set())
    told = f"It takes {len(seen.phases) - 1} batches before the 1 of fast_dev_run"
    assert told in caplog.text
    assert (fitted.max_epochs, fitted.max_steps) == (1, 1)
    assert callback.report.config["compression"]["corrections"] <= 1


@pytest.mark.parametrize("settings", [{"fast_dev_run": 3}, {"fast_dev_run": 9}, {"accumulate_grad_batches": 4}])
def test_as_many_batches_as_fast_dev_run_says_train_the_factors(settings):
    settings = {"fast_dev_run": 2} | settings
    seen = Batches()
    trainer(short(), seen, **settings).fit(CausalLM(), loader(token_batches(9)))
    assert seen.phases.count("recover") >= settings["fast_dev_run"]


def test_the_next_fit_of_the_callback_is_a_whole_one():
    callback = short(calibration_batches=3, corrections=2)
    needed = callback.batches_needed()
    trainer(callback, fast_dev_run=True).fit(CausalLM(), loader(token_batches()))
    assert len(callback.report.losses) < 7
    assert callback.batches_needed() == needed
    seen = Batches()
    trainer(callback, seen, max_epochs=20).fit(CausalLM(), loader(token_batches()))
    assert seen.phases.count("calibrate") == 9
    assert callback.report.config["compression"]["corrections"] == 2


def test_a_dry_run_under_fast_dev_run_writes_nothing(tmp_path, caplog):
    module = CausalLM()
    before = state_of(module)
    callback = short(dry_run=tmp_path / "plan.yaml")
    trainer(callback, fast_dev_run=True).fit(module, loader(token_batches()))
    assert not list(tmp_path.iterdir())
    assert "has not written them to" in caplog.text
    assert_same_state(before, state_of(module))


def test_prehab_rests_under_fast_dev_run(caplog):
    module, callback = CausalLM(), short(start_step=216)
    trainer(LowRankPrehab(steps=200), callback, fast_dev_run=True).fit(module, loader(token_batches()))
    assert callback.phase is Phase.DONE
    assert "LowRankPrehab has been set up but adds nothing" in caplog.text


def test_fast_dev_run_of_a_bad_configuration_fails_before_any_batch():
    class TwoOptimizers(CausalLM):
        automatic_optimization = False

    with pytest.raises(UnsupportedTrainingError, match="optimizes manually"):
        trainer(short(), fast_dev_run=True).fit(TwoOptimizers(), loader(token_batches()))


@pytest.mark.parametrize("recovery", [None, LoRARecovery(rank=1, lr=1e-3, loss="distill", clip_rank=True)])
def test_a_trainer_that_never_logs(tmp_path, recovery):
    logger = CSVLogger(tmp_path)
    callback = short(recovery=recovery, calibration_batches=3)
    fitted = trainer(
        callback, LowRankPrehab(steps=2, moment_batches=1), log_every_n_steps=0, logger=logger, max_epochs=9
    )
    with pytest.raises(UnsupportedTrainingError, match="start_step=3"):
        fitted.fit(CausalLM(), loader(token_batches()))
    callback = short(recovery=recovery, calibration_batches=3, start_step=4)
    fitted = trainer(
        callback, LowRankPrehab(steps=2, moment_batches=1), log_every_n_steps=0, logger=logger, max_epochs=9
    )
    fitted.fit(CausalLM(), loader(token_batches()))
    assert callback.phase is Phase.DONE
    logger.save()
    columns = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert "zssvd/phase" in columns
    assert "zssvd/prehab_weight" not in columns


def test_a_barebones_trainer():
    callback = short()
    fitted = L.Trainer(barebones=True, accelerator="cpu", devices=1, max_epochs=6, callbacks=[callback])
    module = CausalLM()
    fitted.fit(module, loader(token_batches()), loader(token_batches(2)))
    assert callback.phase is Phase.DONE
    assert ranks_of(module)


def test_pruning_is_refused_before_any_batch():
    module = CausalLM()
    before, callback = state_of(module), short()
    pruning = ModelPruning("l1_unstructured", amount=0.5, verbose=0)
    fitted = trainer(callback, pruning, max_epochs=6)
    with pytest.raises(UnsupportedTrainingError, match=r"ModelPruning .*compress first, and prune the factors"):
        fitted.fit(module, loader(token_batches()))
    assert fitted.global_step == 0
    assert_same_state(before, state_of(module))


def test_pruning_works_in_a_second_fit():
    module = CausalLM()
    trainer(short(), max_epochs=6).fit(module, loader(token_batches()))
    parameters = [(part, "weight") for part in module.modules() if isinstance(part, nn.Linear)][:4]
    pruning = ModelPruning("l1_unstructured", parameters_to_prune=parameters, amount=0.5)
    trainer(pruning, max_epochs=2).fit(module, loader(token_batches()))
    assert all((part.weight == 0).any() for part, _ in parameters)


class Elsewhere(pytorch_lightning.LightningModule):
    """A module of the other package."""

    def __init__(self):
        super().__init__()
        self.model = tiny_llama()

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("build", [short, lambda: LowRankPrehab(steps=2)])
def test_the_trainer_of_another_package_is_named(build):
    fitted = pytorch_lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[build()],
    )
    with pytest.raises(UnsupportedTrainingError, match=r"'pytorch_lightning'.*from lightning\.pytorch"):
        fitted.fit(Elsewhere(), loader(token_batches()))
    assert fitted.global_step == 0
