import json
import sys

import pytest
import torch
from support import fresh
from support.models import VOCABULARY, tiny_gpt2, tiny_llama, tiny_tokenizer, token_batches
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, pipeline

from zssvd_lightning import CompressionConfig, LowRankLinear, compress, export_onnx, from_pretrained, save_pretrained
from zssvd_lightning.app.cli import main
from zssvd_lightning.errors import ExportError, OutputError, SavedModelError
from zssvd_lightning.hub.export import export_dense
from zssvd_lightning.layers.pivoted import PivotedLinear
from zssvd_lightning.layers.pivoted_columns import ColumnPivotedLinear
from zssvd_lightning.model.replace import replace_module
from zssvd_lightning.serialization.specs import specs_of

CONFIGS = {
    "factors": CompressionConfig(0.3, corrections=0),
    "pivoted": CompressionConfig(0.3, corrections=0, storage="pivoted"),
    "remap": CompressionConfig(0.4, corrections=0, storage="remap", rows_in_16_bits="loss_aware"),
}


def saved(folder, build=tiny_llama, config="factors"):
    """A folder with a compressed model, and the model that was read back from it."""
    model = build()
    report = compress(model, token_batches(), CONFIGS[config], progress=False)
    save_pretrained(model, folder, tiny_tokenizer(), report=report)
    return from_pretrained(folder)


