"""What is trained, and what peft puts on the factors: merged it is the same function of the same rank."""

import copy
import functools
import re
import warnings

import peft
import pytest
import torch
from support.models import logits, tiny_llama, token_batches
from torch import nn

from zssvd_lightning import CompressionConfig, compress, from_pretrained, merge, quantize, save_pretrained
from zssvd_lightning.errors import ConfigError, QuantizationError, RecoveryError, TargetError
from zssvd_lightning.layers.low_rank import LowRankLinear
from zssvd_lightning.layers.pivoted import PivotedLinear
from zssvd_lightning.layers.pivoted_columns import ColumnPivotedLinear
from zssvd_lightning.layers.registry import Factored, possible_forms
from zssvd_lightning.model.adapters import FOLDER, Adapter, merge_adapters, merged, on, save_adapter, taken_off
from zssvd_lightning.model.targets import find_targets
from zssvd_lightning.recovery.methods import FactorRecovery, LoRARecovery, SingularValueRecovery, recovery_of
from zssvd_lightning.recovery.run import RecoveryRun
from zssvd_lightning.strategies import StrategyAdapter

NAME = "model.layers.0.q_proj"
FORMS = [LowRankLinear, PivotedLinear, ColumnPivotedLinear]


def layer(rank=6, dtype=torch.float64, form=LowRankLinear):
    torch.manual_seed(0)
    return form.from_factors(
        torch.randn(10, rank, dtype=dtype), torch.randn(rank, 12, dtype=dtype), torch.randn(10, dtype=dtype)
    )


