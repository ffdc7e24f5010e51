import pytest

from zssvd_lightning.errors import OutputError
from zssvd_lightning.files import MARKER, check_output, replacing_folder


def written(folder):
    return sorted(p.name for p in folder.iterdir())


def test_folder_appears_whole(tmp_path):
    with replacing_folder(tmp_path / "a" / "out") as folder:
        (folder / MARKER).write_text("{}")
        assert not (tmp_path / "a" / "out").exists()
    assert written(tmp_path / "a" / "out") == [MARKER]
    assert written(tmp_path / "a") == ["out"]


def test_earlier_run_is_replaced_whole(tmp_path):
    for name in ("old", "new"):
        with replacing_folder(tmp_path / "out") as folder:
            (folder / MARKER).write_text("{}")
            (folder / name).write_text(name)
    assert written(tmp_path / "out") == ["new", MARKER]


def test_failure_leaves_what_was_there(tmp_path):
    with replacing_folder(tmp_path / "out") as folder:
        (folder / MARKER).write_text("old")
    with pytest.raises(ZeroDivisionError), replacing_folder(tmp_path / "out") as folder:
        (folder / MARKER).write_text("new")
        raise ZeroDivisionError
    assert (tmp_path / "out" / MARKER).read_text() == "old"
    assert written(tmp_path) == ["out"]


def test_full_disk_is_a_named_error(tmp_path):
    with pytest.raises(OutputError, match="No space left"), replacing_folder(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert written(tmp_path) == []


def test_folders_of_others_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="name an empty or new folder"):
        check_output(tmp_path)
    with pytest.raises(OutputError, match="is a file"):
        check_output(tmp_path / "thesis.tex")
    assert check_output(tmp_path / "new") == tmp_path / "new"
