"""Compressed folders in vLLM against the same folders in transformers: equal probabilities, equal continuations."""

import json
import os
import subprocess
import sys

import pytest
import torch
from support.models import tiny_gpt2, tiny_llama, token_batches
from torch import nn
from transformers.pytorch_utils import Conv1D

from zssvd_lightning import CompressionConfig, compress, from_pretrained, save_pretrained
from zssvd_lightning.errors import SavedModelError, UnsupportedServingError
from zssvd_lightning.layers.int8 import Int8Linear, Int8LowRankLinear
from zssvd_lightning.layers.low_rank import LowRankLinear
from zssvd_lightning.model.replace import replace_module
from zssvd_lightning.serialization.specs import specs_of

pytest.importorskip("vllm")

NEW = 12
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "initializer_range": 0.3}
"""Heads as vLLM has them on CPU, and weights large enough to tell tokens apart."""
BUILDERS = {
    "llama": lambda: tiny_llama(attention_bias=True, mlp_bias=True, **WIDE),
    "one key": lambda: tiny_llama(num_key_value_heads=1, **WIDE),
    "gpt2": lambda: tiny_gpt2(n_embd=64, n_head=2, initializer_range=0.3),
}
SERVE = """
import json, sys
from vllm import LLM, SamplingParams
prompts, new, processes = json.loads(sys.argv[2])
llm = LLM(
    sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=2, skip_tokenizer_init=True,
    tensor_parallel_size=processes,
)
sampling = SamplingParams(temperature=0, max_tokens=new, prompt_logprobs=0, ignore_eos=True, detokenize=False)
with open(sys.argv[3], "w") as file:
    answers = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
    json.dump([
        [[p[i].logprob for i, p in zip(a.prompt_token_ids[1:], a.prompt_logprobs[1:])], list(a.outputs[0].token_ids)]
        for a in answers
    ], file)
"""


def saved(build, folder, *, mixed):
    model = BUILDERS[build]()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    compress(model, token_batches(), CompressionConfig(0.3, corrections=0), progress=False)
    if mixed:
        in_8_bits(model)
    save_pretrained(model, folder)
    return specs_of(model)


def in_8_bits(model):
    """Every second layer, and every second dense one."""
    low_rank = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    factors = {factor for layer in low_rank for factor in layer.children()} | {model.get_output_embeddings()}
    dense = [m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D)) and m not in factors]
    for layer in low_rank[::2]:
        chosen = [torch.rand(size) < 0.2 for size in (layer.out_features, layer.in_features)]
        replace_module(model, layer, Int8LowRankLinear.of(layer, *chosen))
    for layer in dense[::2]:
        replace_module(model, layer, Int8Linear.of(layer))


def served(folder, prompts, processes):
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    if processes > 1 and not torch.cuda.is_available():
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(processes)))
    answers = folder.with_suffix(".json")
    arguments = [str(folder), json.dumps([prompts, NEW, processes]), str(answers)]
    subprocess.run([sys.executable, "-c", SERVE, *arguments], check=True, env=environment, timeout=300)
    return json.loads(answers.read_text())


def expected(folder, prompt):
    model, tokens = from_pretrained(folder).eval(), list(prompt)
    with torch.no_grad():
        while len(tokens) < len(prompt) + NEW:
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        scores = model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
    return scores[torch.arange(len(prompt) - 1), prompt[1:]], tokens[len(prompt) :]


@pytest.mark.parametrize(
    ("build", "mixed", "processes"),
    [("llama", True, 1), ("gpt2", True, 1), ("llama", False, 2), ("one key", False, 2)],
)
def test_vllm_answers_as_transformers_does(tmp_path, build, mixed, processes):
    if processes > max(torch.cuda.device_count(), 0 if torch.cuda.is_available() else os.cpu_count()):
        pytest.skip("needs more devices")
    folder = tmp_path / "compressed"
    kinds = {spec["kind"] for spec in saved(build, folder, mixed=mixed).values()}
    assert len(kinds) == (3 if mixed else 1)
    prompts = token_batches(1, size=2, length=20)[0]["input_ids"].tolist()
    for prompt, (scores, tokens) in zip(prompts, served(folder, prompts, processes), strict=True):
        wanted_scores, wanted_tokens = expected(folder, prompt)
        torch.testing.assert_close(torch.tensor(scores), wanted_scores, rtol=0, atol=1e-4)
        assert tokens == wanted_tokens


@pytest.mark.parametrize("entry", [{"version": 99}, {"layers": {"h.0": {"kind": "tensor_train"}}}])
def test_folders_of_another_release_are_refused(entry):
    from zssvd_lightning.serving.vllm import ServedLayers

    with pytest.raises(SavedModelError, match="upgrade zssvd-lightning"):
        ServedLayers.from_config({"version": 1, "layers": {}} | entry)


@pytest.mark.parametrize("name", ["lm_head", "h.0.experts.3.up_proj"])
def test_layers_that_are_not_linear_in_vllm_are_refused(name):
    from zssvd_lightning.serving.vllm import ServedLayers

    served_layers = ServedLayers({name: {"kind": "low_rank", "rank": 3}})
    assert served_layers.get_quant_method(nn.Embedding(3, 3), "h.0.attn") is None
    with pytest.raises(UnsupportedServingError, match=name):
        served_layers.get_quant_method(nn.Embedding(3, 3), name.removesuffix(".3.up_proj"))
