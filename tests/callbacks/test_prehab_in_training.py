"""Low-Rank Prehab in training runs, alone and before a compression."""

import copy
import gc
import pickle
import weakref
from contextlib import nullcontext
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from support.callbacks import Keeps, scheduled, short
from support.models import (
    CausalLM,
    assert_same_state,
    loader,
    padded_batches,
    state_of,
    tiny_gpt2,
    token_batches,
    trainer,
)
from support.warned import warned_once
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from zssvd_lightning import Phase
from zssvd_lightning.callbacks.prehab import LowRankPrehab
from zssvd_lightning.errors import (
    CalibrationError,
    CheckpointError,
    NonFiniteError,
    NotRegularizedWarning,
    TargetError,
    UnsupportedTrainingError,
)
from zssvd_lightning.model.targets import find_targets
from zssvd_lightning.prehab import regularizers

MOMENTS = 4
FLOAT64 = {"precision": "64-true"}


def prehab(**settings) -> LowRankPrehab:
    return LowRankPrehab(**({"steps": 5, "moment_batches": MOMENTS, "weight": 0.3} | settings))


class Own(CausalLM):
    """Notes the gradients that its optimizer steps on."""

    def __init__(self, model=None, lr=1e-2):
        torch.manual_seed(0)
        super().__init__(model, lr=lr)
        self.gradients = []

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.gradients.append({n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Diary(L.Callback):
    """Notes the losses, and the phase and weights before each batch."""

    def __init__(self):
        self.losses, self.phases, self.weights, self.told = [], [], [], {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.weights.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = outputs.get("loss", torch.tensor(torch.nan))
        self.losses.append(loss.item() * trainer.accumulate_grad_batches)
        self.phases.append([c.phase for c in trainer.callbacks if isinstance(c, Keeps)])


class Told(DummyLogger):
    """Keeps the weight and the value of the term at every step that has them."""

    def __init__(self):
        super().__init__()
        self.told = {}

    def log_metrics(self, metrics, step):
        if "zssvd/prehab_weight" in metrics:
            self.told[step] = [metrics[name] for name in sorted(metrics, key="zssvd/prehab_weight".__ne__)]


def fit(module, *callbacks, data=None, ckpt_path=None, **settings):
    diary, told = Diary(), Told()
    fitted = trainer(*callbacks, diary, **({"logger": told, "log_every_n_steps": 1} | settings))
    data = loader(token_batches(12) if data is None else data) if isinstance(data, list | None) else data
    fitted.fit(module, data, ckpt_path=ckpt_path)
    diary.told = told.told
    return diary


def second_moments(module, batches):
    """`X^T X / T` of every layer, by hooks of our own, over tokens that are not padding."""
    sums, tokens = {}, {}

    def add(name, X, mask):
        X = X.detach()[mask].double()
        sums[name] = sums.get(name, 0) + X.T @ X
        tokens[name] = tokens.get(name, 0) + len(X)

    for batch in batches:
        mask = batch["attention_mask"].bool()
        handles = [
            target.module.register_forward_pre_hook(lambda _, args, name=name, mask=mask: add(name, args[0], mask))
            for name, target in find_targets(module).items()
        ]
        module.model(**batch)
        for handle in handles:
            handle.remove()
    return {name: total / tokens[name] for name, total in sums.items()}


def mean_of(regularizer, weights, moments):
    """The mean over layers, by decompositions in float64."""
    values = []
    for name, A in moments.items():
        sigma = torch.linalg.svdvals(weights[f"{name}.weight"].double() @ torch.linalg.cholesky(A))
        values.append(sigma.sum() if regularizer == "nuclear" else sigma.square().sum() / sigma[0].square())
    return torch.stack(values).mean()


class WithTerm(Own):
    """Has the term in its loss, from step 4 on."""

    def __init__(self, regularizer, moments):
        super().__init__(lr=0.0)
        self.regularizer, self.moments = regularizer, moments

    def training_step(self, batch, batch_idx):
        loss, done = super().training_step(batch, batch_idx), self.global_step + 1 - MOMENTS
        if done < 1:
            return loss
        with torch.autocast("cpu", enabled=False):
            return loss + 0.3 * min(done / 5, 1) * mean_of(
                self.regularizer, dict(self.named_parameters()), self.moments
            )


@pytest.fixture
def converged(monkeypatch):
    monkeypatch.setattr(regularizers, "FIRST_ITERATIONS", 1000)


@pytest.mark.parametrize(
    ("regularizer", "settings"),
    [
        ("stable_rank", FLOAT64),
        ("nuclear", FLOAT64 | {"accumulate_grad_batches": 2}),
        ("nuclear", FLOAT64 | {"gradient_clip_val": 0.1}),
        ("stable_rank", {"precision": "bf16-mixed"}),
    ],
)
def test_the_optimizer_steps_on_the_gradient_of_the_loss_and_the_term(converged, regularizer, settings):
    """Of two batches a step: 7 batches for second moments take the eighth along."""
    accumulate = settings.get("accumulate_grad_batches", 1)
    data, module = padded_batches(10 * accumulate), Own(lr=0.0)
    mixed = settings.get("precision") == "bf16-mixed"
    with torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext():
        moments = second_moments(module, data[: MOMENTS * accumulate])
    expected = WithTerm(regularizer, moments)
    fit(expected, data=data, **settings)
    callback = prehab(regularizer=regularizer, moment_batches=MOMENTS * accumulate - (accumulate - 1))
    with_prehab = fit(module, callback, data=data, **settings)
    assert len(module.gradients) == len(expected.gradients) == 10
    for ours, theirs in zip(module.gradients, expected.gradients, strict=True):
        tolerance = {"rtol": 2e-3, "atol": 1e-4} if mixed else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(ours, theirs, **tolerance)
    weights, values = zip(*with_prehab.told.values(), strict=True)
    assert list(with_prehab.told) == list(range(MOMENTS, 10))
    assert weights == pytest.approx([0.3 * min(k / 5, 1) for k in range(1, 7)])
    exact = float(mean_of(regularizer, with_prehab.weights[-1], moments))
    assert values == pytest.approx([exact] * 6, rel=1e-2 if mixed else 1e-6)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision):
    data = token_batches(MOMENTS + 1)
    moments, module = second_moments(Own(), data[:MOMENTS]), Own(lr=0.0)
    diary = fit(module, prehab(steps=1), data=data, precision=precision)
    (told,) = diary.told.values()
    assert told == pytest.approx([0.3, float(mean_of("stable_rank", diary.weights[-1], moments))], rel=1e-2)
    kind = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    assert {gradient.dtype for gradient in module.gradients[-1].values()} == {kind}


class Fused(Own):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0, fused=True)


def test_the_loss_scale_of_float16_is_left_to_optimizers_that_take_it_off(converged):
    """In steps of fused optimizers the gradients are still multiplied by it, in those of others not."""

    def plugin(scale):
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))

    added, data = [], token_batches(MOMENTS + 1)
    for build, scale in ((Own, 1.0), (Fused, 1024.0)):
        module, without = build(lr=0.0), build(lr=0.0)
        fit(module, prehab(weight=5.0, steps=1), data=data, plugins=[plugin(scale)])
        fit(without, data=data, plugins=[plugin(scale)])
        added.append({n: (g - without.gradients[-1][n]) / scale for n, g in module.gradients[-1].items()})
    torch.testing.assert_close(added[0], added[1], rtol=1e-3, atol=1e-5)
    assert max(difference.abs().max() for difference in added[0].values()) > 1e-2

    overflowing = fit(Own(lr=0.0), prehab(steps=1), data=token_batches(12), plugins=[plugin(2.0**28)])
    assert 0 < len(overflowing.told) < 12 - MOMENTS


