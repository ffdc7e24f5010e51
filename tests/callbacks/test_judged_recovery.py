"""Recoveries that held-out batches judge: training never makes the model worse on them, whatever its settings are."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.callbacks import Interrupt, short
from support.models import VOCABULARY, CausalLM, logits, tiny_llama, token_batches, trainer
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

from zssvd_lightning import FactorRecovery, LoRARecovery, Phase, ZSSVDCallback
from zssvd_lightning.errors import CheckpointError, ConfigError
from zssvd_lightning.layers.low_rank import LowRankLinear
from zssvd_lightning.layers.pivoted import PivotForm
from zssvd_lightning.recovery.judge import Judge

BEST = {"preset": "best", "corrections": 1, "prune_ratio": 0.5, "calibration_batches": 4, "correction_batches": 2}
NEEDED = 6
"""Batches until the model of `BEST` is low-rank."""

NOISE = 1e-6
"""Rise of a loss (nats) that rounding explains, where adapters are merged or pivots chosen again."""


def sequences(count, seed):
    """Tokens that each follow from the one before, by a table without a pattern."""
    table = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(7))
    batches = token_batches(count, seed=seed)
    for batch in batches:
        for t in range(1, batch["input_ids"].shape[1]):
            batch["input_ids"][:, t] = table[batch["input_ids"][:, t - 1]]
        batch["labels"] = batch["input_ids"].clone()
    return batches


HELD_OUT = sequences(2, seed=3)


@torch.no_grad()
def held_out_loss(model):
    training = model.training
    loss = sum(float(model.eval()(**batch).loss) for batch in HELD_OUT) / len(HELD_OUT)
    model.train(training)
    return loss


@pytest.fixture(scope="module")
def trained():
    """Weights of a tiny Llama at two losses."""
    torch.manual_seed(0)
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = {}
    for step, batch in enumerate(sequences(400, seed=1)):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        for level in (2.0, 0.05):
            if level not in found and step % 10 == 9 and held_out_loss(model) < level:
                found[level] = copy.deepcopy(model.state_dict())
        if 0.05 in found:
            break
    return found


def begun(weights):
    torch.manual_seed(0)
    module = CausalLM(tiny_llama())
    module.model.load_state_dict(weights)
    return module


def fit(weights, recovery, *callbacks, steps=20, data=None, ckpt_path=None, held_out=HELD_OUT, **settings):
    module, callback = begun(weights), short(**BEST, recovery=recovery, held_out=held_out)
    fitted = trainer(callback, *callbacks, **({"max_steps": NEEDED + steps} | settings))
    data = sequences(NEEDED + steps, seed=2) if data is None else data
    fitted.fit(module, StatefulDataLoader(data, batch_size=None), ckpt_path=ckpt_path)
    return module, callback, fitted


SETTINGS = {
    "stored": FactorRecovery(lr=3e-3, judge_every=5),
    "factors": FactorRecovery(lr=3e-3, form="factors", loss="both", judge_every=5),
    "lora": LoRARecovery(rank=4, lr=1e-2, two_step=True, judge_every=5),
    "much too high": FactorRecovery(lr=3.0, schedule="constant", judge_every=5),
    "to infinity": FactorRecovery(lr=1e30, warmup=0.0, judge_every=5),
}


@pytest.mark.parametrize("level", [2.0, 0.05])
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_loss_after_training_is_no_higher_than_before(trained, settings, level, caplog):
    module, callback, _ = fit(trained[level], SETTINGS[settings])
    found, after = callback.report.held_out, held_out_loss(module.model)
    assert callback.phase is Phase.DONE
    assert after == pytest.approx(found["recovered"], abs=1e-4 * max(1.0, after))
    assert after <= found["truncated"] + NOISE
    assert any(isinstance(m, PivotForm) for m in module.modules())
    assert not any(isinstance(m, LowRankLinear) for m in module.modules())
    if "high" in settings or "infinity" in settings:
        assert found["step"] == 0
        assert "training did not lower the loss on the held-out batches" in caplog.text
        assert "none of" in str(callback.report)
    else:
        assert after < found["truncated"] - 1e-3
        assert found["step"] > 0


def test_a_single_batch_that_is_learned_by_heart_does_no_harm(trained):
    (only,) = sequences(1, seed=2)
    only["input_ids"][:, 1:] = 5
    only["labels"] = only["input_ids"].clone()
    recovery = FactorRecovery(lr=1e-2, judge_every=2, patience=3, schedule="constant")
    module, callback, fitted = fit(trained[2.0], recovery, data=sequences(NEEDED, seed=2) + [only] * 40, steps=40)
    assert held_out_loss(module.model) <= callback.report.held_out["truncated"] + NOISE
    assert fitted.global_step < NEEDED + 40


@pytest.mark.parametrize("form", ["stored", "factors"])
def test_a_training_that_was_killed_ends_as_one_that_was_not(tmp_path, trained, form):
    recovery = FactorRecovery(lr=3e-2, judge_every=3, form=form)
    whole, callback, _ = fit(trained[2.0], recovery)
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(ConnectionError):
        fit(trained[2.0], recovery, saving, Interrupt(NEEDED + 10), enable_checkpointing=True)
    path = str(tmp_path / f"step={NEEDED + 8}.ckpt")
    resumed, again, _ = fit(trained[2.0], recovery, ckpt_path=path)
    assert again.report.held_out == callback.report.held_out
    assert torch.equal(logits(resumed.model), logits(whole.model))
    with pytest.raises(CheckpointError, match="pass the same held_out"):
        fit(trained[2.0], recovery, ckpt_path=path, held_out=None)
    with pytest.raises(CheckpointError, match="held-out batches"):
        fit(trained[2.0], recovery, ckpt_path=path, held_out=HELD_OUT[:1])


def test_the_schedule_ends_with_the_time(trained, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr("zssvd_lightning.recovery.pace.Pace.__init__.__defaults__", (lambda: float(next(clock)),))
    recovery = FactorRecovery(lr=3e-3, minutes=0.5, judge_every=100)
    _, callback, fitted = fit(trained[2.0], recovery, steps=1000)
    steps = fitted.global_step - NEEDED
    assert 20 <= steps <= 31
    assert callback.report.held_out["steps"] == steps
    (config,) = fitted.lr_scheduler_configs
    assert config.scheduler.get_last_lr()[0] < 0.02 * recovery.lr
    assert fitted.max_steps == NEEDED + 1000


def test_epochs_limit_the_steps_of_a_time_too(trained, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr("zssvd_lightning.recovery.pace.Pace.__init__.__defaults__", (lambda: float(next(clock)),))
    recovery = FactorRecovery(lr=3e-3, minutes=5, judge_every=100)
    _, callback, fitted = fit(trained[2.0], recovery, steps=14, max_steps=-1, max_epochs=1)
    assert callback.report.held_out["steps"] == 14
    (config,) = fitted.lr_scheduler_configs
    assert config.scheduler.get_last_lr()[0] < 0.02 * recovery.lr


def test_running_statistics_return_with_the_best_state():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    judge = Judge(lambda batch: (float(len(batch)), 1.0), [[1]], every=1, patience=None)
    judge.begin(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.randn(8, 4) + 5)
    with torch.no_grad():
        model[0].weight.add_(1)
    judge.settle(model, steps=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_preset_has_a_recovery_and_another_may_be_given():
    assert ZSSVDCallback(preset="best-trained").recovery.loss == "both"
    assert ZSSVDCallback(preset="best-trained").config == ZSSVDCallback(preset="best").config
    assert ZSSVDCallback(preset="best-trained", recovery="lora").recovery.method == "lora"
    changed = ZSSVDCallback(preset="best-trained", recovery={"lr": 1e-4}).recovery
    assert (changed.method, changed.lr, changed.loss) == ("factors", 1e-4, "both")
    with pytest.raises(ConfigError, match="trains after the compression"):
        type(ZSSVDCallback().config).of("best-trained")


def test_held_out_batches_need_a_recovery():
    with pytest.raises(ConfigError, match="set recovery"):
        short(held_out=HELD_OUT)
    with pytest.raises(ConfigError, match="no batches"):
        short(held_out=[], recovery="factors")
    with pytest.raises(ConfigError, match=r"give \[batch\]"):
        short(held_out=HELD_OUT[0], recovery="factors")


def test_a_checkpoint_from_before_there_were_held_out_batches_goes_on(tmp_path, trained):
    recovery = FactorRecovery(lr=3e-3)
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole, callback, _ = fit(trained[2.0], recovery, saving, enable_checkpointing=True, held_out=None, steps=6)
    checkpoint = torch.load(tmp_path / f"step={NEEDED + 3}.ckpt")
    state = checkpoint["callbacks"][callback.state_key]["recovery"]
    for key in ("minutes", "judge_every", "patience", "form"):
        del state["settings"][key]
    for key in ("stored", "first_step", "steps", "judge"):
        del state[key]
    torch.save(checkpoint, tmp_path / "earlier.ckpt")
    resumed, _, _ = fit(trained[2.0], recovery, ckpt_path=str(tmp_path / "earlier.ckpt"), held_out=None, steps=6)
    assert torch.equal(logits(resumed.model), logits(whole.model))
