"""Types and sizes of settings, which every way to give them checks alike."""

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import tiny_llama, token_batches

from zssvd_lightning import CompressionConfig, LowRankPrehab, RunConfig, Schedule, ZSSVDCallback, compress, load_config
from zssvd_lightning._types import check_types
from zssvd_lightning.app.compare.arguments import CompareConfig
from zssvd_lightning.app.run_config import CalibrationConfig, EvaluateConfig, ExportConfig, ModelConfig, TrainingConfig
from zssvd_lightning.compression.pipeline import calibrate
from zssvd_lightning.errors import ConfigError, TargetError

MANDATORY = ["model.source=m", "calibration.text=t", "output=o"]


WRONG = {
    "prune_ratio": ["0.4", True, None, [0.4], float("nan"), 10**400, 1 + 0j],
    "metric": [None, 3, ["input"], b"input"],
    "reestimate": ["yes", 1, None],
    "truncations": ["2", 2.0, True, 10**9, 0, 2**70],
    "corrections": [None, 1.5, 10**9, -1],
    "step_radius": ["1", float("inf")],
    "correction_batches": [1.5, "8", 2**40],
    "line_search": [0, "false"],
    "storage": [5],
    "min_rank_fraction": ["0"],
    "rank_multiple": ["8", 8.0, True, 0, -8, 2**70],
    "include": [5, [1], {"q_proj": 1}, [None]],
    "ignore": [[1], True],
    "plan": [5, ["a"]],
}
CASES = [(name, value) for name, values in WRONG.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES, ids=lambda each: str(each)[:20])
def test_a_value_of_another_type_is_refused_by_name_in_python_and_in_yaml(name, value):
    with pytest.raises(ConfigError, match=rf"^{name} is .* but must be "):
        CompressionConfig(**{name: value})
    if not isinstance(value, bytes | complex) and value != 10**400:
        given = {"compression": {name: value}}
        with pytest.raises(ConfigError, match=rf"^(compression\.)?{name} is .* but must be "):
            load_config(RunConfig, None, MANDATORY, given)
    if value is not None:  # counts as not given
        with pytest.raises(ConfigError, match=rf"^{name} is .* but must be "):
            ZSSVDCallback(**{name: value})
        with pytest.raises(ConfigError, match=rf"^{name} is .* but must be "):
            compress(tiny_llama(), token_batches(), **{name: value})


def test_text_from_a_file_or_a_command_line_is_no_number(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("compression: {prune_ratio: '0.4'}\n")
    message = "compression.prune_ratio is '0.4' (str), but must be a finite number; write 0.4 without quotes"
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(RunConfig, file, MANDATORY)
    with pytest.raises(ConfigError, match=r"output is 3 \(int\), but must be text; write '3' in quotes"):
        load_config(RunConfig, None, [*MANDATORY, "output=3"])
    assert load_config(RunConfig, None, [*MANDATORY, "output='3'"]).output == "3"
    assert load_config(RunConfig, None, [*MANDATORY, "compression.step_radius=1e-3"]).compression.step_radius == 1e-3


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Schedule(start_epoch="1"), "start_epoch"),
        (lambda: Schedule(calibration_batches=1.5), "calibration_batches"),
        (lambda: Schedule(extend_training=1), "extend_training"),
        (lambda: ZSSVDCallback(schedule={"start_step": "1"}), "start_step"),
        (lambda: ZSSVDCallback(schedule=5), "schedule"),
        (lambda: ZSSVDCallback(recovery=5), "recovery"),
        (lambda: ZSSVDCallback(recovery=["lora"]), "recovery"),
        (lambda: ZSSVDCallback(preset=3), "preset"),
        (lambda: ZSSVDCallback(progress="no"), "progress"),
        (lambda: ZSSVDCallback(dry_run=5), "dry_run"),
        (lambda: ZSSVDCallback.from_config({"prune_ratio": 0.3}), "config"),
        (lambda: LowRankPrehab(steps="3"), "steps"),
        (lambda: LowRankPrehab(weight=True), "weight"),
        (lambda: LowRankPrehab(include=[3]), "include"),
        (lambda: ModelConfig(source=3), "model.source"),
        (lambda: ModelConfig("m", dtype=torch.float32), "model.dtype"),
        (lambda: CalibrationConfig("t", samples=10**12), "calibration.samples"),
        (lambda: CalibrationConfig("t", seed=2**70), "calibration.seed"),
        (lambda: CalibrationConfig("t", length="32"), "calibration.length"),
        (lambda: TrainingConfig(steps=2**40), "training.steps"),
        (lambda: TrainingConfig(gradient_clip_val="1"), "training.gradient_clip_val"),
        (lambda: EvaluateConfig(windows=2.5), "evaluation.windows"),
        (lambda: ExportConfig(format=3), "format"),
        (lambda: RunConfig(output=3), "output"),
        (lambda: CompareConfig("o", seeds=[0.5]), "seeds"),
        (lambda: compress(tiny_llama(), [], config="best"), "config"),
        (lambda: compress(tiny_llama(), [], calibration_batches="3"), "calibration_batches"),
        (lambda: compress(tiny_llama(), [], calibration_batches=True), "calibration_batches"),
        (lambda: compress(tiny_llama(), [], statistics={}), "statistics"),
        (lambda: compress(tiny_llama(), [], loss=3), "loss"),
        (lambda: compress(tiny_llama(), [], progress=3), "progress"),
        (lambda: calibrate(tiny_llama(), [], preset=3), "preset"),
    ],
)
def test_other_arguments_name_themselves(make, name):
    with pytest.raises(ConfigError, match=rf"^{re.escape(name)} is .*but must be "):
        make()


