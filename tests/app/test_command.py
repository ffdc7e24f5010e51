"""Usage, errors and JSON of command lines, the recipes among them."""

import json
import logging
import re
import sys

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text
from support import fresh
from support.models import saved_tiny_llama

from zssvd_lightning._files import json_of
from zssvd_lightning.app import cli
from zssvd_lightning.app.command import errors_in_one_line, print_table, start
from zssvd_lightning.app.run import Run, recorded_evaluation
from zssvd_lightning.app.run_config import CalibrationConfig, ModelConfig, RunConfig
from zssvd_lightning.app.settings import with_options
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.errors import (
    BudgetError,
    ConfigError,
    ModelSourceError,
    OutputError,
    PlanError,
    TargetError,
    TextError,
)


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0), (["run.yaml", "-h"], 0)])
def test_a_script_without_arguments_or_asked_for_help_prints_its_usage(capsys, arguments, code):
    with pytest.raises(SystemExit) as ended:
        start(lambda *given: pytest.fail("started"), "Do this: `python -m this`.", arguments)
    assert ended.value.code == code
    out, err = capsys.readouterr()
    assert (out if code == 0 else err) == "Do this: `python -m this`.\n"
    assert not (err if code == 0 else out)


def test_arguments_reach_the_script():
    given = []
    start(lambda *arguments: given.extend(arguments), "usage", ["a.yaml", "b=c"])
    assert given == ["a.yaml", "b=c"]


def test_errors_of_this_package_are_one_line_and_others_pass(capsys):
    with pytest.raises(SystemExit) as ended, errors_in_one_line():
        raise ConfigError("one\n  two \ud800")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "ConfigError: one two \\ud800\n"
    with pytest.raises(KeyError), errors_in_one_line():
        raise KeyError("x")


@pytest.mark.parametrize("recipe", ["compare", "compress", "compress_then_finetune"])
def test_recipes_print_usage_and_one_line_errors(recipe, tmp_path):
    def run(*arguments):
        code = f"import runpy; runpy.run_module('recipes.{recipe}', run_name='__main__', alter_sys=True)"
        return fresh.run(code, *arguments, check=False, loaded=fresh.PACKAGE)

    done = run("--help")
    assert done.returncode == 0
    assert f"`python -m recipes.{recipe} CONFIG" in done.stdout
    done = run(str(tmp_path / "none.yaml"), f"output={tmp_path}/out")
    assert done.returncode == 1
    assert "none.yaml does not exist" in done.stderr
    assert done.stderr.count("\n") == 1


def test_json_has_no_numbers_that_json_lacks(caplog):
    inf, nan = float("inf"), float("nan")
    with caplog.at_level(logging.WARNING):
        text = json_of({"a": nan, "b": [1.5, {"c": -inf}], "d": (True, None, "NaN"), "e": 2})
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": None,
        "b": [1.5, {"c": None}],
        "d": [True, None, "NaN"],
        "e": 2,
    }
    assert caplog.messages == ["not finite, and so null in the JSON: a (nan), b[1].c (-inf)"]


def test_the_result_of_a_command_is_json_even_if_it_is_not_finite(monkeypatch, capsys, tmp_path):
    measured = {"perplexity": float("inf"), "tokens": 3}
    monkeypatch.setattr("zssvd_lightning.app.run.measure", lambda *arguments, **keywords: (measured, None))
    monkeypatch.setattr(sys, "argv", ["zssvd", "evaluate", str(tmp_path), "text=a"])
    with pytest.raises(SystemExit):
        cli.main()
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"perplexity": None, "tokens": 3}


def memory_table():
    table = Table(title="what it takes", caption="GB, as it is")
    for column in ("preset", "without a GPU", "TFLOP: passes", "decompositions", Text("[/hours]")):
        table.add_column(column)
    table.add_row("zs-svd-line-search", *("123,456,789",) * 3, Text("[/b]"))
    table.add_row("model.layers.11.mlp.down_proj", "", "2", "3", "4")
    return table


