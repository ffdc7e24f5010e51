"""The spectra of all layers, and what selection sees of them."""

from collections.abc import Mapping

import torch
from tqdm.auto import tqdm

from zssvd_lightning.errors import CalibrationError
from zssvd_lightning.selection import Components
from zssvd_lightning.spectrum import Spectrum
from zssvd_lightning.statistics import Moments
from zssvd_lightning.targets import Target
from zssvd_lightning.whitening import METRICS, Whitening, warn_of_jitter


def decompose(
    targets: Mapping[str, Target], moments: Moments, metric: str, progress: bool
) -> tuple[dict[str, Spectrum], dict[str, Components]]:
    """Spectra and scores by layer, kept on the CPU; one whitening for all layers that share an input.

    Raises:
        CalibrationError: statistics are missing, not finite or degenerate, or an SVD failed; names the layer.
    """
    whitenings: dict[str, Whitening] = {}
    spectra: dict[str, Spectrum] = {}
    components: dict[str, Components] = {}
    for name, target in tqdm(targets.items(), desc="spectra", unit="layer", disable=not progress):
        leader = moments.leaders.get(name, name)
        if leader not in whitenings:
            whitenings[leader] = METRICS[metric](moments, name)
        try:
            spectrum = Spectrum.of(target.weight, whitenings[leader])
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise CalibrationError(
                f"the SVD of {name} {target.shape} failed: {error}; check the weight for NaN and infinite values, "
                "calibrate on more tokens, or add it to ignore"
            ) from error
        delta = spectrum.sensitivities(moments.mean_gradient(name))
        components[name] = Components(spectrum.sigma.cpu(), delta.cpu())
        spectra[name] = spectrum.to("cpu")
    warn_of_jitter(whitenings)
    return spectra, components
