"""Config class of compressed models on disk; importing this module registers it with transformers.

This module imports only parts of transformers that the registry has already loaded; see `_registration`.
"""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

from zssvd_lightning.errors import SavedModelError

METHOD = "zssvd"
"""Model type and quantization method of compressed models on disk. In memory they have their original model type."""


BASE = "base_model_type"


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
        base = told.pop(BASE, None)
        if base not in CONFIG_MAPPING or (told.get("quantization_config") or {}).get("quant_method") != METHOD:
            raise SavedModelError(
                f"config.json is of model type {METHOD!r}, but has {BASE} {base!r}, which transformers does not know, "
                "or no quantization_config with the layers; upgrade transformers, or save the model again"
            )
        return CONFIG_MAPPING[base].from_dict(told | {"model_type": base}, **kwargs)


AutoConfig.register(METHOD, CompressedConfig)
