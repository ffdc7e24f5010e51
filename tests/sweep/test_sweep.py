"""The sweep against whole passes over the same models and batches."""

import copy
import errno
import os
import shutil
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.models import (
    FAMILIES,
    assert_same_state,
    padded_batches,
    state_of,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    token_batches,
)
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from zssvd_lightning import ZSSVDCallback, compress
from zssvd_lightning.compression.memory.needs import Extent, Formulas
from zssvd_lightning.compression.pipeline import calibrate, plan
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.decomposition.in_parts import DecompositionInParts
from zssvd_lightning.errors import CalibrationError, ConfigError, ContradictionError, LeftDenseWarning, OutputError
from zssvd_lightning.layers.base import CompressedLinear
from zssvd_lightning.model.targets import find_targets
from zssvd_lightning.offload.media import ScratchFile
from zssvd_lightning.whitening.moments import Moments

ONE_SHOT = {"prune_ratio": 0.3, "corrections": 0, "progress": False}


def compressed_both_ways(model, batches, **settings):
    """Reports and models of `memory` whole and blocks."""
    settings = ONE_SHOT | settings
    other = copy.deepcopy(model)
    whole = compress(model, batches, **settings)
    return (whole, model), (compress(other, batches, memory="blocks", **settings), other)


def assert_the_same(one, other, atol=1e-5):
    (whole, model), (blocks, swept) = one, other
    assert dict(whole.layers) == dict(blocks.layers)
    assert blocks.losses == pytest.approx(whole.losses, rel=1e-6)
    assert blocks.left_dense == whole.left_dense
    before, after = model.state_dict(), swept.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=atol, rtol=0)
    assert any(isinstance(module, CompressedLinear) for module in swept.modules())


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"preset": "zs-svd"}),
        ("gpt2", {"preset": "svd-llm"}),
        ("bert", {"preset": "best", "output_side": "sampled"}),
        ("vit", {"preset": "best"}),
        ("t5", {"preset": "zs-svd"}),
    ],
)
def test_every_family_ends_as_by_whole_passes(family, settings):
    torch.manual_seed(0)
    batches = padded_batches() if family in ("llama", "gpt2", "bert") else FAMILIES[family].batches()
    assert_the_same(*compressed_both_ways(FAMILIES[family].build(), batches, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "best", "corrections": 2},
        {"preset": "zs-svd-line-search", "corrections": 1},
        {"preset": "best", "reestimate": True, "storage": "mixed"},
        {"preset": "zs-svd", "selection": "abs_delta_unordered", "storage": "remap", "rows_in_16_bits": "loss_aware"},
        {"preset": "best", "corrections": 1, "fresh_moments": True, "truncations": 2},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_corrections_curvature_and_8_bits_are_those_of_whole_passes(settings):
    torch.manual_seed(0)
    assert_the_same(*compressed_both_ways(tiny_bert(), token_batches(2), correction_batches=1, **settings))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype):
    torch.manual_seed(0)
    assert_the_same(*compressed_both_ways(tiny_llama().to(dtype), padded_batches(2), preset="svd-llm"))


def test_a_plan_is_that_of_whole_passes():
    torch.manual_seed(0)
    model = tiny_gpt2()
    before = state_of(model)
    plans = [plan(model, padded_batches(2), **ONE_SHOT, preset="zs-svd", memory=way) for way in ("whole", "blocks")]
    assert plans[0].ranks == plans[1].ranks
    assert_same_state(before, state_of(model))


class Block(nn.Module):
    """A residual layer, with experts of which the signs of the input choose one for each token."""

    def __init__(self, experts=0):
        super().__init__()
        self.mix = nn.Linear(12, 12)
        self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(experts))

    def forward(self, scale=1.0, x=None, shift=0.0):
        x = x + scale * torch.tanh(self.mix(x + shift))
        for number, expert in enumerate(self.experts):
            chosen = (x.detach().sum(-1) > 0).long() % len(self.experts) == number
            x = x.index_put((chosen,), x[chosen] + torch.tanh(expert(x[chosen])))
        return x


