"""Selection of the layers to factorize: linear layers by type and name, with a reason for each one excluded."""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from zssvd_lightning._validation import closest
from zssvd_lightning.errors import TargetError
from zssvd_lightning.layers.apart.convolutions import KERNELS
from zssvd_lightning.layers.apart.grouped import GROUPS
from zssvd_lightning.layers.base import shape_of
from zssvd_lightning.layers.storage import break_even_rank
from zssvd_lightning.model.apart.convolutions import CONVOLUTION, CONVOLUTIONS
from zssvd_lightning.model.apart.grouped import GROUPED_CONVOLUTIONS
from zssvd_lightning.model.apart.kind import why_whole
from zssvd_lightning.model.apart.kinds import all_matrices, convolutions_whole, matrices_of, not_asked
from zssvd_lightning.model.apart.recurrent import RECURRENCES
from zssvd_lightning.model.heads import classification_heads, output_embeddings
from zssvd_lightning.model.linear_subclasses import is_plain_linear
from zssvd_lightning.model.peft_layers import MERGE_FIRST, linear_layers_in_peft
from zssvd_lightning.model.readiness import is_quantized, refuse_uninitialized
from zssvd_lightning.model.replace import inside_compressed
from zssvd_lightning.offload.mapped_weights import WeightFile

Patterns = Sequence[str] | str | None
"""Name patterns, or a single one; None for none."""

OUTPUT_EMBEDDING = "it is the output embedding, where every token's logit needs its own row at full rank"
"""Why an output embedding is no target."""

INSIDE_ATTENTION = "it belongs to an nn.MultiheadAttention, which has not been taken apart"
"""Why the output projection of an attention is no target."""

CLASSIFICATION_HEAD = "its outputs are the model's logits; name it in include, without wildcards, to factorize it"
"""Why a classification head is no target."""


MATRIX = re.compile(rf"(\.{GROUPS}\.\d+)?\.{KERNELS}$")
"""End of the name of the matrix of a convolution or of one of its groups, behind the name of the convolution."""

NUMBERED = re.compile(r"(?:(.*?)\.)?(\d+)(?:\.(.*))?", re.DOTALL)


class Place(NamedTuple):
    """Place of a layer in its model, by its name."""

    stack: str
    """Name before the first number, such as `model.layers`; empty if there is none."""
    block: int | None
    """First number."""
    kind: str
    """Name behind the first number, with `*` for further numbers, such as those of experts."""

    @classmethod
    def of(cls, name: str) -> "Place":
        """Return the place of a layer.

        Example:
            >>> Place.of("model.layers.3.mlp.experts.17.up_proj")
            Place(stack='model.layers', block=3, kind='mlp.experts.*.up_proj')
        """
        found = NUMBERED.fullmatch(name)
        if found is None:
            return cls("", None, name)
        stack, block, rest = found.groups()
        return cls(stack or "", int(block), re.sub(r"(?<![^.])\d+(?![^.])", "*", rest or "matrix"))


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, as a plain tensor that shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Target:
    """Linear layer to factorize, as `y = W x + b` regardless of how it stores W."""

    name: str
    """Qualified name in the model."""
    module: nn.Linear | Conv1D
    file: WeightFile | None = field(default=None, compare=False)
    """Scratch file for what is assigned; None to overwrite the weight in memory."""

    @property
    def weight(self) -> Tensor:
        """W (m, n), or this process's part of it. A view: writing to it writes to the model."""
        return self.oriented(local_part(self.module.weight.detach()))

    @property
    def gradient(self) -> Tensor | None:
        """Gradient dL/dW of this process's part of W, as set by autograd, or None."""
        gradient = self.module.weight.grad
        return None if gradient is None else self.oriented(local_part(gradient))

    def leave_gradient(self, gradient: Tensor) -> None:
        """Store a copy of dL/dW for this process's part of W in the `grad` attribute of the weight."""
        weight = self.module.weight
        stored = self.oriented(gradient).to(weight.device, weight.dtype, copy=True).contiguous()
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
        """Overwrite the weight in place with W (m, n) or this process's part of it, cast to the weight's type.

        With a scratch file, the weight becomes that in the file.
        """
        weight = self.module.weight
        if self.file is not None:
            weight.data = self.file.put(self.name, self.oriented(W).to(weight.dtype))
            return
        if not any(weight.stride()):  # released
            weight.data = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        self.weight.copy_(W)

    def release(self) -> None:
        """Free the memory of the weight until `assign`, for a layer that another one has replaced."""
        weight = self.module.weight
        weight.data = weight.new_zeros(()).expand(weight.shape)

    def put_back(self, stored: Tensor) -> None:
        """Set the weight to a tensor that was its `data` before `assign`, in place of that in the scratch file."""
        self.module.weight.data = stored

    def oriented(self, stored: Tensor) -> Tensor:
        """Return W (m, n), given the weight as the module stores it, or the other way round. A view."""
        return stored.T if isinstance(self.module, Conv1D) else stored


