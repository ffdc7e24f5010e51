import copy
import re

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.callbacks import short
from support.models import (
    CausalLM,
    assert_same_state,
    loader,
    state_of,
    tiny_gpt2,
    tiny_llama,
    token_batches,
    trainer,
)
from torch import nn

import zssvd_lightning
from zssvd_lightning import LowRankCheckpointMixin, LowRankLinear, Phase
from zssvd_lightning.compression.corrections import STEPS
from zssvd_lightning.compression.course import Act
from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.errors import CheckpointError
from zssvd_lightning.serialization.specs import ranks_of


class Bare(CausalLM):
    def __init__(self, build=tiny_llama):
        super().__init__(build())

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.model(**batch).loss)

    def predict_step(self, batch, batch_idx):
        return self.model(**batch).logits


class Ready(LowRankCheckpointMixin, Bare):
    pass


def every_step(folder, **settings):
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, **settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with a checkpoint of every step: 4 calibrate, 4 correct, 4 calibrate, 4 recover."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    module, callback = Bare(), short()
    trainer(callback, every_step(folder), max_epochs=4, enable_checkpointing=True).fit(module, loader(token_batches()))
    return folder, module, callback


def path(run, step):
    return str(run[0] / f"step={step}.ckpt")


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal_weights(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("step", range(1, 17))
def test_every_checkpoint_is_plain_enough_for_weights_only(run, step):
    checkpoint = torch.load(path(run, step), weights_only=True)
    expected = ["calibrate"] * 3 + ["correct"] * 4 + ["calibrate"] * 4 + ["recover"] * 5
    assert checkpoint["callbacks"]["ZSSVDCallback"]["phase"] == expected[step - 1]


@pytest.mark.parametrize("step", [4, 8, 12, 16])
def test_resuming_from_the_end_of_an_epoch_ends_the_same_with_a_plain_loader(tmp_path, step):
    def fit(max_epochs, **more):
        torch.manual_seed(0)
        saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
        module, callback = Bare(), short()
        fitted = trainer(callback, saving, max_epochs=max_epochs, enable_checkpointing=True)
        fitted.fit(module, loader(token_batches()), **more)
        return module, callback

    whole, first = fit(5)
    again, second = fit(5, ckpt_path=str(tmp_path / f"step={step}.ckpt"))
    assert_equal_weights(weights(whole), weights(again))
    assert second.report.layers == first.report.layers
    assert second.report.losses == first.report.losses
    assert second.phase is Phase.DONE


@pytest.mark.parametrize("task", ["validate", "test", "predict"])
@pytest.mark.parametrize("which", ["best", "last"])
@pytest.mark.parametrize("weights_only", [False, True])
def test_the_trainer_runs_from_best_and_last_also_after_other_weights_came(tmp_path, task, which, weights_only):
    saving = ModelCheckpoint(tmp_path, save_last=True, save_weights_only=weights_only)
    module, data = Bare(), loader(token_batches())
    fitted = trainer(short(), saving, max_epochs=4, enable_checkpointing=True)
    fitted.fit(module, data)
    expected = getattr(fitted, task)(module, data, verbose=False) if task != "predict" else fitted.predict(module, data)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    found = (
        fitted.predict(module, data, ckpt_path=which)
        if task == "predict"
        else getattr(fitted, task)(module, data, ckpt_path=which, verbose=False)
    )
    if task == "predict":
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    else:
        assert found == expected


@pytest.mark.parametrize("build", [Bare, Ready])
def test_a_new_dense_module_takes_a_compressed_checkpoint_in_a_trainer(run, build):
    module = build()
    results = trainer(short()).test(module, loader(token_batches()), ckpt_path=path(run, 16), verbose=False)
    expected = trainer().test(run[1], loader(token_batches()), verbose=False)
    assert results == expected
    assert ranks_of(module) == ranks_of(run[1])


def test_load_from_checkpoint_with_the_mixin(run):
    module = Ready.load_from_checkpoint(path(run, 16), weights_only=True)
    assert_equal_weights(weights(module), weights(run[1]))
    with torch.no_grad():
        batch = token_batches(1)[0]
        assert torch.equal(module.model(**batch).logits, run[1].model(**batch).logits)


def test_load_from_checkpoint_without_the_mixin(run):
    module = zssvd_lightning.load_from_checkpoint(Bare, path(run, 16), weights_only=True)
    assert type(module) is Bare
    assert "load_state_dict" not in vars(Bare)
    assert_equal_weights(weights(module), weights(run[1]))
    with torch.no_grad():
        batch = token_batches(1)[0]
        assert torch.equal(module.model(**batch).logits, run[1].model(**batch).logits)


def test_load_from_checkpoint_without_the_mixin_refuses_another_model(run):
    with pytest.raises(CheckpointError, match="do not belong to this Bare"):
        zssvd_lightning.load_from_checkpoint(Bare, path(run, 16), build=tiny_gpt2)
    assert "load_state_dict" not in vars(Bare)


class Counts(Bare):
    loads = 0

    def load_state_dict(self, *args, **settings):
        self.loads += 1
        return super().load_state_dict(*args, **settings)


class WithoutAssign(Bare):
    def load_state_dict(self, state_dict, strict=True):
        return super().load_state_dict(state_dict, strict=strict)


@pytest.mark.parametrize("kind", [Counts, Ready, WithoutAssign])
def test_load_from_checkpoint_calls_a_loading_method_of_the_class(run, kind):
    own = kind.load_state_dict
    module = zssvd_lightning.load_from_checkpoint(kind, path(run, 16))
    assert kind.load_state_dict is own
    assert getattr(module, "loads", 1) == 1
    assert_equal_weights(weights(module), weights(run[1]))


def test_load_from_checkpoint_of_weights_alone(tmp_path):
    module = Bare()
    fitted = trainer(short(corrections=0), max_epochs=2)
    fitted.fit(module, loader(token_batches()))
    fitted.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert_equal_weights(weights(Ready.load_from_checkpoint(tmp_path / "weights.ckpt")), weights(module))


def test_a_load_that_knows_nothing_of_low_rank_layers_names_what_it_takes(run):
    with pytest.raises(
        RuntimeError,
        match=r"low-rank: use zssvd_lightning.load_from_checkpoint\(MyModule, path\), .*ZSSVDCallback, to load\"\. $",
    ):
        Bare.load_from_checkpoint(path(run, 16))
    assert "load_state_dict" not in vars(Bare)
    with pytest.raises(RuntimeError, match="LowRankCheckpointMixin"):
        trainer().validate(Bare(), loader(token_batches()), ckpt_path=path(run, 16))


def test_a_module_that_is_low_rank_already_needs_nothing_to_load_its_own_kind(run):
    expected = trainer().validate(run[1], loader(token_batches()), verbose=False)
    found = trainer().validate(run[1], loader(token_batches()), ckpt_path=path(run, 16), verbose=False)
    assert found == expected


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, lambda: tiny_llama(attention_bias=True)])
def test_a_compressed_module_takes_its_dense_checkpoint_back(tmp_path, build):
    module = Bare(build)
    before = copy.deepcopy(module)
    callback = short(corrections=0)
    fitted = trainer(callback, every_step(tmp_path), max_epochs=2, enable_checkpointing=True)
    fitted.fit(module, loader(token_batches()))
    assert ranks_of(module)
    trainer(short()).validate(module, loader(token_batches()), ckpt_path=str(tmp_path / "step=2.ckpt"), verbose=False)
    assert_same_state(state_of(before.train()), state_of(module.train()))


