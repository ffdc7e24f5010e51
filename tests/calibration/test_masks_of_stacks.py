"""Models of several stacks: padded batches give the statistics of the same sequences, alone and without padding."""

from copy import deepcopy

import pytest
import torch
from support.models import VOCABULARY, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    CLIPConfig,
    CLIPModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    MarianConfig,
    MarianMTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from zssvd_lightning.calibration.padding import ends_in_padding
from zssvd_lightning.calibration.recorded_calls import Call
from zssvd_lightning.compression.pipeline import calibrate, compress
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.correction.paired_forward import run_side_by_side
from zssvd_lightning.errors import CalibrationError
from zssvd_lightning.model.targets import find_targets

LENGTHS = [(16, 16), (11, 5), (4, 13), (7, 2)]
"""Lengths of inputs and targets in one batch: both are padded to 16."""

SMALL = {"vocab_size": VOCABULARY, "d_model": 32, "max_position_embeddings": 40}
LAYERS = {
    f"{side}_{what}": n
    for side in ("encoder", "decoder")
    for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
}
TOKENS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
}
OF_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}


def tiny_bart():
    return BartForConditionalGeneration(BartConfig(**SMALL, **LAYERS, **TOKENS))


def tiny_marian():
    tokens = TOKENS | {"pad_token_id": VOCABULARY - 1}
    return MarianMTModel(MarianConfig(**SMALL, **LAYERS, **tokens))


def tiny_bert_to_bert(width=32):
    decoder = BertConfig(**OF_BERT | {"hidden_size": width}, is_decoder=True, add_cross_attention=True)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**OF_BERT), decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return EncoderDecoderModel(config)


def tiny_whisper():
    heard = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 40}
    config = {key: value for key, value in SMALL.items() if key != "max_position_embeddings"}
    suppressed = {"suppress_tokens": None, "begin_suppress_tokens": None}
    return WhisperForConditionalGeneration(WhisperConfig(**config, **heard, **LAYERS, **TOKENS, **suppressed))


def tiny_clip():
    text = OF_BERT | {"max_position_embeddings": 17, "eos_token_id": VOCABULARY - 1}
    seen = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "intermediate_size": 48}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=seen | layers, projection_dim=16))


def of_text(generator):
    """A batch of inputs and targets padded to one width, whose padding would tell."""
    batch = {
        "input_ids": torch.randint(3, VOCABULARY - 1, (4, 16), generator=generator),
        "attention_mask": torch.ones(4, 16, dtype=torch.long),
        "labels": torch.randint(3, VOCABULARY - 1, (4, 16), generator=generator),
    }
    for row, (inputs, targets) in enumerate(LENGTHS):
        batch["attention_mask"][row, inputs:] = 0
        batch["labels"][row, targets:] = -100
    return batch


def of_sound(generator):
    batch = of_text(generator)
    return {"input_features": torch.randn(4, 8, 32, generator=generator), "labels": batch["labels"]}


def of_pictures(generator):
    """As many image tokens as text tokens."""
    batch = of_text(generator)
    ids, mask = (nn.functional.pad(batch[key], (0, 1)) for key in ("input_ids", "attention_mask"))
    for row, (inputs, _) in enumerate(LENGTHS):
        ids[row, inputs], mask[row, inputs] = VOCABULARY - 1, 1
    pictures = torch.randn(4, 3, 16, 16, generator=generator).double()
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pictures}


def alone(batch, row):
    """A row of a batch without its padding."""
    inputs, targets = LENGTHS[row]
    wanted = {"input_ids": inputs, "attention_mask": inputs, "labels": targets, "decoder_attention_mask": targets}
    if "pixel_values" in batch:
        wanted = {"input_ids": inputs + 1, "attention_mask": inputs + 1}
    return {key: value[row : row + 1, : wanted.get(key)] for key, value in batch.items()}


def agreement(model, batch):
    """Sum of a function of each pair of text and image, as a mean over the pairs."""
    out = model(**batch)
    return (out.text_embeds * out.image_embeds).sum(-1).exp().mean()


