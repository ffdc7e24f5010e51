"""The scripts in `benchmarks/` that measure speed run, at tiny sizes. Nothing is timed."""

import json
import sys
import time

import pytest
import torch

from benchmarks import gpu, speed
from zssvd_lightning.app.bench.counts import weight_bytes
from zssvd_lightning.app.bench.forms import layers_at
from zssvd_lightning.config.presets import PRESETS
from zssvd_lightning.layers.registry import KINDS


def test_every_form_with_a_rank_is_made_at_the_highest_one_that_fits():
    made = dict(layers_at(24, 16, 0.6, torch.float32, "cpu"))
    assert {each.kind for name, each in made.items() if name != "dense"} == set(KINDS) - {"int8", "narrow", "removed"}
    room = 0.6 * 24 * 16 * 4
    for name, layer in made.items():
        assert layer(torch.randn(3, 16)).shape == (3, 24)
        if name != "dense":
            higher = type(layer).like(
                layer, **{k: v for k, v in layer.spec.items() if k != "kind"} | {"rank": layer.rank + 1}
            )
            assert weight_bytes(layer) <= room
            assert weight_bytes(higher) > room or layer.rank == 15
    assert list(dict(layers_at(24, 16, 0.01, torch.float32, "cpu"))) == ["dense"]


def test_the_speed_of_layers(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(speed, "SHAPES", {"smollm2": {"q_proj": (24, 16)}})
    monkeypatch.setattr(speed, "TOKENS", {"decode": 1, "prefill": 4})
    monkeypatch.setattr(speed, "MEMORY", 3000)
    speed.main(["--rounds", "2", "--shapes", "smollm2", "--json", str(tmp_path / "s.json")])
    found = json.loads((tmp_path / "s.json").read_text())
    forms = set(dict(layers_at(24, 16, 0.6, torch.float32, "cpu")))
    assert {(row["kept"], row["phase"], row["form"]) for row in found["rows"]} == {
        (kept, phase, form) for kept in speed.KEPT for phase in speed.TOKENS for form in forms
    }
    for row in found["rows"]:
        assert len(row["seconds"]) == 2
        assert row["copies"] == (2 if row["phase"] == "decode" else 1)
        limit = row["bytes_over_dense" if row["phase"] == "decode" else "flops_over_dense"]
        assert row["time_over_limit"] == pytest.approx(row["time_over_dense"]["median"] / limit)
        assert row["met"] == (row["time_over_limit"] <= row["target"] == 1.2)
        if row["form"] == "low_rank":
            assert row["bytes_over_dense"] == row["flops_over_dense"] == row["rank"] * 40 / (24 * 16)
    assert found["targets"] == speed.TARGETS
    assert "target 1.20" in capsys.readouterr().out


def test_everything_for_a_card_runs_on_the_cpu(capsys, tmp_path):
    gpu.main(["--cpu-smoke", "--out", str(tmp_path / "gpu.json")])
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert parts.keys() == gpu.PARTS.keys()
    assert len(capsys.readouterr().out.splitlines()) == sum(map(len, parts.values()))
    assert {row["form"] for row in parts["layers"]} == set(dict(layers_at(24, 16, 0.6, torch.float32, "cpu")))
    assert [row["preset"] for row in parts["presets"]] == list(PRESETS)
    for row in parts["presets"]:
        assert row["layers"] == 7
        assert row["layers_of_other_rank"] == row["largest_difference_of_logits"] == 0
    for name in ("best-2", "zs-svd-2", "best-4", "zs-svd-4"):
        (row,) = parts[name]
        assert name == f"{row['preset']}-{row['blocks']}"
        assert {"calibrate", "spectrum", "select", "truncate", "factorize"} <= row["seconds_by_stage"].keys()
        assert row["weight_bytes"]["after"] < row["weight_bytes"]["before"]


def test_a_part_that_takes_too_long_or_fails_keeps_what_it_has_found():
    def code(text):
        return [sys.executable, "-c", text]

    start = time.monotonic()
    slow = list(gpu.in_time(code("print('{\"a\": 1}', flush=True); import time; time.sleep(300)"), 5))
    assert slow == [{"a": 1}, {"error": "took longer than its limit of 5 seconds"}]
    assert time.monotonic() - start < 200
    failed = list(gpu.in_time(code("print('told'); print('{\"a\": 2}'); raise SystemExit(3)"), 60))
    assert failed == [{"a": 2}, {"error": "exit code 3; the reason is on stderr"}]
    assert list(gpu.in_time(code("print('{}')"), 60)) == [{}]
    assert sum(limit for _, limit in gpu.PARTS.values()) < 8 * 60


def test_without_a_card_the_command_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--cpu-smoke"):
        gpu.main([])
