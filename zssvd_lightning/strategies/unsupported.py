"""Strategies under which layers cannot be replaced during a fit, and the workaround."""

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.strategies.xla import XLAStrategy

from zssvd_lightning.errors import UnsupportedTrainingError
from zssvd_lightning.strategies.base import StrategyAdapter


class RefusedAdapter(StrategyAdapter):
    """Adapter that refuses unsupported strategies, including those that extend or resemble a supported one."""

    serves = (DeepSpeedStrategy, FSDPStrategy, XLAStrategy)

    def refuse_unsupported(self) -> None:
        """Raise UnsupportedTrainingError, always."""
        raise UnsupportedTrainingError(
            f"under {type(self.trainer.strategy).__name__} layers cannot be replaced in the middle of a fit. Compress "
            "in a first fit on one device, with strategy='ddp' or with ModelParallelStrategy (FSDP2), and go on in a "
            "second one that loads its checkpoint in configure_model, as recipes/two_fits.py does"
        )
