"""Configs that were read from a compressed folder, and models that are built from them without its weights."""

import copy
import pickle

import pytest
import torch
from support.many_classes import factored
from support.models import tiny_llama, token_batches
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from zssvd_lightning import CompressionConfig, compress, from_pretrained, save_pretrained
from zssvd_lightning.serialization.specs import specs_of


@pytest.fixture
def folder(tmp_path):
    model = tiny_llama().eval()
    factored(model)
    save_pretrained(model, tmp_path / "m")
    return tmp_path / "m"


BUILDERS = {
    "an automatic class": AutoModelForCausalLM.from_config,
    "one without a head": AutoModel.from_config,
    "the class itself": LlamaForCausalLM,
}


def config_in_memory(folder):
    return from_pretrained(folder).config


@pytest.mark.parametrize("read", [AutoConfig.from_pretrained, config_in_memory])
@pytest.mark.parametrize("build", BUILDERS)
def test_a_model_built_from_the_config_alone_is_dense_and_its_folder_loads(folder, tmp_path, build, read):
    model = BUILDERS[build](read(folder)).eval()
    assert not specs_of(model)
    for name, save in {"one": model.save_pretrained, "two": lambda place: save_pretrained(model, place)}.items():
        save(tmp_path / name)
        for load in (from_pretrained, AutoModel.from_pretrained):
            again = load(tmp_path / name)
            assert not specs_of(again)
            for key, value in again.state_dict().items():
                prefixed = key if key in model.state_dict() else f"model.{key}"
                assert torch.equal(value, model.state_dict()[prefixed]), key


def test_it_is_compressed_like_any_other(folder, tmp_path):
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    compress(model, token_batches(), CompressionConfig(0.3, corrections=0), progress=False)
    for name, save in {"one": model.save_pretrained, "two": lambda place: save_pretrained(model, place)}.items():
        save(tmp_path / name)
        assert specs_of(from_pretrained(tmp_path / name)) == specs_of(model)


def test_a_config_that_was_read_is_saved_as_that_of_the_dense_model(folder, tmp_path):
    config = AutoConfig.from_pretrained(folder)
    config.save_pretrained(tmp_path / "c")
    assert "zssvd" not in (tmp_path / "c" / "config.json").read_text()
    assert AutoConfig.from_pretrained(tmp_path / "c").hidden_size == config.hidden_size
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again.to_dict() == config.to_dict()
        assert specs_of(AutoModelForCausalLM.from_pretrained(folder, config=again))
        assert specs_of(from_pretrained(folder, config=again))
