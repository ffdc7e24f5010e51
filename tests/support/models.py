"""Small models of several families, built from config, with batches they take."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from zssvd_lightning._contexts import evaluation_mode

VOCABULARY = 97


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """Grouped-query attention, two blocks."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))


def tiny_gpt2(**changes: Any) -> GPT2LMHeadModel:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return GPT2LMHeadModel(GPT2Config(**(settings | changes)))


def tiny_bert(num_hidden_layers: int = 2) -> BertForMaskedLM:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=64,
        )
    )


def tiny_vit(num_hidden_layers: int = 2) -> ViTForImageClassification:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=16,
            patch_size=4,
            num_labels=5,
        )
    )


def token_batches(count: int = 4, size: int = 4, length: int = 24, seed: int = 0) -> list[dict[str, Tensor]]:
    """Token batches without padding, each with labels."""
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(1, VOCABULARY, (size, length), generator=g) for _ in range(count)]
    return [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": i.clone()} for i in ids]


def padded_batches(count: int = 4, seed: int = 0) -> list[dict[str, Tensor]]:
    """Token batches padded on the right to different lengths."""
    batches = token_batches(count, seed=seed)
    for k, batch in enumerate(batches):
        for row in range(len(batch["input_ids"])):
            end = 24 - (5 * k + 3 * row) % 20
            batch["attention_mask"][row, end:] = 0
            batch["labels"][row, end:] = -100
            batch["input_ids"][row, end:] = 0
    return batches


def image_batches(count: int = 4) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [
        {
            "pixel_values": torch.randn(6, 3, 16, 16, generator=g),
            "labels": torch.randint(0, 5, (6,), generator=g),
        }
        for _ in range(count)
    ]


def tiny_t5(num_layers: int = 2) -> T5ForConditionalGeneration:
    """An encoder and a decoder, whose cross-attention reads the encoder's output."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=num_layers,
            num_heads=4,
            decoder_start_token_id=0,
        )
    )


def sequence_pairs(count: int = 4) -> list[dict[str, Tensor]]:
    """Inputs with shorter targets."""
    return [batch | {"labels": batch["labels"][:, :7].contiguous()} for batch in token_batches(count)]


class Family(NamedTuple):
    build: Callable[[], nn.Module]
    batches: Callable[[], list[dict[str, Tensor]]]
    targets: int


FAMILIES = {
    "llama": Family(tiny_llama, token_batches, 14),
    "gpt2": Family(tiny_gpt2, token_batches, 8),
    "bert": Family(tiny_bert, token_batches, 13),
    "t5": Family(tiny_t5, sequence_pairs, 32),
    "vit": Family(tiny_vit, image_batches, 12),
}


class Unreached(nn.Module):
    """A language model with layers that calibration does not reach, for each reason."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.model = tiny_llama(**settings)
        self.config = self.model.config
        for name in ("idle", "read", "teacher", "gone"):
            setattr(self, name, nn.Linear(32, 32))
        self.zero = nn.Linear(32, 32)
        self.reads = nn.Linear(32, 32)

    def forward(self, **batch: Tensor) -> Any:
        output = self.model(**batch)
        x = torch.ones(40, 32)
        self.read(x)
        with torch.no_grad():
            self.teacher(x)
        output.loss = output.loss + 0.0 * self.zero(x).sum() + 1e-3 * (x @ self.reads.weight).square().mean()
        return output


REASONS = {
    "idle": "saw no token",
    "read": "ran, but no gradient came back to it",
    "teacher": "ran, but no gradient came back to it",
    "gone": "saw no token",
    "zero": "has a gradient of exactly zero",
    "reads": "has its weight read by other code, but is not called itself",
}
"""Why calibration does not reach the layers of `Unreached`."""


class Experts(nn.Module):
    """A language model with two experts beside it, each of which runs for the batches that it is chosen for.

    Attributes:
        chosen: function that returns the experts for the n-th forward pass with gradients and the tokens of the batch.
    """

    def __init__(self, chosen: Callable[[int, Tensor], list[int]]) -> None:
        super().__init__()
        self.model = tiny_llama()
        self.config = self.model.config
        self.experts = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])
        self.chosen, self.passes = chosen, 0

    def forward(self, **batch: Tensor) -> Any:
        output = self.model(**batch, output_hidden_states=True)
        x = output.hidden_states[-1]
        for index in self.chosen(self.passes, batch["input_ids"]):
            output.loss = output.loss + 1e-2 * self.experts[index](x).square().mean()
        self.passes += torch.is_grad_enabled()
        return output


class CausalLM(L.LightningModule):
    """The plainest module there is around a transformers model."""

    def __init__(self, model: nn.Module | None = None, lr: float = 1e-3) -> None:
        super().__init__()
        self.model = model or tiny_llama()
        self.lr = lr

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def loader(batches: list[dict[str, Tensor]]) -> DataLoader[dict[str, Tensor]]:
    """The batches as they are, in order."""
    return DataLoader(batches, batch_size=None)


def trainer(*callbacks: L.Callback, **settings: Any) -> L.Trainer:
    """A quiet Trainer on one CPU."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "max_epochs": 1,
    }
    return L.Trainer(callbacks=list(callbacks), **(defaults | settings))


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything a failed run must leave as it was."""
    return {
        "weights": {n: p.detach().clone() for n, p in model.state_dict().items()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "training": {n: m.training for n, m in model.named_modules()},
        "hooks": {n: len(m._forward_pre_hooks) + len(m._forward_hooks) for n, m in model.named_modules()},
        "types": {n: type(m) for n, m in model.named_modules()},
        "grads": {n: p.grad is not None for n, p in model.named_parameters()},
        "cache": [m.config.to_dict().get("use_cache") for m in model.modules() if isinstance(m, PreTrainedModel)],
    }


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in before.keys() - {"weights"}:
        assert before[key] == after[key], key
    assert before["weights"].keys() == after["weights"].keys()
    for name, value in before["weights"].items():
        assert torch.equal(value, after["weights"][name]), name


def logits(model: nn.Module) -> Tensor:
    """The logits of a fixed batch without padding, in evaluation mode."""
    with torch.no_grad(), evaluation_mode(model):
        return model(input_ids=token_batches(1)[0]["input_ids"]).logits


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable ASCII character."""
    characters = [chr(c) for c in range(32, 32 + VOCABULARY - 2)]
    vocabulary = {"<unk>": 0, "\n": 1} | {c: i + 2 for i, c in enumerate(characters)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def saved_tiny_llama(folder: Path) -> Path:
    """A folder with a tiny language model and its tokenizer, as save_pretrained writes it."""
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