class Stacked(nn.Module):
    """Two lists of blocks, with layers before, between and after them."""

    def __init__(self, experts=2):
        super().__init__()
        self.before = nn.Linear(8, 12)
        self.lower = nn.ModuleList(Block(experts) for _ in range(3))
        self.between = nn.Linear(12, 12)
        self.upper = nn.ModuleList(Block() for _ in range(2))
        self.after = nn.Linear(12, 12)
        self.head = nn.Linear(12, 4)
        self.forms = {}

    def forward(self, x):
        x = torch.tanh(self.before(x))
        states, first = [], x if self.forms.get("reads first") else 0.0
        for block in self.lower:
            x = block(0.5, x, shift=first)
            states.append(x)
        side = torch.tanh(self.between(x)) if self.forms.get("gives side") else 1.0
        x = x + torch.tanh(self.between(x)) * self.forms.get("scale", 1.0)
        for block in self.upper:
            x = x + 0.0 if self.forms.get("new tensor between blocks") else x
            x = block(side, x)
        x = x + (states[0] if self.forms.get("skip") else 0.0)
        if self.forms.get("reads inside"):
            x = x + 0.1 * self.upper[0].mix.weight.sum()
        return self.head(self.after(x))


def examples(count=3):
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(40, 8, generator=g), torch.randint(4, (40,), generator=g)) for _ in range(count)]


def example_loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


BY_EXAMPLE = {"loss": example_loss, "terms": lambda batch: len(batch[1])}


@pytest.mark.parametrize(
    ("form", "preset"), [(None, "zs-svd"), ("skip", "best"), ("gives side", "best"), ("reads first", "best")]
)
def test_layers_outside_of_the_blocks_and_paths_around_them(form, preset):
    torch.manual_seed(0)
    model = Stacked()
    model.forms[form] = True
    both = compressed_both_ways(model, DataLoader(examples(), batch_size=None), preset=preset, **BY_EXAMPLE)
    assert_the_same(*both)
    assert {"before", "between", "after", "lower.1.experts.1", "upper.1.mix"} <= both[1][0].layers.keys()


class Frozen(Stacked):
    """The first blocks run without gradients."""

    def forward(self, x):
        x = torch.tanh(self.before(x))
        with torch.no_grad():
            for block in self.lower:
                x = block(1.0, x)
        x = self.between(x)
        for block in self.upper:
            x = block(1.0, x)
        return self.head(self.after(x))


def test_blocks_without_gradients_stay_dense():
    torch.manual_seed(0)
    with pytest.warns(LeftDenseWarning, match="no gradient came back"):
        both = compressed_both_ways(Frozen(experts=0), examples(), preset="zs-svd", **BY_EXAMPLE)
    assert_the_same(*both)
    assert both[1][0].left_dense.keys() == {"before", "lower.0.mix", "lower.1.mix", "lower.2.mix"}


def test_a_sequence_of_layers_has_blocks_too():
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Linear(8, 8), nn.Tanh())]
    both = compressed_both_ways(nn.Sequential(*layers, nn.Linear(8, 4)), examples(), preset="zs-svd", **BY_EXAMPLE)
    assert_the_same(*both)


def test_a_loss_that_depends_on_the_inside_of_a_block_is_refused_by_name():
    model = Stacked(experts=0)
    model.forms["reads inside"] = True
    before = state_of(model)
    with pytest.raises(CalibrationError, match=r"the loss depends on upper\.0\.mix, inside.*memory to 'whole'"):
        compress(model, examples(), **ONE_SHOT, preset="zs-svd", memory="blocks", **BY_EXAMPLE)
    assert_same_state(before, state_of(model))