def perturb(module):
    """As training does: every parameter that requires gradients becomes another."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))


def low_rank_llama(storage="factors"):
    torch.manual_seed(0)
    model = tiny_llama()
    compress(model, token_batches(), CompressionConfig(prune_ratio=0.3, corrections=0, storage=storage), progress=False)
    return model


def dressed_llama(recovery, storage="factors"):
    model = low_rank_llama(storage)
    for name, module in model.named_modules():
        if isinstance(module, Factored) and (adapter := recovery.adapter(("down", "up"), name, module)):
            adapter.attach(name, module)
    return model


OPTIONS = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "by pattern": {"rank_pattern": {r".*\.up": 1}, "alpha_pattern": {r".*\.up": 7}, "exclude_modules": r".*\.k_proj.*"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("two_step", [False, True])
def test_lora_begins_as_nothing_and_merges_to_a_layer_of_the_same_rank(options, two_step, form):
    recovery = LoRARecovery(rank=2, two_step=two_step, peft=OPTIONS[options])
    x, shapes = torch.randn(5, 12), {n: p.shape for n, p in layer(form=form).state_dict().items()}
    for parts in recovery.stages:
        one = layer(dtype=torch.float32, form=form)
        before = one(x)
        recovery.adapter(parts, NAME, one).attach(NAME, one)
        torch.testing.assert_close(one(x), before, rtol=1e-5, atol=1e-5)
        trained = {name.split(".")[0] for name, p in one.named_parameters() if p.requires_grad}
        assert trained == {form.thin[part] for part in parts}
        assert all(recovery.trains(name, parts) == p.requires_grad for name, p in one.named_parameters())
        perturb(one)
        after = one(x)
        assert not torch.allclose(after, before)
        plain = merged(one, torch.Tensor.detach)
        assert {type(part) for part in plain.thin_layers().values()} == {nn.Linear}
        assert {n: p.shape for n, p in plain.state_dict().items()} == shapes
        assert plain.spec == layer(form=form).spec
        torch.testing.assert_close(plain(x), after, rtol=1e-4, atol=2e-5)


def test_singular_values_are_multiplied_and_nothing_else():
    one = layer()
    x, before = torch.randn(5, 12, dtype=torch.float64), layer()
    SingularValueRecovery().adapter(("down", "up"), NAME, one).attach(NAME, one)
    (gains,) = (p for p in one.parameters() if p.requires_grad)
    assert gains.numel() == 6
    with torch.no_grad():
        gains.copy_(torch.linspace(0.5, 2, 6, dtype=torch.float64)[:, None])
    expected = before.up.weight @ torch.diag(torch.linspace(0.5, 2, 6, dtype=torch.float64)) @ before.down.weight
    torch.testing.assert_close(one(x), x @ expected.T + before.bias)
    torch.testing.assert_close(merged(one, torch.Tensor.detach).weight, expected)


def test_two_steps_are_up_and_then_down():
    assert LoRARecovery(two_step=True).stages == FactorRecovery(two_step=True).stages == [("up",), ("down",)]
    assert LoRARecovery().stages == SingularValueRecovery().stages == [("down", "up")]
    names = [name for name, _ in layer().named_parameters()]
    recovery = FactorRecovery(two_step=True)
    assert [n for n in names if recovery.trains(n, ("up",))] == ["up.weight", "up.bias"]
    assert [n for n in names if recovery.trains(n, ("down",))] == ["down.weight"]


def test_factors_are_balanced_before_they_are_trained():
    one = layer()
    with torch.no_grad():
        one.up.weight[:, 2] *= 1e-3
        one.down.weight[4] = 0
    before = one.weight
    FactorRecovery().prepare(one)
    torch.testing.assert_close(one.weight, before)
    up, down = one.up.weight.norm(dim=0), one.down.weight.norm(dim=1)
    others = [0, 1, 2, 3, 5]
    torch.testing.assert_close(up[others], down[others], rtol=1e-5, atol=0)
    assert torch.isfinite(one.up.weight).all()


def test_initial_values_depend_on_the_seed_and_the_name_alone():
    def begun(seed, name=NAME):
        one = layer()
        LoRARecovery(rank=2, seed=seed).adapter(("up",), name, one).attach(name, one)
        return one.up.lora_A["default"].weight

    torch.manual_seed(5)
    first, state = begun(0), torch.get_rng_state()
    assert torch.equal(begun(0), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(begun(1), first)
    assert not torch.equal(begun(0, "model.layers.1.q_proj"), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_empty_adapter_is_of_the_type_of_the_layer(dtype):
    new = LowRankLinear.like(layer(dtype=dtype), rank=6)
    LoRARecovery(rank=2, peft={"use_dora": True}).adapter(("down", "up"), NAME, new).attach(NAME, new, empty=True)
    assert {(p.dtype, p.is_meta) for p in new.parameters()} == {(dtype, True)}


@pytest.mark.parametrize("form", FORMS)
def test_ranks_that_lora_would_exceed_are_refused_or_clipped(form):
    make = functools.partial(layer, form=form)
    one = make(rank=4)
    down, up = one.thin_layers()
    both = ("down", "up")
    inputs = 8 if form is ColumnPivotedLinear else 12
    with pytest.raises(RecoveryError, match=rf"q_proj.{down} \(4, {inputs}\) is not below .* \(the layer has rank 4\)"):
        LoRARecovery(rank=4, clip_rank=False).adapter(both, NAME, one)
    assert LoRARecovery(rank=3, clip_rank=False).adapter(both, NAME, one)
    assert LoRARecovery(rank=4).adapter(("up",), NAME, one).options["rank_pattern"] == {up: 3}
    assert LoRARecovery(rank=4).adapter(("up",), NAME, make(rank=1)) is None
    whole = LoRARecovery(rank=4).adapter(both, NAME, make(rank=5)).options
    assert (whole["r"], whole["lora_alpha"], whole["target_modules"]) == (4, 8, [down, up])
    assert LoRARecovery(rank=4).reduced({NAME: make(rank=5)}) is None
    said = LoRARecovery(rank=4).reduced({NAME: one, "b": make(rank=6), "c": make(rank=1)})
    assert f"too high for {3 if form is PivotedLinear else 2} of 3 layers" in said
    assert "such as c, of rank 1." in said
    assert "which 1 layers have" in said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "lore"}, "recovery.method is 'lore'; did you mean 'lora'"),
        ({}, "recovery has no method"),
        ({"method": "lora", "rnk": 3}, "unknown key 'recovery.rnk'; did you mean 'recovery.rank'"),
        ({"method": "lora", "r": 3}, "unknown key 'recovery.r'; did you mean 'recovery.rank'"),
        ({"method": "lora", "learning_rate": 3}, "did you mean 'recovery.lr'"),
        ("lor", "recovery.method is 'lor'; did you mean 'lora'"),
        (5, "recovery is 5, but must be a Recovery"),
        ({"method": 5}, "recovery.method is 5, but must be a name"),
        ({"method": "lora", "rank": "3"}, "recovery.rank is '3' (str), but must be a whole number"),
        ({"method": "lora", "rank": True}, "recovery.rank is True (bool)"),
        ({"method": "lora", "merge": 1}, "recovery.merge is 1 (int), but must be True or False"),
        ({"method": "lora", "lr": float("inf")}, "recovery.lr is inf (float), but must be a finite number"),
        ({"method": "lora", "peft": ["use_dora"]}, "but must be a mapping"),
        ({"method": "lora", "rank": 0}, "recovery.rank"),
        ({"method": "lora", "dropout": 1.0}, "recovery.dropout"),
        ({"method": "factors", "lr": 0}, "recovery.lr"),
        ({"method": "factors", "rank": 3}, "unknown key 'recovery.rank' of method 'factors'; it is a setting of lora"),
        ({"method": "factors", "loss": "kl"}, "recovery.loss is 'kl'"),
        ({"method": "factors", "temperature": 0}, "recovery.temperature"),
        ({"method": "factors", "distill_weight": 1.0}, "recovery.distill_weight"),
        ({"method": "factors", "schedule": "cosin"}, "recovery.schedule is 'cosin'; did you mean 'cosine'"),
        ({"method": "factors", "warmup": 1.0}, "recovery.warmup"),
        ({"method": "factors", "teacher_dtype": "int8"}, "recovery.teacher_dtype"),
        ({"method": "lora", "peft": {"use_dra": True}}, "LoraConfig has no option 'use_dra'; did you mean 'use_dora'"),
        ({"method": "lora", "peft": {"alpha_pattern": ["up"]}}, "recovery.peft.alpha_pattern"),
        ({"method": "lora", "peft": {"rank_pattern": {"up": 0}}}, "recovery.peft.rank_pattern.up"),
        ({"method": "lora", "peft": {"r": 3}}, "set recovery.rank instead"),
        ({"method": "lora", "peft": {"modules_to_save": ["x"]}}, "set recovery.also_train instead"),
        ({"method": "lora", "peft": {"lora_bias": True}}, "recovery.peft is"),
        ({"method": "lora", "peft": {"exclude_modules": {"k_proj"}}}, "values that are no plain types"),
        ({"method": "factors", "schedule": "reduce_lr_on_plateau"}, "recovery.schedule"),
        ({"method": "lora", "peft": {"init_lora_weights": "eva"}}, "takes batches"),
        ({"method": "lora", "peft": {"init_lora_weights": "corda"}}, "takes batches"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        recovery_of(settings)


def test_options_are_plain_types():
    with pytest.raises(ConfigError, match="no plain types"):
        LoRARecovery(peft={"exclude_modules": {"k_proj"}})


def test_settings_are_the_same_again_from_plain_types():
    for recovery in (LoRARecovery(rank=3, peft={"use_dora": True}), FactorRecovery(targets=["q_proj"], lr=None)):
        assert recovery_of(recovery.to_dict()) == recovery
    assert recovery_of(None) is None
    assert FactorRecovery(targets="q_proj").targets == ["q_proj"]
    assert recovery_of({"method": "singular_values", "lr": 0.1}) == SingularValueRecovery(lr=0.1)


def test_the_schedule_rises_and_falls_over_the_steps_there_are():
    weight = nn.Parameter(torch.zeros(2))
    made = FactorRecovery(lr=0.1, warmup=0.2, schedule="linear", weight_decay=0.3).optimizer([weight], 10)
    rates = []
    for _ in range(10):
        rates.append(made["optimizer"].param_groups[0]["lr"])
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    assert rates == pytest.approx([0, 0.05, 0.1, 0.0875, 0.075, 0.0625, 0.05, 0.0375, 0.025, 0.0125])
    assert made["optimizer"].param_groups[0]["weight_decay"] == 0.3
    with pytest.raises(RecoveryError, match="max_steps nor max_epochs"):
        FactorRecovery().optimizer([weight], float("inf"))
    assert FactorRecovery(schedule="constant").optimizer([weight], float("inf"))


@pytest.mark.parametrize(
    "recovery",
    [
        LoRARecovery(rank=3, clip_rank=True),
        LoRARecovery(rank=2, clip_rank=True, peft={"use_dora": True, "init_lora_weights": "pissa"}),
        SingularValueRecovery(),
    ],
    ids=["lora", "dora and pissa", "singular values"],
)
@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_the_adapter_is_saved_beside_the_compressed_model_and_peft_loads_it_on_that(tmp_path, recovery, storage):
    if recovery.needs_components and storage == "pivoted":
        pytest.skip("refused: see tests/layers/test_pivoted.py")
    model = dressed_llama(recovery, storage)
    perturb(model)
    expected, names = logits(model), [name for name, _ in model.named_parameters()]
    save_pretrained(model, tmp_path / "saved")
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(logits(model), expected)

    base = from_pretrained(tmp_path / "saved")
    assert not on(base)
    assert not torch.allclose(logits(base), expected)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys.*")
        reloaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "saved" / FOLDER))
    torch.testing.assert_close(logits(reloaded), expected)
    unloaded = reloaded.merge_and_unload()
    torch.testing.assert_close(logits(unloaded), expected, rtol=1e-3, atol=5e-4)  # rounding of float32

    save_adapter(model, tmp_path / "alone")
    again = peft.PeftModel.from_pretrained(from_pretrained(tmp_path / "saved"), str(tmp_path / "alone"))
    torch.testing.assert_close(logits(again), expected)

    merge_adapters(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=5e-4)  # rounding of float32
    assert not on(model)


def test_coefficients_of_a_single_row_get_no_lora_and_two_steps_still_train_the_pivots():
    one = layer(rank=9, form=PivotedLinear)
    adapter = LoRARecovery(rank=2).adapter(("down", "up"), NAME, one)
    assert adapter.options["target_modules"] == ["pivots"]
    assert LoRARecovery(rank=2).adapter(("up",), NAME, one) is None
    assert LoRARecovery(rank=2).adapter(("up",), NAME, layer(rank=10, form=PivotedLinear)) is None
    model, run = nn.Module(), RecoveryRun(LoRARecovery(rank=2, two_step=True))
    model.part, model.other = nn.Linear(12, 10), nn.Linear(12, 10)
    run.sync_requires_grad(model)
    model.part, model.other = layer(rank=9, form=PivotedLinear), layer(rank=6, form=PivotedLinear)
    for name, part in model.named_children():
        run.dress(name, part)
    run.begin(model, 0)
    assert on(model).keys() == {"other"}
    run.next_stage(model, StrategyAdapter(None, model), 5)
    assert on(model).keys() == {"part", "other"}
    assert {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad} == {"pivots"}
    run.finish(model, StrategyAdapter(None, model), merge=True)
    assert not on(model)
    assert all(p.requires_grad for p in model.parameters())


def test_the_scale_of_a_clipped_lora_stays_unless_it_is_given():
    def alphas(**settings):
        return LoRARecovery(rank=8, **settings).adapter(("down", "up"), NAME, layer(rank=4)).options["alpha_pattern"]

    assert alphas() == {"down": 6, "up": 6}
    assert alphas(alpha=5) == {"down": 5, "up": 5}
    assert alphas(peft={"alpha_pattern": {r".*\.up": 7}}) == {"down": 6, "up": 7}
    one = layer(rank=4)
    LoRARecovery(rank=8, peft={"rank_pattern": {"up": 2}}).adapter(("down", "up"), NAME, one).attach(NAME, one)
    assert (one.down.r["default"], one.up.r["default"]) == (3, 2)


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_patterns_of_peft_that_match_nothing_are_refused(option):
    recovery = LoRARecovery(peft={option: {r".*\.up": 2}}, targets=["*.layers.0.*"])
    recovery.refuse_layers({NAME: (LowRankLinear,)})
    with pytest.raises(TargetError, match=rf"recovery.peft.{option} has '.*up'.*such as {NAME}.pivots; .*others of"):
        recovery.refuse_layers({NAME: (PivotedLinear,)})
    with pytest.raises(TargetError, match="they are the mixing and columns or pivots and others of each layer"):
        recovery.refuse_layers({NAME: possible_forms("pivoted", 9, 9)})
    other = LoRARecovery(peft={option: {r".*layers.1.*": 2}}, targets=["*.layers.0.*"])
    with pytest.raises(TargetError, match="matches no matrix"):
        other.refuse_layers(dict.fromkeys([NAME, "model.layers.1.q_proj"], (LowRankLinear,)))


def test_what_is_on_pivots_is_merged_and_refused_8_bits_unchanged():
    model = dressed_llama(LoRARecovery(rank=2), "pivoted")
    perturb(model)
    dense, expected, names = copy.deepcopy(model), logits(model), list(model.state_dict())
    merge(dense)
    assert not on(dense)
    torch.testing.assert_close(logits(dense), expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(QuantizationError, match="kept as pivot rows"):
        quantize(model, "remap")
    assert list(model.state_dict()) == names


def test_what_is_on_the_factors_is_merged_and_quantized_with_them():
    model = dressed_llama(LoRARecovery(rank=2, clip_rank=True))
    perturb(model)
    plain, dense, small, expected = *(copy.deepcopy(model) for _ in range(3)), logits(model)
    merge_adapters(plain)
    merge(dense)
    quantize(small, "remap")
    for changed in (plain, dense):
        assert not on(changed)
        assert all(p.requires_grad for p in changed.parameters())
        torch.testing.assert_close(logits(changed), expected, rtol=1e-3, atol=1e-3)
    quantize(plain, "remap")
    assert torch.equal(logits(small), logits(plain))


def test_adapters_are_not_compressed():
    model = dressed_llama(LoRARecovery(rank=2, clip_rank=True))
    with pytest.raises(TargetError):
        find_targets(model, include=["*lora*"])
    assert not any("lora" in name or "base_layer" in name for name in find_targets(model))


def test_a_model_without_an_adapter_has_none_to_save(tmp_path):
    with pytest.raises(RecoveryError, match="no adapter"):
        save_adapter(low_rank_llama(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_adapters_that_one_folder_cannot_describe_are_not_saved(tmp_path):
    model = low_rank_llama()
    low_rank = [(name, module) for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
    for index, (name, module) in enumerate(low_rank):
        adapter = LoRARecovery(rank=2, clip_rank=True, peft={"use_rslora": index % 2 == 1})
        if (found := adapter.adapter(("down", "up"), name, module)) is not None:
            found.attach(name, module)
    assert len(on(model)) > 2
    with pytest.raises(RecoveryError, match=r"differs from that of .* in more than its rank"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_adapters_are_off_for_a_while_and_on_again_after_an_error():
    model = dressed_llama(LoRARecovery(rank=2, clip_rank=True))
    perturb(model)
    names, expected = list(model.state_dict()), logits(model)
    with pytest.raises(KeyError), taken_off(model):
        assert list(model.state_dict()) == list(low_rank_llama().state_dict())
        raise KeyError
    assert list(model.state_dict()) == names
    assert torch.equal(logits(model), expected)


def test_what_peft_refuses_names_the_layer():
    with pytest.raises(RecoveryError, match=f"peft cannot put LORA on {NAME}"):
        Adapter("LORA", {"target_modules": r".*\.nothing"}).attach(NAME, layer())
