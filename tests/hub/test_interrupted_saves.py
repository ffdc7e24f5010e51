"""Saves that are killed, or for which the disk is too small, in processes of their own."""

import signal

import pytest
import torch
from support import fresh
from support.models import logits, tiny_llama, token_batches

from zssvd_lightning import CompressionConfig, compress, from_pretrained, save_pretrained

SAVE = """
import os, resource, signal, sys
from pathlib import Path
import safetensors.torch, transformers.modeling_utils as modeling
from zssvd_lightning import from_pretrained, save_pretrained
from zssvd_lightning import _files as files
folder, how = sys.argv[1:]
model = from_pretrained(folder)
for parameter in model.parameters():
    parameter.data.zero_()
tokenizer = None
if how.endswith("tokenizer"):
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=3, **size))
    words = {f"word{i}": i for i in range(5000)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="word0")))
if how.startswith("full disk"):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
elif how == "killed while writing":
    save = modeling.safe_save_file
    def kill(*args, **kwargs):
        save(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    modeling.safe_save_file = kill
else:
    exchange = files._exchange
    def kill(*args):
        if how == "killed after the exchange":
            exchange(*args)
        os.kill(os.getpid(), signal.SIGKILL)
    files._exchange = kill
save_pretrained(model, folder, tokenizer)
"""


@pytest.fixture(scope="module")
def model():
    model = tiny_llama()
    compress(model, token_batches(), CompressionConfig(0.3, corrections=0), progress=False)
    return model.eval()


@pytest.mark.parametrize(
    "how",
    [
        "full disk",
        "full disk for the tokenizer",
        "killed while writing",
        "killed before the exchange",
        "killed after the exchange",
    ],
)
def test_the_folder_is_whole_whenever_a_save_ends(tmp_path, model, how):
    folder = tmp_path / "m"
    save_pretrained(model, folder)
    ended = fresh.run(SAVE, folder, how, check=False)
    found = logits(from_pretrained(folder))
    if how.startswith("full disk"):
        assert ended.returncode == 1
        assert "OutputError: cannot write" in ended.stderr
        assert "what was there before is untouched" in ended.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["m"]
    else:
        assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert torch.equal(found, torch.zeros_like(found) if how.endswith("after the exchange") else logits(model))
    save_pretrained(model, folder)
    assert torch.equal(logits(from_pretrained(folder)), logits(model))
