"""The old spelling of a phase."""

import pytest

from zssvd_lightning import Phase


def test_the_british_spelling_still_means_factorize_and_warns():
    assert Phase("factorise") is Phase.FACTORIZE
    with pytest.warns(DeprecationWarning, match="FACTORIZE"):
        assert Phase.FACTORISE is Phase.FACTORIZE
    with pytest.raises(AttributeError):
        Phase.NEVER  # noqa: B018
