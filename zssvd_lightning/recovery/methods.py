"""Methods for training a low-rank model after factorization.

Each method is a class of settings; `METHODS` maps method names to classes, for YAML.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from zssvd_lightning._registry import Registry
from zssvd_lightning._validation import require, require_one_of
from zssvd_lightning.config.loading import build, refuse_unknown
from zssvd_lightning.errors import ConfigError, RecoveryError, TargetError, shown
from zssvd_lightning.layers.low_rank import LowRankLinear
from zssvd_lightning.layers.registry import Factored
from zssvd_lightning.model.adapters import Adapter, merged
from zssvd_lightning.recovery.factors import ONE_BY_ONE, FactorRecovery
from zssvd_lightning.recovery.settings import BOTH_AT_ONCE, Recovery

ELSEWHERE = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "modules_to_save": "also_train",
    "bias": "also_train",
    "trainable_token_indices": "also_train",
    "target_parameters": "targets",
}
"""Options of `peft.LoraConfig` that are set by a recovery setting instead, with the name of that setting."""


OTHER_NAMES = ELSEWHERE | {"learning_rate": "lr"}
"""Names that settings have elsewhere, with their names here, for messages about unknown keys."""


NEED_BATCHES = ("eva", "corda", "lora_ga", "loftq")
"""Unsupported initializations: peft needs batches, gradients or a quantized model for them."""


@dataclass(frozen=True)
class LoRARecovery(Recovery):
    """Recovery that trains LoRA (arXiv 2106.09685) on the factors, or on pivots and coefficients, through peft.

    Merging LoRA into them does not change their shapes, so the layer keeps its storage and rank.

    Example:
        >>> LoRARecovery(rank=8, lr=1e-3).to_dict()["method"]
        'lora'
    """

    method = "lora"

    rank: int = 8
    """Rank r of LoRA, on each factor, or on pivots and coefficients."""
    alpha: float | None = None
    """Scale of LoRA: the product of its two matrices is multiplied by `alpha / rank`; twice the rank when None."""
    clip_rank: bool = True
    """True to lower LoRA's rank where it is not below both sizes of a matrix, with a warning, and to leave out matrices
    with a single row or column; False to raise an error for them."""
    dropout: float = 0.0
    """Dropout probability on LoRA's inputs, in [0, 1)."""
    two_step: bool = False
    """True for SVD-LLM's order: LoRA on `up` for the first half of the recovery, merged, then LoRA on `down`."""
    merge: bool = True
    """True to merge LoRA at the end of the fit; otherwise it stays and is saved beside the compressed model."""
    peft: dict[str, Any] = field(default_factory=dict)
    """Other options of `peft.LoraConfig`: `use_dora`, `use_rslora`, `init_lora_weights` (`pissa`, `olora`,
    `orthogonal`, ...), `rank_pattern`, `alpha_pattern`, `exclude_modules`, `layers_to_transform`, ..."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rank >= 1, "recovery.rank", self.rank, "1 or more")
        require(self.alpha is None or self.alpha > 0, "recovery.alpha", self.alpha, "above 0")
        require(0 <= self.dropout < 1, "recovery.dropout", self.dropout, "in [0, 1)")
        for option, instead in ELSEWHERE.items():
            if option in self.peft:
                raise ConfigError(f"recovery.peft has {option!r}; set recovery.{instead} instead")
        init = self.peft.get("init_lora_weights")
        if init in NEED_BATCHES:
            raise ConfigError(
                f"recovery.peft.init_lora_weights is {init!r}, which takes batches, gradients or a quantized model of "
                "its own, while factors are in the basis of their inputs already; there are true, gaussian, pissa, "
                "pissa_niter_N, olora and orthogonal"
            )
        for option in ("rank_pattern", "alpha_pattern"):
            patterns = self._patterns(option)
            require(isinstance(patterns, Mapping), f"recovery.peft.{option}", patterns, "a mapping")
        for pattern, rank in self._patterns("rank_pattern").items():
            require(isinstance(rank, int) and rank >= 1, f"recovery.peft.rank_pattern.{pattern}", rank, "1 or more")
        for parts in self.stages:
            self._try(parts)

    @property
    def stages(self) -> Sequence[tuple[str, ...]]:
        """Groups of factors that are trained at the same time, stage by stage."""
        return ONE_BY_ONE if self.two_step else BOTH_AT_ONCE

    @property
    def merges(self) -> bool:
        """True if LoRA is merged into the factors at the end."""
        return self.merge

    def adapter(self, parts: Sequence[str], name: str, layer: Factored) -> Adapter | None:
        """Return LoRA for these factors of a layer; None if no rank is left for it. See `Recovery.adapter`.

        Raises:
            RecoveryError: the rank is too high for a factor, and `clip_rank` is False.
        """
        lora = self._lora(list(layer.thin_layers(parts)))
        asked, used = self._ranks(lora, name, layer)
        if asked == used:
            return lora if asked else None
        if not self.clip_rank:
            part = next(part for part in asked if used[part] < asked[part])
            thin: Any = layer.thin_layers()[part]
            raise RecoveryError(
                f"LoRA of rank {asked[part]} on {name}.{part} {(thin.out_features, thin.in_features)} is not below the "
                f"smaller size of this matrix (the layer has rank {layer.rank}); set recovery.clip_rank to true, lower "
                "recovery.rank, leave the layer out with recovery.targets, raise min_rank_fraction, or train the "
                "factors themselves (method 'factors')"
            )
        kept = {part: rank for part, rank in used.items() if rank >= 1}
        if not kept:
            return None
        alphas = {part: self._alpha(f"{name}.{part}", rank) for part, rank in kept.items()}
        return self._lora(list(kept), rank_pattern=kept, alpha_pattern=alphas)

    def reduced(self, layers: Mapping[str, Factored]) -> str | None:
        """Return a warning if LoRA has a lower rank than asked for on some of these layers."""
        ranks = {
            name: self._ranks(self._lora(list(layer.thin_layers())), name, layer) for name, layer in layers.items()
        }
        lower = {name: used for name, (asked, used) in ranks.items() if asked != used}
        if not lower:
            return None
        without = sum(0 in used.values() for used in lower.values())
        least = min(lower, key=lambda name: min(lower[name].values()))
        return (
            f"recovery.rank {self.rank} is too high for {len(lower)} of {len(layers)} layers, such as {least}, of rank "
            f"{layers[least].rank}. LoRA has a lower rank there, and none on matrices of a single row or column, which "
            f"{without} layers have. Train such layers in full with method 'factors', or set recovery.clip_rank to "
            "false for an error"
        )

    def refuse_layers(self, classes: Mapping[str, Sequence[type[Factored]]]) -> None:
        """Raise TargetError if a pattern of `targets` or of the options of peft matches nothing. See `Recovery`."""
        super().refuse_layers(classes)
        from peft.utils.other import get_pattern_key

        chosen = [(name, form) for name, forms in classes.items() if self.chooses(name) for form in forms]
        matrices = [f"{name}.{part}" for name, form in chosen for part in form.thin.values()]
        for option in ("rank_pattern", "alpha_pattern"):
            for pattern in self._patterns(option):
                if all(get_pattern_key([pattern], matrix) != pattern for matrix in matrices):
                    pairs = " or ".join(dict.fromkeys(" and ".join(form.thin.values()) for _, form in chosen))
                    raise TargetError(
                        f"recovery.peft.{option} has {pattern!r}, which matches no matrix that LoRA is put on, such as "
                        f"{matrices[0]}; they are the {pairs} of each layer"
                    )

    def trains(self, parameter: str, parts: Sequence[str]) -> bool:
        """Return True if a parameter of a chosen layer belongs to LoRA."""
        return "lora_" in parameter

    def _patterns(self, option: str) -> Mapping[str, Any]:
        return self.peft.get(option) or {}

    def _lora(self, matrices: list[str], **changed: Any) -> Adapter:
        """Return LoRA for these thin layers, with the ranks that the settings ask for unless `changed` has others."""
        own = {
            "r": self.rank,
            "lora_alpha": 2 * self.rank if self.alpha is None else self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": matrices,
        }
        return Adapter("LORA", own | dict(self.peft) | changed, self.seed)

    def _ranks(self, lora: Adapter, name: str, layer: Factored) -> tuple[dict[str, int], dict[str, int]]:
        """Return the rank of LoRA on each thin layer that it applies to: as asked for, and below both of its sizes."""
        from peft.utils.other import get_pattern_key

        thin: dict[str, Any] = layer.thin_layers()
        asked, patterns = {}, self._patterns("rank_pattern")
        for part in lora.parts_of(name, layer):
            asked[part] = patterns.get(get_pattern_key(list(patterns), f"{name}.{part}"), self.rank)
        used = {part: min(r, thin[part].in_features - 1, thin[part].out_features - 1) for part, r in asked.items()}
        return asked, used

    def _alpha(self, matrix: str, rank: int) -> float:
        """Return LoRA's scale on a thin layer where it has a lower rank than asked for."""
        from peft.utils.other import get_pattern_key

        patterns = self._patterns("alpha_pattern")
        own = 2 * rank if self.alpha is None else self.alpha
        return float(patterns.get(get_pattern_key(list(patterns), matrix), own))

    def _try(self, parts: Sequence[str]) -> None:
        """Raise ConfigError if peft cannot apply these options to a layer or cannot merge the result."""
        name, layer = (
            "model.layers.0.q_proj",
            LowRankLinear.from_factors(torch.randn(16, 12), torch.randn(12, 16), None),
        )
        adapter = self._lora(list(layer.thin_layers(parts)))
        if not adapter.parts_of(name, layer):
            return
        small = Adapter("LORA", {**adapter.options, "r": 2, "rank_pattern": {}}, self.seed)
        try:
            small.attach(name, layer)
            merged(layer, torch.Tensor.detach)
        except RecoveryError as error:
            raise ConfigError(f"recovery.peft is {self.peft}: {error}") from error


