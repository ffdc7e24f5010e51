"""Every Python block of the README runs, in order, with a small model in place of the reader's own."""

import re
from pathlib import Path

import lightning as L
from support.models import CausalLM, loader, tiny_llama, tiny_tokenizer, token_batches

README = Path(__file__).parents[2] / "README.md"


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return loader(token_batches(8))


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 3
    names = {"module": CausalLM(), "datamodule": Data(), "model": tiny_llama(), "batches": token_batches()}
    names["tokenizer"] = tiny_tokenizer()
    for block in blocks:
        exec(block, names)
    assert names["callback"].phase == "done"
    assert names["report"].reached >= 0.2
    assert (tmp_path / "mine" / "README.md").is_file()


def test_commands_name_files_that_are_there():
    root = README.parent
    text = "".join(path.read_text() for path in (README, *(root / "docs").glob("*.md")))
    for path in re.findall(r"(?:configs|recipes)/[\w./-]+\.(?:yaml|py)", text):
        assert (root / path).is_file(), path
    targets = re.findall(r"^make (\w+)", text, re.MULTILINE)
    makefile = (root / "Makefile").read_text()
    assert targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
