"""What stands between a gradient and the optimizer: the loss scale of float16 training, and clipping."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import lightning as L
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from zssvd_lightning.targets import Target


def loss_scale(trainer: L.Trainer) -> float:
    """What losses are multiplied by before backward; 1 unless the run is of precision `16-mixed`."""
    plugin = trainer.precision_plugin
    if isinstance(plugin, MixedPrecision) and plugin.scaler is not None:
        return float(plugin.scaler.get_scale())
    return 1.0


def unscale(trainer: L.Trainer, optimizer: torch.optim.Optimizer, targets: Iterable[Target]) -> bool:
    """Takes the loss scale off gradients of targets the optimizer does not hold, as Lightning did for the others.

    Returns:
        Whether all are finite, which without a loss scale is left to be found out at truncation.
    """
    scale = loss_scale(trainer)
    if scale == 1.0:
        return True
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    gradients = [target.module.weight for target in targets if target.module.weight.grad is not None]
    for weight in gradients:
        if id(weight) not in held and weight.grad is not None:
            weight.grad.div_(scale)
    return all(bool(weight.grad.isfinite().all()) for weight in gradients if weight.grad is not None)


@contextmanager
def nothing_to_clip(module: L.LightningModule) -> Iterator[None]:
    """Keeps gradients from being clipped where they have been taken away, which clipping by value does not stand."""
    before = module.__dict__.get("configure_gradient_clipping")
    module.__dict__["configure_gradient_clipping"] = lambda *_, **__: None
    try:
        yield
    finally:
        del module.__dict__["configure_gradient_clipping"]
        if before is not None:
            module.__dict__["configure_gradient_clipping"] = before
