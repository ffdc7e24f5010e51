"""Selection of the layers to factorize: linear layers by type and name, with a reason for each one excluded."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from zssvd_lightning._validation import closest
from zssvd_lightning.errors import TargetError
from zssvd_lightning.layers.base import shape_of
from zssvd_lightning.layers.storage import break_even_rank
from zssvd_lightning.model.peft_layers import MERGE_FIRST, linear_layers_in_peft
from zssvd_lightning.model.replace import inside_compressed

Patterns = Sequence[str] | str | None
"""Name patterns, or a single one; None for none."""


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, as a plain tensor that shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Target:
    """Linear layer to factorize, as `y = W x + b` regardless of how it stores W."""

    name: str
    """Qualified name in the model."""
    module: nn.Linear | Conv1D

    @property
    def weight(self) -> Tensor:
        """W (m, n), or this process's part of it. A view: writing to it writes to the model."""
        return self._oriented(local_part(self.module.weight.detach()))

    @property
    def gradient(self) -> Tensor | None:
        """Gradient dL/dW of this process's part of W, as set by autograd, or None."""
        gradient = self.module.weight.grad
        return None if gradient is None else self._oriented(local_part(gradient))

    def leave_gradient(self, gradient: Tensor) -> None:
        """Store a copy of dL/dW for this process's part of W in the `grad` attribute of the weight."""
        weight = self.module.weight
        stored = self._oriented(gradient).to(weight.device, weight.dtype, copy=True).contiguous()
        if isinstance(weight, DTensor):
            stored = DTensor.from_local(
                stored, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride()
            )
        weight.grad = stored

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (m, n) of the full W: outputs, inputs."""
        return shape_of(self.module)

    @property
    def split(self) -> int:
        """Dimension of W along which processes shard it: the first dimension of the stored weight."""
        return 1 if isinstance(self.module, Conv1D) else 0

    def assign(self, W: Tensor) -> None:
        """Overwrite the weight in place with W (m, n) or this process's part of it, cast to the weight's type."""
        self.weight.copy_(W)

    def _oriented(self, stored: Tensor) -> Tensor:
        return stored.T if isinstance(self.module, Conv1D) else stored


def find_targets(model: nn.Module, include: Patterns = None, ignore: Patterns = None) -> dict[str, Target]:
    """Return the layers of `model` to factorize, by qualified name in module order.

    Plain `nn.Linear` and transformers' `Conv1D` are candidates. Excluded are output embeddings, tied weights,
    subclasses, weights that are not floating point, layers given to `fully_shard` on their own, factors of an earlier
    compression (see `recompression.StandIns`), and layers where even rank 1 saves no parameter.

    Args:
        model: any module.
        include: shell patterns that match qualified names or their ends (`q_proj`, `model.layers.3.*`), or `re:`
            followed by a regular expression that matches full names. None includes all.
        ignore: patterns of the same form. They take precedence over `include`.

    Raises:
        TargetError: no layer is left, a pattern matches no module, a pattern of `include` matches only layers that
            cannot be factorized (the message says why), or a selected layer has an adapter of PEFT.
    """
    include = [include] if isinstance(include, str) else include
    ignore = [ignore] if isinstance(ignore, str) else ignore
    names = [name for name, _ in model.named_modules() if name]
    for pattern in [*(include or ()), *(ignore or ())]:
        if not any(matches(name, pattern) for name in names):
            raise TargetError(f"pattern {pattern!r} matches no module{closest(pattern, names) if names else ''}")

    refuse_adapted(model, include, ignore)
    refused = dict(_refusals(model))
    linears = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    allowed = {n: Target(n, m) for n, m in linears.items() if n not in refused}
    for pattern in include or ():
        _explain_if_refused(pattern, model, set(allowed), refused)
    targets = {name: target for name, target in allowed.items() if is_selected(name, include, ignore)}
    if not targets:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:5])
        raise TargetError(
            f"no layer to compress: {len(linears)} linear layers, of which {len(refused)} cannot be factorized"
            + (f" ({reasons})" if reasons else "")
            + f"; include={include}, ignore={ignore}"
        )
    return targets


def is_selected(name: str, include: Patterns, ignore: Patterns) -> bool:
    """Return whether `include` and `ignore` select the layer `name`. Raises TargetError for invalid patterns."""
    include = [include] if isinstance(include, str) else include
    ignore = [ignore] if isinstance(ignore, str) else ignore
    included = include is None or any(matches(name, pattern) for pattern in include)
    return included and not any(matches(name, pattern) for pattern in ignore or ())


def refuse_adapted(model: nn.Module, include: Patterns = None, ignore: Patterns = None) -> None:
    """Raise TargetError if a selected layer has an adapter of PEFT, or is a copy that PEFT trains."""
    for outer, name, layer in linear_layers_in_peft(model):
        included = any(is_selected(place, include, ignore) for place in (outer, name))
        if included and is_selected(outer, None, ignore):
            raise TargetError(
                f"{name} ({type(layer).__name__}) belongs to an adapter layer of PEFT, {outer}: {MERGE_FIRST}; or add "
                f"{outer} to ignore"
            )


def _refusals(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the name of every linear layer that cannot be factorized, with the reason."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    heads = {id(head) for head in _output_embeddings(model)}
    no_targets = dict.fromkeys(inside_compressed(model), "it is a factor of a layer that is low-rank already")
    no_targets |= {id(layer): MERGE_FIRST for _, _, layer in linear_layers_in_peft(model)}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if id(module) in no_targets:
            yield name, no_targets[id(module)]
        elif isinstance(module, FSDPModule):
            yield name, "it was given to fully_shard on its own; give the block around it instead"
        elif type(module) not in (nn.Linear, Conv1D) or weight is None:
            yield name, f"{type(module).__name__} does not compute W x + b from a plain weight parameter"
        elif not weight.is_floating_point():
            yield name, f"its weight is {weight.dtype}, not floating point"
        elif owners[id(weight)] > 1:
            yield name, "its weight is tied to another module's, and factorizing one would untie them"
        elif id(module) in heads or name.rsplit(".", 1)[-1] == "lm_head":
            yield name, "it is the output embedding, where every token's logit needs its own row at full rank"
        elif break_even_rank(*Target(name, module).shape) < 1:
            yield name, f"at shape {tuple(weight.shape)} even rank 1 would not save a parameter"


def _output_embeddings(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            head = module.get_output_embeddings()  # type: ignore[no-untyped-call]
            if isinstance(head, nn.Module):
                yield head


def _explain_if_refused(pattern: str, model: nn.Module, allowed: set[str], refused: dict[str, str]) -> None:
    """Raise TargetError if `pattern` matches no allowed layer."""
    matched = [(n, m) for n, m in model.named_modules() if n and matches(n, pattern)]
    if any(name in allowed for name, _ in matched):
        return
    for name, _ in matched:
        if name in refused:
            raise TargetError(f"{name} cannot be factorized: {refused[name]}; take it out of include")
    name, module = matched[0]
    kind = (
        "an embedding is a table lookup, not a product with W"
        if isinstance(module, nn.Embedding)
        else "only nn.Linear and transformers' Conv1D layers are"
    )
    raise TargetError(f"{name} ({type(module).__name__}) cannot be factorized: {kind}; take {pattern!r} out of include")


def matches(name: str, pattern: str) -> bool:
    """Return whether a qualified name or its end matches a shell pattern, or the full name a `re:` expression.

    Raises:
        TargetError: the regular expression is invalid.

    Example:
        >>> matches("model.layers.3.q_proj", "q_proj"), matches("model.layers.3.q_proj", "layers")
        (True, False)
    """
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise TargetError(f"{pattern!r} is not a valid regular expression: {error}") from error
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
