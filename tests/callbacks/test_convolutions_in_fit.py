"""Compression of convolutions in a fit: ordinary ones until it starts, and after any failure; resumed at any step."""

import lightning as L
import pytest
import torch
from support.callbacks import assert_resumes_from_any_phase, short
from support.convolutions import ImageClassifier, grouped_network, image_batches, tiny_network
from support.models import assert_same_state, state_of, trainer
from torchdata.stateful_dataloader import StatefulDataLoader

from zssvd_lightning import LoRARecovery, Phase
from zssvd_lightning.errors import UnsupportedTrainingError
from zssvd_lightning.layers.apart.convolutions import UnfoldedConvolution, unfolded
from zssvd_lightning.layers.apart.grouped import grouped
from zssvd_lightning.serialization.specs import ranks_of
from zssvd_lightning.strategies import SingleDeviceAdapter

COUNT = 20
KERNELS = {"net.0.kernel_matrix", "net.4.kernel_matrix"}
GROUPS = {"net.2.channel_groups.0.kernel_matrix", "net.2.channel_groups.1.kernel_matrix"}


def callback(**settings):
    defaults = {"prune_ratio": 0.5, "calibration_batches": 4, "start_step": 2, "convolutions": True}
    return short(**(defaults | settings))


def fit(module, *callbacks, ckpt_path=None, **settings):
    batches = StatefulDataLoader(image_batches(COUNT), batch_size=None)
    given = {"max_steps": COUNT, "enable_checkpointing": True} | settings
    trainer(*callbacks, **given).fit(module, batches, ckpt_path=ckpt_path)


@pytest.mark.parametrize(
    ("build", "kernels", "first"),
    [(tiny_network, KERNELS, "net.0.weight"), (grouped_network, GROUPS, "net.2.weight")],
)
def test_a_fit_resumes_to_the_same_weights_from_checkpoints_of_any_phase(tmp_path, build, kernels, first):
    module = ImageClassifier(build)
    assert_resumes_from_any_phase(module, fit, callback, tmp_path, first, build=build)
    assert ranks_of(module).keys() >= kernels


def test_the_factors_train_with_adapters_of_a_recovery_in_bfloat16(caplog):
    module, seen = ImageClassifier(), []

    class Looks(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append((run.phase, type(pl_module.net[4]) is UnfoldedConvolution))
            if run.phase is Phase.RECOVER and not hasattr(self, "before"):
                self.before = pl_module.net[4].weight.detach().clone()

    run, looks = callback(recovery=LoRARecovery(lr=1e-2), calibration_batches=8), Looks()
    with caplog.at_level("INFO"):
        fit(module, looks, run, precision="bf16-mixed", accumulate_grad_batches=2, max_epochs=2)
    assert "batch norms behind convolutions again" in caplog.text
    assert {phase for phase, unfolded in seen if not unfolded} == {Phase.WAIT}
    assert {phase for phase, unfolded in seen if unfolded} == {Phase.CALIBRATE, Phase.CORRECT, Phase.RECOVER}
    assert run.report.reached >= 0.5
    assert not torch.equal(module.net[4].weight, looks.before)


@pytest.mark.parametrize("build", [tiny_network, grouped_network])
def test_a_fit_that_fails_while_calibrating_has_its_convolutions_again(build):
    module = ImageClassifier(build)
    modules = dict(module.named_modules())

    class Fails(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 4:
                assert len([*unfolded(pl_module), *grouped(pl_module)]) == 2
                raise KeyError("stop")

    with pytest.raises(KeyError):
        fit(module, callback(), Fails())
    assert dict(module.named_modules()) == modules


@pytest.mark.parametrize(
    ("ignore", "told"),
    [(None, r"net.0 \(Conv2d\) is compressed as a linear"), ("0", r"net.2 \(Conv2d\) has a matrix for each group")],
)
def test_under_a_strategy_that_cannot_they_are_refused_by_name(monkeypatch, ignore, told):
    monkeypatch.setattr(SingleDeviceAdapter, "compresses_again", False)
    module = ImageClassifier(grouped_network)
    before = state_of(module)
    with pytest.raises(UnsupportedTrainingError, match=told):
        fit(module, callback(ignore=ignore))
    assert_same_state(before, state_of(module))
