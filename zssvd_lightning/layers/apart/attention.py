"""Attention of torch with a linear layer for each of its matrices, instead of parameters that it reads itself.

`nn.MultiheadAttention` keeps the matrices for queries, keys and values in one parameter, or in three if keys or values
have another width, and reads the weight of `out_proj` without calling it. `ProjectedAttention` computes the same with
four linear layers.

Shapes: B sequences of L queries and S keys; E features in H heads of h. Imports only torch and transformers, so that a
saved folder can contain a copy of this file.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from zssvd_lightning.layers.base import take_after, take_over, type_of

READING = ("q_proj", "k_proj", "v_proj")
"""Names of the linear layers that read queries, keys and values."""

WRITING = "out_proj"
"""Name of the linear layer that writes the output."""

PACKED = "in_proj_weight"
"""Name of the parameter that stacks the three matrices, if their inputs have the same width."""

BIASES = "in_proj_bias"
"""Name of the parameter that stacks the three biases."""

EXTRA = ("bias_k", "bias_v")
"""Names of a key and a value that are added to every sequence."""

NESTED = "_nests_when_whole"
"""Attribute of an encoder that makes nested tensors if no attention in it is a `ProjectedAttention`."""


class ProjectedAttention(nn.Module):
    """Attention with four linear layers, in place of an `nn.MultiheadAttention`.

    It has the signature, settings and hooks of the replaced module and computes the same, but always by separate
    products: torch's fused kernels for evaluation read dense weights.

    Args:
        old: the attention; see `fault_of`. The linear layers share its memory, and `out_proj` its parameters.

    Attributes:
        q_proj: linear layer with weight (E, E), or the compressed layer in its place.
        k_proj: the same with weight (E, kdim).
        v_proj: the same with weight (E, vdim).
        out_proj: the same with weight (E, E).

    Example:
        >>> x = torch.randn(2, 5, 8)
        >>> output, weights = ProjectedAttention(nn.MultiheadAttention(8, 2, batch_first=True))(x, x, x)
        >>> output.shape, weights.shape
        (torch.Size([2, 5, 8]), torch.Size([2, 5, 5]))
    """

    embed_dim: int
    kdim: int
    vdim: int
    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    bias_k: Tensor | None
    bias_v: Tensor | None

    def __init__(self, old: nn.MultiheadAttention) -> None:
        super().__init__()
        take_over(self, old)
        self._qkv_same_embed_dim = False  # so that layers of torch do not use their fused kernels
        for name in EXTRA:
            if isinstance(value := getattr(old, name), nn.Parameter):
                self.register_parameter(name, value)
        for name, W, bias in zip(READING, _matrices(old), _biases(old), strict=True):
            self.add_module(name, _layer_of(W, bias).train(old.training))
        last = nn.Linear(old.embed_dim, old.embed_dim, bias=False, device="meta")
        last.weight, last.bias = old.out_proj.weight, old.out_proj.bias
        self.add_module(WRITING, last.train(old.out_proj.training))

    @property
    def in_proj_weight(self) -> Tensor | None:
        """Matrices of queries, keys and values (3 E, E), computed at each access; None if their widths differ."""
        return torch.cat([self._layer(name).weight for name in READING]) if self.is_packed else None

    @property
    def q_proj_weight(self) -> Tensor | None:
        """Matrix of the queries (E, E); None if it is in `in_proj_weight`."""
        return None if self.is_packed else self._layer("q_proj").weight

    @property
    def k_proj_weight(self) -> Tensor | None:
        """Matrix of the keys (E, kdim); None if it is in `in_proj_weight`."""
        return None if self.is_packed else self._layer("k_proj").weight

    @property
    def v_proj_weight(self) -> Tensor | None:
        """Matrix of the values (E, vdim); None if it is in `in_proj_weight`."""
        return None if self.is_packed else self._layer("v_proj").weight

    @property
    def in_proj_bias(self) -> Tensor | None:
        """Biases of queries, keys and values (3 E,), or None."""
        biases = [self._layer(name).bias for name in READING]
        return None if biases[0] is None else torch.cat(biases)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return output and attention weights as `nn.MultiheadAttention.forward` does, for the same arguments.

        Raises:
            ValueError: a mask has another shape than the sequences, or nested tensors come with masks, as keys of other
                queries, or without `batch_first`.
            TypeError: a mask is neither boolean nor of a floating-point type.
            RuntimeError: `is_causal` is set without `attn_mask`.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal only says that attn_mask is causal, so attn_mask must be given too")
        if query.is_nested or key.is_nested or value.is_nested:
            if not self.batch_first or query is not key or key is not value or attn_mask is not None:
                raise ValueError("nested tensors need batch_first, one tensor for all three inputs, and no masks")
            if key_padding_mask is not None:
                raise ValueError("nested tensors show their lengths, so key_padding_mask must not be given")
            return self._on_nested(query, need_weights, average_attn_weights)
        batched, turned = query.dim() == 3, not self.batch_first
        if batched and turned:
            query, key, value = _turned(query, key, value)
        layers: list[Any] = [self._layer(name) for name in READING]
        q, k, v = (layer(x) for layer, x in zip(layers, (query, key, value), strict=True))
        if not batched:
            q, k, v = q[None], k[None], v[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = self._mask(q, k, query.dtype, None if causal else attn_mask, key_padding_mask)
        k, v = self._with_added(k, self.bias_k), self._with_added(v, self.bias_v)
        y, weights = self._attention(q, k, v, mask, need_weights, causal)
        output: Tensor = self._layer(WRITING)(y if batched else y[0])
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        return output.transpose(0, 1) if batched and turned else output, weights

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool, causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the outputs of all heads side by side (B, L, E), and the weights (B, H, L, S) if they are needed."""
        q, k, v = (each.reshape(*each.shape[:2], self.num_heads, -1).transpose(1, 2) for each in (q, k, v))
        dropout, weights = self.dropout if self.training else 0.0, None
        if need_weights:
            scores = (q * math.sqrt(1 / self.head_dim)) @ k.transpose(2, 3)
            weights = functional.softmax(scores if mask is None else scores + mask.to(scores.dtype), -1)
            weights = functional.dropout(weights, dropout) if dropout else weights
            y = weights @ v
        else:
            y = functional.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        return y.transpose(1, 2).flatten(2), weights

    def _mask(
        self, q: Tensor, k: Tensor, dtype: torch.dtype, attn_mask: Tensor | None, key_padding_mask: Tensor | None
    ) -> Tensor | None:
        """Return what is added to the scores, of a shape that expands to (B, H, L, S); None for nothing."""
        (B, L), S, H, mask = q.shape[:2], k.shape[1], self.num_heads, None
        if attn_mask is not None:
            if tuple(attn_mask.shape) not in ((L, S), (B * H, L, S)):
                raise ValueError(f"attn_mask is {tuple(attn_mask.shape)}, but must be {(L, S)} or {(B * H, L, S)}")
            mask = _to_add(attn_mask, dtype).view((1, 1, L, S) if attn_mask.dim() == 2 else (B, H, L, S))
        if key_padding_mask is not None:
            if tuple(key_padding_mask.shape) != (B, S):
                raise ValueError(f"key_padding_mask is {tuple(key_padding_mask.shape)}, but must be {(B, S)}")
            padding = _to_add(key_padding_mask, dtype).view(B, 1, 1, S)
            mask = padding if mask is None else mask + padding
        added = (self.bias_k is not None) + self.add_zero_attn
        return functional.pad(mask, (0, added)) if mask is not None and added else mask

    def _with_added(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return keys or values (B, S, E) with those that the settings add to every sequence."""
        if bias is not None:
            x = torch.cat([x, bias.to(x.dtype).expand(len(x), 1, -1)], 1)
        return functional.pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x

    def _on_nested(self, x: Tensor, need_weights: bool, average: bool) -> tuple[Tensor, Tensor | None]:
        """Return the output for a nested tensor of sequences (l, E), as one of the same lengths."""
        lengths = [len(part) for part in x.unbind()]
        padded = x.to_padded_tensor(0.0)
        padding = torch.arange(padded.shape[1], device=x.device) >= torch.tensor(lengths, device=x.device)[:, None]
        y, weights = self.forward(padded, padded, padded, padding, need_weights, average_attn_weights=average)
        rows = [row[:length] for row, length in zip(y, lengths, strict=True)]
        return torch.nested.as_nested_tensor(rows, layout=x.layout), weights

    @torch.no_grad()
    def packed(self, old: nn.Module | None = None) -> nn.Module:
        """Return an `nn.MultiheadAttention` with the present weights. All matrices must be dense.

        Args:
            old: the attention that was replaced, which then gets the weights; None to create one.
        """
        made = self.empty() if old is None else old
        new: Any = made
        for name, W, bias in zip(READING, _matrices(new), _biases(new), strict=True):
            _write(self._layer(name), W, bias)
        _write(self._layer(WRITING), new.out_proj.weight, new.out_proj.bias)
        return made

    def empty(self) -> nn.MultiheadAttention:
        """Return an `nn.MultiheadAttention` of the same settings, whose matrices and biases have no values."""
        first, last, extra = self._layer("q_proj"), self._layer(WRITING), self.bias_k is not None
        sizes: dict[str, Any] = {"kdim": self.kdim, "vdim": self.vdim, "device": "meta", "dtype": type_of(first)}
        biased = first.bias is not None
        new = nn.MultiheadAttention(self.embed_dim, self.num_heads, bias=biased, add_bias_kv=extra, **sizes)
        new.to_empty(device=next(first.parameters()).device)
        take_after(new, first)
        take_after(new.out_proj, last)
        take_over(new, self, leave_out=("_qkv_same_embed_dim",))
        for name in EXTRA:
            setattr(new, name, getattr(self, name))
        if last.bias is None:
            new.out_proj.register_parameter("bias", None)
        return new

    @property
    def is_packed(self) -> bool:
        """True if the replaced module has one parameter for the matrices of queries, keys and values."""
        return self.embed_dim == self.kdim == self.vdim

    def _layer(self, name: str) -> Any:
        return self._modules[name]


def fault_of(module: nn.Module) -> str | None:
    """Return why an attention cannot be a `ProjectedAttention`; None if it can."""
    own: Any = module
    if type(module) is not nn.MultiheadAttention or "forward" in vars(module):
        return f"{type(module).__name__} may compute something else than nn.MultiheadAttention"
    found = {name for name, value in module._parameters.items() if value is not None}  # noqa: SLF001
    matrices = {PACKED} if own.embed_dim == own.kdim == own.vdim else {f"{name}_weight" for name in READING}
    if found - {BIASES, *EXTRA} != matrices or type(own.out_proj) is not NonDynamicallyQuantizableLinear:
        return "its parameters are not those that nn.MultiheadAttention makes"
    return None


def project(model: nn.Module, names: Iterable[str]) -> None:
    """Replace attentions in which layers of these names would be by modules of linear layers, in place, everywhere."""
    wanted, made = set(names), dict[int, ProjectedAttention]()
    for name, module in model.named_modules():
        asked = any(f"{name}.{part}" in wanted for part in (*READING, WRITING))
        if asked and isinstance(module, nn.MultiheadAttention) and fault_of(module) is None:
            made[id(module)] = ProjectedAttention(module)
    for parent in list(model.modules()):
        for leaf, module in list(parent._modules.items()):  # noqa: SLF001  named_children leaves out repeated ones
            if id(module) in made:
                setattr(parent, leaf, made[id(module)])
    settle_encoders(model)


def projected(model: nn.Module) -> Iterator[tuple[str, ProjectedAttention]]:
    """Yield the name and module of every attention that has linear layers."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, ProjectedAttention))


def settle_encoders(model: nn.Module) -> None:
    """Keep encoders of torch from making nested tensors while an attention in them has linear layers.

    They make nested tensors for their fused kernels, which read dense weights. When all attentions are whole again, the
    setting is as before.
    """
    for encoder in model.modules():
        if not isinstance(encoder, nn.TransformerEncoder):
            continue
        own: Any = encoder
        if next(projected(encoder), None) is None:
            if vars(encoder).pop(NESTED, False):
                own.use_nested_tensor = True
        elif vars(encoder).get("use_nested_tensor", False):
            own.use_nested_tensor = False
            setattr(encoder, NESTED, True)


def _layer_of(W: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear layer that shares the memory of one matrix and bias."""
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(W.detach(), requires_grad=W.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
    return layer


def _matrices(attention: Any) -> list[Tensor]:
    """Return the matrices of queries, keys and values, as views of the parameters of an `nn.MultiheadAttention`."""
    if attention.in_proj_weight is not None:
        return list(attention.in_proj_weight.chunk(3))
    return [getattr(attention, f"{name}_weight") for name in READING]


def _biases(attention: Any) -> list[Tensor | None]:
    return [None] * 3 if attention.in_proj_bias is None else list(attention.in_proj_bias.chunk(3))


def _write(layer: Any, W: Tensor, bias: Tensor | None) -> None:
    """Write the weight and bias of a layer where they are not yet."""
    for value, place in ((layer.weight, W), (layer.bias, bias)):
        if place is not None and value.data_ptr() != place.data_ptr():
            place.copy_(value)


def _turned(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the inputs (T, B, n) as (B, T, n). Those that are one tensor stay one."""
    q = query.transpose(0, 1)
    k = q if key is query else key.transpose(0, 1)
    v = q if value is query else k if value is key else value.transpose(0, 1)
    return q, k, v


def _to_add(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as numbers to add to scores: minus infinity where a boolean mask is True."""
    if mask.dtype is torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    if not mask.is_floating_point():
        raise TypeError(f"a mask is {mask.dtype}, but must be torch.bool or of a floating-point type")
    return mask
