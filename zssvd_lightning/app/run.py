"""A whole run from a config: what stands before and after the compression, shared by the command line and recipes."""

from dataclasses import asdict

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from zssvd_lightning._files import check_output, replacing_folder
from zssvd_lightning.app.pictures import draw
from zssvd_lightning.app.run_config import RunConfig
from zssvd_lightning.app.workspace import calibration_windows
from zssvd_lightning.compression.report import Report, peak_rss_bytes, write_report
from zssvd_lightning.evaluation import perplexity as evaluation
from zssvd_lightning.hub.loading import from_pretrained
from zssvd_lightning.hub.model_card import write_card
from zssvd_lightning.hub.saving import write_model
from zssvd_lightning.layers.storage import EIGHT_BIT
from zssvd_lightning.serialization.specs import specs_of
from zssvd_lightning.sources import texts
from zssvd_lightning.sources.models import load_model, place


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
        self.output = check_output(config.output, config.model.source)
        torch.manual_seed(config.calibration.seed)
        self.model, self.tokenizer = load_model(config.model.source, config.model.dtype)
        place(self.model)
        self.calibration = texts.TokenWindows(calibration_windows(config.calibration, self._tokens))
        self._windows = {key: self._evaluation_windows(text) for key, text in self._evaluation_texts().items()}
        self._perplexity: dict[str, dict[str, float]] = {key: {} for key in self._windows}
        self._evaluate_seconds = 0.0

    def calibration_loader(self) -> "DataLoader[dict[str, torch.Tensor]]":
        """The windows of calibration and corrections in batches, always in the same order."""
        return DataLoader(self.calibration, batch_size=self.config.calibration.batch_size)

    def training_loader(self) -> "DataLoader[dict[str, torch.Tensor]]":
        """As many batches of `training` as it has steps, always the same; after all windows the first come again.

        Raises:
            TextError: the text cannot be read or is shorter than a window.
        """
        training = self.config.training
        source = training.text or self.config.calibration.text
        every = texts.sampled_windows(self._tokens(source), training.length, 0, training.seed, source)
        wanted = torch.arange(training.steps * training.batch_size) % len(every)
        return DataLoader(texts.TokenWindows(every[wanted]), batch_size=training.batch_size)

    def evaluate(self, which: str, model: PreTrainedModel | None = None) -> None:
        """Measures perplexity on every evaluation text, as that of the `dense` or the `compressed` model.

        Args:
            which: key in the report.
            model: another than the run's own.
        """
        model = model or self.model
        place(model)
        for key, windows in self._windows.items():
            result = evaluation.perplexity(model, windows, desc=f"{key}, {which}", progress=self.progress)
            self._perplexity[key][which] = result.perplexity
            self._evaluate_seconds += result.seconds

    def save(self, report: Report, picture: bool = False) -> None:
        """Completes `report` and writes it, the model and the tokenizer to the output folder, all or nothing.

        The model is cast to its `saved_dtype`. Where it is then another than was evaluated, as with storage in 8 bits,
        what was written is loaded again, and evaluated as `reloaded` in the type the others were.

        Args:
            report: of the compression.
            picture: whether to draw it as `report.png`, which needs matplotlib.

        Raises:
            OutputError: writing failed; what was there before is untouched.
        """
        dtype = getattr(torch, self.config.model.saved_dtype or self.config.model.dtype)
        changed = self.model.dtype != dtype or self.config.compression.storage in EIGHT_BIT
        nn.Module.to(self.model, dtype)
        report.seed = self.config.calibration.seed
        report.config = asdict(self.config)
        with replacing_folder(self.output) as folder:
            write_model(self.model, folder, self.tokenizer)
            report.file_bytes = {
                "dense": report.model_parameters_before * dtype.itemsize,
                "expected": self._expected_bytes(report, dtype.itemsize),
                "compressed": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
            }
            if changed:
                self.evaluate("reloaded", from_pretrained(folder, self.config.model.dtype))
            report.perplexity = self._perplexity.get("perplexity")
            report.perplexity_second = self._perplexity.get("perplexity_second")
            if self._windows:
                report.seconds["evaluate"] = self._evaluate_seconds
            report.peak_rss_bytes = peak_rss_bytes()
            if picture:
                draw(report, folder / "report.png")
            write_card(folder, self.output.name, specs_of(self.model), report)
            write_report(folder, report)

    def _expected_bytes(self, report: Report, size: int) -> int:
        """Bytes that the numbers kept would take, those of targets being of 16 bits where the storage is of 8."""
        others = report.model_parameters_before - report.parameters_before
        return others * size + report.parameters_after * (2 if self.config.compression.storage in EIGHT_BIT else size)

    def _evaluation_texts(self) -> dict[str, str]:
        wanted = {"perplexity": self.config.evaluation.text, "perplexity_second": self.config.evaluation.second}
        return {key: text for key, text in wanted.items() if text is not None}

    def _tokens(self, source: str) -> texts.Tokens:
        return texts.tokenize(texts.load_text(source), self.tokenizer)

    def _evaluation_windows(self, text: str) -> torch.Tensor:
        settings = self.config.evaluation
        return texts.windows(self._tokens(text), settings.length, settings.windows, text)
