from dataclasses import replace

import pytest
import torch
import yaml
from support.models import tiny_llama, token_batches

from zssvd_lightning import CompressionConfig, compress
from zssvd_lightning.errors import OutputError, PlanError
from zssvd_lightning.selection.budget import Budget
from zssvd_lightning.selection.components import Components
from zssvd_lightning.selection.plan import Plan
from zssvd_lightning.selection.rules import curvature, uniform
from zssvd_lightning.serialization.specs import ranks_of

SHAPES = {"a": (8, 8), "b": (6, 10)}
BUDGET = Budget(SHAPES, 0.3)
MATRICES = {
    name: Components(torch.arange(min(shape), 0, -1.0), torch.linspace(-1, 2, min(shape)))
    for name, shape in SHAPES.items()
}


@pytest.fixture
def written(tmp_path):
    plan = Plan.of(uniform(MATRICES, BUDGET), BUDGET)
    plan.write(tmp_path / "deep" / "plan.yaml")
    return tmp_path / "deep" / "plan.yaml"


def test_a_plan_says_what_a_reviewer_wants_to_know(written):
    content = yaml.safe_load(written.read_text())
    assert content["layers"]["a"]["rank"] == 2
    assert content["layers"]["a"]["break_even"] == 3
    assert content["layers"]["a"]["shape"] == [8, 8]
    selection = uniform(MATRICES, BUDGET)
    assert content["layers"]["b"]["first_order_sum"] == pytest.approx(selection.drifts["b"], rel=1e-2)
    assert content["first_order_sum"] == pytest.approx(selection.first_order_sum, rel=1e-5)
    assert content["reached"] == pytest.approx(1 - (2 * 16 + 2 * 16) / 124, abs=1e-6)
    assert written.read_text().startswith("# The rank of every layer.")


def test_a_plan_that_is_read_gives_the_selection_it_was_written_from(written):
    selection, again = uniform(MATRICES, BUDGET), Plan.read(written, BUDGET).rule(MATRICES, BUDGET)
    assert {n: k.tolist() for n, k in again.kept.items()} == {n: k.tolist() for n, k in selection.kept.items()}
    assert again.first_order_sum == selection.first_order_sum


def test_dense_layers_stay_dense(written):
    content = yaml.safe_load(written.read_text())
    content["layers"]["a"]["rank"] = "dense"
    written.write_text(yaml.safe_dump(content))
    plan = Plan.read(written, BUDGET)
    assert plan.ranks == {"a": None, "b": 2}
    assert plan.rule(MATRICES, replace(BUDGET, planned=True)).kept["a"] is None
    assert plan.reached == pytest.approx(1 - (64 + 32) / 124)


def test_a_reviewed_plan_is_not_overwritten(written):
    before = written.read_text()
    with pytest.raises(OutputError, match="exists"):
        Plan.of(uniform(MATRICES, BUDGET), BUDGET).write(written)
    assert written.read_text() == before


def test_a_plan_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"leads through .*file, which is a file"):
        Plan.of(uniform(MATRICES, BUDGET), BUDGET).write(tmp_path / "file" / "plan.yaml")


def changed(layers):
    return yaml.safe_dump({"version": 1, "layers": layers})


