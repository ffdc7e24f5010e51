"""Every cell of the table of model classes in `docs/support.md`: each is run, or refused by name."""

import copy
import functools

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support import processes
from support.callbacks import Interrupt
from support.model_classes import CLASSES, SETTINGS, Rows, declared, fit, fits
from transformers import Trainer, TrainingArguments

from zssvd_lightning import ZSSVDTrainerCallback, compress, errors, export_onnx, from_pretrained, merge, save_pretrained
from zssvd_lightning.layers.base import CompressedLinear
from zssvd_lightning.serialization.specs import ranks_of

SUPPORT = declared()


@functools.cache
def compressed_once(name):
    chosen = CLASSES[name]
    model = chosen.fresh()
    report = compress(model, chosen.batches(4), **SETTINGS, **chosen.settings)
    return model.eval(), report


def compressed(name):
    return copy.deepcopy(compressed_once(name)[0])


def logits(model, name):
    """Of a batch; encoder-decoders take their labels as inputs too."""
    batch = CLASSES[name].batches(1)[0]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) is False:
        batch = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        return model.eval()(**batch)["logits"]


def run_compress(name, folder):
    model, report = compressed_once(name)
    assert report.reached >= 0.4
    assert ranks_of(model)
    assert logits(model, name).isfinite().all()


def run_save_load(name, folder):
    model = compressed(name)
    save_pretrained(model, folder)
    loaded = from_pretrained(folder)
    assert ranks_of(loaded) == ranks_of(model)
    assert torch.equal(logits(loaded, name), logits(model, name))


def run_generate(name, folder):
    model = compressed(name)
    ids = CLASSES[name].batches(1)[0]["input_ids"][:2, :6]
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    written = [model.generate(ids, use_cache=cache, **settings) for cache in (True, False)]
    assert torch.equal(*written)
    assert written[0].shape[1] >= 8


def run_merge(name, folder):
    model = compressed(name)
    expected = logits(model, name)
    merge(model)
    assert not any(isinstance(module, CompressedLinear) for module in model.modules())
    dense = CLASSES[name].fresh()
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in dense.state_dict().items()
    }
    torch.testing.assert_close(logits(model, name), expected, atol=1e-5, rtol=1e-4)


def run_onnx(name, folder):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, batch = compressed(name), CLASSES[name].batches(1)[0]
    if "input_ids" in batch:
        export_onnx(model, folder)
        given = {key: batch[key].numpy() for key in ("input_ids", "attention_mask")}
    else:
        folder.mkdir()
        program = torch.onnx.export(model, (batch["pixel_values"],), dynamo=True, verbose=False)
        program.save(folder / "model.onnx")
        given = {"pixel_values": batch["pixel_values"].numpy()}
    (found, *_) = onnxruntime.InferenceSession(folder / "model.onnx").run(None, given)
    torch.testing.assert_close(torch.tensor(found), logits(model, name), atol=1e-5, rtol=1e-4)


def run_resume(name, folder):
    whole, _ = fit(name)
    saving = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=0, save_last=True)
    with pytest.raises(ConnectionError, match="gone"):
        fit(name, saving, Interrupt(5), enable_checkpointing=True)
    newest = max(folder.glob("last*.ckpt"), key=lambda path: path.stat().st_mtime)
    resumed, _ = fit(name, ckpt_path=newest)
    assert ranks_of(whole) == ranks_of(resumed)
    assert ranks_of(whole)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], value, rtol=0, atol=0, msg=key)


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    processes.check(folder, processes.start(folder, 2, fits))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def of_two(strategy):
    def run(name, folder, on_two):
        first, second = (found[strategy, name] for found in on_two)
        if isinstance(first, tuple):
            assert first == second
            raise getattr(errors, first[0])(first[1])
        assert first["reached"] >= 0.4
        assert first["ranks"] == second["ranks"]
        assert all(torch.equal(second["weights"][key], value) for key, value in first["weights"].items())

    return run


def run_trainer(name, folder):
    chosen = CLASSES[name]
    model, data = chosen.fresh(), Rows(chosen.batches(6))
    callback = ZSSVDTrainerCallback(start_step=2, calibration_batches=2, **SETTINGS, **chosen.settings)
    told = {"per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(str(folder), max_steps=4, save_strategy="no", **told)
    Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    assert callback.report.reached >= 0.4
    assert ranks_of(model)
    assert logits(model, name).isfinite().all()


RUNS = {
    "compress": run_compress,
    "save, load": run_save_load,
    "generate": run_generate,
    "merge": run_merge,
    "ONNX": run_onnx,
    "resume": run_resume,
    "DDP": of_two("ddp"),
    "FSDP2": of_two("fsdp2"),
    "Trainer": run_trainer,
}
"""By column, a function that runs a use and asserts its result; vLLM has `test_vllm.py`."""

CELLS = [(model, use) for model in SUPPORT.MODELS for use in RUNS]


@pytest.mark.parametrize(("model", "use"), CELLS, ids=[f"{model}: {use}" for model, use in CELLS])
def test_a_cell_is_what_the_table_says(tmp_path, model, use, request):
    expected, run = SUPPORT.MATRIX[model, use], RUNS[use]
    if use in ("DDP", "FSDP2"):
        run = functools.partial(run, on_two=request.getfixturevalue("on_two"))
    if isinstance(expected, SUPPORT.Missing):
        fresh = CLASSES[model].fresh()
        assert use == "generate"
        assert not (hasattr(fresh, "can_generate") and fresh.can_generate())
    elif isinstance(expected, SUPPORT.Refused):
        with pytest.raises(getattr(errors, expected.error), match=expected.words):
            run(model, tmp_path / "out")
    else:
        run(model, tmp_path / "out")


def test_the_page_has_the_table_of_the_declaration():
    page = SUPPORT.PAGE.read_text(encoding="utf-8")
    assert SUPPORT.written(page) == page
    assert SUPPORT.table() in page


def test_every_model_and_use_is_declared_and_run():
    assert tuple(CLASSES) == SUPPORT.MODELS
    assert (*RUNS, "vLLM") == SUPPORT.USES
    assert SUPPORT.MATRIX.keys() == {(model, use) for model in SUPPORT.MODELS for use in SUPPORT.USES}
