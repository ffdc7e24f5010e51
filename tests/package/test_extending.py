"""What can be added from outside the package, by a call or an entry point, and the page that shows it."""

import ast
import copy
import importlib.util
import re
import sys
from dataclasses import dataclass
from importlib import metadata
from importlib.metadata import EntryPoint
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy
from support.callbacks import short
from support.models import CausalLM, loader, tiny_llama, token_batches, trainer
from torch import nn

from zssvd_lightning import CompressionConfig, LowRankLinear, compress, save_pretrained
from zssvd_lightning._registry import Registry, instance_of
from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.config.corrections import CORRECTIONS, Correction
from zssvd_lightning.errors import (
    ConfigError,
    NonFiniteError,
    QuantizationError,
    SavedModelError,
    UnsupportedTrainingError,
)
from zssvd_lightning.layers import registry
from zssvd_lightning.layers.int8 import Int8LowRankLinear
from zssvd_lightning.layers.storage import (
    Kept,
    Storage,
    factor_codes,
    factors,
    pivoted,
    remapped,
    round_all,
    round_all_but_last,
    round_except,
)
from zssvd_lightning.recovery.methods import METHODS, FactorRecovery, recovery_of
from zssvd_lightning.recovery.settings import Recovery
from zssvd_lightning.selection.components import Selection
from zssvd_lightning.selection.rules import RULES, Rule
from zssvd_lightning.selection.storages import STORAGES
from zssvd_lightning.serialization.specs import rebuild, specs_of
from zssvd_lightning.strategies import ADAPTERS, FSDP2Adapter, SingleDeviceAdapter, StrategyAdapter
from zssvd_lightning.whitening.cholesky import Root
from zssvd_lightning.whitening.metrics import METRICS, Metric, identity

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
FILES = sorted((PAGE.parent / "extending").glob("*.py"))
REGISTRIES = {
    "metric": METRICS,
    "rule": RULES,
    "storage": STORAGES,
    "recovery": METHODS,
    "strategy": ADAPTERS,
    "correction": CORRECTIONS,
}
GROUPS = {
    "metric": "zssvd_lightning.metrics",
    "rule": "zssvd_lightning.rules",
    "storage": "zssvd_lightning.storages",
    "correction": "zssvd_lightning.corrections",
    "recovery": "zssvd_lightning.recoveries",
    "strategy": "zssvd_lightning.strategies",
}
NAMES = {
    "metric": "shrunk_input",
    "rule": "equal_energy",
    "storage": "down_in_8_bits",
    "correction": "toward_original",
    "recovery": "frugal",
    "strategy": "averaging",
}


@pytest.fixture(autouse=True)
def _registries_as_they_were():
    tables = [registry.KINDS, *(found._entries for found in REGISTRIES.values())]
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_llama()


def run_example(name):
    spec = importlib.util.spec_from_file_location(f"extending_{name}", PAGE.parent / "extending" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_lines(source):
    """Lines that are not blank, a comment or part of a docstring."""
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    texts = [s for n in nodes for s in n.body if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)]
    documented = {line for text in texts for line in range(text.lineno, text.end_lineno + 1)}
    lines = enumerate(source.splitlines(), 1)
    return [line for i, line in lines if line.strip() and not line.strip().startswith("#") and i not in documented]


def offered(monkeypatch, *points):
    """Entry points as if packages with them were installed. Returns the list of groups that will be asked for."""
    asked = []

    def entry_points(**wanted):
        asked.append(wanted.get("group"))
        return [point for point in points if point.group == wanted.get("group")]

    monkeypatch.setattr(metadata, "entry_points", entry_points)
    return asked


