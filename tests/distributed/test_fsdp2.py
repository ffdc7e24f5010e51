"""FSDP2 with real processes: the result of one process over all batches, from parameters that stay in rows."""

import functools
import gc
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from support import processes
from support.callbacks import scheduled
from support.models import loader, token_batches, trainer
from support.parallel import (
    NATURAL,
    NEEDED,
    SHORT,
    InBfloat16,
    KeepsLast,
    Replicated,
    Run,
    Sharded,
    alone,
    blocks_of,
    fit,
    killed,
    multiplied_out,
    run,
    whole_weights,
)
from support.witnesses import WholeWeights
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.tensor import Shard

from zssvd_lightning import LowRankCheckpointMixin, ZSSVDCallback, compress
from zssvd_lightning.errors import TargetError, UnsupportedTrainingError
from zssvd_lightning.serialization.specs import ranks_of
from zssvd_lightning.strategies import FSDP2Adapter
from zssvd_lightning.strategies.sharded_checkpoints import PARTS


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs in double precision that nothing interrupts, with steps after the compression; each is made once."""

    @functools.cache
    def whole(strategy, accumulate):
        module = {"ddp": ReplicatedInDouble, "fsdp2": InDouble}[strategy]
        settings = {"accumulate_grad_batches": accumulate}
        described = Run(strategy, module=module, count=2 * (NEEDED + 8), trainer=settings)
        return run(tmp_path_factory.mktemp("whole"), 2, described)

    return whole


@pytest.mark.parametrize(("size", "family"), [(2, "llama"), (3, "gpt2"), (2, "t5")])
def test_sharded_parameters_give_what_one_process_makes_of_the_same_batches(tmp_path, whole, size, family):
    described = Run(strategy="fsdp2", family=family, module=InDouble)
    ranks = whole("fsdp2", 1) if family == "llama" else run(tmp_path, size, described)
    expected = alone(Run(family=family, module=ReplicatedInDouble), size)
    assert all(other["ranks"] == ranks[0]["ranks"] == expected["ranks"] for other in ranks)
    torch.testing.assert_close(ranks[0]["losses"], expected["losses"], rtol=1e-9, atol=0)
    found, wanted = (multiplied_out(r["at_factorization"]) for r in (ranks[0], expected))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    assert sum(r["svds"] for r in ranks) == expected["svds"]
    assert min(r["svds"] for r in ranks) > 0


def test_training_goes_on_with_the_factors_in_rows_as_ddp_does(whole):
    sharded, replicated = whole("fsdp2", 1), whole("ddp", 1)
    assert len(sharded[0]["seen"]) == NEEDED + 8
    assert sharded[0]["ranks"] == replicated[0]["ranks"]
    torch.testing.assert_close(sharded[0]["seen"], replicated[0]["seen"], rtol=1e-6, atol=0)
    found, wanted = (multiplied_out(r[0]["weights"]) for r in (sharded, replicated))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def natural(tmp_path_factory):
    """What DDP makes of natural steps."""
    return run(tmp_path_factory.mktemp("natural"), 2, Run(module=ReplicatedInDouble, compression=NATURAL))


@pytest.mark.parametrize("distributed", [True, False])
def test_natural_steps_are_those_of_ddp_and_gone_on_with(tmp_path, natural, distributed):
    said = {"compression": NATURAL, "trainer": {"enable_checkpointing": True}}
    sharded = Run(strategy="fsdp2", module=InDouble, settings={"save_distributed_checkpoint": distributed}, **said)
    sharded.ckpt_path = str(killed(tmp_path, 2, sharded, "correct", 2))
    rows = run(tmp_path, 2, sharded)
    assert rows[0]["ranks"] == natural[0]["ranks"]
    torch.testing.assert_close(rows[0]["losses"], natural[0]["losses"], rtol=1e-9, atol=0)
    found, wanted = (multiplied_out(r[0]["at_factorization"]) for r in (rows, natural))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_pivot_rows_are_trained_in_rows_as_whole_and_gone_on_from(tmp_path):
    """They and their order are the same numbers on all processes, which no product has to make comparable."""
    folders = {name: tmp_path / name for name in ("ddp", "fsdp2", "killed")}
    for folder in folders.values():
        folder.mkdir()
    said = {"count": 2 * (NEEDED + 8), "compression": {"storage": "pivoted"}, "trainer": {"enable_checkpointing": True}}
    sharded = Run(strategy="fsdp2", module=InDouble, settings={"save_distributed_checkpoint": True}, **said)
    whole, rows = run(folders["ddp"], 2, Run(module=ReplicatedInDouble, **said)), run(folders["fsdp2"], 2, sharded)
    assert any(name.endswith("pivots.weight") for name in whole[0]["weights"])
    names = set(whole[0]["weights"])
    mlp = {name.removesuffix("pivots.weight") for name in names if name.endswith("up_proj.pivots.weight")}
    assert any(f"{name}order" not in names for name in mlp)  # found in the units, whose weights are whole there
    assert all(torch.equal(value, rows[1]["weights"][name]) for name, value in rows[0]["weights"].items())
    torch.testing.assert_close(rows[0]["weights"], whole[0]["weights"], rtol=1e-5, atol=1e-7)
    sharded.ckpt_path = str(killed(folders["killed"], 2, sharded, "recover", 4))
    torch.testing.assert_close(run(folders["killed"], 2, sharded)[0]["weights"], rows[0]["weights"])


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


@pytest.mark.parametrize(
    ("phase", "batch", "accumulate", "distributed"),
    [
        ("calibrate", 3, 1, True),
        ("calibrate", 3, 1, False),
        ("calibrate", 3, 2, True),
        ("correct", 2, 1, False),
        ("recover", 4, 1, True),
        ("recover", 4, 1, False),
    ],
)
def test_a_killed_run_goes_on_to_the_same_result(tmp_path, whole, phase, batch, accumulate, distributed):
    described = Run(
        strategy="fsdp2",
        count=2 * (NEEDED + 8),
        trainer={"enable_checkpointing": True, "accumulate_grad_batches": accumulate},
        module=InDouble,
        settings={"save_distributed_checkpoint": distributed},
    )
    expected = whole("fsdp2", accumulate)
    described.ckpt_path = str(killed(tmp_path, 2, described, phase, batch))
    found = run(tmp_path, 2, described)
    assert found[0]["ranks"] == expected[0]["ranks"]
    torch.testing.assert_close(found[0]["losses"], expected[0]["losses"], rtol=1e-9, atol=0)
    left = len(found[0]["seen"])
    assert 0 < left < len(expected[0]["seen"])
    torch.testing.assert_close(found[0]["seen"], expected[0]["seen"][-left:], rtol=1e-6, atol=0)
    found, wanted = (multiplied_out(r[0]["weights"]) for r in (found, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The folders of runs of two processes, with `0.pt` and the last checkpoint, in parts (True) or in one file."""

    @functools.cache
    def checkpoints(distributed):
        folder = tmp_path_factory.mktemp("saved")
        described = Run(
            strategy="fsdp2",
            module=InDouble,
            callbacks=(functools.partial(KeepsLast, folder),),
            trainer={"enable_checkpointing": True},
            settings={"save_distributed_checkpoint": distributed},
            count=2 * (NEEDED + 8),
        )
        run(folder, 2, described)
        return folder

    return checkpoints


