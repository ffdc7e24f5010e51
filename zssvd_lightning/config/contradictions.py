"""Checks of a `CompressionConfig` for settings that exclude each other."""

from typing import TYPE_CHECKING

from zssvd_lightning.errors import ContradictionError

if TYPE_CHECKING:
    from zssvd_lightning.config.compression import CompressionConfig


def refuse_contradictions(config: "CompressionConfig") -> None:
    """Raise ContradictionError if settings do not go with memory `blocks` or with convolutions."""
    if config.by_blocks:
        _refuse_not_by_blocks(config)
    if config.convolutions:
        _refuse_not_for_convolutions(config)


def _refuse_not_by_blocks(config: "CompressionConfig") -> None:
    if config.corrections and config.refits:
        raise ContradictionError(
            f"correction_step {config.correction_step!r} runs the whole model on all batches at once, so memory "
            "cannot be 'blocks'; set memory to 'whole', or corrections to 0"
        )
    if config.offload != "none":
        raise ContradictionError(
            f"memory 'blocks' keeps all in scratch files already, so offload cannot be {config.offload!r}; leave one "
            "of them out"
        )


def _refuse_not_for_convolutions(config: "CompressionConfig") -> None:
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
