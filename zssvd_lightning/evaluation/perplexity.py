"""Perplexity of a language model on held-out text, and a sample of generated text."""

import time
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zssvd_lightning._contexts import evaluation_mode
from zssvd_lightning._resources import counted
from zssvd_lightning.errors import NonFiniteError


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
            if mean.isnan():
                raise NonFiniteError("the logits are NaN on the evaluation text; evaluate in float32 or bfloat16")
            negative_log_likelihood.update(mean, weight=ids[:, 1:].numel())
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    return Perplexity(float(negative_log_likelihood.compute().exp()), tokens, time.perf_counter() - start)


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
