import random
import signal

import pytest
import torch
from support.killed_run import HOOKS, losses, start

KILLS = 15


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


CASES = {
    "waits first": ({"start_step": 3}, {}, None, (2, 3)),
    "two whole corrections": ({"start_step": 2, "corrections": 2, "line_search": False}, {}, None, (2, 3)),
    # Lightning loses the gradients of an accumulation window that a checkpoint was taken in; calibration does not.
    "accumulates": ({}, {"accumulate_grad_batches": 3}, ["calibrate", "correct"], (1, 2)),
    "recovers": (
        {"recovery": {"method": "lora", "rank": 2, "clip_rank": True, "two_step": True, "loss": "both"}},
        {},
        ["recover"],
        (1, 2),
    ),
    "natural steps": (
        {"preset": "best", "corrections": 2},
        {"accumulate_grad_batches": 2},
        ["calibrate", "correct"],
        (1, 2),
    ),
    "offloads": ({"preset": "best", "offload": "disk"}, {}, ["calibrate", "correct"], (1, 2)),
    "extends": ({"extend_training": True}, {"accumulate_grad_batches": 2, "max_steps": 50}, None, (3, 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_is_killed_again_and_again_ends_like_one_that_is_not(tmp_path, case):
    callback, settings, phases, times = CASES[case]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    assert start(whole, callback, settings) == 0
    chance, kills = random.Random(0), 0
    while (code := start(killed, callback, settings, (chance.randint(*times), chance.choice(HOOKS), phases))) != 0:
        assert code == -signal.SIGKILL
        kills += 1
        assert kills < 100
    assert kills >= (KILLS if phases is None else 5)
    reference, end = torch.load(whole / "end.pt"), torch.load(killed / "end.pt")
    for part in reference:
        assert same(reference[part], end[part]), part
    expected = dict(losses(whole))
    assert all(expected[batch] == loss for batch, loss in losses(killed))
    assert {batch for batch, _ in losses(killed)} == expected.keys()
