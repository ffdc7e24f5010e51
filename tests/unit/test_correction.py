import torch
from support.samplers import weight

from zssvd_lightning.correction import projected_step


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
