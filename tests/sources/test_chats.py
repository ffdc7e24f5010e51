"""Rows of text and of messages, and sources that hold neither."""

import json
import re

import pytest
from datasets import Dataset, Features, Value
from support.models import tiny_tokenizer

from zssvd_lightning.app.run_config import CalibrationConfig
from zssvd_lightning.app.workspace import calibration_windows
from zssvd_lightning.errors import ModelSourceError, TextError
from zssvd_lightning.sources import texts
from zssvd_lightning.sources.models import load_model

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}"
)
CHATS = [
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}],
    [{"role": "user", "content": "no"}],
]


def chat_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def written(folder, rows, name="chat.jsonl"):
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return str(folder / name)


def test_messages_are_read_through_the_chat_template(tmp_path):
    source = written(tmp_path, [{"messages": chat} for chat in CHATS])
    expected = "<user>hi\n<assistant>yes\n<user>no\n"
    assert texts.load_text(f"{source}#messages", chat_tokenizer()) == expected
    Dataset.from_list([{"messages": chat} for chat in CHATS]).to_parquet(tmp_path / "chat.parquet")
    assert texts.load_text(f"{tmp_path}/chat.parquet#messages", chat_tokenizer()) == expected
    tokens = texts.tokenize(expected, chat_tokenizer())
    assert len(tokens.ids) == len(expected)


@pytest.mark.parametrize(
    ("chat", "tokenizer", "message"),
    [
        (CHATS[0], None, "no tokenizer was given"),
        (CHATS[0], tiny_tokenizer, "the tokenizer of the model has none"),
        ([{"role": "system", "content": "x"}], chat_tokenizer, "row 2 of {}: no system here"),
        ([], chat_tokenizer, "row 2 of {} has a list in field 'messages'"),
        ([{"from": "user", "value": "x"}], chat_tokenizer, "not one of messages with role and content"),
        ([{"role": "user", "content": "\ud800"}], chat_tokenizer, r"row 2 of {} has '\ud800' in field 'messages'"),
        (None, chat_tokenizer, "row 2 of {} has no text field 'messages'"),
    ],
)
def test_messages_without_a_template_or_of_another_form_are_refused(tmp_path, chat, tokenizer, message):
    first = "text" if tokenizer is not chat_tokenizer else CHATS[1]
    source = written(tmp_path, [{"messages": first}, {"messages": chat}])
    with pytest.raises(TextError, match=re.escape(message.format(source))):
        texts.load_text(f"{source}#messages", tokenizer and tokenizer())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (r'{"text": "a\ud800b"}', r"row 2 of {} has '\ud800' in field 'text', which is half of a character"),
        ("[" * 100_000 + "]" * 100_000, "line 3 is no JSON: it is nested too deeply"),
        ('{"text": ' + "9" * 5000 + "}", "line 3 is no JSON"),
        ('{"text": "a"', "line 3 is no JSON"),
        ('{"text": 3}', "row 2 of {} has no text field 'text'"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "ok"}\n\n' + line)
    with pytest.raises(TextError, match=re.escape(message.format(tmp_path / "a.jsonl"))):
        texts.load_text(str(tmp_path / "a.jsonl"))


def test_a_line_separator_within_a_row_ends_no_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\u2028b\x85c"}\n{"text": "d"}\n', encoding="utf-8")
    assert texts.load_text(str(tmp_path / "a.jsonl")) == "a\u2028b\x85c\n\nd"


def test_sources_without_rows_or_name(tmp_path):
    Dataset.from_dict({"text": []}, Features({"text": Value("string")})).to_parquet(tmp_path / "empty.parquet")
    (tmp_path / "none.parquet").write_bytes(b"")
    script = tmp_path / "scripted"
    script.mkdir()
    (script / "scripted.py").write_text("raise SystemExit('run')")
    for source, message in (
        (f"{tmp_path}/empty.parquet", "cannot read .*no data"),
        (f"{tmp_path}/none.parquet", "cannot read"),
        ("package:", "names no package"),
        ("package::train", "names no package"),
        (f"datasets:{script}:train", "cannot read dataset"),
        ("datasets::train", "is not of the form"),
        (f"{tmp_path}/{'a' * 300}.txt", "a name of 304 bytes"),
        (f"{tmp_path}/a\0.txt", "NUL"),
        (str(tmp_path), "is not a file"),
    ):
        with pytest.raises(TextError, match=message):
            texts.load_text(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("package:", "names no package"),
        ("./" + "a" * 300, "300 bytes"),
        ("a\0b", "NUL"),
        ("~nobody-there/m", "possible"),
    ],
)
def test_models_by_a_name_that_cannot_be(source, message):
    with pytest.raises(ModelSourceError, match=message):
        load_model(source)


@pytest.mark.parametrize("settings", [{"samples": 2**31 - 1}, {"length": 2**31 - 1}, {"correction_samples": 2**30}])
def test_too_many_windows_are_refused_before_they_are_allocated(settings):
    config = CalibrationConfig("t", **({"samples": 4, "length": 8} | settings))
    with pytest.raises(TextError, match="4000 tokens"):
        calibration_windows(config, lambda source: texts.tokenize("abcd" * 1000, tiny_tokenizer()))


def test_windows_begin_again_after_the_last_without_copies():
    windows = texts.tokenize("abcdefgh", tiny_tokenizer()).cut(2)
    repeated = texts.TokenWindows(windows, length=10**9)
    assert len(repeated) == 10**9
    assert repeated[4]["input_ids"].tolist() == windows[0].tolist()
    assert repeated[10**9 - 1]["labels"].tolist() == windows[3].tolist()
    with pytest.raises(IndexError):
        texts.TokenWindows(windows)[4]
