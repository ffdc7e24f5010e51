"""Media that hold tensors, for machines without an accelerator."""

from typing import Any

from torch import Tensor

from zssvd_lightning.offload.media import HostMemory


class OfAnAccelerator(HostMemory):
    """Host memory that takes every tensor for one of an accelerator, and so copies it both ways."""

    def get(self, held: Any) -> Tensor:
        return super().get(held).clone()

    def _moves(self, tensor: Tensor) -> bool:
        return True