def find_targets(
    model: nn.Module, include: Patterns = None, ignore: Patterns = None, opted: Collection[str] | None = None
) -> dict[str, Target]:
    """Return the layers of `model` to factorize, by qualified name in module order.

    `nn.Linear`, transformers' `Conv1D` and subclasses that compute the same are candidates; see `is_plain_linear`. So
    are the matrices of convolutions that are unfolded, and the layers of experts and attentions in parts.
    Excluded are output embeddings, classification heads (unless `include` names one without wildcards), tied weights,
    other subclasses, weights that are not floating point, layers given to `fully_shard` on their own, factors of an
    earlier compression (see `recompression.StandIns`), and layers where even rank 1 saves no parameter.

    Args:
        model: any module.
        include: shell patterns that match qualified names or their ends (`q_proj`, `model.layers.3.*`), or `re:`
            followed by a regular expression that matches full names. None includes all.
        ignore: patterns of the same form. They take precedence over `include`.
        opted: settings, such as `convolutions`, without which layers of some modules in parts are no targets; None for
            all.

    Raises:
        TargetError: no layer is left, a chosen layer is quantized or has an adapter of PEFT, a pattern matches no
            module, a pattern of `include` matches only layers that cannot be factorized (the message says why), or
            weights have no shape yet.
    """
    refuse_uninitialized(model)
    include = [include] if isinstance(include, str) else include
    ignore = [ignore] if isinstance(ignore, str) else ignore
    names = [name for name, _ in model.named_modules() if name]
    names += all_matrices(model)
    for pattern in [*(include or ()), *(ignore or ())]:
        if not any(matches(name, pattern) for name in names):
            raise TargetError(f"pattern {pattern!r} matches no module{closest(pattern, names) if names else ''}")

    refuse_adapted(model, include, ignore)
    refused = refusals(model, include)
    left = {} if opted is None else not_asked(model, opted)
    names_left = {name: left[id(module)] for name, module in model.named_modules() if id(module) in left}
    refused |= {name: f"it is a target only if {setting} is True" for name, setting in names_left.items()}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    allowed = {n: Target(n, m) for n, m in linears.items() if n not in refused}
    for pattern in include or ():
        _explain_if_refused(pattern, model, set(allowed), refused)
    chosen = {name: module for name, module in linears.items() if is_selected(name, include, ignore)}
    _refuse_quantized(chosen)
    targets = {name: target for name, target in allowed.items() if name in chosen}
    if not targets:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:5])
        raise TargetError(
            f"no layer to compress: {len(linears)} linear layers, of which {len(refused)} cannot be factorized"
            + (f" ({reasons})" if reasons else "")
            + f"; include={include}, ignore={ignore}"
        )
    return targets


def is_selected(name: str, include: Patterns, ignore: Patterns) -> bool:
    """Return whether `include` and `ignore` select the layer `name`. Raises TargetError for invalid patterns.

    The matrices of a convolution go by the name of the convolution too.
    """
    include = [include] if isinstance(include, str) else include
    ignore = [ignore] if isinstance(ignore, str) else ignore
    names = {name, MATRIX.sub("", name)}
    included = include is None or any(matches(each, pattern) for pattern in include for each in names)
    return included and not any(matches(each, pattern) for pattern in ignore or () for each in names)


def refuse_adapted(model: nn.Module, include: Patterns = None, ignore: Patterns = None) -> None:
    """Raise TargetError if a selected layer has an adapter of PEFT, or is a copy that PEFT trains."""
    for outer, name, layer in linear_layers_in_peft(model):
        included = any(is_selected(place, include, ignore) for place in (outer, name))
        if included and is_selected(outer, None, ignore):
            raise TargetError(
                f"{name} ({type(layer).__name__}) belongs to an adapter layer of PEFT, {outer}: {MERGE_FIRST}; or add "
                f"{outer} to ignore"
            )


