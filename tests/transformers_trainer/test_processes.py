"""ZSSVDTrainerCallback on two real processes under DDP: the result of one process over all batches."""

import os

import pytest
import torch
from support import processes
from support.models import tiny_llama
from support.parallel import multiplied_out
from support.transformers_runs import SETTINGS, Padded, Stream, low_rank, trained
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from transformers import Trainer, TrainerCallback

from zssvd_lightning import ZSSVDTrainerCallback
from zssvd_lightning.errors import ContradictionError, UnsupportedTrainingError
from zssvd_lightning.transformers_trainer.processes import wrappers_of
from zssvd_lightning.whitening import spectrum

STEPS = {"max_steps": 4}
LAUNCHED = STEPS | {"ddp_backend": "gloo"}
COUNTS = {"calibration_batches": 4, "correction_batches": 2}
"""Batches of one process, of the 12 that each has."""
SHORT = SETTINGS | COUNTS | {"corrections": 1}

NATURAL = {"metric": "two_sided", "selection": "curvature", "correction_step": "natural", "fresh_moments": False}


class Witness(TrainerCallback):
    """Keeps the weights as they are when the factors begin to train, and counts decompositions."""

    def __init__(self) -> None:
        self.weights, self.svds, self.svd = None, 0, spectrum.thin_svd

    def on_train_begin(self, args, state, control, **others):
        spectrum.thin_svd = self.counting

    def counting(self, *args, **kwargs):
        self.svds += 1
        return self.svd(*args, **kwargs)

    def on_step_begin(self, args, state, control, model=None, **others):
        if self.weights is None and low_rank(model):
            self.weights = {name: weight.clone() for name, weight in model.state_dict().items()}

    def on_train_end(self, args, state, control, **others):
        spectrum.thin_svd = self.svd


def model_of_all():
    torch.manual_seed(5)
    return tiny_llama().double()


def statement(folder, compression, data=Padded, **settings):
    model, seen = model_of_all(), Witness()
    callback = ZSSVDTrainerCallback(progress=False, **(SHORT | compression))
    trained(folder, model, [seen, callback], data(rows=96), **(STEPS | settings))
    return {
        "at_factorization": seen.weights,
        "weights": model.state_dict(),
        "ranks": {name: layer.rank for name, layer in callback.report.layers.items()},
        "losses": callback.report.losses,
        "svds": seen.svds,
    }


def join(rank: int) -> None:
    """Say to torch.distributed, as torchrun does, which process this is."""
    os.environ["RANK"] = str(rank)


def states(rank, size, folder, runs):
    join(rank)
    launched = {"ddp_backend": "gloo"}
    torch.save([statement(folder / name, **launched, **run) for name, run in runs.items()], folder / f"{rank}.pt")


