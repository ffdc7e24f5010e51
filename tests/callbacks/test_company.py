"""Beside the callbacks, loggers and progress bars that a training run already has."""

import csv
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
    TQDMProgressBar,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from support.callbacks import short
from support.models import CausalLM, loader, token_batches, trainer

from zssvd_lightning import Phase
from zssvd_lightning._resources import shown_by
from zssvd_lightning.errors import UnsupportedTrainingError


class Scripted(CausalLM):
    """Reports validation losses from a list, so that what they lead to is known."""

    def __init__(self, scores):
        super().__init__()
        self.scores = list(scores)

    def validation_step(self, batch, batch_idx):
        pass

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.log("val_loss", self.scores[min(self.trainer.current_epoch, len(self.scores) - 1)])


def fit(module, *callbacks, **settings):
    data = loader(token_batches())
    fitted = trainer(*callbacks, **({"max_epochs": 6} | settings))
    fitted.fit(module, data, data)
    return fitted


def is_low_rank(path):
    return any(".down." in name for name in torch.load(path)["state_dict"])


KEPT = {"dense": "wait", "truncated": "calibrate"}
"""Phases of the last checkpoints before the truncation and before the factorization."""


# Epochs: 0 waits, 1 calibrates and truncates, 2 corrects, 3 calibrates, truncates and factorizes, 4 and 5 recover.
SCORES = [1.0, 1.0, 9.0, 8.0, 7.0, 7.5]


def test_the_best_checkpoint_is_the_best_compressed_one_and_the_dense_ones_stay(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="val_loss", save_top_k=1, save_last=True)
    fit(Scripted(SCORES), short(start_epoch=1), saving, enable_checkpointing=True)
    assert Path(saving.best_model_path).name == "epoch=4.ckpt"
    assert saving.best_model_score == 7.0
    assert is_low_rank(saving.best_model_path)
    assert not is_low_rank(tmp_path / "epoch=0.ckpt")
    assert torch.load(tmp_path / "epoch=0.ckpt")["callbacks"]["ZSSVDCallback"]["phase"] == "wait"
    assert Path(saving.last_model_path) == tmp_path / "last.ckpt"
    assert is_low_rank(tmp_path / "last.ckpt")
    assert not is_low_rank(tmp_path / "last-dense.ckpt")


@pytest.mark.parametrize("save_last", [True, "link"])
@pytest.mark.parametrize("filename", [None, "best"])
def test_the_names_of_checkpoints_after_a_fit_are_those_of_the_compressed_model(tmp_path, filename, save_last):
    saving = ModelCheckpoint(tmp_path, filename=filename, save_last=save_last)
    fit(CausalLM(), short(start_epoch=1), saving, enable_checkpointing=True)
    for name in ["last"] + [filename] * (filename is not None):
        assert is_low_rank(tmp_path / f"{name}.ckpt")
        phases = {n: torch.load(tmp_path / f"{name}-{n}.ckpt")["callbacks"]["ZSSVDCallback"]["phase"] for n in KEPT}
        assert phases == KEPT
    again = CausalLM()
    fitted = trainer(short(), ModelCheckpoint(tmp_path, save_last=True), max_epochs=7, enable_checkpointing=True)
    fitted.fit(again, loader(token_batches()), ckpt_path="last")
    assert any(name.endswith("down.weight") for name in again.state_dict())


@pytest.mark.parametrize("mode", ["min", "max"])
def test_without_version_numbers_the_dense_checkpoint_is_set_aside(tmp_path, mode):
    scores = SCORES if mode == "min" else [-score for score in SCORES]
    settings = {"enable_version_counter": False, "save_last": True, "mode": mode}
    saving = ModelCheckpoint(tmp_path, filename="best", monitor="val_loss", **settings)
    fit(Scripted(scores), short(start_epoch=1), saving, enable_checkpointing=True)
    for name in ("best", "last"):
        phases = {file: torch.load(file)["callbacks"]["ZSSVDCallback"]["phase"] for file in tmp_path.glob(f"{name}*")}
        found = {file.stem: phase for file, phase in phases.items()}
        assert found.keys() == {name, f"{name}-dense", f"{name}-truncated"}
        assert found[f"{name}-dense"] == "wait"
        assert found[f"{name}-truncated"] in ("correct", "calibrate")
        assert found[name] == "recover"


def test_checkpoints_without_a_score_leave_the_last_dense_one(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="{epoch}")
    fit(Scripted(SCORES), short(start_epoch=2, corrections=0), saving, enable_checkpointing=True)
    assert not is_low_rank(tmp_path / "epoch=1.ckpt")
    assert is_low_rank(tmp_path / "epoch=5.ckpt")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["epoch=1.ckpt", "epoch=5.ckpt"]


