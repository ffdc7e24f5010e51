"""From the command line of Lightning, as users of `LightningCLI` have it."""

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from support.models import CausalLM, assert_same_state, loader, state_of, token_batches, trainer

from zssvd_lightning import FactorRecovery, LoRARecovery, Phase, SingularValueRecovery, ZSSVDCallback
from zssvd_lightning.errors import OutputError, PlanError
from zssvd_lightning.serialization.specs import ranks_of


class Module(CausalLM):
    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__(lr=lr)

    def train_dataloader(self):
        return loader(token_batches())


SETTINGS = {
    "accelerator": "cpu",
    "max_epochs": 3,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
}


def cli(*arguments):
    return LightningCLI(Module, args=list(arguments), save_config_callback=None)


def config(folder, **init_args):
    callback = {
        "class_path": "zssvd_lightning.ZSSVDCallback",
        "init_args": {"preset": "zs-svd-line-search", "progress": False, **init_args},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({"trainer": {**SETTINGS, "callbacks": [callback]}}))
    return str(file)


def the_callback(ran):
    (callback,) = [c for c in ran.trainer.callbacks if isinstance(c, ZSSVDCallback)]
    return callback


def test_yaml_makes_the_callback(tmp_path):
    arguments = {"prune_ratio": 0.4, "corrections": 0, "ignore": ["q_proj"], "include": None, "selection": "abs_delta"}
    ran = cli("fit", "--config", config(tmp_path, **arguments))
    callback = the_callback(ran)
    assert callback.phase is Phase.DONE
    assert callback.config.ignore == ["q_proj"]
    assert callback.config.selection == "abs_delta"
    assert callback.report.reached >= 0.4


@pytest.mark.parametrize(
    "recovery",
    [
        {"method": "lora", "rank": 2, "clip_rank": True, "peft": {"use_dora": True}},
        {
            "class_path": "zssvd_lightning.LoRARecovery",
            "init_args": {"rank": 2, "clip_rank": True, "peft": {"use_dora": True}},
        },
    ],
    ids=["mapping", "class"],
)
def test_yaml_makes_the_recovery(tmp_path, recovery):
    ran = cli("fit", "--config", config(tmp_path, prune_ratio=0.4, corrections=0, recovery=recovery))
    assert the_callback(ran).recovery == LoRARecovery(rank=2, clip_rank=True, peft={"use_dora": True})
    assert the_callback(ran).phase is Phase.DONE


def test_the_name_of_a_method_makes_the_recovery(tmp_path):
    file = config(tmp_path, prune_ratio=0.4, corrections=0, recovery="factors")
    ran = cli("fit", "--config", file)
    assert the_callback(ran).recovery == FactorRecovery()
    ran = cli("fit", "--config", file, "--trainer.callbacks.recovery=singular_values")
    assert the_callback(ran).recovery == SingularValueRecovery()


def test_the_command_line_adds_it_by_its_short_name():
    flags = [f"--trainer.{key}={str(value).lower()}" for key, value in SETTINGS.items()]
    ran = cli(
        "fit",
        *flags,
        "--trainer.callbacks+=ZSSVDCallback",
        "--trainer.callbacks.prune_ratio=0.3",
        "--trainer.callbacks.corrections=0",
        "--trainer.callbacks.ignore=q_proj",
    )
    assert the_callback(ran).config.prune_ratio == 0.3
    assert the_callback(ran).config.ignore == ["q_proj"]


def test_a_setting_on_the_command_line_wins_over_the_last_callback_of_a_file(tmp_path):
    plan = tmp_path / "plan.yaml"
    ran = cli("fit", "--config", config(tmp_path, prune_ratio=0.4), f"--trainer.callbacks.dry_run={plan}")
    assert the_callback(ran).config.prune_ratio == 0.4
    assert plan.exists()
    cli("fit", "--config", config(tmp_path, corrections=0), f"--trainer.callbacks.plan={plan}")