def test_other_ranks_are_taken_too(run, tmp_path):
    module, fitted = Ready(), trainer(short(prune_ratio=0.5, corrections=0), max_epochs=2)
    fitted.fit(module, loader(token_batches()))
    assert ranks_of(module) != ranks_of(run[1])
    module.load_state_dict(torch.load(path(run, 16))["state_dict"])
    assert_equal_weights(weights(module), weights(run[1]))


class Other(CausalLM):
    def __init__(self):
        super().__init__(tiny_llama(hidden_size=24))


class Deeper(Ready):
    def __init__(self):
        super().__init__(lambda: tiny_llama(num_hidden_layers=3))


class Renamed(CausalLM):
    def __init__(self):
        super().__init__()
        self.network = self.model
        del self.model


FOREIGN = {
    "compressed, of another width": (Other, 16, r"q_proj is \(24, 24\) in the model, so that its down.weight is"),
    "compressed, of another depth": (Deeper, 16, r"missing \(model.model.layers.2"),
    "compressed, of other names": (Renamed, 16, "missing .*unexpected"),
    "dense, of another width": (Other, 2, r"of another shape \(.* \(97, 32\) instead of \(97, 24\)"),
    "dense, of another depth": (Deeper, 2, "missing"),
    "truncated, of other names": (Renamed, 6, "missing .*unexpected"),
}


