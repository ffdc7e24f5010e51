"""The main job on a real pretrained model and real text, with few samples."""

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from support.recipes import beginning

from zssvd_lightning.app.cli import main
from zssvd_lightning.serialization.specs import ranks_of
from zssvd_lightning.sources.models import load_model

ROOT = Path(__file__).parents[2]
SMALL = [
    "calibration.samples=6",
    "calibration.length=128",
    "calibration.correction_samples=2",
    "compression.corrections=0",
    "compression.correction_batches=1",
    "evaluation.windows=1",
    "evaluation.length=256",
    "compression.include='*.layers.[0-2].*'",
]
TRAINED = ["recovery.method=factors", "training.steps=1", "training.length=128", "training.held_out=2"]
TARGETS = 106_168_320 // 10
"""Numbers in the targets of 3 of the 30 blocks."""


def of_short_texts(folder, name):
    """A config with settings for few samples, from the beginnings of its texts."""
    config = ROOT / "configs" / "smollm2-135m" / name
    told = yaml.safe_load(config.read_text())
    asked = [(part, key) for part in ("calibration", "evaluation") for key in ("text", "second") if key in told[part]]
    texts = [beginning(told[part][key], folder / f"{part}-{key}.txt", 30_000) for part, key in asked]
    return [str(config), *SMALL, *(f"{part}.{key}={text}" for (part, key), text in zip(asked, texts, strict=True))]


def test_recipe_compresses_a_real_model_that_evaluate_reads_back(tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    recipe = importlib.import_module("recipes.compress")
    monkeypatch.setattr(recipe, "SPEED", replace(recipe.SPEED, contexts=(32,), tokens=2, repeats=1))
    recipe.main(*of_short_texts(tmp_path, "demo.yaml"), *TRAINED, f"output={output}")
    printed = capsys.readouterr().out
    assert "perplexity" in printed
    assert "compressed:" in printed

    report = json.loads((output / "report.json").read_text())
    assert report["prune_ratio"]["reached"] == pytest.approx(0.2, abs=3e-4)
    assert report["parameters"]["before"] == TARGETS
    assert len(report["ranks"]) == 21
    dense, compressed = report["perplexity"]["dense"], report["perplexity"]["compressed"]
    assert 10 < dense < 60
    assert 0.9 * dense < compressed < 4 * dense  # it was trained, too
    assert report["losses"][-1] < 8
    assert report["held_out"]["recovered"] <= report["held_out"]["truncated"]
    assert (output / "report.png").stat().st_size > 10_000
    saved = 4 * (report["parameters"]["before"] - report["parameters"]["after"])
    orders = 3e-3  # of the rows of pivoted layers, which are stored beside
    assert report["file_bytes"]["compressed"] == pytest.approx(report["file_bytes"]["dense"] - saved, rel=orders)

    monkeypatch.setattr(sys, "argv", ["zssvd", "evaluate", str(output)])
    with pytest.raises(SystemExit, match="0"):
        main()
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["perplexity"] == pytest.approx(compressed, rel=1e-5)
    assert again["tokens"] == 255

    model, tokenizer = load_model(str(output))
    assert ranks_of(model) == {n: r["rank"] for n, r in report["ranks"].items() if r["rank"] is not None}
    ids = tokenizer("The state of the union is", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()


FEWER = ["calibration.samples=4"]


def zssvd(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["zssvd", *map(str, arguments)])
    with pytest.raises(SystemExit, match="0"):
        main()


def test_a_real_model_in_8_bits_takes_what_its_ratio_says_and_is_exported(tmp_path, monkeypatch):
    """Kept in 0.6 of its targets' bytes; merged, it is a plain model of the same function."""
    output = tmp_path / "out"
    zssvd(monkeypatch, "compress", *of_short_texts(tmp_path, "remap-40.yaml"), *FEWER, f"output={output}")
    report = json.loads((output / "report.json").read_text())
    assert report["prune_ratio"]["reached"] == pytest.approx(0.4, abs=3e-4)
    size = report["file_bytes"]
    assert size["compressed"] == pytest.approx(size["expected"], rel=0.02)
    assert size["expected"] == pytest.approx(2 * (134_515_008 - 0.4 * TARGETS), rel=1e-4)
    perplexity = report["perplexity"]
    assert abs(math.log(perplexity["reloaded"] / perplexity["compressed"])) < 0.02

    zssvd(monkeypatch, "export", output, tmp_path / "dense", "dtype=float32")
    model, tokenizer = load_model(str(output))
    merged, _ = load_model(str(tmp_path / "dense"))
    ids = tokenizer("The state of the union is", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, atol=1e-3, rtol=1e-3)
    assert sum(p.numel() for p in merged.parameters()) == 134_515_008
