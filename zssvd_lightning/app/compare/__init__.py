"""A table over presets, budgets and calibration seeds, on one model and one text.

`arguments` says what is compared, `course` runs it cell by cell in a `folder`, `work` is what the process of one cell
does, `results` and `picture` tell what came out.
"""

from zssvd_lightning.app.compare.arguments import CompareConfig
from zssvd_lightning.app.compare.results import Results
from zssvd_lightning.app.compare.runner import compare

__all__ = ["CompareConfig", "Results", "compare"]
