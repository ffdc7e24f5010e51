"""Processes of a Trainer under DDP: their team, and the wrapper around a model whose parameters have changed.

Every process holds the whole model. Its `DistributedDataParallel` sums the gradients of the parameters that the model
had when it was wrapped, and of no others. Calibration runs the model without the wrapper, so that statistics are summed
once, at the owners of the layers. The Trainer holds the wrapper in local variables, so the same object is set up anew
afterward.
"""

import gc
import inspect
import warnings
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from zssvd_lightning.distributed import Replicas, Team
from zssvd_lightning.errors import UnsupportedTrainingError

KEPT = ("device_ids", "output_device", "dim", "process_group", "find_unused_parameters", "gradient_as_bucket_view")
"""Arguments of DistributedDataParallel that it has as attributes of the same name, in all versions of torch."""

KEPT_WHERE_KNOWN = ("static_graph", "skip_all_reduce_unused_params", "batched_grad_copy")
"""Arguments that not every version has."""

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""Attributes of a module that hold its hooks."""


def team_of(args: TrainingArguments) -> Team:
    """Return the processes of a run that each hold the whole model."""
    return Replicas(args.device) if args.world_size > 1 else Team()


def wrappers_of(model: nn.Module) -> list[DistributedDataParallel]:
    """Return all that wrap a model for DDP. The Trainer gives them to no callback, so all objects are searched."""
    gc.collect()  # of runs that are over
    kind = DistributedDataParallel
    return [each for each in gc.get_objects() if issubclass(type(each), kind) and each.module is model]


def refuse_wrappers(model: nn.Module) -> None:
    """Raise UnsupportedTrainingError if a model is not wrapped for DDP, or in a way that cannot be repeated."""
    wrappers = wrappers_of(model)
    if not wrappers:
        raise UnsupportedTrainingError(
            f"several processes train {type(model).__name__}, but it is not wrapped in DistributedDataParallel; start "
            "them with torchrun or accelerate for DDP, or call compress(model, batches) before the Trainer is made"
        )
    for wrapper in wrappers:
        parts = {
            "mixed_precision": wrapper.mixed_precision,
            "a communication hook": getattr(wrapper, "_comm_hooks", None),
            "delay_all_reduce_named_params": getattr(wrapper, "_delay_all_reduce_params", None),
        }
        for name, used in parts.items():
            if used:
                raise UnsupportedTrainingError(
                    f"DistributedDataParallel has {name}, which knows the parameters of the dense model; leave it out, "
                    "or call compress(model, batches) before the Trainer is made"
                )


def wrap_anew(model: nn.Module) -> None:
    """Set up the wrappers of a model for its present parameters, which all get from the first process. Collective."""
    for wrapper in wrappers_of(model):
        arguments = _arguments_of(wrapper)
        hooks = {name: dict(getattr(wrapper, name)) for name in HOOKS}
        mode = wrapper.training
        del wrapper.logger, wrapper.reducer  # the former reducer takes its hooks off the parameters as it goes
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of `broadcast_buffers`, the name in all versions
            DistributedDataParallel.__init__(wrapper, model, **arguments)
        for name, kept in hooks.items():
            getattr(wrapper, name).update(kept)
        wrapper.training = mode


def _arguments_of(wrapper: DistributedDataParallel) -> dict[str, Any]:
    """Return the arguments with which a wrapper was made."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    names = [*KEPT, *(name for name in KEPT_WHERE_KNOWN if name in known)]
    arguments = {name: getattr(wrapper, name) for name in names}
    sends = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    if not getattr(wrapper, sends):
        arguments["broadcast_buffers"] = False
    if not wrapper.bucket_bytes_cap_default:
        arguments["bucket_cap_mb"] = wrapper.bucket_bytes_cap / 2**20
    return arguments
