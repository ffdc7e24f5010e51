import contextlib
import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import fresh
from support.models import (
    FAMILIES,
    VOCABULARY,
    logits,
    saved_tiny_llama,
    tiny_gpt2,
    tiny_llama,
    tiny_tokenizer,
    token_batches,
)
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
)

from zssvd_lightning import CompressionConfig, LowRankLinear, compress, from_pretrained, merge, save_pretrained
from zssvd_lightning.compression.report import read_report
from zssvd_lightning.errors import ConfigError, ModelSourceError, OutputError, SavedModelError
from zssvd_lightning.serialization.specs import rebuild, specs_of
from zssvd_lightning.sources.models import load_model


def tiny_opt():
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=VOCABULARY, num_attention_heads=4, max_position_embeddings=64, **sizes))


BUILDERS = {
    "tied llama": tiny_llama,
    "untied llama": lambda: tiny_llama(tie_word_embeddings=False),
    "gpt2": tiny_gpt2,
    "opt": tiny_opt,
    "llama with biases": lambda: tiny_llama(attention_bias=True, mlp_bias=True),
}
STORED = {
    "factors": CompressionConfig(0.3, corrections=0),
    "pivoted": CompressionConfig(0.3, corrections=0, storage="pivoted"),
    "remap": CompressionConfig(0.4, corrections=0, storage="remap"),
    "remap, loss-aware": CompressionConfig(0.4, corrections=0, storage="remap", rows_in_16_bits="loss_aware"),
    "hq": CompressionConfig(0.6, corrections=0, storage="hq"),
}


def compressed(build=tiny_llama, dtype=torch.float32, config=STORED["factors"]):
    model = AutoModelForCausalLM.from_config(build().config, dtype=dtype)  # .to(dtype) would round rotary frequencies
    compress(model, token_batches(), config, progress=False)
    return model.eval()


