"""FSDP2: every parameter in rows over the processes (`fully_shard` under Lightning's `ModelParallelStrategy`).

Layers are exchanged inside the unit they belong to, so that a unit still comes together in one collective. There is
no public interface for that: everything private of torch is in `_Unit` below.
"""

import inspect
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import save as save_parts
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, empty

from zssvd_lightning.borrowing import overridden
from zssvd_lightning.distributed import Shards, Team
from zssvd_lightning.errors import UnsupportedTrainingError
from zssvd_lightning.strategies.base import StrategyAdapter
from zssvd_lightning.structure import ranks_of
from zssvd_lightning.targets import Target, replace_module

WEIGHTS = "state_dict."
"""What names of weights begin with in a distributed checkpoint of Lightning's."""
REST = "meta.pt"
"""The file of a distributed checkpoint in which Lightning keeps everything else."""
PARTS = "zssvd_parts"
"""The folder of a distributed checkpoint for what a compression under way holds in parts."""


class FSDP2Adapter(StrategyAdapter):
    """Calibrates on sharded parameters, truncates them in place and shards the factors."""

    serves = (ModelParallelStrategy,)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._set_aside: dict[nn.Module, list[Any]] = {}

    @cached_property
    def team(self) -> Team:
        """The processes of the run."""
        strategy: Any = self.trainer.strategy
        in_parts = strategy._save_distributed_checkpoint  # noqa: SLF001
        mesh = strategy.device_mesh["data_parallel"] if in_parts else None
        return Shards(strategy.root_device, self._sharded_modules(), mesh)

    def refuse_unsupported(self) -> None:
        """Raises UnsupportedTrainingError where this release of torch is not known inside."""
        _Unit.check_torch()

    def refuse_layers(self, targets: Mapping[str, Target]) -> None:
        """Raises UnsupportedTrainingError for layers that are not in rows over all processes, or on the CPU beside."""
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

    def before_batch(self) -> None:
        """Makes the parameters of all modules those that are sharded, which they are not after a validation."""
        for module in self._sharded_modules():
            module.reshard()  # type: ignore[operator]

    def replace(self, model: nn.Module, old: nn.Module, new: nn.Module) -> None:
        """Puts `new` in the place of `old`, in its unit too: cuts its parameters into rows and frees the rest."""
        inside = set(old.modules())
        for unit in self._units():
            if unit.holds(inside):
                self._set_aside[old] = unit.take_out(inside)
                replace_module(model, old, new)
                unit.put_in(self._set_aside.pop(new, []) or unit.cut(new))
                return
        replace_module(model, old, new)

    def rewire(self) -> None:
        """Lets units take note of types and flags as they are now, and sets up optimizers."""
        for unit in self._units():
            unit.begin()
        super().rewire()

    def settle(self) -> None:
        """Lets go of the rows of replaced layers."""
        self._set_aside = {}

    def checkpoints(self, prepare: Callable[[Mapping[str, Any]], None]) -> AbstractContextManager[None]:
        """Has the structure changed before weights are loaded, and what is in parts saved and loaded in parts."""
        strategy: Any = self.trainer.strategy
        save, load = strategy.save_checkpoint, strategy.load_checkpoint

        def save_in_parts(checkpoint: dict[str, Any], filepath: str | Path, *args: Any, **kwargs: Any) -> None:
            folder = Path(strategy.broadcast(filepath)) / PARTS
            parts: dict[str, Tensor] = {}
            save(_without_parts(checkpoint, parts), filepath, *args, **kwargs)
            if parts:
                save_parts(parts, checkpoint_id=folder)
            elif strategy.is_global_zero:
                shutil.rmtree(folder, ignore_errors=True)  # of a checkpoint that was here before

        def load_prepared(checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
            path = Path(strategy.broadcast(checkpoint_path))
            before = ranks_of(self.module)
            prepare(_outline(path, weights_only))
            self.settle()
            if ranks_of(self.module) != before and self.trainer.state.fn == TrainerFn.FITTING:
                self.rewire()
            loaded: dict[str, Any] = load(checkpoint_path, weights_only)
            return _with_parts(loaded, path / PARTS, strategy.device_mesh["data_parallel"])

        return overridden(strategy, save_checkpoint=save_in_parts, load_checkpoint=load_prepared)

    def _sharded_modules(self) -> list[nn.Module]:
        return [module for module in self.module.modules() if isinstance(module, FSDPModule)]

    def _units(self) -> Iterator["_Unit"]:
        for module in self._sharded_modules():
            yield from _Unit.of(module)


class _Unit:
    """Parameters that are gathered together: a `FSDPParamGroup` of torch."""

    def __init__(self, state: Any, group: Any) -> None:
        self._state = state
        self._group = group

    @staticmethod
    def check_torch() -> None:
        """Raises UnsupportedTrainingError when what is used of torch is not there as it is known."""
        try:
            from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo

            known = (
                "self param module_info mesh_info post_forward_mesh_info device shard_placement_fn mp_policy "
                "offload_policy"
            )
            as_known = (
                list(inspect.signature(FSDPParam.__init__).parameters) == known.split()
                and list(inspect.signature(ParamModuleInfo).parameters)[:2] == ["module", "param_name"]
                and hasattr(FSDPModule, "_get_fsdp_state")
            )
        except ImportError:
            as_known = False
        if not as_known:
            raise UnsupportedTrainingError(
                f"FSDP2 of torch {torch.__version__} is not as this release knows it inside (it was tested with 2.13), "
                "so that layers cannot be exchanged; use that, or compress first, as recipes/two_fits.py does"
            )

    @classmethod
    def of(cls, module: nn.Module) -> Iterator["_Unit"]:
        """The units of a module that was given to `fully_shard`."""
        state: Any = module._get_fsdp_state()  # type: ignore[operator]  # noqa: SLF001
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # noqa: SLF001
        yield from (cls(state, group) for group in groups if group is not None)

    def holds(self, modules: set[nn.Module]) -> bool:
        """Whether parameters of these modules are in this unit."""
        return any(param._module_info.module in modules for param in self._group.fsdp_params)  # noqa: SLF001

    def take_out(self, modules: set[nn.Module]) -> list[Any]:
        """Removes the parameters of these modules, and returns them."""
        params = self._group.fsdp_params
        out = [param for param in params if param._module_info.module in modules]  # noqa: SLF001
        self._group.fsdp_params = [param for param in params if param not in out]
        return out

    def cut(self, module: nn.Module) -> list[Any]:
        """Cuts the parameters of a whole module into rows, of which each process keeps its own."""
        from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo

        group = self._group
        layout = (group.mesh_info, group.post_forward_mesh_info, group.device, None, group.mp_policy)
        return [
            FSDPParam(parameter, ParamModuleInfo(part, name), *layout, group.offload_policy)
            for part in module.modules()
            for name, parameter in part.named_parameters(recurse=False)
        ]

    def put_in(self, params: list[Any]) -> None:
        """Adds parameters."""
        self._group.fsdp_params = [*self._group.fsdp_params, *params]
        saving = self._group._module_to_pre_save_state_dict_hook_handle  # noqa: SLF001
        loading = self._group._module_to_pre_load_state_dict_hook_handle  # noqa: SLF001
        for handle in chain(saving.values(), loading.values()):
            handle.remove()
        saving.clear()
        loading.clear()
        self.begin()

    def begin(self) -> None:
        """Notes types, flags and modules of the parameters, where training has begun and it was done before."""
        if self._state._is_root is not None:  # noqa: SLF001
            self._group.lazy_init()


def _outline(path: Path, weights_only: bool | None) -> dict[str, Any]:
    """A checkpoint with tensors of the right shapes, but without their values."""
    if path.is_file():
        whole: dict[str, Any] = torch.load(path, map_location="meta", weights_only=weights_only)
        return whole
    rest: dict[str, Any] = torch.load(path / REST, map_location="meta", weights_only=weights_only)
    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    weights: dict[str, Tensor] = {
        name.removeprefix(WEIGHTS): torch.empty(entry.size, device="meta")
        for name, entry in saved.items()
        if name.startswith(WEIGHTS) and isinstance(entry, TensorStorageMetadata)
    }
    return rest | {"state_dict": weights}


def _without_parts(checkpoint: dict[str, Any], parts: dict[str, Tensor]) -> dict[str, Any]:
    """A checkpoint in which callbacks keep names for tensors in parts, which go into `parts`."""

    def name(tensor: DTensor) -> dict[str, Any]:
        parts[str(len(parts))] = tensor
        return {PARTS: str(len(parts) - 1), "split": tensor.placements[0].dim}  # type: ignore[attr-defined]

    callbacks = _mapped(checkpoint.get("callbacks", {}), lambda entry: isinstance(entry, DTensor), name)
    return checkpoint | {"callbacks": callbacks} if "callbacks" in checkpoint else checkpoint


def _with_parts(checkpoint: dict[str, Any], folder: Path, mesh: DeviceMesh) -> dict[str, Any]:
    """A checkpoint with what each process is to hold of the tensors that any number of them have saved in parts."""
    if not folder.is_dir() or "callbacks" not in checkpoint:
        return checkpoint
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    parts: dict[str, Tensor] = {}

    def make(named: dict[str, Any]) -> Tensor:
        entry: Any = saved[named[PARTS]]
        placements = [Shard(named["split"])]
        part = empty(*entry.size, dtype=entry.properties.dtype, device_mesh=mesh, placements=placements)
        return parts.setdefault(named[PARTS], part)

    callbacks = _mapped(checkpoint["callbacks"], lambda entry: isinstance(entry, dict) and PARTS in entry, make)
    load_parts(parts, checkpoint_id=folder)
    return checkpoint | {"callbacks": callbacks}


def _mapped(entry: Any, is_leaf: Callable[[Any], bool], change: Callable[[Any], Any]) -> Any:
    """Nested dictionaries and lists with some entries changed."""
    if is_leaf(entry):
        return change(entry)
    if isinstance(entry, dict):
        return {key: _mapped(value, is_leaf, change) for key, value in entry.items()}
    if isinstance(entry, (list, tuple)):
        return type(entry)(_mapped(value, is_leaf, change) for value in entry)
    return entry
