"""Packages that hold a GGUF file, whole or in parts, as installers leave them."""

import pytest
from support.models import tiny_gpt2, tiny_llama
from transformers import BloomConfig, BloomForCausalLM

from zssvd_lightning.errors import ConfigError, ModelSourceError
from zssvd_lightning.sources.models import _weights_in, load_model, longest_input, refuse_long_windows


@pytest.fixture
def install(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(name, files, requires=()):
        told = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        told.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {r}" for r in requires)]
        (told / "METADATA").write_text("\n".join(lines) + "\n")
        (told / "RECORD").write_text("".join(f"{file},,\n" for file in files))
        for file, content in files.items():
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).write_bytes(content)

    return install


def test_a_whole_file_is_read_where_it_is(install, tmp_path):
    install("whole-model", {"whole_model/m.gguf": b"abc", "whole_model/note.txt": b""})
    with _weights_in("whole-model") as weights:
        assert weights == tmp_path / "whole_model" / "m.gguf"


def test_parts_of_required_packages_are_put_together_in_order_and_removed_again(install):
    install("in-parts", {"in_parts/note.txt": b""}, ["in-parts-b==1.0", "in-parts-a (>=1)"])
    install("in-parts-b", {"in_parts_b/m.gguf.part01": b"def"})
    install("in-parts-a", {"in_parts_a/m.gguf.part00": b"abc", "in_parts_a/m.gguf.part2": b"g"})
    with _weights_in("in-parts") as weights:
        assert weights.name == "m.gguf"
        assert weights.read_bytes() == b"abcdefg"
    assert not weights.exists()


def test_parts_of_several_files_or_none_are_refused(install):
    install("two-files", {"two_files/m.gguf.part00": b"", "two_files/n.gguf.part00": b""})
    install("nothing", {"nothing/m.txt": b""}, ["not-installed"])
    with pytest.raises(ModelSourceError, match="must hold one, or its parts"):
        load_model("package:two-files")
    with pytest.raises(ModelSourceError, match="'not-installed' is not installed"):
        load_model("package:nothing")


def test_a_missing_part_is_named(install):
    install("lacking", {"lacking/m.gguf.part00": b"", "lacking/m.gguf.part02": b""})
    with pytest.raises(ModelSourceError, match=r"hold parts \[0, 2\] of m.gguf"):
        load_model("package:lacking")


def test_requirements_of_extras_are_not_looked_into(install):
    install("no-parts", {"no_parts/m.txt": b""}, ['not-installed; extra == "test"'])
    with pytest.raises(ModelSourceError, match=r"holds 0 \.gguf files"):
        load_model("package:no-parts")


@pytest.mark.parametrize(
    ("model", "most"),
    [
        (tiny_llama(), 64),
        (tiny_gpt2(n_positions=48), 48),
        (BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=16, n_layer=1, n_head=2)), None),
    ],
)
def test_windows_longer_than_the_inputs_of_the_model_are_refused(model, most):
    assert longest_input(model) == most
    refuse_long_windows(model, calibration_length=most or 10**6)
    if most is not None:
        with pytest.raises(ConfigError, match=rf"training\.length is {most + 1}, but .* takes at most {most} tokens"):
            refuse_long_windows(model, calibration_length=most, training_length=most + 1)
