"""Registry of storages, which counts for costs and for reading saved layers."""

from typing import Any

from zssvd_lightning._registry import Registry
from zssvd_lightning.layers.storage import STORAGES as KNOWN
from zssvd_lightning.layers.storage import Storage


class StorageRegistry(Registry[Storage]):
    """Registry that also lets saved models be read with the layers that a storage brings."""

    def register(self, name: str, entry: Storage) -> None:
        """Add a storage under a name. See `Registry.register`."""
        super().register(name, entry)
        if entry.classes:
            from zssvd_lightning.layers.registry import KINDS  # loads transformers

            before = dict(KINDS)
            KINDS.clear()  # a subclass has to be looked for before the class it extends
            KINDS.update({form.kind: form for form in entry.classes} | before)


def _wrong(name: str, entry: Any) -> str | None:
    if not isinstance(entry, Storage):
        return "an instance of Storage"
    if entry.classes:
        from zssvd_lightning.layers.registry import KINDS

        if any(form.kind in KINDS or "found_in" not in vars(form) for form in entry.classes):
            return f"of classes with a found_in of their own, and of none of the kinds {', '.join(KINDS)}"
    return None


STORAGES = StorageRegistry("storage", "zssvd_lightning.storages", KNOWN, _wrong)
"""Storages by name; `register` adds one."""
