"""Compression in a fit of a model whose layers are low-rank already."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.callbacks import short
from support.models import CausalLM, assert_same_state, loader, state_of, tiny_llama, token_batches, trainer
from torchdata.stateful_dataloader import StatefulDataLoader

from zssvd_lightning import (
    FactorRecovery,
    LoRARecovery,
    Phase,
    SingularValueRecovery,
    compress,
    from_pretrained,
    save_pretrained,
)
from zssvd_lightning.errors import BudgetError, ConfigError, UnfinishedError, UnsupportedTrainingError
from zssvd_lightning.layers.registry import Factored
from zssvd_lightning.model.adapters import on
from zssvd_lightning.serialization.specs import ranks_of
from zssvd_lightning.strategies import SingleDeviceAdapter

BATCHES = token_batches(12)


def again(prune_ratio=0.4, **settings):
    defaults = {"preset": "zs-svd-line-search", "calibration_batches": 4, "start_step": 2}
    return short(prune_ratio=prune_ratio, **(defaults | settings))


def low_rank_module(storage="factors", **settings):
    model = tiny_llama(hidden_size=64, intermediate_size=96)
    settings = {"preset": "zs-svd-line-search", "corrections": 0, "progress": False} | settings
    compress(model, BATCHES, prune_ratio=0.2, storage=storage, **settings)
    return CausalLM(model)


def fitted(module, *callbacks, ckpt_path=None, **settings):
    trainer(*callbacks, **({"max_epochs": 2} | settings)).fit(module, loader(BATCHES), ckpt_path=ckpt_path)
    return module


def assert_no_larger(now, before):
    assert now.keys() >= before.keys()
    assert all(now[name] <= rank for name, rank in before.items())


@pytest.mark.parametrize(
    ("first", "settings"),
    [
        ("factors", {}),
        ("pivoted", {"storage": "pivoted", "recovery": FactorRecovery(lr=1e-3)}),
        ("factors", {"recovery": LoRARecovery(rank=1, lr=1e-3, clip_rank=True)}),
        ("factors", {"storage": "hq", "prune_ratio": 0.7}),
        ("factors", {"truncations": 2, "corrections": 2, "accumulate": 2}),
    ],
    ids=["plain", "pivoted", "lora", "hq", "several"],
)
def test_a_low_rank_model_is_compressed_further_and_trained(first, settings, tmp_path):
    module = low_rank_module(first)
    save_pretrained(module.model, tmp_path / "model")
    module = CausalLM(from_pretrained(tmp_path / "model"))
    ranks = ranks_of(module)
    settings = dict(settings)
    accumulate = settings.pop("accumulate", 1)
    callback = again(**settings)
    fitted(module, callback, accumulate_grad_batches=accumulate, max_epochs=3)
    assert callback.phase is Phase.DONE
    assert callback.report.reached >= callback.config.prune_ratio
    assert_no_larger(ranks_of(module), ranks)
    assert {n: layer.rank for n, layer in callback.report.layers.items() if layer.rank} == ranks_of(module)
    if not callback.config.form.rounds:
        assert sum(p.numel() for p in module.parameters()) == callback.report.model_parameters_after


def test_until_the_compression_starts_the_factors_train():
    module = low_rank_module()
    seen = []

    class Looks(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            low_rank = sum(isinstance(part, Factored) for part in pl_module.modules())
            seen.append((low_rank > 0, callback.phase))

    callback = again(start_step=3)
    fitted(module, Looks(), callback, max_epochs=2)
    assert [low_rank for low_rank, phase in seen if phase is Phase.WAIT] == [True] * 4
    gathering = [low_rank for low_rank, phase in seen if phase in (Phase.CALIBRATE, Phase.CORRECT)]
    assert gathering
    assert not any(gathering)


def test_the_second_fit_of_a_trained_module_takes_a_callback_of_its_own():
    module = CausalLM(tiny_llama(hidden_size=64, intermediate_size=96))
    first, second = again(0.2), again(0.4)
    fitted(module, first)
    ranks = ranks_of(module)
    fitted(module, second)
    assert second.report.reached >= 0.4
    assert second.report.parameters_before == first.report.parameters_after
    assert_no_larger(ranks_of(module), ranks)


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_a_fit_resumes_to_the_same_weights_from_checkpoints_with_the_low_rank_layers_at_any_step(storage, tmp_path):
    whole = low_rank_module(storage)
    ranks, start = ranks_of(whole), copy.deepcopy(whole)

    def fit(module, *callbacks, ckpt_path=None):
        run = trainer(again(storage=storage), *callbacks, max_steps=24, enable_checkpointing=True)
        run.fit(module, StatefulDataLoader(token_batches(48), batch_size=None), ckpt_path=ckpt_path)

    fit(whole, ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1))
    phases = set()
    for step in (1, 4, 6, 7, 9, 11, 12, 20):
        path = tmp_path / f"step={step}.ckpt"
        saved = torch.load(path, weights_only=True)
        (state,) = [state for key, state in saved["callbacks"].items() if key.startswith("ZSSVD")]
        phases.add(state["phase"])
        ends = ("down", "pivots", "columns")
        names = {name.removesuffix(f".{end}.weight") for name in saved["state_dict"] for end in ends}
        assert ranks.keys() <= names
        resumed = copy.deepcopy(start)
        fit(resumed, ckpt_path=path)
        assert whole.state_dict().keys() == resumed.state_dict().keys()
        for name, value in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), (step, name)
    assert phases == {"wait", "calibrate", "correct", "recover"}


def test_checkpoints_of_every_batch_load_into_the_module_they_were_saved_from(tmp_path):
    module = low_rank_module()
    kept = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    start = copy.deepcopy(module)
    fitted(module, again(), kept, enable_checkpointing=True)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 24
    for path in paths:
        other = copy.deepcopy(start)
        trainer(again(), max_epochs=1).validate(other, loader(BATCHES[:1]), ckpt_path=path, verbose=False)
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert all(torch.equal(value, saved[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize(
    ("callback", "settings", "error"),
    [
        (lambda: again(0.1), {}, BudgetError),
        (
            lambda: again(storage="pivoted", recovery=FactorRecovery(lr=1e-3)),
            {"max_epochs": 1},
            UnsupportedTrainingError,
        ),
    ],
    ids=["reached", "short"],
)
def test_a_refused_fit_leaves_the_low_rank_model_as_it_was(callback, settings, error):
    module = low_rank_module()
    before = state_of(module)
    with pytest.raises(error):
        fitted(module, callback(), **settings)
    assert_same_state(before, state_of(module))


def test_a_fit_that_ends_or_fails_while_calibrating_puts_the_low_rank_layers_back():
    for failing in (True, False):
        module = low_rank_module()
        layers = {name: part for name, part in module.named_modules() if isinstance(part, Factored)}

        class Ends(L.Callback):
            failing_now = failing

            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                if batch_idx == 4:
                    if self.failing_now:
                        raise KeyError("stop")
                    trainer.should_stop = True

        with pytest.raises((KeyError, UnfinishedError)):
            fitted(module, again(), Ends(), min_epochs=0, limit_train_batches=12)
        assert {name: part for name, part in module.named_modules() if isinstance(part, Factored)} == layers


def test_a_dry_run_on_a_low_rank_model_writes_its_plan_and_leaves_the_layers(tmp_path):
    module = low_rank_module()
    layers = [part for part in module.modules() if isinstance(part, Factored)]
    fitted(module, again(dry_run=tmp_path / "plan.yaml"))
    assert [part for part in module.modules() if isinstance(part, Factored)] == layers
    callback = again(plan=str(tmp_path / "plan.yaml"))
    fitted(module, callback)
    assert callback.report.reached >= 0.4


def test_layers_that_stay_get_the_adapter_of_the_recovery_too():
    module = low_rank_module(selection="uniform")
    first = next(iter(ranks_of(module)))
    compress(
        module.model,
        BATCHES,
        prune_ratio=0.5,
        include=first.removeprefix("model."),
        preset="zs-svd-line-search",
        progress=False,
    )
    old, factors = module.get_submodule(first), copy.deepcopy(module.get_submodule(first).state_dict())
    recovery = LoRARecovery(rank=1, lr=1e-3, clip_rank=True, merge=False)
    fitted(module, again(0.3, selection="uniform", start_step=0, recovery=recovery))
    assert first in on(module)
    assert all(torch.equal(value, factors[name]) for name, value in old.state_dict().items())


def test_a_recovery_that_cannot_train_the_form_of_a_layer_is_refused():
    with pytest.raises(ConfigError, match="recovery by 'singular_values'"):
        fitted(low_rank_module("pivoted"), again(recovery=SingularValueRecovery(lr=1e-3)))


def test_under_a_strategy_that_cannot_a_low_rank_layer_is_refused_by_name_with_the_remedy(monkeypatch):
    monkeypatch.setattr(SingleDeviceAdapter, "compresses_again", False)
    module = low_rank_module()
    before = state_of(module)
    with pytest.raises(UnsupportedTrainingError, match=r"is low-rank already, and under SingleDevice.*compress on "):
        fitted(module, again())
    assert_same_state(before, state_of(module))
