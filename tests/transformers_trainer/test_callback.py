"""ZSSVDTrainerCallback in runs of the Trainer of transformers."""

import copy
import math

import pytest
import torch
from accelerate import DistributedType, ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from support.models import tiny_llama
from support.transformers_runs import SETTINGS, Stream, Tokens, low_rank, trained
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import IterableDataset
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from zssvd_lightning import ZSSVDTrainerCallback, compress, from_pretrained
from zssvd_lightning.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    ContradictionError,
    TargetError,
    UnsupportedTrainingError,
)
from zssvd_lightning.layers.base import CompressedLinear
from zssvd_lightning.transformers_trainer.batches import TrainingBatches


class ReadOnce(IterableDataset):
    """The same rows, for one pass."""

    def __init__(self) -> None:
        self.rows = iter(Stream())

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.rows)


class Seen(TrainerCallback):
    """Callback that records the loss of every step, from the model itself."""

    def __init__(self, model: nn.Module) -> None:
        self.batches = []
        model.register_forward_pre_hook(self.note, with_kwargs=True)
        self.counting = False

    def note(self, model, args, kwargs):
        if model.training and self.counting:
            self.batches.append(kwargs["input_ids"].clone())

    def on_step_begin(self, *args, **kwargs):
        self.counting = True

    def on_step_end(self, *args, **kwargs):
        self.counting = False


def names_in_groups(trainer):
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in trainer.optimizer.param_groups]


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize("start_step", [0, 3])
def test_optimizer_trains_the_factors_in_the_groups_that_a_new_one_would_have(tmp_path, start_step, storage):
    callback = ZSSVDTrainerCallback(start_step=start_step, storage=storage, progress=False, **SETTINGS)
    model = tiny_llama()
    trainer = trained(tmp_path, model, [callback])
    assert low_rank(model)
    assert callback.report.reached >= 0.4
    fresh = Trainer(model, trainer.args, train_dataset=Tokens())
    fresh.create_optimizer()
    assert names_in_groups(trainer) == names_in_groups(fresh)
    state = trainer.optimizer.state
    parameters = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in state} == parameters
    factors = [p for layer in model.modules() if isinstance(layer, CompressedLinear) for p in layer.parameters()]
    assert {float(state[p]["step"]) for p in factors} == {8 - start_step}
    assert float(state[model.lm_head.weight]["step"]) == 8
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def test_result_is_that_of_compress_on_the_same_batches(tmp_path):
    batches = [torch.utils.data.default_collate([Tokens()[i] for i in range(at, at + 4)]) for at in range(0, 24, 4)]
    model = tiny_llama()
    other = copy.deepcopy(model)
    callback = ZSSVDTrainerCallback(batches=batches, progress=False, **SETTINGS)
    trained(tmp_path, model, [callback], max_steps=1, learning_rate=0.0)
    report = compress(other, batches, progress=False, **SETTINGS)
    assert report.layers == callback.report.layers
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_training_twice_compresses_once_between_two_steps(tmp_path):
    model, callback = tiny_llama(), ZSSVDTrainerCallback(start_step=2, progress=False, **SETTINGS)
    trainer = trained(tmp_path, model, [callback], max_steps=4)
    report = callback.report
    trainer.train()
    assert callback.report is report


def test_layers_that_do_not_exist_are_refused_before_the_first_step(tmp_path):
    model = tiny_llama()
    seen = Seen(model)
    callback = ZSSVDTrainerCallback(start_step=4, progress=False, include=["nope"], **SETTINGS)
    with pytest.raises(TargetError, match="nope"):
        trained(tmp_path, model, [callback, seen])
    assert not seen.batches


