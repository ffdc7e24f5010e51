"""Choice of `memory` and `offload` by limits of memory."""

import copy
import logging
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from support.callbacks import short
from support.models import CausalLM, assert_same_state, loader, state_of, tiny_llama, token_batches, trainer
from torch import nn

from zssvd_lightning.compression.memory.extent import Beside, Extent
from zssvd_lightning.compression.memory.limits import WAYS, choose, ways
from zssvd_lightning.compression.memory.needs import Formulas
from zssvd_lightning.compression.pipeline import calibrate, compress, plan, refuse_beforehand
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.errors import ContradictionError, MemoryLimitError
from zssvd_lightning.offload import media
from zssvd_lightning.whitening.cholesky import Root
from zssvd_lightning.whitening.kept_roots import KeptRoots

GPU, CPU = torch.device("cuda"), torch.device("cpu")
SIDE, LAYERS = 1024, 12
SHAPES = {f"{number}": (SIDE, SIDE) for number in range(LAYERS)}
EXTENT = Extent(
    SHAPES,
    {name: name for name in SHAPES},
    tuple((name,) for name in SHAPES),
    weights=4 * SIDE * SIDE * LAYERS,
    width=4,
    whole_pass=400_000_000,
    part_pass=50_000_000,
    seen=True,
)


def config_of(**settings):
    return CompressionConfig.of("best", prune_ratio=0.3, **settings)


def needs_of(config):
    return Formulas(EXTENT, config, config.budget_over(SHAPES, {}, 0)).needs(roots=False)


def chosen(config, device=GPU, **more):
    return choose(config, EXTENT, config.budget_over(SHAPES, {}, 0), device, **more)


def pair(config):
    return config.memory, config.place if config.memory == "whole" else "none"


@pytest.mark.parametrize("corrections", [0, 3])
@pytest.mark.parametrize("apart", [True, False], ids=["gpu", "cpu"])
def test_the_fastest_way_within_a_limit_is_chosen(corrections, apart):
    config, device = config_of(corrections=corrections), GPU if apart else CPU
    every = list(ways(config, apart=apart))
    assert [pair(way) for way in every] == [way for way in WAYS if apart or way != ("whole", "cpu")]
    needs = [needs_of(way) for way in every]
    sizes = [need.device if apart else need.together for need in needs]
    for limit in (*sizes, *(size - 1 for size in sizes)):
        fitting = [way for way, size in zip(every, sizes, strict=True) if size <= limit]
        asked = replace(config, max_memory=limit)
        if fitting:
            choice = chosen(asked, device)
            assert pair(choice.config) == pair(fitting[0])
            assert choice.room == limit - sizes[every.index(fitting[0])]
            assert f"memory {fitting[0].memory!r}" in choice.line
        else:
            with pytest.raises(MemoryLimitError, match=r"no way is within .* needs .* GiB"):
                chosen(asked, device)


def test_a_model_without_blocks_does_not_run_by_blocks():
    config = config_of()
    limit = needs_of(replace(config, memory="blocks")).together
    within = replace(config, max_memory=limit)
    assert pair(chosen(within, CPU).config) == ("blocks", "none")
    alone = replace(EXTENT, blocks=(tuple(SHAPES),), part_pass=EXTENT.whole_pass)
    with pytest.raises(MemoryLimitError) as refused:
        choose(replace(config, max_memory=1), alone, config.budget_over(SHAPES, {}, 0), CPU)
    assert "memory 'blocks'" not in str(refused.value)


def test_the_limit_of_the_host_leads_to_the_disk_and_a_full_disk_away_from_it(monkeypatch):
    config = config_of(corrections=0)
    whole, cpu, blocks, _ = (needs_of(way) for way in ways(config))
    assert blocks.device < cpu.device < whole.device
    limits = {"max_memory": cpu.device, "max_host_memory": cpu.host}
    assert pair(chosen(replace(config, **limits)).config) == ("whole", "cpu")
    limits["max_host_memory"] = cpu.host - 1
    assert pair(chosen(replace(config, **limits)).config) == ("blocks", "none")
    assert pair(chosen(replace(config, **limits), blocks=False).config) == ("whole", "disk")
    monkeypatch.setattr("zssvd_lightning.compression.memory.limits.free_disk", lambda: 1000)
    with pytest.raises(MemoryLimitError, match="of scratch files"):
        chosen(replace(config, **limits))


