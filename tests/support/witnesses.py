"""Callbacks that look on inside the processes of a run."""

import weakref
from collections import Counter
from typing import Any

import lightning as L
from torch import Tensor

from zssvd_lightning.calibration.collector import StatisticsCollector
from zssvd_lightning.decomposition import factors as factorization
from zssvd_lightning.decomposition.factors import TruncatedWeights
from zssvd_lightning.distributed import Shards


class WholeWeights(L.Callback):
    """Notes every whole weight, gradient or factor a process gets hold of, and for which layer, while it is alive."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.alive: list[tuple[str, weakref.ref[Tensor]]] = []
        self.layer = ""
        self.seen: Counter[str] = Counter()
        self.together: set[frozenset[str]] = set()
        for owner, name, layer_of in (
            (StatisticsCollector, "layer_at", lambda self, owner, name, **_: name),
            (TruncatedWeights, "_whole", lambda self, name: name),
        ):
            setattr(owner, name, self._entering(getattr(owner, name), layer_of))
        for owner, name in ((Shards, "weight_at"), (Shards, "whole"), (factorization, "truncated_weight")):
            setattr(owner, name, self._noting(getattr(owner, name)))

    def _entering(self, original: Any, layer_of: Any) -> Any:
        def entered(*args: Any, **kwargs: Any) -> Any:
            self.layer = layer_of(*args, **kwargs)
            return original(*args, **kwargs)

        return entered

    def _noting(self, original: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if result is not None:
                self.seen[self.layer] += 1
                self.alive = [(layer, ref) for layer, ref in self.alive if ref() is not None]
                self.alive.append((self.layer, weakref.ref(result)))
                self.together.add(frozenset(layer for layer, _ in self.alive))
            return result

        return noted

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert len(self.seen) > 10, self.seen
        assert max(map(len, self.together)) == 1, max(self.together, key=len)
