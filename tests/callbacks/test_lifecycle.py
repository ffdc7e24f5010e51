import copy
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from support.callbacks import Keeps, short
from support.models import CausalLM, loader, padded_batches, state_of, tiny_llama, token_batches, trainer
from torch.utils.data import DataLoader, IterableDataset

from zssvd_lightning import CompressionConfig, LowRankLinear, Phase, Schedule, ZSSVDCallback, compress


class Diary(L.Callback):
    """Notes the phase and the weights at the start of every batch. Stands before the compression callback."""

    def __init__(self, callback: ZSSVDCallback) -> None:
        self.callback = callback
        self.phases: list[str] = []
        self.weights: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.phases.append(self.callback.phase.value)
        self.weights.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})


def fit(callback, batches=None, module=None, **settings):
    module = module or CausalLM()
    diary = Diary(callback)
    batches = batches or token_batches()
    fitted = trainer(diary, callback, **({"max_epochs": 6} | settings))
    fitted.fit(module, loader(batches))
    return module, diary, fitted


def changed(before, after):
    return any(not torch.equal(before[n], after[n]) for n in before)


def test_phases_follow_each_other():
    _, diary, _ = fit(short(start_epoch=1, corrections=1))
    # The phase is noted before the callback sees the batch, so each change shows one batch later.
    assert diary.phases[:5] == ["wait"] * 4 + ["wait"]
    assert diary.phases[5:8] == ["calibrate"] * 3
    assert diary.phases[8:12] == ["correct"] * 4
    assert diary.phases[12:16] == ["calibrate"] * 4
    assert diary.phases[16:] == ["recover"] * 8


def test_without_line_search_a_correction_takes_its_batches_once():
    _, diary, _ = fit(short(corrections=1, line_search=False))
    assert diary.phases[:10] == ["wait", *["calibrate"] * 3, *["correct"] * 2, *["calibrate"] * 4]


def test_weights_change_before_and_after_but_not_while_calibrating():
    _, diary, _ = fit(short(start_epoch=1, corrections=1))
    assert changed(diary.weights[3], diary.weights[4])
    for batch in range(5, 8):
        assert not changed(diary.weights[4], diary.weights[batch])
    assert changed(diary.weights[7], diary.weights[8])  # truncated
    assert not changed(diary.weights[8], diary.weights[9])
    assert changed(diary.weights[9], diary.weights[10])  # corrected
    assert not changed(diary.weights[10], diary.weights[11])
    assert changed(diary.weights[11], diary.weights[12])  # part of the step taken back
    for batch in range(13, 16):
        assert not changed(diary.weights[12], diary.weights[batch])
    assert changed(diary.weights[16], diary.weights[17])
    factors = [n for n in diary.weights[16] if n.endswith(("down.weight", "up.weight"))]
    assert factors
    assert all(not torch.equal(diary.weights[16][n], diary.weights[-1][n]) for n in factors)


def test_done_with_a_report_at_the_end():
    callback = short(corrections=0)
    assert callback.phase == "wait"
    assert callback.report is None
    module, _, _ = fit(callback)
    assert callback.phase == "done"
    assert callback.phase is Phase.DONE
    assert callback.report.reached >= 0.3
    assert {"calibrate", "spectrum", "select", "truncate", "factorize"} <= callback.report.seconds.keys()
    ranks = {n: m.rank for n, m in module.named_modules() if isinstance(m, LowRankLinear)}
    assert ranks == {n: layer.rank for n, layer in callback.report.layers.items() if layer.rank is not None}


@pytest.mark.parametrize("corrections", [0, 1, 5, 10])
def test_any_number_of_corrections(corrections):
    callback = short(corrections=corrections)
    fit(callback, max_epochs=24)
    assert callback.phase == "done"
    assert len(callback.report.losses) == 1 + 3 * corrections


@pytest.mark.parametrize("corrections", [0, 1])
@pytest.mark.parametrize("batches", [token_batches, padded_batches])
def test_gives_what_the_pipeline_gives_on_the_same_batches(batches, corrections):
    model = tiny_llama()
    other = copy.deepcopy(model)
    config = CompressionConfig(0.3, corrections=corrections, correction_batches=4, rank_multiple=1)
    given = batches()
    expected = compress(other, 2 * given, config, calibration_batches=len(given), progress=False)
    callback = short(corrections=corrections, correction_batches=4)
    fit(callback, given, CausalLM(model, lr=0.0))
    assert_same_compression(callback, model, expected, other)


def test_corrections_go_on_with_the_batches_after_calibration_as_in_the_pipeline():
    model, batches = tiny_llama(), token_batches(6)
    other = copy.deepcopy(model)
    settings = CompressionConfig(
        0.3, metric="two_sided", corrections=2, correction_batches=2, correction_step="natural", fresh_moments=False
    )
    expected = compress(other, batches, settings, calibration_batches=2, progress=False)
    callback = ZSSVDCallback.from_config(settings, schedule=Schedule(calibration_batches=2), progress=False)
    fit(callback, batches, CausalLM(model, lr=0.0))
    assert_same_compression(callback, model, expected, other)


def assert_same_compression(callback, model, expected, other):
    assert {n.removeprefix("model."): v for n, v in callback.report.layers.items()} == expected.layers
    assert callback.report.losses == pytest.approx(expected.losses, rel=1e-5)
    for name, module in other.named_modules():
        if isinstance(module, LowRankLinear):
            mine = model.get_submodule(name)
            torch.testing.assert_close(
                mine.up.weight @ mine.down.weight, module.up.weight @ module.down.weight, rtol=1e-3, atol=1e-5
            )


