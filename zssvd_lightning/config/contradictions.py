"""Checks of a `CompressionConfig` for settings that exclude `convolutions`."""

from typing import TYPE_CHECKING

from zssvd_lightning.errors import ContradictionError

if TYPE_CHECKING:
    from zssvd_lightning.config.compression import CompressionConfig


def refuse_not_for_convolutions(config: "CompressionConfig") -> None:
    """Raise ContradictionError if `convolutions` is set, and another setting does not go with it."""
    if not config.convolutions:
        return
    if config.budget_in == "flops":
        raise ContradictionError(
            "the FLOPs of convolutions depend on the size of the image, so budget_in cannot be 'flops' with "
            "convolutions; take 'parameters' or 'bytes'"
        )
    if config.corrections and config.refits:
        raise ContradictionError(
            f"correction_step {config.correction_step!r} compares inputs of whole sequences, which patches are not; "
            "set convolutions to False, or take another correction_step"
        )
