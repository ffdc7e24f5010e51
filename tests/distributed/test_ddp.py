"""DDP with real processes: the result of one process over all batches, and replicas that stay equal."""

import functools
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.strategies import DDPStrategy
from support import processes
from support.callbacks import scheduled
from support.models import loader, token_batches, trainer
from support.parallel import NATURAL, NEEDED, REFIT, SHORT, Replicated, Run, alone, fit, killed, multiplied_out, run

from zssvd_lightning import LowRankCheckpointMixin, ZSSVDCallback, compress
from zssvd_lightning.errors import UnsupportedTrainingError
from zssvd_lightning.serialization.specs import ranks_of
from zssvd_lightning.strategies import DDPAdapter

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
    found, wanted = (multiplied_out(r["at_factorization"]) for r in (ranks[0], expected))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    assert sum(r["svds"] for r in ranks) == expected["svds"]
    assert min(r["svds"] for r in ranks) > 0


@pytest.mark.parametrize(
    "settings", [NATURAL | {"reestimate": True}, REFIT], ids=["natural steps after reestimation", "refit"]
)
def test_corrections_go_by_gradients_at_outputs_and_inputs_of_all_processes(tmp_path, settings):
    described = Run(compression=settings, trainer=FLOAT64 | {"accumulate_grad_batches": 2})
    ranks, expected = run(tmp_path, 2, described), alone(Run(compression=settings, trainer=FLOAT64), 2)
    assert_replicas_equal(ranks)
    assert ranks[0]["ranks"] == expected["ranks"]
    torch.testing.assert_close(ranks[0]["losses"], expected["losses"], rtol=1e-9, atol=0)
    found, wanted = (multiplied_out(r["at_factorization"]) for r in (ranks[0], expected))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_things_in_scratch_files_make_no_difference(tmp_path, strategy):
    started = {"start_step": 2, "park_optimizer": strategy == "ddp"}
    described = [
        Run(strategy, compression={"offload": place, **started}, count=2 * (NEEDED + 2)) for place in ("disk", "none")
    ]
    ranks, kept = (run(tmp_path, 2, each) for each in described)
    assert_replicas_equal(ranks)
    assert ranks[0]["ranks"] == kept[0]["ranks"]
    assert all(torch.equal(kept[0]["weights"][name], weight) for name, weight in ranks[0]["weights"].items())


def test_gradients_are_drawn_from_logits_on_every_process_beside_those_of_the_loss(tmp_path):
    described = Run(compression=NATURAL | {"output_side": "sampled"}, trainer=FLOAT64)
    ranks, usual = run(tmp_path, 2, described), alone(Run(compression=NATURAL, trainer=FLOAT64), 2)
    assert_replicas_equal(ranks)
    assert ranks[0]["losses"][0] == pytest.approx(usual["losses"][0], rel=1e-9)
    assert ranks[0]["drift"] != pytest.approx(usual["drift"], rel=1e-3)


@pytest.mark.parametrize(
    "settings",
    [{}, {"find_unused_parameters": True}, {"static_graph": True}, {"gradient_as_bucket_view": True}],
    ids=lambda settings: next(iter(settings), "plain"),
)
def test_replicas_are_equal_to_the_bit_after_50_more_steps(tmp_path, settings):
    ranks = run(tmp_path, 2, Run(count=2 * (NEEDED + 50), settings=settings))
    assert_replicas_equal(ranks)
    assert len(ranks[0]["seen"]) == NEEDED + 50
    assert any(not torch.equal(t, ranks[0]["weights"][n]) for n, t in ranks[0]["at_factorization"].items())


def test_storage_in_8_bits_is_the_same_on_every_process(tmp_path):
    """Rows that stay in 16 bits are those of one process over all batches."""
    described = Run(compression={"storage": "remap", "rows_in_16_bits": "loss_aware"}, trainer=FLOAT64)
    ranks, expected = run(tmp_path, 2, described), alone(described, 2)
    assert_replicas_equal(ranks)
    assert ranks[0]["ranks"] == expected["ranks"]
    codes = {name: t for name, t in expected["weights"].items() if name.endswith(("_codes", "_rest", "_order"))}
    assert {t.dtype for t in codes.values()} == {torch.int8, torch.float16, torch.int32}
    assert {n: t.shape for n, t in codes.items()} == {n: ranks[0]["weights"][n].shape for n in codes}
    orders = [name for name in codes if name.endswith("_order")]
    assert all(torch.equal(codes[name], ranks[0]["weights"][name]) for name in orders)


