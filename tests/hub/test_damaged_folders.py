"""Folders whose files are not as they were written are refused by name, whoever loads them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.many_classes import built, factored
from support.models import tiny_llama
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from zssvd_lightning import from_pretrained, save_pretrained
from zssvd_lightning.compression.report import read_report
from zssvd_lightning.errors import SavedModelError
from zssvd_lightning.serialization.integrity import digest
from zssvd_lightning.serialization.specs import specs_of

LOADERS = [from_pretrained, AutoModelForCausalLM.from_pretrained, AutoModel.from_pretrained]


def saved(folder, form="low_rank", **options):
    model = tiny_llama(tie_word_embeddings=False).eval()
    factored(model, form)
    save_pretrained(model, folder, **options)
    return model


def edit_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_weights(folder, change):
    """Change the weights, and make their digest anew."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})
    edit_config(folder, lambda config: config["quantization_config"].update(files={path.name: digest(path)}))


def layers_of(config):
    return config["quantization_config"]["layers"]


LISTS = {
    "null": (lambda c: c["quantization_config"].update(layers=None), "names no layer"),
    "empty": (lambda c: c["quantization_config"].update(layers={}), "names no layer"),
    "one removed": (lambda c: layers_of(c).pop("model.layers.0.mlp.up_proj"), r"layers\.0\.mlp\.up_proj\.weight"),
    "last removed": (lambda c: layers_of(c).popitem(), r"layers\.\d.*weight.* missing"),
    "a list": (lambda c: c.update(quantization_config=["zssvd"]), "no quantization_config"),
    "a kind that is a list": (lambda c: layers_of(c).update({"model.layers.0.mlp.up_proj": {"kind": []}}), r"as \[\]"),
    "a rank below 0": (lambda c: layers_of(c)["model.layers.0.mlp.up_proj"].update(rank=-3), "no such layer"),
    "a rank that is NaN": (
        lambda c: layers_of(c)["model.layers.0.mlp.up_proj"].update(rank=float("nan")),
        "no such layer",
    ),
    "a rank beyond memory": (lambda c: layers_of(c)["model.layers.0.mlp.up_proj"].update(rank=2**70), "no such layer"),
    "digests in a list": (lambda c: c["quantization_config"].update(files=["a"]), "not as it was written"),
    "version true": (lambda c: c["quantization_config"].update(version=True), "not as it was written"),
    "base type in a list": (lambda c: c.update(base_model_type=["llama"]), "base_model_type"),
}


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("case", LISTS)
def test_configs_that_do_not_match_the_weights(tmp_path, case, load):
    change, message = LISTS[case]
    saved(tmp_path)
    edit_config(tmp_path, change)
    with pytest.raises(SavedModelError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    "gone", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.up.weight"]
)
def test_weights_that_are_missing(tmp_path, gone, load):
    saved(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.pop(gone))
    with pytest.raises(SavedModelError, match=gone.removeprefix("model.").replace(".", r"\.")):
        load(tmp_path)


def test_a_head_that_is_missing_is_refused_for_the_saved_class_and_new_for_another(tmp_path):
    model = saved(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.pop("lm_head.weight"))
    for load in LOADERS[:2]:
        with pytest.raises(SavedModelError, match=r"lm_head\.weight"):
            load(tmp_path)
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert specs_of(other) == specs_of(model)
    assert torch.equal(other.model.norm.weight, model.model.norm.weight)


def test_buffers_that_are_missing(tmp_path):
    model = built("SegformerForSemanticSegmentation")
    factored(model)
    save_pretrained(model, tmp_path)
    buffer = next(name for name, value in model.named_buffers() if name.endswith("running_mean"))
    edit_weights(tmp_path, lambda weights: weights.pop(buffer))
    with pytest.raises(SavedModelError, match=r"running_mean"):
        from_pretrained(tmp_path)


def first(weights, end):
    return next(name for name in weights if name.endswith(end))


def put(end, change):
    def edit(weights):
        name = first(weights, end)
        weights[name] = change(weights[name].clone())

    return edit


def with_value(index, value):
    def change(values):
        values.view(-1)[index] = value
        return values

    return change