def test_the_page_shows_the_very_files():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert {path.stem for path in FILES} == set(NAMES)
    assert sorted(blocks) == sorted(path.read_text() for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_has_at_most_twenty_lines_of_code(path):
    assert 5 <= len(code_lines(path.read_text())) <= 20


def test_a_metric_of_one_s_own_compresses(model):
    run_example("metric")
    twin = copy.deepcopy(model)
    report = compress(model, token_batches(), CompressionConfig(0.3, metric="shrunk_input"), progress=False)
    other = compress(twin, token_batches(), CompressionConfig(0.3), progress=False)
    assert report.reached >= 0.3
    assert {n: layer.rank for n, layer in report.layers.items()} != {n: layer.rank for n, layer in other.layers.items()}


def test_with_the_metric_of_one_s_own_no_rank_is_lost_but_what_is_dropped(model, tmp_path):
    run_example("metric")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    with torch.no_grad():  # of one rank less than full, which storage `pivoted` keeps exactly
        for layer in layers.values():
            U, S, Vh = torch.linalg.svd(layer.weight, full_matrices=False)
            layer.weight.copy_((U[:, :-1] * S[:-1]) @ Vh[:-1])
    entries = [f"  {n}: {{rank: {min(layer.weight.shape) - 1}}}" for n, layer in layers.items()]
    plan = tmp_path / "plan.yaml"
    plan.write_text("\n".join(["version: 1", "storage: pivoted", "layers:", *entries]))
    batch = token_batches()[0]
    before = model(**batch).logits.detach()
    config = CompressionConfig(metric="shrunk_input", storage="pivoted", plan=str(plan), corrections=0)
    compress(model, token_batches(), config, progress=False)
    torch.testing.assert_close(model(**batch).logits, before, rtol=1e-3, atol=1e-3)


def test_a_rule_of_one_s_own_keeps_equal_shares_of_energy_within_the_budget(model):
    run_example("rule")
    weights = {n: m.weight.detach().clone() for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    settings = {"metric": "none", "storage": "pivoted", "corrections": 0}
    config = CompressionConfig(0.3, selection="equal_energy", **settings)
    report = compress(model, token_batches(), config, progress=False)
    assert 0.3 <= report.reached < 0.35
    low, high = [], []
    for name, layer in report.layers.items():
        if layer.rank is not None:
            step = {32: 2, 16: 1}[min(layer.shape)]  # with rank_multiple 8
            energy = torch.linalg.svdvals(weights[name]).double().square().cumsum(0)
            energy = torch.cat([energy.new_zeros(1), energy])
            low.append(energy[layer.rank - step] / energy[-1])
            high.append(energy[layer.rank] / energy[-1])
            assert layer.rank % step == 0
    assert max(low) < min(high)


def test_a_storage_of_one_s_own_keeps_more_components_in_the_bytes_it_says(model, tmp_path):
    run_example("storage")
    twin, batch = copy.deepcopy(model), token_batches()[0]
    settings = {"budget_in": "bytes", "corrections": 0}
    report = compress(model, token_batches(), CompressionConfig(0.4, storage="down_in_8_bits", **settings))
    other = compress(twin, token_batches(), CompressionConfig(0.4, **settings))
    assert report.reached >= 0.4
    assert sum(x.rank or 0 for x in report.layers.values()) > sum(x.rank or 0 for x in other.layers.values())
    for name, (k, (m, n)) in {n: (x.rank, x.shape) for n, x in report.layers.items() if x.rank}.items():
        assert isinstance(model.get_submodule(name), Int8LowRankLinear)
        assert sum(t.nbytes for t in model.get_submodule(name).state_dict().values()) == k * (2 * m + n + 2)
    save_pretrained(model, tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits)


class Spectral(LowRankLinear):
    """Factors of unit components, with their sizes apart."""

    kind = "spectral"

    def __init__(self, in_features, out_features, rank, bias=True, device=None, dtype=None):
        super().__init__(in_features, out_features, rank, bias, device, dtype)
        self.sizes = nn.Parameter(torch.ones(rank, device=device, dtype=dtype))

    @classmethod
    def found_in(cls, weights, name):
        return super().found_in(weights, name) if f"{name}.sizes" in weights else None

    @torch.no_grad()
    def fill(self, up, down, bias):
        super().fill(up / up.norm(dim=0), down / down.norm(dim=1, keepdim=True), bias)
        self.sizes.copy_(up.norm(dim=0) * down.norm(dim=1))

    @property
    def weight(self):
        return (self.up.weight * self.sizes) @ self.down.weight

    def forward(self, x):
        return self.up(self.down(x) * self.sizes)


def test_a_storage_brings_a_layer_of_its_own(model):
    STORAGES.register("spectral", Storage(factors, layer="spectral", classes=(Spectral,)))
    twin, batch = copy.deepcopy(model), token_batches()[0]
    compress(model, token_batches(), CompressionConfig(storage="spectral", corrections=0), progress=False)
    compress(twin, token_batches(), CompressionConfig(corrections=0), progress=False)
    made = [name for name, module in model.named_modules() if isinstance(module, Spectral)]
    assert made
    torch.testing.assert_close(model(**batch).logits, twin(**batch).logits, rtol=1e-4, atol=1e-5)
    again = tiny_llama()
    rebuild(again, specs_of(model))
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits)
    for name in made:
        forms = (kind for kind, form in registry.KINDS.items() if form.found_in(model.state_dict(), name) is not None)
        assert next(forms) == "spectral"


def test_layers_that_cannot_be_told_apart_are_refused():
    class Same(LowRankLinear):
        kind = "same"

    class Alike(LowRankLinear):
        kind = "alike"

        @classmethod
        def found_in(cls, weights, name):
            return super().found_in(weights, name)

    for forms, why in (
        ((Same,), "a found_in of its own"),
        ((LowRankLinear,), "a kind of its own"),
        ((Spectral, Spectral), "a kind of its own"),
        ((Alike,), "Alike finds LowRankLinear"),
        ((nn.Linear,), "subclasses of CompressedLinear"),
        ([Spectral], "a tuple of"),
    ):
        with pytest.raises(ConfigError, match=rf"storage 'same' is .*{why}"):
            STORAGES.register("same", Storage(factors, classes=forms))
    assert "same" not in STORAGES


def test_a_correction_of_one_s_own_moves_what_it_says_and_a_truncation_follows(model):
    example = run_example("correction")
    seen = []

    def watched(compression):
        before = {n: t.weight.clone() for n, t in compression.targets.items()}
        example.toward_original(compression)
        for name, target in compression.targets.items():
            way = compression.originals[name] - before[name]
            lowers = compression.gathering.mean_gradient(name) * way < 0
            moved = target.weight - before[name]
            torch.testing.assert_close(moved[lowers], example.SHARE * way[lowers], rtol=1e-4, atol=1e-6)
            assert not moved[~lowers].any()
            seen.append(float(lowers.float().mean()))

    CORRECTIONS.register("watched", Correction(watched))
    report = compress(model, token_batches(), CompressionConfig(0.4, correction_step="watched"), progress=False)
    assert 0.3 < sum(seen) / len(seen) < 0.7
    assert len(report.losses) == 3  # first truncation, correction, second truncation
    assert report.reached >= 0.4
    assert all(model.get_submodule(n).rank == layer.rank for n, layer in report.layers.items() if layer.rank)


def test_a_correction_in_a_fit_is_resumed_like_ours(model, tmp_path):
    run_example("correction")
    settings = {"calibration_batches": 4, "correction_batches": 2, "correction_step": "toward_original"}
    batches = loader(token_batches(1) * 12)  # equal batches, because a plain loader starts again after a resume

    class Saving(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    callback, module = short(**settings), CausalLM(copy.deepcopy(model))
    trainer(callback, Saving()).fit(module, batches)
    assert callback.phase == "done"
    for step in (3, 5, 7, 9):
        again, resumed = short(**settings), CausalLM(copy.deepcopy(model))
        trainer(again).fit(resumed, batches, ckpt_path=tmp_path / f"{step}.ckpt")
        assert {n: x.rank for n, x in again.report.layers.items()} == {
            n: x.rank for n, x in callback.report.layers.items()
        }
        for name, weight in module.state_dict().items():
            torch.testing.assert_close(resumed.state_dict()[name], weight)


@pytest.mark.parametrize(
    ("truncates", "step", "must"),
    [
        (True, lambda compression: None, "must call truncate"),
        (False, Compression.truncate, "must not truncate"),
    ],
)
def test_a_correction_that_does_other_than_it_states_is_named_and_undone(model, truncates, step, must):
    CORRECTIONS.register("liar", Correction(step, truncates=truncates))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=f"'liar' states truncates={truncates}, so it {must}"):
        compress(model, token_batches(), CompressionConfig(correction_step="liar"), progress=False)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_correction_that_needs_whole_weights_is_refused_under_fsdp2(model):
    run_example("correction")
    CORRECTIONS.register("whole", Correction(lambda compression: None))
    adapter = FSDP2Adapter(None, CausalLM(model))
    adapter.refuse_settings(CompressionConfig(correction_step="toward_original"))
    with pytest.raises(UnsupportedTrainingError, match="or use 'projected' or 'natural' or 'toward_original'"):
        adapter.refuse_settings(CompressionConfig(correction_step="whole"))


def test_a_correction_s_act_is_a_function_or_a_method_of_the_engine():
    with pytest.raises(ConfigError, match=r"correction_step 'mine' is .*whose step is a function"):
        CORRECTIONS.register("mine", Correction("truncat"))


def test_a_recovery_of_one_s_own_trains(model):
    run_example("recovery")
    seen = []

    class Watched(CausalLM):
        def on_before_optimizer_step(self, optimizer):
            seen.append(type(optimizer))

    callback = short(calibration_batches=4, corrections=0, recovery={"method": "frugal", "lr": 1e-2, "clip": 2.0})
    trainer(callback).fit(Watched(model), loader(token_batches(12)))
    assert callback.phase == "done"
    assert seen[-1] is torch.optim.Adafactor
    assert recovery_of(callback.recovery.to_dict()) == callback.recovery


def test_a_strategy_adapter_of_one_s_own_forgets_replaced_layers(model):
    example = run_example("strategy")
    module, strategy = CausalLM(model), example.AveragingStrategy("cpu")
    callback = short(calibration_batches=4, corrections=0)
    trainer(callback, strategy=strategy).fit(module, loader(token_batches(12)))
    assert callback.phase == "done"
    assert any(isinstance(part, LowRankLinear) for part in module.modules())
    assert set(strategy.means) == set(module.parameters())


@pytest.mark.parametrize("kind", REGISTRIES)
def test_a_name_is_given_once(kind):
    found = REGISTRIES[kind]
    for name in list(found):
        with pytest.raises(ConfigError, match=f"{name!r} is registered already"):
            found.register(name, found[name])


@pytest.mark.parametrize("kind", REGISTRIES)
def test_what_is_of_another_kind_is_refused(kind):
    with pytest.raises(ConfigError, match=r"'mine' is <object .*>, but must be a"):
        REGISTRIES[kind].register("mine", object())
    assert "mine" not in REGISTRIES[kind]


def test_a_recovery_goes_by_the_name_of_its_method():
    with pytest.raises(ConfigError, match="whose method is 'mine', not 'factors'"):
        METHODS.register("mine", FactorRecovery)


def test_an_adapter_serves_a_strategy():
    class Idle(SingleDeviceAdapter):
        serves = ()

    class Inherits(SingleDeviceAdapter):
        """Forgets `serves`, and would take over every fit on one device."""

    class Second(SingleDeviceAdapter):
        serves = (SingleDeviceStrategy,)

    class Sharded(StrategyAdapter):
        serves = (FSDPStrategy,)

    with pytest.raises(ConfigError, match="a `serves` of its own"):
        ADAPTERS.register("idle", Idle)
    with pytest.raises(ConfigError, match="a `serves` of its own"):
        ADAPTERS.register("inherits", Inherits)
    with pytest.raises(ConfigError, match="that none serves yet, but SingleDeviceAdapter does"):
        ADAPTERS.register("second", Second)
    ADAPTERS.register("sharded", Sharded)  # strategies that are refused can be added


@pytest.mark.parametrize(
    ("setting", "kind"),
    [("metric", "metric"), ("selection", "rule"), ("storage", "storage"), ("correction_step", "correction")],
)
def test_unknown_names_are_told_the_names_there_are(monkeypatch, setting, kind):
    run_example(kind)
    offered(monkeypatch, EntryPoint("from_afar", "nowhere", GROUPS[kind]))
    with pytest.raises(ConfigError, match=rf"{setting} is 'qqq'; there are .*{NAMES[kind]}, from_afar"):
        CompressionConfig(**{setting: "qqq"})


def test_unknown_recoveries_are_told_the_names_there_are():
    run_example("recovery")
    with pytest.raises(ConfigError, match=r"there are lora, factors, singular_values, frugal"):
        recovery_of({"method": "qqq"})


@pytest.mark.parametrize("kind", NAMES)
def test_an_entry_point_refers_to_a_module_that_registers(monkeypatch, kind):
    monkeypatch.syspath_prepend(str(PAGE.parent))
    monkeypatch.delitem(sys.modules, f"extending.{kind}", raising=False)
    offered(monkeypatch, EntryPoint(NAMES[kind], f"extending.{kind}", GROUPS[kind]))
    assert NAMES[kind] not in REGISTRIES[kind]._entries
    assert REGISTRIES[kind][NAMES[kind]] is REGISTRIES[kind]._entries[NAMES[kind]]


def mine(matrices, budget):
    return RULES["uniform"](matrices, budget)


MINE = Rule(mine)


def test_an_entry_point_refers_to_the_object_and_is_loaded_when_it_is_asked_for(monkeypatch, model):
    asked = offered(monkeypatch, EntryPoint("mine", f"{__name__}:MINE", "zssvd_lightning.rules"))
    CompressionConfig()
    assert not asked
    assert "mine" in list(RULES)
    assert "mine" not in RULES._entries
    report = compress(model, token_batches(), CompressionConfig(selection="mine", corrections=0), progress=False)
    assert RULES["mine"] is MINE
    assert report.reached >= 0.2


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("no_such_package.at_all", "ModuleNotFoundError: No module named 'no_such_package'"),
        (f"{__name__}:missing", "AttributeError"),
        (f"{__name__}:PAGE", "but must be an instance of Rule"),
    ],
)
def test_a_broken_entry_point_is_named_and_harms_nothing_else(monkeypatch, value, why):
    offered(monkeypatch, EntryPoint("broken", value, "zssvd_lightning.rules"))
    CompressionConfig(selection="sigma")
    wanted = rf"entry point broken = '{re.escape(value)}' of group 'zssvd_lightning.rules'.*{re.escape(why)}"
    with pytest.raises(ConfigError, match=wanted):
        CompressionConfig(selection="broken")


