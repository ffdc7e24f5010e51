"""Registry of storages. Registration also makes the layer classes of a storage loadable."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from zssvd_lightning._registry import Registry
from zssvd_lightning.layers.storage import STORAGES as KNOWN
from zssvd_lightning.layers.storage import UNITS, Kept, Storage

SAMPLE_SHAPES = ((6, 9), (9, 6), (64, 48))
"""Shapes (m, n) at which the costs of a new storage are checked."""


class StorageRegistry(Registry[Storage]):
    """Registry of storages and of their layer classes."""

    def register(self, name: str, entry: Storage) -> None:
        """Add a storage and its layer classes. See `Registry.register`."""
        super().register(name, entry)
        if entry.classes:
            from zssvd_lightning.layers.registry import KINDS  # loads transformers

            before = dict(KINDS)
            KINDS.clear()  # look for a subclass before its base class
            KINDS.update({form.kind: form for form in entry.classes} | before)


def _wrong(name: str, entry: Any) -> str | None:
    if not isinstance(entry, Storage):
        return "an instance of Storage"
    if not (callable(entry.low_rank) and callable(entry.dense)):
        return "a Storage whose low_rank and dense are functions"
    if entry.in_8_bits is not None and entry.in_8_bits is not KNOWN["hq"]:
        return "a Storage whose in_8_bits is None or STORAGES['hq']"
    return _wrong_costs(entry) or _wrong_classes(entry) or _wrong_layer(entry)


def _wrong_costs(entry: Storage) -> str | None:
    for m, n in SAMPLE_SHAPES:
        kept = [entry.low_rank(m, n, k) for k in range(min(m, n) + 1)]
        if not all(isinstance(cost, Kept) for cost in [*kept, entry.dense(m, n)]):
            return "a Storage whose low_rank and dense return Kept"
        for unit, cost in UNITS.items():
            costs = [cost(each) for each in kept]
            if costs[0] < 0 or cost(entry.dense(m, n)) <= 0 or any(b <= a for a, b in pairwise(costs)):
                return (
                    f"a Storage whose costs are positive and grow with the rank, not {costs[:4]}... {unit} for a "
                    f"matrix {m, n}"
                )
    return None


def _wrong_classes(entry: Storage) -> str | None:
    if not entry.classes:
        return None
    from zssvd_lightning.layers.base import CompressedLinear
    from zssvd_lightning.layers.registry import KINDS

    forms = entry.classes
    if not isinstance(forms, tuple) or not all(isinstance(f, type) and issubclass(f, CompressedLinear) for f in forms):
        return "a Storage whose classes are a tuple of subclasses of CompressedLinear"
    kinds = [vars(form).get("kind") for form in forms]
    if len({*kinds, None}) <= len(kinds) or not KINDS.keys().isdisjoint(kinds):
        return f"a Storage whose classes each have a kind of its own, other than {', '.join(KINDS)}"
    if any("found_in" not in vars(form) for form in forms):
        return "a Storage whose classes each have a found_in of its own"
    for form in forms:
        if (other := _also_found(form, KINDS.values())) is not None:
            return f"a Storage whose classes differ in their weights, but {form.__name__} finds {other.__name__}"
    return None


def _also_found(form: Any, known: Iterable[Any]) -> Any:
    """Return a known class whose weights `form` takes for its own, or None."""
    from torch import nn

    dense = nn.Linear(4, 3, device="meta")
    for other in known:
        for sizes in ({"rank": 1}, {}):
            try:
                layer = other.like(dense, **sizes)
            except TypeError:
                continue
            weights = {f"layer.{name}": value for name, value in layer.state_dict().items()}
            if form.found_in(weights, "layer") is not None:
                return other
    return None


def _wrong_layer(entry: Storage) -> str | None:
    from zssvd_lightning.layers.low_rank import LowRankLinear
    from zssvd_lightning.layers.pivoted import PivotForm
    from zssvd_lightning.layers.registry import KINDS

    form = (KINDS | {form.kind: form for form in entry.classes}).get(entry.layer)
    if form is None or not issubclass(form, LowRankLinear | PivotForm):
        trained = [kind for kind, known in KINDS.items() if issubclass(known, LowRankLinear | PivotForm)]
        return f"a Storage whose layer is {' or '.join(trained)}, or the kind of one of its classes with factors"
    if issubclass(form, PivotForm) and entry.rounds:
        return "a Storage that does not round, because pivoted layers have no form in 8 bits"
    return None


STORAGES = StorageRegistry("storage", "zssvd_lightning.storages", KNOWN, _wrong)
"""Storages by name; `register` adds one."""
