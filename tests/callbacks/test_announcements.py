import logging

import lightning as L
import pytest
import torch
from support.callbacks import short
from support.models import CausalLM, loader, tiny_llama, token_batches, trainer
from torch import nn

from zssvd_lightning import CompressionConfig, Schedule, ZSSVDCallback
from zssvd_lightning.callbacks.announcements import course_of
from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.compression.memory.statements import memory_of_statistics
from zssvd_lightning.compression.pipeline import calibrate

HELD = ("input_sums", "gradient_sums", "output_sums")


def fit(callback, batches=30, **settings):
    module = CausalLM()
    trainer(callback, **settings).fit(module, loader(token_batches(batches)))
    return module


@pytest.fixture
def lines(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_fit_says_first_what_it_will_do_and_then_what_it_did(lines):
    callback = short(schedule=Schedule(calibration_batches=4), correction_batches=2)
    fit(callback, max_epochs=1)
    said = lines()
    course = (
        "compression starts at once and observes 12 batches (calibration and 1 correction), in which 12 of the 30 "
        "optimizer steps change no weight; extend_training=True would add them to the fit; then the low-rank model is "
        "trained"
    )
    assert said.index(course) == 1 + next(i for i, line in enumerate(said) if line.startswith("compressing 14 layers"))
    assert said.index(course) < next(i for i, line in enumerate(said) if line.startswith("truncated"))
    assert f"\n{callback.report}" in said
    assert not any("drift" in line for line in said)


class Alone(nn.Module):
    """Layers that share no input, of which the bound is exact."""

    def __init__(self, dtype):
        super().__init__()
        self.first, self.second = nn.Linear(64, 96, dtype=dtype), nn.Linear(96, 32, dtype=dtype)

    def forward(self, x):
        return self.second(self.first(x).relu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("metric", ["input", "two_sided"])
def test_the_memory_of_the_statistics_is_that_of_their_tensors(dtype, metric):
    model = Alone(dtype)
    batches = [(torch.randn(16, 64, dtype=dtype), torch.randn(16, 32, dtype=dtype)) for _ in range(2)]
    settings = {"metric": metric, "output_side": "empirical", "corrections": 0}
    run = Compression(model, CompressionConfig(0.5, **settings))
    said = memory_of_statistics(run)
    loss = lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1])  # noqa: E731
    moments = calibrate(model, batches, run.config, progress=False, loss=loss)
    held = sum(sums.nbytes for kind in HELD for sums in getattr(moments, kind).values())
    assert said == f"statistics take up to {held / 2**30:.3g} GiB on cpu"


def test_layers_that_share_an_input_take_less_than_is_said(lines):
    fit(short(corrections=0, schedule=Schedule(calibration_batches=4)), max_epochs=1)
    (said,) = [float(line.split()[4]) * 2**30 for line in lines() if line.startswith("statistics take up to")]
    moments = calibrate(tiny_llama(), token_batches(4), CompressionConfig(0.4, metric="input"), progress=False)
    held = sum(sums.nbytes for kind in HELD for sums in getattr(moments, kind).values())
    shared = sum(4 * 32**2 for name, leader in moments.leaders.items() if name != leader)
    assert said == pytest.approx(held + shared, rel=5e-3)


@pytest.mark.parametrize(
    ("schedule", "settings", "start", "steps"),
    [
        (Schedule(), {"max_epochs": 2}, "at once", "10 of the 60"),
        (Schedule(start_epoch=2), {"max_epochs": 4}, "at epoch 2", "10 of the 120"),
        (
            Schedule(start_epoch=1, start_step=40),
            {"max_steps": 90, "max_epochs": 9},
            "at epoch 1, from step 40 on",
            "10 of the 90",
        ),
        (Schedule(), {"max_epochs": 2, "accumulate_grad_batches": 4}, "at once", "3 of the 16"),
        (Schedule(), {"max_epochs": -1}, "at once", "10 optimizer"),
    ],
)
def test_steps_that_change_no_weight_are_counted(schedule, settings, start, steps):
    class Asks(L.Callback):
        def on_train_start(self, trainer, pl_module):
            self.text = course_of(trainer, 2, schedule, 10)
            trainer.should_stop = True

    asks = Asks()
    fit(asks, **settings)
    assert f"starts {start} and observes 10 batches (calibration and 2 corrections), in which {steps}" in asks.text


def test_extended_training_and_a_dry_run_are_told(lines, tmp_path):
    fit(short(schedule=Schedule(calibration_batches=4, extend_training=True)), max_epochs=1)
    assert any("extend_training=True adds them to the fit" in line for line in lines())
    fit(short(schedule=Schedule(calibration_batches=4), dry_run=tmp_path / "plan.yaml"), max_epochs=1)
    assert any("then it writes the ranks and stops" in line for line in lines())


def test_a_short_run_to_try_settings_out_is_told_in_its_own_numbers(lines):
    fit(ZSSVDCallback(0.3, progress=False), fast_dev_run=2)
    assert any("observes 2 batches (calibration and 1 correction)" in line for line in lines())


def test_hooks_measure_the_model_right_before_and_after():
    class Measures(ZSSVDCallback):
        def loss(self, module):
            assert not module.training
            assert not torch.is_grad_enabled()
            return float(module.training_step(token_batches(1)[0], 0))

        def on_before_truncation(self, trainer, pl_module):
            assert self.report is None
            self.before = self.loss(pl_module), sum(isinstance(m, nn.Linear) for m in pl_module.modules())

        def on_compressed(self, trainer, pl_module):
            self.after = self.loss(pl_module), self.report.reached

    callback = Measures(0.4, schedule=Schedule(calibration_batches=4), corrections=2, progress=False)
    module = fit(callback, max_epochs=2)
    assert module.training
    assert callback.before[1] == 15
    assert callback.after[1] >= 0.4
    assert callback.after[0] != callback.before[0]


def test_the_default_method_runs_in_a_fit():
    callback = ZSSVDCallback(0.4, schedule=Schedule(calibration_batches=4), correction_batches=2, progress=False)
    fit(callback, max_epochs=1)
    assert callback.report.config["compression"]["storage"] == "pivoted"
    assert callback.report.kept_back["final"] <= callback.report.kept_back["truncated"]
