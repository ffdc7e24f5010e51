"""Memory that a compression would take, from a config alone."""

import json

import pytest
import torch
from support.experts import tiny_experts, tiny_llama4
from support.models import saved_tiny_llama, token_batches
from torch import nn

from zssvd_lightning.app.cli import main
from zssvd_lightning.app.memory import (
    empty_model,
    extent_of_calibration,
    memory_needs,
    rate_of,
    take_modules_apart,
)
from zssvd_lightning.app.run_config import CalibrationConfig
from zssvd_lightning.calibration.contexts import gradients_only_at
from zssvd_lightning.compression.memory.needs import Formulas
from zssvd_lightning.compression.pipeline import calibrate
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.errors import ConfigError, ModelSourceError
from zssvd_lightning.model.targets import find_targets
from zssvd_lightning.sources.models import load_model_config, load_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    saved_tiny_llama(path)
    return path


def kept_for_backward(model, batch):
    """Bytes that autograd keeps of a real pass in which only targets get gradients, without weights and buffers."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with gradients_only_at(model, find_targets(model)), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False)
        return sum(storage.nbytes() for address, storage in storages.items() if address not in weights)


def test_sizes_of_an_empty_model_are_those_of_the_real_one(folder):
    model, batches = load_weights(str(folder)), token_batches(3, size=2, length=16)
    targets = find_targets(empty := empty_model(load_model_config(str(folder)), "float32"))
    assert all(parameter.is_meta for parameter in empty.parameters())
    extent = extent_of_calibration(empty, targets, CalibrationConfig(text="-", samples=6, length=16, batch_size=2))
    statistics = calibrate(model, batches, preset="zs-svd", progress=False)
    assert extent.shapes == {name: target.shape for name, target in find_targets(model).items()}
    assert extent.leaders == statistics.leaders
    assert extent.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert extent.whole_pass == pytest.approx(kept_for_backward(model, batches[0]), rel=0.2)  # with a mask
    assert 0 < extent.part_pass < extent.whole_pass
    assert extent.rows == dict.fromkeys(targets, 2 * 16)
    products = sum(2 * 32 * m * n for m, n in extent.shapes.values()) + 2 * 32 * model.lm_head.weight.numel()
    assert products <= extent.forward < 1.5 * products  # the rest is attention
    states = model(**batches[0], output_hidden_states=True).hidden_states
    assert extent.stored == 3 * sum(state.nbytes for state in states[:-1])
    layers = len(model.model.layers)
    assert [len(names) for names in extent.blocks] == [len(targets) // layers] * layers + [0]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "llama4"])
def test_stacked_experts_count_as_the_layers_that_they_become(family, caplog):
    torch.manual_seed(0)
    model = tiny_llama4() if family == "llama4" else tiny_experts(family)
    batches = token_batches(2, size=2, length=16)
    config = CompressionConfig.of("best", prune_ratio=0.3, corrections=0)
    empty = empty_model(model.config, "float32")
    take_modules_apart(empty, config)
    targets = find_targets(empty)
    extent = extent_of_calibration(empty, targets, CalibrationConfig(text="-", samples=4, length=16, batch_size=2))
    statistics = calibrate(model, batches, config, progress=False)
    assert not [record for record in caplog.records if "not counted" in record.message]
    assert list(targets) == statistics.watched
    assert extent.leaders == statistics.leaders
    assert extent.weights == sum(parameter.nbytes for parameter in model.parameters())
    formulas = Formulas(extent, config, config.budget_over(extent.shapes, {}, 0))
    every = (statistics.input_sums, statistics.output_sums, statistics.gradient_sums)
    held = {id(tensor): tensor.nbytes for sums in every for tensor in sums.values()}
    assert sum(held.values()) == formulas.second_moments(targets) + formulas.gradients(targets)
    experts = {name for name in targets if ".experts." in name}
    routed = sum(statistics.tokens[name] for name in experts & statistics.leaders.keys()) / len(batches)
    assert sum(extent.rows[name] for name in experts) == pytest.approx(routed)
    assert {extent.rows[name] for name in targets.keys() - experts} == {32}
    products = sum(2 * extent.rows[name] * m * n for name, (m, n) in extent.shapes.items())
    products += 2 * 32 * model.lm_head.weight.numel()
    assert products < extent.forward < 1.5 * products  # the rest is attention and routers


def test_experts_that_are_not_selected_count_as_weights():
    model = empty_model(tiny_experts().config, "float32")
    config = CompressionConfig.of("zs-svd", prune_ratio=0.3, ignore=["*.experts.*"])
    take_modules_apart(model, config)
    targets = find_targets(model, config.include, config.ignore)
    extent = extent_of_calibration(model, targets, CalibrationConfig(text="-", length=16))
    assert not any("experts" in name for name in (*targets, *extent.rows))


def test_a_model_that_does_not_run_without_weights_is_counted_without_activations(folder, caplog):
    model = empty_model(load_model_config(str(folder)), "float32")
    model.model.norm.register_forward_hook(lambda module, args, output: output * float(output.sum()))
    extent = extent_of_calibration(model, targets := find_targets(model), CalibrationConfig(text="-"))
    assert "activations are not counted" in caplog.text
    assert (extent.whole_pass, extent.part_pass, extent.stored) == (0, 0, 0)
    assert extent.leaders == {name: name for name in targets}
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_config_of_no_causal_language_model_is_refused():
    from transformers import ViTConfig

    with pytest.raises(ModelSourceError, match="no causal language model"):
        empty_model(ViTConfig(), "float32")


@pytest.mark.parametrize("file", ["", "config.json"])
def test_plan_shows_the_memory_and_writes_nothing(folder, file, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nn.Module, "load_state_dict", None)
    arguments = ["zssvd", "plan", str(folder / file), "--memory", "--json", "--flops", "1e9", "calibration.length=16"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    rows = json.loads(capsys.readouterr().out)["bytes"]
    assert [(row["preset"], row["memory"]) for row in rows] == [
        (preset, memory) for preset in ("best", "zs-svd") for memory in ("whole", "whole", "blocks", "whole")
    ]
    assert [row["offload"] for row in rows] == ["none", "cpu", "none", "disk"] * 2
    for whole, _, blocks, _ in (rows[:4], rows[4:]):
        assert blocks["work"]["passes"] > whole["work"]["passes"] > 0 < whole["hours"] < blocks["hours"]
        assert whole["hours"] == pytest.approx(sum(whole["work"].values()) / 1e9 / 3600)
        assert blocks["needs"]["device"] < whole["needs"]["device"]
        assert whole["needs"]["disk"] == 0 < blocks["needs"]["disk"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "options"), [([], {"preset": "mpifa"}), (["compression.offload=cpu"], {})], ids=["refit", "offload"]
)
def test_ways_that_blocks_do_not_have_are_left_out(folder, settings, options):
    rows = memory_needs(str(folder), [*settings, "calibration.length=16"], options)
    assert {row.memory for row in rows} == {"whole"}


def test_a_file_beside_the_memory_is_refused(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["zssvd", "plan", str(folder), "plan.yaml", "--memory"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "writes nothing" in capsys.readouterr().err


def test_plan_without_a_file_to_write_is_refused(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["zssvd", "plan", str(folder)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "--memory" in capsys.readouterr().err


def test_a_rate_is_given_or_measured():
    assert rate_of(5e12, None) == (5e12, "as given")
    rate, source = rate_of(None, "cpu")
    assert rate > 0
    assert source.startswith("measured")
    assert source.endswith("on cpu")
    with pytest.raises(ConfigError, match="flops"):
        rate_of(0.0, None)
