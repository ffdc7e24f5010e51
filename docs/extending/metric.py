"""Metric `shrunk_input`: the input second moment, shrunk toward its diagonal.

Correlations that few calibration tokens suggest count less, as in a Ledoit-Wolf estimate.
"""

import torch

from zssvd_lightning.whitening.cholesky import Root, safe_cholesky
from zssvd_lightning.whitening.metrics import METRICS, Metric, identity

SHRINKAGE = 0.1


def shrunk_input_root(moments, name):
    """Return the root of `(1 - s) A + s diag(A)`."""
    A = moments.second_moment(name)
    shrunk = torch.lerp(A, A.diagonal().diag(), SHRINKAGE)
    return Root(*safe_cholesky(shrunk, name))


METRICS.register("shrunk_input", Metric(inputs=shrunk_input_root, outputs=identity))
