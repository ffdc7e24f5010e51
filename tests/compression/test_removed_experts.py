"""Removal of whole experts: estimates, selection, and what is left of them."""

import copy
import io
import sys

import pytest
import torch
from support.experts import FAMILIES, lopsided_experts, tiny_experts
from support.models import assert_same_state, state_of, token_batches
from torch.nn.parallel import replicate

from zssvd_lightning import (
    CompressionConfig,
    ZSSVDCallback,
    compress,
    from_pretrained,
    load_state_dict,
    merge,
    save_pretrained,
)
from zssvd_lightning.calibration.routing.removals import changes_of_loss, possible_removals
from zssvd_lightning.compression.pipeline import calibrate, plan
from zssvd_lightning.errors import (
    CalibrationError,
    CheckpointError,
    ContradictionError,
    ExportError,
    LeftDenseWarning,
    TargetError,
)
from zssvd_lightning.layers.apart.experts import ExpertList
from zssvd_lightning.layers.apart.removed import RemovedLinear, forget, forgotten_by, router_beside, run_without
from zssvd_lightning.model.apart.routers import removable_experts

QUICK = {"preset": "zs-svd", "metric": "two_sided", "selection": "curvature", "corrections": 0, "progress": False}
REMOVES = QUICK | {"prune_ratio": 0.7, "remove_experts": True}
WITH_BIAS = ("gpt_oss", "deepseek_v3")


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


def routers_of(model):
    """The router of every layer of experts, by the name of the experts, with their number."""
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            count = len(module.experts if isinstance(module, ExpertList) else module.down_proj)
            yield name, router_beside(model, name, count), count


def removed_numbers(report):
    """The numbers of the removed experts by the name of their list."""
    found = {}
    for expert in report.removed_experts:
        name, _, number = expert.rpartition(".")
        found.setdefault(name, []).append(int(number))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_removed_saved_loaded_generated_and_merged(family, tmp_path):
    torch.manual_seed(0)
    model, batches = lopsided_experts(family), token_batches(2)
    untouched = copy.deepcopy(model)
    report = compress(model, batches, **REMOVES)
    removed = removed_numbers(report)
    assert removed
    assert report.reached >= 0.7
    for name, router, count in routers_of(model):
        gone = removed.get(name, [])
        assert forgotten_by(router) == sorted(gone)
        x = torch.randn(200, 32)
        assert not set(router(x)[2].flatten().tolist()) & set(gone)
        before = untouched.get_submodule(name.rpartition(".")[0])
        old = dict(before.named_children())["gate" if hasattr(before, "gate") else "router"]
        logits_before, logits_now = old(x)[0], router(x)[0]
        kept = [number for number in range(count) if number not in gone]
        torch.testing.assert_close(logits_now[:, kept], logits_before[:, kept])
        for number in gone:
            layers = model.get_submodule(f"{name}.{number}").children()
            assert all(isinstance(layer, RemovedLinear) and not list(layer.parameters()) for layer in layers)
            assert report.layers[f"{name}.{number}.down_proj"][:3:2] == (0, 0)
    assert report.model_parameters_after == sum(p.numel() for p in model.parameters())
    assert "experts removed" in str(report)

    if family in ("olmoe", "qwen3_moe", "granitemoe"):  # which are as Mixtral from here on
        return
    expected = logits(model, batches[0])
    save_pretrained(model, tmp_path / "saved", report=report)
    loaded = from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded, batches[0]), expected)
    prompt = batches[0]["input_ids"][:, :5]
    generated = loaded.generate(prompt, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, model.generate(prompt, max_new_tokens=3, do_sample=False))
    if family not in WITH_BIAS:
        before = state_of(loaded)
        with pytest.raises(ExportError, match=r"experts of model.* were removed, and an ordinary model would route"):
            merge(loaded)
        assert_same_state(before, state_of(loaded))
        return
    merge(loaded)
    torch.testing.assert_close(logits(loaded, batches[0]), expected, rtol=1e-3, atol=1e-5)
    loaded.save_pretrained(tmp_path / "dense")
    dense = type(loaded).from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(dense, batches[0]), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", *WITH_BIAS])
