"""Runs of a Trainer in which a model cannot be compressed."""

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from zssvd_lightning.errors import UnsupportedTrainingError
from zssvd_lightning.transformers_trainer.processes import refuse_wrappers

INSTEAD = "call compress(model, batches) before the Trainer is made, or on the trained model"


def refuse(args: TrainingArguments, model: nn.Module) -> None:
    """Raise UnsupportedTrainingError if the model is wrapped in a way that fixes its parameters, or is spread out.

    Args:
        args: arguments of the Trainer, whose accelerator exists.
        model: the model inside of all wrappers.
    """
    from accelerate.state import AcceleratorState  # which the Trainer needs, but not this package

    kind = str(AcceleratorState().distributed_type)
    parallel = getattr(args, "parallelism_config", None)
    axes = {name: parallel is not None and getattr(parallel, f"{name}_enabled", False) for name in ("tp", "cp", "sp")}
    wrapped = {
        "DataParallel": args.n_gpu > 1,
        "DeepSpeed": bool(args.deepspeed) or "DEEPSPEED" in kind,
        "FSDP": bool(args.fsdp) or "FSDP" in kind,
        "tensor parallelism": axes["tp"] or _is_spread(model),
        "context or sequence parallelism": axes["cp"] or axes["sp"],
        "torch_compile on several processes": args.world_size > 1 and bool(args.torch_compile),
    }
    for name, used in wrapped.items():
        if used:
            raise UnsupportedTrainingError(
                f"with {name}, the Trainer wraps the model before training, and layers can no longer be replaced; "
                f"{INSTEAD}"
            )
    if args.world_size > 1:
        refuse_wrappers(model)


def _is_spread(model: nn.Module) -> bool:
    """Return True if processes hold parts of the parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