def test_training_with_the_term_lowers_the_rank_more_than_without():
    found = {}
    for weight in (1e-9, 1.0):
        module, data = Own(), token_batches(20)
        moments = second_moments(module, data[:MOMENTS])
        diary = fit(module, prehab(weight=weight), data=data)
        found[weight] = mean_of("stable_rank", diary.weights[-1], moments)
    assert found[1.0] < 0.9 * found[1e-9]


def test_only_the_layers_that_are_asked_for_and_not_frozen_are_regularized():
    module, without = Own(), Own()
    for each in (module, without):
        each.model.model.layers[0].mlp.up_proj.weight.requires_grad = False
    data = token_batches(MOMENTS + 1)
    fit(without, data=data, **FLOAT64)
    fit(module, prehab(include="*.layers.0.*", ignore=["q_proj"]), data=data, **FLOAT64)
    found, plain = module.gradients[MOMENTS], without.gradients[MOMENTS]
    expected = {f"{name}.weight" for name in find_targets(module, "*.layers.0.*", ["q_proj", "up_proj"])}
    assert found.keys() == plain.keys()
    assert {name for name, gradient in found.items() if not torch.equal(gradient, plain[name])} == expected


def compression(**settings):
    return Keeps(
        **scheduled(
            {
                "preset": "zs-svd-line-search",
                "prune_ratio": 0.3,
                "correction_batches": 2,
                "calibration_batches": 4,
                "progress": False,
            }
            | settings
        )
    )


