"""Compression of convolutions with groups from one end to the other, against explicit patches in float64."""

import copy

import pytest
import torch
from support.convolutions import grouped_network, image_batches, loss_of, tiny_regnet
from torch import nn
from torch.nn.functional import cross_entropy, unfold
from transformers import AutoModelForImageClassification

from zssvd_lightning import compress, from_pretrained, load_state_dict, merge, save_pretrained
from zssvd_lightning.compression.pipeline import calibrate, plan
from zssvd_lightning.errors import TargetError
from zssvd_lightning.layers.apart.grouped import GroupedConvolution, grouped
from zssvd_lightning.serialization.specs import ranks_of

QUICK = {"preset": "zs-svd", "prune_ratio": 0.5, "progress": False, "corrections": 0, "convolutions": True}
OWN = QUICK | {"loss": loss_of}
GROUP = "2.channel_groups.{}.kernel_matrix"


@torch.no_grad()
def logits(model, batch):
    output = model.eval()(batch["pixel_values"])
    return output if isinstance(output, torch.Tensor) else output.logits


def test_moments_and_gradients_are_those_of_the_patches_of_each_group():
    conv = nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1)
    torch.manual_seed(0)
    model = nn.Sequential(conv, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)).double()
    batches = [(torch.randn(3, 4, 9, 8).double(), torch.randint(5, (3,))) for _ in range(2)]

    def loss(model, batch):
        return cross_entropy(model(batch[0]), batch[1])

    settings = {"metric": "two_sided", "selection": "curvature", "storage": "factors", "include": "0", "loss": loss}
    moments = calibrate(model, batches, **QUICK | {"preset": "svd-llm"} | settings)
    assert model[0] is conv
    A, B, G = ([0, 0] for _ in range(3))
    tokens = 0
    for x, y in batches:
        kept = []
        handle = conv.register_forward_hook(lambda *args, kept=kept: kept.append(args[2]))
        batch_loss = 3 * loss(model, (x, y))
        handle.remove()
        D, g = torch.autograd.grad(batch_loss, [kept[0], conv.weight])
        for group in range(2):
            part = x[:, 2 * group : 2 * group + 2]
            X = unfold(part, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1)
            d = D[:, 3 * group : 3 * group + 3].flatten(2).transpose(1, 2).flatten(0, 1)
            A[group] = A[group] + X.T @ X
            B[group] = B[group] + d.T @ d
            G[group] = G[group] + g[3 * group : 3 * group + 3].flatten(1)
        tokens += len(X)
    names = [f"0.channel_groups.{group}.kernel_matrix" for group in range(2)]
    assert moments.tokens == dict.fromkeys(names, tokens)
    for group, name in enumerate(names):
        torch.testing.assert_close(moments.input_sums[name], A[group])
        torch.testing.assert_close(moments.output_sums[name], B[group])
        torch.testing.assert_close(moments.gradient_sums[name], G[group])


def test_a_truncation_loses_what_the_singular_values_of_the_outputs_of_each_group_say():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 12, 3, groups=2, padding=1, bias=False)
    model = nn.Sequential(conv, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)).double()
    x = torch.randn(6, 4, 9, 8).double()
    Y = conv(x).detach().transpose(0, 1).flatten(1)
    batches = [{"pixel_values": x, "labels": torch.randint(5, (6,))}]
    compress(model, batches, **OWN | {"preset": "svd-llm", "rank_multiple": 1, "include": "0", "prune_ratio": 0.4})
    found = (model[0](x).detach().transpose(0, 1).flatten(1) - Y).square()
    for group, part in enumerate(model[0].channel_groups):
        rows = slice(6 * group, 6 * group + 6)
        lost = torch.linalg.svdvals(Y[rows])[part.kernel_matrix.rank :].square().sum()
        torch.testing.assert_close(found[rows].sum(), lost, rtol=1e-6, atol=0)