def evaluate(rank: int, size: int, folder: Path, saved: Path) -> None:
    """Validates a checkpoint with a module and a callback that know nothing of it."""
    described = Run(strategy="fsdp2")
    module, settings = InDouble(), {"devices": size, "strategy": described.strategy_for(size)}
    evaluated = trainer(ZSSVDCallback(), use_distributed_sampler=False, **settings)
    evaluated.validate(module, loader(token_batches()), ckpt_path=str(KeepsLast.newest(saved)), verbose=False)
    weights = whole_weights(module)
    assert ranks_of(module)
    assert all(torch.equal(weights[n], t) for n, t in torch.load(saved / "0.pt")["weights"].items())


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_processes_validates_a_checkpoint(tmp_path, checkpoints, size, distributed):
    processes.check(tmp_path, processes.start(tmp_path, size, evaluate, checkpoints(distributed)))


class Loads(LowRankCheckpointMixin, Replicated):
    """On one process, without a Trainer."""


@pytest.mark.parametrize("distributed", [True, False])
def test_the_consolidated_checkpoint_is_what_ddp_ends_with(tmp_path, whole, checkpoints, distributed):
    sharded = torch.load(checkpoints(distributed) / "0.pt")["weights"]
    path = KeepsLast.newest(checkpoints(distributed))
    assert path.is_dir() == distributed
    if distributed:
        dcp_to_torch_save(path, tmp_path / "whole.ckpt")
        path = tmp_path / "whole.ckpt"
    module = Loads()
    module.load_state_dict(torch.load(path)["state_dict"])
    loaded = whole_weights(module)
    assert all(torch.equal(loaded[name], t.to(loaded[name])) for name, t in sharded.items())
    found, wanted = multiplied_out(sharded), multiplied_out(whole("ddp", 1)[0]["weights"])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_no_process_ever_holds_the_whole_weights_of_two_layers(tmp_path):
    saving = functools.partial(KeepsLast, tmp_path)
    run(tmp_path, 2, Run(strategy="fsdp2", callbacks=(WholeWeights, saving), trainer={"enable_checkpointing": True}))


