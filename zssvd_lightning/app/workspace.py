"""Texts and rows of a run: windows for calibration, for training and to judge it, and all that is measured."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zssvd_lightning.app.run_config import CalibrationConfig, EvaluationConfig, TrainingConfig
from zssvd_lightning.evaluation import perplexity as evaluation
from zssvd_lightning.evaluation import zero_shot
from zssvd_lightning.sources.texts import Tokens, hold_out, load_text, sampled_windows, windows


def calibration_windows(config: CalibrationConfig, tokens_of: Callable[[str], Tokens]) -> Tensor:
    """Return the windows (samples + correction_samples, length) of a calibration, alternating between two texts.

    Args:
        config: number and length of the windows, seed, and one or two texts.
        tokens_of: function that returns the tokens of a text source.

    Raises:
        TextError: a text cannot be read or is too short.
    """
    sources = [source for source in (config.text, config.second) if source is not None]
    return alternating_windows(
        sources, config.length, config.samples + config.correction_samples, config.seed, tokens_of
    )


def training_windows(config: TrainingConfig, sources: Sequence[str], tokens_of: Callable[[str], Tokens]) -> Tensor:
    """Return all windows (N, length) that training goes through, in random order, equally many of each text.

    Args:
        config: length of the windows and seed.
        sources: one or two texts.
        tokens_of: function that returns the tokens of a text source.

    Raises:
        TextError: a text cannot be read or is too short.
    """
    each = min(len(sampled_windows(tokens_of(source), config.length, 0, config.seed, source)) for source in sources)
    return alternating_windows(sources, config.length, each * len(sources), config.seed, tokens_of)


def alternating_windows(
    sources: Sequence[str], length: int, total: int, seed: int, tokens_of: Callable[[str], Tokens]
) -> Tensor:
    """Return windows (total, length) drawn at random, which alternate between the texts.

    Raises:
        TextError: a text cannot be read or is too short.
    """
    every = len(sources)
    counts = [len(range(turn, total, every)) for turn in range(every)]
    parts = [
        sampled_windows(tokens_of(source), length, count, seed, source)
        for source, count in zip(sources, counts, strict=True)
    ]
    drawn = torch.empty(total, length, dtype=torch.long)
    for turn, part in enumerate(parts):
        drawn[turn::every] = part
    return drawn


class HeldOut:
    """Texts of which some windows are kept back from calibration and training, to judge the training.

    Args:
        sources: one or two texts to train on; each gives an equal share of the windows.
        config: length of the windows, their number and seed.
        tokens_of: function that returns the tokens of a text source.

    Attributes:
        windows: the windows (N, length) kept back. At most every tenth window of a text is, and at least one.

    Raises:
        TextError: a text cannot be read, or has fewer than two windows.
    """

    def __init__(self, sources: Sequence[str], config: TrainingConfig, tokens_of: Callable[[str], Tokens]) -> None:
        self._tokens_of, self._rest, parts = tokens_of, {}, []
        for source in sources:
            share = -(-config.held_out // len(sources))
            held, self._rest[source] = hold_out(tokens_of(source), config.length, share, config.seed, source)
            parts.append(held)
        self.windows = torch.cat(parts)

    def tokens_of(self, source: str) -> Tokens:
        """Return the tokens of a text source without the windows kept back."""
        return self._rest[source] if source in self._rest else self._tokens_of(source)


class Measurements:
    """All that is asked to be measured of models. Texts and rows are read and checked at once.

    Args:
        config: texts and tasks.
        tokenizer: tokenizer of the models.
        tokens_of: function that returns the tokens of a text source.

    Raises:
        TextError: a text cannot be read or is too short, or word perplexity needs a token that the tokenizer lacks.
        TaskError: a task is unknown or does not load, or a row is malformed; see `load_tasks`.
    """

    def __init__(
        self, config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase, tokens_of: Callable[[str], Tokens]
    ) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._windows: dict[str, Tensor] = {}
        self._rolling: dict[str, evaluation.RollingText] = {}
        for name, text in config.texts.items():
            self._windows[name] = windows(tokens_of(text), config.length, config.windows, text)
            if config.word_perplexity:
                whole, most = load_text(text, tokenizer), config.windows * config.length
                self._rolling[text] = evaluation.RollingText.of(whole, tokenizer, most)
        self._tasks: zero_shot.Tasks | None = None
        if config.tasks:
            zero_shot.check_tokenizer(tokenizer)
            self._tasks = zero_shot.load_tasks(config.tasks, config.data, config.include)

    def __bool__(self) -> bool:
        """Return whether there is anything to measure."""
        return bool(self._windows or self._tasks)

    @property
    def predictions(self) -> int:
        """Number of predictions in the average of the first text; 0 without a text."""
        return next((cut[:, 1:].numel() for cut in self._windows.values()), 0)

    def of(self, model: PreTrainedModel, which: str, progress: bool = True) -> dict[str, Any]:
        """Measure a model on its current device.

        Args:
            model: the model.
            which: what the model is, for the progress bars.
            progress: whether to draw progress bars.

        Returns:
            The perplexities under the names of `EvaluationConfig.texts`, `word_perplexity` by text source, and
            `accuracy`, the `Scores` of the tasks. What is not asked for is left out.

        Raises:
            NonFiniteError: logits are NaN.
        """
        found: dict[str, Any] = {}
        for name, cut in self._windows.items():
            result = evaluation.perplexity(model, cut, desc=f"{name}, {which}", progress=progress)
            found[name] = result.perplexity
        for text, rolling in self._rolling.items():
            desc = f"word perplexity of {text}, {which}"
            value = evaluation.word_perplexity(model, rolling, self._config.length, desc, progress)
            found.setdefault("word_perplexity", {})[text] = value
        if self._tasks is not None:
            found["accuracy"] = zero_shot.accuracy(
                model, self._tokenizer, self._tasks, self._config.batch_size, self._config.limit
            )
        return found


def by_measure(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what was measured of each model as a report has it: by measure first, and then by model.

    Args:
        found: results of `Measurements.of`, all of the same measurements, by model.
    """
    names = next(iter(found.values()), {})
    measured: dict[str, Any] = {name: {which: each[name] for which, each in found.items()} for name in names}
    if words := measured.get("word_perplexity"):
        texts = next(iter(words.values()))
        measured["word_perplexity"] = {text: {which: each[text] for which, each in words.items()} for text in texts}
    if scores := measured.get("accuracy"):
        measured["accuracy"] = zero_shot.side_by_side(scores)
    return measured