def test_a_model_must_be_a_module():
    with pytest.raises(TargetError, match=r"type str, but must be a torch\.nn\.Module"):
        compress("model", token_batches())


@pytest.mark.parametrize("scalar", [np.float64, np.float32, torch.tensor, np.array, Fraction])
def test_scalars_that_are_numbers_become_plain_ones(scalar):
    config = CompressionConfig(prune_ratio=scalar(0.25), truncations=np.int64(2), line_search=np.bool_(False))
    assert config == CompressionConfig(0.25, truncations=2, line_search=False)
    assert [type(v) for v in (config.prune_ratio, config.truncations, config.line_search)] == [float, int, bool]
    assert CompressionConfig(truncations=torch.tensor(2)).truncations == 2
    for wrong in (scalar(2.0), np.float32(2), torch.tensor(True), torch.tensor([2]), torch.tensor(2, device="meta")):
        with pytest.raises(ConfigError, match=r"^truncations is "):
            CompressionConfig(truncations=wrong)


def test_one_pattern_needs_no_list_and_paths_are_text():
    config = CompressionConfig(include="q_proj", ignore=("a", "b"), plan=Path("plan.yaml"))
    assert (config.include, config.ignore, config.plan) == (["q_proj"], ["a", "b"], "plan.yaml")
    assert load_config(RunConfig, None, [*MANDATORY, "compression.include=q_proj"]).compression.include == ["q_proj"]


@dataclass(frozen=True)
class Kinds:
    numbers: list[float]
    pairs: dict[str, int]
    maybe: Path | bool = False
    anything: Any = None


def test_every_kind_of_annotation():
    kinds = Kinds((1, np.float64(2.5)), {"a": np.int8(1)}, "p")
    check_types(kinds)
    assert kinds == Kinds([1.0, 2.5], {"a": 1}, Path("p"))
    assert type(kinds.pairs["a"]) is int
    for wrong in (Kinds([1, "2"], {}), Kinds([], {1: 1}), Kinds([], {"a": 0.5}), Kinds([], {}, 3), Kinds("1", {})):
        with pytest.raises(ConfigError, match="but must be"):
            check_types(wrong, "kinds.")


def test_an_unprintable_or_long_value_is_still_named():
    class Broken:
        def __repr__(self):
            raise RuntimeError

    with pytest.raises(ConfigError, match=r"^metric is a value that cannot be shown, but must be a name"):
        CompressionConfig(metric=Broken())
    with pytest.raises(ConfigError) as raised:
        CompressionConfig(prune_ratio="x" * 10_000)
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compression.ratio=0.4", "did you mean 'compression.prune_ratio'"),
        ("ratio=0.4", "did you mean 'compression.prune_ratio'"),
        ("compression.batches=0.4", "did you mean 'compression.correction_batches'"),
        ("model={source: a, sources: b}", "unknown key 'model.sources'; did you mean 'model.source'"),
        ("compression=best", "compression is 'best', but must be a mapping with keys such as compression.prune_ratio"),
        ("compression=null", "compression is None, but must be a mapping"),
        ("model=3", "model is 3, but must be a mapping"),
        ("model.source.name=3", "model.source is {'name': 3}"),
        ("recovery=3", "recovery is 3 (int), but must be a mapping or None"),
        ("=3", "names no setting"),
        ("a..b=3", "names no setting"),
        ("output=${", "line 1: the reference '${' is not"),
        ("output=${nowhere}", "output cannot be used: Interpolation key 'nowhere' not found"),
        (f"calibration.seed={'9' * 5000}", "a whole number of 5,000 digits"),
        (f"output={'[' * 2000}", "nested deeper than 50"),
        (
            "calibration.samples=1000000000000",
            "calibration.samples is 1000000000000, but must be at most 2,147,483,647",
        ),
        ("compression.truncations=1000000000", "truncations is 1000000000, but must be at most 1,000"),
    ],
)
def test_overrides_that_are_no_settings(override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(RunConfig, None, [*MANDATORY, override])


def test_short_forms_stand_for_one_key_of_a_group(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ncalibration: {text: t}\noutput: o\nrecovery: lora\n")
    found = load_config(RunConfig, file)
    assert found.model == ModelConfig("m")
    assert found.recovery == {"method": "lora"}
    file.write_text("model: {source: m, dtype: float64}\ncalibration: {text: t}\noutput: ${model.source}/o\n")
    found = load_config(RunConfig, file, ["model=/path", "recovery=factors", "recovery.lr=0.1"])
    assert found.model == ModelConfig("/path", "float64")
    assert found.output == "/path/o"
    assert found.recovery == {"method": "factors", "lr": 0.1}


def test_references_reach_defaults(tmp_path):
    given = [*MANDATORY, "evaluation.length=${calibration.length}"]
    assert load_config(RunConfig, None, given).evaluation.length == CalibrationConfig("t").length