@pytest.mark.parametrize("on_train_epoch_end", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_early_stopping_waits_for_the_compressed_model(on_train_epoch_end, first):
    stopping = EarlyStopping("val_loss", patience=1, check_on_train_epoch_end=on_train_epoch_end)
    callback = short(start_epoch=1)
    callbacks = [stopping, callback] if first else [callback, stopping]
    fitted = fit(Scripted([*SCORES, 8.0]), *callbacks, max_epochs=9)
    assert callback.phase is Phase.DONE
    assert stopping.best_score == 7.0
    assert fitted.current_epoch == 6
    assert stopping.stopped_epoch == 5


@pytest.mark.parametrize("averaging", [lambda: StochasticWeightAveraging(1e-3), WeightAveraging])
def test_weight_averaging_is_refused_by_name(averaging):
    with pytest.raises(UnsupportedTrainingError, match="averages weights by their names"):
        fit(CausalLM(), short(), averaging())


class Scheduled(CausalLM):
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def csv_metrics(logger):
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {key: [(int(row["step"]), float(row[key])) for row in rows if row[key]] for key in rows[0] if key != "step"}


@pytest.mark.parametrize("line_search", [True, False])
def test_a_csv_logger_is_told_everything(tmp_path, line_search):
    logger, callback = CSVLogger(tmp_path), short(start_epoch=1, line_search=line_search)
    others = [LearningRateMonitor(), Timer()]
    fit(Scheduled(), *others, callback, logger=logger, log_every_n_steps=2)
    metrics = csv_metrics(logger)
    phases = [list(Phase)[int(value)].value for _, value in metrics["zssvd/phase"]]
    more = ["correct"] if line_search else []
    assert phases == ["wait", "calibrate", "correct", *more, "calibrate", "recover", "done"]
    losses = callback.report.losses
    before = [value for _, value in metrics["zssvd/loss_before"]]
    assert before == pytest.approx([losses[0], losses[-1]])
    after = [value for _, value in metrics["zssvd/loss_after"]]
    assert after[0] == pytest.approx(losses[1])
    assert len(after) == 2
    assert [value for _, value in metrics["zssvd/step_fraction"]] == callback.report.correction_fractions
    assert metrics["zssvd/first_order_sum"][-1][1] == callback.report.first_order_sum
    assert metrics["zssvd/kept_parameters"][-1][1] == callback.report.parameters_after
    assert metrics["zssvd/pruned"][-1][1] == pytest.approx(callback.report.reached)
    ranks = sorted(layer.rank for layer in callback.report.layers.values() if layer.rank is not None)
    assert metrics["zssvd/low_rank_layers"][-1][1] == len(ranks)
    assert metrics["zssvd/rank_lowest"][-1][1] == ranks[0]
    assert metrics["zssvd/rank_highest"][-1][1] == ranks[-1]
    assert metrics["zssvd/rank_median"][-1][1] == median(ranks)
    assert not any(name.startswith("zssvd/rank/") for name in metrics)
    assert metrics["zssvd/gathered"][:2] == [(6, 2.0), (8, 4.0)]
    assert {value for _, value in metrics["zssvd/to_gather"]} == {4.0, 2.0}


def test_the_loss_after_the_last_truncation_is_that_of_the_next_batches_at_those_weights(tmp_path):
    module, callback, logger = CausalLM(lr=0.0), short(corrections=0), CSVLogger(tmp_path)
    data = token_batches(1)
    fitted = trainer(callback, max_epochs=2, logger=logger)
    fitted.fit(module, loader(data))
    with torch.no_grad():
        expected = module.model(**data[0]).loss.item()
    assert csv_metrics(logger)["zssvd/loss_after"][0][1] == pytest.approx(expected)


@pytest.mark.parametrize("first", [False, True])
def test_a_checkpoint_and_early_stopping_can_monitor_the_compression(tmp_path, first):
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="zssvd/loss_after")
    stopping = EarlyStopping("zssvd/loss_after", patience=2)
    callback = short(start_epoch=3)
    callbacks = [stopping, callback] if first else [callback, stopping]
    fitted = fit(Scripted(SCORES), *callbacks, saving, enable_checkpointing=True, max_epochs=20)
    assert callback.phase is Phase.DONE
    assert is_low_rank(saving.best_model_path)
    measured = fitted.callback_metrics["zssvd/loss_after"]
    assert saving.best_model_score == stopping.best_score == measured
    assert 0 < measured < 10
    # 3 calibrates, 4 corrects, 5 calibrates and factorizes; the loss after that is measured in 6, and is the same later
    assert (fitted.current_epoch, stopping.stopped_epoch) == (9, 8)


def test_metrics_of_the_compression_are_those_of_the_report():
    callback = short(corrections=0)
    fitted = fit(CausalLM(), callback)
    seen, report = fitted.callback_metrics, callback.report
    assert seen["zssvd/kept_parameters"] == report.parameters_after
    assert seen["zssvd/loss_before"] == pytest.approx(report.losses[0])
    assert seen["zssvd/loss_kept_back"] == pytest.approx(report.kept_back["final"])


