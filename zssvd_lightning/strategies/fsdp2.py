"""Adapter for FSDP2: the rows of every parameter are split over the processes.

FSDP2 is `fully_shard` under Lightning's `ModelParallelStrategy`. Layers are replaced inside the unit they belong to, so
that the unit is still gathered in one collective.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from zssvd_lightning._contexts import overridden
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.config.corrections import CORRECTIONS
from zssvd_lightning.distributed import Shards, Team
from zssvd_lightning.errors import CheckpointError, UnsupportedTrainingError
from zssvd_lightning.model.dense_copy import COMPILED, copied
from zssvd_lightning.model.replace import replace_module
from zssvd_lightning.model.targets import Target, local_part
from zssvd_lightning.strategies import sharded_checkpoints as parts
from zssvd_lightning.strategies.base import StrategyAdapter
from zssvd_lightning.strategies.fsdp2_units import Unit, let_go, refuse_unknown_torch


class FSDP2Adapter(StrategyAdapter):
    """Adapter that calibrates on sharded parameters, truncates them in place and shards the factors."""

    serves = (ModelParallelStrategy,)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._set_aside: dict[nn.Module, list[Any]] = {}

    @cached_property
    def team(self) -> Team:
        """Team of the processes of the run."""
        strategy: Any = self.trainer.strategy
        in_parts = strategy._save_distributed_checkpoint  # noqa: SLF001
        mesh = strategy.device_mesh["data_parallel"] if in_parts else None
        return Shards(strategy.root_device, self._sharded_modules(), mesh)

    def refuse_unsupported(self) -> None:
        """Raise UnsupportedTrainingError if the torch internals are unknown or a gradient divide factor is set."""
        refuse_unknown_torch(self._sharded_modules())
        if any(unit.divides_as_told for unit in self._units()):
            raise UnsupportedTrainingError(
                "set_gradient_divide_factor gives gradients a scale that the loss does not have; leave it out until "
                "the model is low-rank"
            )

    def refuse_settings(self, config: CompressionConfig) -> None:
        """Raise UnsupportedTrainingError for settings that need whole weights, spectra or factors on a process.

        Settings that need two backward passes through one forward pass are also refused, because FSDP2 frees gathered
        weights between them.
        """
        if config.watches_outputs not in (None, "empirical"):
            raise UnsupportedTrainingError(
                f"output_side {config.output_side!r} takes two backward passes through one forward pass, between which "
                "FSDP2 lets go of the weights; compress under DDP or on one device, or keep output_side='empirical'"
            )
        if config.narrow:
            raise UnsupportedTrainingError(
                "narrow takes rows and columns out of whole weights, but under FSDP2 each process has only some of "
                "their rows; compress under DDP or on one device, or leave narrow out"
            )
        if config.reestimate:
            raise UnsupportedTrainingError(
                "reestimate keeps the whole spectra of all layers on every process, which has a part of the weights "
                "under FSDP2; compress under DDP or on one device, or leave it out"
            )
        if config.corrections and not config.correction.splits_by_rows:
            able = " or ".join(map(repr, CORRECTIONS.those(lambda correction: correction.splits_by_rows)))
            raise UnsupportedTrainingError(
                f"correction_step {config.correction_step!r} changes whole weights, but under FSDP2 each process has "
                f"only some of their rows; compress under DDP or on one device, or use {able}"
            )
        if config.form.rounds:
            raise UnsupportedTrainingError(
                f"storage {config.storage!r} puts whole factors into 8 bits when the fit ends, but under FSDP2 each "
                "process has a part of them; compress under DDP or on one device, or use storage='factors'"
            )

    def parks(self, setting: bool | str) -> bool | str:
        """Return False for `auto`, and raise UnsupportedTrainingError for True.

        Checkpoints gather the parts of the state, which must be on the device for that.
        """
        if setting is True:
            raise UnsupportedTrainingError(
                "park_optimizer moves the state of an optimizer to where FSDP2 cannot gather it for checkpoints; leave "
                "it out: each process holds only its part of the state"
            )
        return False

    def refuse_layers(self, targets: Mapping[str, Target]) -> None:
        """Raise UnsupportedTrainingError for layers not split by rows over all processes, or offloaded to the CPU."""
        for name, target in targets.items():
            weight = target.module.weight
            if (
                not isinstance(weight, DTensor)
                or weight.device_mesh.ndim != 1
                or weight.device_mesh.size() != self.team.size
                or tuple(weight.placements) != (Shard(0),)
            ):
                layout = f"{weight.placements} over {weight.device_mesh}" if isinstance(weight, DTensor) else "whole"
                raise UnsupportedTrainingError(
                    f"{name} is laid out {layout}, but compression needs its rows cut over all {self.team.size} "
                    "processes: apply fully_shard alone, with mesh=self.device_mesh['data_parallel'] and a "
                    "tensor_parallel_size of 1, or compress first, as recipes/two_fits.py does"
                )
            if weight.device != self.trainer.strategy.root_device:
                raise UnsupportedTrainingError(
                    f"{name} is kept on {weight.device}, from where nothing can be gathered; use fully_shard without "
                    "an offload_policy, or compress first, as recipes/two_fits.py does"
                )

    def unwrap_parameters(self) -> None:
        """Make the parameters of all modules the sharded ones.

        During a forward pass, or after one without a backward pass, modules hold gathered parameters instead.
        """
        for unit in self._units():
            unit.shard()

    def sync_requires_grad(self) -> None:
        """Update the units, which reduce gradients in the type of the parameters that require gradients."""
        for unit in self._units():
            unit.begin()

    def replace(self, model: nn.Module, old: nn.Module, new: nn.Module) -> None:
        """Put `new` in place of `old`, also in its unit: split its parameters into rows and free the other rows."""
        inside = set(old.modules())
        unit = next((unit for unit in self._units() if unit.holds(inside)), None)
        if unit is None:
            replace_module(model, old, new)
            return
        parameters = self._set_aside.pop(new) if new in self._set_aside else unit.cut(new)
        self._set_aside[old] = unit.take_out(inside)
        replace_module(model, old, new)
        unit.put_in(parameters)

    def dense_copy(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Return a dense copy of `model` with its rows split over the processes and the same units. Collective."""
        source: dict[str, Tensor] = {name.replace(COMPILED, ""): p for name, p in model.named_parameters()}
        copy = copied(model, dtype, lambda parameter: torch.empty(parameter.shape, dtype=dtype, device="meta"))
        sharded = (name for name, part in model.named_modules() if isinstance(part, FSDPModule))
        units = {name.replace(COMPILED, "") for name in sharded} | {""}
        mesh = self.trainer.strategy.device_mesh["data_parallel"]  # type: ignore[attr-defined]
        for name in sorted(units, key=len, reverse=True):
            fully_shard(copy.get_submodule(name), mesh=mesh, reshard_after_forward=True)
        buffers = {name: buffer.clone() for name, buffer in copy.named_buffers()}
        nn.Module.to_empty(copy, device=self.trainer.strategy.root_device)
        with torch.no_grad():
            for name, buffer in copy.named_buffers():
                buffer.copy_(buffers[name])
            for name, parameter in copy.named_parameters():
                if name in source and source[name].shape == parameter.shape:
                    local_part(parameter.detach()).copy_(local_part(source[name].detach()))
        return copy

    @property
    def processes_of_a_copy(self) -> int:
        """Number of processes that share one `dense_copy`, which is all of them."""
        return self.team.size

    def rebuild_optimizers(self) -> None:
        """Update the units to the current types and flags of their parameters, and set up optimizers. Collective."""
        self.sync_requires_grad()
        super().rebuild_optimizers()

    def discard_replaced(self) -> None:
        """Free the rows of replaced layers."""
        for parameters in self._set_aside.values():
            let_go(parameters)
        self._set_aside = {}

    def checkpoints(self, prepare: Callable[[Mapping[str, Any]], None], key: str) -> AbstractContextManager[None]:
        """Return a context that changes the layers before weights load, and saves and loads sharded state in parts."""
        strategy: Any = self.trainer.strategy
        save, load = strategy.save_checkpoint, strategy.load_checkpoint

        def save_in_parts(checkpoint: dict[str, Any], filepath: str | Path, *args: Any, **kwargs: Any) -> None:
            path, token = strategy.broadcast((Path(filepath), uuid4().hex))
            states, state_parts = dict(checkpoint.get("callbacks", {})), dict[str, Tensor]()
            if key in states:
                states[key], state_parts = parts.taken_out(states[key], token)
                checkpoint = checkpoint | {"callbacks": states}
            save(checkpoint, filepath, *args, **kwargs)
            parts.save(state_parts, path, first=strategy.is_global_zero)

        def load_prepared(checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
            path, fitting = Path(strategy.broadcast(checkpoint_path)), self.trainer.state.fn == TrainerFn.FITTING
            self.refuse_unsupported()
            before, outline = _trained_of(self.module), parts.outline(path, weights_only)
            if fitting:
                _refuse_empty_optimizers(outline, path)
            prepare(outline)
            self.discard_replaced()
            if _trained_of(self.module) != before and fitting:
                self.rebuild_optimizers()
            loaded: dict[str, Any] = load(checkpoint_path, weights_only)
            if key in loaded.get("callbacks", {}):
                mesh = strategy.device_mesh["data_parallel"]
                loaded["callbacks"][key] = parts.put_back(loaded["callbacks"][key], path, mesh)
            return loaded

        return overridden(
            strategy,
            save_checkpoint=save_in_parts,
            load_checkpoint=load_prepared,
            optimizer_state=functools.partial(_untouched_state, strategy.optimizer_state),
        )

    def _sharded_modules(self) -> list[nn.Module]:
        return [module for module in self.module.modules() if isinstance(module, FSDPModule)]

    def _units(self) -> Iterator[Unit]:
        for module in self._sharded_modules():
            yield from Unit.of(module)


def _untouched_state(state_of: Callable[[Optimizer], dict[str, Any]], optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's state and leave the optimizer unchanged.

    If the optimizer has no state, torch creates it by a step with zero gradients, which Adam counts. The step is
    undone here.
    """
    begun = bool(optimizer.state)
    state = state_of(optimizer)
    if not begun:
        optimizer.state.clear()
        for entry in state.get("state", {}).values():
            if "step" in entry:
                entry["step"] = torch.zeros_like(entry["step"])
    return state


def _trained_of(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Return the shape and `requires_grad` flag of every parameter; a change means that optimizers are outdated."""
    return {name: (tuple(p.shape), p.requires_grad) for name, p in module.named_parameters()}


def _refuse_empty_optimizers(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError for an optimizer without state, on which Lightning would fail without a clear message."""
    if any(not state["state"] for state in checkpoint.get("optimizer_states", [])):
        raise CheckpointError(
            f"{path} holds an optimizer without a state, as one of plain SGD, or one of DDP before its first step; "
            "Lightning cannot go on from such a one under FSDP2. Resume from a later checkpoint, with an optimizer "
            "that keeps something, or under the strategy it was taken with"
        )
