"""Rollback of a diverging training to the last weights that gave finite losses and gradients."""

import torch
from torch import Tensor, nn

from zssvd_lightning.distributed import Team
from zssvd_lightning.errors import DivergedError, RecoveryError
from zssvd_lightning.model.targets import local_part

LEAST_SCALE = 1e-3
"""Lowest valid loss scale; a lower one means that gradients were never finite while the scale fell."""


class Rollback:
    """Copy of this process's part of the trained parameters, from when everything was last finite.

    Args:
        lr: learning rate, for the error message; None if the module's optimizer sets it.
    """

    def __init__(self, lr: float | None) -> None:
        self._lr = lr
        self._held: dict[str, Tensor] = {}
        self._losses, self._finite = 0, True

    def note_loss(self, *, finite: bool) -> None:
        """Record that there was a loss.

        Args:
            finite: False if the loss was checked and is not finite.
        """
        self._losses += 1
        self._finite &= finite

    @torch.no_grad()
    def keep(self, module: nn.Module) -> None:
        """Copy the current values of the parameters that require gradients."""
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                now = local_part(parameter.detach())
                self._held.setdefault(name, torch.empty_like(now)).copy_(now)

    def forget(self) -> None:
        """Delete the copy."""
        self._held = {}

    def check_gradients(self, module: nn.Module, team: Team, scale: float | None) -> None:
        """Copy the weights before they change, if they gave finite gradients. Collective.

        Args:
            module: the module in training.
            team: the processes of the run.
            scale: loss scale, under which gradients may overflow in a healthy training; None without one.

        Raises:
            DivergedError: a loss or gradient is not finite; the last weights that gave finite ones are restored.
            RecoveryError: there were losses but no gradients.
        """
        trained = [p for p in module.parameters() if p.requires_grad]
        gradients = [local_part(p.grad) for p in trained if p.grad is not None]
        losses, self._losses = self._losses, 0
        finite, self._finite = self._finite, True
        scaled_well = scale is None or all(team.gathered(finite and scale >= LEAST_SCALE))
        finite = scaled_well and (scale is not None or _are_finite(gradients, team))
        if losses and not gradients:
            raise RecoveryError(
                "no gradient has come to what the recovery trains: activations are checkpointed with "
                "use_reentrant=True behind frozen layers, or training_step detaches the model's output"
            )
        if finite:
            self.keep(module)
        else:
            self._give_up(module)

    def check_weights(self, module: nn.Module, team: Team) -> None:
        """Raise DivergedError if a trained weight is not finite, after restoring the copied weights. Collective."""
        if not _are_finite([local_part(p.detach()) for p in module.parameters() if p.requires_grad], team):
            self._give_up(module)

    @torch.no_grad()
    def _give_up(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            if name in self._held:
                local_part(parameter.detach()).copy_(self._held[name])
        raise DivergedError(
            "a loss, a gradient or a weight of the recovery is NaN or infinite; the model has the last weights back "
            f"that gave none. Lower recovery.lr (it is {self._lr}), raise recovery.warmup, or train in float32 "
            "or bfloat16"
        )


def _are_finite(values: list[Tensor], team: Team) -> bool:
    """Return True if all values are finite on all processes. Collective."""
    squares = [value.float().square().sum() for value in values]
    total = torch.stack(squares).sum() if squares else torch.zeros((), device=team.device)
    return bool(team.over_rows(total).isfinite())
