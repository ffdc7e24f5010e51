"""Time of a whole compression against a plain forward and backward over the calibration batches, in one run.

`python benchmarks/bench.py CONFIG [key=value ...]`; model load and evaluation are left aside. `ratio` is over the
calibration batches, `ratio_with_correction_batches` over those and the correction batches at the same speed. Half of
the plain batches run before the compression and half after it, so that a machine that slows down or warms up hits both
alike.
"""

import json
import sys
import time

from torch import Tensor, nn
from tqdm.auto import tqdm

from zssvd_lightning import Run, RunConfig, compress, load_config
from zssvd_lightning._resources import peak_rss_bytes
from zssvd_lightning.compression.gathering import Loss, loss_in


def plain_seconds(model: nn.Module, batches: list[dict[str, Tensor]], loss: Loss) -> float:
    """Return the seconds of forward and backward passes with gradients at every parameter, as training does."""
    start = time.perf_counter()
    for batch in tqdm(batches, desc="plain forward and backward", unit="batch"):
        loss(model, {**batch, "use_cache": False}).backward()  # type: ignore[no-untyped-call]
        model.zero_grad()
    return time.perf_counter() - start


def main(path: str, *overrides: str) -> None:
    """Print the ratio, the seconds of every step and the peak memory as JSON."""
    unmeasured = "evaluation={text: null, second: null, third: null, tasks: []}"
    run = Run(load_config(RunConfig, path, [*overrides, unmeasured]))
    batches, calibration = list(run.calibration_loader()), run.config.calibration
    half, loss = calibration.batches // 2, loss_in(calibration.precision_on(run.model.device))
    plain_seconds(run.model, batches[:1], loss)
    before = plain_seconds(run.model, batches[:half], loss)
    plain_rss = peak_rss_bytes()

    start = time.perf_counter()
    report = compress(run.model, batches, run.config.compression, calibration_batches=calibration.batches, loss=loss)
    whole = time.perf_counter() - start

    compress_rss = peak_rss_bytes()

    dense = Run(run.config)
    plain = before + plain_seconds(dense.model, batches[half : calibration.batches], loss)
    print(
        json.dumps(
            {
                "ratio": whole / plain,
                "ratio_with_correction_batches": whole
                / (plain * (1 + calibration.correction_samples / calibration.samples)),
                "plain_seconds": plain,
                "compress_seconds": whole,
                "seconds": report.seconds,
                "peak_rss_bytes": {"plain": plain_rss, "compress": compress_rss},
                "precision": calibration.precision,
                "corrections": run.config.compression.corrections,
                "tokens": calibration.samples * calibration.length,
                "correction_tokens": calibration.correction_samples * calibration.length,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
