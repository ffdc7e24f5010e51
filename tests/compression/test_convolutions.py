"""Compression of convolutions from one end to the other, and what stays as it is."""

import copy

import pytest
import torch
from support.convolutions import image_batches, loss_of, tiny_network, tiny_resnet
from support.models import assert_same_state, state_of, tiny_vit
from torch import nn
from transformers import AutoModelForImageClassification

from zssvd_lightning import CompressionConfig, compress, from_pretrained, load_state_dict, merge, save_pretrained
from zssvd_lightning.compression.pipeline import coverage_of, plan
from zssvd_lightning.correction.batch_norms import SumsBehind, set_statistics
from zssvd_lightning.errors import BudgetError, ContradictionError, TargetError
from zssvd_lightning.layers.apart.convolutions import UnfoldedConvolution, unfolded
from zssvd_lightning.serialization.specs import ranks_of

QUICK = {"preset": "zs-svd", "prune_ratio": 0.5, "progress": False, "corrections": 0, "convolutions": True}
OWN = QUICK | {"loss": loss_of}


@torch.no_grad()
def logits(model, batch):
    output = model.eval()(batch["pixel_values"])
    return output if isinstance(output, torch.Tensor) else output.logits


def test_a_network_of_transformers_is_compressed_saved_loaded_and_merged(tmp_path):
    torch.manual_seed(0)
    model, batches = tiny_resnet(), image_batches()
    report = compress(model, batches, **QUICK | {"corrections": 1, "correction_batches": 2})
    assert report.reached >= 0.5
    assert report.coverage.share > 0.9
    kernels = dict(unfolded(model))
    assert {conv.kernel_size for conv in kernels.values()} == {(1, 1), (3, 3)}  # the first one stays dense
    assert ranks_of(model).keys() == {f"{name}.kernel_matrix" for name in kernels}
    expected = logits(model, batches[0])
    save_pretrained(model, tmp_path / "saved", report=report)
    loaded = from_pretrained(tmp_path / "saved")
    assert ranks_of(loaded) == ranks_of(model)
    assert torch.equal(logits(loaded, batches[0]), expected)
    save_pretrained(model, tmp_path / "alone", self_contained=True)
    alone = AutoModelForImageClassification.from_pretrained(tmp_path / "alone", trust_remote_code=True)
    torch.testing.assert_close(logits(alone, batches[0]), expected)
    merge(model)
    assert not list(unfolded(model))
    assert {name: type(module) for name, module in model.named_modules()} == {
        name: type(module) for name, module in tiny_resnet().named_modules()
    }
    torch.testing.assert_close(logits(model, batches[0]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("storage", ["factors", "pivoted", "hq"])
def test_every_storage_a_second_compression_and_the_weights_in_a_dense_model(storage):
    torch.manual_seed(0)
    model, batches = tiny_network().eval(), image_batches()
    dense = copy.deepcopy(model)
    first = compress(model, batches, **OWN | {"storage": storage, "prune_ratio": 0.6 if storage == "hq" else 0.3})
    assert first.reached >= first.asked
    fresh = tiny_network()
    load_state_dict(fresh, model.state_dict())
    assert torch.equal(logits(fresh, batches[0]), logits(model, batches[0]))
    load_state_dict(fresh, dense.state_dict())
    assert not list(unfolded(fresh))
    assert torch.equal(logits(fresh, batches[0]), logits(dense, batches[0]))
    if storage != "hq":
        before = ranks_of(model)
        assert compress(model, batches, **OWN | {"storage": storage, "prune_ratio": 0.6}).reached >= 0.6
        assert all(rank <= before.get(name, 99) for name, rank in ranks_of(model).items())
        with pytest.raises(TargetError, match="no layer to compress"):
            compress(model, batches, **OWN | {"storage": storage, "convolutions": False})


def test_names_select_them_and_depthwise_ones_are_left_with_the_reason(caplog):
    model, batches = tiny_network(), image_batches()
    report = compress(copy.deepcopy(model), batches, **OWN)
    assert set(report.layers) == {"0.kernel_matrix", "4.kernel_matrix"}
    assert "convolutions are not compressed (3; 3.7% of the model's parameters): its groups have" in caplog.text
    (left,) = [part for part in report.coverage.left_alone if part.what.startswith("convolutions: ")]
    assert left.parameters == 16 * 9
    for chosen in ({"include": "4"}, {"ignore": "0"}, {"include": "4.kernel_matrix"}, {"ignore": "0.kernel_matrix"}):
        assert set(coverage_names(model, batches, chosen)) == {"4.kernel_matrix"}
    coverage = coverage_of(model, CompressionConfig(convolutions=True, ignore=["0"]))
    assert coverage.layers == 1
    with pytest.raises(TargetError, match=r"3 \(Conv2d\) cannot be factorized: its groups have matrices"):
        compress(model, batches, **OWN | {"include": "3"})
    with pytest.raises(TargetError, match=r"4 \(Conv2d\) cannot be factorized: convolutions are targets only if"):
        compress(model, batches, **OWN | {"include": "4", "convolutions": False})


def coverage_names(model, batches, chosen):
    return plan(model, batches, **OWN | chosen).ranks


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"budget_in": "flops"}, "depend on the size of the image"),
        ({"correction_step": "refit"}, "inputs of whole sequences"),
    ],
)
def test_settings_that_do_not_go_with_convolutions_are_refused(settings, reason):
    with pytest.raises(ContradictionError, match=reason):
        CompressionConfig.of("zs-svd", convolutions=True, **settings)


