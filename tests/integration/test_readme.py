"""Every Python block of the README and the docs runs, with a small model in place of the reader's own."""

import re
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.distributed.checkpoint
import yaml
from support.models import CausalLM, loader, tiny_llama, tiny_tokenizer, token_batches, trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from zssvd_lightning import (
    LoRARecovery,
    LowRankCheckpointMixin,
    Schedule,
    ZSSVDCallback,
    compress,
    save_pretrained,
)
from zssvd_lightning.model.adapters import on

README = Path(__file__).parents[2] / "README.md"
PAGES = sorted((README.parent / "docs").rglob("*.md"))


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return loader(token_batches(8))


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 2
    names = {
        "module": CausalLM(),
        "datamodule": loader(token_batches(24)),
        "model": tiny_llama(),
        "batches": token_batches(),
    }
    names["tokenizer"] = tiny_tokenizer()
    for block in blocks:
        exec(block, names)
    assert names["callback"].phase == "done"
    assert names["report"].reached >= 0.2
    assert (tmp_path / "mine" / "README.md").is_file()


def test_commands_name_files_that_are_there():
    root = README.parent
    text = "".join(path.read_text() for path in (README, *PAGES))
    for path in re.findall(r"(?:configs|recipes)/[\w./-]+\.(?:yaml|py)", text):
        assert (root / path).is_file(), path
    targets = re.findall(r"^make (\w+)", text, re.MULTILINE)
    makefile = (root / "Makefile").read_text()
    assert targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def blocks_of(page):
    return re.findall(r"```python\n(.*?)```", (README.parent / "docs" / page).read_text(), re.DOTALL)


def low_rank(**names):
    model = tiny_llama()
    report = compress(
        model, token_batches(), prune_ratio=0.3, corrections=0, preset="zs-svd-line-search", progress=False
    )
    return {"model": model, "tokenizer": tiny_tokenizer(), "callback": SimpleNamespace(report=report)} | names


def logits(model):
    with torch.no_grad():
        return model(**token_batches(1)[0]).logits


def test_blocks_of_deployment_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks_of("deployment.md")
    names = low_rank()
    expected = logits(names["model"])
    exec(block, names)
    torch.testing.assert_close(logits(names["model"]), expected)
    assert "30." in (tmp_path / "mine" / "README.md").read_text()


def test_blocks_of_lifecycle_run():
    batches, measured, block, several = blocks_of("lifecycle.md")
    exec(batches, names := {})
    text = {"text": {"attention_mask": torch.tensor([[1, 1, 0]])}}
    documents = names["Documents"](0.4)
    assert documents.token_mask(text).tolist() == [[True, True, False]]
    assert documents.loss_terms(text) == 2
    names = {"accuracy": lambda module: sum(p.numel() for p in module.parameters())}
    exec(measured, names)
    settings = {"corrections": 0, "schedule": Schedule(calibration_batches=4), "progress": False}
    trainer(callback := names["Measured"](0.4, **settings)).fit(CausalLM(tiny_llama()), loader(token_batches(12)))
    assert callback.after < callback.before
    names = {"model": tiny_llama(), "batches": token_batches()}
    exec(block, names)
    dense, low_rank = (sum(p.numel() for p in model.parameters()) for model in (tiny_llama(), names["model"]))
    assert low_rank < dense
    exec(several, names := {})
    assert [callback.schedule.start_epoch for callback in names["callbacks"]] == [1, 3]


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_blocks_of_recovery_run(tmp_path, monkeypatch, storage):
    monkeypatch.chdir(tmp_path)
    trained, predictions, adapter = blocks_of("recovery.md")
    exec(trained, {"ZSSVDCallback": ZSSVDCallback, "batches": token_batches(2)})
    exec(predictions, {"dense_model": tiny_llama(), "dataloader": loader(token_batches(2))})
    assert list((tmp_path / "predictions").iterdir())

    module = CausalLM(tiny_llama())
    recovery = LoRARecovery(rank=8, lr=1e-2, merge=False)
    settings = {"corrections": 0, "recovery": recovery, "schedule": Schedule(calibration_batches=4), "storage": storage}
    trainer(ZSSVDCallback(0.3, "zs-svd-line-search", **settings, progress=False)).fit(module, loader(token_batches(12)))
    expected = logits(module.model.eval())
    save_pretrained(module.model, "mine")
    names = {"module": module}
    exec(adapter, names)
    torch.testing.assert_close(logits(names["model"].eval()), expected)
    torch.testing.assert_close(logits(module.model), expected, rtol=1e-3, atol=1e-4)
    assert not on(module.model)


@pytest.mark.parametrize("preset", [None, "best"])
@pytest.mark.parametrize("page", [README, README.parent / "docs" / "recovery.md"], ids=lambda page: page.name)
def test_settings_of_a_recovery_work_as_written(page, preset):
    found = re.findall(r"recovery: (\{method: .*?\})", page.read_text())
    assert found
    for settings in found:
        callback = ZSSVDCallback(
            prune_ratio=0.4,
            preset=preset,
            corrections=1,
            recovery=yaml.safe_load(settings),
            schedule=Schedule(calibration_batches=2),
            correction_batches=2,
            progress=False,
        )
        trainer(callback).fit(CausalLM(tiny_llama()), loader(token_batches(12)))
        assert callback.phase == "done"


class Sharded(LowRankCheckpointMixin, CausalLM):
    """A module that can load its compressed checkpoints."""


@pytest.mark.parametrize("block", [2, 3], ids=["blocks", "limit"])
def test_the_blocks_of_little_memory_run(block):
    names = {"compress": compress, "model": tiny_llama(), "batches": token_batches(2)}
    exec(blocks_of("scaling.md")[block], names)
    assert names["report"].reached >= 0.4


def test_blocks_of_scaling_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shard, convert, _, _, offloaded, parked = blocks_of("scaling.md")
    names = {"fully_shard": fully_shard}
    exec(shard, names)
    module = Sharded(tiny_llama())
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("data_parallel",))
        names["configure_model"](SimpleNamespace(model=module.model, device_mesh=mesh))
        assert isinstance(module.model, FSDPModule)
        assert all(isinstance(block, FSDPModule) for block in module.model.model.layers)
    finally:
        torch.distributed.destroy_process_group()

    names = {}
    exec(offloaded, names)
    assert names["callback"].config.offload == "cpu"
    exec(parked, names)
    assert names["callback"].schedule.park_optimizer is True

    compressed = Sharded(low_rank()["model"])
    checkpoint, again = tmp_path / "distributed", Sharded(tiny_llama())
    torch.distributed.checkpoint.save({"state_dict": compressed.state_dict()}, checkpoint_id=checkpoint, no_dist=True)
    exec(convert, {"torch": torch, "module": again, "checkpoint": checkpoint})
    torch.testing.assert_close(logits(again.model), logits(compressed.model))


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.relative_to(README.parent).as_posix())
def test_links_lead_to_files_that_are_there(page):
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link