RUNS = {
    "at the start": {"compression": {}},
    "later": {"compression": {"start_step": 2}, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    "natural steps": {"compression": NATURAL},
    "a stream": {"compression": {"start_step": 1}, "data": Stream},
    "pivots": {"compression": {"storage": "pivoted"}},
    "static graph": {
        "compression": {"start_step": 2},
        "ddp_static_graph": True,
        "ddp_find_unused_parameters": False,
        "ddp_bucket_cap_mb": 1,
        "ddp_broadcast_buffers": False,
    },
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    processes.check(folder, processes.start(folder, 2, states, RUNS))
    first, second = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    return dict(zip(RUNS, zip(first, second, strict=True), strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_end_as_one_that_sees_all_batches(tmp_path, found, name):
    run, (first, second) = RUNS[name], found[name]
    twice = {name: 2 * count for name, count in COUNTS.items()}
    accumulated = 2 * run.get("gradient_accumulation_steps", 1)
    settings = {key: value for key, value in run.items() if not key.startswith("ddp")}
    settings |= {"gradient_accumulation_steps": accumulated, "compression": run["compression"] | twice}
    expected = statement(tmp_path, **settings)
    assert first["ranks"] == second["ranks"] == expected["ranks"]
    assert all(torch.equal(first["weights"][name], weight) for name, weight in second["weights"].items())
    torch.testing.assert_close(first["losses"], expected["losses"], rtol=1e-9, atol=0)
    assert first["svds"] + second["svds"] == expected["svds"]
    assert min(first["svds"], second["svds"]) > 0
    for moment in ("at_factorization", "weights"):
        same = multiplied_out(first[moment]), multiplied_out(expected[moment])
        torch.testing.assert_close(*same, rtol=1e-5, atol=1e-6)
    moved = (not torch.equal(weight, first["weights"][key]) for key, weight in first["at_factorization"].items())
    assert any(moved)


def resumes(rank, size, folder):
    join(rank)

    def run(name, **settings):
        model = model_of_all()
        callback = ZSSVDTrainerCallback(start_step=2, progress=False, **SHORT)
        trained(
            folder / name,
            model,
            [callback],
            Padded(rows=48),
            save_strategy="steps",
            save_steps=1,
            **LAUNCHED,
            **settings,
        )
        return model

    whole = run("whole").state_dict()
    for step in (1, 3):
        resumed = run(f"again-{step}", resume=str(folder / "whole" / f"checkpoint-{step}")).state_dict()
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


def test_a_run_goes_on_from_checkpoints_to_the_same_result(tmp_path):
    processes.check(tmp_path, processes.start(tmp_path, 2, resumes))


def fails(rank, size, folder, start_step):
    """The loss of the second process fails in the middle of the calibration."""
    join(rank)
    model = model_of_all()
    before = dict(model.named_parameters())
    calls = []

    def loss(model, batch):
        calls.append(batch)
        if rank == 1 and len(calls) == 2:
            raise ValueError("the loss of this process is broken")
        return model(**batch).loss

    callback = ZSSVDTrainerCallback(start_step=start_step, progress=False, loss=loss, **SHORT)
    try:
        trained(folder, model, [callback], Padded(rows=48), **LAUNCHED)
    finally:
        assert all(parameter is before[name] for name, parameter in model.named_parameters())
        assert callback.report is None
        (wrapper,) = wrappers_of(model)
        print("everything is back", wrapper.module is model)


@pytest.mark.parametrize("start_step", [0, 2])
def test_a_process_that_fails_ends_the_others_by_name(tmp_path, start_step):
    assert processes.start(tmp_path, 2, fails, start_step) == [1, 1]
    logs = [(tmp_path / f"{rank}.log").read_text() for rank in range(2)]
    assert all("everything is back True" in log for log in logs)
    assert "ProcessFailedError: process 1 of 2 failed: ValueError: the loss of this process is broken" in logs[0]
    assert "ValueError: the loss of this process is broken" in logs[1]


class Never(TrainerCallback):
    """Counts the steps that begin."""

    begun = 0

    def on_step_begin(self, *args, **kwargs):
        self.begun += 1


def refused(rank, size, folder):
    join(rank)

    def attempt(error, message, compression=None, trainer=Trainer, **settings):
        never = Never()
        callback = ZSSVDTrainerCallback(start_step=2, progress=False, **(SHORT | (compression or {})))
        with pytest.raises(error, match=message):
            trained(
                folder, model_of_all(), [callback, never], Padded(rows=48), trainer=trainer, **(LAUNCHED | settings)
            )
        assert never.begun == 0

    attempt(UnsupportedTrainingError, "torch_compile on several processes", torch_compile=True)
    attempt(UnsupportedTrainingError, "a communication hook", trainer=Hooked)
    attempt(UnsupportedTrainingError, "not wrapped in DistributedDataParallel", trainer=Bare)
    attempt(ContradictionError, "memory 'blocks'", {"memory": "blocks"})
    attempt(ContradictionError, "max_memory", {"max_memory": "1GB"})


class Hooked(Trainer):
    """Has the wrapper send gradients in float16."""

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        self.model_wrapped.register_comm_hook(None, fp16_compress_hook)
        return prepared


class Bare(Trainer):
    """Takes the wrapper off."""

    def _prepare_for_training(self, *args, **kwargs):
        _, loader = super()._prepare_for_training(*args, **kwargs)
        self.accelerator.free_memory()
        self.model_wrapped = self.model
        return self.model, loader


def test_what_cannot_be_compressed_on_several_processes_is_refused_before_the_first_step(tmp_path):
    processes.check(tmp_path, processes.start(tmp_path, 2, refused))


def wraps(rank, size, folder):
    """The wrapper keeps its hooks and its mode; a run in bf16 and a second call of `train` go on."""
    join(rank)
    model = model_of_all().float()
    trainer = trained(folder, model, [], Padded(rows=48), **LAUNCHED)
    (wrapper,) = wrappers_of(model)
    calls = []
    wrapper.register_forward_pre_hook(lambda *_: calls.append(1))
    trainer.add_callback(ZSSVDTrainerCallback(start_step=1, progress=False, **SHORT))
    trainer.train()
    assert wrappers_of(model) == [wrapper]
    assert trainer.model_wrapped is wrapper
    assert low_rank(model)
    assert len(calls) == 4
    assert {name.removeprefix("module.") for name, _ in wrapper.named_parameters()} == dict(
        model.named_parameters()
    ).keys()

    mixed = model_of_all().float()
    trained(
        folder,
        mixed,
        [ZSSVDTrainerCallback(start_step=1, progress=False, **SHORT)],
        Padded(rows=48),
        bf16=True,
        **LAUNCHED,
    )
    assert low_rank(mixed)
    torch.save([model.state_dict(), mixed.state_dict()], folder / f"{rank}.pt")


def test_the_wrapper_is_the_same_object_and_replicas_stay_equal(tmp_path):
    processes.check(tmp_path, processes.start(tmp_path, 2, wraps))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(other[name], weight) for name, weight in one.items())
