"""Statistics of a model gathered block by block: a forward sweep over all batches, a backward sweep over all blocks.

The forward sweep runs the model once per batch without a graph inside of its blocks, stores what each block is called
with, and sends the loss back to the output of the last block. The backward sweep runs the blocks again, from the last
to the first, each on all batches: it sends the stored gradients back through one block, takes the statistics of the
layers in it, and stores the gradients for the block before. Layers outside of the blocks belong to the regions between
chains (see `Seal`), through which gradients are sent back by running the model again up to the next chain.

The sums are those of whole backward passes, batch by batch in the same order. In memory there are only the statistics
of one block or region, the graph of one block on one batch, and the graph from the last block to the loss.
"""

from collections.abc import Callable, Iterable

from zssvd_lightning._contexts import no_cache
from zssvd_lightning.calibration.collector import StatisticsCollector
from zssvd_lightning.distributed import LayerSet
from zssvd_lightning.offload.stores import Store
from zssvd_lightning.sweep.backward import BackwardSweep
from zssvd_lightning.sweep.finished import FinishedParts
from zssvd_lightning.sweep.forward import ForwardSweep, Use
from zssvd_lightning.sweep.records import Batch


def sweep(
    statistics: StatisticsCollector,
    layers: LayerSet,
    batches: Iterable[Batch],
    store: Store,
    *,
    inputs: bool,
    use: Use | None = None,
    finished: FinishedParts | None = None,
    after_first: Callable[[int], None] | None = None,
    progress: bool = False,
) -> None:
    """Gather the statistics of all batches, block by block.

    Args:
        statistics: collector that gets the statistics; what `use` leaves of all but its counts is in scratch files
            afterwards.
        layers: the target layers.
        batches: the batches.
        store: maker of the scratch files.
        inputs: True to take second moments; False for gradients alone.
        use: function that uses the statistics of each block or region as soon as they are complete; see `Use`.
        finished: parts that an interrupted run has finished, and those that this one finishes; None to keep none.
        after_first: function that is called after the forward pass of the first batch with the bytes stored of it.
        progress: draw a progress bar for each chain of blocks.

    Raises:
        CalibrationError: the model cannot be run block by block, a batch cannot be used, or the passes are not those
            of the interrupted run.
        OutputError: the disk is full.
    """
    moments = statistics.moments
    moments.input_sums, moments.gradient_sums, moments.output_sums = store.tensors(), store.tensors(), store.tensors()
    with no_cache(statistics.model):
        forward = ForwardSweep(statistics, layers, store, inputs, use, finished)
        if finished is not None:
            finished.begin()
        for batch in batches:
            forward.run(batch)
            if after_first is not None and len(forward.batches) == 1:
                after_first(forward.stored_hidden + forward.sides.nbytes)
        if finished is not None:
            finished.refuse_other_passes()
        if forward.batches:
            BackwardSweep(forward, progress).run()
