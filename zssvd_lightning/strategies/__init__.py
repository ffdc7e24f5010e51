"""Adapters between compression and Lightning strategies, one per supported strategy.

Other packages add adapters by `ADAPTERS.register`, or through entry points of the group `zssvd_lightning.strategies`.
Each entry point refers to a `StrategyAdapter` class. If several adapters match a strategy, the one for its nearest base
class is used.
"""

from typing import Any

import lightning as L
from lightning.pytorch.strategies import Strategy

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
    if not isinstance(entry, type) or not issubclass(entry, StrategyAdapter):
        return "a subclass of StrategyAdapter"
    serves = vars(entry).get("serves")
    if not isinstance(serves, tuple) or not serves or not all(_is_strategy(kind) for kind in serves):
        return "a StrategyAdapter with a `serves` of its own: a tuple of subclasses of Strategy"
    for other in ADAPTERS.those(lambda known: known is not RefusedAdapter and not set(known.serves).isdisjoint(serves)):
        return f"the adapter of a strategy that none serves yet, but {other} does; subclass the strategy"
    return None


def _is_strategy(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Strategy)


ADAPTERS: Registry[type[StrategyAdapter]] = Registry(
    "strategy adapter",
    "zssvd_lightning.strategies",
    {kind.__name__: kind for kind in (SingleDeviceAdapter, DDPAdapter, FSDP2Adapter, RefusedAdapter)},
    _wrong,
)
"""Adapters by name; `register` adds one. A strategy is served by the adapter of its nearest base class."""


def adapter_for(trainer: L.Trainer, module: L.LightningModule) -> StrategyAdapter:
    """Return the adapter for the strategy of a Trainer; a `RefusedAdapter` for an unsupported strategy."""
    serving: dict[type, type[StrategyAdapter]] = {
        kind: adapter for adapter in ADAPTERS.loaded().values() for kind in adapter.serves
    }
    nearest = next((serving[kind] for kind in type(trainer.strategy).__mro__ if kind in serving), RefusedAdapter)
    return nearest(trainer, module)