def edit_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", BUILDERS)
def test_reloaded_model_gives_equal_logits_also_after_saving_again(tmp_path, build, dtype):
    model = compressed(BUILDERS[build], dtype)
    save_pretrained(model, tmp_path / "one")
    first = from_pretrained(tmp_path / "one")
    assert torch.equal(logits(first), logits(model))
    assert specs_of(first) == specs_of(model)
    assert first.dtype == dtype
    save_pretrained(first, tmp_path / "two")
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "two", device_map="auto")
    assert torch.equal(logits(second), logits(model))
    assert any(isinstance(m, LowRankLinear) for m in second.modules())
    tied = second.config.tie_word_embeddings
    assert (second.get_output_embeddings().weight is second.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("stored", ["remap", "remap, loss-aware", "hq"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_8_bit_models_are_saved_in_8_bits_and_reloaded_to_equal_logits(tmp_path, build, stored):
    model = compressed(build, torch.bfloat16, STORED[stored])
    save_pretrained(model, tmp_path / "one")
    types = {
        str(value.dtype) for name, value in load_file(tmp_path / "one" / "model.safetensors").items() if "codes" in name
    }
    assert types == {"torch.int8"}
    first = from_pretrained(tmp_path / "one")
    assert torch.equal(logits(first), logits(model))
    first.save_pretrained(tmp_path / "two")
    assert torch.equal(logits(from_pretrained(tmp_path / "two")), logits(model))
    in_float32 = from_pretrained(tmp_path / "one", dtype="float32")
    torch.testing.assert_close(logits(in_float32), logits(model).float(), atol=0.05, rtol=0.1)


def test_plain_save_pretrained_of_transformers_writes_what_loading_takes(tmp_path):
    model = compressed()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "zssvd"
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def tiny_llava():
    text = tiny_llama().config
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=VOCABULARY - 1)
    )


@pytest.mark.parametrize("family", [*FAMILIES, "llava"])
def test_models_of_any_task_come_back_as_their_class(tmp_path, family):
    """Some of them have other names for layers on disk than in memory."""
    build, batches, _ = FAMILIES.get(family, (tiny_llava, token_batches, 0))
    model = build().eval()
    # tokens do not go through its vision tower
    include = [r"re:.*language_model.*_proj"] if family == "llava" else None
    compress(model, batches(), CompressionConfig(0.3, corrections=0, include=include), progress=False)
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert specs_of(again) == specs_of(model)
    with torch.no_grad():
        torch.testing.assert_close(again(**batches()[0]).logits, model(**batches()[0]).logits)


def test_a_model_is_loaded_without_its_head_or_with_one(tmp_path):
    model = compressed()
    save_pretrained(model, tmp_path / "whole")
    body, ids = AutoModel.from_pretrained(tmp_path / "whole"), token_batches(1)[0]["input_ids"]
    with torch.no_grad():
        hidden = body(input_ids=ids).last_hidden_state
        assert torch.equal(hidden, model.model(input_ids=ids).last_hidden_state)
    save_pretrained(body, tmp_path / "body")
    assert set(specs_of(AutoModelForCausalLM.from_pretrained(tmp_path / "body"))) == set(specs_of(model))
    save_pretrained(model.model, tmp_path / "part")
    model.save_pretrained(tmp_path / "after")
    assert torch.equal(logits(from_pretrained(tmp_path / "after")), logits(model))


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_types_are_told_in_any_way(tmp_path, name, dtype):
    save_pretrained(compressed(), tmp_path)
    assert from_pretrained(tmp_path, **{name: dtype}).dtype == torch.bfloat16
    assert from_pretrained(tmp_path, **{name: None}, use_cache=False).config.use_cache is False
    with pytest.raises(ConfigError, match="'bf16'"):
        from_pretrained(tmp_path, **{name: "bf16"})


def test_subclasses_are_saved_as_the_class_of_transformers_they_extend(tmp_path):
    class Mine(type(tiny_llama())):
        pass

    model = Mine(tiny_llama().config).eval()
    compress(model, token_batches(), CompressionConfig(0.3, corrections=0), progress=False)
    save_pretrained(model, tmp_path / "m")
    assert torch.equal(logits(from_pretrained(tmp_path / "m")), logits(model))
    model.config.__class__ = type("Config", (type(model.config),), {"model_type": "mine"})
    with pytest.raises(SavedModelError, match="does not know the model type 'mine'"):
        save_pretrained(model, tmp_path / "n")


def test_weights_in_several_files(tmp_path):
    model = compressed()
    save_pretrained(model, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(model))


def test_a_reloaded_model_is_cast_copied_and_pickled_like_any_other(tmp_path):
    save_pretrained(compressed(), tmp_path)
    model = from_pretrained(tmp_path)
    expected = logits(model)
    assert torch.equal(
        logits(copy.deepcopy(model).half().float().double().float()), logits(copy.deepcopy(model).half().float())
    )
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    config = pickle.loads(pickle.dumps(model.config))
    assert config.to_json_string() == model.config.to_json_string()
    assert config.model_type == "llama"
    assert not model.is_quantized


def test_merging_gives_an_ordinary_model(tmp_path):
    for name, config in STORED.items():
        model = compressed(tiny_gpt2, config=config)
        expected, folder = logits(model), tmp_path / name
        merge(model)
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
        assert {n for n, _ in model.named_parameters()} == {n for n, _ in tiny_gpt2().named_parameters()}
        save_pretrained(model, folder)
        assert "zssvd" not in (folder / "config.json").read_text()
        assert not (folder / "README.md").exists()
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))