GOOD = {"a": {"rank": 2}, "b": {"rank": 2}}
BAD = {
    "no file": (None, "cannot be read"),
    "no yaml": ("a: [", "cannot be read"),
    "no layers": ("ranks: 3", "no mapping 'layers'"),
    "later version": ("version: 2\nlayers: {}", "version 2, this release reads 1"),
    "layer missing": (changed({"a": {"rank": 2}}), r"1 are in one of plan and model only \(b\)"),
    "layer too many": (changed(GOOD | {"c": {"rank": 1}}), r"other layers: 1 .*\(c\)"),
    "too high": (changed(GOOD | {"a": {"rank": 4}}), r"a \(8, 8\) rank 4; it must be 1 to 3"),
    "zero": (changed(GOOD | {"b": {"rank": 0}}), "rank 0; it must be 1 to 3"),
    "word": (changed(GOOD | {"b": {"rank": "full"}}), "rank 'full'"),
    "no rank": (changed(GOOD | {"b": 2}), "rank None"),
    "truth": (changed(GOOD | {"b": {"rank": True}}), "rank True"),
    "bits": (changed(GOOD | {"a": {"rank": 2, "bits": 8}}), "gives a bits 8; storage 'factors' leaves no choice"),
    "unit": ("version: 1\nunit: flops\nlayers: {}", "for unit 'flops', and it is to be 'parameters'"),
    "other shape": (changed(GOOD | {"b": {"rank": 2, "shape": [6, 9]}}), r"has b as \[6, 9\], but it is \[6, 10\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_plan_is_refused_by_layer(tmp_path, case):
    text, message = BAD[case]
    if text is not None:
        (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(PlanError, match=message):
        Plan.read(tmp_path / "plan.yaml", BUDGET)


MIXED = Budget({"a": (20, 20), "b": (30, 16), "c": (12, 12)}, 0.6, storage="mixed", unit="bytes")
ROUNDED = {
    name: Components(
        torch.linspace(2, 1, min(shape)), torch.zeros(min(shape)), torch.full((min(shape),), cost), 2.0 * cost
    )
    for (name, shape), cost in zip(MIXED.shapes.items(), (1e-3, 2.0, 9.0), strict=True)
}


def test_bits_are_written_and_read_back(tmp_path):
    selection = curvature(ROUNDED, MIXED)
    assert 0 < len(selection.eight_bit) < 3
    Plan.of(selection, MIXED).write(tmp_path / "plan.yaml")
    content = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    assert {n for n, entry in content["layers"].items() if entry.get("bits") == 8} == selection.eight_bit
    assert {"bits" in entry for entry in content["layers"].values()} == {True, False}
    assert content["unit"] == "bytes"
    assert "# A layer with bits: 8" in (tmp_path / "plan.yaml").read_text()
    plan = Plan.read(tmp_path / "plan.yaml", MIXED)
    again = plan.rule(ROUNDED, MIXED)
    assert again.eight_bit == plan.eight_bit == selection.eight_bit
    assert {n: again.rank(n) for n in MIXED.shapes} == {n: selection.rank(n) for n in MIXED.shapes}
    assert plan.reached >= 0.6
    assert plan.reached == pytest.approx(content["reached"], abs=1e-6)


def test_layers_in_8_bits_may_be_dense_and_have_a_limit_of_their_own(tmp_path):
    layers = {"a": {"rank": "dense", "bits": 8}, "b": {"rank": 11, "bits": 8}, "c": {"rank": 2, "bits": 16}}
    header = {"version": 1, "storage": "mixed", "unit": "bytes"}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(header | {"layers": layers}))
    plan = Plan.read(tmp_path / "plan.yaml", MIXED)
    assert plan.eight_bit == {"a", "b"}
    assert plan.ranks == {"a": None, "b": 11, "c": 2}
    kept = 20 * 20 + 2 * 20 + 11 * 46 + 2 * 11 + 2 * 2 * 24
    assert plan.reached == pytest.approx(1 - kept / (2 * (400 + 480 + 144)))
    layers["b"]["bits"] = 16
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(header | {"layers": layers}))
    with pytest.raises(PlanError, match=r"b \(30, 16\) rank 11; it must be 1 to 10"):
        Plan.read(tmp_path / "plan.yaml", MIXED)
    layers["b"]["bits"] = 4
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(header | {"layers": layers}))
    with pytest.raises(PlanError, match="gives b bits 4; they must be 8 or 16"):
        Plan.read(tmp_path / "plan.yaml", MIXED)


def test_compress_follows_a_plan(tmp_path):
    model = tiny_llama()
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    ranks = {name: "dense" if "o_proj" in name else 3 for name in names}
    (tmp_path / "plan.yaml").write_text(changed({name: {"rank": rank} for name, rank in ranks.items()}))
    report = compress(
        model, token_batches(), CompressionConfig(plan=str(tmp_path / "plan.yaml"), corrections=0), progress=False
    )
    assert ranks_of(model) == {name: rank for name, rank in ranks.items() if rank != "dense"}
    assert report.asked == report.reached
