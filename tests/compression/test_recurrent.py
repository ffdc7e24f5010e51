"""Compression of recurrent modules from one end to the other; statistics against a loop of cells in float64."""

import copy
from functools import partial

import pytest
import torch
from support.attention import loss_of, sequence_batches
from support.models import assert_same_state, state_of
from support.recurrent import Reader
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModel, EncodecConfig, EncodecModel

from zssvd_lightning import CompressionConfig, compress, from_pretrained, load_state_dict, merge, save_pretrained
from zssvd_lightning.compression.pipeline import calibrate, plan
from zssvd_lightning.errors import BudgetError, CalibrationError, ContradictionError, TargetError
from zssvd_lightning.layers.apart.recurrent import RecurrentLayers, recurrences
from zssvd_lightning.serialization.specs import ranks_of

QUICK = {"preset": "zs-svd", "prune_ratio": 0.5, "progress": False, "corrections": 0, "recurrent": True}
OWN = QUICK | {"loss": loss_of}
ENDS = ("l0", "l0_reverse", "l1", "l1_reverse")
NAMES = {f"lstm.{kind}_{end}" for kind in ("ih", "hh") for end in ENDS} | {"gru.ih_l0", "gru.hh_l0"}


@torch.no_grad()
def outputs(model, batch):
    return model.eval()(batch["x"], batch["attention_mask"])


class Last(nn.Module):
    """Reads sequences with an LSTM, and classifies the mean of the states that count."""

    def __init__(self, inputs=4, batch_first=True):
        super().__init__()
        self.lstm, self.head = nn.LSTM(inputs, 6, batch_first=batch_first), nn.Linear(6, 5)

    def forward(self, x, attention_mask):
        h = self.lstm(x if self.lstm.batch_first else x.transpose(0, 1))[0]
        h = h if self.lstm.batch_first else h.transpose(0, 1)
        return self.head((h * attention_mask[..., None]).mean(1))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_moments_and_gradients_are_those_of_a_loop_of_cells(batch_first, padded):
    torch.manual_seed(0)
    model = Last(batch_first=batch_first).double()
    counts = torch.ones(3, 7, dtype=torch.bool)
    counts[1, 4:] = counts[2, 2:] = not padded
    batches = [
        {"x": torch.randn(3, 7, 4).double(), "attention_mask": counts, "labels": torch.randint(5, (3,))}
        for _ in range(2)
    ]
    settings = {"preset": "svd-llm", "metric": "two_sided", "selection": "curvature", "storage": "factors"}
    moments = calibrate(model, batches, **OWN | settings | {"include": "lstm.*"})
    assert type(model.lstm) is nn.LSTM
    A, B, G = (dict.fromkeys(("ih", "hh"), 0) for _ in range(3))
    weights = dict(model.lstm.named_parameters())
    for batch in batches:
        h = c = torch.zeros(3, 6).double()
        states, read = [], []
        for t in range(7):
            x = batch["x"][:, t]
            inner = nn.functional.linear(x, weights["weight_ih_l0"], weights["bias_ih_l0"])
            carried = nn.functional.linear(h, weights["weight_hh_l0"], weights["bias_hh_l0"])
            read.append({"ih": (x, inner), "hh": (h, carried)})
            i, f, g, o = (inner + carried).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            states.append(h)
        h = torch.stack(states, 1)
        y = model.lstm(batch["x"])[0] if batch_first else model.lstm(batch["x"].transpose(0, 1))[0].transpose(0, 1)
        torch.testing.assert_close(h, y)
        loss = 3 * cross_entropy(model.head((h * counts[..., None]).mean(1)), batch["labels"])
        for kind in ("ih", "hh"):
            (g,) = torch.autograd.grad(loss, weights[f"weight_{kind}_l0"], retain_graph=True)
            G[kind] = G[kind] + g
            D = torch.autograd.grad(loss, [step[kind][1] for step in read], retain_graph=True)
            for t, step in enumerate(read):
                X, d = step[kind][0][counts[:, t]].detach(), D[t][counts[:, t]]
                A[kind], B[kind] = A[kind] + X.T @ X, B[kind] + d.T @ d
    for kind in ("ih", "hh"):
        name = f"lstm.{kind}_l0"
        assert moments.tokens[name] == 2 * int(counts.sum())
        torch.testing.assert_close(moments.input_sums[name], A[kind])
        torch.testing.assert_close(moments.output_sums[name], B[kind])
        torch.testing.assert_close(moments.gradient_sums[name], G[kind])