def logits(model, **inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


def test_onnxruntime_gives_equal_logits_at_any_length_and_with_padding(tmp_path):
    """Of a model with layers in floating point, as factors and as pivot rows, in 8 bits, and dense."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = saved(tmp_path / "m", config="remap")
    names = list(specs_of(model))
    for form, chosen in ((LowRankLinear, names[::4]), (PivotedLinear, names[1::4]), (ColumnPivotedLinear, names[2::4])):
        for layer in map(model.get_submodule, chosen):
            replace_module(model, layer, form.from_factors(*layer.factors(), None))
    kinds = {spec["kind"] for spec in specs_of(model).values()}
    assert kinds == {"low_rank", "pivoted", "pivoted_columns", "int8_low_rank"}
    export_onnx(model, tmp_path / "onnx", tiny_tokenizer())
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    for shape in ((2, 8), (3, 5), (1, 1)):
        ids, mask = torch.randint(1, VOCABULARY, shape), torch.ones(shape, dtype=torch.long)
        mask[0, : shape[1] // 3] = 0
        (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        expected = logits(model, input_ids=ids, attention_mask=mask)
        torch.testing.assert_close(torch.tensor(found)[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-4)
    assert json.loads((tmp_path / "onnx" / "config.json").read_text())["model_type"] == "llama"
    assert specs_of(model)
    with pytest.raises(SavedModelError, match="no model of transformers"):
        export_onnx(torch.nn.Linear(3, 3), tmp_path / "other")


def test_onnx_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ExportError, match=r"onnxscript is not installed; pip install 'zssvd-lightning\[onnx\]'"):
        export_onnx(tiny_llama(), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_reloaded_models_generate_with_and_without_cache(tmp_path, build, config):
    model = saved(tmp_path, build, config).eval()
    ids = token_batches(1)[0]["input_ids"][:2, :6]
    written = [model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*written)
    assert written[0].shape == (2, 18)


def test_a_pipeline_takes_a_folder(tmp_path):
    saved(tmp_path)
    written = pipeline("text-generation", model=str(tmp_path))("ab", max_new_tokens=4, do_sample=False)
    assert written[0]["generated_text"].startswith("ab")


def test_adapters_on_top_are_trained_merged_and_reloaded(tmp_path):
    peft = pytest.importorskip("peft")
    model = saved(tmp_path / "m")
    batch = token_batches(1)[0]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=r".*\.(down|up)", init_lora_weights=False))
    adapted(**batch).loss.backward()
    assert all(p.grad is not None for n, p in adapted.named_parameters() if "lora_" in n)
    expected = logits(adapted, **batch)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(from_pretrained(tmp_path / "m"), tmp_path / "adapter")
    torch.testing.assert_close(logits(again, **batch), expected)
    merged = again.merge_and_unload()
    assert any(isinstance(module, LowRankLinear) for module in merged.modules())
    save_pretrained(merged, tmp_path / "merged")
    torch.testing.assert_close(logits(from_pretrained(tmp_path / "merged"), **batch), expected, atol=1e-5, rtol=1e-4)


class Tokens(Dataset):
    def __init__(self):
        batch = token_batches(1, size=8)[0]
        self.rows = [{key: value[i] for key, value in batch.items()} for i in range(8)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def test_the_trainer_of_transformers_trains_saves_and_resumes_a_reloaded_model(tmp_path):
    model = saved(tmp_path / "m")
    before = {name: value.clone() for name, value in model.named_parameters()}
    told = {"per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "save_steps": 2, "learning_rate": 1e-2}
    arguments = TrainingArguments(str(tmp_path / "run"), max_steps=4, disable_tqdm=True, **told)
    Trainer(model, arguments, train_dataset=Tokens()).train()
    assert all(
        not torch.equal(before[n], p) for n, p in model.named_parameters() if n.endswith(("up.weight", "down.weight"))
    )
    batch = token_batches(1)[0]
    last = from_pretrained(tmp_path / "run" / "checkpoint-4")
    torch.testing.assert_close(logits(last, **batch), logits(model, **batch))
    resumed = Trainer(from_pretrained(tmp_path / "m"), arguments, train_dataset=Tokens())
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    torch.testing.assert_close(logits(resumed.model, **batch), logits(model, **batch))


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["zssvd", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=len(sys.argv) > 4).eval()
assert AutoTokenizer.from_pretrained(sys.argv[1])("ab").input_ids == [67, 68]
with torch.no_grad():
    torch.save(model(input_ids=torch.load(sys.argv[2])).logits, sys.argv[3])
assert "zssvd_lightning" not in sys.modules
"""


@pytest.mark.parametrize("form", ["dense", "self_contained"])
def test_exports_load_where_the_package_is_not_imported(tmp_path, monkeypatch, form):
    model = saved(tmp_path / "m")
    assert run(monkeypatch, "export", tmp_path / "m", tmp_path / "out", f"format={form}") == 0
    ids = token_batches(1)[0]["input_ids"]
    torch.save(ids, tmp_path / "ids.pt")
    trusted = ["trust"] * (form == "self_contained")
    fresh.run(PLAIN, tmp_path / "out", tmp_path / "ids.pt", tmp_path / "out.pt", *trusted)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), logits(model, input_ids=ids), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "rotary",
    [
        {"rope_type": "default", "rope_theta": 12345.0},
        {
            "rope_type": "llama3",
            "rope_theta": 12345.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
)
def test_dense_configs_tell_rotary_embeddings_to_older_readers_too(tmp_path, rotary):
    model = tiny_llama(rope_parameters=rotary).eval()
    compress(model, token_batches(), CONFIGS["factors"], progress=False)
    ids = token_batches(1)[0]["input_ids"]
    expected = logits(model, input_ids=ids)
    export_dense(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == 12345.0
    assert ("rope_scaling" in config) == (rotary["rope_type"] != "default")
    torch.testing.assert_close(logits(from_pretrained(tmp_path), input_ids=ids), expected, atol=1e-5, rtol=1e-4)


def test_bad_exports_are_refused(tmp_path, monkeypatch, capsys):
    saved(tmp_path / "m")
    assert run(monkeypatch, "export", tmp_path / "m", tmp_path / "out", "format=tar") == 1
    assert "format is 'tar'; there are dense, self_contained, onnx" in capsys.readouterr().err
    assert run(monkeypatch, "export", tmp_path / "m", tmp_path / "m") == 1
    assert "is what is read from" in capsys.readouterr().err
    assert specs_of(from_pretrained(tmp_path / "m"))
    assert run(monkeypatch, "export", tmp_path / "m", tmp_path / "dense") == 0
    assert run(monkeypatch, "export", tmp_path / "m", tmp_path / "dense") == 0  # replaces its own
    assert run(monkeypatch, "export", tmp_path / "dense", tmp_path / "again", "format=self_contained") == 1
    assert "has no compressed layer" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    assert run(monkeypatch, "export", tmp_path / "m", tmp_path / "out") == 1
    assert OutputError.__name__ in capsys.readouterr().err
