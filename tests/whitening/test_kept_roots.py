"""Roots of second moments are kept as long as the moments stay, and there is memory."""

import pytest
import torch

from zssvd_lightning.whitening import kept_roots
from zssvd_lightning.whitening.cholesky import Root
from zssvd_lightning.whitening.kept_roots import KeptRoots, fingerprint


class Builder:
    """Cholesky root of a moment, and how often it was computed."""

    def __init__(self, sums, count=1):
        self.sums, self.count, self.calls = sums, count, 0

    def __call__(self):
        self.calls += 1
        return Root(torch.linalg.cholesky((self.sums / self.count).double()), 1e-8)

    def of(self, roots, key="a"):
        return roots.root(key, self.sums, self.count, torch.float32, self)


def moment(n=6, dtype=torch.float32):
    X = torch.randn(3 * n, n, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return X.T @ X


def test_a_root_is_computed_once_and_multiplies_bit_for_bit_as_before():
    roots, build = KeptRoots(), Builder(moment())
    first, second = build.of(roots), build.of(roots)
    assert (build.calls, roots.used, second.jitter) == (1, 1, first.jitter)
    M = torch.randn(4, 6)
    for name in ("times", "over", "over_transposed"):
        assert torch.equal(getattr(first, name)(M), getattr(second, name)(M))


def test_a_changed_moment_is_noticed():
    roots, build = KeptRoots(), Builder(moment())
    build.of(roots)
    build.sums.view(torch.int32)[4, 2] ^= 1  # the last bit of one number
    build.of(roots)
    build.count = 2
    build.of(roots)
    build.sums = build.sums[:5, :5]
    build.of(roots)
    assert (build.calls, roots.used) == (4, 0)


def test_layers_have_roots_of_their_own():
    roots, build = KeptRoots(), Builder(moment())
    build.of(roots, "a")
    build.of(roots, "b")
    build.of(roots, "a")
    assert build.calls == 2


def test_roots_are_kept_while_they_fit(monkeypatch):
    monkeypatch.setattr(kept_roots, "free_bytes", lambda device: 4 * 36 * 4)
    roots, build = KeptRoots(), Builder(moment())
    for key in "abab":
        build.of(roots, key)
    assert (build.calls, roots.nbytes) == (3, 36 * 4)


@pytest.mark.parametrize("roots", [KeptRoots(active=False), KeptRoots()])
def test_nothing_is_kept_if_it_is_not_asked_for_or_cleared(roots):
    build = Builder(moment())
    build.of(roots)
    roots.clear()
    build.of(roots)
    roots.clear()
    assert (build.calls, roots.nbytes) == (2, 0)


def test_missing_moments_are_left_to_the_builder():
    def build():
        raise LookupError

    for _ in range(2):
        with pytest.raises(LookupError):
            KeptRoots().root("a", None, 0, torch.float32, build)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fingerprints_tell_matrices_apart(dtype, monkeypatch):
    monkeypatch.setattr(kept_roots, "ROWS_AT_ONCE", 4)
    M = moment(9, dtype)
    changed = [M.flip(0), M.flip(1), M + 1, -M, M[:8], M[:, :8]]
    words = torch.int64 if dtype == torch.float64 else torch.int32
    for place in range(81):
        other = M.clone()
        other.view(words).flatten()[place] ^= 1 << place % 31
        changed.append(other)
    found = {fingerprint(other) for other in changed}
    assert fingerprint(M) not in found
    assert len(found) == len(changed)
    assert fingerprint(M.T.contiguous().T) == fingerprint(M)  # wherever the numbers lie