@dataclass(frozen=True)
class SingularValueRecovery(Recovery):
    """Recovery that trains one multiplier for each singular value (after SVFit, arXiv 2409.05926).

    This is peft's (IA)^3 on the output of `down`. Singular vectors are not trained.
    """

    method = "singular_values"
    needs_components = True

    merge: bool = True
    """True to merge the multipliers at the end of the fit; otherwise they are saved beside the compressed model."""

    @property
    def merges(self) -> bool:
        """True if the multipliers are merged into the factors at the end."""
        return self.merge

    def adapter(self, parts: Sequence[str], name: str, layer: Factored) -> Adapter | None:
        """Return the (IA)^3 adapter for `down`; see `Recovery.adapter`."""
        return Adapter("IA3", {"target_modules": ["down"], "feedforward_modules": []}, self.seed)

    def trains(self, parameter: str, parts: Sequence[str]) -> bool:
        """Return True if a parameter of a chosen layer belongs to the (IA)^3 adapter."""
        return "ia3_" in parameter


def _settings_of(method: type[Recovery]) -> set[str]:
    return {field.name for field in fields(method)}


def _wrong(name: str, entry: Any) -> str | None:
    if not isinstance(entry, type) or not issubclass(entry, Recovery):
        return "a subclass of Recovery"
    if "__dataclass_fields__" not in vars(entry) or inspect.isabstract(entry):
        return "a dataclass that defines all abstract methods of Recovery; decorate it with @dataclass(frozen=True)"
    if "method" not in vars(entry):
        return f"a subclass of Recovery with its own `method = {name!r}`"
    return None if entry.method == name else f"a subclass of Recovery whose method is {name!r}, not {entry.method!r}"


