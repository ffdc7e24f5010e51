import json
import random
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
import yaml
from support.models import saved_tiny_llama, tiny_tokenizer

from zssvd_lightning.app.cli import main
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
        f"compression: {{prune_ratio: 0.4}}\n"
        f"evaluation: {{text: {folder}/text.txt, second: '{folder}/other.jsonl#goal', windows: 3, length: 32}}\n"
        f"output: {folder}/out\n"
    )
    return folder


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def zssvd(monkeypatch, capsys):
    """Runs the command in this process, which saves importing torch each time."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["zssvd", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code or 0
        return Done(code, *capsys.readouterr())

    return run


def test_compress_then_evaluate(workshop, zssvd):
    done = zssvd("compress", workshop / "config.yaml", "compression.prune_ratio=0.3", "compression.corrections=2")
    assert "perplexity" in done.out
    report = json.loads((workshop / "out" / "report.json").read_text())
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
    assert isinstance(report["predicted_drift"], float)

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
        (["compress", "{}/config.yaml", "evaluation.length=999999"], "windows of 999999"),
        (["compress", "{}/config.yaml", "output={}/model"], "is what is read from"),
        (["compress", "{}/config.yaml", "compression.include=[lm_head]", "output={}/new"], "tied"),
        (["compress", "{}/config.yaml", "model.source={}/none"], "no config.json"),
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
        "step,loss,zssvd/phase,zssvd/predicted_drift",
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
