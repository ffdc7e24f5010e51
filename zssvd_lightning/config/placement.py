"""Settings of where a compression holds what it needs, and limits of its memory."""

import re

from zssvd_lightning._validation import require, require_one_of
from zssvd_lightning.errors import ContradictionError
from zssvd_lightning.offload.stores import OFFLOADS

AUTO = "auto"
"""Value of `memory` and `offload` that leaves the choice to the limits of memory."""

MEMORY = (AUTO, "whole", "blocks")
"""Possible parts of a model whose statistics are in memory at the same time."""

PLACES = ("memory", "offload", "max_memory", "max_host_memory")
"""Settings of where things are, which change no result."""

_UNITS: dict[str, int] = {"": 1, "b": 1} | {
    f"{letter}{ending}": base**power
    for power, letter in enumerate("kmgtp", 1)
    for ending, base in (("b", 1000), ("ib", 1024))
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def bytes_of(size: int | str, name: str) -> int:
    """Return the number of bytes that a size stands for.

    Args:
        size: number of bytes, or text such as `24GiB` (2^30 bytes), `500MB` (10^6 bytes) or `1.5TB`.
        name: name of the setting, for messages.

    Raises:
        ConfigError: the size is no such text, or below 1 byte.

    Example:
        >>> bytes_of("1.5KiB", "max_memory")
        1536
    """
    number = 0
    if not isinstance(size, str):
        number = size
    elif (found := _SIZE.fullmatch(size)) is not None and found[2].lower() in _UNITS:
        number = round(float(found[1]) * _UNITS[found[2].lower()])
    else:
        require(False, name, size, "bytes or a size such as 24GiB (2^30 bytes) or 500MB (10^6)")
    require(number >= 1, name, size, "1 byte or more")
    return number


def refuse_places(memory: str, offload: str, refit: str | None) -> None:
    """Refuse unknown places, and those that exclude each other.

    Args:
        memory: the setting.
        offload: the setting.
        refit: correction step that runs the whole model on all batches at once; None if there is none.

    Raises:
        ConfigError: a name is unknown.
        ContradictionError: `memory` cannot be `blocks`.
    """
    require_one_of("memory", memory, MEMORY)
    require_one_of("offload", offload, (AUTO, *OFFLOADS))
    if memory == "blocks" and refit is not None:
        raise ContradictionError(
            f"correction_step {refit!r} runs the whole model on all batches at once, so memory cannot be 'blocks'; set "
            "memory to 'whole', or corrections to 0"
        )
    if memory == "blocks" and offload not in (AUTO, "none"):
        raise ContradictionError(
            f"memory 'blocks' keeps all in scratch files already, so offload cannot be {offload!r}; leave one of them "
            "out"
        )
