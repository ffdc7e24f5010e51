"""Output heads of a model: the linear layers whose outputs are its logits."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from zssvd_lightning.layers.base import shape_of

LINEAR = (nn.Linear, Conv1D)


def output_embeddings(model: nn.Module) -> set[int]:
    """Return the ids of the layers that turn hidden states into logits over a vocabulary."""
    named = {id(m) for n, m in model.named_modules() if isinstance(m, LINEAR) and n.rsplit(".", 1)[-1] == "lm_head"}
    models = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    heads = [one.get_output_embeddings() for one in models]  # type: ignore[no-untyped-call]
    return named | {id(head) for head in heads if isinstance(head, nn.Module)}


def classification_heads(model: nn.Module) -> set[int]:
    """Return the ids of the layers that turn hidden states into logits over classes.

    These are the layer a model names by `get_classifier()` (timm), the layers of a transformers model outside its base
    model with one output per label, and for other models the last linear layer, if no other one has its shape and it
    either has fewer outputs than inputs or one output per row of an embedding table.
    """
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if models:
        return {id(head) for one in models for head in _label_layers(one)}
    if named := [id(head) for head in _named_by_the_model(model)]:
        return set(named)
    return {id(head) for head in _last_layer(model)}


def _label_layers(model: PreTrainedModel) -> Iterator[nn.Module]:
    base = model.base_model
    if base is model:
        return
    inside = {id(module) for module in base.modules()}
    for module in model.modules():
        if isinstance(module, LINEAR) and id(module) not in inside and shape_of(module)[0] == model.config.num_labels:
            yield module


def _named_by_the_model(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        name_head = getattr(module, "get_classifier", None)
        with suppress(Exception):  # a method of that name with another meaning
            if callable(name_head) and isinstance(head := name_head(), nn.Module):
                yield head


def _last_layer(model: nn.Module) -> Iterator[nn.Module]:
    layers = [module for module in model.modules() if isinstance(module, LINEAR)]
    if len(layers) < 2:
        return
    shapes = Counter(map(shape_of, layers))
    outputs, inputs = shape_of(layers[-1])
    vocabularies = {module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)}
    if shapes[outputs, inputs] == 1 and (outputs < inputs or outputs in vocabularies):
        yield layers[-1]


def chance_loss(model: nn.Module) -> float | None:
    """Return the cross-entropy (nats) of guessing among the outputs of the model's head; None without exactly one."""
    heads = output_embeddings(model) | classification_heads(model)
    outputs = {shape_of(module)[0] for module in model.modules() if isinstance(module, LINEAR) and id(module) in heads}
    return math.log(outputs.pop()) if len(outputs) == 1 else None
