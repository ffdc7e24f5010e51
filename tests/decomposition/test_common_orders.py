"""Layers that meet in a hidden width get one order in it, and the model computes the same."""

import copy
import logging

import pytest
import torch
from support.models import FAMILIES, tiny_llama, token_batches
from torch import nn

from zssvd_lightning import compress, from_pretrained, merge, save_pretrained
from zssvd_lightning.calibration.widths.free_widths import FreeWidths
from zssvd_lightning.calibration.widths.trials import Width
from zssvd_lightning.compression.course import course
from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.compression.gathering import gather
from zssvd_lightning.compression.pipeline import calibrate
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.decomposition import common_orders
from zssvd_lightning.decomposition.factors import Factors, TruncatedWeights
from zssvd_lightning.distributed import LayerSet
from zssvd_lightning.layers.pivoted import PivotedLinear, PivotForm
from zssvd_lightning.layers.pivoted_columns import ColumnPivotedLinear
from zssvd_lightning.model.targets import Target, find_targets
from zssvd_lightning.serialization.specs import specs_of

SETTINGS = {"storage": "pivoted", "metric": "input", "selection": "zero_sum", "corrections": 0, "prune_ratio": 0.4}
ASKED = SETTINGS | {"preset": "zs-svd"}
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def output_of(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


def without_order(model):
    return {name for name, part in model.named_modules() if isinstance(part, PivotForm) and part.order is None}


def in_double(batch):
    return {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


def spread_biases(model):
    """Give biases and norms values, which start as zeros and ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_models_compute_the_same_with_layers_that_need_no_order(family):
    model = spread_biases(FAMILIES[family].build().double())
    batches = [in_double(batch) for batch in FAMILIES[family].batches()]
    run = Compression(model, CompressionConfig(**SETTINGS), progress=False)
    for stage in course(run.config):
        gather(run, batches, stage.gathers)
        run.take(stage)
    truncated = output_of(model, batches[0])
    run.factorize()
    free = run.gathering.free_widths.free
    whole = {width for width in free if all(name in run.truncated for name in width.members)}
    assert whole
    assert without_order(model) == {name for width in whole for name in width.members}
    torch.testing.assert_close(output_of(model, batches[0]), truncated, **EXACT)
    run.restore()
    assert not specs_of(model)


def held(layers, ranks):
    """Truncated weights of some layers, and the function of the layers with them."""
    targets = LayerSet({name: Target(name, layer) for name, layer in layers.items()})
    weights = TruncatedWeights(targets, "pivoted")
    for name, k in ranks.items():
        U, S, Vh = torch.linalg.svd(layers[name].weight.detach(), full_matrices=False)
        weights.held[name] = Factors(U[:, :k] * S[:k], Vh[:k])
        targets[name].assign(weights.truncated(name))
    return weights


def widths_of(*members):
    widths = FreeWidths()
    widths.verdicts = {Width(tuple(producers.split()), consumer): True for producers, consumer in members}
    return widths


def chain():
    torch.manual_seed(0)
    parts = [part for size in ((6, 9), (9, 12), (12, 5)) for part in (nn.Linear(*size), nn.Tanh())]
    return nn.Sequential(*parts).double()


@pytest.mark.parametrize(
    ("ranks", "kinds"),
    [
        ({"0": 3, "2": 4, "4": 3}, [PivotedLinear, PivotedLinear, ColumnPivotedLinear]),
        ({"0": 3, "2": 4}, [PivotedLinear, ColumnPivotedLinear]),  # the last one stays dense
        ({"2": 4, "4": 3}, [PivotedLinear, ColumnPivotedLinear]),
    ],
)
def test_layers_of_a_chain_have_pivots_on_one_side(ranks, kinds):
    model, x = chain(), torch.randn(7, 6, dtype=torch.float64)
    weights = held({name: model[int(name)] for name in ("0", "2", "4")}, ranks)
    expected = model(x)
    new = dict(weights.layers(widths_of(("0", "2"), ("2", "4"))))
    assert [type(layer) for layer in new.values()] == kinds
    assert all(layer.order is None for layer in new.values())
    for name, layer in new.items():
        model[int(name)] = layer
    torch.testing.assert_close(model(x), expected, **EXACT)


def test_a_width_with_a_dense_layer_keeps_its_order(caplog):
    model = chain()
    weights = held({name: model[int(name)] for name in ("0", "2", "4")}, {"0": 3, "4": 3})
    with caplog.at_level(logging.INFO):
        new = dict(weights.layers(widths_of(("0", "2"), ("2", "4"))))
    assert all(layer.order is not None for layer in new.values())
    assert "0 of 2 pivoted layers need no reordering (0 hidden widths; of others, 2 have a layer" in caplog.text


def test_large_coefficients_keep_layers_in_orders_of_their_own(caplog, monkeypatch):
    monkeypatch.setattr(common_orders, "LARGEST", 1e-3)
    model, x = chain(), torch.randn(7, 6, dtype=torch.float64)
    weights = held({"0": model[0], "2": model[2]}, {"0": 3, "2": 4})
    expected = model(x)
    with caplog.at_level(logging.INFO):
        model[0], model[2] = dict(weights.layers(widths_of(("0", "2")))).values()
    assert not without_order(model)
    assert "1 would need coefficients above 0.001" in caplog.text
    torch.testing.assert_close(model(x), expected, **EXACT)


def test_matrices_without_a_common_order_have_none_and_mistakes_are_raised():
    first, second = torch.randn(8, 2), torch.randn(8, 2)
    first[:4], second[4:] = 0, 0
    assert common_orders.bounded_order([first, second]) is None
    with pytest.raises(ValueError, match="have no common order of rows"):
        common_orders.bounded_order([torch.randn(8, 2), torch.randn(9, 2)])


def compressed(**settings):
    model = tiny_llama()
    report = compress(model, token_batches(), progress=False, **(ASKED | {"prune_ratio": 0.5} | settings))
    return model, report


def test_saved_models_load_and_merge_as_they_are(tmp_path):
    model, _ = compressed()
    assert without_order(model)
    batch = token_batches(1)[0]
    save_pretrained(model, tmp_path / "m")
    again = from_pretrained(tmp_path / "m")
    assert specs_of(again) == specs_of(model)
    torch.testing.assert_close(output_of(again, batch), output_of(model, batch), rtol=0, atol=0)
    merge(again)
    torch.testing.assert_close(output_of(again, batch), output_of(model, batch), rtol=1e-4, atol=1e-5)


def test_a_compressed_model_is_compressed_again():
    model, _ = compressed(prune_ratio=0.3)
    before = copy.deepcopy(model)
    report = compress(model, token_batches(), progress=False, **(ASKED | {"prune_ratio": 0.31}))
    assert report.compresses_again
    assert without_order(model)
    batch = token_batches(1)[0]
    near, far = output_of(before, batch), output_of(model, batch)
    assert (far - near).norm() < 0.2 * near.norm()


def test_statistics_of_an_earlier_calibration_know_the_widths():
    model, batches = tiny_llama(), token_batches()
    other = copy.deepcopy(model)
    statistics = calibrate(model, batches, progress=False, **ASKED)
    for each, given in ((model, {"statistics": statistics}), (other, {})):
        compress(each, batches, progress=False, **ASKED, **given)
    assert without_order(model) == without_order(other) != set()


def test_other_storages_do_not_run_modules_again():
    run = Compression(tiny_llama(), CompressionConfig(**(SETTINGS | {"storage": "factors"})), progress=False)
    gather(run, token_batches(1), course(run.config)[0].gathers)
    assert not run.gathering.free_widths.verdicts
    assert len(find_targets(run.model)) == 14
