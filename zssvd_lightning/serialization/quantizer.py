"""Quantizer with which transformers rebuilds compressed layers; importing this module registers it.

At import, this module imports only parts of transformers that the registry has already loaded. Parts of this package
that need more are imported when a folder is loaded; see `_registration`.
"""

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from zssvd_lightning.errors import SavedModelError
from zssvd_lightning.serialization.saved_config import METHOD

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Version of the format on disk."""


@register_quantization_config(METHOD)
class CompressedLayers(QuantizationConfigMixin):
    """Entry `quantization_config` in the config of a compressed model.

    Args:
        layers: kind and sizes of every compressed layer, by its name in the model.
        files: SHA-256 digest of each weight file, by file name; empty for a model in memory.
        version: version of the format.

    Raises:
        SavedModelError: the version or a layer has the wrong type.
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
        digests = {} if files is None else files
        plain = isinstance(version, int) and not isinstance(version, bool) and isinstance(digests, Mapping)
        if not plain or not all(isinstance(spec, Mapping) for spec in specs):
            raise SavedModelError("quantization_config in config.json is not as it was written; save the model again")
        self.quant_method = METHOD  # type: ignore[assignment]
        self.layers = dict(told)
        self.files = dict(digests)
        self.version = version

    def get(self, key: str, default: Any = None) -> Any:
        """Return an entry by name; transformers reads entries through this method."""
        return getattr(self, key, default)

    def to_dict(self) -> dict[str, Any]:
        """Return plain types, as in `config.json`."""
        digests = {"files": self.files} if self.files else {}
        return {"quant_method": METHOD, "version": self.version, "layers": self.layers} | digests


@register_quantizer(METHOD)
class Rebuilder(HfQuantizer):
    """Quantizer that puts empty compressed layers into a model before transformers loads its weights."""

    requires_calibration = True
    quantization_config: CompressedLayers

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> "PreTrainedModel":
        from zssvd_lightning.serialization.integrity import are_dense, refuse_changed, refuse_missing, stored_in
        from zssvd_lightning.serialization.specs import rebuild

        found = self.quantization_config
        if found.version > FORMAT_VERSION:
            raise SavedModelError(
                f"the folder is of format {found.version}, this release reads {FORMAT_VERSION}; upgrade zssvd-lightning"
            )
        if not found.layers:
            raise SavedModelError("quantization_config in config.json names no layer; save the model again")
        files = checkpoint_files or ()
        refuse_changed(files, found.files)
        held = stored_in(files)
        if not found.files and are_dense(held, (_names_of(model, name) for name in found.layers)):
            logger.warning(
                "config.json names compressed layers, but the weights are those of a dense model, which was built from "
                "the config of a compressed one; it is loaded as a dense model"
            )
            return model
        layers = self._layers_in(model)
        rebuild(model, layers)
        refuse_missing(held, {name: model.get_submodule(name) for name in layers})
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: "PreTrainedModel") -> list[Any]:
        """Return the conversions of names and weights, without those into stacked experts that are separate here.

        They would take the dense weights among those of separate experts.
        """
        from transformers.core_model_loading import WeightConverter

        from zssvd_lightning.layers.apart.experts import expert_lists

        updated: list[Any] = super().update_weight_conversions(weight_conversions, model)  # type: ignore[no-untyped-call]
        if next(expert_lists(model), None) is None:
            return updated
        names = "\n".join(name for name, _ in model.named_parameters())

        def applies(conversion: Any) -> bool:
            if not isinstance(conversion, WeightConverter):
                return True
            targets = [target for target in conversion.target_patterns if "\\" not in target]
            return not targets or any(re.search(rf"{target}(?!\w)", names) for target in targets)

        return [conversion for conversion in updated if applies(conversion)]

    def _layers_in(self, model: "PreTrainedModel") -> dict[str, dict[str, Any]]:
        """Return kind and sizes of the compressed layers by their names in `model`.

        Another class than the saved one may lack some of them, which belong to a head.
        """
        from zssvd_lightning.model.apart.kinds import all_matrices

        names = {name for name, _ in model.named_modules()}
        names |= all_matrices(model).keys()
        same = _is_of_saved_class(model)
        layers = {_name_in(model, name, names): spec for name, spec in self.quantization_config.layers.items()}
        return {name: spec for name, spec in layers.items() if same or name in names}

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **_: Any) -> "PreTrainedModel":
        """Check what was loaded, and turn the result into an ordinary model, which can be cast, trained and saved.

        A class other than the saved one may have a new head, which transformers reports; the rest must be complete.
        """
        from zssvd_lightning.serialization.integrity import refuse_impossible, refuse_not_loaded
        from zssvd_lightning.serialization.transformers_config import mark

        refuse_not_loaded(model, _names_to_load(model))
        refuse_impossible(model)
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        del model.config._is_quantized  # noqa: SLF001
        mark(model)
        return model

    def is_serializable(self) -> bool:
        """Return True: saving again writes the same format."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True, because the factors are ordinary parameters."""
        return True


def _name_in(model: "PreTrainedModel", name: str, names: Collection[str]) -> str:
    """Return the name of a layer among those in `model`, which may be the saved model with or without its head."""
    return next((n for n in _names_of(model, name) if n in names), name)


def _names_of(model: "PreTrainedModel", name: str) -> tuple[str, ...]:
    """Return the names that a layer may have in a model of this family, with or without a head."""
    prefix = f"{model.base_model_prefix}."
    return name, prefix + name, name.removeprefix(prefix)


def _is_of_saved_class(model: "PreTrainedModel") -> bool:
    """Return True if the model is of the class named in its config, or none is named."""
    saved = model.config.architectures
    return not isinstance(saved, list) or not saved or type(model).__name__ in saved


def _names_to_load(model: "PreTrainedModel") -> list[str]:
    """Return the names in the state dict that the files must hold: without a new head, and what the class exempts."""
    exempt = model._keys_to_ignore_on_load_missing or ()  # noqa: SLF001
    names = [name for name in model.state_dict() if not any(re.search(pattern, name) for pattern in exempt)]
    prefix = "" if _is_of_saved_class(model) or model.base_model is model else f"{model.base_model_prefix}."
    return [name for name in names if name.startswith(prefix)]
