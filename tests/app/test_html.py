"""The page that `zssvd report` writes, of a compression of a tiny model."""

import json
import math
import re
import sys
from html.parser import HTMLParser

import pytest
import torch
from support.models import tiny_llama, token_batches

from zssvd_lightning import compress
from zssvd_lightning._files import MANIFEST, check_output, replacing_folder
from zssvd_lightning.app.cli import main
from zssvd_lightning.app.html.charts import Axis, Chart
from zssvd_lightning.app.html.layers import by_kind
from zssvd_lightning.app.html.markup import number
from zssvd_lightning.app.html.page import PAGE, write_page
from zssvd_lightning.compression.report import LayerReport, write_report
from zssvd_lightning.errors import OutputError, SavedModelError
from zssvd_lightning.model.targets import Place

VOID = {"meta"}
EVIL = "<script>alert('model')</script>"


class Read(HTMLParser):
    """The elements of a page, its visible text, and whether all elements are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words, self.scripts = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.words.append(data)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The plain report of a run."""
    torch.manual_seed(0)
    settings = {"preset": "zs-svd-line-search", "prune_ratio": 0.4, "progress": False}
    report = compress(tiny_llama(), token_batches(8), **settings)
    report.perplexity = {"dense": 12.25, "compressed": 34.5}
    report.file_bytes = {"dense": 4 * report.model_parameters_before, "expected": 0, "compressed": 54321}
    others = report.model_parameters_before - report.parameters_before
    report.file_bytes["expected"] = 4 * (others + report.parameters_after)
    report.peak_rss_bytes = 2_500_000_000
    report.seed = 0
    report.config = {
        "preset": "zs-svd-line-search",
        "model": {"source": "org/model"},
        "calibration": {"text": "speeches"},
        "evaluation": {"text": "articles", "windows": 3, "length": 32},
    }
    report.continuations = {"prompt": "The state", "dense": "of <the> union", "compressed": "of of of"}
    folder = tmp_path_factory.mktemp("run")
    write_report(folder, report)
    return json.loads((folder / "report.json").read_text())


@pytest.fixture
def page(saved, tmp_path):
    """Writes the page of the report with changes, and reads it."""

    def read(change=None, folder="run"):
        changed = json.loads(json.dumps(saved))
        if change is not None:
            change(changed)
        path = tmp_path / folder
        path.mkdir(exist_ok=True)
        (path / "report.json").write_text(json.dumps(changed))
        assert write_page([path]) == path / PAGE
        return Read((path / PAGE).read_text(encoding="utf-8"))

    return read


def test_the_page_says_what_the_report_says(page, saved):
    read = page()
    for words in (
        "org/model by zs-svd-line-search",
        "perplexity on articles, 3 windows of 32 tokens 12.25 not measured 34.50",
        "peak memory 2.5 GB",
        "embedding tables",
        "self_attn.q_proj 2",
        f"{saved['parameters']['before']:,}",
        "of <the> union",
        "zssvd-lightning",
    ):
        assert words in read.text
    cells = [value for tag, key, value in read.attributes if tag == "td" and key == "title"]
    assert len(cells) == len(saved["ranks"])
    for name, layer in saved["ranks"].items():
        (cell,) = [cell for cell in cells if cell.startswith(f"{name}: ")]
        assert ("dense" if layer["rank"] is None else f"rank {layer['rank']},") in cell


def test_the_page_needs_nothing_from_outside(page):
    read = page()
    assert not {"link", "img", "iframe", "object", "embed"} & set(read.tags)
    assert not [value for _, key, value in read.attributes if key == "src" or (key == "href" and value[0] != "#")]
    text = "".join(read.scripts)
    assert set(re.findall(r"\w+://[^\s\"']*", text + read.text)) == {"http://www.w3.org/2000/svg"}  # a name, no address
    assert "fetch(" not in text
    assert "url(" not in read.text


def test_the_panel_has_spectrum_and_cut_of_every_layer(page, saved):
    data = json.loads(page().scripts[0])
    assert [layer["name"] for layer in data["layers"]] == list(saved["ranks"])
    for layer in data["layers"]:
        assert layer["rank"] == saved["ranks"][layer["name"]]["rank"]
        assert len(layer["spectrum"]) == len(data["positions"][str(min(layer["shape"]))])


def test_names_cannot_break_the_page(page):
    plain = page()

    def change(report):
        report["config"] |= {"model": {"source": EVIL}, "preset": '"><b onclick=x', "evaluation": {"text": "a & b"}}
        report["ranks"] = {f"{name}.</script>{EVIL}": layer for name, layer in report["ranks"].items()}
        report["coverage"]["left_alone"][0]["what"] = "</table><img src=x>"
        report["left_dense"] = {EVIL: "<i>never</i>"}
        report["seconds"] = {"<svg onload=x>": 1.0}

    read = page(change, "<i>folder")
    assert read.tags.count("script") == plain.tags.count("script")
    assert not {"img", "b onclick"} & set(read.tags)
    assert EVIL in read.text
    assert not [key for _, key, _ in read.attributes if key.startswith("on")]
    assert json.loads(read.scripts[0])["layers"][0]["name"].endswith(f"</script>{EVIL}")


