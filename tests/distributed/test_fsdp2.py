"""FSDP2 with real processes: the result of one process over all batches, from parameters that stay in rows."""

import functools

import pytest
import torch
from support import processes
from support.killed_run import Kill
from support.parallel import NEEDED, InBfloat16, KeepsLast, Replicated, Run, alone, fit, multiplied_out, run

FLOAT64 = {"precision": "64-true"}


@pytest.mark.parametrize(("size", "family"), [(2, "llama"), (3, "gpt2"), (2, "t5")])
def test_sharded_parameters_give_what_one_process_makes_of_the_same_batches(tmp_path, size, family):
    ranks = run(tmp_path, size, Run(strategy="fsdp2", family=family))
    expected = alone(Run(family=family), size)
    assert all(other["ranks"] == ranks[0]["ranks"] == expected["ranks"] for other in ranks)
    torch.testing.assert_close(ranks[0]["losses"], expected["losses"], rtol=1e-6, atol=0)
    found, wanted = (multiplied_out(r["at_factorisation"]) for r in (ranks[0], expected))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert sum(r["svds"] for r in ranks) == expected["svds"]
    assert min(r["svds"] for r in ranks) > 0


def test_training_goes_on_with_the_factors_in_rows_as_ddp_does(tmp_path):
    (tmp_path / "ddp").mkdir(), (tmp_path / "fsdp2").mkdir()
    described = {"count": 2 * (NEEDED + 20), "compression": {"corrections": 0}}
    sharded = run(tmp_path / "fsdp2", 2, Run(strategy="fsdp2", **described))
    replicated = run(tmp_path / "ddp", 2, Run(strategy="ddp", **described))
    assert sharded[0]["ranks"] == replicated[0]["ranks"]
    torch.testing.assert_close(sharded[0]["seen"], replicated[0]["seen"], rtol=1e-4, atol=0)
    found, wanted = (multiplied_out(r[0]["weights"]) for r in (sharded, replicated))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_bfloat16_in_the_forward_pass(tmp_path):
    ranks = run(tmp_path, 2, Run(strategy="fsdp2", module=InBfloat16, count=2 * (NEEDED + 20)))
    expected = alone(Run(), 2)
    torch.testing.assert_close(ranks[0]["losses"], expected["losses"], rtol=1e-2, atol=0)
    assert {t.dtype for t in ranks[0]["weights"].values()} == {torch.float32}
    assert all(torch.isfinite(t).all() for t in ranks[0]["weights"].values())


class Momentum:
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


from support.parallel import Sharded


class ShardedMomentum(Momentum, Sharded):
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
        module=ShardedMomentum,
        settings={"save_distributed_checkpoint": distributed},
    )
    expected = run(whole, 2, described)
    described.callbacks = (
        functools.partial(KeepsLast, killed / "saved"),
        functools.partial(Kill, batch, "on_train_batch_end", [phase]),
    )
    assert processes.start(killed, 2, fit, described) == [-9, -9], (killed/"0.log").read_text()[-3000:]
    described.callbacks, described.ckpt_path = (), str(killed / "saved" / "last.ckpt")
    found = run(killed, 2, described)
    assert found[0]["ranks"] == expected[0]["ranks"]
    torch.testing.assert_close(found[0]["losses"], expected[0]["losses"], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[0]["seen"], expected[0]["seen"][-len(found[0]["seen"]):], rtol=1e-4, atol=0)
    found, wanted = (multiplied_out(r[0]["weights"]) for r in (found, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
