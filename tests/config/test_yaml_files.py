"""Files that are no settings: each is refused with the file, and with the line if there is one."""

import re

import pytest

from zssvd_lightning import RunConfig, load_config
from zssvd_lightning.errors import ConfigError, PlanError
from zssvd_lightning.selection.budget import Budget
from zssvd_lightning.selection.plan import Plan

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)
LADDER = "b0: &b0 [x]\n" + "".join(f"b{i}: &b{i} [*b{i - 1}]\n" for i in range(1, 200))
FAULTS = {
    "latin-1": ("output: o\nmodel: {source: caf\xe9}\n".encode("latin-1"), "line 2: byte 0xe9 is not UTF-8"),
    "utf-16": ("output: o\n".encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
    "binary": (bytes(range(128)) * 8, "line 1: character '\\x00' is not allowed"),
    "null key": ("output: o\nnull: 3\n", "line 2: the key 'null' is not text"),
    "number as key": ("output: o\nmodel: {1: 3}\n", "line 2: the key '1' is not text"),
    "list as key": ("? [a]\n: 3\n", "line 1: the key is a collection and is not text"),
    "broken reference": ("model: m\n\noutput: '${'\n", "line 3: the reference '${' is not of the form ${key}"),
    "unknown reference": ("output: ${nowhere}\n", "output cannot be used: Interpolation key 'nowhere' not found"),
    "reference to itself": ("output: ${output}\n", "output cannot be used"),
    "deep": ("output: o\nmodel: " + "[" * 1000 + "]" * 1000, "line 2: it is nested deeper than 50 levels"),
    "deep and open": ("model: " + "{a: " * 5000, "line 1: it is nested deeper than 50 levels"),
    "deep by aliases": (LADDER, "with its aliases, it is nested deeper than 50"),
    "digits": ("output: o\ncalibration:\n  seed: " + "9" * 5000, "line 3: a whole number of 5,000 digits is too large"),
    "bomb": (BOMB, "its aliases stand for more than 1,000,000 values"),
    "circle": ("model: &m\n  source: *m\n", "line 1: an alias refers to the collection that it is in"),
    "tag": ("output: o\nmodel: !!int abc\n", "line 2: the tag 'tag:yaml.org,2002:int' is not supported"),
    "object": ("output: !!python/object/apply:os.system [ls]\n", "line 1: the tag"),
    "two documents": ("output: o\n---\noutput: p\n", "line 2: but found another document"),
    "twice": ("output: o\noutput: p\n", "line 2: the key 'output' is there twice"),
    "text": ("just text", "must hold a mapping"),
    "list": ("- 1\n", "must hold a mapping"),
    "unclosed": ("output: o\nmodel: [", "line 2: "),
    "tab": ("output: o\n\tmodel: m", "line 2: "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_no_config(tmp_path, fault):
    content, message = FAULTS[fault]
    file = tmp_path / "c.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        load_config(RunConfig, file)
    assert str(file) in str(raised.value) or "reference" in fault


@pytest.mark.parametrize(
    "fault", sorted(FAULTS.keys() - {"broken reference", "unknown reference", "reference to itself"})
)
def test_a_file_that_is_no_plan(tmp_path, fault):
    content, _ = FAULTS[fault]
    file = tmp_path / "plan.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PlanError, match=re.escape(str(file))):
        Plan.read(file, Budget({"a": (8, 8)}, 0.2))


def test_paths_that_no_file_can_have(tmp_path):
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path, "is no file"),
        (tmp_path / ("a" * 300), "a name of 300 bytes"),
        (f"{tmp_path}/a\0b", "NUL"),
        ("~nobody-of-that-name/c.yaml", "is not possible"),
        (tmp_path / "file" / "c.yaml", "leads through"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(RunConfig, path)


def test_what_yaml_allows_is_read(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes(
        b"\xef\xbb\xbfmodel: &m {source: 'm', dtype: float64}\ncalibration: {text: !!str 1, seed: 3}\n"
        b"evaluation: {text: '\\${x}'}\noutput: o\n"
    )
    found = load_config(RunConfig, file)
    assert (found.model.dtype, found.calibration.text, found.evaluation.text) == ("float64", "1", "${x}")
    file.write_text("")
    with pytest.raises(ConfigError, match=r"model\.source has no value"):
        load_config(RunConfig, file)
