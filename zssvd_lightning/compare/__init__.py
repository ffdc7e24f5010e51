"""A table over presets, budgets and calibration seeds, on one model and one text.

`arguments` says what is compared, `course` runs it cell by cell in a `folder`, `work` is what the process of one cell
does, `results` and `picture` tell what came out.
"""

from zssvd_lightning.compare.arguments import CompareConfig
from zssvd_lightning.compare.course import compare
from zssvd_lightning.compare.results import Results

__all__ = ["CompareConfig", "Results", "compare"]
