"""Folders that carry their code, where this package is not installed."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import fresh
from support.experts import experts_in, tiny_experts
from support.many_classes import CLASSES, built, factored
from support.models import tiny_llama, tiny_tokenizer, token_batches

from zssvd_lightning import compress, save_pretrained
from zssvd_lightning.layers.experts import is_stacked

OF_PROCESSES = {"LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
"""Environment variables that a Trainer of another test leaves, and that make a process one of several."""


EVALUATED = """
import sys
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
model = HFLM(pretrained=sys.argv[1], trust_remote_code=True, device="cpu", batch_size=1, max_length=32)
requests = [Instance("loglikelihood", {}, ("ab", "cd"), 0)]
((likelihood, _),) = model.loglikelihood(requests, disable_tqdm=True)
assert "zssvd_lightning" not in sys.modules
print("RESULT", likelihood)
"""


def test_lm_eval_evaluates_one_and_no_advice_would_break_it(tmp_path):
    pytest.importorskip("lm_eval")
    model, tokenizer = tiny_llama().eval(), tiny_tokenizer()
    factored(model)
    tokenizer.eos_token = "~"
    save_pretrained(model, tmp_path, tokenizer, self_contained=True)
    alone = {name: value for name, value in os.environ.items() if name not in OF_PROCESSES}
    found = fresh.run(EVALUATED, tmp_path, environment=alone)
    ids = torch.tensor([tokenizer("abcd").input_ids])
    with torch.no_grad():
        scores = model(input_ids=ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])
    assert float(found.stdout.split("RESULT")[1]) == pytest.approx(float(scores[0, 1:].sum()), abs=1e-4)
    for advice in ("Unknown quantization", "remove the warning", "quantization_config"):
        assert advice not in found.stdout + found.stderr


OTHER_CLASSES = """
import sys, torch, transformers
inputs, folder, auto, out = torch.load(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    torch.save([model.state_dict(), model(**inputs)[0]], out)
assert "zssvd_lightning" not in sys.modules
"""


@pytest.mark.parametrize(
    ("name", "form", "automatic"),
    [
        ("WhisperForConditionalGeneration", "low_rank", "AutoModelForSpeechSeq2Seq"),
        ("Wav2Vec2ForCTC", "int8", "AutoModelForCTC"),
        ("T5EncoderModel", "pivoted", "AutoModelForTextEncoding"),
    ],
)
def test_models_of_other_classes(tmp_path, name, form, automatic):
    model, inputs = built(name), CLASSES[name][1]
    factored(model, form)
    save_pretrained(model, tmp_path / "m", self_contained=True)
    torch.save(inputs, tmp_path / "inputs.pt")
    arguments = [tmp_path / "inputs.pt", tmp_path / "m", automatic, tmp_path / "out.pt"]
    fresh.run(OTHER_CLASSES, *arguments)
    weights, output = torch.load(tmp_path / "out.pt")
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]), key
    with torch.no_grad():
        torch.testing.assert_close(output, model(**inputs)[0])


DAMAGED = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
except ValueError as error:
    print("REFUSED", error)
"""


@pytest.mark.parametrize("damage", ["missing", "NaN", "a layer less"])
def test_damaged_ones_are_refused_by_the_code_they_carry(tmp_path, damage):
    model = tiny_llama().eval()
    factored(model)
    save_pretrained(model, tmp_path, self_contained=True)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.norm.weight"
    if damage == "missing":
        del weights[name]
    elif damage == "NaN":
        name = next(key for key in weights if key.endswith("up.weight"))
        weights[name][0] = torch.nan
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        name, _ = config["quantization_config"]["layers"].popitem()
        (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    found = fresh.run(DAMAGED, tmp_path)
    assert "REFUSED" in found.stdout
    assert name.removesuffix(".up.weight") in found.stdout


def test_one_saved_from_a_subclass_names_the_class_it_extends(tmp_path):
    class Mine(type(tiny_llama())):
        pass

    model = Mine(tiny_llama().config).eval()
    factored(model)
    save_pretrained(model, tmp_path, self_contained=True)
    torch.save({"input_ids": token_batches(1)[0]["input_ids"]}, tmp_path.with_suffix(".pt"))
    arguments = [tmp_path.with_suffix(".pt"), tmp_path, "AutoModelForCausalLM", tmp_path.with_suffix(".out")]
    fresh.run(OTHER_CLASSES, *arguments)


@pytest.mark.parametrize(
    ("family", "include"),
    [("qwen3_moe", ["layers.1.*.experts.[01].*", "q_proj"]), ("gpt_oss", None), ("mixtral", ["q_proj", "o_proj"])],
)
def test_experts_in_part_as_a_whole_and_not_at_all(tmp_path, family, include):
    torch.manual_seed(0)
    model, batch = tiny_experts(family), token_batches(1)[0]
    settings = {"preset": "best", "corrections": 0, "progress": False, "include": include}
    compress(model, token_batches(), prune_ratio=0.5, **settings)
    assert [is_stacked(module) for module in experts_in(model)] == {
        "qwen3_moe": [True, False],
        "gpt_oss": [False, False],
        "mixtral": [True, True],
    }[family]
    save_pretrained(model, tmp_path / "m", self_contained=True)
    inputs = {"input_ids": batch["input_ids"]}
    torch.save(inputs, tmp_path / "inputs.pt")
    arguments = [tmp_path / "inputs.pt", tmp_path / "m", "AutoModelForCausalLM", tmp_path / "out.pt"]
    fresh.run(OTHER_CLASSES, *arguments)
    weights, output = torch.load(tmp_path / "out.pt")
    assert weights.keys() == model.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(output, model(**inputs).logits)
