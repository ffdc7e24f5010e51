"""The last weights that gave finite losses and gradients, which a training that diverges is given back."""

import torch
from torch import Tensor, nn

from zssvd_lightning.distributed import Team
from zssvd_lightning.errors import DivergedError, RecoveryError
from zssvd_lightning.model.targets import local_part

LEAST_SCALE = 1e-3
"""A loss scale that has fallen below it has met nothing but gradients that are not finite."""


class Rollback:
    """What this process holds of the parameters that require gradients, as they were when all was last finite.

    Args:
        lr: the learning rate, for the message; None when the module's own optimizer has it.
    """

    def __init__(self, lr: float | None) -> None:
        self._lr = lr
        self._held: dict[str, Tensor] = {}
        self._losses, self._finite = 0, True

    def note_loss(self, *, finite: bool) -> None:
        """Notes that there was a loss, and whether it is finite, where that is looked at."""
        self._losses += 1
        self._finite &= finite

    @torch.no_grad()
    def keep(self, module: nn.Module) -> None:
        """Keeps what is trained as it is now."""
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                now = local_part(parameter.detach())
                self._held.setdefault(name, torch.empty_like(now)).copy_(now)

    def forget(self) -> None:
        """Keeps nothing any longer."""
        self._held = {}

    def check_gradients(self, module: nn.Module, team: Team, scale: float | None) -> None:
        """Keeps the weights that gave finite gradients, before they change. Collective.

        Args:
            module: that is trained.
            team: the processes of the run.
            scale: by which losses are multiplied, so that gradients may overflow though all is well; None without.

        Raises:
            DivergedError: they did not; those that last did are back.
            RecoveryError: losses gave no gradients.
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
        """Raises DivergedError when what was trained is not finite; the last that was is back then. Collective."""
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
    """Whether these are, on all processes. Collective."""
    squares = [value.float().square().sum() for value in values]
    total = torch.stack(squares).sum() if squares else torch.zeros((), device=team.device)
    return bool(team.over_rows(total).isfinite())
