"""Global, loss-aware SVD compression of models inside a PyTorch Lightning training run.

The packages, in the order in which data flows through them; imports run up this list, never down:

    layers          the forms a linear layer can have, and what each costs
    whitening       mathematics of one layer: second moments, metrics, spectrum and scores
    selection       which ranks: budget, rules, knapsack, plan
    model           find layers, replace them, adapters on them, copies of a model
    offload         where tensors are held: in memory, in host memory, in scratch files
    serialization   what saved weights and configs say of compressed layers
    config          what can be asked for: settings, presets, reading YAML
    distributed     what processes say to each other: the only collectives
    calibration     batches to statistics: masks, hooks, collector
    strategies      one adapter for each Lightning strategy
    decomposition   statistics to spectra of all layers, truncated weights, originals
    kv_cache        generation with keys and values in low-rank bases: calibration, ranks, the cache, its file
    sweep           the same statistics block by block, with the rest in scratch files
    correction      gradient steps and refits between truncations
    compression     the method: course, engine, report, `compress`
    recovery        training after compression
    prehab          training before compression
    callbacks       all that Lightning calls: `ZSSVDCallback`, `LowRankPrehab` and their parts
    transformers_trainer  the same for the Trainer of transformers: `ZSSVDTrainerCallback`
    hub             save, load, export, model card
    serving         vLLM
    evaluation      perplexity and zero-shot accuracy
    sources         models and texts from packages, files, the hub
    app             command line, whole runs, comparisons, speed, pictures

Beside them: `errors` (every refusal by name), `_validation`, `_types`, `_yaml`, `_state_checks`, `_contexts`,
`_numerics`, `_files`, `_resources` and `_registration`.

The public names are loaded when they are first used, so that `import zssvd_lightning` alone stays fast. It does make
transformers read compressed folders; see `_registration`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from zssvd_lightning import errors
from zssvd_lightning._registration import register_with_transformers

if TYPE_CHECKING:
    from zssvd_lightning.app.run import Run
    from zssvd_lightning.app.run_config import RunConfig
    from zssvd_lightning.callbacks.prehab import LowRankPrehab
    from zssvd_lightning.callbacks.schedule import Schedule
    from zssvd_lightning.callbacks.trainer.limits import scheduled_steps
    from zssvd_lightning.callbacks.zssvd import ZSSVDCallback
    from zssvd_lightning.compression.gathering import BatchReading
    from zssvd_lightning.compression.phase import Phase
    from zssvd_lightning.compression.pipeline import compress
    from zssvd_lightning.compression.quantization import quantize
    from zssvd_lightning.compression.report import Report
    from zssvd_lightning.config.compression import CompressionConfig
    from zssvd_lightning.config.loading import load_config
    from zssvd_lightning.evaluation.perplexity import perplexity
    from zssvd_lightning.hub.export import export_onnx, merge
    from zssvd_lightning.hub.loading import from_pretrained
    from zssvd_lightning.hub.pushing import push_to_hub
    from zssvd_lightning.hub.saving import save_pretrained
    from zssvd_lightning.kv_cache.low_rank_cache import LowRankCache
    from zssvd_lightning.layers.low_rank import LowRankLinear
    from zssvd_lightning.model.adapters import merge_adapters
    from zssvd_lightning.model.decode_layout import arrange_for_decoding
    from zssvd_lightning.recovery.factors import FactorRecovery
    from zssvd_lightning.recovery.methods import LoRARecovery, SingularValueRecovery
    from zssvd_lightning.recovery.teachers import save_predictions
    from zssvd_lightning.serialization.checkpoint_mixin import (
        LowRankCheckpointMixin,
        load_from_checkpoint,
        load_state_dict,
    )
    from zssvd_lightning.transformers_trainer.callback import ZSSVDTrainerCallback

__all__ = [
    "BatchReading",
    "CompressionConfig",
    "FactorRecovery",
    "LoRARecovery",
    "LowRankCache",
    "LowRankCheckpointMixin",
    "LowRankLinear",
    "LowRankPrehab",
    "Phase",
    "Report",
    "Run",
    "RunConfig",
    "Schedule",
    "SingularValueRecovery",
    "ZSSVDCallback",
    "ZSSVDTrainerCallback",
    "__version__",
    "arrange_for_decoding",
    "compress",
    "errors",
    "export_onnx",
    "from_pretrained",
    "load_config",
    "load_from_checkpoint",
    "load_state_dict",
    "merge",
    "merge_adapters",
    "perplexity",
    "push_to_hub",
    "quantize",
    "save_predictions",
    "save_pretrained",
    "scheduled_steps",
]

_MODULES = {
    "BatchReading": "compression.gathering",
    "CompressionConfig": "config.compression",
    "FactorRecovery": "recovery.factors",
    "LoRARecovery": "recovery.methods",
    "LowRankCache": "kv_cache.low_rank_cache",
    "LowRankCheckpointMixin": "serialization.checkpoint_mixin",
    "LowRankLinear": "layers.low_rank",
    "LowRankPrehab": "callbacks.prehab",
    "Phase": "compression.phase",
    "Report": "compression.report",
    "Run": "app.run",
    "RunConfig": "app.run_config",
    "Schedule": "callbacks.schedule",
    "SingularValueRecovery": "recovery.methods",
    "ZSSVDCallback": "callbacks.zssvd",
    "ZSSVDTrainerCallback": "transformers_trainer.callback",
    "arrange_for_decoding": "model.decode_layout",
    "compress": "compression.pipeline",
    "export_onnx": "hub.export",
    "from_pretrained": "hub.loading",
    "load_config": "config.loading",
    "load_from_checkpoint": "serialization.checkpoint_mixin",
    "load_state_dict": "serialization.checkpoint_mixin",
    "merge": "hub.export",
    "merge_adapters": "model.adapters",
    "perplexity": "evaluation.perplexity",
    "push_to_hub": "hub.pushing",
    "quantize": "compression.quantization",
    "save_predictions": "recovery.teachers",
    "save_pretrained": "hub.saving",
    "scheduled_steps": "callbacks.trainer.limits",
}
"""Where each public name is defined."""

register_with_transformers()


def __getattr__(name: str) -> Any:
    """Load a public name on first use."""
    if name == "__version__":
        value: Any = import_module("importlib.metadata").version("zssvd-lightning")
    elif name in _MODULES:
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
