from importlib import metadata
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy, Strategy, XLAStrategy
from support.callbacks import short
from support.models import CausalLM, assert_same_state, loader, state_of, token_batches, trainer

from zssvd_lightning import LowRankLinear, Phase, ZSSVDCallback
from zssvd_lightning.errors import (
    BudgetError,
    CalibrationError,
    ConfigError,
    NonFiniteError,
    TargetError,
    UnfinishedError,
    UnsupportedTrainingError,
)
from zssvd_lightning.strategies import SingleDeviceAdapter, adapter_for


class Manual(CausalLM):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class TwoOptimizers(CausalLM):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.parameters(), 0.1)]


class NanLater(CausalLM):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.global_step >= 5 else loss


class KeepsItsList(CausalLM):
    def __init__(self):
        super().__init__()
        self.kept = list(self.parameters())

    def configure_optimizers(self):
        return torch.optim.SGD(self.kept, 0.0)


class ForgetsFactors(CausalLM):
    def configure_optimizers(self):
        return torch.optim.SGD([p for n, p in self.named_parameters() if ".down." not in n], 0.0)


class Stop(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step >= 6


class Interrupt(L.Callback):
    def __init__(self, at):
        self.at = at

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.at:
            raise ConnectionError("gone")


def all_padding():
    batches = token_batches()
    batches[2]["attention_mask"].zero_()
    return batches


CASES = {
    "manual": (Manual, token_batches, {}, {}, UnsupportedTrainingError, "automatic_optimization = True"),
    "two optimizers": (TwoOptimizers, token_batches, {}, {}, UnsupportedTrainingError, "zssvd_lightning.compress"),
    "too short": (CausalLM, token_batches, {}, {"max_epochs": 1}, UnsupportedTrainingError, "needs 12 .* has 4"),
    "too few steps": (CausalLM, token_batches, {}, {"max_steps": 9}, UnsupportedTrainingError, "needs 12 .* has 9"),
    "starts too late": (
        CausalLM,
        token_batches,
        {"start_epoch": 9},
        {},
        UnsupportedTrainingError,
        "36 until its start",
    ),
    "floor": (CausalLM, token_batches, {"prune_ratio": 0.8, "min_rank_fraction": 0.9}, {}, BudgetError, "at most"),
    "target": (CausalLM, token_batches, {"include": ["nothing"]}, {}, TargetError, "matches no module"),
    "nan": (NanLater, token_batches, {}, {}, NonFiniteError, "loss of a calibration batch"),
    "padding": (CausalLM, all_padding, {}, {}, CalibrationError, "all padding"),
    "stopped": (CausalLM, token_batches, {}, {"callbacks": [Stop()]}, UnfinishedError, "put back"),
    "stale list": (KeepsItsList, token_batches, {}, {}, UnsupportedTrainingError, "no longer in the model"),
    "no group": (ForgetsFactors, token_batches, {}, {}, UnsupportedTrainingError, "exactly one optimizer group"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_done_is_a_named_error_and_nothing_is_lost(case):
    build, batches, arguments, settings, error, message = CASES[case]
    module = build().train()
    before = state_of(module)
    callback = short(**arguments)
    settings = {"max_epochs": 6} | settings
    with pytest.raises(error, match=message):
        trainer(callback, *settings.pop("callbacks", []), **settings).fit(module, loader(batches()))
    assert_same_state(before, state_of(module))
    assert callback.phase is Phase.WAIT
    assert callback.report is None


@pytest.mark.parametrize("step", range(10))
def test_an_exception_before_factorization_puts_everything_back(step):
    module = CausalLM().train()
    before = state_of(module)
    callback = ZSSVDCallback(0.3, "zs-svd-line-search", correction_batches=2, progress=False)
    with pytest.raises(ConnectionError):
        trainer(callback, Interrupt(step), max_epochs=6).fit(module, loader(token_batches()))
    after = state_of(module)
    assert_same_state(before, after)
    assert callback.phase is Phase.WAIT


def test_an_exception_after_factorization_leaves_the_low_rank_model():
    module, callback = CausalLM(), ZSSVDCallback(0.3, "zs-svd-line-search", correction_batches=2, progress=False)
    with pytest.raises(ConnectionError):
        trainer(callback, Interrupt(12), max_epochs=6).fit(module, loader(token_batches()))
    assert any(isinstance(m, LowRankLinear) for m in module.modules())
    assert callback.phase is Phase.RECOVER


def test_the_same_callback_works_after_a_failure():
    module, callback = CausalLM(), ZSSVDCallback(0.3, "zs-svd-line-search", correction_batches=2, progress=False)
    with pytest.raises(ConnectionError):
        trainer(callback, Interrupt(7), max_epochs=6).fit(module, loader(token_batches()))
    trainer(callback, max_epochs=6).fit(module, loader(token_batches()))
    assert callback.phase is Phase.DONE
    assert len(callback.report.losses) == 4


@pytest.mark.parametrize(
    "arguments",
    [
        {"prune_ratio": 1.2},
        {"start_epoch": -1},
        {"start_step": -1},
        {"calibration_epochs": 0},
        {"calibration_batches": 0},
        {"correction_batches": 0},
        {"selection": "zero"},
        {"metric": "fisher"},
    ],
)
def test_bad_arguments_are_refused_at_once(arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        short(**arguments)


class Elsewhere(Strategy):
    """One that nobody serves."""


Elsewhere.__abstractmethods__ = frozenset()


@pytest.mark.parametrize("kind", [Elsewhere, FSDPStrategy, DeepSpeedStrategy, XLAStrategy])
def test_other_strategies_are_refused_and_the_way_round_is_named(kind):
    fitted = SimpleNamespace(strategy=object.__new__(kind))
    with pytest.raises(UnsupportedTrainingError, match=rf"under {kind.__name__} .*recipes/two_fits.py"):
        adapter_for(fitted, CausalLM()).refuse_unsupported()


class Special(SingleDeviceStrategy):
    """Somebody's own, which has an adapter of its own."""


class SpecialAdapter(SingleDeviceAdapter):
    serves = (Special,)


def test_an_entry_point_adds_an_adapter(monkeypatch):
    point = EntryPoint("special", f"{__name__}:SpecialAdapter", "zssvd_lightning.strategies")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [point] if group == point.group else [])
    found = adapter_for(SimpleNamespace(strategy=Special("cpu")), CausalLM())
    assert type(found) is SpecialAdapter
    assert type(adapter_for(SimpleNamespace(strategy=SingleDeviceStrategy("cpu")), CausalLM())) is SingleDeviceAdapter


class SkipsEpochs(CausalLM):
    """Skips the rest of every second epoch at its third batch, as Lightning lets it."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if self.current_epoch % 2 == 0 and batch_idx == 2 else None


def test_a_skipped_rest_of_an_epoch_leaves_no_observation_open():
    module, callback = SkipsEpochs(), ZSSVDCallback(0.3, "zs-svd-line-search", correction_batches=2, progress=False)
    trainer(callback, max_epochs=9).fit(module, loader(token_batches()))
    assert callback.phase is Phase.DONE
    assert not any(m._forward_pre_hooks for m in module.modules())
    assert all(p.requires_grad for p in module.parameters())


def test_a_failed_fit_leaves_no_epoch_length_behind():
    callback = ZSSVDCallback(0.3, "zs-svd-line-search", correction_batches=2, progress=False)
    with pytest.raises(ConnectionError):
        trainer(callback, Interrupt(5), max_epochs=6).fit(CausalLM(), loader(token_batches()))
    counts = []

    class Count(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            counts.append(callback.phase)

    trainer(callback, Count(), max_epochs=4).fit(CausalLM(), loader(token_batches(20)))
    assert counts[:20] == [Phase.CALIBRATE] * 20


def test_another_module_is_compressed_anew():
    callback = ZSSVDCallback(0.3, "zs-svd-line-search", corrections=0, progress=False)
    for _ in range(2):
        module = CausalLM()
        trainer(callback, max_epochs=2).fit(module, loader(token_batches()))
        assert any(isinstance(m, LowRankLinear) for m in module.modules())


def test_one_pattern_may_be_a_string():
    assert ZSSVDCallback(include="q_proj").config.include == ["q_proj"]
