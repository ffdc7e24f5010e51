"""FSDP2 with real processes: the result of one process over all batches, from parameters that stay in rows."""

import functools

import pytest
import torch
from support import processes
from support.killed_run import Kill
from support.parallel import (
    NEEDED,
    InBfloat16,
    KeepsLast,
    Replicated,
    Run,
    Sharded,
    alone,
    fit,
    multiplied_out,
    run,
    whole_weights,
)
from support.witnesses import WholeWeights
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from zssvd_lightning import LowRankCheckpointMixin

@pytest.mark.parametrize(("size", "family"), [(2, "llama"), (3, "gpt2"), (2, "t5")])
def test_sharded_parameters_give_what_one_process_makes_of_the_same_batches(tmp_path, size, family):
    ranks = run(tmp_path, size, Run(strategy="fsdp2", family=family, module=InDouble))
    expected = alone(Run(family=family, module=ReplicatedInDouble), size)
    assert all(other["ranks"] == ranks[0]["ranks"] == expected["ranks"] for other in ranks)
    torch.testing.assert_close(ranks[0]["losses"], expected["losses"], rtol=1e-9, atol=0)
    found, wanted = (multiplied_out(r["at_factorisation"]) for r in (ranks[0], expected))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    assert sum(r["svds"] for r in ranks) == expected["svds"]
    assert min(r["svds"] for r in ranks) > 0


def test_training_goes_on_with_the_factors_in_rows_as_ddp_does(tmp_path):
    (tmp_path / "ddp").mkdir(), (tmp_path / "fsdp2").mkdir()
    count = 2 * (NEEDED + 20)
    sharded = run(tmp_path / "fsdp2", 2, Run(strategy="fsdp2", module=InDouble, count=count))
    replicated = run(tmp_path / "ddp", 2, Run(module=ReplicatedInDouble, count=count))
    assert sharded[0]["ranks"] == replicated[0]["ranks"]
    torch.testing.assert_close(sharded[0]["seen"], replicated[0]["seen"], rtol=1e-6, atol=0)
    found, wanted = (multiplied_out(r[0]["weights"]) for r in (sharded, replicated))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_bfloat16_in_the_forward_pass(tmp_path):
    ranks = run(tmp_path, 2, Run(strategy="fsdp2", module=InBfloat16, count=2 * (NEEDED + 20)))
    expected = alone(Run(), 2)
    torch.testing.assert_close(ranks[0]["losses"], expected["losses"], rtol=1e-2, atol=0)
    assert {t.dtype for t in ranks[0]["weights"].values()} == {torch.float32}
    assert all(torch.isfinite(t).all() for t in ranks[0]["weights"].values())


class ReplicatedInDouble(Replicated):
    """Its optimizer is none that a checkpoint makes take a step: torch steps AdamW once to find out what it keeps."""

    def __init__(self, family: str = "llama") -> None:
        super().__init__(family)
        self.double()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class InDouble(ReplicatedInDouble, Sharded):
    pass


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize(("phase", "batch"), [("calibrate", 3), ("correct", 2), ("recover", 4)])
def test_a_killed_run_goes_on_to_the_same_result(tmp_path, phase, batch, distributed):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    described = Run(
        strategy="fsdp2",
        count=2 * (NEEDED + 8),
        trainer={"enable_checkpointing": True},
        module=InDouble,
        settings={"save_distributed_checkpoint": distributed},
    )
    expected = run(whole, 2, described)
    described.callbacks = (
        functools.partial(KeepsLast, killed / "saved"),
        functools.partial(Kill, batch, "on_train_batch_end", [phase]),
    )
    assert processes.start(killed, 2, fit, described) == [-9, -9]
    described.callbacks, described.ckpt_path = (), str(KeepsLast.newest(killed / "saved"))
    found = run(killed, 2, described)
    assert found[0]["ranks"] == expected[0]["ranks"]
    torch.testing.assert_close(found[0]["losses"], expected[0]["losses"], rtol=1e-9, atol=0)
    left = len(found[0]["seen"])
    assert 0 < left < len(expected[0]["seen"])
    torch.testing.assert_close(found[0]["seen"], expected[0]["seen"][-left:], rtol=1e-6, atol=0)
    found, wanted = (multiplied_out(r[0]["weights"]) for r in (found, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


class Loads(LowRankCheckpointMixin, Replicated):
    """On one process, without a Trainer."""


@pytest.fixture(scope="module")
def replicated(tmp_path_factory):
    """What DDP ends with."""
    described = Run(count=2 * (NEEDED + 4), module=ReplicatedInDouble)
    return run(tmp_path_factory.mktemp("ddp"), 2, described)[0]["weights"]


@pytest.mark.parametrize("distributed", [True, False])
def test_the_consolidated_checkpoint_is_what_ddp_ends_with(tmp_path, replicated, distributed):
    described = Run(
        strategy="fsdp2",
        count=2 * (NEEDED + 4),
        trainer={"enable_checkpointing": True},
        settings={"save_distributed_checkpoint": distributed},
        callbacks=(functools.partial(KeepsLast, tmp_path),),
        module=InDouble,
    )
    sharded = run(tmp_path, 2, described)[0]["weights"]
    path = KeepsLast.newest(tmp_path)
    assert path.is_dir() == distributed
    if distributed:
        dcp_to_torch_save(path, tmp_path / "whole.ckpt")
        path = tmp_path / "whole.ckpt"
    module = Loads()
    module.load_state_dict(torch.load(path)["state_dict"])
    loaded = whole_weights(module)
    assert all(torch.equal(loaded[name], t.to(loaded[name])) for name, t in sharded.items())
    found, wanted = multiplied_out(sharded), multiplied_out(replicated)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)




def test_no_process_ever_holds_the_whole_weights_of_two_layers(tmp_path):
    saving = functools.partial(KeepsLast, tmp_path)
    run(tmp_path, 2, Run(strategy="fsdp2", callbacks=(WholeWeights, saving), trainer={"enable_checkpointing": True}))
