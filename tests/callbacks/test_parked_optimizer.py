"""State of the optimizer that rests elsewhere while a fit is compressed."""

import copy

import lightning as L
import pytest
import torch
from support.callbacks import short
from support.media import fill_disk
from support.models import CausalLM, assert_same_state, loader, state_of, token_batches, trainer

from zssvd_lightning import Phase, Schedule
from zssvd_lightning.errors import ConfigError, OutputError, UnsupportedTrainingError
from zssvd_lightning.offload import parking
from zssvd_lightning.offload.parking import Parking, parked_in
from zssvd_lightning.strategies import FSDP2Adapter

PLACES = {"disk": "a scratch file", "none": "host memory"}
START, STEPS = 2, 30


class Watch(L.Callback):
    """Notes the state right before the compression, and how many tensors are parked after each batch."""

    def __init__(self, path=None, fails=None):
        self.path, self.fails = path, fails
        self.before, self.parked = None, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == START:
            self.before = copy.deepcopy(trainer.optimizers[0].state_dict())
        self.parked.append(len(trainer.callbacks[0].run._parking._parked))
        if self.fails is not None and trainer.global_step == START + 1:
            trainer.save_checkpoint(self.path)
            raise self.fails


def fitted(watch, offload, **settings):
    torch.manual_seed(0)
    module = CausalLM()
    parks = {"start_step": START, "park_optimizer": True} | settings
    callback = short(calibration_batches=2, corrections=0, offload=offload, **parks)
    run = trainer(callback, watch, max_steps=STEPS, enable_checkpointing=False)
    return run, callback, module


def assert_same_optimizer(expected, found):
    assert expected["param_groups"] == found["param_groups"]
    assert expected["state"].keys() == found["state"].keys()
    for key, state in expected["state"].items():
        for name, value in state.items():
            assert torch.equal(value, found["state"][key][name]), (key, name)


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(parking, "_is_on_cpu", lambda tensor: False)


@pytest.mark.parametrize(
    ("offload", "error"), [("disk", ConnectionError("gone")), ("none", KeyboardInterrupt())], ids=["error", "ctrl-c"]
)
def test_the_state_is_away_whole_in_checkpoints_and_back_after_an_exit(
    offload, error, tmp_path, as_on_an_accelerator, caplog
):
    caplog.set_level("INFO", "zssvd_lightning")
    run, callback, module = fitted(watch := Watch(tmp_path / "mid.ckpt", error), offload)
    with pytest.raises((type(error), SystemExit)):
        run.fit(module, loader(token_batches(8)))
    assert PLACES[offload] in caplog.text
    assert callback.phase is Phase.WAIT
    tensors = 2 * len(list(module.parameters()))
    assert watch.parked == [0] * START + [tensors]
    assert not callback.run._parking._parked
    saved = torch.load(tmp_path / "mid.ckpt", weights_only=False)["optimizer_states"][0]
    (optimizer,) = run.optimizers
    for found in (saved, optimizer.state_dict()):
        assert_same_optimizer(watch.before, found)


def test_results_and_resumed_runs_are_bit_equal(tmp_path):
    weights, offload, batches = {}, "disk", loader(token_batches(1) * 8)  # a plain loader starts again after a resume
    for parks in (False, True):
        run, callback, module = fitted(Watch(), offload, park_optimizer=parks)
        run.fit(module, batches)
        assert callback.phase is Phase.DONE
        weights[parks] = state_of(module)
    assert_same_state(weights[False], weights[True])
    run, _, module = fitted(Watch(tmp_path / "mid.ckpt", ConnectionError()), offload)
    with pytest.raises(ConnectionError):
        run.fit(module, batches)
    run, callback, module = fitted(watch := Watch(), offload)
    run.fit(module, batches, ckpt_path=tmp_path / "mid.ckpt", weights_only=False)
    assert callback.phase is Phase.DONE
    for name, weight in module.state_dict().items():
        assert torch.equal(weight, weights[True]["weights"][name]), name
    assert watch.before is None  # it went on in the middle


def test_the_state_is_back_after_a_dry_run(tmp_path):
    run, callback, module = fitted(watch := Watch(), "disk", dry_run=tmp_path / "plan.yaml")
    run.fit(module, loader(token_batches(8)))
    assert watch.parked[START]
    assert not callback.run._parking._parked
    assert_same_optimizer(watch.before, run.optimizers[0].state_dict())


def test_a_full_disk_leaves_the_state(tmp_path, monkeypatch):
    fill_disk(monkeypatch, tmp_path, 5)
    run, _, module = fitted(watch := Watch(), "disk")
    with pytest.raises(OutputError, match="No space left"):
        run.fit(module, loader(token_batches(8)))
    assert_same_optimizer(watch.before, run.optimizers[0].state_dict())
    monkeypatch.setattr("zssvd_lightning.offload.media.free_disk", lambda: 1000)
    park = Parking()
    park.setting = True
    with pytest.raises(OutputError, match="park_optimizer needs"):
        park.park(run.optimizers, "disk")


def test_what_cannot_move_stays_and_layouts_return():
    parameter = torch.nn.Parameter(torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last))
    optimizer = torch.optim.SGD([parameter])
    whole, own = torch.arange(8.0), torch.arange(6.0)
    tagged = torch.arange(5.0)
    tagged.is_paged = True
    state = {
        "layout": torch.arange(48.0).reshape(4, 2, 2, 3).permute(0, 3, 1, 2),
        "nested": [own, {"again": own}],
        "part": whole[:4],
        "aliases": (whole[4:].detach(), parameter.data),
        "tagged": tagged,
        "step": torch.tensor(3.0),
        "subclass": torch.nn.Parameter(torch.ones(3)),
    }
    optimizer.state[parameter] = state
    strides, values = state["layout"].stride(), copy.deepcopy(state)
    addresses = {name: value.data_ptr() for name, value in state.items() if isinstance(value, torch.Tensor)}
    park = Parking()
    park.setting = True
    park.park([optimizer], "disk")
    moved = {name for name, address in addresses.items() if state[name].data_ptr() != address}
    assert moved == {"layout"}
    assert state["nested"][1]["again"] is own
    own += 1  # the owner of a state may change it meanwhile
    park.bring_back()
    assert state["layout"].stride() == strides
    assert torch.equal(own, torch.arange(6.0) + 1)
    for name in ("layout", "part", "tagged", "step"):
        assert torch.equal(state[name], values[name])


def test_where_a_state_is_parked():
    found = {
        (setting, place, on_cpu): parked_in(setting, place, on_cpu=on_cpu)
        for setting in (True, False, "auto")
        for place in ("none", "cpu", "disk")
        for on_cpu in (True, False)
    }
    assert {key: where for key, where in found.items() if where} == {
        (True, "none", False): "cpu",
        (True, "cpu", False): "cpu",
        (True, "disk", False): "disk",
        (True, "disk", True): "disk",
        ("auto", "cpu", False): "cpu",
        ("auto", "disk", False): "disk",
    }
    assert FSDP2Adapter(None, None).parks("auto") is False
    with pytest.raises(UnsupportedTrainingError, match="park_optimizer"):
        FSDP2Adapter(None, None).parks(True)
    with pytest.raises(ConfigError, match="park_optimizer"):
        Schedule(park_optimizer="always")
    with pytest.raises(ConfigError, match="park_optimizer"):
        Schedule(park_optimizer=1)
