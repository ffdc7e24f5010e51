"""Hidden widths whose order is free: what is found, what is not, and that trying leaves no traces."""

from types import SimpleNamespace

import pytest
import torch
from support.models import FAMILIES, assert_same_state, state_of, tiny_llama, token_batches
from torch import nn
from torch.nn.functional import dropout
from transformers import PreTrainedModel

from zssvd_lightning.calibration.collector import StatisticsCollector
from zssvd_lightning.calibration.masks import TokenMask
from zssvd_lightning.calibration.widths.free_widths import FreeWidths
from zssvd_lightning.calibration.widths.trials import Width
from zssvd_lightning.distributed import LayerSet
from zssvd_lightning.model.targets import Target, find_targets


def tried_in(model, *batches, run=None, ignore=()):
    """Widths tried over batches, each with whether its order is free."""
    if isinstance(model, PreTrainedModel):
        targets = find_targets(model)
    else:  # also the last layer
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        targets = {name: Target(name, module) for name, module in linears.items() if name not in ignore}
    statistics = StatisticsCollector(model, LayerSet(targets))
    statistics.finds_widths = True
    for batch in batches:
        with statistics.observing(TokenMask(None)) as observation:
            run(model, batch) if run else model(**batch) if isinstance(batch, dict) else model(batch)
            observation.forward_done()
    return statistics.free_widths


EXPECTED = {
    "llama": (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", 2),
    "gpt2": (("mlp.c_fc",), "mlp.c_proj", 2),
    "bert": (("intermediate.dense",), "output.dense", 2),
    "t5": (("DenseReluDense.wi",), "DenseReluDense.wo", 4),
    "vit": (("mlp.fc1",), "mlp.fc2", 2),
}
"""Ends of the names of producers and consumer, and the number of such widths."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_feed_forward_networks_are_found_without_a_trace(family, dtype):
    model, batch = FAMILIES[family].build().to(dtype), FAMILIES[family].batches()[0]
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    before, random = state_of(model), torch.get_rng_state()
    free = tried_in(model, batch).free
    assert_same_state(before, state_of(model))
    assert torch.equal(random, torch.get_rng_state())
    producers, consumer, count = EXPECTED[family]
    assert len(free) == count
    for width in free:
        parent = width.consumer.removesuffix(consumer)
        assert width == Width(tuple(parent + name for name in producers), parent + consumer)


@pytest.mark.parametrize("output_side", [None, "empirical"])
def test_statistics_and_gradients_are_as_without_trials(output_side):
    model, batch = tiny_llama(), token_batches(1)[0]
    found = []
    for tries in (False, True):
        statistics = StatisticsCollector(model, LayerSet(find_targets(model)), output_side)
        statistics.finds_widths = tries
        with statistics.observing(TokenMask(None)) as observation:
            loss = model(**batch).loss
            observation.forward_done()
            statistics.add_loss(loss, 1.0, 1.0)
            loss.backward()
            statistics.collect_gradients(1.0)
        found.append(statistics.moments)
        assert bool(statistics.free_widths.verdicts) == tries
    assert found[0].tokens == found[1].tokens
    for sums in ("input_sums", "gradient_sums", "output_sums"):
        torch.testing.assert_close(getattr(found[0], sums), getattr(found[1], sums), rtol=0, atol=0)


class Block(nn.Module):
    """Two layers with something between them, and something of it outside."""

    def __init__(self, between=None, forward=None, **parts):
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 7)
        self.between = between or nn.GELU()
        self.add_module("other", parts.get("other"))
        self.run = forward

    def forward(self, x):
        if self.run is not None:
            return self.run(self, x)
        return self.second(self.between(self.first(x)))


class Outer(nn.Module):
    """Calls a block, and perhaps parts of it."""

    def __init__(self, block, also=None):
        super().__init__()
        self.block, self.also = block, also

    def forward(self, x):
        y = self.block(x)
        return y if self.also is None else (y, self.also(self.block, x))


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def norm(kind, **settings):
    return kind(10, **settings)


def kept(block, x):
    block.last = block.first(x)
    return block.second(block.last.relu())


def appended(block, x):
    block.seen = getattr(block, "seen", [])
    hidden = block.first(x)
    block.seen.append(hidden)
    return block.second(hidden)


class Counting(nn.Module):
    """Changes a buffer in each forward pass."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return x


FREE = {
    "activation": lambda: Outer(Block()),
    "sequential": lambda: nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 7)),
    "norm without parameters": lambda: Outer(Block(nn.LayerNorm(10, elementwise_affine=False))),
    "a slope for all": lambda: Outer(Block(nn.PReLU())),
    "called in parts": lambda: Outer(
        Block(forward=lambda b, x: torch.cat([b.second(b.first(part).relu()) for part in x.split(2)]))
    ),
    "block called twice": lambda: Outer(Block(), lambda block, x: block(2 * x)),
    "layer under two names": lambda: Outer(Block(other=None)),
}


@pytest.mark.parametrize("name", FREE)
def test_free(name):
    model = FREE[name]()
    assert len(tried_in(model, X).free) == 1


