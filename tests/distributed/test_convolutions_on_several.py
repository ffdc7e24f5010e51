"""Convolutions on two processes: the result of one process over all batches, batch norms included."""

import torch
from support.convolutions import ImageClassifier
from support.parallel import Run, alone, multiplied_out, run


class Network(ImageClassifier):
    """Has the same weights on every process and in every run."""

    def __init__(self, family):
        super().__init__()


COMPRESSION = {"metric": "two_sided", "selection": "curvature", "storage": "factors", "convolutions": True}


def test_two_processes_give_what_one_makes_of_their_batches(tmp_path):
    described = Run(family="vit", module=Network, trainer={"precision": "64-true"}, compression=COMPRESSION)
    found, expected = run(tmp_path, 2, described), alone(described, 2)
    assert found[0]["ranks"] == found[1]["ranks"] == expected["ranks"]
    assert found[0]["ranks"].keys() == {"net.0.kernel_matrix", "net.4.kernel_matrix"}
    products = [multiplied_out(each["at_factorization"]) for each in (found[0], expected)]
    torch.testing.assert_close(*products, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(value, found[1]["weights"][name]) for name, value in found[0]["weights"].items())