def test_copies_for_data_parallel_go_by_their_own_numbers(family, monkeypatch):
    model = lopsided_experts(family)
    compress(model, token_batches(2), **REMOVES)
    name = next(name for name, router, _ in routers_of(model) if forgotten_by(router))
    block, x = model.get_submodule(name.rpartition(".")[0]), torch.randn(4, 16, 32)

    def clones(tensors, devices, detach=False):  # in place of copies to several GPUs
        return [[tensor.clone() for tensor in tensors] for _ in devices]

    monkeypatch.setattr(sys.modules["torch.nn.parallel.replicate"], "_broadcast_coalesced_reshape", clones)

    def output_of(module):
        output = module(x)
        return output[0] if isinstance(output, tuple) else output

    expected = output_of(block)
    expected.sum().backward()
    gradients = {key: p.grad.clone() for key, p in block.named_parameters() if p.grad is not None}
    block.zero_grad()
    copies = replicate(block, [0, 1])
    for parameter in block.parameters():
        parameter.data.zero_()
    for each in copies:
        found = output_of(each)
        torch.testing.assert_close(found, expected)
        block.zero_grad()
        found.sum().backward()
        for key, gradient in gradients.items():
            torch.testing.assert_close(block.get_parameter(key).grad, gradient)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_estimates_are_the_change_of_the_loss_without_an_expert(family):
    """For a loss that is linear in the output of the experts, the first-order change is the change itself."""
    torch.manual_seed(0)
    model = lopsided_experts(family).double()
    for name, router, count in list(routers_of(model)):
        experts = ExpertList(model.get_submodule(name))
        x, D = torch.randn(50, 32, dtype=torch.float64), torch.randn(50, 32, dtype=torch.float64)
        with torch.no_grad():
            _, shares, chosen = router(x)
            found = changes_of_loss(experts, router, range(count), x, x, chosen, shares, D)
            for number in range(count):
                _, others, instead = run_without(router, [number], count, x)
                assert not (instead == number).any()
                change = experts(x, instead, others) - experts(x, chosen, shares)
                at_its_tokens = (chosen == number).any(1)
                torch.testing.assert_close(
                    found[at_its_tokens, number].double(), (change * D).sum(1)[at_its_tokens], rtol=1e-4, atol=1e-5
                )
                assert not found[~at_its_tokens, number].any()


def test_the_router_forgets_and_remembers():
    torch.manual_seed(0)
    for family in FAMILIES:
        model = lopsided_experts(family)
        before = state_of(model)
        _, router, count = next(iter(routers_of(model)))
        x = torch.randn(60, 32, requires_grad=True)
        expected = router(x)
        forget(router, [1], count)
        forget(router, [0], count)
        copied = copy.deepcopy(router)
        assert forgotten_by(copied) == [0]
        for each in (router, copied):
            scores, weights, chosen = each(x)
            assert not (chosen == 0).any()
            assert scores.shape == expected[0].shape
            assert (scores[:, 0] < -1e30).all() or family == "deepseek_v3"
        weights.sum().backward()
        assert x.grad.isfinite().all()
        with pytest.raises(RuntimeError):
            router(torch.randn(60, 31))
        forget(router, [], count)
        assert all(torch.equal(a, b) for a, b in zip(router(x), expected, strict=True))
        assert_same_state(before, state_of(model))


def test_a_router_that_forgets_is_never_changed(monkeypatch):
    torch.manual_seed(0)
    model = lopsided_experts()
    _, router, count = next(iter(routers_of(model)))
    forget(router, [1], count)
    seen, x, weight = [], torch.randn(60, 32), router.weight
    expected = router(x)
    stored = io.BytesIO()
    torch.save(router, stored)
    stored.seek(0)
    copies = copy.deepcopy(router), torch.load(stored, weights_only=False)
    router.register_forward_hook(lambda module, args, output: seen.append(output[0].shape[-1]))
    for again in copies:
        again.weight.data.neg_()
        assert forgotten_by(again) == [1]
        assert not torch.equal(again(x)[0], expected[0])
        assert all(torch.equal(one, other) for one, other in zip(router(x), expected, strict=True))
    assert set(seen) == {count}

    def interrupted(self, x):
        assert len(self.weight) == count - 1
        assert router.weight is weight
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(type(router), "forward", interrupted)
        router(x)
    assert router.weight is weight
    assert torch.equal(router(x)[0], expected[0])