def test_packed_sequences_count_as_padded_ones_in_one_direction():
    torch.manual_seed(0)
    model, batches = Reader(packs=True).double(), sequence_batches(2)
    for batch in batches:
        batch["x"] = batch["x"].double()
    found = calibrate(model, batches, **OWN | {"include": "lstm.*_l0"})
    model.packs = False
    expected = calibrate(model, batches, **OWN | {"include": "lstm.*_l0"})
    for name in ("lstm.ih_l0", "lstm.hh_l0"):
        assert found.tokens[name] == expected.tokens[name] == 2 * int(batches[0]["attention_mask"].sum())
        torch.testing.assert_close(found.input_sums[name], expected.input_sums[name])


@pytest.mark.parametrize("build", [Reader, partial(Reader, batch_first=False), partial(Reader, packs=True)])
@pytest.mark.parametrize("storage", ["factors", "pivoted", "hq"])
def test_every_storage_a_second_compression_and_the_weights_in_a_dense_model(build, storage):
    torch.manual_seed(0)
    model, batches = build().eval(), sequence_batches()
    dense = copy.deepcopy(model)
    first = compress(model, batches, **OWN | {"storage": storage, "prune_ratio": 0.6 if storage == "hq" else 0.3})
    assert first.reached >= first.asked
    assert ranks_of(model).keys() <= NAMES
    assert ranks_of(model)
    fresh = build()
    load_state_dict(fresh, model.state_dict())
    assert torch.equal(outputs(fresh, batches[0]), outputs(model, batches[0]))
    load_state_dict(fresh, dense.state_dict())
    assert not list(recurrences(fresh))
    assert torch.equal(outputs(fresh, batches[0]), outputs(dense, batches[0]))
    if storage != "hq":
        before = ranks_of(model)
        assert compress(model, batches, **OWN | {"storage": storage, "prune_ratio": 0.6}).reached >= 0.6
        assert all(rank <= before.get(name, 99) for name, rank in ranks_of(model).items())
        with pytest.raises(TargetError, match="no layer to compress"):
            compress(model, batches, **OWN | {"storage": storage, "recurrent": False})


def test_all_of_a_compressed_model_is_merged_and_what_stays_dense_is_put_back():
    torch.manual_seed(0)
    model, batches = Reader(), sequence_batches()
    before = {name: type(module) for name, module in model.named_modules()}
    report = compress(model, batches, **OWN | {"corrections": 1, "correction_batches": 2, "include": "lstm.*"})
    assert report.reached >= 0.5
    assert report.coverage.parameters == sum(p.numel() for n, p in Reader().lstm.named_parameters() if "weight" in n)
    assert type(model.gru) is nn.GRU
    expected = outputs(model, batches[0])
    merge(model)
    assert {name: type(module) for name, module in model.named_modules()} == before
    torch.testing.assert_close(outputs(model, batches[0]), expected, rtol=1e-4, atol=1e-5)


