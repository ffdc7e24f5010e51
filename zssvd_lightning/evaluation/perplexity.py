"""Perplexity of a language model on held-out text, and a sample of generated text."""

import logging
import re
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zssvd_lightning._contexts import evaluation_mode
from zssvd_lightning._resources import counted
from zssvd_lightning.errors import NonFiniteError, TextError

logger = logging.getLogger(__name__)


class Perplexity(NamedTuple):
    """Perplexity result, as `zssvd evaluate` prints it."""

    perplexity: float
    tokens: int
    """Number of predictions in the average."""
    seconds: float


@torch.no_grad()
def perplexity(
    model: nn.Module, windows: Tensor, batch_size: int = 1, desc: str = "perplexity", progress: bool = True
) -> Perplexity:
    """Return the exponential of the mean negative log-likelihood (nats) of all tokens but the first of each window.

    Args:
        model: causal language model that returns `logits` (B, T, V); they are scored in float32.
        windows: token ids (N, T).
        batch_size: number of windows in a batch.
        desc: label of the progress bar.
        progress: whether to draw a progress bar.

    Raises:
        NonFiniteError: the model's logits are NaN.
    """
    start = time.perf_counter()
    device = next(model.parameters()).device
    negative_log_likelihood = MeanMetric().set_dtype(torch.float64)
    with evaluation_mode(model):
        batches = torch.split(windows, batch_size)
        for batch in counted(batches, desc, len(batches), "batch", shown=progress):
            ids = batch.to(device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            mean = cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()).cpu()
            _refuse_nan(mean)
            negative_log_likelihood.update(mean, weight=ids[:, 1:].numel())
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    return Perplexity(float(negative_log_likelihood.compute().exp()), tokens, time.perf_counter() - start)


MOST_TOKENS = 50
"""Tokens of a word, on average, above which words are not what is between white space, as in Chinese."""


class RollingText(NamedTuple):
    """Text in which every token is predicted, as `word_perplexity` takes it."""

    ids: Tensor
    """Token ids (T,), without special tokens."""
    prefix: int
    """Token from which the first one is predicted."""
    words: int

    @classmethod
    def of(cls, text: str, tokenizer: PreTrainedTokenizerBase, most: int = 0) -> "RollingText":
        """Tokenize a text, and count its words as the harness does: by the white space between them.

        A text with little white space gives a warning, because its word perplexity says little.

        Args:
            text: the text.
            tokenizer: tokenizer of the model; its BOS token, or else its EOS token, is the prefix.
            most: number of tokens after which the text is cut off, perhaps within a word; 0 for the whole text.

        Raises:
            TextError: the tokenizer has neither token, or does not say where in the text it must be cut off.
        """
        prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if prefix is None:
            raise TextError("word perplexity begins with bos_token or eos_token, and the tokenizer has neither")
        if most and not tokenizer.is_fast:
            raise TextError("this tokenizer does not say where tokens end in a text; word perplexity needs windows: 0")
        found = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=most > 0)
        ids = found["input_ids"]
        if 0 < most < len(ids):
            ids, text = ids[:most], text[: found["offset_mapping"][most - 1][1]]
        words = len(re.split(r"\s+", text))
        if len(ids) > MOST_TOKENS * words:
            logger.warning(
                "the text has %d tokens, but %d words between white space, so that its word perplexity is of whole "
                "sentences or more, and may be infinite; compare models by the perplexity of tokens",
                len(ids),
                words,
            )
        return cls(torch.tensor(ids), int(prefix), words)


@torch.no_grad()
def word_perplexity(
    model: nn.Module, text: RollingText, length: int, desc: str = "word perplexity", progress: bool = True
) -> float:
    """Return `exp(-sum log p / words)` over all tokens of a text.

    This is the metric of that name of EleutherAI's lm-evaluation-harness, for the text as one document, and with
    `length` as the longest input.

    Args:
        model: causal language model that returns `logits` (B, T, V); they are scored in float32.
        text: the text.
        length: number of tokens in an input of the model.
        desc: label of the progress bar.
        progress: whether to draw a progress bar.

    Raises:
        NonFiniteError: the model's logits are NaN.
    """
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64)
    with evaluation_mode(model):
        windows = list(rolling_windows(text.ids, text.prefix, length))
        for window, predicted in counted(windows, desc, len(windows), "window", shown=progress):
            ids = window.to(device)
            logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0, -predicted:]
            total += cross_entropy(logits.float(), ids[-predicted:], reduction="sum").cpu()
            _refuse_nan(total)
    return float((total / text.words).exp())


def rolling_windows(ids: Tensor, prefix: int, length: int) -> Iterator[tuple[Tensor, int]]:
    """Yield windows of which the last tokens are predicted, and how many those are; every token is predicted once.

    A window has at most `length` + 1 tokens: an input of the model, shifted, and the last prediction. Each begins with
    the last token of the one before, and the last window with as many as fit (`get_rolling_token_windows` of the
    harness with `context_len=1`).

    Args:
        ids: token ids (T,).
        prefix: token from which the first one is predicted.
        length: number of tokens in an input of the model.
    """
    whole = torch.cat([ids.new_tensor([prefix]), ids])
    for start in range(0, len(ids), length):
        end = min(start + length, len(ids))
        yield whole[max(0, end - length) : end + 1], end - start


def _refuse_nan(negative_log_likelihood: Tensor) -> None:
    if negative_log_likelihood.isnan():
        raise NonFiniteError("the logits are NaN on the evaluation text; evaluate in float32 or bfloat16")


@torch.no_grad()
def continuation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    new_tokens: int = 32,
    repetition_penalty: float = 1.0,
) -> str:
    """Return the model's greedy continuation of `prompt`, without the prompt.

    Args:
        model: causal language model.
        tokenizer: tokenizer of the model.
        prompt: text to continue.
        new_tokens: maximum number of tokens to generate.
        repetition_penalty: divisor of the scores of tokens that were used (arXiv 1909.05858); 1 for none.
    """
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    with evaluation_mode(model):
        ids = model.generate(  # type: ignore[operator]
            **inputs, max_new_tokens=new_tokens, do_sample=False, repetition_penalty=repetition_penalty
        )
    text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(text)
