"""The judge of a recovery on its own: the final state is the best one measured, and never worse than the start."""

import math

import pytest
import torch
from torch import nn

from zssvd_lightning.errors import CheckpointError
from zssvd_lightning.recovery.judge import Judge
from zssvd_lightning.recovery.pace import TIMED, Pace


def judged(module, every=2, patience=None, batches=(0.0, 2.0)):
    """A judge whose loss is the mean squared distance of the one weight from the batches, of unequal size."""

    def measure(batch):
        return float((module.weight - batch).square()), 1.0 + batch

    return Judge(measure, batches, every, patience)


def moved(module, value):
    with torch.no_grad():
        module.weight.fill_(value)


def test_the_loss_is_the_mean_over_all_terms():
    module = nn.Linear(1, 1, bias=False)
    moved(module, 1.0)
    judge = judged(module, batches=(0.0, 3.0))
    judge.begin(module)
    assert judge.start == pytest.approx((1 * 1 + 4 * 4) / 5)


@pytest.mark.parametrize("path", [[9.0, 2.0, 7.0], [9.0, 8.0, 7.0], [1.4, math.nan, 1.3], [math.inf, 5.0, 9.0]])
def test_the_final_state_is_the_best_one_and_never_worse_than_the_start(path):
    module = nn.Linear(1, 1, bias=False)
    moved(module, 3.0)
    judge = judged(module)
    judge.begin(module)
    for step, value in enumerate(path, 1):
        moved(module, value)
        judge.consider(module, 2 * step)
    judge.settle(module, 2 * len(path))
    distances = {0: 3.0, **{2 * step: value for step, value in enumerate(path, 1)}}
    target = 1.5  # the mean of the batches by their terms
    best = min((s for s in distances if math.isfinite(distances[s])), key=lambda s: abs(distances[s] - target))
    assert float(module.weight) == pytest.approx(distances[best])
    report = judge.report()
    assert report["step"] == best
    assert report["recovered"] <= report["truncated"]
    assert report["steps"] == 2 * len(path)


def test_the_state_at_the_end_is_measured_too():
    module = nn.Linear(1, 1, bias=False)
    moved(module, 9.0)
    judge = judged(module, every=10)
    judge.begin(module)
    assert not judge.is_due(9)
    assert judge.is_due(10)
    moved(module, 2.0)
    judge.settle(module, 7)
    assert float(module.weight) == 2.0
    assert judge.report()["step"] == 7


def test_it_stops_after_so_many_measurements_without_a_better_one():
    module = nn.Linear(1, 1, bias=False)
    moved(module, 3.0)
    judge = judged(module, patience=2)
    judge.begin(module)
    going = []
    for step, value in enumerate([4.0, 2.0, 5.0, 6.0], 1):
        moved(module, value)
        going.append(judge.consider(module, 2 * step))
    assert going == [True, True, True, False]


def test_frozen_parameters_are_left_alone_and_a_stage_begins_with_the_best_state():
    module = nn.Linear(1, 1)
    moved(module, 2.0)
    module.bias.requires_grad_(False)
    judge = judged(module)
    judge.begin(module)
    with torch.no_grad():
        module.bias.fill_(5.0)
    moved(module, 9.0)
    judge.settle(module, 2)
    assert (float(module.weight), float(module.bias)) == (2.0, 5.0)
    module.bias.requires_grad_(True)
    judge.go_on_from(module)
    with torch.no_grad():
        module.bias.fill_(6.0)
    judge.settle(module, 2)
    assert float(module.bias) == 5.0


def test_its_state_goes_on_where_it_was_and_only_with_as_many_batches():
    module = nn.Linear(1, 1, bias=False)
    moved(module, 3.0)
    first, second = judged(module, patience=3), judged(module, patience=3)
    first.begin(module)
    moved(module, 2.0)
    first.consider(module, 2)
    second.load_state_dict(first.state_dict())
    for judge in (first, second):
        moved(module, 8.0)
        judge.consider(module, 4)
        judge.settle(module, 4)
        assert float(module.weight) == 2.0
    assert first.report() == second.report()
    with pytest.raises(CheckpointError, match="held-out"):
        judged(module, batches=(1.0,)).load_state_dict(first.state_dict())


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(("measuring", "every"), [(0.0, None), (5.0, 10)])
def test_the_steps_fill_the_time_whatever_the_first_one_took(measuring, every):
    clock = Clock()
    pace = Pace(2.0, clock)  # 120 seconds
    pace.measured(measuring)
    clock.now = 50.0  # before the first step, which does not count
    pace.start()
    found, done = None, 0
    while found is None:
        done += 1
        clock.now += 7.0 if done == 1 else 2.0
        found = pace.steps(done, every)
    assert done == 1 + TIMED
    total = clock.now - 50.0 + (found - done) * (2.0 + (measuring / every if every else 0.0)) + measuring
    assert 120.0 - 2.0 - measuring <= total <= 120.0


def test_a_time_that_is_over_leaves_the_steps_already_made():
    clock = Clock()
    pace = Pace(0.1, clock)
    steps = None
    for done in range(1, 2 + TIMED):
        pace.start()
        clock.now += 100.0
        steps = pace.steps(done, None)
    assert steps == 1 + TIMED