class Frees(L.Callback):
    """Looks at the end of training whether the dense layers are still somewhere."""

    def on_train_start(self, trainer, pl_module):
        self.dense = {name: weakref.ref(target.module) for name, target in find_targets(pl_module).items()}

    def on_train_end(self, trainer, pl_module):
        gc.collect()
        self.left = {name for name, module in self.dense.items() if module() is not None}


def test_it_ends_when_a_compression_begins_whichever_callback_is_first():
    waited, data = MOMENTS + 5, token_batches(28)
    for first in (True, False):
        compressing, preparing, frees = compression(start_step=waited), prehab(), Frees()
        callbacks = [preparing, compressing] if first else [compressing, preparing]
        diary = fit(Own(), frees, *callbacks, data=data)
        assert diary.phases[waited - 1] == [Phase.WAIT]
        assert diary.phases[waited] == [Phase.CALIBRATE]
        assert list(diary.told) == list(range(MOMENTS, waited))
        assert compressing.phase is Phase.DONE
        assert frees.left == {n for n, layer in compressing.report.layers.items() if layer.rank is None}
        assert preparing.state_dict()["kept"] == {}

        if first:
            alone, same = Own(), compression()
            alone.load_state_dict(diary.weights[waited], strict=False)
            fit(alone, same, data=data[waited:])
        assert same.report.losses == compressing.report.losses
        for part in ("input_sums", "gradient_sums"):
            ours, theirs = getattr(compressing.kept, part), getattr(same.kept, part)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("first", "early", "settings"),
    [
        (True, {"start_step": 8}, {}),
        (False, {"start_epoch": 1}, {}),
        (True, {}, {}),
        (False, {"start_step": 6}, {"accumulate_grad_batches": 2}),
    ],
)
def test_a_compression_that_would_begin_too_early_is_refused(first, early, settings):
    module = Own().train()
    before = state_of(module)
    callbacks = [prehab(), compression(**early)][:: 1 if first else -1]
    ends = MOMENTS // settings.get("accumulate_grad_batches", 1) + 5
    begins = early.get("start_step", 8 * early.get("start_epoch", 0))
    with pytest.raises(
        UnsupportedTrainingError, match=f"begin at step {begins} .* until step {ends} .*start_step={ends}"
    ):
        fit(module, *callbacks, data=token_batches(8), max_epochs=9, **settings)
    assert_same_state(before, state_of(module))


