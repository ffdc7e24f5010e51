"""Choice of `memory` and `offload` by limits of memory, with the formulas that `zssvd plan --memory` shows."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.compression.memory.extent import Extent
from zssvd_lightning.compression.memory.needs import Formulas, Needs
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.config.placement import AUTO, bytes_of
from zssvd_lightning.distributed import Shards
from zssvd_lightning.errors import ContradictionError, MemoryLimitError
from zssvd_lightning.offload.media import free_disk
from zssvd_lightning.selection.budget import Budget

WAYS = (("whole", "none"), ("whole", "cpu"), ("blocks", "none"), ("whole", "disk"))
"""All pairs of `memory` and `offload`, the fastest first."""

GIB = 2**30


class Choice(NamedTuple):
    """Way that was chosen."""

    config: CompressionConfig
    """Settings with that `memory` and `offload`."""
    room: int
    """Bytes that its needs leave of the limit of the device, for roots that later rounds use again."""
    line: str
    """Sentence on the choice and its reason."""


@dataclass(frozen=True)
class Limits:
    """Limits of memory, which also judge the needs of a way.

    Attributes:
        device: bytes of the device; None for no limit. On a CPU those of its one memory.
        host: bytes of the host, likewise.
        disk: bytes that are free for scratch files.
        apart: True if device and host have memories of their own.
    """

    device: int | None
    host: int | None
    disk: int
    apart: bool = True

    @classmethod
    def of(cls, config: CompressionConfig, device: torch.device, held: int = 0) -> "Limits":
        """Return the limits that settings ask for, for a model on a device. `held` bytes of the disk count as free."""
        sizes = {name: bytes_of(size, name) for name, size in config.limits.items()}
        most, host, disk = sizes.get("max_memory"), sizes.get("max_host_memory"), free_disk() + held
        if device.type == "cpu":
            return cls(min(sizes.values(), default=None), None, disk, apart=False)
        return cls(most, host, disk)

    def exceeded(self, needs: Needs) -> list[str]:
        """Return what of the needs is above the limits, in words."""
        on_device = ("on the device", needs.device) if self.apart else ("of memory", needs.together)
        pairs = (
            (*on_device, self.device),
            ("in the host", needs.host, self.host),
            ("of scratch files", needs.disk, self.disk),
        )
        return [f"{shown(need)} {where}" for where, need, limit in pairs if limit is not None and need > limit]

    def room(self, needs: Needs) -> int:
        """Return the bytes that needs leave of the memory of the device; very many without a limit."""
        return 2**62 if self.device is None else max(0, self.device - _peak(needs, self))

    def __str__(self) -> str:
        where = ((self.device, "on the device" if self.apart else "of memory"), (self.host, "in the host"))
        return " and ".join(f"{shown(limit)} {place}" for limit, place in where if limit is not None)


def ways(config: CompressionConfig, *, apart: bool = True, blocks: bool = True) -> Iterator[CompressionConfig]:
    """Yield the settings with each `memory` and `offload` that they leave open, the fastest first.

    Args:
        config: settings; a `memory` or `offload` that is not `auto` stays.
        apart: False for a model on the CPU, where `cpu` moves nothing.
        blocks: False where a model is not run block by block, as in a fit.
    """
    for memory, offload in WAYS:
        open_to = config.memory in (AUTO, memory) and (memory == "blocks" or config.offload in (AUTO, offload))
        moves_nothing = offload == "cpu" and not apart and config.offload == AUTO
        if open_to and not moves_nothing and (blocks or memory != "blocks"):
            with suppress(ContradictionError):  # some settings have no blocks
                yield replace(config, memory=memory, offload=offload if memory == "whole" else config.offload)


def choose(
    config: CompressionConfig,
    extent: Extent,
    budget: Budget,
    device: torch.device,
    *,
    blocks: bool = True,
    held: int = 0,
) -> Choice:
    """Return the fastest way within the limits of memory.

    Args:
        config: settings with `max_memory` or `max_host_memory`.
        extent: sizes of the model and of its calibration.
        budget: budget of the compression.
        device: device of the model.
        blocks: False where a model is not run block by block, as in a fit.
        held: bytes on the disk of the scratch files that count as free, as those of an interrupted run.

    Raises:
        MemoryLimitError: no way is within the limits.
    """
    limits = Limits.of(config, device, held)
    blocks = blocks and len(extent.blocks) > 1  # the last are the layers outside of all blocks
    passed: list[str] = []
    for way in ways(config, apart=limits.apart, blocks=blocks):
        needs = Formulas(extent, way, budget).needs(roots=False)
        if not (above := limits.exceeded(needs)):
            return Choice(way, limits.room(needs), _line(way, needs, limits, passed, extent))
        passed.append(f"{named(way)} needs {' and '.join(above)}")
    raise MemoryLimitError(_refusal(config, extent, budget, limits, passed, blocks=blocks))


def within_limits(
    build: Callable[[CompressionConfig], Compression],
    config: CompressionConfig,
    extent: Callable[[Compression], Extent],
    *,
    blocks: bool = True,
    held: int = 0,
) -> Compression:
    """Return the compression with the way that the limits of memory choose, or as it is without limits.

    Args:
        build: function that makes the compression of settings.
        config: settings.
        extent: function that measures its sizes; called only if there are limits.
        blocks: False where a model is not run block by block, as in a fit.
        held: as for `choose`.

    Raises:
        MemoryLimitError: no way is within the limits.
        ContradictionError: several processes share the weights of the model.
    """
    run = build(config)
    if not config.limits:
        return run
    if isinstance(run.team, Shards):
        raise ContradictionError(
            f"the memory of a model whose weights several processes share is not known, so "
            f"{' and '.join(config.limits)} cannot be kept; leave them out, and set offload if it is needed"
        )
    device = next(run.model.parameters()).device
    choice = choose(config, extent(run), run.budget, device, blocks=blocks, held=held)
    run = build(choice.config)
    run.choice_of_memory, run.gathering.roots.most = choice.line, choice.room
    return run


def named(config: CompressionConfig) -> str:
    """Return the way of settings in words."""
    return "memory 'blocks'" if config.by_blocks else f"memory 'whole' with offload {config.place!r}"


def shown(size: int) -> str:
    """Return a number of bytes in GiB."""
    return f"{size / GIB:.3g} GiB"


def _line(way: CompressionConfig, needs: Needs, limits: Limits, passed: list[str], extent: Extent) -> str:
    sizes = (
        f"{shown(needs.device)} on the device and {shown(needs.host)} in the host"
        if limits.apart
        else f"{shown(needs.together)} of memory"
    )
    more = f" and {shown(needs.disk)} of scratch files" if needs.disk else ""
    why = f", because {'; '.join(passed)}" if passed else ", the fastest way that is open"
    return f"{named(way)} is chosen within {limits}: it needs {sizes}{more}{why}{_uncounted(extent)}"


def _uncounted(extent: Extent) -> str:
    return "" if extent.seen else "; the activations of a batch are not known, and not counted"


def _refusal(
    config: CompressionConfig, extent: Extent, budget: Budget, limits: Limits, passed: list[str], *, blocks: bool
) -> str:
    free = replace(config, memory=AUTO, offload=AUTO)
    lower = [
        f"{text} ({shown(_peak(needs, limits))})"
        for text, other in _alternatives(config, free, limits, blocks=blocks)
        if not limits.exceeded(needs := Formulas(extent, other, budget).needs(roots=False))
    ]
    batch = max(extent.whole_pass, extent.part_pass)
    smaller = [f"smaller batches, as one takes up to {shown(batch)}"] if batch else []
    smaller += ["weights in bfloat16"] if extent.width > 2 else []
    smaller += (
        ["a metric without output gradients, as in preset 'zs-svd'"] if config.watches_outputs is not None else []
    )
    smaller += ["memory='blocks' in compress() before the fit"] if not blocks else []
    advice = f"within the limits: {', or '.join(lower)}" if lower else f"it is less with {', or '.join(smaller)}"
    advice = advice if lower or smaller else "no setting is known to take less"
    return (
        f"no way is within {limits}: {'; '.join(passed) or 'no way is open'}. The weights alone are "
        f"{shown(extent.weights)}; {advice}{_uncounted(extent)}"
    )


def _alternatives(
    config: CompressionConfig, free: CompressionConfig, limits: Limits, *, blocks: bool
) -> Iterator[tuple[str, CompressionConfig]]:
    """Yield changes of settings that may be within the limits, in words, and the settings."""
    if free != config:
        for way in ways(free, apart=limits.apart, blocks=blocks):
            yield f"memory={way.memory!r}" + (f", offload={way.offload!r}" if way.memory == "whole" else ""), way
    if config.corrections:
        for way in ways(replace(config, corrections=0), apart=limits.apart, blocks=blocks):
            yield f"corrections=0 with {named(way)}", way


def _peak(needs: Needs, limits: Limits) -> int:
    """Return the peak in the memory of the device."""
    return needs.device if limits.apart else needs.together
