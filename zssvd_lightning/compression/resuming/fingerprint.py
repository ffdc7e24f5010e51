"""Fingerprint of a run: all that its results depend on, to recognize the interrupted run."""

import json
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.compression.report import VERSIONS
from zssvd_lightning.config.placement import PLACES
from zssvd_lightning.offload.pages import release_pages
from zssvd_lightning.serialization.integrity import add_to_digest


def fingerprint_of(compression: Compression, calibration_batches: int | None) -> dict[str, str]:
    """Return settings, digests of the weights and of the code, versions and the machine, each by its name.

    The batches and the functions that read them are known by what they give, once they run.
    """
    run, device = compression, next(compression.model.parameters()).device
    config = {key: value for key, value in asdict(run.config).items() if key not in PLACES}
    plan = None if run.followed_plan is None else sha256(repr(run.followed_plan).encode()).hexdigest()
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        **{key: json.dumps(value, default=str) for key, value in (config | {"plan": plan}).items()},
        "calibration_batches": str(calibration_batches),
        "the model": _weights_of(run.model),
        **{f"the version of {name}": version(name) for name in VERSIONS},
        "the code of this package": _code(),
        "the device": f"{device.type} {named}",
        "the number of threads (OMP_NUM_THREADS)": str(torch.get_num_threads()),
        "the precision of products": torch.get_float32_matmul_precision(),
    }


def _weights_of(model: nn.Module) -> str:
    """Return the digest of the structure of a model and of all its parameters and buffers."""
    found = sha256(str(model).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found.update(name.encode())
        add_to_digest(found, tensor)
        release_pages([tensor])
    return found.hexdigest()


def _code() -> str:
    found = sha256()
    folder = Path(__file__).parents[2]
    for path in sorted(folder.rglob("*.py")):
        found.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return found.hexdigest()