def test_a_compression_may_begin_as_soon_as_prehab_has_had_its_steps(caplog):
    settings = {"max_steps": 8, "max_epochs": 9, "accumulate_grad_batches": 2}
    with pytest.raises(UnsupportedTrainingError, match=r"needs .* training batches"):  # of the compression itself
        fit(Own(), prehab(), compression(start_step=7), data=token_batches(8), **settings)
    fit(Own(), prehab(), data=token_batches(8), **settings | {"max_steps": 7})
    assert "grown" not in caplog.text


class Endless(IterableDataset):
    def __iter__(self):
        return iter(token_batches(6))


def test_too_few_steps_are_warned_about(caplog):
    callbacks = prehab(steps=50), compression(start_epoch=1, corrections=0)
    fit(Own(), *callbacks, data=torch.utils.data.DataLoader(Endless(), batch_size=None), max_epochs=3)
    assert (
        caplog.text.count("compression has begun at step 6, before the weight of LowRankPrehab has grown to 0.3") == 1
    )
    assert "the fit has ended" not in caplog.text
    fit(Own(), prehab(), max_steps=MOMENTS + 4)
    assert caplog.text.count("the fit has ended at step 8, before the weight of LowRankPrehab has grown to 0.3") == 1


class Saves(L.Callback):
    """Saves a checkpoint the n-th time a hook runs, to a file of that name, and lets the run go on."""

    def __init__(self, folder: Path, hook: str, *at: int) -> None:
        self.folder, self.hook, self.at, self.times = folder, hook, at, 0
        setattr(self, hook, self._save)

    @property
    def state_key(self):
        return f"{self.folder}{self.hook}"

    def _save(self, trainer, *_, **__):
        self.times += 1
        if self.times in self.at:
            trainer.save_checkpoint(self.folder / f"{self.hook}-{self.times}.ckpt")


def assert_ends_alike(ours, theirs):
    assert all(torch.equal(w, ours.state_dict()[n]) for n, w in theirs.state_dict().items())


def assert_same(ours, theirs):
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert_same(value, theirs[key])
    else:
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def test_a_run_that_was_cut_off_ends_like_one_that_was_not_to_the_last_bit(tmp_path):
    """Wherever it is: Lightning resumes a batch that is not over with that batch, or the next, so all are alike."""
    hooks = ["on_train_batch_start", "on_before_zero_grad", "on_train_batch_end", "on_before_optimizer_step"]
    data = token_batches(1) * 12
    folders = [tmp_path / name for name in ("told_after", "told_before")]  # that the batch is over
    saving = [[Saves(folder, hook, 2, MOMENTS, MOMENTS + 1, MOMENTS + 3) for hook in hooks] for folder in folders]
    whole = Own()
    expected = fit(whole, *saving[0], prehab(), *saving[1], data=data)
    undisturbed = Own()
    fit(undisturbed, prehab(), data=data)
    assert_ends_alike(undisturbed, whole)
    cases = [(f, hook, at) for f in folders for hook, at in ((hooks[2], 2), (hooks[2], MOMENTS + 3))]
    cases += [(folders[0], hooks[0], 2), (folders[1], hooks[0], MOMENTS + 1), (folders[0], hooks[2], MOMENTS)]
    cases += [(folders[1], hooks[1], 2), (folders[1], hooks[1], MOMENTS + 3), (folders[1], hooks[3], MOMENTS + 3)]
    for folder, hook, at in cases:
        path = folder / f"{hook}-{at}.ckpt"
        torch.load(path, weights_only=True)
        diary = fit(resumed := Own(), prehab(), data=data, ckpt_path=path)
        assert diary.losses == expected.losses[at if hook == "on_train_batch_end" else at - 1 :], path
        assert_ends_alike(resumed, whole)