def test_three_processes_go_on_with_what_two_have_gathered(tmp_path):
    """Batches are dealt out anew, so that only what was gathered before can be compared."""
    (tmp_path / "two").mkdir()
    expected = run(tmp_path / "two", 2, Run(strategy="fsdp2", module=InDouble, count=3 * NEEDED))
    described = Run(
        strategy="fsdp2",
        module=InDouble,
        trainer={"enable_checkpointing": True},
        count=3 * NEEDED,
    )
    described.ckpt_path = str(killed(tmp_path, 2, described, "correct", 3))
    ranks = run(tmp_path, 3, described)
    assert len(ranks[0]["losses"]) == 4
    assert ranks[0]["losses"][0] == expected[0]["losses"][0]
    assert ranks[0]["ranks"] == ranks[1]["ranks"] == ranks[2]["ranks"]


REFUSED = {
    "whole": ("", "is laid out whole, but compression needs its rows cut over all 2 processes"),
    "columns": ("columns", r"is laid out \(Shard\(dim=1\),\)"),
    "two dimensions": ("mesh", "is laid out .* but compression needs its rows cut over all 2 processes"),
    "low-rank": ("low-rank", "is compressed already, and its factors are spread over processes; compress the model on"),
    "every layer": ("layers", "it was given to fully_shard on its own; give the block around it instead"),
}


class OtherLayout(Replicated):
    """Shards something else than rows of blocks."""

    layout = ""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        if self.layout == "layers":
            for module in self.model.modules():
                if isinstance(module, torch.nn.Linear):
                    fully_shard(module, mesh=mesh)
        if self.layout == "columns":
            fully_shard(self.model.model.layers[0], mesh=mesh, shard_placement_fn=lambda p: Shard(p.dim() - 1))
        if self.layout == "low-rank":
            settings = {"preset": "zs-svd-line-search", "corrections": 0, "progress": False}
            compress(self.model, token_batches(4), prune_ratio=0.2, **settings)
            fully_shard(self.model.model.layers[0], mesh=mesh)
        if self.layout == "mesh":
            both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
            fully_shard(self.model.model.layers[0], mesh=both)
        fully_shard(self.model.model.embed_tokens, mesh=mesh)


def refused(rank: int, size: int, folder: Path, layout: str, message: str) -> None:
    OtherLayout.layout = layout
    described = Run(strategy="fsdp2")
    settings = {"devices": size, "strategy": described.strategy_for(size), "use_distributed_sampler": False}
    fitted = trainer(ZSSVDCallback(schedule={"calibration_batches": 2}, progress=False), max_epochs=9, **settings)
    with pytest.raises((UnsupportedTrainingError, TargetError), match=message):
        fitted.fit(OtherLayout(), loader(described.batches(rank, size)))


@pytest.mark.parametrize("case", REFUSED)
def test_other_layouts_are_refused_before_any_batch(tmp_path, case):
    processes.check(tmp_path, processes.start(tmp_path, 2, refused, *REFUSED[case]))


def test_a_torch_that_is_another_inside_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(_fsdp_param.FSDPParam, "__init__", lambda self, parameter: None)
    adapter = FSDP2Adapter(SimpleNamespace(), torch.nn.Module())
    with pytest.raises(UnsupportedTrainingError, match=r"FSDP2 of torch .* is not as this release knows it inside"):
        adapter.refuse_unsupported()


@pytest.mark.parametrize("of_another", [True, False])
def test_parts_that_are_missing_or_of_another_save_are_an_error(tmp_path, of_another):
    described = Run(
        strategy="fsdp2",
        trainer={"enable_checkpointing": True},
    )
    newest = killed(tmp_path, 2, described, "calibrate", 3)
    if of_another:
        rest = torch.load(newest / "meta.pt")
        sums = rest["callbacks"]["ZSSVDCallback"]["compression"]["gathering"]["moments"]["input_sums"]
        assert sums
        for name in sums.values():
            name[PARTS] = f"another{name[PARTS]}"
        torch.save(rest, newest / "meta.pt")
    else:
        shutil.rmtree(newest / PARTS)
    described.ckpt_path = str(newest)
    assert processes.start(tmp_path, 2, fit, described) == [1, 1]
    for rank in (0, 1):
        assert "is not what the checkpoint was saved with" in (tmp_path / f"{rank}.log").read_text()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_validation_in_between_changes_nothing(tmp_path, strategy):
    (tmp_path / "with").mkdir(), (tmp_path / "without").mkdir()
    settings = {"val_check_interval": 1, "num_sanity_val_steps": 1}
    validated = Run(strategy=strategy, module=Validated[strategy], trainer=settings)
    found = run(tmp_path / "with", 2, validated)
    without = {"limit_val_batches": 0}
    expected = run(tmp_path / "without", 2, Run(strategy=strategy, module=Validated[strategy], trainer=without))
    assert found[0]["ranks"] == expected[0]["ranks"]
    assert found[0]["losses"] == expected[0]["losses"]
    assert all(torch.equal(t, expected[0]["weights"][n]) for n, t in found[0]["weights"].items())


