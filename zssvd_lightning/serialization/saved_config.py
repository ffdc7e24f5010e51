"""The config class of compressed models on disk, entered in the registry of transformers when this is imported.

Imports of transformers nothing but what the registry itself has loaded; see `_registration`.
"""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

from zssvd_lightning.errors import SavedModelError

METHOD = "zssvd"
"""Model type and quantization method of compressed models on disk. In memory they have the type they began with."""


BASE = "base_model_type"


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
