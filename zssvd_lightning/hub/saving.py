"""Saving of compressed models to folders."""

import copy
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel, PreTrainedTokenizerBase

from zssvd_lightning._files import replacing_folder
from zssvd_lightning.compression.report import Report, write_report
from zssvd_lightning.errors import OutputError, SavedModelError
from zssvd_lightning.hub.model_card import write_card
from zssvd_lightning.hub.model_classes import saved_class
from zssvd_lightning.hub.remote_code import carry_code
from zssvd_lightning.layers.apart.experts import expert_lists
from zssvd_lightning.model import adapters
from zssvd_lightning.model.peft_layers import wraps_by_peft
from zssvd_lightning.serialization.integrity import digest
from zssvd_lightning.serialization.specs import rebuild, specs_of
from zssvd_lightning.serialization.transformers_config import mark, tell

SHARD = "5GB"


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    report: Report | None = None,
    max_shard_size: str | int = SHARD,
    self_contained: bool = False,
    name: str | None = None,
) -> None:
    """Save a compressed (or dense) model as a folder that transformers can read; nothing is written on an error.

    Weights are saved as safetensors, the form and rank of every layer in `config.json`, and a description of the
    compression in a model card. Adapters that a recovery left on layers are saved in the folder `adapter`, in the
    format of peft: `PeftModel.from_pretrained(from_pretrained(folder), f"{folder}/adapter")`.

    Args:
        model: a transformers model.
        folder: folder to write; the output of an earlier save is replaced.
        tokenizer: tokenizer to save with the model.
        report: report of the compression, for the model card and `report.json`.
        max_shard_size: maximum size of each weight file, such as `5GB`.
        self_contained: whether to add the code with which `from_pretrained(folder, trust_remote_code=True)` loads the
            model where this package is not installed.
        name: name in the model card, by which it loads the model; that of the folder when None.

    Raises:
        OutputError: the folder has other content, or cannot be written; its previous content is unchanged.
        SavedModelError: the model is not a transformers model or transformers does not know its type, it has adapters
            of PEFT other than those of a recovery, or `self_contained` is set for a dense model.

    Example:
        >>> save_pretrained(model, "mine", tokenizer, report=report)  # doctest: +SKIP
    """
    with replacing_folder(folder) as temporary:
        write_model(model, temporary, tokenizer, max_shard_size, self_contained=self_contained)
        write_card(temporary, name or Path(folder).resolve().name, specs_of(model), report)
        if report is not None:
            write_report(temporary, report)


def write_model(
    model: nn.Module,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: str | int = SHARD,
    *,
    self_contained: bool = False,
) -> None:
    """Write weights, config and tokenizer into a new folder; arguments and errors as in `save_pretrained`."""
    if adapters.on(model):
        adapters.save_adapter(model, folder / adapters.FOLDER)
        with adapters.taken_off(model):
            write_model(model, folder, tokenizer, max_shard_size, self_contained=self_contained)
        return
    if not isinstance(model, PreTrainedModel):
        raise SavedModelError(f"{type(model).__name__} is no model of transformers; save the one it holds")
    _refuse_adapters(model)
    specs = specs_of(model)
    if specs and model.config.model_type not in CONFIG_MAPPING:
        raise SavedModelError(
            f"transformers does not know the model type {model.config.model_type!r}, so the folder would not "
            "load; register it with AutoConfig and an automatic model class, or merge(model) first"
        )
    loaded_as = _class_to_load(model) if specs else type(model)
    mark(model)
    try:
        # transformers renames weights on disk, but not back for separate experts and for code in the folder
        renames = not self_contained and next(expert_lists(model), None) is None
        model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=renames)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except Exception as error:
        if isinstance(error, SafetensorError) or "os error" in str(error):  # Rust libraries raise other error types
            raise OutputError(f"cannot write {folder}: {error}; what was there before is untouched") from error
        raise
    if specs:
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["architectures"] = [loaded_as.__name__]
        config["quantization_config"]["files"] = {
            file.name: digest(file) for file in sorted(folder.glob("*.safetensors"))
        }
        if self_contained:
            config["auto_map"] = carry_code(model, folder)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    elif self_contained:
        raise SavedModelError(f"{type(model).__name__} has no compressed layer, and needs no code to be loaded")


def _class_to_load(model: PreTrainedModel) -> type[PreTrainedModel]:
    """Return the class that loads a compressed model from its folder.

    Raises:
        SavedModelError: there is none, or it has other weights.
    """
    found = saved_class(model)
    if found is None or not _holds(found, model):
        why = "extends no class that is known" if found is None else f"has other weights than {found.__name__}"
        raise SavedModelError(
            f"the folder would not load: {type(model).__name__} is unknown to transformers, and {why}; register it "
            "with an automatic model class, or save the model that it holds"
        )
    return found


def _holds(kind: type[PreTrainedModel], model: PreTrainedModel) -> bool:
    """Return True if `model` is of this class, or the class has the same weights outside compressed layers."""
    if kind is type(model):
        return True
    plain = copy.deepcopy(model.config)
    tell(plain, {})
    with torch.device("meta"):
        made = kind(plain)
    rebuild(made, specs_of(model))
    return made.state_dict().keys() == model.state_dict().keys()


def _refuse_adapters(model: nn.Module) -> None:
    """Raise SavedModelError if a model has adapters of PEFT, whose names of weights would not load."""
    if name := next((name for name, module in model.named_modules() if wraps_by_peft(module)), None):
        raise SavedModelError(
            f"{name} is an adapter layer of PEFT, and the folder would not load; model = model.merge_and_unload() "
            "first, or save the adapter and the model without it apart"
        )
