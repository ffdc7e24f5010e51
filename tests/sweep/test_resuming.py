"""Runs block by block that are interrupted and go on, against runs that are not."""

import copy
import errno
import json
import logging
import random
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.experts import lopsided_experts
from support.killed_sweep import End, command, compressed, start
from support.models import (
    Unreached,
    assert_same_state,
    saved_tiny_llama,
    sequence_pairs,
    state_of,
    tiny_llama,
    tiny_t5,
    token_batches,
)

from zssvd_lightning import compress
from zssvd_lightning._contexts import random_states, set_random_states
from zssvd_lightning.app.cli import main
from zssvd_lightning.compression.memory.limits import Limits
from zssvd_lightning.compression.pipeline import refuse_beforehand
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.errors import CalibrationError, ConfigError, ContradictionError, OutputError
from zssvd_lightning.serialization.unfinished import PROGRESS, UnfinishedFolder

ONE_SHOT = {"prune_ratio": 0.3, "preset": "zs-svd", "corrections": 0, "memory": "blocks", "progress": False}

REMOVES = {
    "preset": "zs-svd",
    "metric": "two_sided",
    "selection": "curvature",
    "correction_step": "natural",
    "corrections": 1,
    "prune_ratio": 0.7,
    "remove_experts": True,
}


@pytest.fixture
def stopped_after(monkeypatch):
    """Makes runs end by Ctrl-C after so many commits; never for None."""
    left, commit = [None], UnfinishedFolder.commit

    def counted(self, *args, **settings):
        commit(self, *args, **settings)
        if left[0] is not None:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt

    monkeypatch.setattr(UnfinishedFolder, "commit", counted)
    return lambda count: left.__setitem__(0, count)


