"""The number of loss terms is compared with the loss of parts of a batch."""

import logging

import pytest
import torch
from support.models import (
    image_batches,
    padded_batches,
    sequence_pairs,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    tiny_vit,
    token_batches,
)
from torch import nn

from zssvd_lightning.calibration.terms import check_terms, doubt, joined_rows, parts_of
from zssvd_lightning.compression.pipeline import calibrate, compress, plan
from zssvd_lightning.distributed import Team


def warnings_of(caplog, model, batches, way=compress, **settings):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="zssvd_lightning"):
        way(model, batches, prune_ratio=0.2, corrections=0, progress=False, **settings)
    return [record.getMessage() for record in caplog.records if "weighted wrongly" in record.getMessage()]


def token_loss(reduction):
    def loss(model, batch):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction=reduction
        )

    return loss


def in_other_words(batch):
    """The same batch, without the key `labels`."""
    return {"ids": batch["input_ids"], "mask": batch["attention_mask"], "targets": batch["labels"][:, 1:]}


def in_other_words_loss(model, batch):
    logits = model(batch["ids"], attention_mask=batch["mask"]).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())


def test_a_sum_is_told_from_a_mean(caplog):
    (message,) = warnings_of(caplog, tiny_llama(), padded_batches(), loss=token_loss("sum"))
    assert "is a sum over its terms, not a mean" in message
    assert "terms of compress, loss_terms of the callback" in message
    assert not warnings_of(caplog, tiny_llama(), padded_batches(), loss=token_loss("mean"))
    assert not warnings_of(caplog, tiny_llama(), padded_batches(), loss=token_loss("sum"), terms=lambda batch: 1)


def test_tokens_that_are_counted_as_rows_are_told(caplog):
    batches = [in_other_words(batch) for batch in padded_batches()]
    (message,) = warnings_of(caplog, tiny_llama(initializer_range=0.5), batches, loss=in_other_words_loss)
    assert "entries of targets" in message

    def terms(batch):
        return int((batch["targets"] != -100).sum())

    assert not warnings_of(caplog, tiny_llama(initializer_range=0.5), batches, loss=in_other_words_loss, terms=terms)


@pytest.mark.parametrize(
    ("build", "batches"),
    [
        (tiny_llama, padded_batches),
        (tiny_llama, token_batches),
        (tiny_gpt2, padded_batches),
        (tiny_bert, token_batches),
        (tiny_vit, image_batches),
        (tiny_t5, sequence_pairs),
    ],
)
def test_ordinary_use_is_not_doubted(caplog, build, batches):
    given = batches()
    if build is tiny_bert:
        for batch in given:
            batch["labels"][:, 0] = -100
    assert not warnings_of(caplog, build(), given)


def contrastive(count):
    def measure(batch):
        scores = batch["a"] @ batch["b"].T
        return float(nn.functional.cross_entropy(scores, torch.arange(len(scores)))), float(len(scores))

    return measure, {"a": torch.randn(count, 8), "b": torch.randn(count, 8)}


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_losses_that_go_by_no_number_are_not_doubted(count):
    torch.manual_seed(0)
    for scale in (0.0, 1.0):
        measure, batch = contrastive(count)
        batch["a"] *= scale
        assert doubt(measure, batch, parts_of(batch)) is None


@pytest.mark.parametrize(
    "batch", [torch.ones(1, 3), {"x": torch.ones(4), "y": torch.ones(3)}, {"x": torch.tensor(1.0)}, {}]
)
def test_batches_without_rows_alike_are_not_cut(batch):
    assert parts_of(batch) == []


@pytest.mark.parametrize("way", [calibrate, plan, compress])
def test_calibration_and_plans_are_checked_too(caplog, way):
    assert warnings_of(caplog, tiny_llama(), padded_batches(), way=way, loss=token_loss("sum"))
    assert not warnings_of(caplog, tiny_llama(), padded_batches(), way=way)


def in_single_rows(batches, length=None):
    """The rows of batches, each a batch; without padding if a length is given, the same or one for each row."""
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for batch in batches for i in range(len(batch["input_ids"]))]
    return rows if length is None else [{k: v[:, : length(i)] for k, v in row.items()} for i, row in enumerate(rows)]


@pytest.mark.parametrize("length", [None, lambda i: 12, lambda i: 6 + i % 9])
def test_batches_of_one_row_are_joined(caplog, length):
    batches = in_single_rows(padded_batches() if length is None else token_batches(), length)
    loss = token_loss("mean") if length is None else None
    for row in batches:
        row.setdefault("attention_mask", torch.ones_like(row["input_ids"]))
    assert warnings_of(caplog, tiny_llama(), batches, loss=token_loss("sum"))
    assert not warnings_of(caplog, tiny_llama(), batches, loss=loss or token_loss("mean"))


def test_rows_counted_alike_are_doubted_only_if_their_labels_are_not(caplog):
    same = in_single_rows(token_batches(), lambda i: 12)
    assert not warnings_of(caplog, tiny_llama(), same, terms=lambda batch: 1)
    padded = in_single_rows(padded_batches())
    assert warnings_of(caplog, tiny_llama(initializer_range=0.5), padded, terms=lambda batch: 1)


def test_one_batch_of_one_row_is_joined_to_itself():
    batch = {"x": torch.arange(3.0)[None], "names": ["a"], "flag": True}
    whole, ((one, other),) = joined_rows([batch])
    assert one is other is batch
    assert torch.equal(whole["x"], torch.tensor([[0.0, 1, 2], [0, 1, 2]]))
    measure = lambda batch: (float(batch["x"].square().sum()), float(len(batch["x"])))  # noqa: E731
    assert doubt(measure, whole, [(one, other)], joined=True) == "a sum over its terms, not a mean"


def test_a_batch_with_a_number_beside_its_tensors_is_not_cut():
    assert parts_of({"x": torch.ones(4, 2), "flag": True})
    assert not parts_of({"x": torch.ones(4, 2), "tokens": 8})
    assert joined_rows([{"x": torch.ones(1, 2), "tokens": 2}]) == (None, [])


def test_batches_that_cannot_be_cut_are_said(caplog):
    with caplog.at_level(logging.INFO, logger="zssvd_lightning"):
        check_terms(lambda batch: (1.0, 1.0), [{"x": torch.ones(4), "y": torch.ones(3)}], Team())
    assert "no calibration batch can be cut by its rows" in caplog.text


def test_losses_that_need_whole_batches_are_not_doubted(caplog):
    def whole(model, batch):
        if len(batch["input_ids"]) != 4:
            raise ValueError("four rows")
        return token_loss("mean")(model, batch)

    assert not warnings_of(caplog, tiny_llama(), padded_batches(), loss=whole)