def test_objects_answer_for_what_goes_with_them():
    METRICS.register("loss", Metric(identity, identity, measures_loss=True))
    RULES.register("bits", Rule(mine, chooses_bits=True))
    CompressionConfig(metric="loss", correction_step="natural")
    CompressionConfig(storage="mixed", selection="bits")
    with pytest.raises(ConfigError, match="needs metric 'two_sided' or 'loss', but metric is 'input'"):
        CompressionConfig(correction_step="natural")
    with pytest.raises(
        ConfigError, match="needs selection 'curvature' or 'curvature_first_order' or 'bits', but selection is"
    ):
        CompressionConfig(storage="mixed")


def test_a_registry_is_a_mapping_that_grows():
    numbers = Registry("number", "no.such.group", {"one": 1}, instance_of(int))
    numbers.register("two", 2)
    assert dict(numbers) == {"one": 1, "two": 2}
    assert len(numbers) == 2
    assert numbers.those(lambda number: number > 1) == ["two"]
    with pytest.raises(KeyError):
        numbers["three"]


def symmetric(moments, name):
    values, V = torch.linalg.eigh(moments.second_moment(name).double())
    return Root(V @ values.clamp_min(1e-6).sqrt().diag() @ V.T)


@pytest.mark.parametrize(
    ("builder", "why"),
    [
        (symmetric, "must return a lower triangular S"),
        (lambda moments, name: Root(torch.eye(5)), r"must return S of shape .*, not \(5, 5\)"),
        (
            lambda moments, name: Root(moments.second_moment(name).diagonal() * torch.nan),
            "returned S with entries that are NaN",
        ),
        (
            lambda moments, name: Root(moments.second_moment(name).diagonal() * 0),
            "returned S .* with zeros on its diagonal",
        ),
        (lambda moments, name: moments.second_moment(name), "must return a Root, not Tensor"),
    ],
)
def test_a_root_that_would_give_wrong_weights_is_refused_and_the_model_left_alone(model, builder, why):
    METRICS.register("mine", Metric(inputs=builder, outputs=identity))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=rf"of the metric {why}.*\(for model\.layers"):
        compress(model, token_batches(), CompressionConfig(metric="mine", corrections=0), progress=False)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def chosen(ranks, **more):
    def select(matrices, budget):
        kept = {name: None if k is None else torch.arange(k) for name, k in ranks(matrices, budget).items()}
        return Selection(**{"kept": kept, "drifts": dict.fromkeys(matrices, 0.0)} | more)

    return select


