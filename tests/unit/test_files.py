import json

import pytest

from zssvd_lightning.errors import OutputError
from zssvd_lightning.files import MARKER, check_output, replacing_folder


def write(folder, *names):
    for name in names:
        (folder / name).write_text(name)
    (folder / MARKER).write_text(json.dumps({"files": [MARKER, *names]}))


def written(folder):
    return sorted(p.name for p in folder.iterdir())


def test_folder_appears_whole(tmp_path):
    with replacing_folder(tmp_path / "a" / "out") as folder:
        write(folder)
        assert not (tmp_path / "a" / "out").exists()
    assert written(tmp_path / "a" / "out") == [MARKER]
    assert written(tmp_path / "a") == ["out"]


def test_earlier_run_is_replaced_whole(tmp_path):
    for name in ("old", "new"):
        with replacing_folder(tmp_path / "out") as folder:
            write(folder, name)
    assert written(tmp_path / "out") == ["new", MARKER]


def test_failure_leaves_what_was_there(tmp_path):
    with replacing_folder(tmp_path / "out") as folder:
        write(folder, "old")
    with pytest.raises(ZeroDivisionError), replacing_folder(tmp_path / "out") as folder:
        write(folder, "new")
        raise ZeroDivisionError
    assert written(tmp_path / "out") == ["old", MARKER]
    assert written(tmp_path) == ["out"]


def test_full_disk_is_a_named_error(tmp_path):
    with pytest.raises(OutputError, match="No space left"), replacing_folder(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert written(tmp_path) == []


@pytest.mark.parametrize("report", ["[]", "{}", "not json", '{"files": ["report.json"]}'])
def test_a_report_does_not_give_away_what_else_is_there(tmp_path, report):
    (tmp_path / MARKER).write_text(report)
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="which this package did not write"), replacing_folder(tmp_path):
        pass
    assert "thesis.tex" in written(tmp_path)


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with replacing_folder(tmp_path / "link") as folder:
        write(folder)
    assert written(tmp_path / "real") == [MARKER]
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
    assert written(tmp_path / "out") == ["new", MARKER]
    assert written(tmp_path) == ["out"]


def test_replacing_works_where_the_system_cannot_exchange_folders(tmp_path, monkeypatch):
    monkeypatch.setattr("zssvd_lightning.files._exchange", lambda *_: False)
    for name in ("old", "new"):
        with replacing_folder(tmp_path / "out") as folder:
            write(folder, name)
    assert written(tmp_path / "out") == ["new", MARKER]
    assert written(tmp_path) == ["out"]
