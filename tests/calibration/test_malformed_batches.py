"""Batches that cannot be calibrated on are refused by name, and leave the model as it was."""

from types import SimpleNamespace

import pytest
import torch
from support.models import CausalLM, assert_same_state, state_of, tiny_gpt2, tiny_llama, tiny_t5, token_batches
from torch import nn

from zssvd_lightning.compression.pipeline import calibrate, compress
from zssvd_lightning.errors import CalibrationError


def changed(**changes):
    """Two batches, the second of them changed."""
    first, second = token_batches(2)
    return [first, second | {key: change(second) for key, change in changes.items()}]


def refused(batches, match, model=None, error=CalibrationError, **settings):
    model = model or tiny_llama()
    before = state_of(model)
    with pytest.raises(error, match=match):
        compress(model, batches, prune_ratio=0.3, corrections=0, progress=False, **settings)
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        (
            changed(input_ids=lambda b: b["input_ids"] + 90),
            "batch 2: input_ids go from .* embedding has 97: from 0 to 96",
        ),
        (changed(input_ids=lambda b: b["input_ids"] - 9), "batch 2: input_ids go from -"),
        (changed(input_ids=lambda b: b["input_ids"].float()), "batch 2: input_ids .* torch.float32, not torch.long"),
        (changed(labels=lambda b: b["labels"] + 90), "batch 2: labels go from .* loss has 97"),
        (changed(labels=lambda b: b["labels"].masked_fill(b["labels"] > 50, -1)), "batch 2: labels go from -1"),
        (
            changed(attention_mask=lambda b: torch.ones(4, 9).long()),
            r"batch 2: attention_mask is \(4, 9\), but input_ids",
        ),
        ([*token_batches(1), tuple(token_batches(1)[0].values())], "batch 2 is a tuple, .* say what the loss"),
        ([*token_batches(1), None], "batch 2 is a NoneType"),
        ([token_batches(1)[0] | {"labels": None}], "CausalLMOutputWithPast without a loss for a batch of input_ids"),
    ],
)
def test_batches_that_no_model_takes_are_refused_by_number(batches, match):
    refused(batches, match)


def test_batches_at_hand_are_refused_before_any_is_run():
    model, ran = tiny_llama(), []
    model.register_forward_pre_hook(lambda module, args: ran.append(1))
    refused([*token_batches(3), (1, 2)], "batch 4 is a tuple", model)
    assert not ran


def test_float_labels_of_classes_are_refused():
    batches = changed(labels=lambda b: b["labels"].float())
    refused(batches, "labels of shape .* torch.float32|labels are torch.float32|batch 2: the labels", tiny_gpt2())


def test_a_batch_in_the_keywords_of_no_model_is_refused():
    refused([{"x": torch.ones(4, 8), "y": torch.ones(4)}], "Sequential cannot be called with .* of x, y", mlp())


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def vectors(count=4):
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 8, generator=g), torch.randint(4, (16,), generator=g)) for _ in range(count)]


def classes(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_a_complex_loss_is_refused():
    refused(vectors(), "real scalar loss .* got torch.complex64", mlp(), loss=lambda m, b: classes(m, b) * 1j)


def test_a_loss_of_second_order_is_refused():
    def penalized(model, batch):
        x = batch[0].clone().requires_grad_()
        loss = classes(model, (x, batch[1]))
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + slope.square().sum()

    refused(vectors(), "batch 1: the loss takes derivatives of its own", mlp(), loss=penalized)


def test_derivatives_that_a_loss_takes_beforehand_are_not_counted():
    def perturbed(model, batch):
        x = batch[0].clone().requires_grad_()
        torch.autograd.grad(classes(model, (x, batch[1])), x)
        return classes(model, batch)

    model, settings = mlp(), {"metric": "two_sided", "progress": False}
    plain = calibrate(model, vectors(), loss=classes, **settings)
    found = calibrate(model, vectors(), loss=perturbed, **settings)
    for name, total in plain.output_sums.items():
        torch.testing.assert_close(found.output_sums[name], total)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, IndexError])
def test_errors_of_the_loss_itself_pass_through(error):
    def loss(model, batch):
        raise error("of the user")

    refused(vectors(), "of the user", mlp(), error, loss=loss)


def test_a_lightning_module_is_refused_with_what_works_instead():
    module = CausalLM()
    refused(token_batches(), "CausalLM is a LightningModule.*ZSSVDCallback.*training_step", module)

    def loss(module, batch):
        return module.training_step(batch, 0)

    report = compress(module, token_batches(), prune_ratio=0.3, corrections=0, progress=False, loss=loss)
    assert report.reached >= 0.3


def test_a_model_may_return_its_loss_in_a_dictionary():
    class Own(nn.Module):
        def __init__(self, gives):
            super().__init__()
            self.net, self.gives = mlp(), gives

        def forward(self, x, labels):
            return self.gives(loss=classes(self.net, (x, labels)))

    batches = [{"x": x, "labels": y} for x, y in vectors()]
    for gives in (dict, SimpleNamespace):
        report = compress(Own(gives), batches, prune_ratio=0.1, corrections=0, progress=False)
        assert report.reached >= 0.1


def test_labels_of_an_encoder_decoder_out_of_range_are_refused():
    batches = changed(labels=lambda b: b["labels"] + 90)
    refused(batches, "batch 2: input_ids go from .* 97", tiny_t5())