def words_of(table):
    console = Console()
    cells = [column.header for column in table.columns] + [cell for column in table.columns for cell in column.cells]
    shown = [cell.plain if isinstance(cell, Text) else console.render_str(cell).plain for cell in cells]
    return [word for cell in shown for word in cell.split()]


def test_a_table_in_a_pipe_is_as_wide_as_its_entries(capsys, monkeypatch):
    for width in ("20", "80"):
        monkeypatch.setenv("COLUMNS", width)
        print_table(memory_table())
        shown = capsys.readouterr().out
        assert "…" not in shown
        (row,) = (line for line in shown.splitlines() if "zs-svd-line-search" in line)
        assert row.count("123,456,789") == 3
        assert any("model.layers.11.mlp.down_proj" in line for line in shown.splitlines())


@pytest.mark.parametrize("width", [35, 60, 80, 88, 90, 95, 100, 200])
def test_a_terminal_of_any_width_shows_every_word_whole(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(Console, "is_terminal", property(lambda console: True))
    print_table(memory_table(), err=True)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().err)
    assert all(len(line) <= width for line in shown.splitlines())
    assert all(word in shown for word in words_of(memory_table()))
    assert "GB, as it is" in shown


def test_a_short_form_may_not_contradict_an_argument():
    with pytest.raises(
        ConfigError, match=r"model\.source is 'a' by an option or argument, but 'model=b' says otherwise"
    ):
        with_options(["model=b"], {"model.source": "a"})
    assert with_options(["model=a"], {"model.source": "a"})[0] == "model=a"


@pytest.mark.parametrize("content", ["[1]", "{", '{"config": {"evaluation": 3}}', "[" * 100_000])
def test_a_folder_with_another_report_is_refused_by_name(tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ModelSourceError, match=r"report\.json is no report of a run"):
        recorded_evaluation(str(tmp_path))
    with pytest.raises(ModelSourceError, match="a name of 300 bytes"):
        recorded_evaluation(str(tmp_path / ("a" * 300)))


@pytest.fixture
def loads(monkeypatch):
    """Names of the sources of models and texts that a run reads."""
    names = []
    for function in ("load_model", "texts.load_text"):
        target = f"zssvd_lightning.app.run.{function}"
        module = __import__("zssvd_lightning.app.run", fromlist=["x"])
        real = module.load_model if function == "load_model" else module.texts.load_text

        def noted(source, *rest, real=real):
            names.append(source)
            return real(source, *rest)

        monkeypatch.setattr(target, noted)
    return names


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("{}/new/" + "a" * 300, "a name of 300 bytes"),
        ("{}/a\0b", "NUL"),
        ("{}/file/out", "leads through .*file, which is a file"),
        ("{}/loop/out", "is not possible"),
        ("~nobody-of-that-name/out", "is not possible"),
        ("", "is the working directory"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_the_model_is_loaded(tmp_path, loads, output, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    config = RunConfig(model=ModelConfig("m"), calibration=CalibrationConfig("t"), output=output.format(tmp_path))
    with pytest.raises(OutputError, match=message):
        Run(config)
    assert loads == []
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"include": ["nothing"]}, TargetError),
        ({"ignore": ["re:("]}, TargetError),
        ({"storage": "hq", "prune_ratio": 0.3}, BudgetError),
        ({"plan": "nowhere.yaml"}, PlanError),
    ],
)
def test_layers_and_budget_are_checked_before_texts_are_read(tmp_path, loads, settings, error):
    source = str(saved_tiny_llama(tmp_path / "model"))
    calibration = CalibrationConfig("nowhere.txt", length=32)
    run = RunConfig(
        model=ModelConfig(source),
        calibration=calibration,
        compression=CompressionConfig(**settings),
        output=str(tmp_path / "out"),
    )
    with pytest.raises(error):
        Run(run, progress=False)
    assert loads == [source]
    with pytest.raises(TextError, match="is not a file"):
        Run(RunConfig(model=run.model, calibration=calibration, output=run.output), progress=False)
