"""One model at one workload: a prefill, and decode steps on the cache that it fills.

Shapes: token ids are (batch, context + tokens), images (batch, channels, height, width).
"""

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from zssvd_lightning.app.bench.counts import bytes_read, cache_bytes, flops_of
from zssvd_lightning.app.bench.memory import PeakMemory
from zssvd_lightning.app.bench.settings import Workload
from zssvd_lightning.errors import ModelSourceError
from zssvd_lightning.model.dense_copy import free_bytes

PREFILL, DECODE = "prefill", "decode"
"""Phases of a round."""

PROBE = 4
"""Tokens of the forward pass that shows what a model can do."""


@dataclass(frozen=True)
class Abilities:
    """Inputs and abilities of a model."""

    images: bool
    """True if inputs are images, not tokens."""
    no_decode: str | None
    """Reason why there are no decode steps; None if there are."""
    static: bool
    """True if the model runs on a `StaticCache`, which CUDA graphs need."""
    cache_per_token: int
    """Bytes of cache for each token, at most; less where a window slides."""
    last_logits: bool
    """True if the model can leave out all logits but the last ones, as generation does in the prefill."""


class Session:
    """Repeated run of one model at one workload, each time from an empty cache.

    The cache is a `DynamicCache`, as in `generate`. On CUDA and with `torch.compile` it is a `StaticCache`, whose
    tensors stay in place. A decode step on CUDA is the replay of a CUDA graph, because the launches of kernels take
    longer than the kernels of a single token.

    Args:
        model: model in evaluation mode.
        abilities: result of `abilities_of` for this model.
        work: what to run.
        compiled: whether to run what `torch.compile` makes of the model.

    Attributes:
        flops: floating-point operations of a prefill, and of the first decode step, by phase.
        bytes: bytes of weights and cache that a pass reads, by phase.
        risen: bytes of memory above the weights that a round takes; None where the system does not tell.
    """

    def __init__(self, model: PreTrainedModel, abilities: Abilities, work: Workload, *, compiled: bool = False) -> None:
        self.model, self.abilities, self.work, self.compiled = model, abilities, work, compiled
        self.device = model.device
        self.flops: dict[str, int] = {}
        self.bytes: dict[str, int] = {}
        self.risen: int | None = None
        cuda = self.device.type == "cuda"
        self._static = self.decodes and abilities.static and (cuda or compiled)
        self._graphed = self._static and cuda and not compiled
        self._graph: torch.cuda.CUDAGraph | None = None
        self._prefill: Callable[..., Any] = model
        self._step: Callable[..., Any] = model
        self._cache: Any = None
        self._inputs = _images(model, work) if abilities.images else _tokens(model, work)
        self._token = self._inputs[:, :1].clone()  # read by the graph, at this address

    @property
    def decodes(self) -> bool:
        """True if a round has decode steps."""
        return self.abilities.no_decode is None

    @property
    def how(self) -> str:
        """Mode in which decode steps run, as text for the results."""
        if not self.decodes:
            return "none"
        if self.compiled:
            return "torch.compile" + (" with CUDA graphs" if self.device.type == "cuda" else "")
        return "CUDA graph" if self._graphed else "eager"

    def too_large(self) -> str | None:
        """Return why the device has too little memory, as far as can be said before a run; None if it has enough."""
        batch, context, tokens = self.work
        needed = 0 if self.abilities.images else self.abilities.cache_per_token * batch * (context + tokens)
        if not self.abilities.images and not self.abilities.last_logits:
            needed += batch * context * _vocabulary(self.model) * self.model.dtype.itemsize
        free = free_bytes(self.device)
        if needed <= free:
            return None
        return f"cache and logits take {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on {self.device}"

    @torch.no_grad()
    def prepare(self) -> None:
        """Count, warm up, and compile or record what is to be measured. Run once, before the first round."""
        with PeakMemory(self.device) as memory:
            self._empty_cache()
            self.flops[PREFILL] = flops_of(self._run_prefill)
            read = bytes_read(self.model)
            self.bytes[PREFILL] = read
            if self.decodes:
                self.bytes[DECODE] = read + cache_bytes(self._cache)
                self.flops[DECODE] = flops_of(lambda: self._forward(self.model, self._token))
                if self._graphed:
                    self._record()
            if self.compiled:
                mode = "reduce-overhead" if self.device.type == "cuda" else None
                self._prefill = torch.compile(self.model, dynamic=False)
                self._step = torch.compile(self.model, dynamic=False, mode=mode)
            self.round()
        self.risen = memory.risen

    @torch.no_grad()
    def round(self) -> dict[str, float]:
        """Run a prefill and all decode steps from an empty cache. Return the seconds of each phase."""
        self._empty_cache()
        seconds = {PREFILL: self._timed(self._run_prefill)}
        if self.decodes:
            seconds[DECODE] = self._timed(self._run_steps)
        if not self._static:
            self._cache = None
        return seconds

    def close(self) -> None:
        """Release cache and graph."""
        self._cache = self._graph = None

    def _run_prefill(self) -> None:
        self._forward(self._prefill, self._inputs[:, : self.work.context or None])

    def _run_steps(self) -> None:
        for position in range(self.work.context, self.work.context + self.work.tokens):
            token = self._inputs[:, position : position + 1]
            if self._graph is not None:
                self._token.copy_(token)
                self._graph.replay()
            else:
                if self.compiled and self.device.type == "cuda":
                    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
                self._forward(self._step, token)

    def _forward(self, function: Callable[..., Any], inputs: Tensor) -> None:
        options: dict[str, Any] = {}
        if self.decodes:
            options |= {"past_key_values": self._cache, "use_cache": True}
        if self.abilities.last_logits:
            options["logits_to_keep"] = 1
        function(**{self.model.main_input_name: inputs}, **options)

    def _empty_cache(self) -> None:
        if not self.decodes:
            return
        if not self._static:
            self._cache = DynamicCache(config=self.model.config)
        elif self._cache is None:
            most = self.work.context + self.work.tokens
            self._cache = StaticCache(config=self.model.config, max_cache_len=most)
        else:
            self._cache.reset()

    def _record(self) -> None:
        """Record a decode step at the full context as a CUDA graph. Replays advance the position, as it is a tensor."""
        with torch.cuda.device(self.device):
            self._empty_cache()
            self._run_prefill()
            aside: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # kernels are loaded before they are recorded
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                self._forward(self.model, self._token)
            torch.cuda.current_stream().wait_stream(aside)
            self._empty_cache()
            self._run_prefill()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._forward(self.model, self._token)
            self._graph = graph

    def _timed(self, function: Callable[[], None]) -> float:
        self._wait()
        start = time.perf_counter()
        function()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        """Wait for the device, which works after its calls have returned."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@torch.no_grad()
def abilities_of(model: PreTrainedModel) -> Abilities:
    """Return the inputs and abilities of a model, found by a forward pass of one short row.

    Raises:
        ModelSourceError: the model is not measured: it has an encoder and a decoder, or its inputs are neither tokens
            nor images.
    """
    kind, main = type(model).__name__, model.main_input_name
    if model.config.is_encoder_decoder or main not in {"input_ids", "pixel_values"}:
        what = "an encoder and a decoder" if model.config.is_encoder_decoder else f"inputs of the kind {main}"
        raise ModelSourceError(
            f"{kind} has {what}; only decoders, encoders of tokens and encoders of images are measured"
        )
    takes = inspect.signature(model.forward).parameters
    last_logits = "logits_to_keep" in takes
    reason: str | None = None
    cache: Any = None
    if main == "pixel_values":
        reason = f"{kind} reads images"
    elif not model.can_generate():
        reason = f"{kind} does not generate"
    elif "past_key_values" not in takes:
        reason = f"{kind} takes no cache of keys and values"
    else:
        cache = DynamicCache(config=model.config)
    options = {} if cache is None else {"past_key_values": cache, "use_cache": True}
    work = Workload(1, 0 if main == "pixel_values" else PROBE, 0)
    try:
        model(**{main: _images(model, work) if main == "pixel_values" else _tokens(model, work)}, **options)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise ModelSourceError(f"{kind} does not run on {main} alone: {error}") from error
    if cache is not None and int(cache.get_seq_length()) != PROBE:
        reason, cache = f"{kind} fills no cache", None
    return Abilities(
        images=main == "pixel_values",
        no_decode=reason,
        static=bool(getattr(model, "_can_compile_fullgraph", False)),
        cache_per_token=0 if cache is None else -(-cache_bytes(cache) // PROBE),
        last_logits=last_logits,
    )


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config(decoder=True).vocab_size)


def _tokens(model: PreTrainedModel, work: Workload) -> Tensor:
    """Return random token ids, always the same for the same size."""
    size = (work.batch, work.context + work.tokens)
    return torch.randint(_vocabulary(model), size, generator=torch.Generator().manual_seed(0)).to(model.device)


def _images(model: PreTrainedModel, work: Workload) -> Tensor:
    """Return random images of the size that the config names."""
    config = getattr(model.config, "vision_config", model.config)
    channels, size = getattr(config, "num_channels", None), getattr(config, "image_size", None)
    if channels is None or size is None:
        raise ModelSourceError(f"the config of {type(model).__name__} names no num_channels and image_size")
    height, width = (size, size) if isinstance(size, int) else size
    values = torch.randn(work.batch, channels, height, width, generator=torch.Generator().manual_seed(0))
    return values.to(model.device, model.dtype)