@pytest.mark.parametrize(
    ("select", "why"),
    [
        (chosen(lambda ms, b: {n: b.highest_rank(n) for n in ms}), "parameters, but prune_ratio 0.6 allows"),
        (chosen(lambda ms, b: dict.fromkeys(ms)), "but prune_ratio 0.6 allows"),
        (chosen(lambda ms, b: dict.fromkeys(ms, 1)), "its lowest rank is"),
        (chosen(lambda ms, b: {n: min(b.shapes[n]) for n in ms}), "larger than dense; return None"),
        (chosen(lambda ms, b: {n: min(b.shapes[n]) + 1 for n in ms}), "must be ascending and below"),
        (chosen(lambda ms, b: dict.fromkeys(list(ms)[1:], 5)), "must name all layers and no other"),
        (chosen(lambda ms, b: dict.fromkeys(ms, 5), drifts={}), "drifts of selection 'mine' must name all layers"),
        (chosen(lambda ms, b: dict.fromkeys(ms, 5), eight_bit=frozenset({"x"})), "leaves no such choice"),
        (lambda ms, b: Selection({name: [0, 1] for name in ms}, dict.fromkeys(ms, 0.0)), "must be a tensor of indices"),
        (lambda ms, b: Selection(dict.fromkeys(ms, torch.zeros(3).long()), dict.fromkeys(ms, 0.0)), "ascending"),
        (lambda ms, b: dict.fromkeys(ms, 5), "returned dict, but must return a Selection"),
    ],
)
def test_a_rule_that_returns_no_selection_within_the_budget_is_named(model, select, why):
    RULES.register("mine", Rule(select))
    with pytest.raises(ConfigError, match=why):
        config = CompressionConfig(0.6, selection="mine", corrections=0, min_rank_fraction=0.2)
        compress(model, token_batches(), config, progress=False)