def test_an_optimizer_from_before_the_layers_followed_a_checkpoint_is_refused(tmp_path):
    first = ZSSVDTrainerCallback(start_step=2, progress=False, **SETTINGS)
    trained(tmp_path, tiny_llama(), [first], max_steps=4, save_strategy="steps", save_steps=1, save_only_model=True)
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    args = TrainingArguments(str(tmp_path), max_steps=8, per_device_train_batch_size=4, report_to=[], use_cpu=True)
    callback = ZSSVDTrainerCallback(start_step=2, progress=False, **SETTINGS)
    trainer = Trainer(model, args, train_dataset=Tokens(), callbacks=[callback], optimizers=(optimizer, schedule))
    with pytest.raises(UnsupportedTrainingError, match="leave the optimizer to the Trainer"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize("data", [Tokens, Stream])
def test_training_sees_the_batches_it_would_see_without_the_callback(tmp_path, data):
    plain, compressed = tiny_llama(), tiny_llama()
    without, with_it = Seen(plain), Seen(compressed)
    trained(tmp_path / "a", plain, [without], data(), gradient_accumulation_steps=2, max_steps=6)
    callback = ZSSVDTrainerCallback(start_step=2, progress=False, **SETTINGS)
    trained(tmp_path / "b", compressed, [callback, with_it], data(), gradient_accumulation_steps=2, max_steps=6)
    assert low_rank(compressed)
    assert len(without.batches) == len(with_it.batches) == 12
    assert all(torch.equal(a, b) for a, b in zip(without.batches, with_it.batches, strict=True))


def test_passes_over_the_data_are_alike_and_change_neither_it_nor_random_numbers(tmp_path):
    trainer = trained(tmp_path, tiny_llama(), [], max_steps=1)
    loader = trainer.get_train_dataloader()
    sampler = loader.base_dataloader.batch_sampler.sampler
    batches, epoch, state = TrainingBatches(loader), sampler.epoch, torch.get_rng_state()
    first, second = ([batch["input_ids"] for batch in batches] for _ in range(2))
    assert len(first) == len(batches) == 6
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert sampler.epoch == epoch
    assert torch.equal(torch.get_rng_state(), state)
    rows = {tuple(row.tolist()) for batch in first for row in batch}
    assert rows == {tuple(row.tolist()) for row in Tokens().ids}


def test_few_batches_are_all_used(tmp_path):
    settings = {name: value for name, value in SETTINGS.items() if name != "calibration_batches"}
    callback = ZSSVDTrainerCallback(corrections=0, progress=False, **settings)
    trained(tmp_path, tiny_llama(), [callback], Tokens(rows=8), max_steps=1)
    assert callback.report.reached >= 0.4


def test_random_numbers_go_on_as_without_the_callback(tmp_path):
    drawn = []

    class Draws(TrainerCallback):
        def on_train_end(self, *args, **kwargs):
            drawn.append(torch.rand(3))

    trained(tmp_path / "a", tiny_llama(), [Draws()])
    trained(tmp_path / "b", tiny_llama(), [ZSSVDTrainerCallback(progress=False, **SETTINGS), Draws()])
    assert torch.equal(*drawn)


def test_a_run_goes_on_from_a_checkpoint_of_the_compressed_model(tmp_path):
    def run(folder, **settings):
        callback = ZSSVDTrainerCallback(start_step=2, progress=False, **SETTINGS)
        torch.manual_seed(5)
        model = tiny_llama()
        trained(folder, model, [callback], save_strategy="steps", save_steps=1, **settings)
        return model

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts")
    for step in (1, 2, 5):
        resumed = run(tmp_path / f"again-{step}", resume=str(tmp_path / "parts" / f"checkpoint-{step}"))
        assert low_rank(resumed) == low_rank(whole)
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(resumed.get_parameter(name), parameter, rtol=0, atol=0, msg=f"{step} {name}")
    loaded = from_pretrained(tmp_path / "parts" / "checkpoint-8")
    assert low_rank(loaded) == low_rank(whole)


def test_a_saved_model_trains_on_and_is_compressed_further(tmp_path):
    first = tiny_llama()
    trainer = trained(tmp_path / "a", first, [ZSSVDTrainerCallback(progress=False, **SETTINGS)])
    trainer.save_model(str(tmp_path / "saved"))
    second = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert low_rank(second) == low_rank(first)
    more = ZSSVDTrainerCallback(progress=False, **SETTINGS | {"prune_ratio": 0.6})
    trained(tmp_path / "b", second, [more])
    assert more.report.reached >= 0.6


def test_best_checkpoint_is_one_of_the_compressed_model(tmp_path):
    model = tiny_llama()
    scores = iter((9, 8, 7, 6))  # the dense model is the best
    every_second = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trained(
        tmp_path,
        model,
        [ZSSVDTrainerCallback(start_step=4, progress=False, **SETTINGS)],
        evaluated=Tokens(4),
        compute_metrics=lambda _: {"score": next(scores)},
        metric_for_best_model="score",
        greater_is_better=True,
        load_best_model_at_end=True,
        **every_second,
    )
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    assert low_rank(model)


def test_frozen_weights_have_frozen_factors(tmp_path):
    model = tiny_llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("self_attn" not in name)
    trainer = trained(tmp_path, model, [ZSSVDTrainerCallback(start_step=2, progress=False, **SETTINGS)])
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert any("self_attn.q_proj.down" in name for name in flags)
    assert all(flag == ("self_attn" not in name) for name, flag in flags.items())
    grouped = {name for group in names_in_groups(trainer) for name in group}
    assert grouped == {name for name, flag in flags.items() if flag}


def test_training_in_bf16_compresses_under_autocast(tmp_path):
    callback = ZSSVDTrainerCallback(start_step=1, progress=False, **SETTINGS)
    model = tiny_llama()
    trained(tmp_path, model, [callback], bf16=True, max_steps=3)
    assert low_rank(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_training_twice_compresses_once(tmp_path):
    model, callback = tiny_llama(), ZSSVDTrainerCallback(progress=False, **SETTINGS)
    trainer = trained(tmp_path, model, [callback])
    report, ranks = callback.report, low_rank(model)
    trainer.train()
    assert callback.report is report
    assert low_rank(model) == ranks


def test_hooks_are_removed_at_the_end(tmp_path):
    model = tiny_llama()
    trained(tmp_path, model, [ZSSVDTrainerCallback(progress=False, **SETTINGS)])
    assert not model._load_state_dict_pre_hooks


def test_failed_compression_leaves_model_and_optimizer(tmp_path):
    def broken(model, batch):
        return model(**batch).loss * math.nan

    model = tiny_llama()
    before = dict(model.named_parameters())
    callback = ZSSVDTrainerCallback(progress=False, loss=broken, **SETTINGS)
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model, args, train_dataset=Tokens(), callbacks=[callback])
    with pytest.raises(CalibrationError):
        trainer.train()
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    grouped = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in before.values()}
    assert callback.report is None


