from dataclasses import asdict, fields
from pathlib import Path

import pytest

from zssvd_lightning import CompressionConfig, RunConfig, Schedule, ZSSVDCallback, load_config
from zssvd_lightning.callbacks.schedule import CallbackSettings
from zssvd_lightning.config.compression import settings_of_saved
from zssvd_lightning.config.presets import FOLDER, PRESETS, settings_of, trained_by
from zssvd_lightning.config.settings import CompressionSettings, Settings
from zssvd_lightning.errors import ConfigError, ContradictionError
from zssvd_lightning.recovery.methods import recovery_of

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
CONFIGS = [file for file in FILES if "\ntrainer:" not in file.read_text()]
"""The others are for Lightning's command line."""
MANDATORY = ["model.source=m", "calibration.text=t", "output=o"]


def test_there_are_configs():
    assert {c.stem for c in CONFIGS} >= {"zs-20", "zs-40", "zs-60", "demo"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_config_names_its_command_first(path):
    assert str(path.relative_to(ROOT)) in path.read_text().splitlines()[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_config_loads(path):
    assert load_config(RunConfig, path).output


def test_later_settings_win(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: {source: m}\ncalibration: {text: t}\noutput: o\ncompression: {prune_ratio: 0.3}\n")
    assert load_config(RunConfig, path).compression.prune_ratio == 0.3
    config = load_config(RunConfig, path, ["compression.prune_ratio=0.4", "compression.include=[q_proj]"])
    assert config.compression.prune_ratio == 0.4
    assert config.compression.include == ["q_proj"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compression.prune_ration=0.4", "did you mean 'compression.prune_ratio'"),
        ("prune_ratio=0.4", "did you mean 'compression.prune_ratio'"),
        ("calibraton.text=x", "did you mean 'calibration.text'"),
        ("correction=2", "did you mean 'compression.corrections'"),
        ("training.step=2", "did you mean 'training.steps'"),
        ("zzz=1", "there are preset, model.source"),
        ("compression.prune_ratio=lots", "compression.prune_ratio"),
        ("compression.prune_ratio=1.0", "strictly between 0 and 1"),
        ("compression.prune_ratio=40", "strictly between 0 and 1: 0.4 for 40%"),
        ("compression.metric=imput", "did you mean 'input'"),
        ("compression.selection=zerosum", "did you mean 'zero_sum'"),
        ("compression.corrections=-1", "0 or more"),
        ("compression.min_rank_fraction=2", r"in \[0, 1\]"),
        ("calibration.samples=0", "1 or more"),
        ("calibration={second: u, samples: 1}", "2 or more for two texts"),
        ("calibration={text: u, second: u}", "another text than calibration.text"),
        ("calibration.correction_samples=-1", "0 or more"),
        ("calibration={samples: 6, batch_size: 4, correction_samples: 2}", "whole batches of 4"),
        ("calibration.length=1", "2 or more"),
        ("evaluation.windows=-1", "0 or more"),
        ("model.dtype=float7", "did you mean"),
        ("compression", "key=value"),
        ("compression=[1", "compression"),
    ],
)
def test_bad_settings_say_what_to_do(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(RunConfig, None, [*MANDATORY, override])


@pytest.mark.parametrize("missing", ["model.source", "calibration.text", "output"])
def test_missing_values_are_named(missing):
    with pytest.raises(ConfigError, match=missing):
        load_config(RunConfig, None, [m for m in MANDATORY if not m.startswith(missing)])


@pytest.mark.parametrize("content", ["a: [", "- 1\n- 2\n", "just text"])
def test_files_that_are_no_config(tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError):
        load_config(RunConfig, path)


def test_absent_file():
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(RunConfig, "nowhere.yaml")


def test_config_is_frozen():
    with pytest.raises(AttributeError):
        CompressionConfig().prune_ratio = 0.3  # type: ignore[misc]


def test_every_preset_is_a_valid_compression_and_cites_its_source():
    assert (
        *("asvd", "best", "fwsvd", "io-svd", "mpifa", "plain-svd"),
        *("svd-llm", "zs-svd", "zs-svd-5x", "zs-svd-line-search", "zs-svd-pivoted"),
    ) == PRESETS
    for preset in PRESETS:
        assert CompressionConfig.of(preset, prune_ratio=0.3) == CompressionConfig(
            **settings_of(preset), prune_ratio=0.3
        )
        text = (FOLDER / f"{preset}.yaml").read_text(encoding="utf-8")
        assert "arXiv" in text or preset in ("plain-svd", "best")


def test_a_preset_that_trains_has_a_recovery_that_a_method_replaces():
    rest = ["preset=best-trained", "model=m", "calibration.text=t", "output=o"]
    found = load_config(RunConfig, None, rest)
    assert found.compression == CompressionConfig.of("best")
    base, recovery = trained_by("best-trained")
    assert (base, found.recovery) == ("best", recovery)
    assert recovery_of(recovery).loss == "both"
    assert load_config(RunConfig, None, [*rest, "recovery.lr=0.5"]).recovery == recovery | {"lr": 0.5}
    assert load_config(RunConfig, None, [*rest, "recovery=lora"]).recovery == {"method": "lora"}
    assert load_config(RunConfig, None, [*rest, "recovery=null"]).recovery is None


def test_a_preset_stands_in_for_what_is_not_given(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "preset: svd-llm\ncompression: {prune_ratio: 0.3, storage: pivoted}\n"
        "model: {source: m}\ncalibration: {text: t}\noutput: o\n"
    )
    found = load_config(RunConfig, file, ["compression.corrections=2"]).compression
    assert found == CompressionConfig(
        0.3, metric="input", selection="uniform", storage="pivoted", corrections=2, rank_multiple=1
    )
    assert load_config(RunConfig, file, ["preset=io-svd"]).compression.metric == "two_sided"
    with pytest.raises(ConfigError, match="preset is 'svd-lm'; did you mean 'svd-llm'"):
        load_config(RunConfig, file, ["preset=svd-lm"])


def test_the_callback_takes_a_preset_and_what_is_given_wins():
    config = ZSSVDCallback(0.3, preset="zs-svd-5x", corrections=2).config
    assert config == CompressionConfig.of("zs-svd-5x", prune_ratio=0.3, corrections=2)
    assert ZSSVDCallback(0.3, "zs-svd-line-search").config == CompressionConfig(0.3, rank_multiple=1)
    assert ZSSVDCallback(0.3, rank_multiple=16).config.rank_multiple == 16
    assert ZSSVDCallback(0.3).config == ZSSVDCallback(0.3, None).config == CompressionConfig.of("best", prune_ratio=0.3)
    with pytest.raises(ConfigError, match="did you mean 'best'"):
        ZSSVDCallback(preset="bst")


def test_contradictions_to_the_default_preset_say_where_its_settings_come_from(tmp_path):
    for build in (
        lambda: ZSSVDCallback(0.3, metric="input"),
        lambda: load_config(
            RunConfig, None, ["model.source=x", "output=y", "calibration.text=z", "compression.metric=input"]
        ),
    ):
        with pytest.raises(ContradictionError, match="preset 'best', because no preset is named"):
            build()
    with pytest.raises(ContradictionError) as caught:
        ZSSVDCallback(0.3, "best", metric="input")
    assert "no preset is named" not in str(caught.value)
    with pytest.raises(ContradictionError, match="budget_of 'model' needs budget_in"):
        CompressionConfig(budget_of="model", budget_in="flops")


def test_bits_are_chosen_by_rules_that_can():
    with pytest.raises(ConfigError, match="'mixed' needs selection 'curvature'"):
        CompressionConfig(storage="mixed")
    assert CompressionConfig(storage="mixed", metric="two_sided", selection="curvature").storage == "mixed"


def test_the_method_without_a_preset_is_the_one_that_has_a_name():
    assert CompressionConfig(rank_multiple=1) == CompressionConfig.of("zs-svd-line-search")


def test_published_methods_have_any_rank_and_the_defaults_multiples_of_8(tmp_path):
    multiples = {preset: CompressionConfig.of(preset).rank_multiple for preset in PRESETS}
    assert multiples == dict.fromkeys(PRESETS, 1) | {"best": 8}
    assert CompressionConfig().rank_multiple == 8
    shapes = {"a": (256, 256)}
    assert CompressionConfig(rank_multiple=16).budget_over(shapes, {}, 0).step("a") == 16
    planned = CompressionConfig(plan=str(tmp_path / "plan.yaml")).budget_over(shapes, {}, 0)
    assert planned.step("a") == 1  # the ranks of a plan are followed as they are


def test_settings_that_were_saved_before_a_setting_existed_are_completed():
    saved = {"prune_ratio": 0.4, "metric": "rows"}
    assert CompressionConfig(**settings_of_saved(saved)) == CompressionConfig(0.4, metric="rows", rank_multiple=1)
    assert settings_of_saved(asdict(CompressionConfig(rank_multiple=16)))["rank_multiple"] == 16


def test_keyword_settings_are_the_fields_of_the_config():
    assert set(Settings.__annotations__) == {field.name for field in fields(CompressionConfig)}
    assert set(CallbackSettings.__annotations__) - {field.name for field in fields(Schedule)} == set(
        CompressionSettings.__annotations__
    )
    for name in CallbackSettings.__annotations__:
        assert f"    {name}: " in CallbackSettings.__doc__


def test_a_config_and_settings_beside_it_are_refused():
    with pytest.raises(ConfigError, match="preset, prune_ratio cannot be given too"):
        CompressionConfig.asked(CompressionConfig(), "best", {"prune_ratio": 0.3})
    assert CompressionConfig.asked(None, "best", {"prune_ratio": 0.3}) == CompressionConfig.of("best", prune_ratio=0.3)


def test_flat_names_of_the_schedule_and_a_plan_of_a_dry_run_still_work_and_warn(tmp_path):
    with pytest.warns(DeprecationWarning, match=r"schedule=Schedule\(start_step=3, extend_training=True\)"):
        callback = ZSSVDCallback(0.3, "zs-svd-line-search", start_step=3, extend_training=True)
    assert callback.schedule == Schedule(start_step=3, extend_training=True)
    with pytest.warns(DeprecationWarning, match="dry_run=FILE"):
        callback = ZSSVDCallback(0.3, "zs-svd-line-search", dry_run=True, plan=str(tmp_path / "plan.yaml"))
    assert callback.dry_run == tmp_path / "plan.yaml"
    assert callback.config.plan is None


def test_unknown_settings_name_the_nearest_one():
    with pytest.raises(ConfigError, match="did you mean 'corrections'"):
        ZSSVDCallback(0.3, "zs-svd-line-search", correctons=2)
    with pytest.raises(ConfigError, match="did you mean 'start_step'"):
        ZSSVDCallback(0.3, "zs-svd-line-search", schedule={"start_stp": 2})