def test_experts_that_are_not_reached_or_get_other_weights_are_not_removed(caplog):
    """The second list gets weights that its router does not return. The first one is not reached."""
    torch.manual_seed(0)
    model, batches = lopsided_experts(num_hidden_layers=3), token_batches(2)
    first, second = (model.model.layers[number].mlp for number in range(2))
    first.register_forward_hook(lambda module, args, output: args[0])
    second.experts.register_forward_pre_hook(lambda module, args: (*args[:2], args[2] * 2))
    with pytest.warns(LeftDenseWarning):
        report = compress(model, batches, **REMOVES | {"prune_ratio": 0.6})
    assert {expert[:15] for expert in report.removed_experts} == {"model.layers.2."}
    assert "no expert of model.layers.1.mlp.experts is removed: in a batch, they got other" in caplog.text
    assert "layers.0.mlp.experts is removed" not in caplog.text


def test_weights_without_experts_are_refused_by_a_model_without_their_router():
    torch.manual_seed(0)
    model = lopsided_experts("gpt_oss")
    compress(model, token_batches(2), **REMOVES)
    fresh = lopsided_experts("gpt_oss")
    for layer in fresh.model.layers:
        layer.mlp.twin = copy.deepcopy(layer.mlp.router)  # so that it is not known which one is theirs
    before, modules = state_of(fresh), dict(fresh.named_modules())
    with pytest.raises(CheckpointError, match="no router beside it has a row for each expert"):
        load_state_dict(fresh, model.state_dict(), strict=False)
    assert dict(fresh.named_modules()) == modules
    assert_same_state(before, state_of(fresh))


def test_the_losses_of_routers_see_all_experts():
    torch.manual_seed(0)
    model, batches = lopsided_experts(), token_batches(2)
    compress(model, batches, **REMOVES)
    with torch.no_grad():
        output = model.eval()(**batches[0], output_router_logits=True)
    assert all(each.shape[-1] == 4 for each in output.router_logits)
    assert output.aux_loss.isfinite()


