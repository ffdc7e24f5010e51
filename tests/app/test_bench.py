"""`zssvd bench`: structure, counts against hand counts, turns and refusals. Nothing is timed."""

import json
import shutil
from typing import Any

import pytest
import torch
from support.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, tiny_vit
from transformers import StaticCache

from zssvd_lightning import CompressionConfig, compress, save_pretrained
from zssvd_lightning.app.bench import models, runner, session
from zssvd_lightning.app.bench.counts import bytes_read, weight_bytes
from zssvd_lightning.app.bench.models import Contender, at_random, from_folders
from zssvd_lightning.app.bench.results import Results
from zssvd_lightning.app.bench.runner import measure
from zssvd_lightning.app.bench.session import DECODE, PREFILL, Session, abilities_of
from zssvd_lightning.app.bench.settings import BenchSettings, Workload, workloads
from zssvd_lightning.app.bench.timing import Quartiles, turns
from zssvd_lightning.app.html.page import PAGE
from zssvd_lightning.compression.report import REPORT, read_report
from zssvd_lightning.errors import BudgetError, ConfigError, ModelSourceError
from zssvd_lightning.layers.registry import KINDS
from zssvd_lightning.layers.storage import STORAGES
from zssvd_lightning.serialization.specs import ranks_of, specs_of

SMALL = ("--batch", "1,2", "--context", "6", "--tokens", "3", "--repeats", "2", "--device", "cpu")