def test_pages_of_earlier_releases_say_what_is_missing(page):
    def change(report):
        for key in ("trace", "coverage", "kept_back", "perplexity", "file_bytes", "continuations"):
            del report[key]
        report["predicted_drift"] = report.pop("first_order_sum")
        report["ranks"] = {
            name: {k: layer[k] for k in ("rank", "shape", "kept")} for name, layer in report["ranks"].items()
        }
        report |= {"seconds": {}, "config": {}, "peak_rss_bytes": 0}

    read = page(change, "old-run")
    assert read.text.count("Not in this report") == 8
    for words in ("old-run, ", "running sum", "operations of each layer", "left alone and why"):
        assert words in read.text
    assert "What both models write" not in read.text


def test_values_that_are_no_numbers_are_said_in_words(page):
    def change(report):
        report["perplexity"] = {"dense": math.nan, "compressed": math.inf}
        report["kept_back"] |= {"final": math.inf, "truncated": math.nan}
        report["trace"]["states"][0] |= {"loss": math.nan, "taken_back": True}
        report["trace"]["states"].append({**report["trace"]["states"][0], "loss": math.inf})
        report["trace"]["spectra"] = {name: [math.nan] for name in report["trace"]["spectra"]}

    read = page(change)
    assert "32 tokens not measured not measured infinite" in read.text
    assert "taken back" in read.text
    assert not re.search(r"\b(nan|NaN|inf|Infinity)\b", read.text)
    assert not re.search(r"\bnan\b|NaN|Infinity", read.scripts[0])
    assert not [value for _, key, value in read.attributes if key in {"d", "x", "y"} and "nan" in value]


def test_steps_taken_back_and_predictions_are_marked(page):
    def change(report):
        state = report["trace"]["states"][0]
        report["kept_back"] |= {"dense": 2.0, "final": 2.25}
        report["trace"]["states"] = [
            state | {"loss": 3.0, "first_order": 0.25, "second_order": 0.5},
            state | {"kind": "step", "loss": 9.0, "taken_back": True, "first_order": None},
            state | {"kind": "step", "loss": 2.25, "first_order": None},
        ]

    read = page(change)
    marks = [value for tag, key, value in read.attributes if key == "class" and value.startswith("mark ")]
    assert marks.count("mark cross back") == 1
    assert marks.count("mark ring final") == 1
    assert "1: truncation 3.000 2.250 2.750 2: step 9.000 taken back 3: step 2.250" in read.text


def judge(report):
    """Add a third text and a task."""
    models = ("dense", "truncated", "recovered", "dense_finetuned")
    report["perplexity_third"] = dict(zip(models, (20.5, 60.5, 44.5, 19.5), strict=True))
    scores = {"rows": 64, "acc": (0.75, 0.25, 0.5, 0.875), "acc_stderr": (0.05, 0.06, 0.0625, 0.04)}
    report["accuracy"] = {
        "piqa": {k: dict(zip(models, v, strict=True)) if isinstance(v, tuple) else v for k, v in scores.items()}
    }


def test_tasks_and_a_third_text_are_shown_of_every_model(page):
    text = page(judge).text
    for words in (
        "20.50 60.50 44.50 dense model, fine-tuned as long 19.50",
        "piqa, acc, 64 rows 0.7500 ± 0.0500 0.2500 ± 0.0600 0.5000 ± 0.0625 dense model, fine-tuned as long 0.8750",
        "Accuracies stand beside their standard errors",
    ):
        assert words in text


def test_several_runs_are_compared(page, tmp_path):
    def other(report):
        report["config"]["evaluation"] |= {"text": "novels", "third": "poems"}
        report["perplexity"]["compressed"] = 21.0
        judge(report)

    page(folder="one")
    page(other, "two")
    page(lambda report: report.pop("file_bytes"), "three")
    out = write_page([tmp_path / "one", tmp_path / "two", tmp_path / "three"], tmp_path / "all.html")
    read = Read(out.read_text(encoding="utf-8"))
    assert "3 compressed models" in read.text
    assert "third text piqa, acc loss (nats)" in read.text
    for words in ("44.50 0.5000 ± 0.0625", "not measured not measured", "different third texts: none, poems"):
        assert words in read.text
    for words in ("A one", "B two", "C three", "different evaluation texts: articles, novels", "not measured: C"):
        assert words in read.text
    links = {value for tag, key, value in read.attributes if tag == "a"}
    ids = [value for _, key, value in read.attributes if key == "id"]
    assert {link.removeprefix("#") for link in links} <= set(ids)
    assert len(ids) == len(set(ids))