def to_rank_one(layer):
    return round_all(LowRankLinear.from_factors(layer.up.weight[:, :1], layer.down.weight[:1], None))


@pytest.mark.parametrize("rounded", [lambda layer: None, lambda layer: nn.Linear(3, 3), to_rank_one])
def test_a_rounded_layer_is_of_the_same_shape_and_rank(model, rounded):
    STORAGES.register("mine", Storage(factor_codes, rounded=rounded))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(QuantizationError, match=r"'mine' turned .* a CompressedLinear of the same shape and rank"):
        compress(model, token_batches(), CompressionConfig(0.6, storage="mine", corrections=0), progress=False)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("storage", "why"),
    [
        (Storage(pivoted, layer="pivoted", rounded=round_all), "pivoted layers have no form in 8 bits"),
        (Storage(factors, layer="nosuch"), "whose layer is low_rank or pivoted"),
        (Storage(factors, layer="int8_low_rank"), "whose layer is low_rank or pivoted"),
        (Storage(lambda m, n, k: Kept()), "grow with the rank"),
        (Storage(lambda m, n, k: Kept(wide=k * (m + n))), r"grow with the rank, not \[0, 0, 0, 0\]\.\.\. flops"),
        (Storage(lambda m, n, k: Kept(wide=99 - k, products=k)), "grow with the rank"),
        (Storage(lambda m, n, k: k * (m + n)), "return Kept"),
        (Storage("factors"), "are functions"),
        (Storage(factors, in_8_bits="hq"), "in_8_bits is None or"),
    ],
)
def test_a_storage_that_could_not_work_is_refused_at_once(storage, why):
    with pytest.raises(ConfigError, match=why):
        STORAGES.register("mine", storage)


