import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import (
    saved_tiny_llama,
    tiny_gpt2,
    tiny_llama,
    token_batches,
)
from torch import nn
from transformers import AutoModelForCausalLM

from zssvd_lightning import CompressionConfig, LowRankLinear, compress, from_pretrained, save_pretrained
from zssvd_lightning.errors import ModelSourceError, SavedModelError
from zssvd_lightning.models import load_model
from zssvd_lightning.structure import ranks_of, rebuild

BUILDERS = {
    "tied llama": tiny_llama,
    "untied llama": lambda: tiny_llama(tie_word_embeddings=False),
    "gpt2": tiny_gpt2,
    "llama with biases": lambda: tiny_llama(attention_bias=True, mlp_bias=True),
}


def compressed(build=tiny_llama, dtype=torch.float32):
    config = build().config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    compress(model, token_batches(), CompressionConfig(0.3, corrections=0), progress=False)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=token_batches(1)[0]["input_ids"]).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", BUILDERS)
def test_reloaded_model_gives_equal_logits_also_after_saving_again(tmp_path, build, dtype):
    model = compressed(BUILDERS[build], dtype)
    save_pretrained(model, tmp_path / "one")
    first = from_pretrained(tmp_path / "one")
    assert torch.equal(logits(first), logits(model))
    assert ranks_of(first) == ranks_of(model)
    save_pretrained(first, tmp_path / "two")
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert torch.equal(logits(second), logits(model))
    assert any(isinstance(m, LowRankLinear) for m in second.modules())


def test_a_fresh_process_reads_it(tmp_path):
    model = compressed()
    save_pretrained(model, tmp_path / "m")
    code = (
        "import sys, torch; from zssvd_lightning import from_pretrained; from support.models import token_batches\n"
        "with torch.no_grad(): out = from_pretrained(sys.argv[1])(input_ids=token_batches(1)[0]['input_ids']).logits\n"
        "torch.save(out, sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "m"), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, cwd="tests")
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model))


def test_missing_weights_are_refused_by_name(tmp_path):
    save_pretrained(compressed(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in weights if name.endswith("up.weight"))
    del weights[gone]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SavedModelError, match=gone):
        from_pretrained(tmp_path)


def test_changed_ranks_are_refused(tmp_path):
    save_pretrained(compressed(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    name = next(iter(config["quantization_config"]["ranks"]))
    config["quantization_config"]["ranks"][name] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SavedModelError, match=name):
        from_pretrained(tmp_path)


def test_a_newer_format_is_refused(tmp_path):
    save_pretrained(compressed(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["version"] = 99
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SavedModelError, match="upgrade zssvd-lightning"):
        from_pretrained(tmp_path)


def test_ranks_of_layers_there_are_not():
    with pytest.raises(SavedModelError, match="no linear layer there"):
        rebuild(nn.Sequential(nn.ReLU()), {"0": 3})


def test_dense_folders_load_too(tmp_path):
    folder = saved_tiny_llama(tmp_path / "dense")
    model, tokenizer = load_model(str(folder))
    assert not ranks_of(model)
    assert tokenizer("ab").input_ids == [67, 68]
    assert model.dtype == torch.float32


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("package:no-such-package", "not installed"),
        ("package:torchmetrics", r"0 \.gguf files"),
        ("./nowhere", r"no config\.json"),
        ("nobody/no-such-model", "Sources are package:NAME"),
    ],
)
def test_unknown_models_say_what_there_is(source, message):
    with pytest.raises(ModelSourceError, match=message):
        load_model(source)
