"""Compression of layers that are low-rank already, during training."""

from torch import nn

from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.compression.report import Report
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.errors import UnsupportedTrainingError
from zssvd_lightning.model.apart.kind import SPREAD
from zssvd_lightning.model.recompression import StandIns
from zssvd_lightning.recovery.run import RecoveryRun
from zssvd_lightning.serialization.specs import ranks_of
from zssvd_lightning.strategies import StrategyAdapter


def stand_ins_in_training(
    model: nn.Module, config: CompressionConfig, adapter: StrategyAdapter, recovery: RecoveryRun | None
) -> StandIns:
    """Return what can stand in for the selected low-rank layers and modules that are taken apart, not yet put in.

    Args:
        model: the model in training.
        config: settings of the compression, which select the layers.
        adapter: adapter for the strategy that runs the model.
        recovery: the recovery that follows; None for the optimizer of the module.

    Raises:
        TargetError: a selected layer cannot be compressed again.
        UnsupportedTrainingError: the strategy cannot train with stand-ins.
        ConfigError: the recovery does not suit the form of a layer that may stay as it is.
    """
    stand_ins = StandIns(model, config.include, config.ignore, adapter.replace, opted=config.opted)
    for name, layer in stand_ins.layers.items():
        if not adapter.compresses_again:
            strategy = type(adapter.trainer.strategy).__name__
            raise UnsupportedTrainingError(
                f"{name} ({type(layer).__name__}) is low-rank already, and under {strategy} it cannot be compressed "
                "again during training; train on one device or with strategy='ddp', call zssvd_lightning.compress on "
                "the model before the fit, or add it to ignore"
            )
        if recovery is not None:
            recovery.settings.refuse_storage(layer.kind)
    for taken in stand_ins.apart if not adapter.compresses_again else ():
        spread = [name for name, reason in taken.left.items() if reason == SPREAD]
        for name in [*taken.modules, *spread]:
            raise UnsupportedTrainingError(
                f"{name} ({type(model.get_submodule(name)).__name__}) {taken.kind.told}, and under "
                f"{type(adapter.trainer.strategy).__name__} it cannot be taken apart during training; train on one "
                "device or with strategy='ddp', call zssvd_lightning.compress on the model before the fit, or "
                f"{taken.kind.instead.format(name=name)}"
            )
    return stand_ins


def is_outdated(compression: Compression) -> bool:
    """Return whether a compression must be created again before it starts, for the layers that the model has then."""
    modules = set(compression.model.modules())
    return any(target.module not in modules for target in compression.targets.values())


def has_reported_ranks(model: nn.Module, report: Report) -> bool:
    """Return whether the low-rank layers of a report are in the model, with the reported ranks."""
    ranks = {name: layer.rank for name, layer in report.layers.items() if layer.rank is not None}
    return ranks.items() <= ranks_of(model).items()