METHODS: Registry[type[Recovery]] = Registry(
    "recovery method",
    "zssvd_lightning.recoveries",
    {kind.method: kind for kind in (LoRARecovery, FactorRecovery, SingularValueRecovery)},
    _wrong,
)
"""Methods by name; `register` adds one."""


def recovery_of(settings: Recovery | Mapping[str, Any] | str | None) -> Recovery | None:
    """Return the recovery that settings describe; None for None.

    Args:
        settings: a `Recovery`, the name of a method, or a mapping with `method` and the fields of that method, as read
            from YAML.

    Raises:
        ConfigError: the method or a key is unknown, or a value has another type or is out of range.
    """
    if settings is None or isinstance(settings, Recovery):
        return settings
    if not isinstance(settings, Mapping | str):
        methods = ", ".join(METHODS)
        raise ConfigError(
            f"recovery is {shown(settings)}, but must be a Recovery such as LoRARecovery(rank=8), the name of a method "
            f"({methods}), a mapping with method and its settings, or None"
        )
    given = {"method": settings} if isinstance(settings, str) else dict(settings)
    method = given.pop("method", None)
    if method is None:
        raise ConfigError(f"recovery has no method; there are {', '.join(METHODS)}")
    require_one_of("recovery.method", method, METHODS)
    for key in given.keys() - _settings_of(METHODS[method]):
        if others := METHODS.those(lambda kind, key=key: key in _settings_of(kind)):  # type: ignore[misc]
            raise ConfigError(
                f"unknown key {f'recovery.{key}'!r} of method {method!r}; it is a setting of {' and '.join(others)}"
            )
    refuse_unknown(METHODS[method], given, "recovery.", OTHER_NAMES)
    return build(METHODS[method], given, "recovery.")
