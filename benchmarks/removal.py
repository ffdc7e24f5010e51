"""Depth and width pruning of decoders of the Llama kind, as far as `rivals.py` needs them.

Both rules remove whole parts, so that what remains is an ordinary dense model. Neither trains anything.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity


@torch.no_grad()
def remove_blocks(model: Any, windows: Iterable[Tensor], count: int) -> list[int]:
    """Remove the blocks that change the hidden states least (ShortGPT, arXiv 2403.03853); return their numbers.

    The influence of a block is one minus the mean cosine similarity between its input and its output, over all tokens
    of the windows.

    Args:
        model: decoder with its blocks in `model.model.layers`.
        windows: token ids (N, T).
        count: number of blocks to remove.
    """
    blocks = model.model.layers
    similarity = torch.zeros(len(blocks), dtype=torch.float64)

    def compare(number: int) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            after = output if isinstance(output, Tensor) else output[0]
            similarity[number] += cosine_similarity(inputs[0].double(), after.double(), dim=-1).mean()

        return hook

    with _hooked(block.register_forward_hook(compare(number)) for number, block in enumerate(blocks)):
        for ids in windows:
            model(input_ids=ids[None])
    removed = sorted(similarity.argsort(descending=True)[:count].tolist())
    kept = [block for number, block in enumerate(blocks) if number not in removed]
    for number, block in enumerate(kept):
        block.self_attn.layer_idx = number  # its place in the cache
    model.model.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    if isinstance(kinds := getattr(model.config, "layer_types", None), list):
        model.config.layer_types = [kind for number, kind in enumerate(kinds) if number not in removed]
    return removed


@torch.no_grad()
def narrow_mlps(model: Any, windows: Iterable[Tensor], width: int) -> None:
    """Remove hidden units of every MLP by the rule of Wanda-sp (from arXiv 2306.11695 and 2312.11983).

    The score of a unit is the sum of `|weight|` over the weights that read it, times the norm of the unit's activation.
    The `width` units with the largest scores remain in each block.

    Args:
        model: decoder whose blocks have `mlp.gate_proj`, `mlp.up_proj` and `mlp.down_proj`, without biases.
        windows: token ids (N, T).
        width: hidden units that each MLP keeps.
    """
    blocks = model.model.layers
    squares = [torch.zeros(block.mlp.down_proj.in_features, dtype=torch.float64) for block in blocks]

    def add(number: int) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares[number] += inputs[0].double().flatten(0, -2).square().sum(0)

        return hook

    with _hooked(block.mlp.down_proj.register_forward_pre_hook(add(n)) for n, block in enumerate(blocks)):
        for ids in windows:
            model(input_ids=ids[None])
    for block, square in zip(blocks, squares, strict=True):
        mlp = block.mlp
        score = mlp.down_proj.weight.abs().double().sum(0) * square.sqrt()
        kept = score.argsort(descending=True)[:width].sort().values
        mlp.gate_proj = _linear(mlp.gate_proj.weight[kept])
        mlp.up_proj = _linear(mlp.up_proj.weight[kept])
        mlp.down_proj = _linear(mlp.down_proj.weight[:, kept])
    model.config.intermediate_size = width


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    return layer


@contextmanager
def _hooked(handles: Iterable[Any]) -> Iterator[None]:
    held = list(handles)
    try:
        yield
    finally:
        for handle in held:
            handle.remove()