def test_loss_aware_rounding_is_that_of_the_storage(model):
    seen = []

    def rounded_except(layer, rows, columns):
        seen.append(int(rows.sum()) * layer.rank + int(columns.sum()) * layer.rank)
        return round_except(layer, rows, columns)

    STORAGES.register("mine", Storage(remapped, rounded=round_all_but_last, rounded_except=rounded_except))
    STORAGES.register("fixed", Storage(remapped, rounded=round_all_but_last))
    config = CompressionConfig(0.4, storage="mine", rows_in_16_bits="loss_aware", corrections=0)
    report = compress(model, token_batches(), config, progress=False)
    low_rank = [layer for layer in report.layers.values() if layer.rank]
    assert len(seen) == len(low_rank)
    assert 0 < sum(seen) <= sum(layer.rank * abs(layer.shape[0] - layer.shape[1]) for layer in low_rank)
    with pytest.raises(ConfigError, match="'loss_aware' needs storage 'remap' or 'mine'"):
        CompressionConfig(storage="fixed", rows_in_16_bits="loss_aware")


def test_a_self_contained_folder_with_layers_it_cannot_carry_is_refused(model, tmp_path):
    STORAGES.register("spectral", Storage(factors, layer="spectral", classes=(Spectral,)))
    compress(model, token_batches(), CompressionConfig(storage="spectral", corrections=0), progress=False)
    with pytest.raises(SavedModelError, match=r"is a Spectral of test_extending.* does not carry"):
        save_pretrained(model, tmp_path / "saved", self_contained=True)
    assert not (tmp_path / "saved").exists()