@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.parametrize("task", ["fit", "validate"])
def test_a_foreign_checkpoint_is_refused_and_the_module_untouched(run, case, task):
    build, step, message = FOREIGN[case]
    module = build()
    before = state_of(module)
    with pytest.raises(CheckpointError, match=message):
        getattr(trainer(short(), max_epochs=9), task)(module, loader(token_batches()), ckpt_path=path(run, step))
    assert_same_state(before, state_of(module))
    assert not module.__dict__.keys() & {"on_load_checkpoint", "on_save_checkpoint"}


def test_the_mixin_refuses_foreign_weights_too(run):
    module = Deeper()
    before = state_of(module)
    with pytest.raises(CheckpointError, match="do not belong to this Deeper"):
        module.load_state_dict(torch.load(path(run, 16))["state_dict"])
    assert_same_state(before, state_of(module))


@pytest.mark.parametrize("damage", ["cut", "text"])
def test_a_corrupt_checkpoint_leaves_the_module_untouched(run, tmp_path, damage):
    file = tmp_path / "damaged.ckpt"
    content = (run[0] / "step=16.ckpt").read_bytes()
    file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"not a checkpoint")
    module = Bare()
    before = state_of(module)
    with pytest.raises(Exception, match=r"zip archive|pickle|[Ii]nvalid"):
        trainer(short(), max_epochs=9).fit(module, loader(token_batches()), ckpt_path=str(file))
    assert_same_state(before, state_of(module))


@pytest.mark.parametrize(("setting", "value"), [("prune_ratio", 0.4), ("corrections", 2), ("ignore", ["q_proj"])])
def test_other_settings_in_the_middle_are_refused_and_the_module_untouched(run, setting, value):
    module = Bare()
    before = state_of(module)
    with pytest.raises(CheckpointError, match=f"{setting} was .* and is "):
        trainer(short(**{setting: value}), max_epochs=9).fit(module, loader(token_batches()), ckpt_path=path(run, 6))
    assert_same_state(before, state_of(module))


def test_state_of_no_known_kind_is_refused(run, tmp_path):
    checkpoint = torch.load(path(run, 2))
    for state, message in (({"phase": "wait"}, "no state of a ZSSVDCallback"), ({"version": 9}, "upgrade")):
        checkpoint["callbacks"]["ZSSVDCallback"] = state
        torch.save(checkpoint, tmp_path / "other.ckpt")
        with pytest.raises(CheckpointError, match=message):
            trainer(short(), max_epochs=9).fit(Bare(), loader(token_batches()), ckpt_path=str(tmp_path / "other.ckpt"))


class SavesInTheMiddle(L.Callback):
    """Saves from inside a hook or a step, as a signal handler may."""

    def __init__(self, folder, hook):
        self.folder = folder
        setattr(self, hook, self.save)

    def save(self, trainer, pl_module, *_):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.mark.parametrize("hook", ["on_before_backward", "on_train_batch_start"])
@pytest.mark.parametrize("step", [2, 5, 9])
def test_a_checkpoint_from_the_middle_of_a_batch_gathers_anew(tmp_path, hook, step):
    callback = short()
    fitted = trainer(callback, SavesInTheMiddle(tmp_path, hook), max_epochs=6)
    fitted.fit(Bare(), loader(token_batches(seed=3)))
    state = torch.load(tmp_path / f"{step}.ckpt")["callbacks"]["ZSSVDCallback"]
    assert state["compression"]["gathering"]["moments"]["batches"] == 0
    assert state["compression"]["gathering"]["moments"]["input_sums"] == {}
    resumed = short()
    trainer(resumed, max_epochs=9).fit(Bare(), loader(token_batches()), ckpt_path=str(tmp_path / f"{step}.ckpt"))
    assert resumed.phase is Phase.DONE
    assert len(resumed.report.losses) == len(callback.report.losses)


