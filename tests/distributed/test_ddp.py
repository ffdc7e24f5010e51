"""DDP with real processes: the result of one process over all batches, and replicas that stay equal."""

import functools

import pytest
import torch
from support import processes
from support.killed_run import Kill
from support.parallel import NEEDED, KeepsLast, Replicated, Run, alone, fit, multiplied_out, run

FLOAT64 = {"precision": "64-true"}


def assert_replicas_equal(ranks: list[dict]) -> None:
    for other in ranks[1:]:
        assert other["ranks"] == ranks[0]["ranks"]
        assert other["weights"].keys() == ranks[0]["weights"].keys()
        assert all(torch.equal(ranks[0]["weights"][n], t) for n, t in other["weights"].items())


@pytest.mark.parametrize(
    ("size", "family", "settings"),
    [
        (2, "llama", {}),
        (3, "llama", {}),
        (2, "gpt2", {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
        (2, "t5", {}),
    ],
)
def test_uneven_batches_of_several_processes_give_what_one_process_makes_of_them(tmp_path, size, family, settings):
    described = Run(family=family, trainer=FLOAT64 | settings)
    ranks = run(tmp_path, size, described)
    expected = alone(Run(family=family, trainer=FLOAT64), size)
    assert_replicas_equal(ranks)
    assert ranks[0]["ranks"] == expected["ranks"]
    torch.testing.assert_close(ranks[0]["losses"], expected["losses"], rtol=1e-9, atol=0)
    assert ranks[0]["drift"] == pytest.approx(expected["drift"], rel=1e-6)
    found, wanted = (multiplied_out(r["at_factorisation"]) for r in (ranks[0], expected))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    assert sum(r["svds"] for r in ranks) == expected["svds"]
    assert min(r["svds"] for r in ranks) > 0


@pytest.mark.parametrize(
    "settings",
    [{}, {"find_unused_parameters": True}, {"static_graph": True}, {"gradient_as_bucket_view": True}],
    ids=lambda settings: next(iter(settings), "plain"),
)
def test_replicas_are_equal_to_the_bit_after_50_more_steps(tmp_path, settings):
    ranks = run(tmp_path, 2, Run(count=2 * (NEEDED + 50), settings=settings))
    assert_replicas_equal(ranks)
    assert len(ranks[0]["seen"]) == NEEDED + 50
    assert any(not torch.equal(t, ranks[0]["weights"][n]) for n, t in ranks[0]["at_factorisation"].items())


def test_two_nodes_of_two_processes(tmp_path):
    ranks = run(tmp_path, 4, Run(trainer={"num_nodes": 2, "devices": 2}), nodes=2)
    assert_replicas_equal(ranks)


@pytest.mark.parametrize(("phase", "batch"), [("calibrate", 3), ("correct", 2), ("recover", 4)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_killed_run_goes_on_to_the_same_result(tmp_path, phase, batch, accumulate):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    settings = FLOAT64 | {"enable_checkpointing": True, "accumulate_grad_batches": accumulate}
    described = Run(count=2 * (NEEDED + 8), trainer=settings, module=Momentum)
    expected = run(whole, 2, described)
    described.callbacks = (
        functools.partial(KeepsLast, killed / "saved"),
        functools.partial(Kill, batch, "on_train_batch_end", [phase]),
    )
    assert processes.start(killed, 2, fit, described) == [-9, -9]
    described.callbacks, described.ckpt_path = (), str(KeepsLast.newest(killed / "saved"))
    found = run(killed, 2, described)
    assert_replicas_equal(found)
    assert found[0]["ranks"] == expected[0]["ranks"]
    torch.testing.assert_close(found[0]["losses"], expected[0]["losses"], rtol=1e-9, atol=0)
    torch.testing.assert_close(
        multiplied_out(found[0]["weights"]), multiplied_out(expected[0]["weights"]), rtol=1e-5, atol=1e-7
    )


class Momentum(Replicated):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
