"""A damaged state of the callback in a checkpoint is refused by the name of its key, before anything is loaded."""

import copy
import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.callbacks import short
from support.models import CausalLM, assert_same_state, loader, state_of, token_batches, trainer

from zssvd_lightning import LowRankPrehab, Phase
from zssvd_lightning.errors import CheckpointError

LORA = {"method": "lora", "rank": 1, "clip_rank": True}


def checkpoints(folder, **settings):
    torch.manual_seed(0)
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fitted = trainer(short(**settings), saving, max_epochs=4, enable_checkpointing=True)
    fitted.fit(CausalLM(), loader(token_batches()))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Steps 1 to 3 calibrate, 4 to 7 correct, 8 to 11 calibrate again, and 12 to 16 recover."""
    return checkpoints(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def recovered(tmp_path_factory):
    return checkpoints(tmp_path_factory.mktemp("recovered"), recovery=LORA)


def entry(path, value):
    """A change of the entry at a dotted path; `...` removes it. Parts of a name with dots are joined by `/`."""

    def change(state):
        *parents, last = [part.replace("/", ".") for part in path.split(".")]
        for name in parents:
            state = state[name] if name != "0" else next(iter(state.values()))
        if last == "0" and isinstance(state, dict):
            last = next(iter(state))
        if value is ...:
            del state[last]
        else:
            state[last] = value(state[last]) if callable(value) else value

    return change


def nan(tensor):
    damaged = tensor.clone()
    damaged.view(-1)[0] = math.nan
    return damaged


DAMAGE = {
    "version in text": (2, entry("version", "3"), "version is '3'"),
    "version None": (2, entry("version", None), "version is None"),
    "phase unknown": (2, entry("phase", "nap"), "phase is 'nap', but must be one of wait"),
    "phase None": (2, entry("phase", None), "phase is None"),
    "phase in a list": (2, entry("phase", ["wait"]), "phase is list"),
    "phase between batches": (2, entry("phase", "factorize"), "phase is 'factorize'"),
    "phase of another stage": (2, entry("phase", "correct"), "position is 0"),
    "phase without its report": (6, entry("phase", "recover"), "report is None"),
    "phase without its compression": (14, entry("phase", "calibrate"), "compression is None"),
    "position 99": (2, entry("position", 99), "position is 99"),
    "position below 0": (2, entry("position", -1), "position is -1"),
    "position 99 when it is over": (14, entry("position", "x"), "position is 'x'"),
    "report garbage": (14, entry("report", "garbage"), "report is 'garbage'"),
    "report of other keys": (14, entry("report", {"a": 1}), "report.prune_ratio is missing"),
    "report without config": (14, entry("report.config", {}), "report.config.compression is NoneType|is None"),
    "report with garbage ranks": (14, entry("report.ranks.0.rank", "two"), r"report\.ranks\..*\.rank is 'two'"),
    "no allowance": (2, entry("allowance", ...), "allowance is missing"),
    "allowance in text": (14, entry("allowance.steps", "3"), "allowance.steps is '3'"),
    "no recovers_from": (14, entry("recovers_from", ...), "recovers_from is missing"),
    "importances garbage": (14, entry("importances", [3]), "importances is list"),
    "terms of 0": (2, entry("terms_unit", 0), "terms_unit is 0"),
    "NaN moments": (2, entry("compression.gathering.moments.input_sums.0", nan), r"input_sums\..* finite"),
    "NaN gradients": (2, entry("compression.gathering.moments.gradient_sums.0", nan), r"gradient_sums\..* finite"),
    "moments of another width": (
        2,
        entry("compression.gathering.moments.input_sums.0", lambda A: A[1:, 1:]),
        r"input_sums\..* has the shape \(31, 31\)",
    ),
    "integer moments": (2, entry("compression.gathering.moments.input_sums.0", torch.Tensor.int), "input_sums"),
    "NaN loss": (2, entry("compression.gathering.moments.loss_sum", math.nan), "loss_sum is nan"),
    "moments of an unknown layer": (
        2,
        entry("compression.gathering.moments.leaders", lambda leaders: leaders | {"other": "other"}),
        "leaders has other, which is no layer",
    ),
    "a layer without a shape": (2, entry("compression.shapes.0", ...), "which is no layer of the compression"),
    "NaN originals": (6, entry("compression.originals.0", nan), r"originals\..* finite"),
    "NaN factors": (6, entry("compression.factors.0", lambda pair: [nan(pair[0]), pair[1]]), r"factors\..*\[0\]"),
    "factors of two ranks": (6, entry("compression.factors.0", lambda pair: [pair[0], pair[1][:0]]), r"\[1\] has the"),
    "one factor": (6, entry("compression.factors.0", lambda pair: pair[:1]), "a list of 2"),
    "components there are not": (6, entry("compression.selection.kept.0", [10**6]), "has a component that"),
    "losses garbage": (6, entry("compression.losses", ["a"]), r"losses\[0\] is 'a'"),
    "safeguard garbage": (6, entry("compression.safeguard", [1]), "safeguard is list"),
    "safeguard without its best": (6, entry("compression.safeguard.best", ...), "safeguard.best is missing"),
}


def refuse(path, change, message, **settings):
    checkpoint = torch.load(path)
    change(checkpoint["callbacks"]["ZSSVDCallback"])
    damaged = path.with_name("damaged.ckpt")
    torch.save(checkpoint, damaged)
    module, callback = CausalLM(), short(**settings)
    before, fitted = state_of(module), trainer(callback, max_epochs=9)
    with pytest.raises(CheckpointError, match=message):
        fitted.fit(module, loader(token_batches()), ckpt_path=str(damaged))
    assert_same_state(before, state_of(module))
    assert not module.__dict__.keys() & {"on_load_checkpoint", "on_save_checkpoint", "configure_optimizers"}
    assert callback.phase is Phase.WAIT
    assert (fitted.max_epochs, fitted.max_steps) == (9, -1)


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_state_names_the_key_and_leaves_module_and_trainer_as_before(run, case):
    step, change, message = DAMAGE[case]
    refuse(run / f"step={step}.ckpt", change, message)


@pytest.mark.parametrize("step", [2, 6, 10, 14])
def test_every_key_is_needed(run, step):
    state = torch.load(run / f"step={step}.ckpt")["callbacks"]["ZSSVDCallback"]
    for key in state.keys() - {"version"}:
        damaged = copy.deepcopy(state)
        del damaged[key]
        callback = short()
        with pytest.raises(CheckpointError, match=f"{key} is missing"):
            callback.refuse_state(damaged)
    short().refuse_state(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (entry("recovery", "lora"), "recovery is 'lora'"),
        (entry("recovery.stage", 7), "recovery.stage is 7, but must be below 1"),
        (entry("recovery.active", ...), "recovery.active is missing"),
        (entry("recovery.horizon", [1]), "recovery.horizon is list, but must be a list of 3"),
        (entry("recovery.were_trainable", [3]), r"were_trainable\[0\] is 3"),
    ],
)
def test_damaged_state_of_a_recovery(recovered, change, message):
    refuse(recovered / "step=14.ckpt", change, message, recovery=LORA)


def test_damaged_state_of_prehab(tmp_path):
    fitted = trainer(LowRankPrehab(steps=2, moment_batches=2), max_epochs=1)
    fitted.fit(CausalLM(), loader(token_batches()))
    fitted.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt")
    (key,) = [key for key in checkpoint["callbacks"] if "Prehab" in key]
    for change, message in (
        (entry("kept.0", nan), r"kept\..* finite"),
        (entry("leaders", None), "leaders is None"),
        (entry("settings", ...), "settings is missing"),
    ):
        damaged = copy.deepcopy(checkpoint)
        change(damaged["callbacks"][key])
        torch.save(damaged, tmp_path / "damaged.ckpt")
        again = trainer(LowRankPrehab(steps=2, moment_batches=2), max_epochs=2)
        with pytest.raises(CheckpointError, match=message):
            again.fit(CausalLM(), loader(token_batches()), ckpt_path=str(tmp_path / "damaged.ckpt"))