def test_callback_added_later_is_told_on_resuming(tmp_path):
    callback = ZSSVDTrainerCallback(start_step=2, progress=False, **SETTINGS)
    trained(tmp_path, tiny_llama(), [callback], save_strategy="steps", save_steps=1, save_only_model=True)
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=4, report_to=[], use_cpu=True
    )
    trainer = Trainer(tiny_llama(), args, train_dataset=Tokens())
    trainer.add_callback(ZSSVDTrainerCallback(start_step=2, **SETTINGS))
    with pytest.raises(CheckpointError, match="no layer is low-rank"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


class UnderAutocast(Trainer):
    """Runs fp16 on a CPU as on a GPU, with a scaler of the loss."""

    def _prepare_for_training(self, *args, **kwargs):
        self.accelerator.native_amp = self.args.fp16
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if self.args.fp16 else None
        return super()._prepare_for_training(*args, **kwargs)


def test_training_in_fp16_calibrates_in_the_type_of_the_weights(tmp_path):
    """As without fp16: the statistics are those of the same weights."""
    reports = []
    for fp16 in (True, False):
        torch.manual_seed(5)
        model, types = tiny_llama(), []
        model.model.embed_tokens.register_forward_hook(
            lambda *_, types=types: types.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        )
        callback = ZSSVDTrainerCallback(progress=False, **SETTINGS)
        trained(tmp_path / str(fp16), model, [callback], trainer=UnderAutocast, fp16=fp16, max_steps=3)
        assert [autocast for autocast, _ in types[-3:]] == [fp16] * 3
        assert not any(autocast for autocast, _ in types[:-3])
        assert len(types) > 3 + SETTINGS["calibration_batches"]
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        reports.append(callback.report)
    assert reports[0].layers == reports[1].layers
    assert reports[0].losses == reports[1].losses


@pytest.mark.parametrize("start_step", [0, 2])
def test_a_compiled_model_trains_as_one_that_is_not_compiled(tmp_path, start_step):
    def run(folder, **settings):
        torch.manual_seed(5)
        model = tiny_llama()
        callback = ZSSVDTrainerCallback(start_step=start_step, progress=False, **SETTINGS)
        trained(folder, model, [callback], max_steps=4, **settings)
        return model

    torch.compiler.reset()
    counters.clear()
    model = run(tmp_path / "compiled", torch_compile=True, torch_compile_backend="eager")
    assert counters["stats"]["unique_graphs"] >= (2 if start_step else 1)  # again once it is low-rank
    plain = run(tmp_path / "plain")
    assert low_rank(model) == low_rank(plain)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-4, atol=1e-6, msg=name)


