"""The model classes of the table in `docs/support.md`, and how each is used."""

import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from support import convolutions
from support.callbacks import scheduled
from support.experts import tiny_experts
from support.models import (
    VOCABULARY,
    image_batches,
    sequence_pairs,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    tiny_vit,
    token_batches,
    trainer,
)
from support.parallel import Run, blocks_of, whole_weights
from zssvd_lightning import ZSSVDCallback
from zssvd_lightning.errors import ZSSVDError

SETTINGS = {"prune_ratio": 0.4, "preset": "zs-svd-line-search", "corrections": 0, "rank_multiple": 1, "progress": False}


class Network(nn.Module):
    """A convolutional network that returns its loss, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = convolutions.tiny_network()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(pixel_values)
        return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


def tiny_gemma3() -> Gemma3ForCausalLM:
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=64,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        )
    )


class ModelClass(NamedTuple):
    build: Callable[[], nn.Module]
    batches: Callable[[int], list[dict[str, Tensor]]]
    settings: Mapping[str, Any] = MappingProxyType({})

    def fresh(self) -> nn.Module:
        """A model with the same weights each time."""
        torch.manual_seed(0)
        return self.build()


CLASSES = {
    "Llama": ModelClass(partial(tiny_llama, num_hidden_layers=1), token_batches),
    "GPT-2": ModelClass(partial(tiny_gpt2, n_layer=1), token_batches),
    "Gemma 3": ModelClass(tiny_gemma3, token_batches),
    "Qwen3-MoE": ModelClass(partial(tiny_experts, "qwen3_moe", num_hidden_layers=1), token_batches),
    "BERT": ModelClass(partial(tiny_bert, 1), token_batches),
    "T5": ModelClass(partial(tiny_t5, 1), sequence_pairs),
    "ViT": ModelClass(partial(tiny_vit, 1), image_batches),
    "convolutional network": ModelClass(Network, convolutions.image_batches, {"convolutions": True}),
}


def declared() -> Any:
    """The module that declares the table."""
    path = Path(__file__).parents[2] / "docs" / "_site" / "support.py"
    spec = importlib.util.spec_from_file_location("site_support", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Rows(Dataset):
    """The rows of batches, one by one."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.rows = [{key: value[i] for key, value in b.items()} for b in batches for i in range(len(b["labels"]))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


class Module(L.LightningModule):
    """The plainest module there is around a model that returns its loss."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = CLASSES[name].fresh()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch)["loss"]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Sharded(Module):
    """Shards blocks, and what is left of the model."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for block in blocks_of(self.model):
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


def callback_for(name: str) -> ZSSVDCallback:
    settings = SETTINGS | {"corrections": 1, "correction_batches": 1, "calibration_batches": 2}
    return ZSSVDCallback(**scheduled(settings | dict(CLASSES[name].settings)))


def fit(name: str, *callbacks: L.Callback, kind: type[Module] = Module, share: slice = slice(None), **settings: Any):
    """Trains over eight batches, of which the last are left for the factors; the module and the callback."""
    callback, module = callback_for(name), kind(name)
    batches = CLASSES[name].batches(settings.pop("count", 8))[share]
    ckpt_path = settings.pop("ckpt_path", None)
    fitted = trainer(callback, *callbacks, **settings)
    fitted.fit(module, StatefulDataLoader(batches, batch_size=None), ckpt_path=ckpt_path)
    return module, callback


def trained_weights(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all whole parameters; the running sums of batch norms are those of each process. Collective."""
    names = {name for name, _ in module.named_parameters()}
    return {name: weight for name, weight in whole_weights(module).items() if name in names}


def fits(rank: int, size: int, folder: Path) -> None:
    """One fit of every class under DDP and FSDP2, one after the other in the same processes."""
    found = {}
    for strategy, kind in (("ddp", Module), ("fsdp2", Sharded)):
        for name in CLASSES:
            settings = {"devices": size, "strategy": Run(strategy).strategy_for(size), "use_distributed_sampler": False}
            try:
                share = slice(rank, None, size)
                module, callback = fit(name, kind=kind, share=share, count=16, default_root_dir=folder, **settings)
            except ZSSVDError as error:
                found[strategy, name] = (type(error).__name__, str(error))
                continue
            report = callback.report
            ranks = {layer: found.rank for layer, found in report.layers.items()}
            found[strategy, name] = {"reached": report.reached, "ranks": ranks, "weights": trained_weights(module)}
    torch.save(found, folder / f"{rank}.pt")
