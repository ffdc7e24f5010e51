"""What is used of FSDP2's inside: the parameters that are gathered together, and exchanging some of them.

Torch has no public interface for it. Everything private of it is in this file, with a check that it is there as known.
"""

import inspect
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from zssvd_lightning.errors import UnsupportedTrainingError

TESTED = "2.13"
"""Releases of torch whose inside is known by running it; others are taken when they look the same."""


SIGNATURE = ["self", "param", "module_info", "mesh_info", "post_forward_mesh_info", "device", "shard_placement_fn"]


SIGNATURE += ["mp_policy", "offload_policy"]


OF_A_GROUP = (
    *("fsdp_params", "mesh_info", "post_forward_mesh_info", "device", "mp_policy", "offload_policy"),
    *("_to_sharded", "lazy_init"),
    *("_module_to_pre_save_state_dict_hook_handle", "_module_to_pre_load_state_dict_hook_handle"),
)


OF_A_PARAMETER = ("_module_info", "_post_load_hook_handle")


class Unit:
    """Parameters that are gathered together: a `FSDPParamGroup` of torch."""

    def __init__(self, state: Any, group: Any) -> None:
        self._state = state
        self._group = group

    @classmethod
    def of(cls, module: nn.Module) -> Iterator["Unit"]:
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

    def shard(self) -> None:
        """Frees what was gathered, also in the middle of a forward pass that will not be gone on with."""
        self._group._to_sharded()  # noqa: SLF001

    def begin(self) -> None:
        """Notes types, flags and modules of the parameters, where training has begun and it was done before."""
        if self._state._is_root is not None:  # noqa: SLF001
            self._group.lazy_init()

    def is_as_known(self) -> bool:
        """Whether all that is used of it is there."""
        group_is = hasattr(self._state, "_is_root") and all(hasattr(self._group, name) for name in OF_A_GROUP)
        return group_is and all(hasattr(param, name) for param in self._group.fsdp_params for name in OF_A_PARAMETER)

    @property
    def divides_as_told(self) -> bool:
        """Whether the sum of gradients is divided by something else than the number of processes."""
        return getattr(self._group, "gradient_divide_factor", None) is not None


def let_go(params: list[Any]) -> None:
    """Frees parameters that were taken out: torch has them and their module hold each other."""
    for param in params:
        param._post_load_hook_handle.remove()  # noqa: SLF001


def refuse_unknown_torch(modules: list[nn.Module]) -> None:
    """Raises UnsupportedTrainingError when torch is not as it is known inside.

    Args:
        modules: those that were given to `fully_shard`.
    """
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo

        as_known = (
            list(inspect.signature(FSDPParam.__init__).parameters) == SIGNATURE
            and list(inspect.signature(ParamModuleInfo).parameters)[:2] == ["module", "param_name"]
            and hasattr(FSDPModule, "_get_fsdp_state")
            and all(unit.is_as_known() for module in modules for unit in Unit.of(module))
        )
    except (ImportError, AttributeError):
        as_known = False
    if not as_known:
        raise UnsupportedTrainingError(
            f"FSDP2 of torch {torch.__version__} is not as this release knows it inside (it was tested with {TESTED}), "
            "so that layers cannot be exchanged; use that, or compress first, as recipes/two_fits.py does"
        )
