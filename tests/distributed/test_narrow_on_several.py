"""Narrower hidden widths on several processes: the result of one process over all batches, and a refusal by FSDP2."""

import torch
from support import processes
from support.models import CausalLM, tiny_llama
from support.parallel import Run, alone, fit, multiplied_out, run


class Language(CausalLM):
    """Has the same weights on every process and in every run."""

    def __init__(self, family):
        torch.manual_seed(0)
        super().__init__(tiny_llama())


COMPRESSION = {
    "prune_ratio": 0.3,
    "metric": "two_sided",
    "selection": "curvature",
    "storage": "factors",
    "narrow": True,
}


def test_two_processes_give_what_one_makes_of_their_batches(tmp_path):
    settings = {"precision": "64-true"}
    found = run(tmp_path, 2, Run(module=Language, trainer=settings, compression=COMPRESSION))
    expected = alone(Run(module=Language, trainer=settings, compression=COMPRESSION), 2)
    assert found[0]["ranks"] == found[1]["ranks"] == expected["ranks"]
    narrow = [name for name in found[0]["at_factorization"] if name.endswith(".narrow.weight")]
    assert narrow
    torch.testing.assert_close(found[0]["losses"], expected["losses"], rtol=1e-9, atol=0)
    products = [multiplied_out(each["at_factorization"]) for each in (found[0], expected)]
    torch.testing.assert_close(*products, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(value, found[1]["weights"][name]) for name, value in found[0]["weights"].items())


def test_fsdp2_is_refused_by_name(tmp_path):
    settings = COMPRESSION | {"corrections": 0}
    assert processes.start(tmp_path, 2, fit, Run(strategy="fsdp2", compression=settings)) == [1, 1]
    found = (tmp_path / "0.log").read_text()
    assert "UnsupportedTrainingError: narrow takes rows and columns out of whole weights" in found
