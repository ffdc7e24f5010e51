"""Models of any class of transformers come back from a folder as they were."""

import copy
import json
import logging

import pytest
import torch
import transformers as T
from support.many_classes import CLASSES, TEXT, built, factored, tensors_of
from support.models import tiny_llama
from torch import nn

from zssvd_lightning import from_pretrained, save_pretrained
from zssvd_lightning.errors import SavedModelError
from zssvd_lightning.hub.model_classes import class_named
from zssvd_lightning.serialization.specs import specs_of


def ties(model):
    """Names of parameters that are one tensor."""
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def assert_same_model(one, other):
    assert type(one) is type(other)
    assert specs_of(one) == specs_of(other)
    for values, others in (
        (one.state_dict(), other.state_dict()),
        (dict(one.named_buffers()), dict(other.named_buffers())),
    ):
        assert values.keys() == others.keys()
        assert [name for name in values if not torch.equal(values[name], others[name])] == []
    assert ties(one) == ties(other)


def outputs(name, model):
    """Outputs of a copy whose values are where torch allocates them: products round by the place they are read from."""
    model = copy.deepcopy(model)
    for value in (*model.parameters(), *model.buffers()):
        value.data = value.data.clone()
    torch.manual_seed(0)
    with torch.no_grad():
        return tensors_of(model(**CLASSES[name][1]))


@pytest.mark.parametrize("name", CLASSES)
def test_models_of_any_class_come_back_the_same(tmp_path, name):
    model = built(name)
    assert factored(model)
    save_pretrained(model, tmp_path / "m")
    again = from_pretrained(tmp_path / "m")
    assert_same_model(model, again)
    expected = outputs(name, model)
    assert expected
    assert all(map(torch.equal, expected, outputs(name, again)))
    again.save_pretrained(tmp_path / "n")
    assert_same_model(model, from_pretrained(tmp_path / "n"))


@pytest.mark.parametrize("form", ["pivoted", "int8"])
@pytest.mark.parametrize("name", ["Wav2Vec2ForPreTraining", "BertForPreTraining", "GPT2DoubleHeadsModel"])
def test_other_forms_of_layers_do_too(tmp_path, name, form):
    model = built(name)
    assert factored(model, form)
    save_pretrained(model, tmp_path / "m")
    again = from_pretrained(tmp_path / "m")
    assert_same_model(model, again)
    assert all(map(torch.equal, outputs(name, model), outputs(name, again)))


@pytest.mark.parametrize("name", ["Wav2Vec2ForCTC", "T5EncoderModel", "BertForMultipleChoice"])
def test_dense_models_come_back_as_their_class_too(tmp_path, name):
    model = built(name)
    save_pretrained(model, tmp_path / "m")
    assert_same_model(model, from_pretrained(tmp_path / "m"))


def test_parts_of_models_that_transformers_does_not_export_come_back(tmp_path):
    encoder = built("WhisperForConditionalGeneration").model.encoder
    assert not hasattr(T, type(encoder).__name__)
    assert factored(encoder)
    save_pretrained(encoder, tmp_path / "m")
    assert_same_model(encoder, from_pretrained(tmp_path / "m"))


class Reward(T.LlamaModel):
    def __init__(self, config):
        super().__init__(config)
        self.value = nn.Linear(config.hidden_size, 1)


class Alone(T.LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.one = nn.Linear(32, 32)
        self.post_init()

    def forward(self, x):
        return self.one(x)


@pytest.mark.parametrize(
    ("build", "message"), [(Reward, "has other weights than LlamaModel"), (Alone, "extends no class that is known")]
)
def test_models_that_would_not_load_are_not_saved(tmp_path, build, message):
    model = build(tiny_llama().config)
    assert factored(model)
    with pytest.raises(SavedModelError, match=message):
        save_pretrained(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_classes_that_are_registered_come_back(tmp_path, monkeypatch):
    mapping = T.AutoModelForImageTextToText._model_mapping
    monkeypatch.setattr(mapping, "_extra_content", dict(mapping._extra_content))
    T.AutoModelForImageTextToText.register(T.LlamaConfig, Alone, exist_ok=True)
    model = Alone(T.LlamaConfig(**TEXT)).eval()
    assert factored(model)
    save_pretrained(model, tmp_path / "m")
    assert_same_model(model, from_pretrained(tmp_path / "m"))
    with pytest.raises(SavedModelError, match="of a class outside transformers"):
        save_pretrained(model, tmp_path / "n", self_contained=True)


@pytest.mark.parametrize("name", ["pipeline", "LlamaConfig", "PreTrainedModel", "LlamaPreTrainedModel", None, 3, "os"])
def test_only_names_of_models_are_looked_up(name):
    assert class_named(name, tiny_llama().config) is None


def test_an_unknown_class_is_told_and_loaded_as_a_language_model(tmp_path, caplog):
    model = tiny_llama().eval()
    factored(model)
    save_pretrained(model, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["Mine"]}))
    with caplog.at_level(logging.WARNING):
        assert_same_model(model, from_pretrained(tmp_path))
    assert "names the class Mine, which is unknown here" in caplog.text


def test_a_body_is_loaded_without_the_compressed_layers_of_a_head(tmp_path):
    model = built("BertForPreTraining")
    factored(model)
    save_pretrained(model, tmp_path)
    assert any(not name.startswith("bert.") for name in specs_of(model))
    body = T.AutoModel.from_pretrained(tmp_path)
    for name, value in model.bert.state_dict().items():
        assert torch.equal(value, body.state_dict()[name]), name