def _refuse_quantized(linears: Mapping[str, nn.Module]) -> None:
    """Raise TargetError if the weights of layers hold codes of an earlier quantization."""
    quantized = {name: module for name, module in linears.items() if is_quantized(module)}
    for name, module in quantized.items():
        weight = module.weight
        others = f" and {len(quantized) - 1} other layers" if len(quantized) > 1 else ""
        raise TargetError(
            f"{name}{others} have quantized weights ({type(weight).__name__}, {weight.dtype}), which cannot be "
            "factorized; load the model in floating point, compress it, and quantize it afterward, or leave these "
            "layers out with ignore"
        )


def refusals(model: nn.Module, include: Sequence[str] | None = None) -> dict[str, str]:
    """Return the linear layers that cannot be factorized, by name, each with the reason.

    Args:
        model: any module.
        include: patterns of the layers to factorize; None for all.
    """
    return dict(_refusals(model, [pattern for pattern in include or () if not _is_wild(pattern)]))


def _refusals(model: nn.Module, named: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the name of every linear layer that cannot be factorized, with the reason, unless `named` names a head."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    heads = _heads(model, named)
    no_targets = dict.fromkeys(inside_compressed(model), "it is a factor of a layer that is low-rank already")
    no_targets |= {id(m.out_proj): INSIDE_ATTENTION for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    no_targets |= {id(layer): MERGE_FIRST for _, _, layer in linear_layers_in_peft(model)}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if id(module) in no_targets:
            yield name, no_targets[id(module)]
        elif isinstance(module, FSDPModule):
            yield name, "it was given to fully_shard on its own; give the block around it instead"
        elif weight is None or not is_plain_linear(module):
            yield name, f"{type(module).__name__} does not compute W x + b from a plain weight parameter"
        elif not weight.is_floating_point():
            yield name, f"its weight is {weight.dtype}, not floating point"
        elif owners[id(weight)] > 1:
            yield name, "its weight is tied to another module's, and factorizing one would untie them"
        elif name in heads:
            yield name, heads[name]
        elif break_even_rank(*Target(name, module).shape) < 1:
            yield name, f"at shape {tuple(weight.shape)} even rank 1 would not save a parameter"


def _heads(model: nn.Module, named: Sequence[str]) -> dict[str, str]:
    """Return the output heads of a model by name, each with the reason why it is no target, unless `named` names it."""
    vocabulary, classes = output_embeddings(model), classification_heads(model)
    heads = {}
    for name, module in model.named_modules():
        if id(module) in vocabulary:
            heads[name] = OUTPUT_EMBEDDING
        elif id(module) in classes and not (named and is_selected(name, named, None)):
            heads[name] = CLASSIFICATION_HEAD
    return heads


def _explain_if_refused(pattern: str, model: nn.Module, allowed: set[str], refused: dict[str, str]) -> None:
    """Raise TargetError if `pattern` matches no allowed layer."""
    modules = dict(model.named_modules())
    for each in (CONVOLUTIONS, GROUPED_CONVOLUTIONS):
        modules |= matrices_of(each, model)
    matched = [(n, m) for n, m in modules.items() if n and is_selected(n, [pattern], None)]
    if any(name in allowed for name, _ in matched):
        return
    for name, module in all_matrices(model).items():
        if matches(name, pattern) and not isinstance(module, CONVOLUTION):
            raise TargetError(
                f"{name} is a part of the parameters of {type(module).__name__}, and is only factorized where "
                "they can be taken apart (the log says why not); take it out of include"
            )
    for name, _ in matched:
        if name in refused:
            advice = "" if refused[name] == CLASSIFICATION_HEAD else "; take it out of include"
            raise TargetError(f"{name} cannot be factorized: {refused[name]}{advice}")
    name, module = matched[0]
    kind = "only nn.Linear and transformers' Conv1D layers are"
    if isinstance(module, nn.Embedding):
        kind = "an embedding is a table lookup, not a product with W"
    elif isinstance(module, CONVOLUTION):
        kind = convolutions_whole(model).get(name, "convolutions are targets only if convolutions is True")
    elif isinstance(module, nn.RNNBase):
        kind = why_whole(RECURRENCES, model).get(name, "recurrent modules are targets only if recurrent is True")
    raise TargetError(f"{name} ({type(module).__name__}) cannot be factorized: {kind}; take {pattern!r} out of include")


def _is_wild(pattern: str) -> bool:
    """Return whether a pattern may match several names."""
    return pattern.startswith("re:") or any(character in pattern for character in "*?[")


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
