"""Every Python block of the README runs, in order, with a small model in place of the reader's own."""

import ast
import re
from pathlib import Path

import lightning as L
import pytest
from support.models import CausalLM, loader, tiny_llama, tiny_tokenizer, token_batches

README = Path(__file__).parents[2] / "README.md"
PAGES = sorted((README.parent / "docs").glob("*.md"))


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_of_the_docs_compile_and_import_what_there_is(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        tree = ast.parse(block)
        imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
        exec(compile(ast.Module(imports, []), str(page), "exec"), {})


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.name)
def test_links_lead_to_files_that_are_there(page):
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link
