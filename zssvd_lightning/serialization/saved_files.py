"""Checks of the JSON files of a folder with a saved model, before anything else reads them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from zssvd_lightning.errors import SavedModelError


def read_map(path: Path) -> dict[str, Any]:
    """Return the map in a JSON file.

    Raises:
        SavedModelError: the file cannot be read, or is not JSON in UTF-8, or holds something other than a map.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError includes bad UTF-8 and bad JSON
        raise SavedModelError(f"{path} cannot be read: {error}; copy the folder again") from error
    if not isinstance(found, dict):
        raise SavedModelError(f"{path} holds a {type(found).__name__} instead of a map; copy the folder again")
    return found


def refuse_damaged(folder: Path) -> None:
    """Raise SavedModelError if the config of a folder, or its index of weight files, is not as it was written.

    Files that are missing are left to transformers, which knows other names for them.
    """
    if (path := folder / CONFIG_NAME).is_file():
        read_map(path)
    if not (path := folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return
    index = read_map(path)
    files = index.get("weight_map")
    if not isinstance(index.get("metadata"), Mapping):
        raise SavedModelError(f"{path} has no map `metadata`; copy the folder again")
    if not isinstance(files, Mapping) or not files:
        raise SavedModelError(f"{path} has no map `weight_map` of weights to files; copy the folder again")
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).name != file or not (folder / file).is_file():
            raise SavedModelError(f"{path} has {name} in {file!r}, which is no file of the folder; copy it again")