BLOCK = {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32), "gate": (48, 32), "up": (48, 32), "down": (32, 48)}
"""Shapes (m, n) of the layers in a block of `tiny_llama`."""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A dense folder, and one compressed from it, with a report that names it."""
    folder = tmp_path_factory.mktemp("bench")
    torch.manual_seed(0)
    model = tiny_llama()
    model.save_pretrained(folder / "model")
    ids = torch.arange(48).view(2, 24)
    config = CompressionConfig(0.4, selection="uniform", metric="input", storage="factors", corrections=0)
    report = compress(model, [{"input_ids": ids, "labels": ids}], config, progress=False)
    report.config = {"model": {"source": str(folder / "model")}, "evaluation": {}}
    save_pretrained(model, folder / "compressed", report=report)
    return folder


def contenders(*built: Any) -> list[Contender]:
    return [Contender(f"model {n}", "here", model.eval(), dense=n == 0) for n, model in enumerate(built)]


def test_the_command_writes_table_json_markdown_and_picture(workshop, zssvd, tmp_path):
    files = ("--json", tmp_path / "b.json", "--markdown", tmp_path / "b.md", "--picture", tmp_path / "b.png")
    done = zssvd("bench", workshop / "compressed", *SMALL, *files)
    assert done.code == 0
    assert done.out.endswith("".join(f"wrote {file}\n" for file in files[1::2]))
    assert "prefill, 1 x 6" in done.out
    found = json.loads((tmp_path / "b.json").read_text())
    assert [(each["name"], each["dense"]) for each in found["models"]] == [("dense", True), ("compressed", False)]
    assert found["models"][0]["source"] == str(workshop / "model")
    assert [(r["batch"], r["phase"], r["model"]) for r in found["rows"]] == [
        (batch, phase, model) for batch in (1, 2) for phase in (PREFILL, DECODE) for model in ("dense", "compressed")
    ]
    for row in found["rows"]:
        assert row["error"] is None
        assert row["rounds"] == len(row["seconds"]) == 2
        assert row["context"] == 6
        assert row["how"] == "eager"
        tokens = row["batch"] * (3 if row["phase"] == DECODE else 6)
        speeds = [tokens / seconds for seconds in row["seconds"]]
        assert row["tokens_per_second"] == pytest.approx(Quartiles.of(speeds)._asdict())
        over = row["time_over_dense"]
        assert 0 < over["lower"] <= over["median"] <= over["upper"]
        limit = row["flops_over_dense" if row["phase"] == PREFILL else "bytes_over_dense"]
        assert row["time_over_limit"] == pytest.approx(over["median"] / limit)
        assert limit == 1.0 if row["model"] == "dense" else limit < 0.9
    lines = (tmp_path / "b.md").read_text().splitlines()
    assert [line.count("|") for line in lines[:10]] == [11] * 10
    assert not lines[10]
    assert (tmp_path / "b.png").stat().st_size > 1000


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_and_flops_are_those_of_a_hand_count(tied):
    batch, context = 2, 6
    model = tiny_llama(tie_word_embeddings=tied).eval()
    running = Session(model, abilities_of(model), Workload(batch, context, 3))
    running.prepare()
    linear = 2 * sum(m * n for m, n in BLOCK.values())  # multiply-adds of two blocks
    vectors = 2 * 2 * 32 + 32  # norms
    table = 97 * 32
    weights = 4 * (linear + vectors + table * (1 if tied else 2))
    assert weight_bytes(model) == weights
    assert bytes_read(model) == weights - (0 if tied else 4 * table)
    cache = 2 * 2 * batch * 16 * context * 4  # keys and values of two blocks, float32
    assert running.bytes == {PREFILL: bytes_read(model), DECODE: bytes_read(model) + cache}

    def attention(new: int, old: int) -> int:  # 4 heads of 8, two products, two blocks
        return 2 * batch * 4 * new * (new + old) * 8 * 2 * 2

    head = 2 * batch * table  # logits of the last position alone
    assert running.flops == {
        PREFILL: 2 * batch * context * linear + head + attention(context, 0),
        DECODE: 2 * batch * linear + head + attention(1, context),
    }
    results = Results(contenders(model), BenchSettings(), [], [])
    outcome = runner.Outcome("model 0", running.work, flops=running.flops, bytes=running.bytes)
    rows = Results(results.contenders, results.settings, [outcome], []).rows()
    assert [row.flops_per_token for row in rows] == [
        running.flops[PREFILL] / (batch * context),
        running.flops[DECODE] / batch,
    ]


@pytest.mark.parametrize("storage", ["factors", "pivoted", "remap", "hq"])
def test_random_models_have_the_shapes_of_ratio_and_storage(workshop, storage):
    ratio = 0.6
    dense, small = at_random(str(workshop / "model" / "config.json"), [ratio], [storage], "float32", "cpu", layers=1)
    assert len(dense.model.model.layers) == 1
    assert [dense.name, small.name] == ["dense", f"{storage} 0.6"]
    assert len(specs_of(small.model)) == len(BLOCK)
    cost = STORAGES[storage].low_rank_cost
    for name, rank in ranks_of(small.model).items():
        m, n = BLOCK[name.rsplit(".", 1)[1].removesuffix("_proj")]
        assert cost(m, n, rank) <= (1 - ratio) * m * n < cost(m, n, rank + 1)
        assert small.model.get_submodule(name).fault() is None
    ids = torch.arange(6).view(1, -1)
    assert small.model(input_ids=ids).logits.isfinite().all()
    flops = [Session(each.model, abilities_of(each.model), Workload(1, 4, 1)) for each in (dense, small)]
    for each in flops:
        each.prepare()
    products = [
        STORAGES[storage].low_rank(*BLOCK[name.rsplit(".", 1)[1][:-5]], rank).products
        for name, rank in ranks_of(small.model).items()
    ]
    saved = sum(m * n for m, n in BLOCK.values()) - sum(products)
    assert flops[0].flops[DECODE] - flops[1].flops[DECODE] == 2 * saved


def test_every_kind_of_random_layer_can_be_filled():
    dense = torch.nn.Linear(24, 18)
    for form in (form for kind, form in KINDS.items() if kind not in ("removed", "narrow")):
        sizes = {} if form.kind == "int8" else {"rank": 5}
        layer = form.like(dense, **sizes).to_empty(device="cpu")
        models.fill_at_random(layer)
        assert layer.fault() is None
        assert layer(torch.randn(2, 24)).isfinite().all()


def test_models_take_turns_from_the_same_context(monkeypatch):
    calls = []

    def round_(self):
        calls.append(self.model.label)
        return {PREFILL: 2.0, DECODE: 1.0 if self.model.label == 0 else 3.0}

    monkeypatch.setattr(
        Session,
        "prepare",
        lambda self: self.flops.update({PREFILL: 6, DECODE: 3}) or self.bytes.update({PREFILL: 4, DECODE: 2}),
    )
    monkeypatch.setattr(Session, "round", round_)
    three = contenders(*(tiny_llama() for _ in range(3)))
    for label, each in enumerate(three):
        each.model.label = label
    settings = BenchSettings(batches=(1,), contexts=(4,), tokens=2, repeats=3)
    outcomes, notes = measure(three, settings, progress=False)
    assert calls == [0, 1, 2, 1, 2, 0, 2, 0, 1]
    assert notes == []
    rows = [row for row in Results(three, settings, outcomes, notes).rows() if row.phase == DECODE]
    assert [row.tokens_per_second.median for row in rows] == [2.0, 2 / 3, 2 / 3]
    assert [row.time_over_dense.median for row in rows] == [1.0, 3.0, 3.0]
    calls.clear()
    measure(three, BenchSettings((1, 2), (4,), 2, 3, seconds=1e-9), progress=False)
    assert calls == [0, 1, 2, 0, 1, 2]  # a round of each piece is always finished
    assert list(turns([], 2)) == [[], []]


@pytest.mark.parametrize("static", [False, True])
def test_each_round_decodes_from_the_same_context(monkeypatch, static):
    model = tiny_llama().eval()
    running = Session(model, abilities_of(model), Workload(2, 6, 3))
    running._static = static  # as on CUDA
    lengths = []
    forward = running._forward

    def noted(function, inputs):
        before = 0 if running._cache is None else int(running._cache.get_seq_length())
        lengths.append((before, inputs.shape[1]))
        forward(function, inputs)

    monkeypatch.setattr(running, "_forward", noted)
    running.prepare()
    assert isinstance(running._cache, StaticCache) == static
    lengths.clear()
    for _ in range(2):
        assert running.round().keys() == {PREFILL, DECODE}
    assert lengths == [(0, 6), (6, 1), (7, 1), (8, 1)] * 2
    running.close()
    assert running._cache is None


def test_compiled_models_run_on_a_static_cache(monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: modes.append(options) or model)
    model = tiny_llama().eval()
    settings = BenchSettings((1,), (4,), 2, 1, compiled=True)
    outcomes, _ = measure(contenders(model), settings, progress=False)
    assert outcomes[0].error is None
    assert outcomes[0].how == "torch.compile"
    assert modes == [{"dynamic": False}, {"dynamic": False, "mode": None}]


def test_a_model_without_room_is_left_out_with_the_reason(monkeypatch):
    two = contenders(tiny_llama(), tiny_llama())
    settings = BenchSettings((1, 2), (4,), 2, 2)
    real = Session.prepare

    def prepare(self):
        if self.model is two[1].model and self.work.batch == 2:
            raise torch.OutOfMemoryError("no room\nfor details")
        real(self)

    monkeypatch.setattr(Session, "prepare", prepare)
    outcomes, _ = measure(two, settings, progress=False)
    assert [outcome.error for outcome in outcomes] == [None, None, None, "out of memory: no room"]
    results = Results(two, settings, outcomes, [])
    assert "out of memory: no room" in results.markdown()
    assert json.loads(json.dumps(results.to_dict()))["rows"][-1]["model"] == "model 0"
    monkeypatch.setattr(session, "free_bytes", lambda device: 0)
    outcomes, _ = measure(two[:1], settings, progress=False)
    assert all("GB are free on cpu" in outcome.error for outcome in outcomes)
    assert [row.phase for row in Results(two[:1], settings, outcomes, []).rows()] == [PREFILL, PREFILL]


@pytest.mark.parametrize(
    ("build", "note"), [(tiny_bert, "BertForMaskedLM does not generate"), (tiny_vit, "reads images")]
)
def test_encoders_and_models_of_images_are_measured_in_prefill_alone(build, note):
    made = contenders(build())
    settings = BenchSettings((1, 2), (5,), 2, 1)
    outcomes, notes = measure(made, settings, progress=False)
    assert len(notes) == 1
    assert note in notes[0]
    assert notes[0].endswith("prefill only")
    results = Results(made, settings, outcomes, notes)
    assert [(row.phase, row.error) for row in results.rows()] == [(PREFILL, None)] * 2
    assert note in results.markdown()
    assert ("| image |" in results.markdown()) == (build is tiny_vit)


def test_other_families_decode():
    made = contenders(tiny_gpt2())
    outcomes, _ = measure(made, BenchSettings((2,), (5,), 2, 1), progress=False)
    assert outcomes[0].error is None
    assert outcomes[0].flops[DECODE] > 0


def test_what_cannot_be_measured_is_refused_by_name(workshop, tmp_path, monkeypatch):
    with pytest.raises(ModelSourceError, match="T5ForConditionalGeneration has an encoder and a decoder"):
        abilities_of(tiny_t5().eval())
    with pytest.raises(ConfigError, match="context 64 and 16 decode steps are more than the 64 tokens"):
        workloads(BenchSettings(contexts=(8, 64)), 64, decodes=True, images=False)
    works, note = workloads(BenchSettings(batches=(1,)), 1024, decodes=True, images=False)
    assert works == [Workload(1, 128, 16)]
    assert "context 2048 and 16 decode steps are more than the 1024 tokens" in note
    with pytest.raises(ConfigError, match=r"^no report of .*model names the dense model; name it as --dense"):
        from_folders([str(workshop / "model")], None, "float32", "cpu")
    with pytest.raises(ConfigError, match=r"nowhere is no folder here; no report of .*nowhere names the dense model"):
        from_folders([str(tmp_path / "nowhere")], None, "float32", "cpu")
    with pytest.raises(ConfigError, match="has compressed layers; name another as --dense"):
        from_folders([str(workshop / "model")], str(workshop / "compressed"), "float32", "cpu")
    tiny_llama(hidden_size=16).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"was not compressed from .*q_proj is \(32, 32\), and is \(16, 16\) there"):
        from_folders([str(workshop / "compressed")], str(tmp_path / "other"), "float32", "cpu")
    monkeypatch.setattr(models, "recorded_evaluation", lambda folder: {"dense": f"{tmp_path}/moved"})
    with pytest.raises(ModelSourceError, match="the reports name it as the dense model; name another as --dense"):
        from_folders([str(workshop / "compressed")], None, "float32", "cpu")
    monkeypatch.setattr(models, "recorded_evaluation", lambda folder: {"dense": folder})
    with pytest.raises(ConfigError, match="the models come from several dense ones"):
        from_folders([str(workshop / "compressed"), str(workshop / "model")], None, "float32", "cpu")
    with pytest.raises(ConfigError, match="a model is named twice"):
        from_folders([str(workshop / "compressed")] * 2, None, "float32", "cpu")
    with pytest.raises(ModelSourceError, match=r"there is no folder .*nowhere"):
        at_random(f"{tmp_path}/nowhere", [0.4], ["factors"], "float32", "cpu")
    for changed, error, message in (
        ({"ratios": [1.2]}, ConfigError, "ratio is 1.2"),
        ({"storages": ["pivot"]}, ConfigError, "did you mean 'pivoted'"),
        ({"storages": ["mixed"]}, ConfigError, "chooses bits by the loss"),
        ({"layers": 3}, ConfigError, "layers is 3, but must be at most 2"),
        ({"storages": ["hq"]}, BudgetError, "reached by storage 'hq' alone"),
        ({"ratios": [0.99]}, BudgetError, "at most 14,432 can go"),
    ):
        with pytest.raises(error, match=message):
            at_random(
                **{
                    "source": str(workshop / "model"),
                    "ratios": [0.4],
                    "storages": ["factors"],
                    "dtype": "float32",
                    "device": "cpu",
                }
                | changed
            )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/compressed", "--batch", "1,x"], "--batch is '1,x'"),
        (["{}/compressed", "--batch", "0"], "batch is 0, but must be 1 or more"),
        (["{}/compressed", "--tokens", "0"], "tokens is 0"),
        (["{}/compressed", "--dtype", "int4"], "dtype is 'int4'"),
        (["{}/compressed", "--device", "meta"], "device 'meta' is not available"),
        (["{}/compressed", "--ratio", "0.4"], "--ratio is for --random alone"),
        (["{}/compressed", "--json", "{}"], "is a folder; name a file"),
        ([], "name one or more folders"),
        (["--random", "{}/model"], "--random needs --ratio and --storage"),
        (["{}/compressed", "--random", "{}/model"], "give no folders"),
        (["{}/compressed", "--context", "64"], "context 64 and 16 decode steps"),
    ],
)
def test_the_command_refuses_before_it_measures(workshop, zssvd, monkeypatch, arguments, message):
    monkeypatch.setattr(runner.Group, "run", lambda self: pytest.fail("measured"))
    done = zssvd("bench", "--device", "cpu", *(each.format(workshop) for each in arguments))
    assert (done.code, done.out) == (1, "")
    assert message in done.err


def test_a_report_without_room_fails_the_command_and_quiet_is_quiet(workshop, zssvd, monkeypatch):
    assert zssvd("bench", workshop / "compressed", *SMALL, "-q") == (0, "", "")
    monkeypatch.setattr(session, "free_bytes", lambda device: 0)
    done = zssvd("bench", workshop / "compressed", *SMALL)
    assert done.code == 1
    assert "GB are free" in " ".join(done.out.split())


def test_speeds_are_recorded_in_reports(workshop, zssvd, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(workshop / "compressed", folder)
    before = json.loads((folder / REPORT).read_text())
    done = zssvd("bench", folder, *SMALL, "--record")
    assert done.code == 0
    assert f"wrote {folder / REPORT}" in done.out
    after = json.loads((folder / REPORT).read_text())
    speeds = after.pop("tokens_per_second")
    assert after == before
    assert speeds.keys() == {"batch", "context", "prefill", "decode", "dense_prefill", "dense_decode"}
    assert all(value > 0 for value in speeds.values())
    assert read_report(folder).tokens_per_second == speeds
    assert "decode, tokens per second" in (folder / PAGE).read_text()
    done = zssvd("bench", workshop / "model", "--dense", workshop / "model", *SMALL, "--record")
    assert done.code == 1
    assert "--record writes into report.json" in done.err
