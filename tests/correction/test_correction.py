import pytest
import torch
from support.samplers import weight

from zssvd_lightning.correction.steps import best_fraction, projected_step


def test_step_ends_at_the_point_of_its_line_nearest_to_the_original():
    W, truncated, g = weight(5, 7), weight(5, 7), weight(5, 7)
    stepped = projected_step(truncated, W, g)
    distance = (W - stepped).norm()
    for t in (-0.1, -1e-3, 1e-3, 0.1):
        assert (W - (stepped + t * g)).norm() > distance
    torch.testing.assert_close(((W - stepped) * g).sum(), torch.zeros((), dtype=torch.float64), atol=1e-10, rtol=0)


def test_step_does_not_depend_on_the_length_of_the_gradient():
    W, truncated, g = weight(5, 7), weight(5, 7), weight(5, 7)
    torch.testing.assert_close(projected_step(truncated, W, g), projected_step(truncated, W, -3e-4 * g))


def test_step_along_the_difference_itself_restores_the_original():
    W, truncated = weight(5, 7), weight(5, 7)
    torch.testing.assert_close(projected_step(truncated, W, W - truncated), W)


def test_untouched_matrix_stays():
    W = weight(4, 4)
    assert torch.equal(projected_step(W, W, weight(4, 4)), W)


@pytest.mark.parametrize(("slope", "curvature"), [(-2.0, 1.1), (-2.0, 5.0), (-1e-3, 7.0)])
def test_fraction_is_the_minimum_of_the_parabola(slope, curvature):
    def loss(t):
        return 4.0 + slope * t + curvature * t * t

    t = best_fraction(4.0, slope, loss(1.0))
    assert 0 < t < 1
    assert all(loss(t) <= loss(t + dt) for dt in (-1e-2, 1e-2))


@pytest.mark.parametrize(
    ("before", "slope", "after", "fraction"),
    [(4.0, -2.0, 2.0, 1.0), (4.0, -2.0, 1.0, 1.0), (4.0, -2.0, 2.9, 1.0), (4.0, 0.5, 5.0, 0.0), (4.0, 2.0, 5.0, 0.0)],
)
def test_fraction_stays_between_none_and_all_of_the_step(before, slope, after, fraction):
    assert best_fraction(before, slope, after) == fraction