def test_a_later_batch_that_reads_the_inside_of_a_block_is_refused():
    model, batches = Stacked(experts=0), examples()

    def loss(model, batch):
        added = model.upper[0].mix.weight.sum() if batch[0] is batches[1][0] else 0.0
        return example_loss(model, batch) + added

    with pytest.raises(CalibrationError, match=r"depends on upper\.0\.mix other than in the first batch"):
        compress(model, batches, **ONE_SHOT, preset="zs-svd", memory="blocks", **BY_EXAMPLE | {"loss": loss})


def test_layers_of_lists_that_are_no_blocks_are_outside_and_named(caplog):
    model = Stacked(experts=0)
    model.forms["new tensor between blocks"] = True
    assert_the_same(*compressed_both_ways(model, examples(), preset="zs-svd", **BY_EXAMPLE))
    assert "of layers outside of lower, are in memory together" in caplog.text
    assert "upper: upper.1 does not run on the output of the one before it" in caplog.text


class Buffered(Stacked):
    """Blocks whose hooks change what they get, after a first one that reads ids, and a shift that changes in place."""

    def __init__(self):
        super().__init__(experts=0)
        self.before = self.between = self.after = None
        self.lower = nn.Sequential(nn.Embedding(30, 12), *[Block() for _ in range(3)])
        for block in self.lower[1:]:
            block.register_forward_pre_hook(lambda module, args: (1.0, args[0] * 1.1))

    def forward(self, ids):
        x, shift = self.lower(ids), torch.zeros(12)
        for block in self.upper:
            x = block(1.0, x, shift=shift)
            shift += 0.5
        return self.head(x.mean(1))


def test_ids_hooks_and_arguments_that_change_in_place():
    g = torch.Generator().manual_seed(3)
    batches = [(torch.randint(30, (16, 5), generator=g), torch.randint(4, (16,), generator=g)) for _ in range(2)]
    assert_the_same(*compressed_both_ways(Buffered(), batches, preset="zs-svd", **BY_EXAMPLE))


def test_layers_of_one_block_and_a_loss_of_all_hidden_states():
    def loss(model, batch):
        output = model(**batch, output_hidden_states=True)
        return output.loss + sum(states.square().mean() for states in output.hidden_states)

    settings = {"preset": "zs-svd", "include": ["*.1.mlp.*"], "loss": loss}
    assert_the_same(*compressed_both_ways(tiny_llama(num_hidden_layers=3), token_batches(2), **settings))


def test_a_model_without_blocks_is_refused_by_name():
    model = nn.ModuleDict({"one": nn.Linear(8, 8), "two": nn.Linear(8, 4)})

    def loss(model, batch):
        return cross_entropy(model["two"](torch.tanh(model["one"](batch[0]))), batch[1])

    with pytest.raises(CalibrationError, match=r"no list of blocks that run one after the other.*memory to 'whole'"):
        compress(model, examples(), **ONE_SHOT, preset="zs-svd", memory="blocks", **BY_EXAMPLE | {"loss": loss})


def test_blocks_that_change_from_run_to_run_are_refused():
    model = Stacked(experts=0)
    runs = []

    def noise(module, args, output):
        runs.append(None)
        return output + len(runs)

    model.upper[0].mix.register_forward_hook(noise)
    with pytest.raises(CalibrationError, match=r"upper\.0 returns other numbers when it runs again"):
        compress(model, examples(), **ONE_SHOT, preset="zs-svd", memory="blocks", **BY_EXAMPLE)


def test_a_batch_that_leaves_a_block_out_is_refused():
    model, batches = Stacked(experts=0), examples()

    def loss(model, batch):
        if batch[0] is batches[2][0]:
            return model.head(model.upper[0](1.0, model.between(model.before(batch[0])))).square().mean()
        return example_loss(model, batch)

    with pytest.raises(CalibrationError, match=r"runs? (in another order|between blocks)"):
        compress(model, batches, **ONE_SHOT, preset="zs-svd", memory="blocks", **BY_EXAMPLE | {"loss": loss})