@pytest.mark.parametrize("act", [Act.TRUNCATE, Act.CORRECT, Act.SHORTEN_STEP])
def test_a_checkpoint_from_when_weights_change_starts_over_with_the_originals(tmp_path, monkeypatch, act):
    module = Bare()
    before = weights(module)
    original = STEPS.get(act, Compression.truncate)

    def saves(self):
        original(self)
        fitted.save_checkpoint(tmp_path / "middle.ckpt")
        raise ConnectionError

    if act in STEPS:
        monkeypatch.setitem(STEPS, act, saves)
    else:
        monkeypatch.setattr(Compression, act, saves)
    fitted = trainer(short(), max_epochs=6)
    with pytest.raises(ConnectionError):
        fitted.fit(module, loader(token_batches()))
    monkeypatch.undo()

    class First(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.seen = getattr(self, "seen", None) or weights(pl_module)

    first, callback = First(), short()
    trainer(callback, first, max_epochs=9).fit(Bare(), loader(token_batches()), ckpt_path=str(tmp_path / "middle.ckpt"))
    assert_equal_weights(first.seen, before)
    assert callback.phase is Phase.DONE


def test_hooks_of_the_module_itself_go_on_working(tmp_path):
    class Own(Bare):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["mine"] = 5

        def on_load_checkpoint(self, checkpoint):
            self.mine = checkpoint["mine"]
            checkpoint["state_dict"] = {re.sub("^old", "model", n): v for n, v in checkpoint["state_dict"].items()}

    fitted = trainer(short(corrections=0), max_epochs=2)
    fitted.fit(Own(), loader(token_batches()))
    fitted.save_checkpoint(tmp_path / "own.ckpt")
    checkpoint = torch.load(tmp_path / "own.ckpt")
    checkpoint["state_dict"] = {re.sub("^model", "old", n): v for n, v in checkpoint["state_dict"].items()}
    torch.save(checkpoint, tmp_path / "own.ckpt")
    module = Own()
    trainer(short(corrections=0)).validate(module, loader(token_batches()), ckpt_path=str(tmp_path / "own.ckpt"))
    assert module.mine == 5
    assert ranks_of(module)
    assert "on_load_checkpoint" not in module.__dict__


class Built(L.LightningModule):
    """Two networks, one of them made in configure_model, with a layer in two places and tied weights."""

    def __init__(self):
        super().__init__()
        self.language = None

    def configure_model(self):
        if self.language is None:
            self.language = tiny_llama()
            self.head = nn.Sequential(nn.Linear(97, 32), nn.Tanh(), nn.Linear(32, 32), nn.Linear(32, 32))
            self.head[3] = self.head[2]

    def training_step(self, batch, batch_idx):
        output = self.language(**batch)
        return output.loss + self.head(output.logits).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class BuiltReady(LowRankCheckpointMixin, Built):
    pass


def test_configure_model_several_networks_ties_and_shared_layers(tmp_path):
    torch.manual_seed(0)
    module, callback = Built(), short(prune_ratio=0.6)
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fitted = trainer(callback, saving, max_epochs=4, enable_checkpointing=True)
    fitted.fit(module, loader(token_batches()))
    assert {"head.0", "head.2"} <= callback.report.layers.keys()
    assert "head.3" not in callback.report.layers
    assert isinstance(module.head[2], LowRankLinear)
    assert module.head[3] is module.head[2]
    assert module.language.lm_head.weight is module.language.model.embed_tokens.weight
    last = str(tmp_path / "step=16.ckpt")
    expected = trainer().validate(module, loader(token_batches()), verbose=False)
    for again in (Built(), BuiltReady.load_from_checkpoint(last)):
        path = last if isinstance(again, Built) and not isinstance(again, BuiltReady) else None
        assert trainer(short()).validate(again, loader(token_batches()), ckpt_path=path, verbose=False) == expected
        assert again.head[3] is again.head[2]
    torch.manual_seed(0)
    resumed = Built()
    resume = {"ckpt_path": str(tmp_path / "step=4.ckpt")}
    trainer(short(prune_ratio=0.6), max_epochs=4).fit(resumed, loader(token_batches()), **resume)
    assert ranks_of(resumed) == ranks_of(module)


FORMAT = {
    "": (
        "version phase position calibration terms_unit batches_into_epoch epoch_length first_losses compression report "
        "recovery importances allowance recovers_from"
    ),
    "compression": (
        "config shapes model_parameters gathering originals factors found selection step lengths losses fractions "
        "truncations seconds truncation_loss safeguard left_dense stand_ins importances trace widths narrowed"
    ),
    "gathering": "moments window kept pending gradients calls",
}
"""Keys of version 3 of the callback's state, which checkpoints on disk have. Fewer keys would be another version; the
last seven of `compression` are not in checkpoints of earlier releases."""


def test_the_keys_of_the_state_in_checkpoints_are_those_of_its_version(tmp_path):
    callback = short()
    fitted = trainer(callback, every_step(tmp_path), max_epochs=6, enable_checkpointing=True)
    fitted.fit(CausalLM(), loader(token_batches()))
    saved = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert saved["version"] == 3
    parts = {"": saved, "compression": saved["compression"], "gathering": saved["compression"]["gathering"]}
    assert {name: set(part) for name, part in parts.items()} == {n: set(keys.split()) for n, keys in FORMAT.items()}