class OnTwoDevices(Trainer):
    """Says that it has two devices, once the model is where it is."""

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        self.args._n_gpu = 2
        return prepared


class WithDeepSpeed(Trainer):
    """Says that its processes are those of DeepSpeed."""

    kind = DistributedType.DEEPSPEED

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        PartialState._shared_state["distributed_type"] = self.kind
        return prepared


class WithFSDP(WithDeepSpeed):
    kind = DistributedType.FSDP


class WithTensorParallelism(Trainer):
    """Says that a parameter is spread over processes."""

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        self.args.parallelism_config = ParallelismConfig(tp_size=2)
        return prepared


@pytest.fixture(autouse=True)
def own_accelerator():
    """Leaves nothing of what a test said of the processes."""
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 2}, "training ends after step 2"),
        ({"trainer": OnTwoDevices}, "DataParallel"),
        ({"trainer": WithDeepSpeed}, "DeepSpeed"),
        ({"trainer": WithFSDP}, "FSDP"),
        ({"trainer": WithTensorParallelism}, "tensor parallelism"),
    ],
)
def test_runs_that_cannot_be_compressed_are_refused_before_the_first_step(tmp_path, changes, message):
    model = tiny_llama()
    seen = Seen(model)
    callback = ZSSVDTrainerCallback(start_step=4, progress=False, **SETTINGS)
    with pytest.raises(UnsupportedTrainingError, match=message):
        trained(tmp_path, model, [callback, seen], **changes)
    assert not seen.batches


def test_data_that_can_be_read_once_is_refused(tmp_path):
    with pytest.raises(UnsupportedTrainingError, match="only once"):
        trained(tmp_path, tiny_llama(), [ZSSVDTrainerCallback(progress=False, **SETTINGS)], ReadOnce())


def test_wrong_settings_are_refused_when_the_callback_is_made():
    with pytest.raises(ConfigError, match="start_step"):
        ZSSVDTrainerCallback(start_step=-1)
    with pytest.raises(ConfigError, match="calibration_batches"):
        ZSSVDTrainerCallback(calibration_batches=0)
    with pytest.raises(ContradictionError, match="8 bits"):
        ZSSVDTrainerCallback(preset="zs-svd-line-search", storage="remap")
    with pytest.raises(ConfigError, match="prune_ratioo"):
        ZSSVDTrainerCallback(prune_ratioo=0.3)
