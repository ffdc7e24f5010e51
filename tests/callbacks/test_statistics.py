"""The same statistics whatever the run is set to."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from support.callbacks import Keeps
from support.models import CausalLM, loader, padded_batches, tiny_bert, tiny_gpt2, tiny_llama, token_batches, trainer
from support.warned import warned_once
from torch import nn
from torch.utils.checkpoint import checkpoint

from zssvd_lightning import LowRankLinear, Phase, ZSSVDCallback
from zssvd_lightning.errors import CalibrationError, LeftDenseWarning, LogitsError, ZeroGradientError
from zssvd_lightning.model.targets import find_targets
from zssvd_lightning.serialization.specs import ranks_of
from zssvd_lightning.whitening.output_gradients import OUTPUT_GRADIENTS


def keeps(**settings):
    return Keeps(0.3, corrections=0, metric="two_sided", progress=False, **settings)


def statistics(module=None, batches=padded_batches, callback=None, **settings):
    torch.manual_seed(0)
    callback = callback or keeps()
    module = module or CausalLM()
    trainer(callback, **({"max_epochs": 2} | settings)).fit(module, loader(batches()))
    assert callback.phase is Phase.DONE
    return callback.kept


def assert_close(one, other, tolerance):
    assert one.loss_terms == other.loss_terms
    assert one.tokens == other.tokens
    assert one.batches == other.batches
    assert one.mean_loss == pytest.approx(other.mean_loss, rel=max(tolerance, 1e-6))
    for name in one.gradient_sums:
        G, H = one.mean_gradient(name).double(), other.mean_gradient(name).double()
        assert (G - H).norm() <= tolerance * G.norm(), name
        A, B = one.second_moment(name).double(), other.second_moment(name).double()
        assert (A - B).norm() <= tolerance * A.norm(), name
        A, B = one.output_moment(name).double(), other.output_moment(name).double()
        assert (A - B).norm() <= 2 * tolerance * A.norm(), name


def grad_scaler(scale=1024.0):
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


SETTINGS = {
    "64-true": ({"precision": "64-true"}, 1e-5),
    "accumulation": ({"accumulate_grad_batches": 3}, 1e-5),
    "clipping by norm": ({"gradient_clip_val": 1e-6}, 0),
    "clipping by value": ({"gradient_clip_val": 1e-6, "gradient_clip_algorithm": "value"}, 0),
    "bf16-mixed": ({"precision": "bf16-mixed"}, 0.03),
    "bf16-true": ({"precision": "bf16-true"}, 0.05),
    "bf16-true, accumulation": ({"precision": "bf16-true", "accumulate_grad_batches": 4}, 0.05),
    "loss scale": ({"plugins": [grad_scaler()]}, 0.01),
    "loss scale, accumulation": ({"plugins": [grad_scaler()], "accumulate_grad_batches": 3}, 0.01),
    "validation": ({"val_check_interval": 1, "num_sanity_val_steps": 2}, 0),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_trainer_do_not_change_the_statistics(name):
    settings, tolerance = SETTINGS[name]
    torch.manual_seed(0)
    model = tiny_llama()
    plain = statistics(CausalLM(copy.deepcopy(model)))
    assert_close(plain, statistics(CausalLM(copy.deepcopy(model)), **settings), tolerance)


def test_half_precision_weights_go_through_the_whole_of_it():
    module, callback = CausalLM(), ZSSVDCallback(0.3, "zs-svd-line-search", correction_batches=2, progress=False)
    trainer(callback, max_epochs=5, precision="bf16-true").fit(module, loader(token_batches()))
    assert callback.report.reached >= 0.3
    assert all(m.up.weight.dtype == torch.bfloat16 for m in module.modules() if isinstance(m, LowRankLinear))


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_bert])
def test_dropout_is_off(build):
    model = build()
    without = copy.deepcopy(model)
    for module in without.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    assert_close(statistics(CausalLM(without)), statistics(CausalLM(model)), 0)


def test_checkpointed_activations_of_transformers_make_no_difference():
    model = tiny_llama()
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable()
    assert_close(statistics(CausalLM(model)), statistics(CausalLM(other)), 0)


@pytest.mark.parametrize("name", ["accumulation", "bf16-mixed", "loss scale, accumulation"])
def test_settings_of_the_trainer_do_not_change_what_is_drawn_from_logits(name, monkeypatch):
    """With a draw that depends on the logits alone, since a label drawn at random may change with the last bit."""
    monkeypatch.setitem(OUTPUT_GRADIENTS, "sampled", lambda logits, generator: logits.sin())
    settings, tolerance = SETTINGS[name]
    model = tiny_llama()
    plain, other = (
        statistics(CausalLM(copy.deepcopy(model)), callback=keeps(output_side="sampled"), **s) for s in ({}, settings)
    )
    assert_close(plain, other, tolerance)
    usual = statistics(CausalLM(copy.deepcopy(model)))
    for leader, A in usual.input_sums.items():
        assert torch.equal(A, plain.input_sums[leader])
    for layer, B in usual.output_sums.items():
        assert torch.allclose(usual.gradient_sums[layer], plain.gradient_sums[layer], rtol=1e-4, atol=1e-6)
        assert not torch.allclose(B, plain.output_sums[layer], rtol=0.1)


class Blocks(nn.Module):
    """Residual blocks behind an embedding or a projection, with or without checkpointed activations."""

    def __init__(self, embeds=True):
        super().__init__()
        self.embed = nn.Embedding(97, 24) if embeds else nn.LayerNorm(24)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 24)) for _ in range(3))
        self.head = nn.Linear(24, 30)
        self.reentrant = None

    def forward(self, x):
        x = self.embed(x)
        x += 1.0
        for block in self.blocks:
            x = x + (block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant))
        return self.head(x)


class Classifies(CausalLM):
    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        return nn.functional.cross_entropy(self.model(inputs).flatten(0, 1), labels.flatten())


class Speaks(nn.Module):
    """Returns logits as models of transformers do."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, x):
        return {"logits": self.inner(x)}