def test_gives_the_same_to_the_bit_each_time():
    modules = []
    for _ in range(2):
        torch.manual_seed(0)
        module, _, _ = fit(short(corrections=1))
        modules.append(state_of(module)["weights"])
    assert modules[0].keys() == modules[1].keys()
    assert all(torch.equal(modules[0][n], modules[1][n]) for n in modules[0])


@pytest.mark.parametrize("settings", [{"accumulate_grad_batches": 3}, {"gradient_clip_val": 1e-6}])
def test_trainer_settings_do_not_change_the_choice(settings):
    def ranks(**settings):
        torch.manual_seed(0)
        callback = short(corrections=0)
        fit(callback, padded_batches(), **settings)
        return callback.report

    plain, other = ranks(), ranks(**settings)
    assert other.losses == pytest.approx(plain.losses, rel=1e-5)
    assert other.layers == plain.layers
    assert other.first_order_sum == pytest.approx(plain.first_order_sum, rel=1e-3)


def half_precision(init_scale):
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale))


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16-mixed"},
        {"plugins": [half_precision(1024.0)]},
        {"plugins": [half_precision(1024.0)], "accumulate_grad_batches": 3},
    ],
)
def test_statistics_do_not_depend_on_precision_or_loss_scale(settings):
    def statistics(**settings):
        torch.manual_seed(0)
        callback, module = Keeps(0.3, "zs-svd-line-search", corrections=0, progress=False), CausalLM()
        module.model.model.layers[0].requires_grad_(False)
        module.configure_optimizers = lambda: torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])
        fit(callback, padded_batches(), module, **settings)
        return callback.kept

    plain, other = statistics(), statistics(**settings)
    assert plain.loss_terms == other.loss_terms
    assert plain.tokens == other.tokens
    for name in plain.gradient_sums:
        mean, same = plain.mean_gradient(name), other.mean_gradient(name)
        assert (mean - same).norm() < 0.03 * mean.norm(), name
        A, B = plain.second_moment(name), other.second_moment(name)
        assert (A - B).norm() < 0.02 * A.norm(), name


def test_batches_whose_gradients_overflow_are_not_counted(caplog):
    callback = Keeps(0.3, "zs-svd-line-search", corrections=0, progress=False)
    fit(callback, plugins=[half_precision(2.0**31)], max_epochs=12)
    assert "overflowed" in caplog.text
    assert callback.phase == "done"
    assert callback.kept.batches == 4
    assert callback.kept.loss_terms == 4 * 4 * 23


def test_accumulated_calibration_ends_with_its_window():
    callback = short(corrections=0, calibration_batches=2)
    _, diary, _ = fit(callback, accumulate_grad_batches=3)
    assert diary.phases[:5] == ["wait", "calibrate", "calibrate", "recover", "recover"]


def test_calibration_may_run_over_the_end_of_an_epoch():
    callback = short(corrections=0, calibration_batches=6, calibration_epochs=2)
    _, diary, _ = fit(callback)
    assert diary.phases[:8] == ["wait", *["calibrate"] * 5, "recover", "recover"]


def test_set_point_by_step():
    _, diary, _ = fit(short(corrections=0, start_step=6))
    assert diary.phases.index("calibrate") == 7


def test_validation_and_sanity_batches_are_not_counted():
    class Count(L.Callback):
        tokens = 0

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if callback.phase is Phase.CALIBRATE:
                self.tokens = max(callback.statistics.tokens.values())

    callback, count = short(corrections=0), Count()
    fitted = trainer(count, callback, max_epochs=3, val_check_interval=1, num_sanity_val_steps=2)
    fitted.fit(CausalLM(), loader(token_batches()), loader(token_batches(3)))
    assert count.tokens == 4 * 4 * 24
    assert callback.phase == "done"


def test_optimizers_and_schedules_start_afresh_with_the_factors():
    class Scheduled(CausalLM):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1.0)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1e-5 * (step + 1))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    class Rates(L.Callback):
        seen: list[float]

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.seen = [*getattr(self, "seen", []), trainer.optimizers[0].param_groups[0]["lr"]]

    rates = Rates()
    module = Scheduled()
    callback = short(corrections=0)
    fitted = trainer(callback, rates, max_epochs=2)
    fitted.fit(module, loader(token_batches()))
    assert rates.seen == pytest.approx([1e-5, 2e-5, 3e-5, 4e-5, 1e-5, 2e-5, 3e-5, 4e-5])
    grouped = [p for group in fitted.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in module.parameters()}


def test_a_second_fit_just_trains_on():
    callback = short(corrections=0)
    module, _, _ = fit(callback)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    _, diary, _ = fit(callback, module=module, max_epochs=1)
    assert set(diary.phases) == {"done"}
    assert changed(before, dict(module.named_parameters()))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(token_batches())


def test_a_stream_without_a_length_will_do():
    callback = short(corrections=1, calibration_batches=6, start_epoch=1)
    trainer(callback, max_epochs=8).fit(CausalLM(), DataLoader(Stream(), batch_size=None))
    assert callback.phase == "done"


def test_a_stream_is_gone_through_once_by_default():
    callback = short(corrections=0)
    diary = Diary(callback)
    trainer(diary, callback, max_epochs=3).fit(CausalLM(), DataLoader(Stream(), batch_size=None))
    assert diary.phases == ["wait", *["calibrate"] * 3, *["recover"] * 8]


def test_defaults_work_on_a_long_enough_run():
    callback = ZSSVDCallback(progress=False)
    fit(callback, max_epochs=20)
    assert callback.phase == "done"
    assert callback.report.reached >= 0.2
