"""Two compressions one after another in one fit, on two processes."""

import os
import signal

import torch
from support import processes
from support.callbacks import short
from support.models import CausalLM, padded_batches, tiny_llama, trainer
from support.parallel import KeepsLast, Run, multiplied_out
from torchdata.stateful_dataloader import StatefulDataLoader

from zssvd_lightning import LoRARecovery, Phase
from zssvd_lightning.serialization.specs import ranks_of

COUNT = 28


class Kills(KeepsLast):
    """Saves every step, and kills the process in the second compression."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == 9:
            os.kill(os.getpid(), signal.SIGKILL)


def compressed(batches, size, *callbacks, ckpt_path=None, **settings):
    """Weights after a fit whose optimizers change nothing, so that it is the same on one process as on several."""
    torch.manual_seed(0)
    module = CausalLM(tiny_llama(), lr=0.0)
    lora = LoRARecovery(rank=1, lr=None, clip_rank=True)
    each = {"calibration_batches": 4 // size, "correction_batches": 2 // size, "fresh_moments": False}
    first = short(prune_ratio=0.2, start_step=2 // size, recovery=lora, **each)
    second = short(prune_ratio=0.4, start_step=16 // size, **each)
    run = trainer(first, second, *callbacks, precision="64-true", **settings)
    run.fit(module, StatefulDataLoader(batches, batch_size=None), ckpt_path=ckpt_path)
    assert (first.phase, second.phase) == (Phase.DONE, Phase.DONE)
    return {"ranks": ranks_of(module), "weights": module.state_dict()}


def fit(rank, size, folder, resumes):
    strategy = {"devices": size, "strategy": Run().strategy_for(size), "use_distributed_sampler": False}
    settings = strategy | {"enable_checkpointing": True, "default_root_dir": folder}
    saved = folder / "saved"
    callbacks, path = ([], KeepsLast.newest(saved)) if resumes else ([Kills(saved)], None)
    found = compressed(padded_batches(COUNT)[rank::size], size, *callbacks, ckpt_path=path, **settings)
    torch.save(found, folder / f"{rank}.pt")


def test_a_killed_fit_goes_on_to_the_same_result_as_on_one_process(tmp_path):
    expected = compressed(padded_batches(COUNT), 1)
    assert processes.start(tmp_path, 2, fit, False) == [-9] * 2
    processes.check(tmp_path, processes.start(tmp_path, 2, fit, True))
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one["ranks"] == other["ranks"] == expected["ranks"]
    assert all(torch.equal(value, other["weights"][name]) for name, value in one["weights"].items())
    found, wanted = multiplied_out(one["weights"]), multiplied_out(expected["weights"])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