def test_a_run_with_windows_epochs_and_a_compression_goes_on_too(tmp_path):
    def run(module, **settings):
        data = StatefulDataLoader(token_batches(9), batch_size=None)
        callbacks = prehab(), short(start_step=8, calibration_batches=3)
        return fit(module, *callbacks, *saving, data=data, accumulate_grad_batches=2, max_epochs=6, **settings)

    at = 2, 11, 20, 40  # behind a step each: Lightning loses the gradients of an open window
    saving = [Saves(tmp_path, "on_train_batch_end", *at)]
    expected, saving = run(whole := Own()), []
    for batches in at:
        path = tmp_path / f"on_train_batch_end-{batches}.ckpt"
        diary = run(resumed := Own(), ckpt_path=path)
        assert diary.losses == expected.losses[-len(diary.losses) :]
        assert_ends_alike(resumed, whole)
    assert torch.load(path)["callbacks"]["LowRankPrehab"]["kept"] == {}


def test_a_skipped_batch_does_not_count_when_a_checkpoint_is_saved_after_it(tmp_path):
    ends = {}
    for saving in (Saves(tmp_path, "on_train_epoch_end", 1), L.Callback()):
        fit(module := Skips(), saving, prehab(), data=token_batches(5), max_epochs=3)
        ends[type(saving)] = module
    assert_ends_alike(*ends.values())
    state = torch.load(tmp_path / "on_train_epoch_end-1.ckpt")["callbacks"]["LowRankPrehab"]
    assert state["gathering"]["moments"]["batches"] == 3


@pytest.mark.parametrize("at", [2, MOMENTS + 2])
def test_after_a_fit_the_layers_are_free_and_its_checkpoint_is_as_before(tmp_path, at):
    module, callback, data = Own(), prehab(), token_batches(9)
    fitted = trainer(callback, Saves(tmp_path, "on_train_batch_end", at), max_steps=at)
    fitted.fit(module, loader(data))
    fitted.save_checkpoint(tmp_path / "after.ckpt")
    block = module.model.model.layers[0].mlp
    layer, block.up_proj = weakref.ref(block.up_proj), torch.nn.Identity()
    gc.collect()
    assert layer() is None

    last, frozen = tmp_path / f"on_train_batch_end-{at}.ckpt", Own()
    ours, theirs = (torch.load(path)["callbacks"]["LowRankPrehab"] for path in (tmp_path / "after.ckpt", last))
    for part in ("vectors", "kept") if at > MOMENTS else ("gathering",):
        assert ours[part]
        assert_same(ours[part], theirs[part])
    assert ours["begins_at"] == theirs["begins_at"]

    frozen.model.model.layers[0].mlp.up_proj.weight.requires_grad = False
    with pytest.raises(CheckpointError, match=r"of other layers: 1 .* \(model.model.layers.0.mlp.up_proj\)"):
        fit(frozen, prehab(), data=data, ckpt_path=last)


def test_a_checkpoint_from_before_the_callback_was_there_starts_prehab(tmp_path):
    data = token_batches(1) * 12
    fit(Own(), Saves(tmp_path, "on_train_batch_end", 3), data=data)
    diary = fit(Own(), prehab(), data=data, ckpt_path=tmp_path / "on_train_batch_end-3.ckpt")
    assert list(diary.told) == list(range(3 + MOMENTS, 12))


def test_validation_takes_up_nothing_a_second_fit_starts_afresh_and_copies_take_nothing_along(tmp_path):
    callback, data = prehab(include=("q_proj",)), token_batches(MOMENTS + 2)
    fit(Own(), callback, Saves(tmp_path, "on_train_batch_end", MOMENTS + 2), data=data)
    other = prehab(steps=9)
    trainer(other).validate(Own(), loader(data), ckpt_path=tmp_path / f"on_train_batch_end-{MOMENTS + 2}.ckpt")
    assert other.state_dict()["kept"] == {}
    for copied in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert copied.state_dict()["settings"] == callback.state_dict()["settings"]
        assert callback.state_dict()["kept"].keys() - copied.state_dict()["kept"].keys()
    for again in (callback, copied):
        assert list(fit(Own(), again, data=data).told) == [MOMENTS, MOMENTS + 1]


