"""Global, loss-aware SVD compression of language models inside a Lightning training run.

To read the code in the order data flows through it: `callback` (when; `lifecycle` and `phase` how far; `resumable`,
`guards`, `precision`, `limits`, `scores`, `checkpoint`, `telemetry` and `borrowing` deal with the rest of Lightning)
and `pipeline` (without a Trainer) drive `compression` (what, in `steps`), on one process or on several (`strategies`,
`distributed`); that takes `targets`, watches them (`gathering`, `observation`, `calibration`, `statistics`; `logits`,
`output_sides`), changes coordinates (`whitening`), decomposes (`decomposition`, `spectrum`), chooses (`storage`,
`budget`, `options`, `selection` with `offers` and `allocation`, `plan`), truncates (`factorization`; `originals` are
what was before), puts layers into another form (`forms`: `modules`, `pivoted`, `eight_bit`; `structure`), corrects
(`correction`; `refitting`, `side_by_side`) and stores in 8 bits (`quantization`). Every choice is in `config`, and
`presets` name sets of them.

How the factors are trained then is in `recovery` with its `ways` (how), `recovery_hooks` (when), `recovering` (what),
`last_good` (what is left when it diverges), `adapters` (peft), `distillation` and `copying` (towards the dense model)
and `training_loss`; `prehab`, with `preparing` and `regularizers`, trains before compression.

What comes out is saved and loaded (`saving`, `hub`, `integrity`, `self_contained`, `card`, `files`), exported
(`export`), served (`vllm_plugin`, `fused`), measured (`evaluation`, `zero_shot`) and told of (`report`, `picture`).
`texts`, `models`, `run` (of a `run_config`, read by `settings`), `compare` and `cli` are around it all.
"""

from zssvd_lightning import errors
from zssvd_lightning.adapters import merge_adapters
from zssvd_lightning.callback import ZSSVDCallback
from zssvd_lightning.checkpoint import LowRankCheckpointMixin
from zssvd_lightning.config import CompressionConfig
from zssvd_lightning.distillation import save_predictions
from zssvd_lightning.evaluation import perplexity
from zssvd_lightning.export import export_onnx, merge
from zssvd_lightning.limits import scheduled_steps
from zssvd_lightning.modules import LowRankLinear
from zssvd_lightning.phase import Phase
from zssvd_lightning.pipeline import compress
from zssvd_lightning.prehab import LowRankPrehab
from zssvd_lightning.quantization import quantize
from zssvd_lightning.report import Report
from zssvd_lightning.run import Run
from zssvd_lightning.run_config import RunConfig
from zssvd_lightning.saving import from_pretrained, save_pretrained
from zssvd_lightning.settings import load_config
from zssvd_lightning.ways import FactorRecovery, LoRARecovery, SingularValueRecovery

__all__ = [
    "CompressionConfig",
    "FactorRecovery",
    "LoRARecovery",
    "LowRankCheckpointMixin",
    "LowRankLinear",
    "LowRankPrehab",
    "Phase",
    "Report",
    "Run",
    "RunConfig",
    "SingularValueRecovery",
    "ZSSVDCallback",
    "compress",
    "errors",
    "export_onnx",
    "from_pretrained",
    "load_config",
    "merge",
    "merge_adapters",
    "perplexity",
    "quantize",
    "save_predictions",
    "save_pretrained",
    "scheduled_steps",
]
