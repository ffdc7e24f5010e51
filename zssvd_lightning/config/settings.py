"""The settings of a compression as keyword arguments: the keys of `CompressionConfig`, none of which must be given."""

from pathlib import Path
from typing import NotRequired, TypedDict


class CompressionSettings(TypedDict):
    """Keyword arguments that become a `CompressionConfig`, which documents each, all but `prune_ratio`.

    Args:
        metric: coordinates of the SVD: `none`, `rows`, `diagonal`, `input` or `two_sided`.
        output_side: gradients by the outputs that `two_sided` uses: `empirical`, `sampled` or `top_k`.
        reestimate: estimate the curvature along each component from more batches (EK-FAC).
        selection: rule that drops components: `zero_sum`, `abs_delta`, `abs_delta_unordered`, `most_negative`, `sigma`,
            `uniform`, `effective_rank`, `curvature`, `curvature_first_order` or `zero_sum_curvature`.
        truncations: number of truncations that reach the prune ratio in equal parts.
        corrections: gradient steps, each followed by a new truncation.
        correction_step: `projected` (the paper), `natural` or `refit`.
        step_radius: length of the first natural step, as the metric measures it.
        fresh_moments: gather all statistics again after a step; False keeps the second moments.
        correction_batches: batches that the gradient of one step is averaged over.
        line_search: scale each projected step to the minimum of a parabola through the loss. False takes the full step.
        budget_in: unit of the prune ratio: `parameters`, `bytes` or `flops`.
        budget_of: what the prune ratio is a fraction of: `targets` or `model`.
        ratio_of: what the prune ratio counts from, for layers that are low-rank already: `dense` or `present`.
        storage: form of the compressed layers: `factors`, `pivoted`, `remap`, `hq` or `mixed`.
        rows_in_16_bits: rows of the factors that `remap` leaves in 16 bits: `last` or `loss_aware`.
        min_rank_fraction: lowest rank of a matrix, as a fraction of the highest rank that saves anything.
        rank_multiple: number whose multiples are the ranks of all but small matrices: 1, 8, 16, 32 or 64.
        include: name patterns of the layers to compress; all linear layers when None.
        ignore: name patterns of layers to leave alone.
        convolutions: compress `nn.Conv1d` and `nn.Conv2d` too.
        recurrent: compress `nn.LSTM`, `nn.GRU` and `nn.RNN` too.
        remove_experts: also remove whole experts, where that costs less of the loss than lower ranks.
        narrow: also remove hidden units between layers, where that costs less of the loss than lower ranks.
        plan: YAML file with the rank of every layer, which replaces `prune_ratio` and `selection`.
        memory: statistics in memory: of the `whole` model, or (not in a fit) of one of its `blocks` at a time.
        offload: what a compression holds beside the model: where the model is (`none`), in host memory (`cpu`), or in
            scratch files (`disk`).
        max_memory: most memory on the device, such as `24GiB`, by which `memory` and `offload` are chosen.
        max_host_memory: most memory in the host, likewise.
    """

    metric: NotRequired[str | None]
    output_side: NotRequired[str | None]
    reestimate: NotRequired[bool | None]
    selection: NotRequired[str | None]
    truncations: NotRequired[int | None]
    corrections: NotRequired[int | None]
    correction_step: NotRequired[str | None]
    step_radius: NotRequired[float | None]
    fresh_moments: NotRequired[bool | None]
    correction_batches: NotRequired[int | None]
    line_search: NotRequired[bool | None]
    budget_in: NotRequired[str | None]
    budget_of: NotRequired[str | None]
    ratio_of: NotRequired[str | None]
    storage: NotRequired[str | None]
    rows_in_16_bits: NotRequired[str | None]
    min_rank_fraction: NotRequired[float | None]
    rank_multiple: NotRequired[int | None]
    include: NotRequired[list[str] | str | None]
    ignore: NotRequired[list[str] | str | None]
    convolutions: NotRequired[bool | None]
    recurrent: NotRequired[bool | None]
    remove_experts: NotRequired[bool | None]
    narrow: NotRequired[bool | None]
    plan: NotRequired[str | Path | None]
    memory: NotRequired[str | None]
    offload: NotRequired[str | None]
    max_memory: NotRequired[int | str | None]
    max_host_memory: NotRequired[int | str | None]


class Settings(CompressionSettings):
    """`CompressionSettings` with the prune ratio."""

    prune_ratio: NotRequired[float | None]