class ClassifiesByName(CausalLM):
    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        return nn.functional.cross_entropy(self.model(inputs)["logits"].flatten(0, 1), labels.flatten())


class KnowsSpeaker(Keeps):
    def student(self, pl_module):
        return pl_module.model


def draws_of(reentrant=None):
    model = Blocks()
    model.reentrant = reentrant
    callback = KnowsSpeaker(0.3, corrections=0, metric="two_sided", output_side="top_k", progress=False)
    return statistics(ClassifiesByName(Speaks(model)), pairs, callback)


def test_checkpointed_activations_make_no_difference_to_what_is_drawn():
    torch.manual_seed(0)
    plain = draws_of()
    torch.manual_seed(0)
    assert_close(plain, draws_of(reentrant=False), 1e-6)
    with pytest.raises(CalibrationError, match=r"blocks\.0\.0 ran without a graph \(6 layers\).*use_reentrant=False"):
        draws_of(reentrant=True)


@pytest.mark.parametrize("settings", [{"metric": "two_sided", "output_side": "top_k"}, {"correction_step": "refit"}])
def test_a_module_in_which_the_model_is_not_known_is_refused_before_any_batch(settings):
    fitted = trainer(
        ZSSVDCallback(0.3, "zs-svd-line-search", progress=False, correction_batches=2, **settings), max_epochs=9
    )
    with pytest.raises(LogitsError, match=r"holds 0 of transformers; override ZSSVDCallback\.student"):
        fitted.fit(Classifies(Blocks()), loader(pairs()))
    assert fitted.global_step == 0


def pairs(embeds=True):
    g = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 97, (4, 6, 7), generator=g) if embeds else torch.randn(4, 6, 7, 24, generator=g)
    return [(x, torch.randint(0, 30, (6, 7), generator=g)) for x in inputs]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_make_no_difference(reentrant):
    model = Blocks()
    other = copy.deepcopy(model)
    other.reentrant = reentrant
    assert_close(statistics(Classifies(model), pairs), statistics(Classifies(other), pairs), 1e-6)