class Logs(Own):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss


def test_loggers_are_told_as_often_as_by_lightning_and_of_the_loss_without_the_term():
    told = {}
    for callbacks in ([prehab(weight=9.0)], []):
        logged = []
        logger = Told()
        logger.log_metrics = lambda metrics, step, logged=logged: logged.append(metrics | {"step": step})
        fit(Logs(lr=0.0), *callbacks, logger=logger, log_every_n_steps=3)
        told[len(callbacks)] = logged
    assert {m["step"] for m in told[1] if "zssvd/stable_rank" in m} == {5, 8, 11}
    losses = [[(m["step"], m["train_loss"]) for m in logged if "train_loss" in m] for logged in told.values()]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == [2, 5, 8, 11]


class Fails(L.Callback):
    def __init__(self, hook, at):
        self.left = at
        setattr(self, hook, self._hook)

    def _hook(self, *_, **__):
        self.left -= 1
        if self.left == 0:
            raise ConnectionError


@pytest.mark.parametrize(("hook", "at"), [("on_train_batch_start", 2), ("on_before_zero_grad", 2)])
def test_a_failed_run_leaves_the_module_as_it_was(hook, at):
    module = Own(lr=0.0).train()
    before = state_of(module)
    for callbacks in ([prehab(), Fails(hook, at)], [Fails(hook, at), prehab()]):
        with pytest.raises(ConnectionError):
            fit(module, *callbacks)
        module.zero_grad()
        assert_same_state(before, state_of(module))


class Manual(Own):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Frozen(Own):
    def __init__(self):
        super().__init__()
        for target in find_targets(self).values():
            target.module.weight.requires_grad = False


class NeverRuns(Own):
    def __init__(self):
        super().__init__()
        self.spare = torch.nn.Linear(32, 32)


