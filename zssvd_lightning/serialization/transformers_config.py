"""The format of compressed models on disk: the files of transformers, with the form of every layer in the config.

Importing this module registers the format, so that `AutoModelForCausalLM.from_pretrained(folder)` rebuilds the
compressed layers before it loads the weights. Without it, transformers does not know the model type and says so.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from zssvd_lightning.errors import SavedModelError
from zssvd_lightning.serialization.integrity import refuse_changed, refuse_missing
from zssvd_lightning.serialization.specs import rebuild, specs_of

METHOD = "zssvd"
"""Model type and quantization method of compressed models on disk. In memory they have the type they began with."""


BASE = "base_model_type"


FORMAT_VERSION = 1


@register_quantization_config(METHOD)
class CompressedLayers(QuantizationConfigMixin):
    """The `quantization_config` entry of a compressed model's config.

    Args:
        layers: kind and sizes of every compressed layer, by its name in the model.
        files: SHA-256 digest of each file of weights, by its name; not known of a model in memory.
        version: of this format.
    """

    def __init__(
        self,
        layers: Mapping[str, dict[str, Any]] | None = None,
        files: Mapping[str, str] | None = None,
        version: int = FORMAT_VERSION,
        **_: Any,
    ) -> None:
        told = layers or {}
        specs = told.values() if isinstance(told, Mapping) else [told]
        if not isinstance(version, int) or not all(isinstance(spec, Mapping) for spec in specs):
            raise SavedModelError("quantization_config in config.json is not as it was written; save the model again")
        self.quant_method = METHOD  # type: ignore[assignment]
        self.layers = dict(told)
        self.files = dict(files or {})
        self.version = version

    def get(self, key: str, default: Any = None) -> Any:
        """An entry by its name, as transformers asks for it."""
        return getattr(self, key, default)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as in `config.json`."""
        digests = {"files": self.files} if self.files else {}
        return {"quant_method": METHOD, "version": self.version, "layers": self.layers} | digests


@register_quantizer(METHOD)
class Rebuilder(HfQuantizer):
    """Puts empty compressed layers into the model that transformers is about to load weights into."""

    requires_calibration = True
    quantization_config: CompressedLayers

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        found = self.quantization_config
        if found.version > FORMAT_VERSION:
            raise SavedModelError(
                f"the folder is of format {found.version}, this release reads {FORMAT_VERSION}; upgrade zssvd-lightning"
            )
        refuse_changed(checkpoint_files or (), found.files)
        layers = {_name_in(model, name): spec for name, spec in found.layers.items()}
        rebuild(model, layers)
        refuse_missing(checkpoint_files or (), {name: model.get_submodule(name) for name in layers})
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        """From here on it is a model like others, which may be cast, trained and saved as such."""
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        del model.config._is_quantized  # noqa: SLF001
        mark(model)
        return model

    def is_serializable(self) -> bool:
        """Saving again writes the same format."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The factors are ordinary parameters."""
        return True


class CompressedConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Reads the config of a compressed model, as one of the model type it began with."""

    model_type = METHOD

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config of the architecture, for the model classes of transformers.

        Raises:
            SavedModelError: the entry that names the architecture or the layers is missing, or it is not known.
        """
        told = dict(config_dict)
        told.pop("auto_map", None)  # for those who do not have this package
        base = told.pop(BASE, None)
        if base not in CONFIG_MAPPING or (told.get("quantization_config") or {}).get("quant_method") != METHOD:
            raise SavedModelError(
                f"config.json is of model type {METHOD!r}, but has {BASE} {base!r}, which transformers does not know, "
                "or no quantization_config with the layers; upgrade transformers, or save the model again"
            )
        return CONFIG_MAPPING[base].from_dict(told | {"model_type": base}, **kwargs)


AutoConfig.register(METHOD, CompressedConfig)


def _name_in(model: PreTrainedModel, name: str) -> str:
    """What a layer is called in `model`, which may be the saved one without its head, or with one."""
    modules, prefix = dict(model.named_modules()), f"{model.base_model_prefix}."
    return next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in modules), name)


def mark(model: nn.Module) -> None:
    """Has the configs of the transformers models in `model` tell of its compressed layers, however they are saved.

    Dense models lose such a mark.
    """
    seen: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not any(name.startswith(outer) for outer in seen):
            seen.append(f"{name}." if name else "")
            tell(module.config, specs_of(module))


def tell(config: PreTrainedConfig, specs: Mapping[str, dict[str, Any]]) -> None:
    """Has one config tell of compressed layers, or no longer when `specs` is empty.

    Raises:
        SavedModelError: the config tells of another quantization already.
    """
    plain = getattr(type(config), "plain", type(config))
    found = getattr(config, "quantization_config", None)
    if specs:
        if found is not None and not isinstance(found, CompressedLayers):
            raise SavedModelError(f"a config can tell of one quantization only, and has {type(found).__name__} already")
        config.quantization_config = CompressedLayers(specs)
        config.__class__ = _telling(plain)  # type: ignore[arg-type]
    elif isinstance(found, CompressedLayers):
        del config.quantization_config
        config.__class__ = plain


@cache
def _telling(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """A config class like `base` whose files are of the type of compressed models."""

    class Telling(base):  # type: ignore[misc, valid-type]
        def to_json_string(self, use_diff: bool = True) -> str:
            told = json.loads(super().to_json_string(use_diff))
            return json.dumps(told | {BASE: told["model_type"], "model_type": METHOD}, indent=2, sort_keys=True) + "\n"

        def __reduce__(self) -> Any:  # a class made here cannot be found by its name
            return _revived, (base, self.__dict__)

    Telling.plain = base
    Telling.__name__, Telling.__qualname__ = base.__name__, base.__qualname__  # transformers looks classes up by name
    return Telling


def _revived(base: type[PreTrainedConfig], state: Mapping[str, Any]) -> PreTrainedConfig:
    telling = _telling(base)  # type: ignore[arg-type]
    config = telling.__new__(telling)
    config.__dict__.update(state)
    return config
