"""Support for compressed folders in vLLM, through the entry point group `vllm.general_plugins`. Experimental.

vLLM calls `register`. It builds its model class for the architecture in the config, loads the weights from the folder
and asks for the quantization method of each linear layer; compressed layers then store and use their factors. No other
module of this package imports vLLM.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from zssvd_lightning.errors import SavedModelError, UnsupportedServingError
from zssvd_lightning.layers.registry import KINDS
from zssvd_lightning.serialization.quantizer import FORMAT_VERSION
from zssvd_lightning.serialization.saved_config import METHOD
from zssvd_lightning.serving.fused_linear import FusedLinear, Part, Spec, names_of

PLACES = {None: 0, "q": 0, "k": 1, "v": 2}
"""Index of each part of attention by its name in vLLM; vLLM numbers the parts of other fused layers."""


def register() -> None:
    """Register the format with vLLM; importing this package has already registered it with transformers."""
    register_quantization_config(METHOD)(ServedLayers)


class ServedLayers(QuantizationConfig):  # type: ignore[misc]
    """Quantization config of a compressed folder, from its `quantization_config` entry.

    Args:
        layers: kind and sizes of every compressed layer, by name.
    """

    def __init__(self, layers: Mapping[str, Spec]) -> None:
        super().__init__()
        self.layers = dict(layers)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ServedLayers":
        """Build from the entry in config.json.

        Raises:
            SavedModelError: this release cannot read the format.
            UnsupportedServingError: layers have fewer hidden units.
        """
        version, layers = config.get("version"), config.get("layers") or {}
        kinds = {str(spec.get("kind")) for spec in layers.values()}
        if version != FORMAT_VERSION or kinds - KINDS.keys():
            raise SavedModelError(
                f"the folder is of format {version} with layers of kind {', '.join(sorted(kinds))}, this release reads "
                f"{FORMAT_VERSION} with {', '.join(KINDS)}; upgrade zssvd-lightning"
            )
        if narrow := [name for name, spec in layers.items() if spec.get("kind") == "narrow"]:
            raise UnsupportedServingError(
                f"{narrow[0]} has fewer hidden units, but vLLM makes all layers of the sizes in the config; serve the "
                "folder of export_dense, which has zeros in their place, or compress without narrow"
            )
        return cls(layers)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """Return the method with which a vLLM layer stores and uses its weights; None for layers without one.

        Raises:
            UnsupportedServingError: the layer contains compressed layers and is not a linear layer of vLLM.
        """
        if isinstance(layer, LinearBase):
            specs = {name: self.layers.get(name) for name in names_of(prefix, self.layers, self.packed_modules_mapping)}
            return ServedLinear(specs) if any(specs.values()) else UnquantizedLinearMethod()
        if inside := [name for name in self.layers if prefix and f"{name}.".startswith(f"{prefix}.")]:
            raise UnsupportedServingError(
                f"{inside[0]} is compressed, but vLLM has a {type(layer).__name__} there, which takes dense weights "
                "only; leave such layers out by ignore patterns"
            )
        return None

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the compressed layers to their names in vLLM."""
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def get_name(self) -> str:
        """Return the name of the quantization method in config.json."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return every activation type of vLLM."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return 0: every device is supported."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no file names: the config is in config.json only."""
        return []


class ServedLinear(LinearMethodBase):  # type: ignore[misc]
    """Linear method of vLLM for a layer made of saved layers, some of which are compressed.

    Args:
        specs: kind and sizes of the saved layers, by name; None for a dense layer.
    """

    def __init__(self, specs: Mapping[str, Spec | None]) -> None:
        self.specs = specs

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: Sequence[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Allocate the factors, and register a parameter under every name for which vLLM will load a tensor.

        Raises:
            UnsupportedServingError: vLLM splits the layer in a way in which its factors cannot be split.
        """
        processes = output_size // sum(output_partition_sizes)
        outputs = [output_size] if len(self.specs) == 1 and processes == 1 else output_partition_sizes
        if len(outputs) != len(self.specs):
            raise UnsupportedServingError(
                f"{', '.join(self.specs)}: vLLM cuts the outputs into {len(outputs)} on each of {processes} processes, "
                f"and there are factors for {len(self.specs)}; serve on one process, or leave such layers out by "
                "ignore patterns"
            )
        parts = []
        for index, ((name, spec), m) in enumerate(zip(self.specs.items(), outputs, strict=True)):
            copies = getattr(layer, "num_kv_head_replicas", 1) if index else 1
            saved = (m * processes // copies, input_size)
            parts.append(Part(name, spec, saved, (m, input_size_per_partition), layer.tp_rank // copies))
        layer.fused = FusedLinear(parts, params_dtype)
        for name in layer.fused.names:
            _let_in(layer, name)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raise SavedModelError if vLLM did not load every tensor."""
        layer.fused.check()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map x (..., n) to (..., m)."""
        y: Tensor = layer.fused(x)
        return y if bias is None else y + bias


def _let_in(layer: Any, name: str) -> None:
    """Register an empty parameter under this name; tensors that vLLM loads into it go to the fused layer or bias."""

    def pass_on(_: Tensor, saved: Tensor, shard: Any = None) -> None:
        if name.endswith("bias"):
            layer.bias.weight_loader(layer.bias, saved, *([] if shard is None else [shard]))
        else:
            layer.fused.load(PLACES.get(shard, shard), name, saved)

    entrance = nn.Parameter(torch.empty(0), requires_grad=False)
    entrance.weight_loader = pass_on  # type: ignore[attr-defined]
    *path, leaf = name.split(".")
    owner = layer
    for step in path:
        if not hasattr(owner, step):
            owner.add_module(step, nn.Module())
        owner = owner.get_submodule(step)
    owner.register_parameter(leaf, entrance)