def test_tensorboard_is_told_too(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    logger = TensorBoardLogger(tmp_path)
    callback = short()
    fit(CausalLM(), callback, logger=logger)
    content = b"".join(file.read_bytes() for file in Path(logger.log_dir).glob("events*"))
    tags, histograms, at = set(), [], 0
    while at < len(content):
        size = int.from_bytes(content[at : at + 8], "little")
        event = Event.FromString(content[at + 12 : at + 12 + size])
        tags |= {value.tag for value in event.summary.value}
        histograms += [value.histo.num for value in event.summary.value if value.tag == "zssvd/ranks"]
        at += 12 + size + 4
    assert {"zssvd/phase", "zssvd/first_order_sum", "zssvd/loss_before", "zssvd/rank_map"} <= tags
    assert len(tags) < 25
    assert len(histograms) == 2
    assert histograms[-1] == sum(layer.rank is not None for layer in callback.report.layers.values())


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_the_progress_bar_shows_the_phase(bar, capsys, monkeypatch):
    shown = []

    class Watched(bar):
        def get_metrics(self, trainer, pl_module):
            return super().get_metrics(trainer, pl_module)

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            shown.append(bar_.get_metrics(trainer, pl_module)["compression"])

    bar_ = Watched(refresh_rate=1)
    data = loader(token_batches())
    fitted = trainer(short(corrections=0), Look(), bar_, max_epochs=2, enable_progress_bar=True)
    fitted.fit(CausalLM(), data)
    assert shown == [
        "calibrate 1/4",
        "calibrate 2/4",
        "calibrate 3/4",
        "recover",
        "recover",
        "recover",
        "recover",
        "recover",
    ]
    assert "get_metrics" not in bar_.__dict__
    printed = capsys.readouterr()
    if bar is TQDMProgressBar:
        assert "compression=calibrate 2/4" in printed.out + printed.err


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_long_steps_are_shown_on_the_bar_of_the_trainer(bar, capsys, monkeypatch):
    monkeypatch.setattr("zssvd_lightning.callbacks.trainer.bar.EVERY", 0.0)
    drawn = []

    class Watched(bar):
        def get_metrics(self, trainer, pl_module):
            return super().get_metrics(trainer, pl_module)

        def refresh(self, *args, **kwargs):
            drawn.append(1)
            return super().refresh(*args, **kwargs)

    trainer(short(corrections=0, progress=True), Watched(), max_epochs=2, enable_progress_bar=True).fit(
        CausalLM(), loader(token_batches())
    )
    printed = capsys.readouterr()
    assert "spectra" not in printed.err
    if bar is TQDMProgressBar:
        assert all(f"compression=spectra {n}/14" in printed.out for n in (1, 7, 14))
    else:
        assert len(drawn) >= 14


@pytest.mark.parametrize("display", [None, "outer"])
def test_a_trainer_without_a_bar_leaves_the_display_to_what_is_around_it(display, capsys):
    shown = []

    @contextmanager
    def outer(title, total, unit):
        shown.append((title, total, unit))
        yield shown.append

    with nullcontext() if display is None else shown_by(outer):
        fit(CausalLM(), short(corrections=0, progress=True), max_epochs=2)
    assert shown == ([] if display is None else [("spectra", 14, "layer"), *[1] * 14])
    assert "spectra" not in capsys.readouterr().err


def test_a_bar_is_given_back_after_a_failure_too():
    class Fail(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise ConnectionError

    bar, module = TQDMProgressBar(), CausalLM()
    with pytest.raises(ConnectionError):
        fit(module, short(), Fail(), bar, enable_progress_bar=True)
    assert "get_metrics" not in bar.__dict__
    assert not module.__dict__.keys() & {"on_load_checkpoint", "on_save_checkpoint"}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


class Count(L.Callback):
    """Training steps before and after compression, by phase."""

    def __init__(self, callback):
        self.callback, self.phases = callback, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.phases.append(self.callback.phase)


@pytest.mark.parametrize(
    ("limits", "own", "total"),
    [
        ({"max_steps": 6, "max_epochs": -1}, 6, 18),
        ({"max_epochs": 2}, 8, 20),
        ({"max_steps": 6, "max_epochs": 9}, 6, 18),
    ],
)
def test_training_can_be_extended_by_what_compression_takes(limits, own, total):
    callback = short(start_step=1, extend_training=True)
    count = Count(callback)
    fitted = trainer(callback, count, **limits)
    fitted.fit(CausalLM(), loader(token_batches()))
    assert len(count.phases) == total
    ordinary = [phase for phase in count.phases if phase in (Phase.WAIT, Phase.RECOVER)]
    assert len(ordinary) == own
    assert fitted.max_steps == limits.get("max_steps", -1)
    assert fitted.max_epochs == limits.get("max_epochs")


def test_without_extension_the_limits_are_the_users():
    callback = short(start_step=1)
    count = Count(callback)
    trainer(count, callback, max_steps=15, max_epochs=-1).fit(CausalLM(), loader(token_batches()))
    assert len(count.phases) == 15


def test_an_extended_run_that_would_not_get_to_its_start_is_refused():
    with pytest.raises(UnsupportedTrainingError, match="until its start"):
        trainer(short(start_step=30, extend_training=True), max_steps=6).fit(CausalLM(), loader(token_batches()))