FIXED = {
    "norm": lambda: Outer(Block(nn.LayerNorm(10))),
    "batch norm": lambda: Outer(Block(nn.BatchNorm1d(10))),
    "a slope for each": lambda: Outer(Block(nn.PReLU(10))),
    "softmax of groups": lambda: Outer(
        Block(forward=lambda b, x: b.second(b.first(x).view(5, 5, 2).softmax(-1).flatten(1)))
    ),
    "output used twice": lambda: Outer(Block(forward=lambda b, x: (b.second(b.first(x)), b.first(x)[:, :7]))),
    "one channel used": lambda: Outer(Block(forward=lambda b, x: b.second(b.first(x)) + b.first(x)[:, :1])),
    "a layer that is not compressed": lambda: Outer(
        Block(other=nn.Linear(6, 10), forward=lambda b, x: b.second(b.first(x) * b.other(x.clone())))
    ),
    "always dropout": lambda: Outer(Block(forward=lambda b, x: b.second(dropout(b.first(x), training=True)))),
    "no effect": lambda: Outer(Block(forward=lambda b, x: 0 * b.second(b.first(x)))),
    "attribute": lambda: Outer(Block(forward=kept)),
    "list": lambda: Outer(Block(forward=appended)),
    "buffer": lambda: Outer(Block(Counting())),
    "layer called from outside": lambda: Outer(Block(), lambda block, x: block.first(x)),
}


@pytest.mark.parametrize("name", FIXED)
def test_not_free(name):
    model = FIXED[name]().eval()
    before, random = state_of(model), torch.get_rng_state()
    expected = model(X) if "dropout" not in name else None
    torch.set_rng_state(random)
    widths = tried_in(model, X, ignore=["block.other"])
    assert widths.verdicts
    assert not widths.free
    if name not in ("buffer", "always dropout"):
        assert_same_state(before, state_of(model))
        torch.testing.assert_close(model(X), expected, rtol=0, atol=0)


def test_a_block_that_counts_its_passes_in_a_buffer_counts_the_batch_once():
    model = Outer(Block(Counting()))
    tried_in(model, X)
    assert model.block.between.count == 1


def test_attention_is_not_free():
    widths = tried_in(tiny_llama(num_key_value_heads=4), token_batches(1)[0])
    assert not any("self_attn" in name for width in widths.free for name in width.members)
    assert any("self_attn" in width.consumer for width in widths.verdicts)


def test_foreign_hooks_are_not_called_again_and_leave_nothing_proved():
    model, calls = Outer(Block()), []
    handle = model.block.first.register_forward_hook(lambda *_: calls.append(1))
    assert not tried_in(model, X).free
    assert len(calls) == 1
    handle.remove()
    model.block.register_forward_hook(lambda *_: calls.append(2))
    assert len(tried_in(model, X).free) == 1
    assert calls == [1, 2]


def test_layers_shared_by_two_blocks_are_not_free():
    one, two = Block(), Block()
    two.first = one.first
    widths = tried_in(nn.Sequential(one, nn.Linear(7, 6), two), X)
    assert [width for width, free in widths.verdicts.items() if free] == [Width(("0.second",), "1")]


def test_a_block_under_two_names_is_free():
    block = Block()
    model = Outer(block)
    model.again = block
    assert len(tried_in(model, X).free) == 1


def test_experts_are_tried_in_the_first_batch_that_reaches_them():
    experts = nn.ModuleList(Block() for _ in range(3))
    model = Outer(Block())
    model.experts = experts

    def run(model, batch):
        x, index = batch
        return model.experts[index](x)

    widths = tried_in(model, (X, 0), (X, 2), (X, 0), run=run)
    assert [width.consumer for width in widths.free] == ["experts.0.second", "experts.2.second"]


class TwoPaths(nn.Module):
    """Layers whose hidden width another layer reads too, if asked."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.other = nn.Linear(6, 10), nn.Linear(10, 6), nn.Linear(10, 6)

    def forward(self, x, other=False):
        hidden = self.first(x).relu()
        return self.second(hidden) + self.other(hidden) if other else self.second(hidden)


@pytest.mark.parametrize("ignore", [(), ("0.other",)])
def test_a_width_that_a_later_batch_reads_elsewhere_is_not_free(ignore):
    model = nn.Sequential(TwoPaths())

    def run(model, batch):
        return model[0](X, batch)

    assert len(tried_in(model, False, False, run=run, ignore=ignore).free) == 1
    assert not tried_in(model, False, True, run=run, ignore=ignore).free
    assert not tried_in(model, True, False, run=run, ignore=ignore).free


def test_a_width_that_a_later_batch_leaves_out_in_part_is_not_free():
    model = nn.Sequential(Block())
    parts = lambda model, batch: model(X) if batch else model[0].first(X)  # noqa: E731
    assert len(tried_in(model, True, True, run=parts).free) == 1
    assert not tried_in(model, True, False, run=parts).free


def test_a_chain_of_layers_has_a_width_between_any_two():
    model = nn.Sequential(*[part for _ in range(3) for part in (nn.Linear(6, 6), nn.Tanh())])
    assert tried_in(model, X).free == [Width(("0",), "2"), Width(("2",), "4")]


def test_a_module_of_many_layers_is_not_run_again():
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(17)])
    assert not tried_in(model, X).verdicts


def test_arguments_that_may_change_are_not_given_twice():
    class Takes(Block):
        def forward(self, x, cache):
            return super().forward(x) + len(cache.seen)

    model = Takes()
    widths = tried_in(Outer(model), X, run=lambda m, x: m.block(x, SimpleNamespace(seen=[])))
    assert widths.verdicts
    assert not widths.free


def test_an_input_changed_in_place_is_changed_once():
    def forward(block, x):
        x += 1
        return block.second(block.first(x * 1))

    x = X.clone()
    assert len(tried_in(Outer(Block(forward=forward)), x).free) == 1
    torch.testing.assert_close(x, X + 1)


def test_one_process_that_finds_no_freedom_overrules_the_others():
    def state(**verdicts):
        return [[[f"{name}1"], f"{name}2", free] for name, free in verdicts.items()]

    merged = FreeWidths.of_all([state(a=True, b=True), state(b=False), state(c=True)])
    assert merged.free == [Width(("a1",), "a2"), Width(("c1",), "c2")]
    again = FreeWidths()
    again.load_state_dict(merged.state_dict())
    assert again.verdicts == merged.verdicts