def test_help_shows_every_argument_with_its_meaning(capsys):
    with pytest.raises(SystemExit):
        cli("fit", "--trainer.callbacks.help", "ZSSVDCallback")
    text = " ".join(capsys.readouterr().out.split())
    assert "fraction of the target layers' parameters to remove" in text
    assert "gradient steps, each followed by a new truncation" in text
    for argument in ("dry_run", "plan", "schedule", "preset", "line_search", "min_rank_fraction"):
        assert f".{argument}" in text


@pytest.mark.parametrize("bad", [{"prune_ratio": 1.5}, {"prune_rate": 0.5}, {"corrections": "many"}])
def test_a_bad_value_in_yaml_names_its_key(tmp_path, capsys, bad):
    with pytest.raises((SystemExit, ValueError)) as error:
        cli("fit", "--config", config(tmp_path, **bad))
    assert next(iter(bad)) in capsys.readouterr().err + str(error.value)


def test_a_dry_run_writes_a_plan_changes_nothing_and_the_plan_is_followed(tmp_path):
    plan = tmp_path / "plan.yaml"
    module = CausalLM()
    before = state_of(module)
    dry = ZSSVDCallback(0.3, "zs-svd-line-search", dry_run=plan, progress=False)
    fitted = trainer(dry, max_epochs=3)
    fitted.fit(module, loader(token_batches()))
    assert_same_state(before, state_of(module))
    assert fitted.global_step == 4
    assert dry.phase is Phase.WAIT
    assert dry.report is None

    content = yaml.safe_load(plan.read_text())
    direct = ZSSVDCallback(0.3, "zs-svd-line-search", corrections=0, progress=False)
    torch.manual_seed(0)
    trainer(direct, max_epochs=3).fit(CausalLM(), loader(token_batches()))
    written = {name: None if e["rank"] == "dense" else e["rank"] for name, e in content["layers"].items()}
    assert written == {name: layer.rank for name, layer in direct.report.layers.items()}
    assert content["first_order_sum"] == pytest.approx(direct.report.first_order_sum, rel=1e-5)

    layer = "model.model.layers.0.mlp.up_proj"
    content["layers"][layer]["rank"] = 5
    content["layers"]["model.model.layers.1.mlp.up_proj"]["rank"] = "dense"
    plan.write_text(yaml.safe_dump(content))
    module = CausalLM()
    reviewed = ZSSVDCallback(0.9, "zs-svd-line-search", plan=str(plan), correction_batches=2, progress=False)
    trainer(reviewed, max_epochs=4).fit(module, loader(token_batches()))
    assert ranks_of(module)[layer] == 5
    assert "model.model.layers.1.mlp.up_proj" not in ranks_of(module)
    assert reviewed.report.asked == reviewed.report.reached
    assert reviewed.report.layers.keys() == content["layers"].keys()


def test_a_dry_run_without_a_file_name_writes_into_the_run_folder(tmp_path):
    dry = ZSSVDCallback(0.3, "zs-svd-line-search", dry_run=True, progress=False)
    trainer(dry, max_epochs=1, default_root_dir=tmp_path).fit(CausalLM(), loader(token_batches()))
    assert (tmp_path / "zssvd_plan.yaml").exists()


def test_a_dry_run_refuses_to_overwrite_before_it_spends_a_batch(tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text("reviewed")
    fitted = trainer(ZSSVDCallback(0.3, "zs-svd-line-search", dry_run=plan, progress=False), max_epochs=3)
    with pytest.raises(OutputError, match="exists"):
        fitted.fit(CausalLM(), loader(token_batches()))
    assert fitted.global_step == 0
    assert plan.read_text() == "reviewed"


def test_a_bad_plan_is_refused_before_a_batch_is_spent(tmp_path):
    fitted = trainer(
        ZSSVDCallback(0.3, "zs-svd-line-search", plan=tmp_path / "none.yaml", progress=False), max_epochs=6
    )
    with pytest.raises(PlanError, match=r"none\.yaml cannot be read"):
        fitted.fit(CausalLM(), loader(token_batches()))
    assert fitted.global_step == 0