def test_two_nodes_of_two_processes(tmp_path):
    ranks = run(tmp_path, 4, Run(trainer={"num_nodes": 2, "devices": 2}), nodes=2)
    assert_replicas_equal(ranks)


class LowRank(Replicated):
    """Is low-rank already, with the same factors on every process."""

    def __init__(self, family="llama"):
        super().__init__(family)
        settings = {"preset": "zs-svd-line-search", "corrections": 0, "progress": False}
        compress(self.model, token_batches(4), prune_ratio=0.2, **settings)


def test_a_low_rank_model_is_compressed_again_as_on_one_process(tmp_path):
    described = Run(module=LowRank, trainer=FLOAT64, compression={"prune_ratio": 0.5})
    ranks, expected = run(tmp_path, 2, described), alone(described, 2)
    assert_replicas_equal(ranks)
    assert ranks[0]["ranks"] == expected["ranks"]
    before = ranks_of(LowRank())
    assert before
    assert all(ranks[0]["ranks"][name] <= rank for name, rank in before.items())
    torch.testing.assert_close(ranks[0]["losses"], expected["losses"], rtol=1e-9, atol=0)
    found, wanted = (multiplied_out(r["at_factorization"]) for r in (ranks[0], expected))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("phase", "batch"), [("calibrate", 3), ("recover", 2)])
