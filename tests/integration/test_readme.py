"""Every Python block of the README runs, in order, with a small model in place of the reader's own."""

import re
from pathlib import Path

import lightning as L
from support.models import CausalLM, loader, tiny_llama, token_batches

from zssvd_lightning import save_pretrained

README = Path(__file__).parents[2] / "README.md"


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return loader(token_batches(8))


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 3
    save_pretrained(tiny_llama(), tmp_path / "saved")
    names = {"module": CausalLM(), "datamodule": Data(), "model": tiny_llama(), "batches": token_batches()}
    names["folder"] = tmp_path / "saved"
    for block in blocks:
        exec(block, names)
    assert names["callback"].phase == "done"
    assert names["report"].reached >= 0.2


def test_commands_name_files_that_are_there():
    root = README.parent
    text = README.read_text() + (root / "docs" / "scaling.md").read_text()
    for path in re.findall(r"(?:configs|recipes)/[\w./-]+\.(?:yaml|py)", text):
        assert (root / path).is_file(), path
    targets = re.findall(r"^make (\w+)", text, re.MULTILINE)
    makefile = (root / "Makefile").read_text()
    assert targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
