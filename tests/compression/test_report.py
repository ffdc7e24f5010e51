import json
import math

import pytest
from rich.console import Console

from zssvd_lightning._resources import Stopwatch, peak_rss_bytes
from zssvd_lightning.app.pictures import draw
from zssvd_lightning.compression.report import LayerReport, Report, read_report, write_report
from zssvd_lightning.model.coverage import Coverage, LeftAlone

LAYERS = {
    "net.layers.0.q": LayerReport(10, (64, 64), 1280),
    "net.layers.0.up": LayerReport(None, (64, 32), 2048),
    "net.layers.1.q": LayerReport(20, (64, 64), 2560),
    "head": LayerReport(3, (9, 64), 219),
}


JUDGED = {
    "perplexity_third": {"dense": 6.0, "truncated": 9.0, "recovered": 8.0, "dense_finetuned": 5.5},
    "word_perplexity": {"c.txt": {"dense": 60.0, "truncated": 90.0, "recovered": 80.0, "dense_finetuned": 55.0}},
    "accuracy": {
        "piqa_val": {
            "rows": 9,
            "acc": {"dense": 0.75, "truncated": 0.5, "recovered": 0.625, "dense_finetuned": 0.875},
            "acc_stderr": {"dense": 0.11, "truncated": 0.12, "recovered": 0.13, "dense_finetuned": 0.14},
        }
    },
}


def report(**changes):
    return Report(
        **(
            {
                "asked": 0.4,
                "parameters_before": 10_000,
                "parameters_after": 6_000,
                "model_parameters_before": 15_000,
                "layers": LAYERS,
                "first_order_sum": -0.25,
                "losses": [3.0],
                "correction_fractions": [],
                "seconds": {"calibrate": 1.5},
            }
            | changes
        )
    )


def test_json_has_the_names_scripts_rely_on():
    plain = json.loads(json.dumps(report(perplexity={"dense": 5.0, "compressed": 7.0}).to_dict()))
    ratio = {"asked": 0.4, "reached": pytest.approx(0.4), "of": "parameters"}
    assert plain["prune_ratio"] == ratio | {"counted_over": "targets", "ratio_of": "dense"}
    counts = {"dense": 10_000, "before": 10_000, "after": 6_000, "model": {"before": 15_000, "after": 11_000}}
    assert plain["parameters"] == counts
    assert plain["ranks"]["net.layers.0.up"] == {"rank": None, "shape": [64, 32], "kept": 2048, "in_8_bits": False}
    assert plain["first_order_sum"] == -0.25
    assert plain["perplexity"] == {"dense": 5.0, "compressed": 7.0}
    assert "perplexity_second" not in plain


def test_a_report_comes_back_from_its_json():
    for one in (
        report(),
        report(perplexity={"dense": 5.0, "compressed": 7.0}, seed=3, config={"a": {"b": 1}}),
        report(**JUDGED),
        report(coverage=Coverage(4, 10_000, 15_000, (LeftAlone("convolutions", 2, 5_000),)), budget_of="model"),
    ):
        assert Report.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_numbers_that_are_not_finite_are_null_on_disk(tmp_path, caplog):
    lost = {
        "first_order_sum": math.nan,
        "losses": [3.0, math.inf],
        "perplexity": {"dense": 5.0, "compressed": math.nan},
    }
    write_report(tmp_path, report(**lost))
    assert "null in the JSON: first_order_sum (nan), losses[1] (inf), perplexity.compressed (nan)" in caplog.text
    strict = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert strict["losses"] == [3.0, None]
    found = read_report(tmp_path)
    assert math.isnan(found.first_order_sum)
    assert found.losses[0] == 3.0
    assert math.isnan(found.losses[1])
    assert math.isnan(found.perplexity["compressed"])
    assert found.kept_back is None
    (tmp_path / "report.json").write_text(json.dumps(report(**lost).to_dict()))  # as earlier releases did
    assert read_report(tmp_path).losses == [3.0, math.inf]