def test_a_model_of_transformers_is_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    sizes = {"num_filters": 8, "hidden_size": 32, "upsampling_ratios": [4, 2], "codebook_size": 16, "codebook_dim": 32}
    model = EncodecModel(EncodecConfig(**sizes, target_bandwidths=[24.0], sampling_rate=24000)).eval()
    batches = [{"input_values": torch.randn(2, 1, 160)} for _ in range(4)]

    def loss(model, batch):
        return (model.decoder(model.encoder(batch["input_values"])) - batch["input_values"]).square().mean()

    def heard(model):
        with torch.no_grad():
            return model.eval().decoder(model.encoder(batches[0]["input_values"]))

    report = compress(model, batches, **QUICK | {"loss": loss, "include": "*.lstm.*"})
    assert {name.rpartition(".lstm.")[2] for name in report.layers} == {"ih_l0", "hh_l0", "ih_l1", "hh_l1"}
    save_pretrained(model, tmp_path / "saved", report=report)
    loaded = from_pretrained(tmp_path / "saved")
    assert ranks_of(loaded) == ranks_of(model)
    assert torch.equal(heard(loaded), heard(model))
    save_pretrained(model, tmp_path / "alone", self_contained=True)
    alone = AutoModel.from_pretrained(tmp_path / "alone", trust_remote_code=True)
    torch.testing.assert_close(heard(alone), heard(model))


def test_they_are_named_with_their_share_and_only_targets_on_request(caplog):
    model, batches = Reader(), sequence_batches()
    model.gru = nn.utils.parametrizations.weight_norm(model.gru, "weight_hh_l0")
    report = compress(copy.deepcopy(model), batches, **OWN)
    assert report.layers.keys() == NAMES - {"gru.ih_l0", "gru.hh_l0"}
    assert "recurrent modules are not compressed (gru; " in caplog.text
    (left,) = [part for part in report.coverage.left_alone if part.what.startswith("recurrent modules: ")]
    assert "may compute something else" in left.what
    model = Reader()
    assert set(plan(model, batches, **OWN | {"ignore": "lstm.*"}).ranks) == {"gru.ih_l0", "gru.hh_l0"}
    assert set(plan(model, batches, **OWN | {"include": "hh_l0"}).ranks) == {"lstm.hh_l0", "gru.hh_l0"}
    with pytest.raises(TargetError, match=r"gru \(GRU\) cannot be factorized: recurrent modules are targets only if"):
        compress(model, batches, **OWN | {"include": "gru", "recurrent": False})


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"budget_in": "flops"}, "multiplied out to run, which saves no FLOPs"),
        ({"correction_step": "refit"}, "which states at one position are not; set recurrent to False"),
    ],
)
def test_settings_that_do_not_go_with_them_are_refused(settings, reason):
    with pytest.raises(ContradictionError, match=reason):
        CompressionConfig.of("zs-svd", recurrent=True, **settings)


def test_a_replacement_that_computes_something_else_stays_whole(monkeypatch, caplog):
    cell = RecurrentLayers._cell
    monkeypatch.setattr(RecurrentLayers, "_cell", lambda self, *args: tuple(1.1 * s for s in cell(self, *args)))
    with pytest.raises(TargetError, match=r"lstm.ih_l0 is a part of the parameters of LSTM, and is only factorized"):
        compress(Reader(), sequence_batches(), **OWN | {"include": "lstm.*"})
    assert "as separate linear layers they give other outputs" in caplog.text


def test_the_model_is_as_before_after_an_error():
    model, batches = Reader(), sequence_batches()
    before, modules = state_of(model), dict(model.named_modules())
    with pytest.raises(BudgetError):
        compress(model, batches, **OWN | {"prune_ratio": 0.99, "min_rank_fraction": 0.9})
    assert dict(model.named_modules()) == modules
    assert_same_state(before, state_of(model))


def test_padding_of_a_square_batch_is_refused_where_the_layout_cannot_be_told():
    batches = sequence_batches()
    for batch in batches:
        batch |= {"x": batch["x"][:, :6], "attention_mask": batch["attention_mask"][:, :6]}
    with pytest.raises(CalibrationError, match="layout"):
        compress(Reader(batch_first=False), batches, **OWN)


def test_a_compressed_network_runs_in_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model, batches = Last(8).eval(), sequence_batches()
    compress(model, batches, **OWN)
    assert list(recurrences(model))
    args = batches[0]["x"], batches[0]["attention_mask"]
    program = torch.onnx.export(model, args, dynamo=True, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {each.name: x.numpy() for each, x in zip(session.get_inputs(), args, strict=True)})
    torch.testing.assert_close(torch.tensor(found), outputs(model, batches[0]), rtol=1e-4, atol=1e-5)