def test_least_experts_remain():
    torch.manual_seed(0)
    model, batches = lopsided_experts("deepseek_v3"), token_batches(2)
    report = compress(model, batches, **REMOVES | {"prune_ratio": 0.9, "rank_multiple": 1})
    for numbers in removed_numbers(report).values():
        groups = [number // 4 for number in numbers]
        assert max(groups.count(group) for group in groups) <= 2


@pytest.mark.parametrize(("storage", "ratio"), [("pivoted", 0.75), ("hq", 0.88)])
def test_corrections_and_storages(storage, ratio, tmp_path):
    """Experts that are gone stay so through natural steps, and the loss stays that of the best state."""
    torch.manual_seed(0)
    model, batches = lopsided_experts("gpt_oss"), token_batches(3)
    settings = {
        "prune_ratio": ratio,
        "storage": storage,
        "corrections": 1 + (storage == "pivoted"),
        "correction_batches": 1,
    }
    report = compress(model, batches, **REMOVES | settings | {"correction_step": "natural", "rank_multiple": 1})
    assert report.removed_experts
    assert report.reached >= ratio
    for name, router, _ in routers_of(model):
        assert forgotten_by(router) == sorted(removed_numbers(report).get(name, []))
    save_pretrained(model, tmp_path / "saved")
    assert torch.equal(logits(from_pretrained(tmp_path / "saved"), batches[0]), logits(model, batches[0]))


def test_weights_load_into_other_forms_and_a_second_compression_leaves_removed_experts():
    torch.manual_seed(0)
    model, batches = lopsided_experts("gpt_oss"), token_batches(2)
    dense = copy.deepcopy(model)
    first = compress(model, batches, **REMOVES)
    fresh, expected = lopsided_experts("gpt_oss"), logits(model, batches[0])
    load_state_dict(fresh, model.state_dict())
    assert torch.equal(logits(fresh, batches[0]), expected)
    load_state_dict(fresh, dense.state_dict())
    assert torch.equal(logits(fresh, batches[0]), logits(dense, batches[0]))
    second = compress(model, batches, **REMOVES | {"prune_ratio": 0.4, "ratio_of": "present"})
    assert not set(first.removed_experts) & set(second.removed_experts)
    assert not any(name.startswith(tuple(first.removed_experts)) for name in second.layers)
    for name, router, _ in routers_of(model):
        gone = removed_numbers(first).get(name, []) + removed_numbers(second).get(name, [])
        assert forgotten_by(router) == sorted(gone)


@pytest.mark.parametrize("output_side", ["empirical", "sampled"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_block_by_block_gives_the_same(family, output_side, monkeypatch):
    torch.manual_seed(0)
    models, found = [lopsided_experts(family, output_router_logits=False)], []
    models.append(copy.deepcopy(models[0]))

    def noted(*args):
        found.append(possible_removals(*args))
        return found[-1]

    monkeypatch.setattr("zssvd_lightning.compression.engine.possible_removals", noted)
    settings = REMOVES | {"output_side": output_side, "selection": "curvature_first_order", "corrections": 1}
    settings |= {"correction_step": "natural"}
    reports = [
        compress(model, token_batches(), memory=memory, **settings)
        for model, memory in zip(models, ("whole", "blocks"), strict=True)
    ]
    count = len(found) // 2
    assert len(found) == 2 * count >= 4
    for whole, blocks in zip(found[:count], found[count:], strict=True):
        assert [each._replace(first_order=0.0, second_order=0.0) for each in whole] == [
            each._replace(first_order=0.0, second_order=0.0) for each in blocks
        ]
        orders = [[(each.first_order, each.second_order) for each in every] for every in (whole, blocks)]
        torch.testing.assert_close(*map(torch.tensor, orders), rtol=1e-3, atol=1e-6)
        assert all(second > 0 for _, second in orders[0])
    assert reports[0].removed_experts == reports[1].removed_experts
    assert reports[0].removed_experts
    batch = token_batches(1)[0]
    torch.testing.assert_close(logits(models[1], batch), logits(models[0], batch), rtol=1e-3, atol=1e-4)


def test_refusals_name_the_setting_and_leave_the_model(monkeypatch):
    model, batches = lopsided_experts(), token_batches(2)
    before, modules = state_of(model), dict(model.named_modules())
    for settings, message in (
        ({"selection": "zero_sum"}, "selection is 'zero_sum'"),
        ({"metric": "input"}, "metric is 'input'"),
        ({"corrections": 1, "correction_step": "refit"}, "correction_step 'refit'"),
        ({"plan": "plan.yaml"}, "a plan has ranks of at least 1"),
    ):
        with pytest.raises(ContradictionError, match=message):
            CompressionConfig.of(**{k: v for k, v in (REMOVES | settings).items() if k != "progress"})
    with pytest.raises(ContradictionError, match="leave remove_experts out to write one"):
        plan(model, batches, **REMOVES)
    with pytest.raises(ContradictionError, match="leave remove_experts out to write one"):
        ZSSVDCallback(dry_run="plan.yaml", **{k: v for k, v in REMOVES.items() if k != "progress"})
    with pytest.raises(TargetError, match="no stacked experts with all matrices"):
        compress(model, batches, include="experts.*.down_proj", **REMOVES)
    with pytest.raises(CalibrationError, match=r"tell nothing of removing experts of model\.layers\.0"):
        compress(model, batches, statistics=calibrate(model, batches, **REMOVES | {"remove_experts": False}), **REMOVES)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("zssvd_lightning.compression.engine.Compression.quantize", fail)
    with pytest.raises(KeyboardInterrupt):
        compress(model, batches, **REMOVES)
    assert dict(model.named_modules()) == modules
    assert_same_state(before, state_of(model))
    assert not any(forgotten_by(router) for _, router, _ in routers_of(model))


def test_a_router_that_cannot_do_without_an_expert_is_named(caplog):
    model = tiny_experts()
    for name, module in list(model.named_modules()):
        if name.endswith(".experts"):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, ExpertList(module))
    names = [name for name, _ in model.named_modules()]
    first, second = (layer.mlp.gate for layer in model.model.layers)
    second.forward = lambda x: type(second).forward(second, x)
    assert [routed.name for routed in removable_experts(model, names)] == ["model.layers.0.mlp.experts"]
    assert "the forward method of their router was replaced" in caplog.text
    del second.forward
    first.num_group = 2
    assert [routed.name for routed in removable_experts(model, names)] == ["model.layers.1.mlp.experts"]
    assert "no expert of model.layers.0.mlp.experts can be removed: their router chooses from groups" in caplog.text
    second.register_parameter("bias", torch.nn.Parameter(torch.zeros(4)))  # which is not used
    with pytest.raises(TargetError, match=r"layers\.1\.mlp\.experts: .* still chooses expert"):
        removable_experts(model, names)
