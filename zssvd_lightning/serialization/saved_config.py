"""Config class of compressed models on disk; importing this module registers it with transformers.

This module imports only parts of transformers that the registry has already loaded; see `_registration`.
"""

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

from zssvd_lightning.errors import SavedModelError

METHOD = "zssvd"
"""Model type and quantization method of compressed models on disk. In memory they have their original model type."""


BASE = "base_model_type"


RECORD = "quantization_config"
"""Entry of a config with the form of each compressed layer; transformers knows it by this name."""


class CompressedConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Config of a compressed model on disk; it is read as a config of the original model type."""

    model_type = METHOD

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the config of the original architecture, for the model classes of transformers.

        Raises:
            SavedModelError: the entry with the architecture or the layers is missing, or the architecture is unknown.
        """
        told = dict(config_dict)
        told.pop("auto_map", None)  # only needed where this package is not installed
        base, record = told.pop(BASE, None), told.get(RECORD)
        method = record.get("quant_method") if isinstance(record, Mapping) else None
        if not isinstance(base, str) or base not in CONFIG_MAPPING or method != METHOD:
            raise SavedModelError(
                f"config.json is of model type {METHOD!r}, but has {BASE} {base!r}, which transformers does not know, "
                "or no quantization_config with the layers; upgrade transformers, or save the model again"
            )
        made: Any = CONFIG_MAPPING[base].from_dict(told | {"model_type": base}, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        if type(config).__module__.startswith("transformers."):  # models of other classes are not found by name
            config.__class__ = telling(type(config))  # type: ignore[arg-type]
        return made


@cache
def telling(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Return a subclass of `base` that is saved as the config of a compressed model, once its model has the layers.

    The record of the layers in a config that was only read is for `from_pretrained`. A model that is built from that
    config in another way is dense, so that the record is left out when such a config is saved.
    """

    class Telling(base):  # type: ignore[misc, valid-type]
        def to_dict(self) -> dict[str, Any]:
            told: dict[str, Any] = super().to_dict()
            return {key: value for key, value in told.items() if key != RECORD or not _only_read(self)}

        def to_json_string(self, use_diff: bool = True) -> str:
            told = json.loads(super().to_json_string(use_diff))
            if _only_read(self):
                told.pop(RECORD, None)
            else:
                told |= {BASE: told["model_type"], "model_type": METHOD}
            return json.dumps(told, indent=2, sort_keys=True) + "\n"

        def __reduce__(self) -> Any:  # pickle cannot look up a class created here by its name
            return _revived, (base, self.__dict__)

    Telling.plain = base
    Telling.__name__, Telling.__qualname__ = base.__name__, base.__qualname__  # transformers looks classes up by name
    return Telling


def _only_read(config: PreTrainedConfig) -> bool:
    """Return True if the record of the layers is as it came from `config.json`, or there is none."""
    return isinstance(getattr(config, RECORD, None), dict | None)


def _revived(base: type[PreTrainedConfig], state: Mapping[str, Any]) -> PreTrainedConfig:
    kind = telling(base)  # type: ignore[arg-type]
    config = kind.__new__(kind)
    config.__dict__.update(state)
    return config


AutoConfig.register(METHOD, CompressedConfig)
