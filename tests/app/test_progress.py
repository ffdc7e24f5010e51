"""Displays of progress, and what else writes to the terminal."""

import logging
import sys

import pytest
import torch
from support.models import saved_tiny_llama, tiny_llama, token_batches
from transformers.utils import logging as bars

from zssvd_lightning import compress
from zssvd_lightning._numerics import multiplies_bfloat16
from zssvd_lightning._resources import counted, shown_by
from zssvd_lightning.app.command import show_own_messages
from zssvd_lightning.app.progress import WholeBar
from zssvd_lightning.app.run_config import CalibrationConfig
from zssvd_lightning.errors import TextError
from zssvd_lightning.sources.models import load_weights
from zssvd_lightning.sources.texts import load_text


def test_one_bar_goes_over_all_steps(capsys):
    seen = []
    with WholeBar({"first": 0.25, "second": 0.5, "inner": 0.125}) as bar, shown_by(bar.step):
        seen.extend(bar._bar.n for _ in counted(range(4), "first", 4, "item", shown=True))
        with bar.step("second", 2, "item") as advance:
            advance(1)
            seen.append(bar._bar.n)
            with bar.step("inner", 3, "item"):
                seen.append(bar._bar.n)
            seen.append(bar._bar.n)
            advance(1)
        seen.append(bar._bar.n)
        with bar.step("unknown", None, ""):
            pass
        seen.append(bar._bar.n)
    assert seen == pytest.approx([0, 0.0625, 0.125, 0.1875, 0.5, 0.5, 0.625, 0.875, 0.875])
    printed = capsys.readouterr().err
    assert "100%" in printed
    assert "second" in printed


def test_a_bar_never_passes_its_end_and_stops_where_a_run_fails(capsys):
    with WholeBar({"step": 0.75}) as bar:
        for _ in range(2):
            with bar.step("step", 2, "item") as advance:
                advance(5)
        assert bar._bar.n == pytest.approx(1)
    capsys.readouterr()
    with pytest.raises(ConnectionError), WholeBar({}) as bar:
        raise ConnectionError
    assert "100%" not in capsys.readouterr().err


def test_a_compression_shows_all_its_steps_on_the_display_that_is_set(capsys):
    model = tiny_llama()
    shares = {"calibrate": 0.25, "spectra": 0.25}
    with WholeBar(shares) as bar, shown_by(bar.step):
        compress(model, token_batches(), prune_ratio=0.3, corrections=0)
        assert bar._bar.n == pytest.approx(0.5)
    assert "batch/s" not in capsys.readouterr().err


def test_only_the_messages_of_this_package_are_shown(capsys):
    own, level = logging.getLogger("zssvd_lightning"), logging.getLogger("zssvd_lightning").level
    handlers, root = list(own.handlers), list(logging.root.handlers)
    try:
        show_own_messages()
        show_own_messages()
        logging.getLogger("zssvd_lightning.some.part").info("ours")
        logging.getLogger("another").info("theirs")
        assert logging.root.handlers == root
        assert capsys.readouterr().err == "ours\n"
    finally:
        own.handlers[:] = handlers
        own.setLevel(level)


def test_loading_shows_no_bar_of_weights_and_leaves_the_switch_as_it_was(tmp_path, capsys):
    folder = saved_tiny_llama(tmp_path / "dense")
    capsys.readouterr()
    assert bars.is_progress_bar_enabled()
    load_weights(str(folder))
    assert not capsys.readouterr().err
    assert bars.is_progress_bar_enabled()


def test_the_language_reference_is_a_text_in_two_parts():
    whole, train, test = (load_text(f"python{split}") for split in ("", ":train", ":test"))
    assert "lambda" in whole
    assert len(train) + len(test) == len(whole) - 2
    assert 0.02 < len(test) / len(whole) < 0.3
    assert test[:500] not in train
    with pytest.raises(TextError, match="'train' and 'test'"):
        load_text("python:dev")


def test_a_python_without_its_reference_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(TextError, match="has no language reference"):
        load_text("python")


@pytest.mark.parametrize(("has", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_precision_is_chosen_by_what_the_processor_multiplies(monkeypatch, has, expected):
    monkeypatch.setattr("zssvd_lightning.app.run_config.multiplies_bfloat16", lambda device: has)
    cpu = torch.device("cpu")
    assert CalibrationConfig("a", precision="auto").precision_on(cpu) == expected
    assert CalibrationConfig("a").precision_on(cpu) == "32-true"
    assert not multiplies_bfloat16(torch.device("meta"))
