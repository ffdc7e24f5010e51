"""The parts of the recipes, without their models and texts; `tests/integration` runs the recipes whole."""

import importlib
import pkgutil
import sys
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
import yaml
from support.models import CausalLM, loader, saved_tiny_llama, tiny_llama, token_batches, trainer

import recipes
from recipes.compress import fitting
from recipes.compress import main as compressing
from recipes.compress_then_finetune import FineTuned, checked
from recipes.two_fits import CompressedLM
from zssvd_lightning import FactorRecovery, LowRankLinear, RunConfig, compress, load_config
from zssvd_lightning.app.recovered import Batches
from zssvd_lightning.errors import CheckpointError, ConfigError

NAMES = [module.name for module in pkgutil.iter_modules(recipes.__path__)]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_how_it_is_started_and_starts_nothing_on_import(name):
    module = importlib.import_module(f"recipes.{name}")
    assert f"`python -m recipes.{name} " in module.__doc__


def test_there_are_the_recipes_that_the_readme_names():
    assert NAMES == ["compare", "compress", "compress_then_finetune", "train", "two_fits"]


def test_batches_of_calibration_come_before_those_of_training():
    assert list(Batches([1, 2], [3, 4])) == [1, 2, 3, 4]
    assert list(islice(Batches([1], [2, 3]), 2)) == [1, 2]


def config(folder, **more):
    source = saved_tiny_llama(folder / "tiny")
    settings = {"model": {"source": str(source)}, "output": str(folder / "out"), "evaluation": {"text": "x.txt"}}
    settings["calibration"] = {"text": "x.txt"}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings | more))
    return str(folder / "run.yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"has no recovery; set recovery\.method"),
        ({"recovery": {"method": "factors", "lr": None}}, r"recovery\.lr is null"),
        ({"recovery": {"method": "factors", "lr": 1e-3}, "evaluation": {}}, r"evaluation\.text is null"),
    ],
)
def test_finetuning_refuses_what_it_cannot_do_before_a_model_is_loaded(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        checked(config(tmp_path, **settings))


def test_the_dense_model_trains_the_layers_that_are_low_rank_in_the_other(tmp_path):
    recovery = FactorRecovery(lr=1e-3, targets=("*.q_proj",), also_train=("*norm*",))
    run = SimpleNamespace(config=load_config(RunConfig, config(tmp_path, training={"dense_lr": 5e-4})))
    model = tiny_llama()
    dense = FineTuned(model, recovery, run)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("q_proj" in name or "norm" in name for name in trained)
    assert dense.recovery.lr == 5e-4


def test_a_second_fit_begins_with_the_low_rank_model_and_refuses_a_dense_checkpoint(tmp_path):
    source = saved_tiny_llama(tmp_path / "tiny")
    model = CompressedLM(str(tmp_path / "none"), source=str(source)).model
    for name in ("dense", "low-rank"):
        if name == "low-rank":
            compress(
                model, token_batches(), prune_ratio=0.4, corrections=0, preset="zs-svd-line-search", progress=False
            )
        fit = trainer(max_steps=0)
        module = CausalLM(model)
        fit.fit(module, loader(token_batches(1)))
        fit.save_checkpoint(tmp_path / f"{name}.ckpt", weights_only=True)
    with pytest.raises(CheckpointError, match="before the model was low-rank"):
        CompressedLM(str(tmp_path / "dense.ckpt"), source=str(source)).configure_model()
    second = CompressedLM(str(tmp_path / "low-rank.ckpt"), source=str(source))
    second.configure_model()
    assert any(isinstance(part, LowRankLinear) for part in second.modules())
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], weight)


def test_no_recipe_needs_what_another_left_on_the_path():
    assert "compress" not in sys.modules
    assert "train" not in sys.modules


@pytest.mark.parametrize(("setting", "message"), [("minutes", "training.steps"), ("merge", "recovery.merge is false")])
def test_a_recovery_that_the_recipe_cannot_carry_out_is_refused(tmp_path, setting, message):
    recovery = {"minutes": 1.0} if setting == "minutes" else {"method": "lora", "merge": False}
    with pytest.raises(ConfigError, match=message):
        compressing(config(tmp_path, preset="best-trained", recovery=recovery))


@pytest.mark.parametrize(("most", "context"), [(512, 256), (272, 256), (64, 48), (45, None)])
def test_speed_is_measured_at_a_context_that_the_model_takes(most, context):
    tokenizer = SimpleNamespace(input_ids=[1] * 14)
    run = SimpleNamespace(model=tiny_llama(max_position_embeddings=most), tokenizer=lambda text: tokenizer)
    if context is None:
        with pytest.raises(ConfigError, match="46 tokens, but the model takes at most 45"):
            fitting(run)
    else:
        assert fitting(run).contexts == (context,)
