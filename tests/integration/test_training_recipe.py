"""The training recipe on a tiny model and real text, killed and resumed."""

import csv
import signal
from pathlib import Path

import pytest
import yaml
from support import fresh
from support.models import saved_tiny_llama
from support.recipes import shorten_texts

ROOT = Path(__file__).parents[2]
RECIPE = "import runpy; runpy.run_module('recipes.train', run_name='__main__', alter_sys=True)"


def config(folder, source, *more):
    """The recipe's own, for a few short windows."""
    settings = yaml.safe_load((ROOT / "configs" / "smollm2-135m" / "train.yaml").read_text())
    settings["model"] |= {"source": source, "lr": 1e-2}
    shorten_texts(settings, folder, 30_000)
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
    arguments = ["fit", "--config", config(folder, source, *more), "--ckpt_path", "last"]
    done = fresh.run(RECIPE, *arguments, check=False, loaded=fresh.PACKAGE)
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


def test_a_killed_run_ends_where_the_other_one_does(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    source = str(saved_tiny_llama(tmp_path / "model"))
    code, errors = fit(whole, source)
    assert code == 0, errors
    expected = validation_losses(whole)
    assert fit(killed, source, kill("recover", 2))[0] == -signal.SIGKILL
    code, errors = fit(killed, source)
    assert code == 0, errors
    found = validation_losses(killed)
    assert found.keys() <= expected.keys()
    last = max(expected, key=int)
    assert found[last] == pytest.approx(expected[last], rel=1e-6)