FRESH = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
ids, folder, out = torch.load(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits
def failure(**options):
    try:
        AutoModelForCausalLM.from_pretrained(folder, **options)
    except ValueError as error:
        return str(error)
result = {"plain": failure(trust_remote_code=False)}
trusted = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
result["trusted"] = logits(trusted)
trusted.save_pretrained(out / "again")
result["again"] = logits(AutoModelForCausalLM.from_pretrained(out / "again", trust_remote_code=True))
assert "zssvd_lightning" not in sys.modules
import zssvd_lightning
result["with package"] = logits(zssvd_lightning.from_pretrained(folder))
result["automatic"] = logits(AutoModelForCausalLM.from_pretrained(folder))
torch.save(result, out / "result.pt")
"""


@pytest.mark.parametrize("stored", ["factors", "pivoted", "remap, loss-aware"])
def test_a_fresh_process_with_and_without_the_package(tmp_path, stored):
    """Without it, the folder says that its model type is not known, or is loaded by the code it carries."""
    model = compressed(config=STORED[stored])
    save_pretrained(model, tmp_path / "m", self_contained=True)
    torch.save(token_batches(1)[0]["input_ids"], tmp_path / "ids.pt")
    fresh.run(FRESH, tmp_path / "ids.pt", tmp_path / "m", tmp_path)
    result = torch.load(tmp_path / "result.pt")
    assert "trust_remote_code" in result.pop("plain")
    for how, found in result.items():
        assert torch.equal(found, logits(model)), how
    assert torch.equal(logits(from_pretrained(tmp_path / "again")), logits(model))


def test_a_folder_without_code_names_its_model_type_to_those_without_the_package(tmp_path):
    save_pretrained(compressed(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "zssvd"
    code = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    found = fresh.run(code, tmp_path, check=False)
    assert found.returncode != 0
    assert "model type `zssvd`" in found.stderr


def test_missing_weights_are_refused_by_name(tmp_path):
    model = compressed()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in weights if name.endswith("up.weight"))
    del weights[gone]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SavedModelError, match=gone):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_missing_dense_weights_are_refused_by_name(tmp_path):
    saved_tiny_llama(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SavedModelError, match=r"model\.norm\.weight"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("load", [from_pretrained, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied"])
def test_damaged_weights_are_refused(tmp_path, damage, load):
    save_pretrained(compressed(), tmp_path)
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes({"flipped": content, "truncated": content[: len(content) // 2], "emptied": b""}[damage])
    with pytest.raises(SavedModelError, match="is not the file that was saved"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"model_type": "zs'),
        ("config.json", None),
        ("model.safetensors.index.json", '{"weight_map"'),
        ("model.safetensors.index.json", None),
        ("model-00001-of-*", None),
    ],
)
def test_damaged_folders_are_refused(tmp_path, name, content):
    save_pretrained(compressed(), tmp_path, max_shard_size="20KB")
    (path,) = tmp_path.glob(name)
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(SavedModelError, match=str(tmp_path)):
        from_pretrained(tmp_path)


def test_a_truncated_file_without_a_digest_is_refused_too(tmp_path):
    compressed().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SavedModelError, match="cannot be read"):
        from_pretrained(tmp_path)


class Malice:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize("dense", [False, True])
def test_nothing_is_unpickled(tmp_path, dense):
    if dense:
        saved_tiny_llama(tmp_path)
    else:
        save_pretrained(compressed(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Malice()}, tmp_path / "pytorch_model.bin")
    with pytest.raises((SavedModelError, OSError)):
        from_pretrained(tmp_path)
    if not dense:
        with pytest.raises(SavedModelError, match="no safetensors file"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def changed(key, value):
    def change(config):
        layers = config["quantization_config"]["layers"]
        layers[next(iter(layers))][key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("rank", 999), r"should be .*999.*the folder does not hold the weights"),
        (changed("rank", "many"), "which is no such layer"),
        (changed("kind", "magic"), "'magic', but only low_rank"),
        (lambda c: c["quantization_config"].update(version=99), "upgrade zssvd-lightning"),
        (
            lambda c: c["quantization_config"]["layers"].update({"model.nowhere": {"kind": "int8"}}),
            "no linear layer there",
        ),
        (lambda c: c["quantization_config"].update(version="1"), "not as it was written"),
        (lambda c: c["quantization_config"].update(layers=[3]), "not as it was written"),
        (lambda c: c.pop("quantization_config"), "or no quantization_config"),
        (lambda c: c.pop("base_model_type"), "base_model_type None"),
        (lambda c: c.update(base_model_type="lama"), "base_model_type 'lama'"),
    ],
)
def test_changed_configs_are_refused(tmp_path, change, message):
    save_pretrained(compressed(), tmp_path)
    edit_config(tmp_path, change)
    with pytest.raises(SavedModelError, match=message):
        from_pretrained(tmp_path)


def test_layers_there_are_not():
    with pytest.raises(SavedModelError, match="no linear layer there"):
        rebuild(nn.Sequential(nn.ReLU()), {"0": {"kind": "low_rank", "rank": 3}})


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(SavedModelError, match=r"no folder .*nowhere, and no model of the hub can have this name"):
        from_pretrained(tmp_path / "nowhere")


def test_only_models_of_transformers_are_saved(tmp_path):
    with pytest.raises(SavedModelError, match="Sequential is no model of transformers"):
        save_pretrained(nn.Sequential(nn.Linear(3, 3)), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_saving_replaces_a_model_and_nothing_else(tmp_path):
    saved_tiny_llama(tmp_path / "dense")
    model = compressed()
    with pytest.raises(OutputError, match=r"config\.json.*did not write"):
        save_pretrained(model, tmp_path / "dense")
    assert not specs_of(from_pretrained(tmp_path / "dense"))
    save_pretrained(model, tmp_path / "m", tiny_tokenizer(), max_shard_size="20KB")
    save_pretrained(model, tmp_path / "m", tiny_tokenizer())
    assert torch.equal(logits(from_pretrained(tmp_path / "m")), logits(model))
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 1
    (tmp_path / "m" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"thesis\.tex"):
        save_pretrained(model, tmp_path / "m")
    assert (tmp_path / "m" / "thesis.tex").exists()


def test_a_model_card_tells_what_was_done(tmp_path):
    model = tiny_llama()
    report = compress(model, token_batches(), CompressionConfig(0.3, corrections=0), progress=False)
    report.config = {
        "model": {"source": "someone/tiny-llama"},
        "calibration": {"text": "package:speeches", "samples": 4, "correction_samples": 2, "length": 24, "seed": 0},
        "compression": {"selection": "zero_sum", "metric": "input", "corrections": 0},
        "evaluation": {"text": "held.txt", "windows": 2, "length": 24},
    }
    report.perplexity = {"dense": 20.0, "compressed": 25.125}
    report.word_perplexity = {"held.txt": {"dense": 90.0, "compressed": 99.0}}
    scores = {"acc": {"dense": 0.75, "compressed": 0.5}, "acc_stderr": {"dense": 0.125, "compressed": 0.0625}}
    report.accuracy = {"piqa": {"rows": 9, **scores}}
    save_pretrained(model, tmp_path / "mine", report=report)
    card = (tmp_path / "mine" / "README.md").read_text()
    for told in (
        "base_model: someone/tiny-llama",
        "# mine",
        "25.12",
        "20.00",
        "4 windows and 2 for corrections of 24 tokens of `package:speeches`",
        "held.txt",
        "| word perplexity of held.txt | 90.00 | 99.00 |",
        "| piqa, acc, 9 rows | 0.7500 ± 0.1250 | 0.5000 ± 0.0625 |",
        "value: 0.5\n",
        "as two factors",
    ):
        assert told in card, told


def test_a_report_without_perplexity_or_texts_makes_a_card_too(tmp_path):
    model = tiny_llama()
    report = compress(model, token_batches(), CompressionConfig(0.3, corrections=0), progress=False)
    save_pretrained(model, tmp_path / "one", report=report)
    report.perplexity, report.config = {"dense": 2.0, "compressed": 3.0}, {"model": {"source": "outputs/dense"}}
    (tmp_path / "outputs" / "dense").mkdir(parents=True)
    with contextlib.chdir(tmp_path):
        save_pretrained(model, "two", report=report, self_contained=True)
    card = (tmp_path / "two" / "README.md").read_text()
    assert "3.00" in card
    assert "base_model" not in card
    assert "trust_remote_code" in card
    assert read_report(tmp_path / "two").reached == report.reached


def test_dense_folders_load_too(tmp_path):
    folder = saved_tiny_llama(tmp_path / "dense")
    model, tokenizer = load_model(str(folder))
    assert not specs_of(model)
    assert tokenizer("ab").input_ids == [67, 68]
    assert model.dtype == torch.float32


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("package:no-such-package", "not installed"),
        ("package:torchmetrics", r"0 \.gguf files"),
        ("./nowhere", r"there is no folder \./nowhere; name"),
        (".", r"model folder \. has no config\.json"),
        ("nobody/no-such-model", "(?s)'nobody/no-such-model', which is no folder here: .* Sources are package:NAME"),
    ],
)
def test_unknown_models_say_what_there_is(source, message):
    with pytest.raises(ModelSourceError, match=message):
        load_model(source)
