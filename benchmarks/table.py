"""Perplexity of every selection rule at three budgets, from one calibration pass.

`python benchmarks/table.py FOLDER`, where FOLDER holds `wikitext2.calibration.raw` and `wikitext2.test.raw`. Prints
Markdown. One-shot (no corrections), metric `input`, 64 samples of 512 tokens, 16 test windows of 1024, float32.
"""

import copy
import sys
from dataclasses import replace
from pathlib import Path

from zssvd_lightning import Run, RunConfig, load_config, perplexity
from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.compression.gathering import gather
from zssvd_lightning.compression.phase import Phase
from zssvd_lightning.selection.rules import RULES
from zssvd_lightning.sources.texts import load_text, tokenize, windows

BUDGETS = {0.2: 0.0, 0.4: 0.0, 0.6: 0.3}
"""Prune ratio -> rank floor."""


def main(folder: str) -> None:
    """Calibrates once, then truncates, evaluates and restores for each cell."""
    texts = Path(folder)
    settings = [f"calibration.text={texts / 'wikitext2.calibration.raw'}", "evaluation.text=null"]
    run = Run(load_config(RunConfig, "configs/smollm2-135m/zs-20.yaml", settings))
    test = str(texts / "wikitext2.test.raw")
    held_out = windows(tokenize(load_text(test), run.tokenizer), 1024, 16, test)
    one_shot = replace(run.config.compression, corrections=0)

    calibrated = Compression(run.model, one_shot)
    gather(calibrated, run.calibration_loader(), Phase.CALIBRATE)
    dense = perplexity(run.model, held_out, desc="dense").perplexity
    rows = []
    for selection in RULES:
        cells = []
        for prune_ratio, floor in BUDGETS.items():
            if selection == "uniform":
                floor = 0.0  # noqa: PLW2901
            config = replace(one_shot, prune_ratio=prune_ratio, selection=selection, min_rank_fraction=floor)
            compression = Compression(run.model, config)
            compression.gathering.moments = copy.copy(calibrated.gathering.moments)
            compression.truncate()
            value = perplexity(run.model, held_out, desc=f"{selection} {prune_ratio}").perplexity
            compression.restore()
            cells.append(f"{value:.1f}")
            print(selection, prune_ratio, cells[-1], flush=True)
        rows.append(f"| `{selection}` | " + " | ".join(cells) + " |")
    print(f"\n| selection (dense {dense:.2f}) | 0.2 | 0.4 | 0.6 |\n|---|---|---|---|\n" + "\n".join(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
