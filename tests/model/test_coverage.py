import logging

import pytest
import torch
from support.models import FAMILIES, tiny_llama, tiny_vit, token_batches
from torch import nn

from zssvd_lightning import CompressionConfig, compress
from zssvd_lightning.errors import BudgetError, TargetError
from zssvd_lightning.model.coverage import Coverage
from zssvd_lightning.model.heads import chance_loss
from zssvd_lightning.model.targets import find_targets


class Mixed(nn.Module):
    """All kinds of weights that are no targets."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.experts = nn.Parameter(torch.randn(4, 16, 16))
        self.convolution = nn.Conv1d(16, 16, 3)
        self.attention = nn.MultiheadAttention(16, 2)
        self.recurrent = nn.LSTM(16, 16)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.plain = nn.Parameter(torch.randn(3, 5))
        self.head = nn.Linear(16, 4)


def covered(model, **patterns):
    return Coverage.of(model, find_targets(model, **patterns))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_counts_once(family):
    model = FAMILIES[family].build()
    coverage = covered(model)
    assert coverage.model_parameters == sum(p.numel() for p in model.parameters())
    assert coverage.parameters == sum(t.weight.numel() for t in find_targets(model).values())
    assert Coverage.from_dict(coverage.to_dict()) == coverage


def test_kinds_that_are_left_alone_have_their_names():
    coverage = covered(Mixed(), ignore="second")
    sizes = {part.what: part.parameters for part in coverage.left_alone}
    assert sizes["embedding tables"] == 800
    assert sizes["stacked matrices, such as those of experts"] == 1024
    assert sizes["convolutions"] == 768
    assert sizes["weights of recurrent layers"] == 2048
    assert sizes["linear layers excluded by include or ignore"] == 256 + 4 * 256  # the attention is not in parts here
    assert sizes["other weights of Mixed"] == 15
    assert sizes["classification heads"] == 64
    assert [part.parameters for part in coverage.left_alone] == sorted(sizes.values(), reverse=True)
    assert coverage.share < 0.1
    assert "stacked matrices" in coverage.warning(0.4)
    assert coverage.warning(None).startswith("only ")
    assert "removing" not in coverage.summary(None)


def test_little_coverage_is_warned_of_before_any_batch(caplog):
    def no_batch():
        raise AssertionError
        yield

    model = nn.Sequential(nn.Embedding(1000, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    with caplog.at_level(logging.WARNING), pytest.raises(AssertionError):
        compress(model, no_batch(), prune_ratio=0.4, corrections=0, loss=lambda m, b: None, progress=False)
    assert "only 3.1% of the model's parameters" in caplog.text
    assert covered(tiny_llama()).warning(0.4) is None


def test_a_ratio_of_the_whole_model():
    model, batches = tiny_llama(), token_batches(4)
    before = sum(p.numel() for p in model.parameters())
    report = compress(model, batches, CompressionConfig(0.3, corrections=0, budget_of="model"), progress=False)
    after = sum(p.numel() for p in model.parameters())
    assert 0.3 <= report.reached < 0.32
    assert report.reached == pytest.approx(1 - after / before)
    assert report.removed > 0.35
    assert "of the parameters of the model (0.3 asked)" in str(report)
    with pytest.raises(BudgetError, match=r"prune_ratio 0.9 of the whole model is 1.09\d* of its 14 target layers"):
        compress(tiny_llama(), batches, CompressionConfig(0.9, corrections=0, budget_of="model"), progress=False)


def test_heads_are_left_alone_unless_named():
    assert "classifier" not in find_targets(tiny_vit())
    assert list(find_targets(tiny_vit(), include="classifier")) == ["classifier"]
    assert "classifier" not in find_targets(tiny_vit(), include="*")
    with pytest.raises(TargetError, match=r"name it in include, without wildcards, to factorize it$"):
        find_targets(tiny_vit(), include="*classifier")
    body = [nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()]
    assert list(find_targets(nn.Sequential(*body, nn.Linear(32, 10)))) == ["0", "2"]
    assert list(find_targets(nn.Sequential(*body, nn.Linear(32, 64)))) == ["0", "2", "4"]
    assert list(find_targets(nn.Sequential(nn.Embedding(64, 64), *body, nn.Linear(32, 64)))) == ["1", "3"]
    assert list(find_targets(nn.Sequential(nn.Linear(32, 16)))) == ["0"]
    with pytest.raises(TargetError, match="logits"):
        find_targets(nn.Sequential(*body, nn.Linear(32, 10)), ignore=["0", "2"])


def test_a_head_that_the_model_names():
    class Named(nn.Sequential):
        def get_classifier(self):
            return self[0]

    class Other(nn.Sequential):
        def get_classifier(self, index):
            return self[index]

    layers = [nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(16, 16)]
    assert list(find_targets(Named(*layers))) == ["1", "2"]
    assert list(find_targets(Other(*layers))) == ["0", "1", "2"]


def test_an_untrained_model_is_told(caplog):
    torch.manual_seed(0)
    model = tiny_llama()
    assert chance_loss(model) == pytest.approx(4.5747, rel=1e-4)
    compress(model, token_batches(4), CompressionConfig(0.3, corrections=0), progress=False)
    assert "seems untrained" in caplog.text
    assert chance_loss(nn.Linear(3, 3)) is None