def test_checkpointing_that_passes_no_gradient_on_is_refused_at_the_first_batch():
    model = Blocks(embeds=False)
    model.reentrant = True
    fitted = trainer(ZSSVDCallback(0.3, "zs-svd-line-search", corrections=0, progress=False), max_epochs=2)
    with pytest.raises(ZeroGradientError, match=r"no gradient at model\.blocks.*use_reentrant=False"):
        fitted.fit(Classifies(model), loader(pairs(embeds=False)))
    assert fitted.global_step == 0


class Teaches(CausalLM):
    """A student and a frozen teacher."""

    def __init__(self):
        super().__init__()
        self.teacher = tiny_llama()

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            wanted = self.teacher(**batch).logits.softmax(-1)
        output = self.model(**batch)
        return output.loss - (wanted * output.logits.log_softmax(-1)).mean()


@pytest.mark.parametrize("settings", [{"preset": "zs-svd-line-search"}, {"preset": "best", "output_side": "sampled"}])
def test_a_teacher_is_named_and_stays_dense_or_is_ignored(settings):
    """Drawn gradients, which are sent back from the student's logits, do not need its graph."""

    class Teaching(Teaches):
        validation_step = None

    class Student(ZSSVDCallback):
        def student(self, pl_module):
            return pl_module.model

    settings = {"corrections": 0, "progress": False} | settings
    torch.manual_seed(1)
    module, callback = Teaching(), Student(prune_ratio=0.3, **settings)
    with warned_once(LeftDenseWarning, r"14 of 28 .* teacher\.model\.layers.*no gradient came back.*ignore"):
        trainer(callback, max_epochs=2).fit(module, loader(token_batches()))
    assert callback.report.left_dense.keys() == find_targets(module, ["re:teacher.*"]).keys()
    torch.manual_seed(1)
    other, ignoring = Teaching(), Student(prune_ratio=0.3, ignore="re:teacher.*", **settings)
    trainer(ignoring, max_epochs=2).fit(other, loader(token_batches()))
    assert callback.report.layers == ignoring.report.layers
    assert ranks_of(module) == ranks_of(other)
    assert not ranks_of(module.teacher)


class SkipsABatch(CausalLM):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 2 else super().training_step(batch, batch_idx)


def test_a_batch_without_a_loss_is_refused():
    with pytest.raises(CalibrationError, match="no loss for calibration batch 2 of epoch 0"):
        trainer(ZSSVDCallback(0.3, "zs-svd-line-search", corrections=0, progress=False), max_epochs=2).fit(
            SkipsABatch(), loader(token_batches())
        )


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_modules_give_the_same_statistics_and_run_their_factors(whole):
    torch.compiler.reset()
    model = tiny_llama()
    plain = CausalLM(copy.deepcopy(model), lr=0.0)
    compiled = CausalLM(copy.deepcopy(model), lr=0.0)
    if whole:
        compiled = torch.compile(compiled, backend="aot_eager")
    else:
        compiled.model.model.layers[0].mlp.compile(backend="aot_eager")
        compiled.model.model.layers[1] = torch.compile(compiled.model.model.layers[1], backend="aot_eager")
    losses = [[], []]
    kept = []
    for module, seen in zip((plain, compiled), losses, strict=True):
        callback = Keeps(0.3, "zs-svd-line-search", corrections=0, schedule={"start_epoch": 1}, progress=False)
        diary = Diary(seen)
        torch.manual_seed(0)
        trainer(callback, diary, max_epochs=3).fit(module, loader(token_batches()))
        kept.append(callback.kept)
    strip = {name.replace("_orig_mod.", ""): name for name in kept[1].gradient_sums}
    assert strip.keys() == kept[0].gradient_sums.keys()
    for name, other in strip.items():
        G, H = kept[0].mean_gradient(name), kept[1].mean_gradient(other)
        assert (G - H).norm() <= 1e-4 * G.norm()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][8:] != losses[0][4:8]


class Diary(L.Callback):
    def __init__(self, losses):
        self.losses = losses

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