def test_the_model_is_as_before_after_an_error(monkeypatch):
    model, batches = tiny_network(), image_batches()
    before, modules = state_of(model), dict(model.named_modules())
    with pytest.raises(BudgetError):
        compress(model, batches, **OWN | {"prune_ratio": 0.99, "min_rank_fraction": 0.9})

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("zssvd_lightning.compression.pipeline.reestimate_batch_norms", fail)
    with pytest.raises(KeyboardInterrupt):
        compress(model, batches, **OWN)
    assert dict(model.named_modules()) == modules
    assert_same_state(before, state_of(model))


def test_statistics_behind_a_layer_are_those_of_its_inputs():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), nn.BatchNorm2d(5))
    net.double().eval()
    before, batches = copy.deepcopy(net.state_dict()), [torch.randn(n, 3, 4, 4).double() for n in (2, 3)]
    with torch.no_grad(), SumsBehind(net, [net[2]]) as behind:
        run = behind.in_each(net)
        for x in batches:
            run(x)
    assert_equal_entries(net.state_dict(), before)
    assert set(behind.sums) == {"3", "4"}
    inputs = [net[2](net[1](net[0](x))) for x in batches]
    undo = set_statistics(net, behind.sums)
    every = torch.cat(inputs).transpose(0, 1).flatten(1)
    torch.testing.assert_close(net[3].running_mean, every.mean(1).detach())
    torch.testing.assert_close(net[3].running_var, every.var(1).detach())
    torch.testing.assert_close(net[4].running_mean, torch.zeros(5).double())
    undo()
    assert_equal_entries(net.state_dict(), before)


class WithActivation(nn.BatchNorm2d):
    """As batch norms of timm, which compute their activation too."""

    def forward(self, x):
        return super().forward(x).relu()


def test_batch_norms_that_compute_more_are_followed_by_what_they_compute():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), WithActivation(4), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)).double()
    x = 1000 + torch.randn(6, 3, 4, 4).double()
    with torch.no_grad(), SumsBehind(net.eval(), [net[0]]) as behind:
        behind.in_each(net)(x)
    batch = copy.deepcopy(net).train()
    batch[1].momentum = batch[3].momentum = 1.0
    batch(x)
    set_statistics(net, behind.sums)
    for place in (1, 3):
        torch.testing.assert_close(net[place].running_mean, batch[place].running_mean)
        torch.testing.assert_close(net[place].running_var, batch[place].running_var)


def assert_equal_entries(found, expected):
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_batch_norms_behind_truncated_kernels_are_estimated_again(caplog):
    torch.manual_seed(0)
    model, batches = tiny_network(), image_batches(8, size=16)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for batch in batches * 3:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    before = copy.deepcopy(model)
    with caplog.at_level("INFO"):
        report = compress(model, batches, **OWN | {"prune_ratio": 0.8, "preset": "plain-svd"})
    assert "estimated 2 batch norms behind convolutions again" in caplog.text
    assert report.kept_back["final"] < report.kept_back["truncated"]
    assert not torch.equal(model[5].running_mean, before[5].running_mean)


def test_block_by_block_gives_the_same():
    torch.manual_seed(0)
    models = [tiny_vit()]
    models.append(copy.deepcopy(models[0]))
    for model, memory in zip(models, ("whole", "blocks"), strict=True):
        compress(model, image_batches(), memory=memory, **QUICK | {"preset": "svd-llm"})
    assert ranks_of(models[0]) == ranks_of(models[1])
    assert "vit.embeddings.patch_embeddings.projection.kernel_matrix" in ranks_of(models[0])


def test_a_compressed_network_runs_in_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model, batches = tiny_network().eval(), image_batches()
    compress(model, batches, **OWN)
    assert any(isinstance(module, UnfoldedConvolution) for module in model)
    x = batches[0]["pixel_values"]
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.tensor(found), logits(model, batches[0]), rtol=1e-4, atol=1e-5)
    assert {node.op_type for node in program.model.graph} >= {"Conv"}
    assert "Im2Col" not in {node.op_type for node in program.model.graph}
