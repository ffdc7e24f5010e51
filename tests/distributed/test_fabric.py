"""The loops of the documentation without a Trainer, on two processes: with Fabric, and with torch alone."""

import os
import re
from pathlib import Path

import torch
from support import processes
from support.models import tiny_llama, tiny_tokenizer, token_batches

from zssvd_lightning import compress, from_pretrained, save_pretrained
from zssvd_lightning.serialization.specs import ranks_of

PAGE = Path(__file__).parents[2] / "docs" / "start" / "without_trainer.md"
NAME = "HuggingFaceTB/SmolLM2-135M"


def loop(rank, size, folder, block):
    os.chdir(folder)
    torch.manual_seed(rank)
    names = {
        "torch": torch,
        "compress": compress,
        "from_pretrained": from_pretrained,
        "save_pretrained": save_pretrained,
        "tokenizer": tiny_tokenizer(),
        "batches": token_batches(8)[rank::size],
    }
    exec(compile(block, str(PAGE), "exec"), names)
    model = names["model"].module
    torch.save({"ranks": ranks_of(model), "weights": model.state_dict()}, f"{rank}.pt")


def own_loop(rank, size, folder, block):
    os.chdir(folder)
    os.environ["RANK"] = str(rank)
    torch.manual_seed(rank)
    names = {"torch": torch, "compress": compress, "from_pretrained": from_pretrained, "batches": token_batches(8)}
    exec(compile(block, str(PAGE), "exec"), names)
    found = {"ranks": ranks_of(names["model"]), "losses": names["report"].losses, "size": names["size"]}
    torch.save(found | {"weights": names["model"].state_dict()}, f"{rank}.pt")


def block_with(words):
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if words in block)
    return block


def test_processes_of_ones_own_compress_together(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / NAME)
    processes.check(tmp_path, processes.start(tmp_path, 2, own_loop, block_with("init_process_group")))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["size"] == 2
    assert first["ranks"] == second["ranks"]
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    report = compress(model, token_batches(8), prune_ratio=0.2, corrections=0, progress=False)
    torch.testing.assert_close(first["losses"][0], report.losses[0], rtol=1e-5, atol=0)
    assert first["losses"] == second["losses"]


def test_all_processes_train_the_same_compressed_model(tmp_path):
    block = block_with("Fabric(")
    on_two = block.replace("devices=1", 'devices=2, strategy="ddp"')
    assert on_two != block
    tiny_llama().save_pretrained(tmp_path / NAME)
    processes.check(tmp_path, processes.start(tmp_path, 2, loop, on_two))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    start = from_pretrained(tmp_path / "small-for-fabric").state_dict()
    assert first["ranks"] == second["ranks"]
    assert any(rank is not None for rank in first["ranks"].values())
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    assert any(not torch.equal(value, start[name]) for name, value in first["weights"].items())
