"""Experts on several processes: the result of one process over all batches, and a refusal where weights are sharded."""

import torch
from support import processes
from support.experts import lopsided_experts, tiny_experts
from support.models import CausalLM
from support.parallel import Run, Sharded, alone, fit, killed, multiplied_out, run


class Mixture(CausalLM):
    """Has the same experts on every process and in every run, which also run in float64."""

    def __init__(self, family):
        torch.manual_seed(0)
        super().__init__(lopsided_experts())
        self.model.set_experts_implementation("eager")


class ShardedMixture(Sharded):
    """Shards blocks of experts."""

    def __init__(self, family):
        torch.manual_seed(0)
        CausalLM.__init__(self, tiny_experts())


COMPRESSION = {
    "prune_ratio": 0.6,
    "metric": "two_sided",
    "selection": "curvature",
    "storage": "factors",
    "remove_experts": True,
}


def test_two_processes_give_what_one_makes_of_their_batches_also_after_a_kill(tmp_path):
    (tmp_path / "whole").mkdir()
    settings = {"precision": "64-true"}
    described = Run(module=Mixture, trainer=settings | {"enable_checkpointing": True}, compression=COMPRESSION)
    found, expected = (
        run(tmp_path / "whole", 2, described),
        alone(Run(module=Mixture, trainer=settings, compression=COMPRESSION), 2),
    )
    assert found[0]["ranks"] == found[1]["ranks"] == expected["ranks"]
    assert any(".experts." in name and rank is not None for name, rank in found[0]["ranks"].items())
    assert any(rank == 0 for rank in found[0]["ranks"].values())
    torch.testing.assert_close(found[0]["losses"], expected["losses"], rtol=1e-9, atol=0)
    products = [multiplied_out(each["at_factorization"]) for each in (found[0], expected)]
    torch.testing.assert_close(*products, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(value, found[1]["weights"][name]) for name, value in found[0]["weights"].items())

    described.ckpt_path = str(killed(tmp_path, 2, described, "calibrate", 2))
    resumed = run(tmp_path, 2, described)
    assert resumed[0]["ranks"] == found[0]["ranks"]
    torch.testing.assert_close(resumed[0]["losses"], found[0]["losses"], rtol=1e-9, atol=0)


def test_sharded_experts_are_refused_by_name(tmp_path):
    described = Run(strategy="fsdp2", module=ShardedMixture)
    assert processes.start(tmp_path, 2, fit, described) == [1, 1]
    found = (tmp_path / "0.log").read_text()
    assert "UnsupportedTrainingError: model.model.layers.0.mlp.experts" in found
    assert "stacks experts" in found
    assert "add model.model.layers.0.mlp.experts.* to ignore" in found


def test_sharded_models_train_without_their_experts(tmp_path):
    described = Run(strategy="fsdp2", module=ShardedMixture, compression={"ignore": "*.mlp.experts.*"})
    found = run(tmp_path, 2, described)
    assert found[0]["ranks"] == found[1]["ranks"]
    assert not any(".experts." in name for name in found[0]["ranks"])
