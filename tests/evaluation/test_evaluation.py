import math

import pytest
import torch
from support.models import VOCABULARY, tiny_llama, tiny_tokenizer

from zssvd_lightning.errors import NonFiniteError, TextError
from zssvd_lightning.evaluation.perplexity import (
    RollingText,
    continuation,
    perplexity,
    rolling_windows,
    word_perplexity,
)


def test_perplexity_is_the_exponential_of_the_mean_over_all_predictions():
    model, windows = tiny_llama().train(), torch.randint(0, VOCABULARY, (5, 12))
    result = perplexity(model, windows, batch_size=2, progress=False)
    model.eval()
    negative = []
    for ids in windows:
        with torch.no_grad():
            log_p = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        negative += [-log_p[t, ids[t + 1]].item() for t in range(11)]
    assert result.perplexity == pytest.approx(math.exp(sum(negative) / 55), rel=1e-5)
    assert result.tokens == 55


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity():
    model = tiny_llama()
    for p in model.parameters():
        p.data.zero_()
    assert perplexity(model, torch.randint(0, VOCABULARY, (2, 9)), progress=False).perplexity == pytest.approx(
        VOCABULARY
    )


def test_half_precision_logits_are_scored_in_float32_and_mode_is_restored():
    model = tiny_llama().half().train()
    model.model.embed_tokens.weight.data.mul_(200)
    result = perplexity(model, torch.randint(0, VOCABULARY, (2, 9)), progress=False)
    assert math.isfinite(result.perplexity)
    assert all(m.training for m in model.modules())


def test_nan_is_an_error():
    model = tiny_llama()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="NaN"):
        perplexity(model, torch.randint(0, VOCABULARY, (2, 9)), progress=False)
    with pytest.raises(NonFiniteError, match="NaN"):
        word_perplexity(model, RollingText(torch.arange(9), 0, 3), 8, progress=False)


@pytest.mark.parametrize("length", [1, 3, 4, 20])
def test_rolling_windows_are_those_of_the_harness(length):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for size in range(14):
        ids = torch.randint(0, VOCABULARY, (size,))
        found = [(window.tolist(), predicted) for window, predicted in rolling_windows(ids, 99, length)]
        theirs = map(make_disjoint_window, get_rolling_token_windows(ids.tolist(), 99, length, 1))
        assert found == [(context + predicted, len(predicted)) for context, predicted in theirs]
        assert sum(predicted for _, predicted in found) == size


TEXT = " To be,  or\nnot to be: that is the question. "


@pytest.mark.parametrize(("length", "most"), [(16, 0), (16, 32), (64, 0), (16, 1000)])
@torch.no_grad()
def test_word_perplexity_is_that_of_the_harness(length, most):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = tiny_llama().train(), tiny_tokenizer()
    with pytest.raises(TextError, match="neither"):
        RollingText.of(TEXT, tokenizer)
    tokenizer.eos_token = "<unk>"
    rolling = RollingText.of(TEXT, tokenizer, most)
    read = TEXT[:most] if most else TEXT
    assert rolling.words == (10 if most == 32 else 12)
    result = word_perplexity(model, rolling, length, progress=False)
    assert model.training
    harness = HFLM(pretrained=model, tokenizer=tokenizer, max_length=length, batch_size=2)
    (log_likelihood,) = harness.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (read,), 0)], disable_tqdm=True
    )
    assert result == pytest.approx(math.exp(-log_likelihood / rolling.words), rel=1e-5)


def test_a_text_without_white_space_is_measured_with_a_warning(caplog):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<unk>"
    RollingText.of("a" * 90 + " b", tokenizer)
    assert not caplog.messages
    rolling = RollingText.of("a" * 120 + " b", tokenizer)
    (said,) = caplog.messages
    assert said.startswith(f"the text has {len(rolling.ids)} tokens, but 2 words between white space")
    assert rolling.words == 2
    assert word_perplexity(tiny_llama(), rolling, 16, progress=False) > 1e50


def test_continuation_is_greedy():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    text = continuation(model, tokenizer, "abc", new_tokens=4)
    ids = tokenizer("abc", return_tensors="pt").input_ids
    for _ in range(4):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert text == tokenizer.decode(ids[0, 3:], skip_special_tokens=True)
