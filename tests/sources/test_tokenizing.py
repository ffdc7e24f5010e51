"""Tokens of a text in pieces against those of the text as a whole."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from zssvd_lightning.sources import tokenizing
from zssvd_lightning.sources.texts import load_text
from zssvd_lightning.sources.tokenizing import token_ids

TEXT = load_text("python")[:120_000]
LETTERS = pre_tokenizers.ByteLevel.alphabet()


def byte_level(*, prefix=False):
    """As of GPT-2, Llama 3 and SmolLM2."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    return made, trainers.BpeTrainer(vocab_size=800, initial_alphabet=LETTERS, show_progress=False)


def word_pieces():
    """As of BERT."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return made, trainers.WordPieceTrainer(vocab_size=800, special_tokens=["[UNK]"], show_progress=False)


def unigrams():
    """As of T5."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return made, trainers.UnigramTrainer(
        vocab_size=400, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )


def sentence_pieces():
    """As of Llama 2: pieces of the whole text, before which there is a space."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.ByteFallback()
    return made, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False, max_token_length=16)


def trained(made, trainer):
    made.train_from_iterator(TEXT[:20_000].splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.fixture
def lengths(monkeypatch):
    """Lengths of all texts that are tokenized from here on."""
    found, ids = [], tokenizing._ids

    def noting(text, tokenizer):
        found.append(len(text))
        return ids(text, tokenizer)

    monkeypatch.setattr(tokenizing, "_ids", noting)
    return found


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        (byte_level(), False),
        (byte_level(prefix=True), False),
        (word_pieces(), False),
        (unigrams(), False),
        (sentence_pieces(), True),
    ],
    ids=["byte level", "byte level with a space", "word pieces", "unigrams", "sentence pieces"],
)
def test_tokens_in_pieces_are_those_of_the_whole_text(parts, whole, lengths):
    """A tokenizer whose tokens of a part are others than those in the text gets the text at once."""
    tokenizer = trained(*parts)
    expected = tokenizer(TEXT, add_special_tokens=False, verbose=False)["input_ids"]
    found = token_ids(TEXT, tokenizer, piece=5_000)
    assert found.dtype == torch.long
    assert found.tolist() == expected
    assert (max(lengths) == len(TEXT)) == whole
    assert whole or max(lengths) < 3 * 5_000


def test_places_where_tokens_differ_are_no_cuts():
    """Words of two parts, such as `New York`, are not cut, by a tokenizer that has a token for them."""
    made = Tokenizer(models.BPE({"a": 0, " ": 1, "b": 2, "a ": 3, "a b": 4}, [("a", " "), ("a ", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    text = "a b b a b a a b " * 400
    assert token_ids(text, tokenizer, piece=100).tolist() == tokenizer(text, verbose=False)["input_ids"]


@pytest.mark.parametrize("text", ["", "a", "word " * 10_000, "x" * 20_000, "né ß 漢字 " * 3_000, " \n\n a\n" * 5_000])
def test_unusual_texts(text):
    tokenizer = trained(*byte_level())
    expected = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert token_ids(text, tokenizer, piece=3_000).tolist() == expected
