"""A whole run from a config: what stands before and after the compression, shared by the command line and recipes."""

import json
from dataclasses import asdict

import torch
from torch.utils.data import DataLoader

from zssvd_lightning import evaluation, texts
from zssvd_lightning.config import RunConfig
from zssvd_lightning.files import MARKER, check_output, replacing_folder
from zssvd_lightning.hub import save_pretrained
from zssvd_lightning.models import load_model, place
from zssvd_lightning.picture import draw
from zssvd_lightning.report import Report, peak_rss_bytes


class Run:
    """Model, tokenizer and texts of one run. Everything is loaded and checked at once, before any work is spent.

    Args:
        config: the run's settings.
        progress: whether to draw progress bars.

    Raises:
        ModelSourceError: the model cannot be loaded.
        TextError: a text cannot be read or is too short.
        OutputError: the output folder holds something else.
    """

    def __init__(self, config: RunConfig, progress: bool = True) -> None:
        self.config = config
        self.progress = progress
        self.output = check_output(config.output)
        torch.manual_seed(config.calibration.seed)
        self.model, self.tokenizer = load_model(config.model.source, config.model.dtype)
        place(self.model)
        calibration = config.calibration
        tokens = texts.tokenize(texts.load_text(calibration.text), self.tokenizer)
        self.calibration = texts.TokenWindows(
            texts.sampled_windows(tokens, calibration.length, calibration.samples, calibration.seed, calibration.text)
        )
        self._windows = {key: self._evaluation_windows(text) for key, text in self._evaluation_texts().items()}
        self._dense_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())
        self._perplexity: dict[str, dict[str, float]] = {key: {} for key in self._windows}
        self._evaluate_seconds = 0.0

    def calibration_loader(self) -> "DataLoader[dict[str, torch.Tensor]]":
        """The calibration windows in batches, always in the same order."""
        return DataLoader(self.calibration, batch_size=self.config.calibration.batch_size)

    def evaluate(self, which: str) -> None:
        """Measures perplexity on every evaluation text, as that of the `dense` or the `compressed` model."""
        place(self.model)
        for key, windows in self._windows.items():
            result = evaluation.perplexity(self.model, windows, desc=f"{key}, {which}", progress=self.progress)
            self._perplexity[key][which] = result.perplexity
            self._evaluate_seconds += result.seconds

    def save(self, report: Report, picture: bool = False) -> None:
        """Completes `report` and writes it, the model and the tokenizer to the output folder, all or nothing.

        Args:
            report: of the compression.
            picture: whether to draw it as `report.png`, which needs matplotlib.

        Raises:
            OutputError: writing failed; what was there before is untouched.
        """
        report.perplexity = self._perplexity.get("perplexity")
        report.perplexity_second = self._perplexity.get("perplexity_second")
        if self._windows:
            report.seconds["evaluate"] = self._evaluate_seconds
        report.seed = self.config.calibration.seed
        report.config = asdict(self.config)
        with replacing_folder(self.output) as folder:
            save_pretrained(self.model, folder, self.tokenizer)
            compressed = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            report.file_bytes = {"dense": self._dense_bytes, "compressed": compressed}
            report.peak_rss_bytes = peak_rss_bytes()
            if picture:
                draw(report, folder / "report.png")
            written = report.to_dict() | {"files": sorted([MARKER, *(entry.name for entry in folder.iterdir())])}
            (folder / MARKER).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")

    def _evaluation_texts(self) -> dict[str, str]:
        wanted = {"perplexity": self.config.evaluation.text, "perplexity_second": self.config.evaluation.second}
        return {key: text for key, text in wanted.items() if text is not None}

    def _evaluation_windows(self, text: str) -> torch.Tensor:
        settings = self.config.evaluation
        tokens = texts.tokenize(texts.load_text(text), self.tokenizer)
        return texts.windows(tokens, settings.length, settings.windows, text)
