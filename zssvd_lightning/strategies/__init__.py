"""Adapters between compression and Lightning strategies, one per supported strategy.

Other packages add adapters by `ADAPTERS.register`, or through entry points of the group `zssvd_lightning.strategies`.
Each entry point refers to a `StrategyAdapter` class. If several adapters match a strategy, the one for its nearest base
class is used.
"""

from typing import Any

import lightning as L

from zssvd_lightning._registry import Registry
from zssvd_lightning.strategies.base import SingleDeviceAdapter, StrategyAdapter
from zssvd_lightning.strategies.ddp import DDPAdapter
from zssvd_lightning.strategies.fsdp2 import FSDP2Adapter
from zssvd_lightning.strategies.unsupported import RefusedAdapter

__all__ = [
    "ADAPTERS",
    "DDPAdapter",
    "FSDP2Adapter",
    "RefusedAdapter",
    "SingleDeviceAdapter",
    "StrategyAdapter",
    "adapter_for",
]


def _wrong(name: str, entry: Any) -> str | None:
    fits = isinstance(entry, type) and issubclass(entry, StrategyAdapter) and entry.serves
    return None if fits else "a subclass of StrategyAdapter that serves a strategy"


ADAPTERS: Registry[type[StrategyAdapter]] = Registry(
    "strategy adapter",
    "zssvd_lightning.strategies",
    {kind.__name__: kind for kind in (SingleDeviceAdapter, DDPAdapter, FSDP2Adapter, RefusedAdapter)},
    _wrong,
)
"""Adapters by name; `register` adds one. If two serve the same class of strategies, the later one is used."""


def adapter_for(trainer: L.Trainer, module: L.LightningModule) -> StrategyAdapter:
    """Return the adapter for the strategy of a Trainer; a `RefusedAdapter` for an unsupported strategy."""
    serving: dict[type, type[StrategyAdapter]] = {
        kind: adapter for adapter in ADAPTERS.values() for kind in adapter.serves
    }
    nearest = next((serving[kind] for kind in type(trainer.strategy).__mro__ if kind in serving), RefusedAdapter)
    return nearest(trainer, module)