def test_layers_that_the_first_batches_do_not_reach_are_left_out(tmp_path):
    """As if they were not among the layers; in a resumed fit too."""
    data, halfway = token_batches(MOMENTS + 4), MOMENTS + 2
    folder = str(tmp_path / "halfway.ckpt")

    class Saves(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == halfway:
                trainer.save_checkpoint(folder)

    diaries = {}
    for name, settings in {"ignored": {"ignore": "*spare"}, "left out": {}, "resumed": {}}.items():
        torch.manual_seed(0)
        module = NeverRuns().train()
        resumes = name == "resumed"
        expected = warned_once(NotRegularizedWarning, "leaves out 1 of 15 layers, .* spare: saw no token; calibrate")
        given = {"ckpt_path": folder} if resumes else {}
        loads = StatefulDataLoader(data, batch_size=None)
        with expected if name == "left out" else nullcontext():
            diaries[name] = (
                module,
                fit(module, prehab(**settings), Saves(), data=loads, **given),
            )
        assert module.spare.weight.grad is None
    for name in ("left out", "resumed"):
        assert_same_state(state_of(diaries["ignored"][0]), state_of(diaries[name][0]))
    assert diaries["left out"][1].told == diaries["ignored"][1].told


class Diverges(Own):
    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == MOMENTS + 2:
            self.model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan


CASES = {
    "manual": (Manual, {}, UnsupportedTrainingError, "Manual optimizes manually"),
    "frozen": (Frozen, {}, UnsupportedTrainingError, "all 14 layers to regularize are frozen"),
    "target": (Own, {"include": "nothing"}, TargetError, "matches no module"),
    "never runs": (NeverRuns, {"include": "spare"}, CalibrationError, r"reached none of the 1 layers\. spare: saw no"),
    "nan": (Diverges, {}, NonFiniteError, r"stable_rank of model.model.layers.1.mlp.up_proj \(48, 32\) is nan"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_done_is_a_named_error(case):
    build, settings, error, message = CASES[case]
    module = build().train()
    hooks = state_of(module)["hooks"]
    with pytest.raises(error, match=message):
        fit(module, prehab(**settings))
    assert state_of(module)["hooks"] == hooks


def test_frozen_layers_beside_trained_ones_stay_as_they_are():
    """Of Conv1D, and with decay, which an optimizer takes off weights that have a gradient."""
    module = Own(tiny_gpt2())
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1, weight_decay=0.1)
    frozen, trained = module.model.transformer.h[0].mlp.c_fc.weight, module.model.transformer.h[1].mlp.c_fc.weight
    frozen.requires_grad = False
    before = frozen.detach().clone()
    diary = fit(module, prehab(), data=token_batches(MOMENTS + 1))
    assert torch.equal(frozen, before)
    assert diary.told
    assert trained.grad.shape == trained.shape


class Counts(LowRankPrehab):
    """Keeps how many tokens each second moment is of."""

    tokens = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        moments = self._run.gathering.moments if self._run.gathering else None
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if moments is not None and self._run.gathering is None:
            self.tokens = dict(moments.tokens)


class Skips(Own):
    """Gives no loss for the second batch, and leaves out the rest of the first epoch from the fourth."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 1 and self.current_epoch == 0 else loss

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if self.current_epoch == 0 and batch_idx == 3 else None


def test_activation_checkpointing_compiled_code_and_skipped_batches_count_once():
    checkpointed, compiled = Own(), Own()
    checkpointed.model.gradient_checkpointing_enable()
    torch.compiler.reset()
    compiled.model.model.layers[0].mlp.compile(backend="eager")
    compiled.train().model(**token_batches(1)[0]).loss.backward()  # compiles it, without the hooks to come
    for module in (Own(), checkpointed, compiled, Skips()):
        counting = Counts(5, moment_batches=MOMENTS)
        fit(module, counting, data=token_batches(MOMENTS + 1), max_epochs=2, max_steps=MOMENTS + 1)
        assert set(counting.tokens.values()) == {MOMENTS * 4 * 24}
        assert len(counting.tokens) == 8
        assert not any(m._forward_pre_hooks for m in module.modules())


def test_a_step_without_a_loss_takes_no_term():
    class NoLoss(Own):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == MOMENTS + 1 else super().training_step(batch, batch_idx)

    diary = fit(NoLoss(), prehab(steps=1), data=token_batches(MOMENTS + 3))
    moved = [
        any(not torch.equal(w, after[n]) for n, w in before.items())
        for before, after in zip(diary.weights[MOMENTS:], diary.weights[MOMENTS + 1 :], strict=False)
    ]
    assert moved == [True, False]
    assert list(diary.told) == [MOMENTS, MOMENTS + 2]


class Module(Own):
    def __init__(self) -> None:
        super().__init__()

    def train_dataloader(self):
        return loader(token_batches(12))


def test_lightning_cli_builds_it_from_yaml(tmp_path):
    settings = {"steps": 3, "weight": 2, "regularizer": "nuclear", "ignore": ["q_proj"], "include": None}
    callback = {"class_path": "zssvd_lightning.callbacks.prehab.LowRankPrehab", "init_args": settings}
    limits = {"accelerator": "cpu", "max_steps": 1, "logger": False, "enable_checkpointing": False}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"trainer": limits | {"callbacks": [callback]}}))
    ran = LightningCLI(Module, args=["fit", "--config", str(file)], save_config_callback=None)
    (built,) = [c for c in ran.trainer.callbacks if isinstance(c, LowRankPrehab)]
    assert (built.steps, built.weight, built.regularizer, built.ignore) == (3, 2.0, "nuclear", ["q_proj"])
