"""Convolutions, also with groups, and attentions and an LSTM of torch on two processes: the result of one."""

import torch
from support.convolutions import ImageClassifier
from support.parallel import Run, alone, multiplied_out, run
from torch import nn

GROUPS = {"net.4.channel_groups.0.kernel_matrix", "net.4.channel_groups.1.kernel_matrix"}


class Attends(nn.Module):
    """Attention of torch over the positions of an image."""

    def __init__(self, *sizes, **settings):
        super().__init__()
        self.attention = nn.MultiheadAttention(*sizes, **settings)

    def forward(self, x):
        positions = x.flatten(2).transpose(1, 2)
        return x + self.attention(positions, positions, positions)[0].transpose(1, 2).view_as(x)


class Reads(nn.Module):
    """LSTM over the positions of an image."""

    def __init__(self, channels):
        super().__init__()
        self.lstm = nn.LSTM(channels, channels, batch_first=True)

    def forward(self, x):
        return x + self.lstm(x.flatten(2).transpose(1, 2))[0].transpose(1, 2).view_as(x)


class Network(ImageClassifier):
    """Has the same weights on every process and in every run."""

    def __init__(self, family):
        super().__init__()
        self.net[4] = nn.Conv2d(16, 24, 3, stride=2, groups=2)
        self.net.insert(7, Attends(24, 2, batch_first=True))
        self.net.insert(8, Reads(24))


COMPRESSION = {
    "metric": "two_sided",
    "selection": "curvature",
    "storage": "factors",
    "convolutions": True,
    "recurrent": True,
}
COMPRESSION |= {"calibration_batches": 8, "corrections": 0}  # two batches are kept back in each process


def test_two_processes_give_what_one_makes_of_their_batches(tmp_path):
    described = Run(family="vit", module=Network, count=24, trainer={"precision": "64-true"}, compression=COMPRESSION)
    found, expected = run(tmp_path, 2, described), alone(described, 2)
    assert found[0]["ranks"] == found[1]["ranks"] == expected["ranks"]
    projections = {name for name in found[0]["ranks"] if name.startswith(("net.7.attention.", "net.8.lstm."))}
    assert len(projections) > 2
    assert found[0]["ranks"].keys() - projections == {"net.0.kernel_matrix", *GROUPS}
    products = [multiplied_out(each["at_factorization"]) for each in (found[0], expected)]
    for weights in products:  # batch norms are estimated on half of what each process keeps back
        for name in ("net.5.running_mean", "net.5.running_var"):
            weights.pop(name)
    torch.testing.assert_close(*products, rtol=1e-5, atol=1e-7)
    first, second = (each["at_factorization"] for each in found)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    for log in tmp_path.glob("*.log"):  # where a forward pass without its partner would end in a time-out
        assert "cannot be measured" not in log.read_text()
        assert "batch norms keep the statistics" not in log.read_text()