IMPOSSIBLE = {
    "a row twice": ("pivoted", put(".order", with_value(0, 1)), "order is no permutation"),
    "a row out of range": ("pivoted", put(".order", with_value(0, 10**6)), "order is no permutation"),
    "a row below 0": ("pivoted", put(".order", with_value(3, -1)), "order is no permutation"),
    "an order of another type": ("pivoted", put(".order", torch.Tensor.float), "order should be .*I32"),
    "NaN factors": ("low_rank", put("up.weight", with_value(5, float("nan"))), "NaN or infinite"),
    "infinite pivots": ("pivoted", put("pivots.weight", with_value(5, float("inf"))), "NaN or infinite"),
    "integer factors": ("low_rank", put("down.weight", torch.Tensor.int), "down.weight should be "),
    "a NaN norm": ("low_rank", put("norm.weight", with_value(2, float("nan"))), "norm.weight is float32 with"),
    "an integer norm": ("low_rank", put("norm.weight", torch.Tensor.long), "norm.weight is int64 with"),
    "outputs in no order": ("int8", put("out_order", with_value(0, 1)), "out_order is no permutation"),
    "scales of 0": ("int8", put(".scale", with_value(0, 0)), "not positive"),
    "scales that are NaN": ("int8", put(".scale", with_value(0, float("nan"))), "NaN or infinite"),
    "codes there are not": ("int8", put("up_codes", with_value(0, -128)), "codes below -127"),
    "codes of another type": ("int8", put("down_codes", torch.Tensor.float), "down_codes should be .*I8"),
    "factors of another shape": ("low_rank", put("up.weight", lambda value: value[:-1]), "up.weight should be"),
}


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_values_that_cannot_be(tmp_path, case, load):
    form, change, message = IMPOSSIBLE[case]
    saved(tmp_path, form)
    edit_weights(tmp_path, change)
    with pytest.raises(SavedModelError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("form", ["low_rank", "pivoted", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_that_can_be_load_in_every_type(tmp_path, form, dtype):
    saved(tmp_path, form)
    assert from_pretrained(tmp_path, dtype=dtype).dtype == getattr(torch, dtype)


JSON = {
    "a list": b"[1, 2]",
    "a number": b"3",
    "null": b"null",
    "cut short": b'{"weight_map": {"a":',
    "not UTF-8": '{"metadata": "é"}'.encode("latin-1"),
    "UTF-16": "{}".encode("utf-16"),
    "empty": b"",
    "NaN": b"NaN",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", JSON)
def test_files_that_are_no_maps(tmp_path, name, content, dense):
    if dense:
        tiny_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    else:
        saved(tmp_path, max_shard_size="20KB")
    (tmp_path / name).write_bytes(JSON[content])
    with pytest.raises(SavedModelError, match=name):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("content", JSON)
def test_reports_that_are_none(tmp_path, content):
    (tmp_path / "report.json").write_bytes(JSON[content])
    with pytest.raises(SavedModelError, match=r"report\.json is no report"):
        read_report(tmp_path)


def test_reports_with_values_of_other_types_name_the_key(tmp_path):
    (tmp_path / "report.json").write_text('{"prune_ratio": {"asked": NaN, "reached": 0.2}}')
    with pytest.raises(SavedModelError, match=r"prune_ratio\.asked is nan, but must be a finite number"):
        read_report(tmp_path)


INDEXES = {
    "no map of weights": ({"metadata": {}}, "weight_map"),
    "a list of weights": ({"metadata": {}, "weight_map": ["a"]}, "weight_map"),
    "no weights": ({"metadata": {}, "weight_map": {}}, "weight_map"),
    "no metadata": ({"weight_map": {"a": "b"}}, "metadata"),
    "metadata in a list": ({"metadata": [], "weight_map": {"a": "b"}}, "metadata"),
    "a file that is a number": ({"metadata": {}, "weight_map": {"a": 3}}, "has a in 3"),
    "a file elsewhere": ({"metadata": {}, "weight_map": {"a": "../b.safetensors"}}, "no file of the folder"),
    "a file there is not": ({"metadata": {}, "weight_map": {"a": "b.safetensors"}}, "no file of the folder"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_indexes_of_shards(tmp_path, case):
    index, message = INDEXES[case]
    saved(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SavedModelError, match=f"index.json.*{message}"):
        from_pretrained(tmp_path)