def test_reports_of_earlier_releases_are_read():
    saved = report().to_dict()
    saved["predicted_drift"] = saved.pop("first_order_sum")
    del saved["prune_ratio"]["counted_over"], saved["rank_multiple"]
    assert Report.from_dict(saved) == report()


def test_the_table_counts_ranks_that_are_multiples():
    layers = {str(rank): LayerReport(rank, (200, 200), 1000) for rank in (8, 24, 12, None)}
    told = report(layers=layers, rank_multiple=8)
    assert Report.from_dict(told.to_dict()) == told
    (line,) = [line for line in str(told).splitlines() if "multiple of 8" in line]
    assert "2 of 3" in line
    assert "multiple" not in str(report(layers=layers))


def test_text_is_the_table_without_details():
    losses = {"batches": 2, "dense": 1.0, "truncated": 3.0, "final": 2.0, "taken_back": 0}
    coverage = Coverage(4, 10_000, 15_000, (LeftAlone("convolutions", 2, 5_000),))
    text = str(report(kept_back=losses, coverage=coverage))
    assert "loss on batches kept back" in text.splitlines()[5]
    assert "7.39" in text  # e^2
    assert "left alone: convolutions" in text
    assert "first-order" not in text
    assert "calibrate" not in text


def test_names_within_a_submodule():
    inner = {name: layer for name, layer in LAYERS.items() if name != "head"}
    assert list(report(layers=inner).within("net").layers) == ["layers.0.q", "layers.0.up", "layers.1.q"]
    with pytest.raises(KeyError, match="head is not within net"):
        report().within("net")


def test_table_shows_what_there_is():
    console = Console(record=True, width=120)
    both = {"dense": 5.0, "compressed": 7.0}
    console.print(
        report(perplexity=both, perplexity_second=both, file_bytes={"dense": 10**8, "compressed": 10**7}).table()
    )
    text = console.export_text()
    for piece in (
        "0.4000 of the parameters of the target layers (0.4 asked)",
        "10,000",
        "6,000",
        "15,000",
        "11,000",
        "100.0 MB",
        "5.00",
        "7.00",
        "3 of 4",
        "calibrate",
        "1.5",
    ):
        assert piece in text


def test_the_text_of_a_report_cuts_no_entry():
    name = "texts/" + "a-long-name/" * 9 + "c.txt"
    text = str(report(word_perplexity={name: {"dense": 60.0, "compressed": 90.0}}))
    (line,) = (line for line in text.splitlines() if name in line)
    assert "60.00" in line
    assert "…" not in text


def test_table_shows_tasks_and_every_text():
    console = Console(record=True, width=120)
    console.print(report(**JUDGED).table())
    lines = [" ".join(line.replace("│", " ").split()) for line in console.export_text().splitlines()]
    for line in (
        "perplexity, third text 6.00 9.00",
        "perplexity, third text, trained 5.50 8.00",
        "word perplexity of c.txt 60.00 90.00",
        "word perplexity of c.txt, trained 55.00 80.00",
        "piqa_val, acc, 9 rows 0.7500 ± 0.1100 0.5000 ± 0.1200",
        "piqa_val, acc, 9 rows, trained 0.8750 ± 0.1400 0.6250 ± 0.1300",
    ):
        assert line in lines


def test_picture_is_a_png_of_any_layer_names(tmp_path):
    draw(report(perplexity={"dense": 5.0, "compressed": 7.0}), tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_stopwatch_adds_up():
    watch = Stopwatch()
    watch.add("a", 1.0)
    with watch("a"):
        pass
    with pytest.raises(ZeroDivisionError), watch("b"):
        raise ZeroDivisionError
    assert watch.seconds["a"] > 1.0
    assert "b" in watch.seconds


def test_peak_memory_is_that_of_a_process_with_torch():
    assert 10**8 < peak_rss_bytes() < 10**11
