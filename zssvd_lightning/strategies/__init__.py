"""Adapters between compression and Lightning strategies, one per supported strategy.

Other packages add adapters through entry points of the group `zssvd_lightning.strategies`. Each entry point refers to
a `StrategyAdapter` class. If several adapters match a strategy, the one for its nearest base class is used.
"""

from importlib.metadata import entry_points

import lightning as L

from zssvd_lightning.strategies.base import SingleDeviceAdapter, StrategyAdapter
from zssvd_lightning.strategies.ddp import DDPAdapter
from zssvd_lightning.strategies.fsdp2 import FSDP2Adapter
from zssvd_lightning.strategies.unsupported import RefusedAdapter

__all__ = ["DDPAdapter", "FSDP2Adapter", "RefusedAdapter", "SingleDeviceAdapter", "StrategyAdapter", "adapter_for"]


GROUP = "zssvd_lightning.strategies"


def adapter_for(trainer: L.Trainer, module: L.LightningModule) -> StrategyAdapter:
    """Return the adapter for the strategy of a Trainer; a `RefusedAdapter` for an unsupported strategy."""
    added: list[type[StrategyAdapter]] = [point.load() for point in entry_points(group=GROUP)]
    ours: list[type[StrategyAdapter]] = [SingleDeviceAdapter, DDPAdapter, FSDP2Adapter, RefusedAdapter]
    serving: dict[type, type[StrategyAdapter]] = {kind: adapter for adapter in ours + added for kind in adapter.serves}
    nearest = next((serving[kind] for kind in type(trainer.strategy).__mro__ if kind in serving), RefusedAdapter)
    return nearest(trainer, module)
