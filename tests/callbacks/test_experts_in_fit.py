"""Compression of experts in a fit: stacked until it starts, and after any failure; resumed at any step."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.callbacks import short
from support.experts import experts_in, lopsided_experts, tiny_experts
from support.models import CausalLM, assert_same_state, loader, padded_batches, state_of, token_batches, trainer
from torchdata.stateful_dataloader import StatefulDataLoader

from zssvd_lightning import FactorRecovery, LowRankCheckpointMixin, Phase, load_from_checkpoint
from zssvd_lightning.errors import UnfinishedError, UnsupportedTrainingError
from zssvd_lightning.layers.apart.experts import ExpertList, is_stacked
from zssvd_lightning.layers.apart.removed import RemovedLinear
from zssvd_lightning.serialization.specs import ranks_of
from zssvd_lightning.strategies import SingleDeviceAdapter

COUNT = 20


def callback(**settings):
    defaults = {"prune_ratio": 0.4, "preset": "zs-svd-line-search", "calibration_batches": 4, "start_step": 2}
    return short(**(defaults | settings))


REMOVES = {
    "metric": "two_sided",
    "selection": "curvature",
    "correction_step": "natural",
    "prune_ratio": 0.6,
    "remove_experts": True,
}


def module_of(family="mixtral"):
    torch.manual_seed(0)
    return CausalLM(lopsided_experts(family))


class OfExperts(LowRankCheckpointMixin, CausalLM):
    """Built as Lightning builds the module of a checkpoint."""

    def __init__(self):
        super().__init__(tiny_experts())


def fit(module, *callbacks, ckpt_path=None, **settings):
    batches = StatefulDataLoader(padded_batches(COUNT), batch_size=None)
    given = {"max_steps": COUNT, "enable_checkpointing": True} | settings
    trainer(*callbacks, **given).fit(module, batches, ckpt_path=ckpt_path)


@pytest.mark.parametrize(("family", "settings"), [("mixtral", REMOVES), ("gpt_oss", {})])
def test_a_fit_resumes_to_the_same_weights_from_checkpoints_of_any_step(family, settings, tmp_path):
    whole = module_of(family)
    start = copy.deepcopy(whole)
    fit(whole, callback(**settings), ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1))
    assert any(".experts." in name for name in ranks_of(whole))
    assert any(isinstance(layer, RemovedLinear) for layer in whole.modules()) == bool(settings)
    phases = {}
    for step in (1, 4, 7, 10, 12, 18):
        path = tmp_path / f"step={step}.ckpt"
        saved = torch.load(path, weights_only=True)
        (state,) = [state for key, state in saved["callbacks"].items() if key.startswith("ZSSVD")]
        stacked = any(name.endswith(".experts.down_proj") for name in saved["state_dict"])
        phases[state["phase"]] = stacked
        resumed = copy.deepcopy(start)
        fit(resumed, callback(**settings), ckpt_path=path)
        assert whole.state_dict().keys() == resumed.state_dict().keys()
        for name, value in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), (step, name)
    gradients_alone = {} if settings else {"correct": True}
    assert phases == {"wait": True, "calibrate": True, "recover": False} | gradients_alone


def test_experts_are_stacked_until_the_compression_starts_and_their_factors_train():
    module, seen = module_of(), []

    class Looks(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append((run.phase, all(map(is_stacked, experts_in(pl_module)))))
            if run.phase is Phase.RECOVER and not hasattr(self, "factors"):
                self.factors = {n: p.clone() for n, p in pl_module.named_parameters() if ".experts." in n}

    run, looks = callback(recovery=FactorRecovery(lr=1e-2)), Looks()
    fit(module, looks, run)
    assert {phase for phase, stacked in seen if stacked} == {Phase.WAIT}
    assert {phase for phase, stacked in seen if not stacked} == {Phase.CALIBRATE, Phase.CORRECT, Phase.RECOVER}
    weights = dict(module.named_parameters())
    low_rank = [name for name in looks.factors if name.endswith(("up.weight", "down.weight"))]
    assert low_rank
    assert all(not torch.equal(weights[name], looks.factors[name]) for name in low_rank)
    assert run.report.reached >= 0.4


@pytest.mark.parametrize("failing", [True, False])
def test_a_fit_that_fails_or_ends_while_calibrating_stacks_the_experts_again(failing):
    module = module_of("gpt_oss")
    modules = dict(module.named_modules())

    class Ends(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 4:
                if failing:
                    raise KeyError("stop")
                trainer.should_stop = True

    with pytest.raises((KeyError, UnfinishedError)):
        fit(module, callback(), Ends(), min_epochs=0, max_steps=-1, max_epochs=1)
    assert dict(module.named_modules()) == modules


def test_checkpoints_load_without_a_trainer(tmp_path):
    torch.manual_seed(0)
    module = OfExperts()
    fit(module, callback(), ModelCheckpoint(tmp_path, filename="last"))
    expected = module.state_dict()
    for loaded in (
        OfExperts.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True),
        load_from_checkpoint(CausalLM, tmp_path / "last.ckpt", model=tiny_experts(), weights_only=True),
    ):
        assert isinstance(experts_in(loaded)[0], ExpertList)
        assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
        for experts in experts_in(loaded):
            assert all(p.untyped_storage().nbytes() == p.nbytes for p in experts.parameters())


def test_under_a_strategy_that_cannot_experts_are_refused_by_name_with_the_remedy(monkeypatch):
    monkeypatch.setattr(SingleDeviceAdapter, "compresses_again", False)
    module = module_of()
    before = state_of(module)
    with pytest.raises(
        UnsupportedTrainingError, match=r"experts \(MixtralExperts\) stacks experts.*under SingleDevice"
    ):
        fit(module, callback())
    assert_same_state(before, state_of(module))
    fit(module, callback(ignore="*.mlp.experts.*"))
    assert all(map(is_stacked, experts_in(module)))


def test_the_same_in_bfloat16_and_with_accumulation():
    module = module_of()
    run = callback(calibration_batches=4, **REMOVES)
    trainer(run, max_epochs=2, accumulate_grad_batches=2, precision="bf16-mixed").fit(module, loader(token_batches(12)))
    assert run.report.reached >= 0.4
    assert any(".experts." in name for name in ranks_of(module))
