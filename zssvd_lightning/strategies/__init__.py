"""One adapter a Lightning strategy: what a compression asks of it, and which strategies are served.

Packages add adapters for theirs by an entry point of the group `zssvd_lightning.strategies`, whose object is a
`StrategyAdapter` class. Of several that serve a strategy the one for its nearest class is taken.
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
    """The adapter for the strategy of a Trainer; for one that nobody serves, one that refuses it when asked."""
    added: list[type[StrategyAdapter]] = [point.load() for point in entry_points(group=GROUP)]
    ours: list[type[StrategyAdapter]] = [SingleDeviceAdapter, DDPAdapter, FSDP2Adapter, RefusedAdapter]
    serving: dict[type, type[StrategyAdapter]] = {kind: adapter for adapter in ours + added for kind in adapter.serves}
    nearest = next((serving[kind] for kind in type(trainer.strategy).__mro__ if kind in serving), RefusedAdapter)
    return nearest(trainer, module)