def moments_of(model, batches, **settings):
    poolers = ["*pooler*"] if any("pooler" in name for name, _ in model.named_modules()) else None
    config = CompressionConfig(metric="two_sided", ignore=poolers)
    return calibrate(model, batches, config, progress=False, **settings)


def assert_same(padded, unpadded, tolerance):
    assert padded.tokens == unpadded.tokens
    assert padded.loss_terms == unpadded.loss_terms
    for name in padded.leaders:
        for statistic in ("second_moment", "output_moment", "mean_gradient"):
            one, other = getattr(padded, statistic)(name), getattr(unpadded, statistic)(name)
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance * float(other.abs().max()))


CASES = {
    "t5": (tiny_t5, of_text, {}),
    "bart": (tiny_bart, of_text, {}),
    "marian": (tiny_marian, of_text, {}),
    "bert to bert": (tiny_bert_to_bert, of_text, {}),
    "bert to wider bert": (lambda: tiny_bert_to_bert(48), of_text, {}),
    "whisper": (tiny_whisper, of_sound, {}),
    "clip": (tiny_clip, of_pictures, {"loss": agreement, "terms": lambda batch: len(batch["input_ids"])}),
}


@pytest.mark.parametrize("with_decoder_mask", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_each_stack_goes_by_its_own_mask(case, with_decoder_mask):
    build, made, settings = CASES[case]
    batch = made(torch.Generator().manual_seed(0))
    if with_decoder_mask:
        if case in {"whisper", "clip"}:
            pytest.skip("takes none")
        batch["decoder_attention_mask"] = (batch["labels"] != -100).long()
    model = build().double()
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    padded = moments_of(model, [batch], **settings)
    unpadded = moments_of(model, [alone(batch, row) for row in range(4)], **settings)
    assert_same(padded, unpadded, 1e-5 if case == "t5" else 1e-9)  # norms of T5 are of float32


def ranks(model, batches, **settings):
    report = compress(model, batches, prune_ratio=0.3, corrections=0, progress=False, ignore=["lm_head"], **settings)
    return {name: layer.rank for name, layer in report.layers.items()}


@pytest.mark.parametrize("build", [tiny_t5, tiny_bart])
def test_padding_changes_no_rank(build):
    model = build().double()
    batch = of_text(torch.Generator().manual_seed(1))
    expected = ranks(deepcopy(model), [alone(batch, row) for row in range(4)])
    assert ranks(model, [batch]) == expected


def test_checkpointed_activations_go_by_the_same_masks():
    batch = of_text(torch.Generator().manual_seed(0))
    model = tiny_bart().double()
    plain = moments_of(model, [batch])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert_same(moments_of(model, [batch]), plain, 1e-12)


class ByHand(nn.Module):
    """Stacks called one by one, with masks of any names in the batch."""

    def __init__(self):
        super().__init__()
        self.encoder = tiny_bert().bert
        self.decoder = tiny_bert_to_bert().decoder

    def forward(self, batch):
        source, mask, target = batch
        states = self.encoder(input_ids=source, attention_mask=mask).last_hidden_state
        counts = target != -100
        out = self.decoder(
            input_ids=target.clamp(min=0),
            attention_mask=counts.long(),
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
        )
        return nn.functional.cross_entropy(out.logits.transpose(1, 2), target)


def test_stacks_that_are_called_by_hand_go_by_their_calls():
    batch = of_text(torch.Generator().manual_seed(0))
    keys = ("input_ids", "attention_mask", "labels")
    model = ByHand().double()
    settings = {
        "loss": lambda model, batch: model(batch),
        "terms": lambda batch: int((batch[2] != -100).sum()),
    }
    padded = moments_of(model, [tuple(batch[key] for key in keys)], **settings)
    rows = [tuple(alone(batch, row)[key] for key in keys) for row in range(4)]
    assert_same(padded, moments_of(model, rows, **settings), 1e-9)


def nested_loss(model, batch):
    return model(**batch["inputs"], labels=batch["labels"]).loss


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_t5])
def test_nested_batches_count_as_flat_ones(build):
    batch = of_text(torch.Generator().manual_seed(0))
    if build is not tiny_t5:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    shorter = {key: value[:2, :9].contiguous() for key, value in batch.items()}
    model = build().double()
    flat = moments_of(model, [batch, shorter])
    nested = [
        {"inputs": {k: v for k, v in b.items() if k != "labels"}, "labels": b["labels"]} for b in (batch, shorter)
    ]
    assert_same(moments_of(model, nested, loss=nested_loss), flat, 1e-12)


