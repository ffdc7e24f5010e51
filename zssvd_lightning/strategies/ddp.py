"""Adapter for DistributedDataParallel: every process holds the whole model."""

from functools import cached_property

from lightning.pytorch.strategies import DDPStrategy

from zssvd_lightning.distributed import Replicas, Team
from zssvd_lightning.errors import UnsupportedTrainingError
from zssvd_lightning.serialization.checkpoint_mixin import LowRankCheckpointMixin
from zssvd_lightning.strategies.base import StrategyAdapter


class DDPAdapter(StrategyAdapter):
    """Adapter that removes the DDP wrapper during compression and wraps the low-rank model afterwards.

    The wrapper expects gradients for exactly the parameters that the module had when it was wrapped. Without the
    wrapper, each process gathers statistics over its batches; they are summed once instead of at every batch.
    """

    serves = (DDPStrategy,)
    compresses_again = True

    @cached_property
    def team(self) -> Team:
        """Team of the processes of the run."""
        return Replicas(self.trainer.strategy.root_device)

    def refuse_unsupported(self) -> None:
        """Raise UnsupportedTrainingError if weights differ between processes or cannot return to the caller of fit."""
        strategy = self.trainer.strategy
        if strategy._model_averager is not None:  # type: ignore[attr-defined]  # noqa: SLF001
            raise UnsupportedTrainingError(
                "local SGD lets the weights of the processes drift apart, but one set of ranks and factors must fit "
                "all; compress without ddp_comm_state, and train on with it in a second fit"
            )
        if strategy._start_method != "popen" and not isinstance(self.module, LowRankCheckpointMixin):  # type: ignore[attr-defined]  # noqa: SLF001
            raise UnsupportedTrainingError(
                f"started by '{strategy._start_method}', processes hand the weights back to the one that called fit, "  # type: ignore[attr-defined]  # noqa: SLF001
                f"whose {type(self.module).__name__} is dense; give it LowRankCheckpointMixin as a base class, or use "
                "strategy='ddp'"
            )

    def before_batch(self) -> None:
        """Remove the DDP wrapper."""
        self.trainer.strategy.model = self.module

    def rebuild_optimizers(self) -> None:
        """Wrap the module, which sends the first process's weights to all, and set up optimizers. Collective."""
        self.before_batch()
        self.trainer.strategy.configure_ddp()  # type: ignore[attr-defined]
        super().rebuild_optimizers()