class WithValidation:
    def val_dataloader(self):
        return loader(token_batches(2))


class ReplicatedValidated(WithValidation, Replicated):
    pass


class ShardedValidated(WithValidation, Sharded):
    pass


Validated = {"ddp": ReplicatedValidated, "fsdp2": ShardedValidated}


def fit_again_after_a_dry_run(rank: int, size: int, folder: Path) -> None:
    """A fit of the same module must find its units as they were."""
    described, module = Run(strategy="fsdp2"), InBfloat16()
    for callback in (ZSSVDCallback(**scheduled(SHORT | {"dry_run": folder / "plan.yaml"})), None):
        settings = {"devices": size, "strategy": described.strategy_for(size), "use_distributed_sampler": False}
        fitted = trainer(*([callback] if callback else []), **settings)
        fitted.fit(module, loader(described.batches(rank, size)))
        module.configure_model = lambda: None
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in module.parameters())


def test_a_module_trains_on_after_a_dry_run_in_mixed_precision(tmp_path):
    processes.check(tmp_path, processes.start(tmp_path, 2, fit_again_after_a_dry_run))


class Frozen(InBfloat16):
    """Its blocks do not train, but are compressed all the same."""

    def configure_model(self) -> None:
        super().configure_model()
        for block in blocks_of(self.model):
            block.requires_grad_(False)


def test_frozen_blocks_are_compressed_after_other_training(tmp_path):
    described = Run(strategy="fsdp2", module=Frozen, count=2 * (NEEDED + 3), compression={"start_step": 2})
    assert any(rank is not None for rank in run(tmp_path, 2, described)[0]["ranks"].values())


class NothingIsLeft(L.Callback):
    """Looks for dense weights that nothing needs any more, before the garbage collector comes."""

    def on_train_start(self, trainer, pl_module):
        gc.disable()
        blocks = blocks_of(pl_module.model)
        self.dense = [weakref.ref(m) for b in blocks for m in b.modules() if type(m) is torch.nn.Linear]

    def on_train_end(self, trainer, pl_module):
        here = {id(module) for module in pl_module.modules()}
        gone = [ref() for ref in self.dense if ref() is None or id(ref()) not in here]
        assert len(gone) > 5
        assert not [module for module in gone if module is not None]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_replaced_weights_are_freed(tmp_path, strategy):
    run(tmp_path, 2, Run(strategy=strategy, callbacks=(NothingIsLeft,), count=2 * (NEEDED + 2)))


def test_a_checkpoint_without_optimizer_state_is_refused_by_name(tmp_path):
    (tmp_path / "ddp").mkdir()
    newest = killed(tmp_path / "ddp", 2, Run(), "calibrate", 3)
    resumed = Run(strategy="fsdp2", ckpt_path=str(newest))
    assert processes.start(tmp_path, 2, fit, resumed) == [1, 1]
    assert "holds an optimizer without a state" in (tmp_path / "1.log").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"storage": "remap"}, "storage 'remap' puts whole factors"),
        ({"metric": "two_sided", "output_side": "sampled"}, "output_side 'sampled' takes two backward passes"),
        ({"metric": "two_sided", "selection": "curvature", "reestimate": True}, "reestimate keeps the whole spectra"),
        ({"correction_step": "refit"}, "correction_step 'refit' changes whole weights"),
    ],
)
def test_settings_that_need_whole_weights_are_refused(tmp_path, settings, message):
    described = Run(strategy="fsdp2", compression=settings)
    assert processes.start(tmp_path, 2, fit, described) == [1, 1]
    assert f"UnsupportedTrainingError: {message}" in (tmp_path / "0.log").read_text()


def test_gradients_of_another_scale_are_refused(tmp_path):
    assert processes.start(tmp_path, 2, fit, Run(strategy="fsdp2", module=Scaled)) == [1, 1]
    assert "UnsupportedTrainingError: set_gradient_divide_factor" in (tmp_path / "0.log").read_text()


class Scaled(Sharded):
    def configure_model(self) -> None:
        super().configure_model()
        self.model.set_gradient_divide_factor(1.0)


class UnknownInside(L.Callback):
    """Has torch look like a release that is another inside, from the start of the training on."""

    def on_fit_start(self, trainer, pl_module):
        del FSDPModule._get_fsdp_state


def test_the_error_about_torch_is_the_one_that_is_seen(tmp_path):
    assert processes.start(tmp_path, 2, fit, Run(strategy="fsdp2", callbacks=(UnknownInside,))) == [1, 1]
    assert "is not as this release knows it inside" in (tmp_path / "0.log").read_text().splitlines()[-1]
