"""Properties that follow from the settings of a compression."""

from zssvd_lightning.config.corrections import CORRECTIONS, Correction
from zssvd_lightning.config.placement import AUTO
from zssvd_lightning.layers.storage import Storage
from zssvd_lightning.selection.rules import RULES, Rule
from zssvd_lightning.selection.storages import STORAGES
from zssvd_lightning.whitening.metrics import METRICS, Metric
from zssvd_lightning.whitening.output_gradients import OUTPUT_GRADIENTS

OPT_INS = ("convolutions", "recurrent")
"""Settings on whose request more kinds of modules are taken apart."""


class DerivedSettings:
    """Properties of a `CompressionConfig`, which documents the settings they follow from."""

    metric: str
    selection: str
    storage: str
    correction_step: str
    output_side: str
    corrections: int
    memory: str
    narrow: bool
    offload: str
    max_memory: int | str | None
    max_host_memory: int | str | None
    rows_in_16_bits: str

    @property
    def metric_used(self) -> Metric:
        """The metric itself."""
        return METRICS[self.metric]

    @property
    def rule(self) -> Rule:
        """The selection rule itself."""
        return RULES[self.selection]

    @property
    def form(self) -> Storage:
        """The storage itself."""
        return STORAGES[self.storage]

    @property
    def correction(self) -> Correction:
        """The correction step itself."""
        return CORRECTIONS[self.correction_step]

    @property
    def watches_outputs(self) -> str | None:
        """Source of the output gradients that calibration collects; None if the metric does not use them."""
        return self.output_side if self.metric_used.needs_outputs else None

    @property
    def asks_model(self) -> bool:
        """True if the model inside the module must be known, either for its logits or to run it again."""
        side = self.watches_outputs
        draws = side is not None and OUTPUT_GRADIENTS[side] is not None
        return draws or (self.refits and self.corrections > 0)

    @property
    def tries_widths(self) -> bool:
        """True if calibration must find hidden widths whose order is free."""
        return self.form.has_pivots or self.narrow

    @property
    def refits(self) -> bool:
        """True if corrections are closed-form refits."""
        return self.correction.refits

    @property
    def by_blocks(self) -> bool:
        """True if only the statistics of one block are in memory at a time."""
        return self.memory == "blocks"

    @property
    def may_be_by_blocks(self) -> bool:
        """True if it is by blocks, or limits of memory may choose that."""
        return self.by_blocks or (self.memory == AUTO and bool(self.limits))

    @property
    def place(self) -> str:
        """Medium of what is not beside the model: `cpu` or `disk`; `none` if all is."""
        return "disk" if self.by_blocks else "none" if self.offload == AUTO else self.offload

    @property
    def limits(self) -> dict[str, int | str]:
        """Limits of memory that are given, by name."""
        limits = {"max_memory": self.max_memory, "max_host_memory": self.max_host_memory}
        return {name: size for name, size in limits.items() if size is not None}

    @property
    def weighs_rows(self) -> bool:
        """True if calibration must estimate the cost of errors in outputs and inputs."""
        return self.rows_in_16_bits == "loss_aware"

    @property
    def opted(self) -> tuple[str, ...]:
        """Settings on whose request more kinds of modules are taken apart, as far as they are set."""
        return tuple(name for name in OPT_INS if getattr(self, name))