def test_a_killed_recompression_goes_on_to_the_same_result(tmp_path, phase, batch):
    """Its factors train before the compression starts, in which layers that gain nothing keep them."""
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), folder.mkdir()
    described = Run(
        module=LowRank,
        count=2 * (NEEDED + 5),
        trainer=FLOAT64 | {"enable_checkpointing": True},
        compression={"prune_ratio": 0.35, "selection": "uniform", "start_step": 2},
    )
    expected = run(whole, 2, described)
    assert_replicas_equal(expected)
    described.ckpt_path = str(killed(folder, 2, described, phase, batch))
    found = run(folder, 2, described)
    assert_replicas_equal(found)
    assert found[0]["ranks"] == expected[0]["ranks"]
    torch.testing.assert_close(
        multiplied_out(found[0]["weights"]), multiplied_out(expected[0]["weights"]), rtol=1e-5, atol=1e-7
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nothing interrupts; each is made once."""
    return functools.cache(lambda accumulate: run(tmp_path_factory.mktemp("whole"), 2, gone_on_with(accumulate)))


def gone_on_with(accumulate):
    settings = FLOAT64 | {"enable_checkpointing": True, "accumulate_grad_batches": accumulate}
    return Run(count=2 * (NEEDED + 8), trainer=settings, module=Momentum)


@pytest.mark.parametrize(("phase", "batch"), [("calibrate", 3), ("correct", 2), ("recover", 4)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_killed_run_goes_on_to_the_same_result(tmp_path, whole, phase, batch, accumulate):
    described, expected = gone_on_with(accumulate), whole(accumulate)
    described.ckpt_path = str(killed(tmp_path, 2, described, phase, batch))
    found = run(tmp_path, 2, described)
    assert_replicas_equal(found)
    assert found[0]["ranks"] == expected[0]["ranks"]
    torch.testing.assert_close(found[0]["losses"], expected[0]["losses"], rtol=1e-9, atol=0)
    torch.testing.assert_close(
        multiplied_out(found[0]["weights"]), multiplied_out(expected[0]["weights"]), rtol=1e-5, atol=1e-7
    )


class Momentum(Replicated):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class OverflowsOnOne(L.Callback):
    """Lets gradients of the third calibration batch of the second process overflow."""

    def setup(self, trainer, pl_module, stage):
        step = pl_module.training_step

        def steps(batch, batch_idx):
            loss = step(batch, batch_idx)
            if trainer.global_rank == 1 and batch_idx == 2:
                loss.register_hook(lambda gradient: gradient * torch.inf)
            return loss

        pl_module.training_step = steps

    def on_train_end(self, trainer, pl_module):
        (compression,) = [c for c in trainer.callbacks if isinstance(c, ZSSVDCallback)]
        print("scale", trainer.precision_plugin.scaler.get_scale(), "losses", len(compression.report.losses))


def test_an_overflow_on_one_process_discards_the_batches_of_all(tmp_path):
    described = Run(count=2 * (NEEDED + 1), callbacks=(OverflowsOnOne,), scale=1024.0)
    ranks = run(tmp_path, 2, described)
    assert_replicas_equal(ranks)
    assert "scale 512.0 losses 4" in (tmp_path / "0.log").read_text()
    assert "scale 512.0 losses 4" in (tmp_path / "1.log").read_text()


def plan_then_follow(rank: int, size: int, folder: Path) -> None:
    """A dry run, and a compression by what it wrote."""
    described = Run()
    distribution = {"devices": size, "use_distributed_sampler": False}
    ranks = []
    for settings in ({"dry_run": folder / "plan.yaml"}, {"plan": folder / "plan.yaml"}):
        module, callback = Replicated(), ZSSVDCallback(**scheduled(SHORT | settings))
        strategy = described.strategy_for(size)
        trainer(callback, strategy=strategy, **distribution).fit(module, loader(described.batches(rank, size)))
        ranks.append(ranks_of(module))
    assert ranks[0] == {}
    layers = yaml.safe_load((folder / "plan.yaml").read_text())["layers"]
    assert ranks[1] == {name: entry["rank"] for name, entry in layers.items() if entry["rank"] != "dense"}


def test_a_dry_run_writes_one_plan_that_all_follow(tmp_path):
    processes.check(tmp_path, processes.start(tmp_path, 2, plan_then_follow))


class Loads(LowRankCheckpointMixin, Replicated):
    """Takes low-rank weights back from the processes that trained them."""


def test_processes_that_hand_weights_back_need_a_module_that_can_take_them():
    strategy = DDPStrategy(process_group_backend="gloo", start_method="spawn", timeout=timedelta(seconds=60))
    with pytest.raises(UnsupportedTrainingError, match="give it LowRankCheckpointMixin as a base class"):
        DDPAdapter(SimpleNamespace(strategy=strategy), Replicated()).refuse_unsupported()
    module = Loads()
    trainer(ZSSVDCallback(**scheduled(SHORT)), devices=2, strategy=strategy).fit(
        module, loader(token_batches(4 * NEEDED))
    )
    assert ranks_of(module)


def test_local_sgd_is_refused(tmp_path):
    described = Run(callbacks=(LocalSGD,))
    assert processes.start(tmp_path, 2, fit, described) == [1, 1]
    assert "UnsupportedTrainingError: local SGD lets the weights" in (tmp_path / "1.log").read_text()


class LocalSGD(L.Callback):
    def setup(self, trainer, pl_module, stage):
        trainer.strategy._model_averager = object()


class Experts(Replicated):
    """The second process uses a layer that the first never does."""

    def __init__(self, family: str = "llama") -> None:
        super().__init__(family)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(2))

    def training_step(self, batch, batch_idx):
        hidden = self.model.model(batch["input_ids"]).last_hidden_state
        return self.experts[self.global_rank](hidden).square().mean()


def test_layers_that_run_on_one_process_only(tmp_path):
    (tmp_path / "whole").mkdir()
    described = Run(
        module=Experts,
        settings={"find_unused_parameters": True},
        trainer={"enable_checkpointing": True, **FLOAT64},
        compression={"correction_batches": 1},
    )
    expected = run(tmp_path / "whole", 2, described)
    described.ckpt_path = str(killed(tmp_path, 2, described, "calibrate", 2))
    found = run(tmp_path, 2, described)
    assert found[0]["ranks"] == found[1]["ranks"] == expected[0]["ranks"]
    torch.testing.assert_close(found[0]["losses"], expected[0]["losses"], rtol=1e-9, atol=0)
    assert any(rank is not None for rank in found[0]["ranks"].values())


def test_loaders_of_different_length_are_refused(tmp_path):
    assert processes.start(tmp_path, 2, fit, Run(count=2 * NEEDED + 1)) == [1, 1]
    assert "processes have 13, 12 batches" in (tmp_path / "0.log").read_text()
