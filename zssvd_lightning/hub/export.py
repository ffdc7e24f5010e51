"""Export of compressed models to tools without low-rank support: as dense models or as ONNX graphs."""

import copy
import importlib.util
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from zssvd_lightning._contexts import evaluation_mode
from zssvd_lightning._files import replacing_folder
from zssvd_lightning.errors import ExportError, SavedModelError
from zssvd_lightning.hub.saving import SHARD, write_model
from zssvd_lightning.layers.apart.attention import projected, settle_encoders
from zssvd_lightning.layers.apart.convolutions import unfolded
from zssvd_lightning.layers.apart.experts import expert_lists
from zssvd_lightning.layers.apart.grouped import grouped
from zssvd_lightning.layers.apart.recurrent import recurrences
from zssvd_lightning.layers.apart.removed import (
    forget,
    forgotten_by,
    has_bias,
    lower_biases,
    removed_from,
    router_beside,
)
from zssvd_lightning.layers.base import CompressedLinear, type_of
from zssvd_lightning.layers.registry import dense_like
from zssvd_lightning.model.adapters import merge_adapters
from zssvd_lightning.model.peft_layers import wraps_by_peft
from zssvd_lightning.model.replace import replace_module
from zssvd_lightning.serialization.transformers_config import mark, tell

OPSET = 18


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Replace compressed layers, including their adapters, by dense layers of the same function, in place.

    Experts that were taken apart are stacked again, convolutions folded, and attentions and recurrent modules put
    together, in modules of their original classes.

    The result is an ordinary model with the size and speed it had before compression. Products are computed in float32
    or wider and rounded once. The matrices of removed experts are zero, and the bias of their router keeps it from
    choosing them.

    Args:
        model: any module.

    Raises:
        ExportError: layers are offloaded, so that their values are not in memory, or have an adapter of PEFT that no
            recovery put there, or experts were removed whose router has no bias.
    """
    common = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    compressed = (module for module in model.modules() if isinstance(module, CompressedLinear))
    if any(value.is_meta for layer in compressed for value in layer.state_dict().values()):
        raise ExportError("layers are offloaded, and not there to be merged; load the model without device_map")
    _refuse_no_bias(model)
    merge_adapters(model)
    for name, layer in model.named_modules():
        if isinstance(layer, CompressedLinear) and any(wraps_by_peft(part) for part in layer.modules()):
            raise ExportError(f"{name} has an adapter of PEFT on its factors; model = model.merge_and_unload() first")
    for old in [module for module in model.modules() if isinstance(module, CompressedLinear)]:
        own = type_of(old) or common
        W = nn.Module.to(old, torch.promote_types(own, torch.float32)).weight
        new = dense_like(old).to(own).to_empty(device=W.device)
        new.load_state_dict(
            {"weight": W.T if isinstance(new, Conv1D) else W} | ({} if old.bias is None else {"bias": old.bias})
        )
        replace_module(model, old, new)
    _stack_experts(model)
    for of_groups in grouped(model):
        replace_module(model, of_groups, of_groups.folded())
    for convolution in [module for _, module in unfolded(model)]:
        replace_module(model, convolution, convolution.folded())
    for attention in [module for _, module in projected(model)]:
        replace_module(model, attention, attention.packed())
    settle_encoders(model)
    for recurrence in [module for _, module in recurrences(model)]:
        replace_module(model, recurrence, recurrence.whole())
    mark(model)


def _refuse_no_bias(model: nn.Module) -> None:
    """Raise ExportError if a router of dense experts could not be kept from choosing those that were removed."""
    for name, experts in expert_lists(model):
        router, removed = router_beside(model, name, len(experts.experts)), removed_from(experts)
        if removed and (router is None or not has_bias(router, len(experts.experts))):
            raise ExportError(
                f"{len(removed)} experts of {name} were removed, and an ordinary model would route tokens to them, "
                f"because {type(router).__name__} has no bias to keep it from that; save the compressed model with "
                "save_pretrained, or compress without remove_experts"
            )


def _stack_experts(model: nn.Module) -> None:
    """Put the stacked parameters of the original classes in place of lists of experts."""
    found = [experts for _, experts in expert_lists(model)]
    for name, experts in expert_lists(model):
        count = len(experts.experts)
        router = router_beside(model, name, count)
        if router is not None and (removed := forgotten_by(router)):
            lower_biases(router, removed, count)
            forget(router, (), count)
    for experts in found:
        replace_module(model, experts, experts.stacked())
    for part in model.modules() if found else ():
        if isinstance(part, PreTrainedModel):  # names of a folder with separate experts are not those of others
            vars(part).pop("_weight_conversions", None)


def export_dense(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: str | int = SHARD,
) -> None:
    """Merge a model and write it as an ordinary checkpoint, for tools without low-rank support (GGUF converters).

    Args:
        model: compressed model; it is merged in place.
        folder: folder to write.
        tokenizer: tokenizer to save with the model.
        max_shard_size: maximum size of each weight file.

    Raises:
        ExportError: layers are offloaded, so that their values are not in memory.
        OutputError: the folder has other content, or cannot be written.
        SavedModelError: the model is not a transformers model.
    """
    with replacing_folder(folder) as temporary:
        merge(model)
        write_model(model, temporary, tokenizer, max_shard_size)
        _repeat_for_older_readers(temporary / "config.json")


def _repeat_for_older_readers(path: Path) -> None:
    """Add the rotary embedding settings to a config under their names before transformers 5.

    Many converters still read those names.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    rotary = config.get("rope_parameters") or {}
    if "rope_theta" in rotary:
        config["rope_theta"] = rotary["rope_theta"]
        if rotary.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in rotary.items() if key != "rope_theta"}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def export_onnx(model: PreTrainedModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Write a language model as an ONNX graph, from `input_ids` and `attention_mask` (B, T) to `logits` (B, T, V).

    Batch size and length are dynamic. Compressed layers stay compressed: low-rank layers are two matrix products, and
    8-bit codes stay in 8 bits.

    Args:
        model: causal language model.
        folder: folder to write; it gets `model.onnx`, the weights in `model.onnx.data`, the config and the tokenizer.
        tokenizer: tokenizer to save with the model.

    Raises:
        ExportError: onnx or onnxscript is not installed, or torch cannot export the model.
        OutputError: the folder has other content, or cannot be written.
        SavedModelError: the model is not a transformers model.
    """
    if not isinstance(model, PreTrainedModel):
        raise SavedModelError(f"{type(model).__name__} is no model of transformers; export the one it holds")
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        are = "is" if len(missing) == 1 else "are"
        raise ExportError(f"{' and '.join(missing)} {are} not installed; pip install 'zssvd-lightning[onnx]'")
    ids = torch.zeros(2, 8, dtype=torch.long, device=model.device)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with evaluation_mode(model), torch.no_grad():
        try:
            program = torch.onnx.export(
                _Logits(model).train(model.training),
                (ids, torch.ones_like(ids)),
                dynamo=True,
                opset_version=OPSET,
                input_names=["input_ids", "attention_mask"],
                output_names=["logits"],
                dynamic_shapes={"input_ids": free, "attention_mask": free},
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(f"torch cannot export {type(model).__name__} to ONNX: {error}") from error
    if program is None:
        raise ExportError(f"torch gave no ONNX program for {type(model).__name__}")
    plain = copy.deepcopy(model.config)
    tell(plain, {})
    with replacing_folder(folder) as temporary:
        program.save(temporary / "model.onnx", external_data=True)
        plain.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)


class _Logits(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits
