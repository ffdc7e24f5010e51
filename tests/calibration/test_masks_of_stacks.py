"""Models of several stacks: padded batches give the statistics of the same sequences, one by one and without padding."""

import pytest
import torch
from support.models import VOCABULARY, sequence_pairs, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
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

from zssvd_lightning.compression.pipeline import calibrate, compress
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.errors import CalibrationError

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
    config = CompressionConfig(metric="two_sided", ignore=["*pooler*"])
    return calibrate(model, batches, config, progress=False, **settings)


def assert_same(padded, unpadded, names):
    assert padded.tokens == unpadded.tokens
    assert padded.loss_terms == unpadded.loss_terms
    for name in names:
        torch.testing.assert_close(padded.second_moment(name), unpadded.second_moment(name), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(padded.output_moment(name), unpadded.output_moment(name), rtol=1e-8, atol=1e-13)
        torch.testing.assert_close(padded.mean_gradient(name), unpadded.mean_gradient(name), rtol=1e-8, atol=1e-12)


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
    assert_same(padded, unpadded, padded.leaders)