def test_a_given_way_stays_and_the_refusal_names_the_one_that_would_do():
    config = config_of(corrections=0, memory="whole", offload="none")
    blocks = needs_of(replace(config, memory="blocks", offload="none"))
    with pytest.raises(MemoryLimitError, match=r"memory='blocks' \([\d.]+ GiB\)") as refused:
        chosen(replace(config, max_memory=blocks.device))
    assert "offload 'none' needs" in str(refused.value)
    assert pair(chosen(replace(config, max_memory="1TiB")).config) == ("whole", "none")
    given = replace(config, memory="blocks", offload="auto", max_memory="1TiB")
    assert pair(chosen(given).config) == ("blocks", "none")
    disk = replace(config, memory="auto", offload="disk", max_memory="1TiB")
    assert pair(chosen(disk).config) == ("whole", "disk")


def test_corrections_are_named_where_leaving_them_out_is_enough():
    config = config_of(corrections=3, memory="whole", offload="none")
    without = needs_of(replace(config, corrections=0))
    with pytest.raises(MemoryLimitError, match=r"corrections=0 with memory 'whole' with offload 'none'"):
        chosen(replace(config, max_memory=without.device))


def test_refits_have_no_blocks():
    config = CompressionConfig.of("mpifa", prune_ratio=0.3)
    assert "blocks" not in {way.memory for way in ways(config)}


def test_roots_that_are_kept_count_where_corrections_use_them_again():
    for settings, kept in (({"corrections": 3}, True), ({"corrections": 0}, False)):
        config = config_of(**settings)
        formulas = Formulas(EXTENT, config, config.budget_over(SHAPES, {}, 0))
        assert (formulas.kept_roots > 0) is kept
        assert formulas.needs().device - formulas.needs(roots=False).device == formulas.kept_roots


def test_roots_stay_within_their_limit():
    roots, moment = KeptRoots(), torch.eye(16)

    def keep(key):
        roots.root(key, moment, 1.0, torch.float32, lambda: Root(torch.eye(16, dtype=torch.float64)))

    roots.most = 2 * 16 * 16 * 4
    for key in "abc":
        keep(key)
    assert roots.nbytes == roots.most


def run(model, **settings):
    torch.manual_seed(0)
    options = {"prune_ratio": 0.3, "corrections": 0, "progress": False, "preset": "zs-svd"}
    return compress(model, token_batches(2), **(options | settings))