def test_runs_with_speeds_are_drawn_against_them(page, tmp_path):
    def fast(context):
        speeds = {"batch": 1, "context": context, "dense_decode": 250.0, "decode": 375.5, "prefill": 9000.0}
        return lambda report: report.update(tokens_per_second=speeds)

    assert "decode, tokens per second 250.0 375.5" in page(fast(128), "one").text
    page(fast(256), "two")
    page(folder="three")
    out = write_page([tmp_path / name for name in ("one", "two", "three")], tmp_path / "all.html")
    text = Read(out.read_text(encoding="utf-8")).text
    assert "Perplexity on articles against speed" in text
    assert "Speeds were measured at different batches or contexts" in text
    out = write_page([tmp_path / "three", tmp_path / "three"], tmp_path / "all.html")
    assert "perplexity against speed, because no run has measured both; zssvd bench" in out.read_text(encoding="utf-8")


def test_models_with_several_stacks_have_a_map_of_each():
    names = ["encoder.block.0.layer.0.q", "decoder.block.0.layer.0.q", "decoder.block.0.layer.1.q", "head", "net.2"]
    places = [Place.of(name) for name in names]
    assert places[0] == ("encoder.block", 0, "layer.*.q")
    assert places[1] == places[2] == ("decoder.block", 0, "layer.*.q")
    assert places[3:] == [("", None, "head"), ("net", 2, "matrix")]
    sums = by_kind({name: LayerReport(1, (4, 4), 8, flops=16) for name in names})
    assert sums["decoder.block: layer.*.q"].layers == 2
    assert sums["decoder.block: layer.*.q"].dense_flops == 64
    assert sum(found.dense for found in sums.values()) == 5 * 16


def test_many_kinds_are_summed_up():
    layers = {f"part{index}": LayerReport(1, (4 + index, 4), 8) for index in range(40)}
    sums = by_kind(layers)
    assert len(sums) == 24
    assert sums["17 smaller kinds"].layers == 17
    assert sum(found.dense for found in sums.values()) == sum(4 * (4 + index) for index in range(40))


def test_a_page_replaces_only_a_page(page, tmp_path):
    page()
    assert write_page([tmp_path / "run"]) == tmp_path / "run" / PAGE
    (tmp_path / "mine.html").write_text("<html>mine")
    with pytest.raises(OutputError, match=r"mine\.html exists"):
        write_page([tmp_path / "run"], tmp_path / "mine.html")
    assert (tmp_path / "mine.html").read_text() == "<html>mine"
    with pytest.raises(OutputError, match="exists"):
        write_page([tmp_path / "run"], tmp_path)
    with pytest.raises(SavedModelError, match=r"no report\.json"):
        write_page([tmp_path])


def test_the_folder_may_still_be_replaced(page, saved, tmp_path):
    with replacing_folder(tmp_path / "out") as folder:
        (folder / "report.json").write_text(json.dumps(saved))
    write_page([tmp_path / "out"])
    assert check_output(tmp_path / "out") == tmp_path / "out"
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["files"] == ["report.html", "report.json", MANIFEST]


def test_on_the_command_line(page, tmp_path, monkeypatch, capsys):
    page()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["zssvd", "report", "run", "run"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert "wrote report.html" in capsys.readouterr().out
    assert (tmp_path / PAGE).exists()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not measured"),
        (math.nan, "not measured"),
        (-math.inf, "minus infinite"),
        (0.0, "0"),
        (0.020344, "0.02034"),
        (3.85441, "3.854"),
        (1234.56, "1,235"),
        (12345678.0, "1.235e+07"),
        (-2.5e-7, "-2.500e-07"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    "values", [[], [1.0], [0.0, 0.0], [3.1, 3.2, 900.0], [1e-9, 2e-9], [-5.0, 5.0], [math.nan, math.inf, 2.0]]
)
@pytest.mark.parametrize("log", [False, True])
def test_axes_hold_all_values_and_have_ticks_in_them(values, log):
    axis = Axis.over("loss", values, log=log)
    inside = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    assert all(0 <= axis.place(value) <= 1 for value in inside)
    assert len(axis.labels()) >= 2
    assert all(-1e-6 <= axis.place(value) <= 1 + 1e-6 for value, _ in axis.labels())


def test_labels_of_points_at_one_place_do_not_overlap():
    chart = Chart(Axis("x", 0, 1), Axis("y", 0, 1), "")
    for name in "ABCD":
        chart.mark((0.5, 0.5), "dot", name)
    for name in "ABCD":
        chart.note((0.5, 0.5), name)
    places = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" class="note">', chart.drawn())
    assert len(set(places)) == 4
