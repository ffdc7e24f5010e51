"""Correction `toward_original`: entries move half of the way back to the original, where that lowers the loss."""

from zssvd_lightning.config.corrections import CORRECTIONS, Correction

SHARE = 0.5


def toward_original(compression):
    """Move the entries of each weight whose gradient points away from the original value."""
    for name, target in compression.targets.items():
        W = target.weight
        way = compression.originals[name] - W
        lowers = compression.gathering.mean_gradient(name).to(W) * way < 0
        target.assign(W + SHARE * way * lowers)


CORRECTIONS.register("toward_original", Correction(toward_original, splits_by_rows=True))
