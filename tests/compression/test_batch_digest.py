"""Digests of batches of any type."""

import copy
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from zssvd_lightning.compression.resuming.batch_digest import add_batch
from zssvd_lightning.errors import CalibrationError


@dataclass
class Named:
    ids: Any
    itself: Any = None


def digest_of(batch: Any) -> str:
    found = sha256()
    assert add_batch(found, batch) == set()
    return found.hexdigest()


def sparse(value: float) -> torch.Tensor:
    return torch.sparse_coo_tensor([[0, 9999]], [1.0, value], (20000,), check_invariants=True)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"text": ["a", "b"]}, {"text": ["a", "c"]}),
        ((1, True, None), (1, False, None)),
        (Named([1.5]), Named([1.25])),
        (BatchEncoding({"ids": np.arange(3)}), BatchEncoding({"ids": np.arange(3)[::-1]})),
        (np.array(["a", None], dtype=object), np.array(["b", None], dtype=object)),
        (np.float32(1), np.float32(2)),
        ({"a", "b"}, {"a", "c"}),
        (["ab"], ["a", "b"]),
        (sparse(2.0), sparse(3.0)),
        (torch.tensor([1 + 2j]).conj(), torch.tensor([1 + 2j])),
    ],
)
def test_batches_of_other_content_have_other_digests(one, other):
    assert digest_of(one) == digest_of(copy.deepcopy(one)) != digest_of(other)


def test_an_object_that_refers_to_itself_ends():
    one = Named(torch.ones(2))
    one.itself = one
    assert digest_of(one) == digest_of(copy.deepcopy(one))


def test_what_has_no_content_is_told():
    assert add_batch(sha256(), [object(), 3]) == {"object"}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_other_layouts_are_refused():
    with pytest.raises(CalibrationError, match=r"layout torch\.sparse_csr"):
        digest_of(torch.eye(3).to_sparse_csr())
