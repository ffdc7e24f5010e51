"""Layers that calibration does not reach on some or all of several processes."""

import pytest
import torch
from support.models import REASONS, CausalLM, Experts, Unreached
from support.parallel import NATURAL, Run, Sharded, alone, multiplied_out, run
from support.warned import warned_once

from zssvd_lightning.errors import LeftDenseWarning

FLOAT64 = {"precision": "64-true"}
NAMES = {f"model.{name}" for name in REASONS}


class NotReached(CausalLM):
    def __init__(self, family: str = "llama") -> None:
        torch.manual_seed(0)
        super().__init__(Unreached().double())


def by_tokens(_: int, tokens: torch.Tensor) -> list[int]:
    """The second expert for about half of the batches, by what is in them."""
    return [0, 1] if int(tokens.sum()) % 2 else [0]


class Routed(CausalLM):
    def __init__(self, family: str = "llama") -> None:
        torch.manual_seed(0)
        super().__init__(Experts(by_tokens))


def on_the_first_process(_: int, tokens: torch.Tensor) -> list[int]:
    alone = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    return [0, 1] if alone else [0]


class OnOne(CausalLM):
    def __init__(self, family: str = "llama") -> None:
        torch.manual_seed(0)
        super().__init__(Experts(on_the_first_process))


class ShardedNotReached(Sharded):
    def __init__(self, family: str = "llama") -> None:
        torch.manual_seed(0)
        CausalLM.__init__(self, Unreached())


UNUSED = {"find_unused_parameters": True}


@pytest.mark.parametrize("settings", [{}, NATURAL], ids=["projected", "natural"])
def test_all_processes_leave_the_same_layers_dense(tmp_path, settings):
    described = Run(module=NotReached, compression=settings, trainer=FLOAT64, settings=UNUSED)
    ranks = run(tmp_path, 2, described)
    with warned_once(LeftDenseWarning, "6 of 20 target layers stay dense"):
        expected = alone(described, 2)
    assert ranks[0]["ranks"] == ranks[1]["ranks"] == expected["ranks"]
    assert not NAMES & ranks[0]["ranks"].keys()
    found, wanted = (multiplied_out(r["at_factorization"]) for r in (ranks[0], expected))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    logs = [(tmp_path / f"{rank}.log").read_text() for rank in range(2)]
    assert [log.count("6 of 20 target layers stay dense") for log in logs] == [1, 0]


@pytest.mark.parametrize("module", [Routed, OnOne])
def test_a_layer_that_ran_on_one_process_only_has_run(tmp_path, module):
    described = Run(module=module, compression={"selection": "uniform"}, trainer=FLOAT64, settings=UNUSED)
    ranks = run(tmp_path, 2, described)
    assert ranks[0]["ranks"] == ranks[1]["ranks"]
    assert ranks[0]["ranks"]["model.experts.1"] is not None
    assert len(ranks[0]["ranks"]) == 16
    assert all(torch.equal(value, ranks[1]["weights"][name]) for name, value in ranks[0]["weights"].items())


def test_shards_leave_the_same_layers_dense(tmp_path):
    described = Run(strategy="fsdp2", module=ShardedNotReached)
    ranks = run(tmp_path, 2, described)
    assert ranks[0]["ranks"] == ranks[1]["ranks"]
    assert ranks[0]["ranks"]
    assert not {f"model.{name}" for name in ("idle", "read", "gone", "zero")} & ranks[0]["ranks"].keys()
