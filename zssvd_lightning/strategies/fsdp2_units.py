"""Access to FSDP2 internals: units of parameters that are gathered together, and replacing some of these parameters.

Torch has no public interface for this. All private names of torch's FSDP2 that are used are in this file, with a check
that they exist in the expected form.
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
"""Torch release on which the code was tested; other releases are accepted if their internals look the same."""


SIGNATURE = ["self", "param", "module_info", "mesh_info", "post_forward_mesh_info", "device", "shard_placement_fn"]


SIGNATURE += ["mp_policy", "offload_policy"]


OF_A_GROUP = (
    *("fsdp_params", "mesh_info", "post_forward_mesh_info", "device", "mp_policy", "offload_policy"),
    *("_to_sharded", "lazy_init"),
    *("_module_to_pre_save_state_dict_hook_handle", "_module_to_pre_load_state_dict_hook_handle"),
)


OF_A_PARAMETER = ("_module_info", "_post_load_hook_handle")


class Unit:
    """Group of parameters that are gathered together: torch's `FSDPParamGroup`."""

    def __init__(self, state: Any, group: Any) -> None:
        self._state = state
        self._group = group

    @classmethod
    def of(cls, module: nn.Module) -> Iterator["Unit"]:
        """Yield the units of a module that was passed to `fully_shard`."""
        state: Any = module._get_fsdp_state()  # type: ignore[operator]  # noqa: SLF001
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # noqa: SLF001
        yield from (cls(state, group) for group in groups if group is not None)

    def holds(self, modules: set[nn.Module]) -> bool:
        """Return True if the unit has a parameter of one of these modules."""
        return any(param._module_info.module in modules for param in self._group.fsdp_params)  # noqa: SLF001

    def take_out(self, modules: set[nn.Module]) -> list[Any]:
        """Remove the parameters of these modules from the unit and return them."""
        params = self._group.fsdp_params
        out = [param for param in params if param._module_info.module in modules]  # noqa: SLF001
        self._group.fsdp_params = [param for param in params if param not in out]
        return out

    def cut(self, module: nn.Module) -> list[Any]:
        """Split the parameters of a whole module into rows; each process stores only its share."""
        from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo

        group = self._group
        layout = (group.mesh_info, group.post_forward_mesh_info, group.device, None, group.mp_policy)
        return [
            FSDPParam(parameter, ParamModuleInfo(part, name), *layout, group.offload_policy)
            for part in module.modules()
            for name, parameter in part.named_parameters(recurse=False)
        ]

    def put_in(self, params: list[Any]) -> None:
        """Add parameters to the unit."""
        self._group.fsdp_params = [*self._group.fsdp_params, *params]
        saving = self._group._module_to_pre_save_state_dict_hook_handle  # noqa: SLF001
        loading = self._group._module_to_pre_load_state_dict_hook_handle  # noqa: SLF001
        for handle in chain(saving.values(), loading.values()):
            handle.remove()
        saving.clear()
        loading.clear()
        self.begin()

    def shard(self) -> None:
        """Free gathered parameters, even in the middle of a forward pass that will not be continued."""
        self._group._to_sharded()  # noqa: SLF001

    def begin(self) -> None:
        """Record types, flags and modules of the parameters again, if torch has already recorded them once."""
        if self._state._is_root is not None:  # noqa: SLF001
            self._group.lazy_init()

    def is_as_known(self) -> bool:
        """Return True if every internal attribute that this file uses exists."""
        group_is = hasattr(self._state, "_is_root") and all(hasattr(self._group, name) for name in OF_A_GROUP)
        return group_is and all(hasattr(param, name) for param in self._group.fsdp_params for name in OF_A_PARAMETER)

    @property
    def divides_as_told(self) -> bool:
        """True if a gradient divide factor replaces the division by the number of processes."""
        return getattr(self._group, "gradient_divide_factor", None) is not None


def let_go(params: list[Any]) -> None:
    """Free parameters that were removed from a unit, by removing the hooks that tie them to their modules."""
    for param in params:
        param._post_load_hook_handle.remove()  # noqa: SLF001


def refuse_unknown_torch(modules: list[nn.Module]) -> None:
    """Raise UnsupportedTrainingError if the internals of torch do not have the expected form.

    Args:
        modules: the modules that were passed to `fully_shard`.
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