def test_a_compression_says_what_it_chose_and_gives_the_same(caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="zssvd_lightning")
    model = tiny_llama(num_hidden_layers=3)
    plain, limited = copy.deepcopy(model), copy.deepcopy(model)
    run(plain)
    sizes = needs_of_ways(model)
    assert sizes["blocks"] < sizes["whole"]
    caplog.clear()
    run(limited, max_memory=sizes["whole"] - 1)
    (line,) = [record.message for record in caplog.records if "is chosen within" in record.message]
    assert line.startswith("memory 'blocks' is chosen")
    assert "because memory 'whole' with offload 'none' needs" in line
    assert "not counted" not in line
    for one, other in zip(plain.parameters(), limited.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def needs_of_ways(model):
    """Bytes of the ways for the model of `run`, as its refusal states them."""
    found = {}

    def note(config, extent, budget, device, **settings):
        for way in ways(config, apart=False):
            if way.place != "disk" or way.by_blocks:
                found[way.memory] = Formulas(extent, way, budget).needs(roots=False).together
        return choose(config, extent, budget, device, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zssvd_lightning.compression.memory.limits.choose", note)
        run(copy.deepcopy(model), max_memory="1TiB")
    return found


def test_too_little_is_refused_before_the_first_batch_and_changes_nothing():
    model, runs = tiny_llama(), []
    model.register_forward_pre_hook(lambda *_: runs.append(None) if not is_fake(model) else None)
    before = state_of(model)
    config = CompressionConfig.of("zs-svd", max_memory="100MB")
    for function in (compress, plan, refuse_beforehand):
        with pytest.raises(MemoryLimitError, match=r"needs 0\.\d+ GiB of memory.* weights alone"):
            function(model, token_batches(2), config, progress=False)
    assert_same_state(before, state_of(model))
    assert refuse_beforehand(model, token_batches(2), replace(config, max_memory="1TiB")) is None


def is_fake(model):
    return any(parameter.is_meta for parameter in model.parameters())


def test_the_measuring_pass_leaves_the_model_and_the_order_of_batches():
    model = tiny_llama().train()
    own = torch.Generator().manual_seed(3)
    order = torch.utils.data.RandomSampler(range(6), generator=own)
    batches = torch.utils.data.DataLoader(token_batches(6), batch_size=None, sampler=order)
    state = own.get_state()
    before = state_of(model)
    torch.manual_seed(1)
    refuse_beforehand(model, batches, CompressionConfig.of("zs-svd", max_memory="1TiB"))
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    assert torch.equal(own.get_state(), state)
    assert_same_state(before, state_of(model))
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())


def test_batches_that_come_only_once_are_not_measured(caplog):
    model, config = tiny_llama(), CompressionConfig.of("zs-svd", corrections=0, max_memory="1TiB")
    caplog.set_level(logging.INFO, logger="zssvd_lightning")
    compress(model, iter(token_batches(2)), config, progress=False)
    assert "activations of a batch are not known" in caplog.text


def test_statistics_in_memory_have_no_limits():
    with pytest.raises(ContradictionError, match="max_memory cannot change"):
        calibrate(tiny_llama(), token_batches(1), max_memory="1TiB")
    model, batches = tiny_llama(), token_batches(2)
    statistics = calibrate(model, batches, preset="zs-svd", progress=False)
    with pytest.raises(ContradictionError, match="statistics are in memory as a whole, so max_memory"):
        compress(model, batches, preset="zs-svd", statistics=statistics, max_memory="1TiB", progress=False)


def test_a_fit_chooses_an_offload_or_is_refused():
    module = CausalLM()
    before = state_of(module)
    with pytest.raises(MemoryLimitError, match="before the fit"):
        trainer(short(calibration_batches=2, max_memory="100MB"), max_steps=40).fit(module, loader(token_batches(8)))
    assert_same_state(before, state_of(module))
    callback = short(calibration_batches=2, corrections=0, max_memory="1TiB")
    trainer(callback, max_steps=8).fit(module, loader(token_batches(8)))
    assert callback.report is not None


def test_more_offload_takes_less_of_the_device():
    for settings in ({"corrections": 0}, {"corrections": 3}, {"truncations": 2, "corrections": 0}):
        by_way = {pair(way): needs_of(way) for way in ways(config_of(**settings))}
        devices = [by_way[way].device for way in (("whole", "none"), ("whole", "cpu"), ("blocks", "none"))]
        assert all(more > less for more, less in pairwise(devices))
        assert by_way["whole", "cpu"].host > by_way["whole", "disk"].host
        assert by_way["whole", "disk"].disk > 0 == by_way["whole", "cpu"].disk


def test_free_room_is_that_of_the_folder_of_scratch_files():
    assert media.free_disk() > 0


def test_the_state_of_an_optimizer_counts_where_it_is():
    def needs(parks, place, state):
        config = config_of(corrections=0, memory="whole", offload=place)
        extent = replace(EXTENT, beside=Beside(state, parks))
        return Formulas(extent, config, config.budget_over(SHAPES, {}, 0)).needs()

    for (parks, place), counted in {
        (False, "cpu"): (1, 0, 1, 0),
        ("auto", "none"): (1, 0, 1, 0),
        ("auto", "cpu"): (0, 1, 1, 0),
        ("auto", "disk"): (0, 0, 1, 1),
        (True, "none"): (0, 1, 1, 0),
        (True, "disk"): (0, 0, 0, 1),
    }.items():
        without, found = needs(parks, place, 0), needs(parks, place, 1000)
        assert tuple(b - a for a, b in zip(without, found, strict=True)) == tuple(1000 * n for n in (*counted, 0))
    assert needs(True, "cpu", 2**50).device == EXTENT.weights + 2**50  # it is there before the compression