def test_a_mask_that_is_asked_for_comes_before_that_of_the_call():
    batch = of_text(torch.Generator().manual_seed(0))
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model, answers = tiny_llama(), batch["attention_mask"].bool() & (torch.arange(16) > 2)
    moments = moments_of(model, [batch], mask=lambda batch: answers)
    assert set(moments.tokens.values()) == {int(answers.sum())}
    moments = moments_of(model, [batch], mask=lambda batch: None)
    assert set(moments.tokens.values()) == {int(batch["attention_mask"].sum())}


def test_a_mask_of_another_kind_is_refused():
    batch = of_text(torch.Generator().manual_seed(0))
    with pytest.raises(CalibrationError, match=r"must be a tensor \(B, T\), but it is \(4,\)"):
        moments_of(tiny_llama(), [batch], mask=lambda batch: torch.ones(4))


@pytest.mark.parametrize("build", [tiny_t5, tiny_bart])
def test_refits_go_by_the_masks_of_the_stacks(build):
    batch = of_text(torch.Generator().manual_seed(1))
    model, call = build().double().eval(), Call((), batch, batch["attention_mask"].bool())
    layers, met = find_targets(model), {}
    originals = {name: target.weight.detach().clone() for name, target in layers.items()}
    run_side_by_side(
        model, call, layers, originals, lambda name, dense, truncated: met.update({name: (dense, truncated)})
    )
    moments = moments_of(model, [batch])
    for name, (dense, truncated) in met.items():
        assert len(dense) == len(truncated) == moments.tokens[moments.leaders[name]], name
        torch.testing.assert_close(dense, truncated)


def said_of_decoders(caplog, build, batch):
    """The warnings of a calibration whose loss is computed outside of the model."""
    torch.manual_seed(0)

    def loss(model, batch):
        return model(**batch, use_cache=False).logits.square().mean()

    caplog.clear()
    settings = {"ignore": "*pooler*"} if build is tiny_bert_to_bert else {}
    terms = lambda batch: len(batch["input_ids"])  # noqa: E731
    calibrate(build(), [batch, batch], preset="zs-svd", progress=False, loss=loss, terms=terms, **settings)
    return [record.getMessage() for record in caplog.records if "seem padded" in record.getMessage()]


@pytest.mark.parametrize("build", [tiny_t5, tiny_bart, tiny_bert_to_bert])
def test_a_padded_decoder_without_mask_and_labels_is_told_once(caplog, build):
    pad = build().config.pad_token_id
    ids = torch.arange(3, 67).reshape(4, 16)
    mask = torch.ones_like(ids)
    padded, hidden = ids.clone(), mask.clone()
    for row, length in enumerate((16, 9, 12, 15)):
        padded[row, length:], hidden[row, length:] = pad, 0
    batch = {"input_ids": padded, "attention_mask": hidden, "decoder_input_ids": padded}
    (message,) = said_of_decoders(caplog, build, batch)
    assert "give the model decoder_attention_mask, or labels" in message
    for harmless in (
        batch | {"decoder_attention_mask": hidden},
        batch | {"labels": padded.masked_fill(hidden == 0, -100)},
        batch | {"decoder_input_ids": ids},
    ):
        assert not said_of_decoders(caplog, build, harmless)


def test_padding_is_told_from_ends_of_sequences():
    rows = [[5, 6, 7, 2], [5, 6, 2, 2], [5, 2, 2, 2]]
    assert ends_in_padding(torch.tensor(rows), 2)
    assert ends_in_padding(torch.tensor(rows), None)
    assert not ends_in_padding(torch.tensor(rows), 0)
    assert not ends_in_padding(torch.tensor(rows[:1] * 3), 2)
    assert not ends_in_padding(torch.tensor(rows[1:2] * 3), 2)
    assert not ends_in_padding(torch.rand(3, 4), 2)