def test_a_network_of_transformers_is_compressed_saved_loaded_and_merged(tmp_path):
    torch.manual_seed(0)
    model, batches = tiny_regnet(), image_batches()
    before = {name: type(module) for name, module in model.named_modules()}
    report = compress(model, batches, **QUICK | {"corrections": 1, "correction_batches": 2})
    assert report.reached >= 0.5
    assert report.coverage.share > 0.8
    found = ranks_of(model)
    assert any(".channel_groups." in name for name in found)
    assert grouped(model)
    expected = logits(model, batches[0])
    save_pretrained(model, tmp_path / "saved", report=report)
    loaded = from_pretrained(tmp_path / "saved")
    assert ranks_of(loaded) == found
    assert torch.equal(logits(loaded, batches[0]), expected)
    save_pretrained(model, tmp_path / "alone", self_contained=True)
    alone = AutoModelForImageClassification.from_pretrained(tmp_path / "alone", trust_remote_code=True)
    torch.testing.assert_close(logits(alone, batches[0]), expected)
    merge(model)
    assert {name: type(module) for name, module in model.named_modules()} == before
    torch.testing.assert_close(logits(model, batches[0]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("storage", ["factors", "pivoted", "hq"])
def test_every_storage_a_second_compression_and_the_weights_in_a_dense_model(storage):
    torch.manual_seed(0)
    model, batches = grouped_network().eval(), image_batches()
    dense = copy.deepcopy(model)
    first = compress(model, batches, **OWN | {"storage": storage, "prune_ratio": 0.6 if storage == "hq" else 0.3})
    assert first.reached >= first.asked
    assert {GROUP.format(0), GROUP.format(1)} & ranks_of(model).keys()
    fresh = grouped_network()
    load_state_dict(fresh, model.state_dict())
    assert torch.equal(logits(fresh, batches[0]), logits(model, batches[0]))
    load_state_dict(fresh, dense.state_dict())
    assert not grouped(fresh)
    assert torch.equal(logits(fresh, batches[0]), logits(dense, batches[0]))
    if storage != "hq":
        before = ranks_of(model)
        assert compress(model, batches, **OWN | {"storage": storage, "prune_ratio": 0.6}).reached >= 0.6
        assert all(rank <= before.get(name, 99) for name, rank in ranks_of(model).items())
        with pytest.raises(TargetError, match="no layer to compress"):
            compress(model, batches, **OWN | {"storage": storage, "convolutions": False})


def test_numbers_of_a_report_are_those_of_the_layers():
    torch.manual_seed(0)
    model, batches = grouped_network().eval(), image_batches()
    total = sum(p.numel() for p in model.parameters())
    report = compress(model, batches, **OWN | {"storage": "factors"})
    after = sum(p.numel() for p in model.parameters())
    assert report.coverage.parameters == 16 * 27 + 32 * 72
    assert report.reached == pytest.approx((total - after) / report.coverage.parameters)
    for group in range(2):
        rank = ranks_of(model)[GROUP.format(group)]
        assert sum(p.numel() for p in model[2].channel_groups[group].parameters()) == rank * (16 + 72) + 16


def test_names_select_them_and_depthwise_ones_are_left_with_the_reason(caplog):
    model, batches = grouped_network(), image_batches()
    report = compress(copy.deepcopy(model), batches, **OWN)
    assert set(report.layers) == {"0.kernel_matrix", GROUP.format(0), GROUP.format(1)}
    assert "convolutions are not compressed (5; 9.6% of the model's parameters): its groups have" in caplog.text
    (left,) = [part for part in report.coverage.left_alone if part.what.startswith("convolutions: ")]
    assert left.parameters == 32 * 9
    assert left.what.endswith("even rank 1 would not save a parameter, as in depthwise convolutions")
    both = {GROUP.format(0), GROUP.format(1)}
    for chosen, names in (
        ({"include": "2"}, both),
        ({"ignore": "0"}, both),
        ({"include": "channel_groups.1.kernel_matrix"}, {GROUP.format(1)}),
        ({"ignore": ["0", GROUP.format(0)]}, {GROUP.format(1)}),
    ):
        assert set(plan(model, batches, **OWN | {"preset": "svd-llm"} | chosen).ranks) == names
    with pytest.raises(TargetError, match=r"5 \(Conv2d\) cannot be factorized: its groups have matrices where even"):
        compress(model, batches, **OWN | {"include": "5"})
    with pytest.raises(TargetError, match=r"2 \(Conv2d\) cannot be factorized: convolutions are targets only if"):
        compress(model, batches, **OWN | {"include": "2", "convolutions": False})
    assert isinstance(model[2], nn.Conv2d)


def test_batch_norms_behind_truncated_groups_are_estimated_again(caplog):
    torch.manual_seed(0)
    model, batches = grouped_network(), image_batches(8, size=16)
    with caplog.at_level("INFO"):
        compress(model, batches, **OWN | {"prune_ratio": 0.8, "preset": "plain-svd", "ignore": "0"})
    assert "estimated 1 batch norms behind convolutions again" in caplog.text


def test_a_compressed_network_runs_in_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model, batches = grouped_network().eval(), image_batches()
    compress(model, batches, **OWN)
    assert any(isinstance(module, GroupedConvolution) for module in model)
    x = batches[0]["pixel_values"]
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.tensor(found), logits(model, batches[0]), rtol=1e-4, atol=1e-5)
    assert "Im2Col" not in {node.op_type for node in program.model.graph}
