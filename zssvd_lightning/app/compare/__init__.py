"""Comparison of presets, budgets and calibration seeds on one model, as a table.

`arguments` defines the cells of the table, `runner` runs them one by one and stores them in a `folder`, `cell` is the
work of the process of one cell, `results` and `picture` present the outcome.
"""

from zssvd_lightning.app.compare.arguments import CompareConfig
from zssvd_lightning.app.compare.results import Results
from zssvd_lightning.app.compare.runner import compare

__all__ = ["CompareConfig", "Results", "compare"]
