"""DistributedDataParallel: a whole model on every process."""

from functools import cached_property

from lightning.pytorch.strategies import DDPStrategy

from zssvd_lightning.distributed import Replicas, Team
from zssvd_lightning.errors import UnsupportedTrainingError
from zssvd_lightning.serialization.checkpoint_mixin import LowRankCheckpointMixin
from zssvd_lightning.strategies.base import StrategyAdapter


class DDPAdapter(StrategyAdapter):
    """Takes the wrapper off while a compression is under way, and wraps the low-rank model anew.

    The wrapper expects a gradient for the parameters it found when it was made, and no other. Without it each process
    gathers the statistics of its own batches, which are then added up once instead of with every batch.
    """

    serves = (DDPStrategy,)

    @cached_property
    def team(self) -> Team:
        """The processes of the run."""
        return Replicas(self.trainer.strategy.root_device)

    def refuse_unsupported(self) -> None:
        """Raises UnsupportedTrainingError where weights differ between processes, or could not be handed back."""
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
        """Takes the wrapper off."""
        self.trainer.strategy.model = self.module

    def rebuild_optimizers(self) -> None:
        """Wraps the module, which sends the weights of the first process to all, and sets up optimizers."""
        self.before_batch()
        self.trainer.strategy.configure_ddp()  # type: ignore[attr-defined]
        super().rebuild_optimizers()
