"""Pictures of each truncation in the loggers of a Trainer."""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from support.models import CausalLM, loader, token_batches, trainer

from zssvd_lightning import Schedule, ZSSVDCallback
from zssvd_lightning.callbacks.loggers import pictures
from zssvd_lightning.callbacks.loggers.figures import DENSE, figures, grid
from zssvd_lightning.compression.report import LayerReport

NAMES = {"zssvd/rank_map", "zssvd/walk", "zssvd/sensitivities"}


class ImageLogger(Logger):
    """Takes images as the logger of Weights & Biases does."""

    name, version = "images", 0

    def __init__(self):
        super().__init__()
        self.images = []

    def log_image(self, key, images, step=None, **kwargs):
        self.images.append((key, images, step))

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def fitted(folder, *loggers):
    callback = ZSSVDCallback(
        prune_ratio=0.4, preset="zs-svd", corrections=0, schedule=Schedule(calibration_batches=3), progress=False
    )
    fit = trainer(callback, max_steps=5, logger=list(loggers), default_root_dir=folder)
    fit.fit(CausalLM(), loader(token_batches(5)))
    return callback


class OwnLogger(ImageLogger):
    """Takes images in a way of its own."""

    def log_image(self, name, image):
        self.images.append(name)


def test_a_logger_that_fails_does_not_end_the_fit(tmp_path, caplog):
    pytest.importorskip("matplotlib")
    assert fitted(tmp_path, OwnLogger()).report is not None
    assert "loggers get no pictures of this truncation: TypeError" in caplog.text


def test_every_logger_that_takes_pictures_gets_them(tmp_path):
    pytest.importorskip("matplotlib")
    event_file = pytest.importorskip("tensorboardX.proto.event_pb2")

    images = ImageLogger()
    board = TensorBoardLogger(tmp_path, "board")
    fitted(tmp_path, images, board, CSVLogger(tmp_path, "table"))
    assert {key for key, _, _ in images.images} == NAMES
    for _, (image,), step in images.images:
        assert image.dtype == np.uint8
        assert image.shape[2] == 3
        assert image.std() > 0
        assert step > 0
    (path,) = (tmp_path / "board").rglob("events.*")
    with path.open("rb") as file:
        written = list(records(file))
    shown = set()
    for record in written:
        event = event_file.Event.FromString(record)
        shown |= {value.tag for value in event.summary.value if value.HasField("image")}
    assert shown == NAMES


def records(file):
    """Bodies of the records of an event file: length, its checksum, body, its checksum."""
    while head := file.read(12):
        yield file.read(int.from_bytes(head[:8], "little"))
        file.read(4)


def test_without_matplotlib_loggers_get_none_which_is_said_once(tmp_path, monkeypatch, caplog):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    pictures._tell_that_there_are_none.cache_clear()
    images = ImageLogger()
    for _ in range(2):
        fitted(tmp_path, images)
    assert not images.images
    assert sum("no pictures" in message for message in caplog.messages) == 1


def test_only_the_main_process_draws(monkeypatch):
    monkeypatch.setattr(pictures, "figures", lambda report: pytest.fail("drawn"))
    taker = ImageLogger()
    pictures.log_pictures(SimpleNamespace(is_global_zero=False, loggers=[taker], global_step=1), None, "")


def test_the_map_has_the_mean_of_a_cell_and_keeps_stacks_apart():
    layers = {
        "encoder.0.mlp.0": LayerReport(2, (10, 10), 40, highest=4),
        "encoder.0.mlp.1": LayerReport(4, (10, 10), 80, highest=4),
        "decoder.1.mlp.0": LayerReport(None, (10, 10), 100, highest=4),
        "head": LayerReport(1, (10, 10), 20, highest=4),
    }
    found = grid(layers, lambda layer: DENSE if layer.rank is None else layer.rank / layer.highest)
    assert found.kinds == ["encoder: mlp.*", "decoder: mlp.*", "head"]
    assert found.blocks == ["0", "1", ""]
    assert found.values[0][0] == 0.75
    assert found.values[1][1] == DENSE
    assert found.values[2][2] == 0.25
    assert np.isnan(found.values[0][1])


def test_a_report_without_a_walk_has_no_figure_of_one():
    pytest.importorskip("matplotlib")
    layers = {"blocks.0.mlp": LayerReport(2, (10, 10), 40)}
    report = SimpleNamespace(layers=layers, trace={"walk": None, "sensitivities": None})
    assert list(figures(report)) == ["rank_map"]
