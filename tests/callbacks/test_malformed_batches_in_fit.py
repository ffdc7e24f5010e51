"""What batches of a fit are refused for, and how those of several stacks count."""

from copy import deepcopy

import lightning as L
import pytest
import torch
from support.callbacks import Keeps, short
from support.models import (
    CausalLM,
    assert_same_state,
    loader,
    padded_batches,
    state_of,
    tiny_llama,
    tiny_t5,
    token_batches,
    trainer,
)
from torch.utils.data import DataLoader

from zssvd_lightning import LowRankPrehab
from zssvd_lightning.errors import CalibrationError


def refused(batches, match, module=None, error=CalibrationError, **settings):
    module = module or CausalLM()
    before = state_of(module)
    with pytest.raises(error, match=match):
        trainer(short(corrections=0, **settings)).fit(module, batches)
    assert_same_state(before, state_of(module))


def test_batches_that_are_none_are_refused_at_once():
    refused(DataLoader([None] * 3, batch_size=None, collate_fn=lambda batch: batch), "batch 0 of epoch 0 is None")


def test_ids_out_of_range_are_refused_by_number():
    batches = token_batches()
    batches[1]["input_ids"] += 90
    refused(loader(batches), "batch 2: input_ids go from .* 97")


def test_masks_of_another_shape_are_refused_by_number():
    batches = token_batches()
    batches[1]["attention_mask"] = batches[1]["attention_mask"][:, :9]
    refused(loader(batches), r"batch 2: attention_mask is \(4, 9\)")


class Fails(CausalLM):
    def training_step(self, batch, batch_idx):
        raise IndexError("of the user")


def test_errors_of_the_training_step_itself_pass_through():
    refused(loader(token_batches()), "of the user", Fails(), IndexError)


class ByHand(CausalLM):
    """Calls its model with a mask that the batch does not hold under a name."""

    def training_step(self, batch, batch_idx):
        ids, mask, labels = batch
        return self.model(input_ids=ids, attention_mask=mask, labels=labels).loss


class CountsLabels(Keeps):
    def loss_terms(self, batch):
        return int((batch[2][:, 1:] != -100).sum())


def statistics(module, batches, kind=Keeps):
    torch.manual_seed(0)
    callback = kind(0.3, corrections=0, metric="two_sided", progress=False)
    trainer(callback, max_epochs=2).fit(module, loader(batches))
    return callback.kept


def assert_same(one, other):
    assert one.tokens == other.tokens
    assert one.loss_terms == other.loss_terms
    for name in one.gradient_sums:
        for statistic in ("second_moment", "output_moment", "mean_gradient"):
            found, expected = getattr(one, statistic)(name), getattr(other, statistic)(name)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_padding_is_known_from_the_call_of_the_model():
    model, batches = tiny_llama(), padded_batches()
    expected = statistics(CausalLM(deepcopy(model)), batches)
    tuples = [(batch["input_ids"], batch["attention_mask"], batch["labels"]) for batch in batches]
    assert_same(statistics(ByHand(model), tuples, CountsLabels), expected)


def test_an_encoder_decoder_in_a_fit_counts_as_its_sequences_alone():
    model, batches = tiny_t5(), padded_batches(2)
    alone = []
    for batch in batches:
        for row in range(4):
            length = int(batch["attention_mask"][row].sum())
            alone.append({key: value[row : row + 1, :length].contiguous() for key, value in batch.items()})
    expected = statistics(CausalLM(deepcopy(model)), alone)
    assert_same(statistics(CausalLM(model), batches), expected)


def test_prehab_goes_by_the_masks_of_the_stacks():
    batches = padded_batches(2)
    module, prehab, seen = CausalLM(tiny_t5()), LowRankPrehab(2, moment_batches=2), {}

    class Looks(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if prehab._run.gathering is not None:
                seen.update(prehab._run.gathering.moments.tokens)

    trainer(Looks(), prehab, max_epochs=3).fit(module, loader(batches))
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert set(seen.values()) == {tokens}