def test_what_needs_all_statistics_at_once_is_refused_before_the_first_batch():
    with pytest.raises(ContradictionError, match=r"'refit'.*memory to 'whole'"):
        compress(tiny_gpt2(), [], preset="mpifa", memory="blocks")
    with pytest.raises(ContradictionError, match="memory cannot be 'blocks'"):
        calibrate(tiny_gpt2(), [], **ONE_SHOT, preset="zs-svd", memory="blocks")
    statistics = calibrate(tiny_gpt2(), token_batches(1), preset="zs-svd", progress=False)
    with pytest.raises(ContradictionError, match="memory cannot be 'blocks'"):
        compress(tiny_gpt2(), [], statistics=statistics, **ONE_SHOT, preset="zs-svd", memory="blocks")
    with pytest.raises(ConfigError, match=r"memory 'blocks'.*which a Trainer does not"):
        ZSSVDCallback(preset="zs-svd", memory="blocks")
    with pytest.raises(ConfigError, match="memory"):
        compress(tiny_gpt2(), [], preset="zs-svd", memory="block")


@pytest.mark.parametrize(("memory", "most"), [("whole", 3), ("blocks", 1)])
def test_the_number_of_blocks_whose_second_moments_are_in_memory(memory, most, monkeypatch):
    alive, numbers, add_inputs = {}, [], Moments.add_inputs

    def counted(self, leader, X):
        add_inputs(self, leader, X)
        alive[id(self)] = weakref.ref(self)
        every = [moments for reference in alive.values() if (moments := reference()) is not None]
        names = {name for moments in every if isinstance(moments.input_sums, dict) for name in moments.input_sums}
        numbers.append(len({name.split(".")[2] for name in names}))

    monkeypatch.setattr(Moments, "add_inputs", counted)
    compress(tiny_llama(num_hidden_layers=3), token_batches(2), **ONE_SHOT, preset="zs-svd", memory=memory)
    assert max(numbers) == most


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("place", ["sweep.backward.BackwardSweep._send_back", "compression.engine.mark"])
def test_a_run_that_fails_leaves_the_model_as_it_was_and_no_files(place, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = tiny_gpt2()
    before, calls = state_of(model), []

    def fail_once(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise StoppedError

    monkeypatch.setattr(f"zssvd_lightning.{place}", fail_once)
    with pytest.raises(StoppedError):
        compress(model, token_batches(2), **ONE_SHOT, preset="zs-svd", memory="blocks")
    assert_same_state(before, state_of(model))
    assert list(tmp_path.iterdir()) == []


def test_an_error_inside_of_a_block_leaves_the_model_and_autograd_as_they_were():
    model, calls = tiny_gpt2(), []

    def fail_in_second_batch(module, args):
        calls.append(None)
        if len(calls) == 4:  # two passes examine the model
            raise KeyboardInterrupt

    model.transformer.h[1].mlp.c_fc.register_forward_pre_hook(fail_in_second_batch)
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        compress(model, token_batches(2), **ONE_SHOT, preset="zs-svd", memory="blocks")
    assert_same_state(before, state_of(model))
    model(**token_batches(1)[0]).loss.backward()
    assert model.transformer.h[0].mlp.c_fc.weight.grad.any()


@pytest.fixture
def written(monkeypatch):
    """Largest number of bytes in scratch files at the same time, as [bytes], and the files."""
    files, most, put = weakref.WeakSet(), [0], ScratchFile.put

    def counted(self, tensor, over):
        files.add(self)
        place = put(self, tensor, over)
        most[0] = max(most[0], sum(file._end for file in files))
        return place

    monkeypatch.setattr(ScratchFile, "put", counted)
    return most


@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "zs-svd", "corrections": 0},
        {"preset": "best", "corrections": 0},
        {"preset": "best", "corrections": 2, "correction_batches": 2},
        {"preset": "zs-svd", "corrections": 1, "correction_batches": 2},
    ],
    ids=lambda settings: f"{settings['preset']}-{settings['corrections']}",
)
def test_scratch_files_hold_what_the_formula_says_and_no_statistics_without_need(settings, written):
    model, batches = tiny_llama(num_hidden_layers=4), token_batches(2)
    config = CompressionConfig.of(prune_ratio=0.3, memory="blocks", **settings)
    targets = find_targets(model)
    shapes = {name: target.shape for name, target in targets.items()}
    budget = config.budget_over(shapes, {}, 0)
    statistics = calibrate(model, batches, CompressionConfig.of(settings["preset"]), progress=False)
    known = replace(
        Extent.of_layers(shapes, 4),
        leaders=statistics.leaders,
        stored=4 * batches[0]["input_ids"].numel() * model.config.hidden_size * 4 * len(batches),
    )
    formulas = Formulas(known, config, budget)
    moments = formulas.second_moments(shapes) + formulas.gradients(shapes)
    assert moments == sum(
        t.nbytes for s in ("input", "output", "gradient") for t in vars(statistics)[f"{s}_sums"].values()
    )
    compress(model, batches, config, progress=False)
    assert 0.75 * formulas.disk < written[0] < 1.1 * formulas.disk
    if not config.corrections:
        assert written[0] < formulas.stored_spectra + formulas.originals + formulas.factors + 0.1 * moments