def test_a_run_that_is_killed_at_any_moment_ends_as_if_it_was_not(tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    assert start(tmp_path / "whole", compressed, keeps=False) == 0
    kept = []
    for end in (
        End("committed", 1, signal.SIGKILL),  # the first part
        End("writing", 7, signal.SIGTERM),
        End("committed", 3, signal.SIGKILL),  # the first stage
        End("listing", 2, signal.SIGINT),
    ):
        assert start(tmp_path / "killed", compressed, end=end) in (-end.signal, 1)
        kept.append(len(json.loads((tmp_path / "killed" / "kept" / PROGRESS).read_text())["entries"]))
    assert start(tmp_path / "killed", compressed) == 0
    assert kept == [3, 3, 1, 4]  # parts, gradients and random numbers, the state after a stage, and parts beside it
    one, other = (torch.load(tmp_path / name / "end.pt") for name in ("whole", "killed"))
    assert one["ranks"] == other["ranks"]
    assert one["losses"] == other["losses"]
    assert one["weights"].keys() == other["weights"].keys()
    assert all(torch.equal(weight, other["weights"][name]) for name, weight in one["weights"].items())
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["end.pt", "scratch"]


@pytest.mark.parametrize(
    ("build", "batches", "settings", "stops"),
    [
        (tiny_llama, token_batches, {"preset": "zs-svd-line-search", "corrections": 1}, (5, 3)),
        (tiny_llama, token_batches, {"preset": "best", "corrections": 0, "reestimate": True}, (4,)),
        (tiny_t5, sequence_pairs, {"preset": "svd-llm", "corrections": 0, "storage": "pivoted"}, (3,)),
        (Unreached, token_batches, {"preset": "best", "corrections": 1}, (2, 3)),
        (lopsided_experts, token_batches, REMOVES, (2, 3)),
    ],
    ids=["projected", "reestimate", "two chains", "left dense", "removed experts"],
)
@pytest.mark.filterwarnings("ignore::zssvd_lightning.errors.LeftDenseWarning")
def test_other_courses_go_on_too(build, batches, settings, stops, tmp_path, stopped_after):
    torch.manual_seed(0)
    model, batches = build(), batches(2)
    whole, before = copy.deepcopy(model), copy.deepcopy(state_of(model))
    settings = {"prune_ratio": 0.4, "correction_batches": 1, "memory": "blocks", "progress": False} | settings
    expected = compress(whole, batches, **settings)
    for stop in stops:
        stopped_after(stop)
        with pytest.raises(KeyboardInterrupt):
            compress(model, batches, **settings, resume_in=tmp_path / "kept")
        assert_same_state(before, state_of(model))
    stopped_after(None)
    found = compress(model, batches, **settings, resume_in=tmp_path / "kept")
    assert (found.layers, found.left_dense) == (expected.layers, expected.left_dense)
    assert (found.losses, found.kept_back, found.trace) == (expected.losses, expected.kept_back, expected.trace)
    assert found.removed_experts == expected.removed_experts
    assert bool(found.removed_experts) == ("remove_experts" in settings)
    assert_same_state(state_of(whole), state_of(model))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Folder of a run that was interrupted after its first block, and the model."""
    torch.manual_seed(0)
    model, folder = tiny_llama(), tmp_path_factory.mktemp("run") / "kept"
    handles = [model.model.layers[0].self_attn.q_proj.register_full_backward_pre_hook(_stop)]
    with pytest.raises(KeyboardInterrupt):
        compress(model, token_batches(2), **ONE_SHOT, resume_in=folder)
    for handle in handles:
        handle.remove()
    return model, folder


def _stop(*_):
    raise KeyboardInterrupt


@pytest.fixture
def kept(interrupted, tmp_path):
    model, folder = interrupted
    return copy.deepcopy(model), shutil.copytree(folder, tmp_path / "kept")


def unread():
    raise AssertionError("a batch was read")
    yield


def refused(error, match, model, folder, batches=None, **changes):
    before, files = copy.deepcopy(state_of(model)), sorted(path.name for path in folder.iterdir())
    with pytest.raises(error, match=match):
        compress(model, unread() if batches is None else batches, **(ONE_SHOT | changes), resume_in=folder)
    assert_same_state(before, state_of(model))
    assert sorted(path.name for path in folder.iterdir()) == files


def test_another_run_is_refused_before_a_batch_is_read(kept):
    model, folder = kept
    refused(OutputError, "prune_ratio was '0.3' and is '0.4'", model, folder, prune_ratio=0.4)
    refused(OutputError, "calibration_batches was 'None' and is '1'", model, folder, calibration_batches=1)
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] += 1
    refused(OutputError, "the model was", model, folder)


def test_other_batches_are_refused(kept):
    model, folder = kept
    refused(CalibrationError, "the same batches in the same order", model, folder, token_batches(2)[::-1])
    labelled = token_batches(2)
    labelled[1]["labels"][0, 5] = -100
    refused(CalibrationError, "the same batches in the same order", model, folder, labelled)


def test_batches_and_functions_of_finished_stages_are_compared_too(tmp_path, stopped_after):
    model, batches, folder = tiny_llama(), token_batches(2), tmp_path / "kept"
    settings = ONE_SHOT | {"preset": "best", "corrections": 1, "correction_batches": 1}
    stopped_after(4)  # the first stage
    with pytest.raises(KeyboardInterrupt):
        compress(model, batches, **settings, resume_in=folder)
    stopped_after(None)
    others = "stage 1 of the interrupted run"
    refused(CalibrationError, others, model, folder, token_batches(2, seed=1), **settings)
    refused(CalibrationError, others, model, folder, batches, **settings, terms=lambda batch: 1.0)
    first = torch.ones(4, 24, dtype=torch.bool).tril()
    refused(CalibrationError, others, model, folder, batches, **settings, mask=lambda batch: first)
    other_loss = {"loss": lambda model, batch: 2 * model(**batch).loss}
    refused(
        CalibrationError, "the loss, mask or terms give other losses", model, folder, batches, **settings, **other_loss
    )


def test_a_loss_that_draws_random_numbers_goes_on(tmp_path, stopped_after):
    def drawn(model, batch):
        factor = torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002
        return factor * model(**batch).loss

    torch.manual_seed(0)
    model, batches = tiny_llama(), token_batches(2)
    whole = copy.deepcopy(model)
    settings = ONE_SHOT | {"preset": "best", "corrections": 1, "correction_batches": 1, "loss": drawn}
    states = random_states()
    compress(whole, batches, **settings)
    set_random_states(states)
    for stop in (2, 4):  # within the first stage, and in the second
        stopped_after(stop)
        with pytest.raises(KeyboardInterrupt):
            compress(model, batches, **settings, resume_in=tmp_path / "kept")
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(stop)
    stopped_after(None)
    compress(model, batches, **settings, resume_in=tmp_path / "kept")
    assert_same_state(state_of(whole), state_of(model))


def test_files_of_others_and_a_folder_in_use_are_refused(kept, tmp_path):
    model, folder = kept
    with UnfinishedFolder(folder):
        refused(OutputError, "another process uses", model, folder)
    assert (folder / PROGRESS).exists()  # since the run in it was not that of the block
    (folder / ".DS_Store").write_text("of the system")
    UnfinishedFolder(folder).__exit__(None)
    (folder / "thesis.tex").write_text("mine")
    refused(OutputError, "holds thesis.tex", model, folder)
    with pytest.raises(OutputError, match="is a file"):
        compress(model, unread(), **ONE_SHOT, resume_in=folder / "thesis.tex")
    with pytest.raises(ContradictionError, match="set it to 'blocks'"):
        compress(model, unread(), **(ONE_SHOT | {"memory": "whole"}), resume_in=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_a_damaged_part_of_the_same_run_is_computed_again(kept, damage, caplog):
    _, folder = kept
    file = max(folder.glob("*.pt"), key=lambda path: path.stat().st_size)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "flipped":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    files = sorted(folder.iterdir())
    with pytest.raises(OutputError, match="another run"), UnfinishedFolder(folder) as opened:
        opened.begin({"the model": "another"})
    assert sorted(folder.iterdir()) == files
    with caplog.at_level(logging.WARNING), UnfinishedFolder(folder) as opened:
        opened.begin(opened.run)
        assert opened.run is None
        assert [path.name for path in folder.iterdir()] == ["zssvd-lock"]
    assert "is not as it was written" in caplog.text
    assert not folder.exists()


def test_what_cannot_be_read_or_understood_is_refused_and_stays(kept, monkeypatch):
    model, folder = kept
    with monkeypatch.context() as patched:
        patched.setattr("zssvd_lightning.serialization.unfinished.digest", _unreadable)
        refused(OutputError, "cannot read zssvd-.*nothing was removed", model, folder)
    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.read_text", _unreadable)
        with pytest.raises(OutputError, match=r"cannot read zssvd-progress.*nothing was removed"):
            UnfinishedFolder(folder)
    for text in ("no JSON", '{"format": 1}', '{"format": 2}'):
        (folder / PROGRESS).write_text(text)
        refused(OutputError, "nothing was removed", model, folder)


def _unreadable(*_, **__):
    raise OSError(errno.EIO, "Input/output error")


def test_a_check_beforehand_changes_nothing(kept, tmp_path):
    model, folder = kept
    config = CompressionConfig.asked(None, "zs-svd", {"prune_ratio": 0.3, "corrections": 0, "memory": "blocks"})
    files = sorted(folder.iterdir())
    for where in (folder, str(tmp_path / "new"), tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        refuse_beforehand(model, token_batches(2), config, resume_in=where)
    assert sorted(folder.iterdir()) == files
    assert sorted(tmp_path.iterdir()) == [tmp_path / "empty", folder]


def test_a_folder_that_limits_do_not_use_is_told(kept, caplog, monkeypatch):
    model, folder = kept
    limited = ONE_SHOT | {"memory": "auto", "max_memory": "4GiB"}
    with pytest.raises(ContradictionError, match="memory cannot be 'whole'"):
        compress(model, unread(), **(limited | {"memory": "whole"}), resume_in=folder)
    held, seen = sum(path.stat().st_size for path in folder.glob("*.pt")), []
    monkeypatch.setattr("zssvd_lightning.compression.memory.limits.free_disk", lambda: 10**12)
    of = Limits.of
    monkeypatch.setattr(Limits, "of", lambda *args: seen.append(of(*args)) or seen[-1])
    with caplog.at_level(logging.INFO):
        compress(model, token_batches(2), **limited, resume_in=folder)
    assert seen[0].disk == 10**12 + held
    assert f"what is finished in {folder} is not used; delete it" in caplog.text
    assert (folder / PROGRESS).exists()


@pytest.mark.parametrize("wrong", [3, True, b"x", ["a"]])
def test_what_is_no_path_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"resume_in is .* must be a path"):
        compress(tiny_llama(), unread(), **ONE_SHOT, resume_in=wrong)


def test_a_full_disk_loses_nothing(kept, monkeypatch, caplog):
    model, folder = kept
    at_first = iter([10**12])
    monkeypatch.setattr(
        "zssvd_lightning.serialization.unfinished.shutil.disk_usage",
        lambda path: SimpleNamespace(free=next(at_first, 1000) if path == folder else 10**12),
    )
    refused(OutputError, r"cannot write .* GB to .*kept \(1e-06 GB free\)", model, folder, token_batches(2))
    monkeypatch.undo()

    def full(self, content):
        self.error = OSError(errno.ENOSPC, "No space left on device")
        raise self.error

    with monkeypatch.context() as patched:
        patched.setattr("zssvd_lightning.serialization.unfinished._Writer.write", full)
        refused(OutputError, "No space left on device.*the model is as it was", model, folder, token_batches(2))
    with caplog.at_level(logging.INFO):
        compress(model, token_batches(2), **ONE_SHOT, resume_in=folder)
    assert "2 blocks or regions" in caplog.text
    assert not folder.exists()


def test_nothing_is_left_where_nothing_was_finished(tmp_path):
    def fail(model, batch):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        compress(tiny_llama(), token_batches(2), **ONE_SHOT, loss=fail, resume_in=tmp_path / "new" / "kept")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_told_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("zssvd_lightning._files.fcntl.flock", _unreadable)
    for _ in range(2):
        with UnfinishedFolder(tmp_path / "kept"):
            pass
    assert caplog.messages == [f"this file system has no locks; start only one process on {tmp_path / 'kept'}"]


def test_the_command_line_opens_the_folder_before_the_model(tmp_path, capsys, monkeypatch):
    out = tmp_path / ("o" * 250)
    folder = tmp_path / f"{'o' * 200}.unfinished"
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    given = ["compress", str(tmp_path / "no model"), "--memory", "blocks", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["zssvd", *given])
    with pytest.raises(SystemExit):
        main()
    told = capsys.readouterr().err
    assert f"the folder {folder} holds thesis.tex" in told
    assert "resume_in" not in told


def test_the_command_line_ends_by_sigterm_and_goes_on(tmp_path):
    torch.manual_seed(0)
    saved_tiny_llama(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the state of the union is strong " * 400)
    given = ["compress", f"{tmp_path}/model", "--ratio", "0.3", "--preset", "zs-svd", "--memory", "blocks"]
    given += ["compression.corrections=0", "--text", f"{tmp_path}/text.txt", "calibration.samples=2"]
    given += ["calibration.length=16", "calibration.batch_size=1"]
    end = End("committed", 2, signal.SIGTERM)
    ended = start(tmp_path, command, *given, "--out", f"{tmp_path}/out", end=end)
    assert ended == 128 + signal.SIGTERM
    there = {"model", "text.txt", "scratch"}
    assert {path.name for path in tmp_path.iterdir()} == there | {"out.unfinished"}
    for out in ("out", "whole"):
        assert start(tmp_path, command, *given, "--out", f"{tmp_path}/{out}") == 0
    assert {path.name for path in tmp_path.iterdir()} == there | {"out", "whole"}
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "whole")]
    assert weights[0] == weights[1]
