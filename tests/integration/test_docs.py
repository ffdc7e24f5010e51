"""Every Python block of the pages for users runs, in order, with tiny models in the folders that the pages name."""

import os
import re
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from support.models import CausalLM, loader, tiny_llama, tiny_tokenizer, tiny_vit, token_batches
from support.processes import free_port
from transformers import BertConfig, BertForSequenceClassification

from zssvd_lightning.layers.base import CompressedLinear

DOCS = Path(__file__).parents[2] / "docs"
TESTED_ELSEWHERE = {"deployment.md", "lifecycle.md", "recovery.md", "scaling.md", "extending.md", "kv_cache.md"}
"""Pages whose blocks have tests of their own."""

TEXT = "The sea is wide, and the ship is small. " * 8


def blocks_of(page):
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def tiny_bert_with_head():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return BertForSequenceClassification(BertConfig(vocab_size=97, max_position_embeddings=128, num_labels=2, **sizes))


def saved(name, model):
    """Save a tiny model in a folder with the name of one on the hub."""
    model.save_pretrained(name)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<unk>", "eos_token": "\n"})
    tokenizer.save_pretrained(name)


def a_language_model(texts):
    saved("HuggingFaceTB/SmolLM2-135M", tiny_llama(max_position_embeddings=512))
    return {"texts": [TEXT[i % 7 :] for i in range(texts)]}


def an_image_model():
    saved("google/vit-base-patch16-224", tiny_vit())
    return {"loader": [(torch.randn(6, 3, 16, 16), torch.randint(5, (6,))) for _ in range(6)]}


def an_encoder():
    saved("google-bert/bert-base-uncased", tiny_bert_with_head())
    return {"texts": [TEXT[: 20 + i] for i in range(32)], "labels": torch.randint(2, (32,))}


def a_module():
    return {"module": CausalLM(), "datamodule": loader(token_batches(24))}


def rows_of_data():
    data = [{"input_ids": row, "labels": row} for row in token_batches(1, size=512, length=8)[0]["input_ids"]]
    return {"model": tiny_llama(), "data": data}


def a_model():
    return {"model": tiny_llama(), "batches": token_batches(8)}


NAMES = {
    "index.md": a_module,
    "start/trainer.md": lambda: a_language_model(70),
    "transformers_trainer.md": rows_of_data,
    "start/without_trainer.md": lambda: a_language_model(12),
    "start/vision.md": an_image_model,
    "start/encoder.md": an_encoder,
    "start/several_gpus.md": a_module,
    "attention.md": dict,
    "choose.md": a_model,
    "narrow.md": a_model,
    "troubleshooting.md": a_model,
}
"""What each page takes for granted: the names of the reader's own objects."""


def compressed(model):
    return any(isinstance(layer, CompressedLinear) for layer in model.modules())


@contextmanager
def as_a_process_of_its_own():
    """Undo what a Trainer with `strategy="ddp"` sets up for the whole process."""
    try:
        with patch.dict(os.environ):
            yield
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", NAMES)
def test_blocks_run_in_order(tmp_path, monkeypatch, capsys, page):
    monkeypatch.chdir(tmp_path)
    names = NAMES[page]()
    if page == "start/without_trainer.md":  # as torchrun says it to one process
        told = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for name, value in told.items():
            monkeypatch.setenv(name, value)
    with as_a_process_of_its_own():
        for number, block in enumerate(blocks_of(page), 1):
            exec(compile(block, f"{page}, block {number}", "exec"), names)
    if page == "troubleshooting.md":
        assert "ConfigError prune_ratio is 1.5" in capsys.readouterr().out
    else:
        assert compressed(names["module"].model if "module" in names else names.get("small", names["model"]))
    if "report" in names:
        assert names["report"].reached >= names["report"].asked


def test_every_page_with_python_has_its_names():
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert {page for page in pages if blocks_of(page)} == NAMES.keys() | TESTED_ELSEWHERE