def test_a_disk_without_room_is_refused_before_the_first_batch(monkeypatch):
    model = tiny_gpt2()
    before = state_of(model)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    for function in (compress, plan):
        with pytest.raises(OutputError, match=r"needs up to .* GB of scratch files.*0\.00 GB are free.*TMPDIR"):
            function(model, unread(), **ONE_SHOT, preset="zs-svd", memory="blocks")
    assert_same_state(before, state_of(model))


def unread():
    raise AssertionError("a batch was read")
    yield


def test_hidden_states_of_all_batches_without_room_are_refused_after_the_first(monkeypatch, written):
    model, runs = tiny_gpt2(), []
    batches = token_batches(1) * 1000
    model.transformer.h[0].register_forward_pre_hook(lambda *_: runs.append(None))
    before = state_of(model)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=5_000_000))
    with pytest.raises(OutputError, match=r"needs up to .* GB of scratch files"):
        compress(model, batches, **ONE_SHOT, preset="zs-svd", memory="blocks")
    assert len(runs) == 3  # two passes examine the model
    assert_same_state(before, state_of(model))


def test_a_disk_is_judged_at_the_start_alone_and_not_by_what_is_on_it_already(monkeypatch):
    needed = []
    monkeypatch.setattr("zssvd_lightning.compression.memory.statements.refuse_too_little", needed.append)
    settings = ONE_SHOT | {"corrections": 2, "correction_batches": 1, "preset": "zs-svd", "memory": "blocks"}
    compress(tiny_gpt2(), token_batches(2), **settings)
    assert len(needed) == 2
    assert all(size > 0 for size in needed)


@pytest.mark.skipif(os.name != "posix", reason="files without names are POSIX")
def test_scratch_files_have_no_names_so_that_they_end_with_the_process(tmp_path, monkeypatch, written):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen, take = [], DecompositionInParts.take

    def looking(self, *args):
        take(self, *args)
        seen.append((written[0], list(tmp_path.iterdir())))

    monkeypatch.setattr(DecompositionInParts, "take", looking)
    compress(tiny_gpt2(), token_batches(2), **ONE_SHOT, preset="zs-svd", memory="blocks")
    assert len(seen) > 2
    assert all(size > 0 and names == [] for size, names in seen)


def test_a_full_disk_is_said_and_nothing_is_lost(monkeypatch):
    model = tiny_gpt2()
    before = state_of(model)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Path("/dev/full").open("r+b", buffering=0))  # noqa: SIM115
    with pytest.raises(OutputError, match=r"scratch files.*TMPDIR") as refused:
        compress(model, token_batches(2), **ONE_SHOT, preset="zs-svd", memory="blocks")
    assert refused.value.__cause__.errno == errno.ENOSPC
    assert_same_state(before, state_of(model))
