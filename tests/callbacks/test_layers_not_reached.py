"""Layers that the calibration of a fit does not reach."""

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from support.callbacks import Interrupt, short
from support.models import (
    REASONS,
    CausalLM,
    Experts,
    Unreached,
    assert_same_state,
    loader,
    state_of,
    token_batches,
    trainer,
)
from support.warned import warned_once
from torchdata.stateful_dataloader import StatefulDataLoader

from zssvd_lightning import Phase
from zssvd_lightning.errors import CalibrationError, LeftDenseWarning
from zssvd_lightning.serialization.specs import ranks_of

NAMES = {f"model.{name}" for name in REASONS}
SIX = r"6 of 20 target layers stay dense.*prune_ratio 0\.3 counts over the other 14 layers alone.*model\.idle"


def module_with(seed=0):
    torch.manual_seed(seed)
    return CausalLM(Unreached())


def test_they_stay_dense_with_one_warning():
    module, callback = module_with(), short()
    before = module.model.idle.weight.clone()
    with warned_once(LeftDenseWarning, SIX):
        trainer(callback, max_epochs=6).fit(module, loader(token_batches()))
    assert callback.phase is Phase.DONE
    assert callback.report.left_dense == {f"model.{name}": reason for name, reason in REASONS.items()}
    assert not callback.report.layers.keys() & NAMES
    assert ranks_of(module)
    assert all(not name.startswith(tuple(NAMES)) for name in ranks_of(module))
    assert torch.equal(module.model.idle.weight, before)


@pytest.mark.parametrize("step", [2, 5, 7])
def test_a_failure_puts_them_back_with_all_others(step):
    module, callback = module_with(), short()
    before = state_of(module)
    if step < 4:
        with pytest.raises(ConnectionError):
            trainer(callback, Interrupt(step), max_epochs=6).fit(module, loader(token_batches()))
    else:
        with warned_once(LeftDenseWarning, SIX), pytest.raises(ConnectionError):
            trainer(callback, Interrupt(step), max_epochs=6).fit(module, loader(token_batches()))
    assert_same_state(before, state_of(module))


@pytest.mark.parametrize("step", [2, 5, 7, 9])
def test_a_resumed_fit_leaves_the_same_layers_dense(tmp_path, step):
    def fitted(module, callback, *others, **settings):
        batches = StatefulDataLoader(token_batches(16), batch_size=None)
        fit = trainer(callback, *others, max_epochs=1, enable_checkpointing=bool(others), **settings)
        return fit, batches

    whole, callback = module_with(), short(calibration_batches=4)
    with warned_once(LeftDenseWarning, SIX):
        fit, batches = fitted(whole, callback)
        fit.fit(whole, batches)

    saving = ModelCheckpoint(tmp_path, filename="at", every_n_train_steps=step, save_top_k=-1)
    with pytest.raises(ConnectionError):
        fit, batches = fitted(None, short(calibration_batches=4), saving, Interrupt(step + 1))
        if step < 4:
            fit.fit(module_with(), batches)
        else:
            with warned_once(LeftDenseWarning, SIX):
                fit.fit(module_with(), batches)
    resumed, going_on = module_with(1), short(calibration_batches=4)
    fit, batches = fitted(resumed, going_on)
    if step < 4:
        with warned_once(LeftDenseWarning, SIX):
            fit.fit(resumed, batches, ckpt_path=tmp_path / "at.ckpt")
    else:
        fit.fit(resumed, batches, ckpt_path=tmp_path / "at.ckpt")
    assert going_on.report.layers == callback.report.layers
    assert going_on.report.left_dense == callback.report.left_dense
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_a_dry_run_lists_them_as_dense_and_its_plan_can_be_followed(tmp_path):
    module, path = module_with(), tmp_path / "plan.yaml"
    before = state_of(module)
    with warned_once(LeftDenseWarning, SIX):
        trainer(short(dry_run=path), max_epochs=6).fit(module, loader(token_batches()))
    assert_same_state(before, state_of(module))
    layers = yaml.safe_load(path.read_text())["layers"]
    assert {name for name, layer in layers.items() if layer["rank"] == "dense"} >= NAMES
    callback = short(plan=path)
    with warned_once(LeftDenseWarning, "6 of 20 .* the removed fraction counts over the other 14"):
        trainer(callback, max_epochs=6).fit(module, loader(token_batches()))
    assert {name: layer.rank or "dense" for name, layer in callback.report.layers.items()} == {
        name: layer["rank"] for name, layer in layers.items() if name not in NAMES
    }


def test_an_expert_that_a_correction_does_not_reach_stays_as_it_is(caplog):
    module = CausalLM(Experts(lambda number, _: [0, 1] if number < 4 else [0]))
    callback = short(selection="uniform")
    trainer(callback, max_epochs=6).fit(module, loader(token_batches()))
    assert "1 of 16 layers stay as the last truncation left them, because the correct batches" in caplog.text
    assert "1 of 16 layers stay as the last truncation left them, because the calibrate batches" in caplog.text
    assert "model.experts.1" in ranks_of(module)


def test_a_fit_in_which_no_layer_is_reached_is_an_error_and_nothing_is_lost():
    class Nothing(CausalLM):
        def training_step(self, batch, batch_idx):
            return self.model.model.embed_tokens(batch["input_ids"]).square().mean()

    module, callback = Nothing(), short()
    before = state_of(module)
    with pytest.raises(CalibrationError, match=r"reached none of the 14 target layers.*saw no token"):
        trainer(callback, max_epochs=6).fit(module, loader(token_batches()))
    assert_same_state(before, state_of(module))
    assert callback.phase is Phase.WAIT
