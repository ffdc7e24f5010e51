import math

import pytest
import torch
from support.models import VOCABULARY, tiny_llama, tiny_tokenizer

from zssvd_lightning.errors import NonFiniteError
from zssvd_lightning.evaluation.perplexity import continuation, perplexity


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


def test_continuation_is_greedy():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    text = continuation(model, tokenizer, "abc", new_tokens=4)
    ids = tokenizer("abc", return_tensors="pt").input_ids
    for _ in range(4):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert text == tokenizer.decode(ids[0, 3:], skip_special_tokens=True)
