"""Recovery on several processes: DDP and FSDP2 train the same weights, and go on from a kill."""

import functools

import lightning as L
import pytest
import torch
from support import processes
from support.callbacks import scheduled
from support.models import trainer
from support.parallel import NEEDED, SHORT, Replicated, Run, Sharded, killed, run, whole_weights
from torch.distributed.tensor import DTensor

from zssvd_lightning import Phase, ZSSVDCallback
from zssvd_lightning.recovery.teachers import DenseTeacher

LORA = {"method": "lora", "rank": 2, "clip_rank": True, "loss": "distill", "teacher_dtype": "float32", "lr": 1e-2}
WAYS = {
    "lora": LORA | {"two_step": True, "peft": {"use_dora": True}},
    "pissa": LORA | {"peft": {"init_lora_weights": "pissa"}, "loss": "both"},
    "factors": {"method": "factors", "loss": "both", "teacher_dtype": "float32"},
    "lora on pivots": LORA | {"two_step": True},
    "singular values": {"method": "singular_values", "lr": 1e-1, "also_train": ["*norm.weight"]},
}
COUNT = 2 * (NEEDED + 8)


class InDouble(Replicated):
    def __init__(self, *args):
        super().__init__(*args)
        self.double()


class ShardedInDouble(InDouble, Sharded):
    pass


def described(strategy, way, **settings):
    compression = {"recovery": WAYS[way], "prune_ratio": 0.5}
    if "pivots" in way:
        compression["storage"] = "pivoted"
    trainer = {"enable_checkpointing": True, "max_epochs": -1, "max_steps": NEEDED + 8}
    module = {"ddp": InDouble, "fsdp2": ShardedInDouble}[strategy]
    if way == "pissa":  # which peft takes in float32 alone, where rounding may choose other ranks
        module, compression["selection"] = None, "uniform"
    return Run(strategy, module=module, count=COUNT, compression=compression, trainer=trainer, settings=settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nothing interrupts; each is made once."""

    @functools.cache
    def whole(strategy, way, extend):
        return run(tmp_path_factory.mktemp("whole"), 2, extended(described(strategy, way), extend))

    return whole


def extended(asked, extend):
    if extend:
        asked.compression["extend_training"], asked.trainer["max_steps"] = True, 8
    return asked


@pytest.mark.parametrize("way", WAYS)
def test_factors_in_rows_recover_as_whole_ones_do(whole, way):
    found = {}
    for strategy in ("ddp", "fsdp2"):
        both = whole(strategy, way, False)
        assert all(torch.equal(both[0]["weights"][name], value) for name, value in both[1]["weights"].items())
        found[strategy] = both[0]
    ddp, fsdp2 = found["ddp"], found["fsdp2"]
    assert ddp["weights"].keys() == fsdp2["weights"].keys()
    parts = ("others", "pivots", "columns", "mixing") if "pivots" in way else ("up", "down")
    assert all(any(name.endswith(f"{part}.weight") for name in ddp["weights"]) for part in parts)
    assert not any("lora" in name for name in ddp["weights"])
    torch.testing.assert_close(fsdp2["seen"], ddp["seen"], rtol=1e-3, atol=1e-4)
    changed = {n for n in ddp["weights"] if any(f"_proj.{part}." in n for part in parts)}
    torch.testing.assert_close(
        {n: fsdp2["weights"][n] for n in changed}, {n: ddp["weights"][n] for n in changed}, rtol=2e-2, atol=2e-3
    )


@pytest.mark.parametrize(
    ("strategy", "distributed", "extend", "way"),
    [
        ("ddp", None, False, "lora"),
        ("fsdp2", True, False, "lora"),
        ("fsdp2", False, True, "lora"),
        ("ddp", None, False, "lora on pivots"),
        ("fsdp2", True, False, "lora on pivots"),
    ],
)
def test_a_recovery_that_is_killed_goes_on_to_the_same_result(tmp_path, whole, strategy, distributed, extend, way):
    settings = {} if distributed is None else {"save_distributed_checkpoint": distributed}
    asked = extended(described(strategy, way, **settings), extend)
    expected = whole(strategy, way, extend)
    asked.ckpt_path = str(killed(tmp_path, 2, asked, "recover", 6))
    found = run(tmp_path, 2, asked)
    assert found[0]["ranks"] == expected[0]["ranks"]
    left = len(found[0]["seen"])
    assert 0 < left < 8
    torch.testing.assert_close(found[0]["seen"], expected[0]["seen"][-left:], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[0]["weights"], expected[0]["weights"])


class Poisons(L.Callback):
    """Has the loss of the second process be NaN in the recovery."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_rank == 1 and batch_idx == NEEDED + 3:
            step = pl_module.training_step
            pl_module.training_step = lambda *batch: step(*batch) * torch.nan


def diverge(rank, size, folder, strategy):
    module = {"ddp": Replicated, "fsdp2": Sharded}[strategy]()
    recovery = {"method": "factors", "loss": "both"}
    callback = ZSSVDCallback(**scheduled(SHORT | {"recovery": recovery, "prune_ratio": 0.5}))
    asked = described(strategy, "factors")
    distribution = {"devices": size, "strategy": asked.strategy_for(size), "use_distributed_sampler": False}
    teacher = {}

    class Looks(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if callback.phase is Phase.RECOVER:
                found = callback.run.life.recovery._teacher
                assert isinstance(found, DenseTeacher)
                teacher["sharded"] = all(isinstance(p, DTensor) for p in found.model.parameters())

    fitted = trainer(callback, Looks(), Poisons(), max_steps=NEEDED + 8, max_epochs=-1, **distribution)
    try:
        fitted.fit(module, torch.utils.data.DataLoader(asked.batches(rank, size), batch_size=None))
    except Exception as error:  # noqa: BLE001
        torch.save({"error": type(error).__name__, "finite": finite(module), **teacher}, folder / f"{rank}.pt")


def finite(module):
    return all(bool(value.isfinite().all()) for value in whole_weights(module).values())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_loss_that_is_not_finite_on_one_process_ends_the_recovery_on_all(tmp_path, strategy):
    processes.check(tmp_path, processes.start(tmp_path, 2, diverge, strategy))
    for rank in range(2):
        said = torch.load(tmp_path / f"{rank}.pt")
        assert said == {"error": "DivergedError", "finite": True, "sharded": strategy == "fsdp2"}