SPECTRAL = Storage(factors, layer="spectral", classes=(Spectral,))


def test_a_saved_folder_finds_the_installed_package_of_its_layers(monkeypatch, model, tmp_path):
    STORAGES.register("spectral", SPECTRAL)
    compress(model, token_batches(), CompressionConfig(storage="spectral", corrections=0), progress=False)
    save_pretrained(model, tmp_path / "saved")
    batch = token_batches()[0]
    expected = model(**batch).logits
    del STORAGES._entries["spectral"], registry.KINDS["spectral"]
    with pytest.raises(SavedModelError, match=r"'spectral', but only .* import the package that registers"):
        type(model).from_pretrained(tmp_path / "saved")
    offered(monkeypatch, EntryPoint("spectral", f"{__name__}:SPECTRAL", "zssvd_lightning.storages"))
    torch.testing.assert_close(type(model).from_pretrained(tmp_path / "saved")(**batch).logits, expected)


def test_a_correction_that_leaves_nan_is_named(model):
    def broken(compression):
        target = next(iter(compression.targets.values()))
        target.assign(target.weight * torch.nan)

    CORRECTIONS.register("broken", Correction(broken))
    with pytest.raises(NonFiniteError, match=r"correction_step 'broken' left a weight of model\.layers"):
        compress(model, token_batches(), CompressionConfig(correction_step="broken"), progress=False)


@pytest.mark.parametrize("flag", ["refits", "searches"])
def test_flags_of_our_own_corrections_are_refused(flag):
    with pytest.raises(ConfigError, match="which are for steps of this package"):
        CORRECTIONS.register("mine", Correction(lambda compression: None, **{flag: True}))


def test_a_recovery_is_a_dataclass_with_a_method():
    class Bare(FactorRecovery):
        method = "bare"
        clip: float = 1.0

    @dataclass(frozen=True)
    class Nameless(FactorRecovery):
        clip: float = 1.0

    @dataclass(frozen=True)
    class Abstract(Recovery):
        method = "abstract"

    for kind, why in ((Bare, r"decorate it with @dataclass"), (Nameless, "its own `method"), (Abstract, "abstract")):
        with pytest.raises(ConfigError, match=why):
            METHODS.register(kind.__name__.lower(), kind)


def test_two_packages_that_offer_one_name_are_told_apart(monkeypatch):
    group = "zssvd_lightning.rules"
    offered(monkeypatch, EntryPoint("mine", f"{__name__}:MINE", group), EntryPoint("mine", "other:RULE", group))
    with pytest.raises(ConfigError, match=r"several packages have an entry point 'mine'.*other:RULE"):
        CompressionConfig(selection="mine")


def test_a_module_that_registers_another_name_is_told_so(monkeypatch):
    offered(monkeypatch, EntryPoint("mine", "json", "zssvd_lightning.rules"))
    with pytest.raises(ConfigError, match="is a module that registers no selection 'mine'"):
        CompressionConfig(selection="mine")


def test_a_broken_strategy_of_another_package_ends_no_fit(monkeypatch, caplog, model):
    offered(monkeypatch, EntryPoint("broken", "no_such_package", "zssvd_lightning.strategies"))
    callback = short(calibration_batches=4, corrections=0)
    trainer(callback).fit(CausalLM(model), loader(token_batches(12)))
    assert callback.phase == "done"
    assert "no_such_package" in caplog.text
    assert "left out" in caplog.text


@pytest.mark.parametrize("name", ["", 3, None])
def test_a_name_is_a_string(name):
    with pytest.raises(ConfigError, match="must be a string that is not empty"):
        METRICS.register(name, METRICS["input"])


def test_an_object_in_place_of_its_name_is_refused():
    with pytest.raises(ConfigError, match=r"metric is Metric.*must be a name, one of none, rows"):
        CompressionConfig(metric=METRICS["input"])
