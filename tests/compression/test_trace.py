"""What a report holds of spectra, sensitivities, the selection and the states, against direct computation."""

import json
import random

import pytest
import torch
from support.models import tiny_llama, token_batches

from zssvd_lightning import compress
from zssvd_lightning.compression.report import Report, read_report, write_report
from zssvd_lightning.decomposition.trace import FEWEST, POINTS, TOTAL, Trace, histogram, positions
from zssvd_lightning.selection.components import Components, Selection
from zssvd_lightning.selection.walk import LIMIT, Walk


@pytest.mark.parametrize("count", [0, 1, 2 * LIMIT, 2 * LIMIT + 1, 1000, 5003])
def test_a_walk_holds_the_extremes_of_the_running_sum(count):
    deltas = [random.Random(count).gauss(0, 1) for _ in range(count)]
    walk, sums, total = Walk(), [], 0.0
    for delta in deltas:
        walk.add(delta)
        total += delta
        sums.append(total)
    told = walk.to_dict()
    assert told["removals"] == count
    assert told["total"] == total
    assert told["length"] == pytest.approx(sum(map(abs, deltas)))
    assert len(told["lowest"]) == len(told["highest"]) <= 2 * LIMIT
    parts = [sums[start : start + told["stride"]] for start in range(0, count, told["stride"])]
    assert told["lowest"] == pytest.approx([min(part) for part in parts], rel=1e-4)
    assert told["highest"] == pytest.approx([max(part) for part in parts], rel=1e-4)


def test_a_histogram_counts_every_component_once():
    generator = torch.Generator().manual_seed(0)
    deltas = {
        name: torch.randn(50, generator=generator) * 10.0 ** torch.randint(-9, 2, (50,), generator=generator)
        for name in "abc"
    }
    deltas["a"][:3] = 0.0
    kept = {"a": torch.arange(10), "b": None, "c": torch.tensor([0, 7, 49])}
    components = {name: Components(delta.abs(), delta) for name, delta in deltas.items()}
    found = histogram(components, Selection(kept, dict.fromkeys("abc", 0.0)))
    low, high = torch.tensor(found["edges"][:-1]), torch.tensor(found["edges"][1:])
    assert (low < high).all()
    of_kept = torch.cat([deltas["a"][:10], deltas["b"], deltas["c"][kept["c"]]])
    assert found["kept"] == [
        int(((of_kept > left * (1 + 1e-3 * (left < 0))) & (of_kept <= right * (1 + 1e-3 * (right > 0)))).sum())
        for left, right in zip(low, high, strict=True)
    ]
    assert sum(found["kept"]) == 63
    assert sum(found["dropped"]) == 87
    nothing = {"a": Components(torch.ones(3), torch.zeros(3))}
    assert histogram(nothing, Selection({"a": None}, {"a": 0.0})) is None


def test_a_record_of_many_large_layers_stays_small():
    components = {f"layer{index}": Components(torch.ones(5000), torch.ones(5000)) for index in range(2000)}
    trace = Trace()
    kept = dict.fromkeys(components)
    trace.truncated(components, Selection(kept, dict.fromkeys(components, 0.0)), kind="truncation", exact=False)
    assert sum(map(len, trace.spectra.values())) <= max(TOTAL, FEWEST * len(components))
    assert positions(7, POINTS) == list(range(1, 8))


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    return compress(tiny_llama(), token_batches(8), prune_ratio=0.4, preset="zs-svd-line-search", progress=False)


def test_states_end_in_the_loss_of_the_report(report):
    first = report.trace["states"][0]
    assert first["kind"] == "truncation"
    assert first["loss"] == report.kept_back["truncated"]
    losses = [state["loss"] for state in report.trace["states"] if not state["taken_back"]]
    assert min(losses) == report.kept_back["final"]


def test_the_walk_of_the_rule_ends_in_its_sums(report):
    """Layers that stay dense are in the walk, and not in the sum of the selection."""
    walk, found = report.trace["walk"], report.trace["sensitivities"]
    assert sum(found["dropped"]) <= walk["removals"]
    assert abs(walk["total"]) <= walk["length"]
    everything = sum(found["kept"]) + sum(found["dropped"])
    assert everything == sum(min(layer.shape) for layer in report.layers.values())


def test_spectra_are_of_all_layers_and_fall(report):
    assert list(report.trace["spectra"]) == list(report.layers)
    for name, sigma in report.trace["spectra"].items():
        assert len(sigma) == len(report.trace["positions"][str(min(report.layers[name].shape))])
        assert sigma == sorted(sigma, reverse=True)


def test_a_plan_or_a_rule_without_order_has_no_walk():
    model = tiny_llama()
    report = compress(model, token_batches(4), prune_ratio=0.3, preset="best", corrections=0, progress=False)
    assert report.trace["walk"] is None
    assert report.trace["states"][0]["second_order"] > 0


def test_the_record_is_written_and_read_with_a_line_for_each_list(report, tmp_path):
    write_report(tmp_path, report)
    text = (tmp_path / "report.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(report.to_dict()))
    assert read_report(tmp_path).to_dict() == report.to_dict()
    assert len(text.splitlines()) < 500
    strange = Report(**{**vars(report), "config": {"name": "[\n 1,\n 2 ]", "list": ["a", "b"]}})
    write_report(tmp_path, strange)
    assert json.loads((tmp_path / "report.json").read_text())["config"] == strange.config


def test_layers_within_a_submodule_keep_their_spectra(report):
    inner = report.within("model")
    assert list(inner.trace["spectra"]) == list(inner.layers)
    assert report.trace["spectra"].keys() == report.layers.keys()
