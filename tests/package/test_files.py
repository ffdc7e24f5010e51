import os

import pytest

from zssvd_lightning._files import MANIFEST, check_output, replacing_file, replacing_folder
from zssvd_lightning.errors import OutputError


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)


def written(folder):
    return sorted(p.name for p in folder.iterdir())


def test_folder_appears_whole(tmp_path):
    with replacing_folder(tmp_path / "a" / "out") as folder:
        write(folder)
        assert not (tmp_path / "a" / "out").exists()
    assert written(tmp_path / "a" / "out") == [MANIFEST]
    assert written(tmp_path / "a") == ["out"]


def test_earlier_run_is_replaced_whole(tmp_path):
    for name in ("old", "new"):
        with replacing_folder(tmp_path / "out") as folder:
            write(folder, name)
    assert written(tmp_path / "out") == ["new", MANIFEST]


def test_failure_leaves_what_was_there(tmp_path):
    with replacing_folder(tmp_path / "out") as folder:
        write(folder, "old")
    with pytest.raises(ZeroDivisionError), replacing_folder(tmp_path / "out") as folder:
        write(folder, "new")
        raise ZeroDivisionError
    assert written(tmp_path / "out") == ["old", MANIFEST]
    assert written(tmp_path) == ["out"]


def test_full_disk_is_a_named_error(tmp_path):
    with pytest.raises(OutputError, match="No space left"), replacing_folder(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert written(tmp_path) == []


@pytest.mark.parametrize(
    "manifest", ["[]", "{}", "not json", '{"files": 3, "card": null}', '{"files": [], "card": null}']
)
def test_a_manifest_does_not_give_away_what_else_is_there(tmp_path, manifest):
    (tmp_path / MANIFEST).write_text(manifest)
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="which this package did not write"), replacing_folder(tmp_path):
        pass
    assert "thesis.tex" in written(tmp_path)


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with replacing_folder(tmp_path / "link") as folder:
        write(folder)
    assert written(tmp_path / "real") == [MANIFEST]
    assert (tmp_path / "link").is_symlink()


def test_folders_of_others_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="name an empty or new folder"):
        check_output(tmp_path)
    with pytest.raises(OutputError, match="is a file"):
        check_output(tmp_path / "thesis.tex")
    assert check_output(tmp_path / "new") == tmp_path / "new"


def test_replacing_never_leaves_the_place_empty(tmp_path, monkeypatch):
    """Whatever moment a process ends at: folders change places in one step, where the system can do that."""
    with replacing_folder(tmp_path / "out") as folder:
        write(folder, "old")
    monkeypatch.setattr("pathlib.Path.rename", lambda *_: pytest.fail("renamed"))
    with replacing_folder(tmp_path / "out") as folder:
        write(folder, "new")
    assert written(tmp_path / "out") == ["new", MANIFEST]
    assert written(tmp_path) == ["out"]


def test_replacing_works_where_the_system_cannot_exchange_folders(tmp_path, monkeypatch):
    monkeypatch.setattr("zssvd_lightning._files._exchange", lambda *_: False)
    for name in ("old", "new"):
        with replacing_folder(tmp_path / "out") as folder:
            write(folder, name)
    assert written(tmp_path / "out") == ["new", MANIFEST]
    assert written(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["my_lora.safetensors", "tokenizer_data/mine.txt", "empty/"])
def test_files_of_others_in_a_folder_of_ours_are_kept(tmp_path, name):
    with replacing_folder(tmp_path / "out") as folder:
        write(folder, "model.safetensors", "additional/template.txt")
    place = tmp_path / "out" / name
    if name.endswith("/"):
        place.mkdir()
    else:
        write(tmp_path / "out", name)
    with pytest.raises(OutputError, match=name.rstrip("/")), replacing_folder(tmp_path / "out"):
        pass
    assert place.exists()


def test_a_card_that_was_edited_is_kept(tmp_path):
    with replacing_folder(tmp_path / "out") as folder:
        write(folder, "README.md")
    with replacing_folder(tmp_path / "out") as folder:
        write(folder, "README.md")
    (tmp_path / "out" / "README.md").write_text("my words")
    with pytest.raises(OutputError, match=r"README\.md"), replacing_folder(tmp_path / "out"):
        pass


def test_the_source_and_the_working_directory_are_not_replaced(tmp_path, monkeypatch):
    with replacing_folder(tmp_path / "out") as folder:
        write(folder)
    with pytest.raises(OutputError, match="is what is read from"):
        check_output(tmp_path / "out", tmp_path / "." / "out")
    monkeypatch.chdir(tmp_path / "out")
    for place in (".", "..", tmp_path / "out"):
        with pytest.raises(OutputError, match="working directory"):
            check_output(place)


def test_names_as_long_as_the_file_system_takes_can_be_written(tmp_path):
    for name in ("a" * 255, "\U0001f600" * 63):
        with replacing_folder(tmp_path / name) as folder:
            (folder / "x").write_text("1")
        assert (tmp_path / name / "x").read_text() == "1"
        with replacing_file(tmp_path / "files" / name) as file:
            file.write_text("2")
        assert (tmp_path / "files" / name).read_text() == "2"
    with pytest.raises(OutputError, match="256 bytes, but the file system takes at most 255"):
        check_output(tmp_path / ("a" * 256))


def test_a_folder_that_is_not_writable_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match=f"because {tmp_path} is not writable"):
        check_output(tmp_path / "new" / "out")
    assert not list(tmp_path.iterdir())
