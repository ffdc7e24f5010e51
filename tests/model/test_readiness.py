"""Models that cannot be compressed where they are, refused at the start of `compress` and of `fit`."""

import accelerate
import pytest
import torch
from support.models import CausalLM, assert_same_state, loader, state_of, tiny_llama, token_batches, trainer
from torch import nn

from zssvd_lightning import ZSSVDCallback, compress
from zssvd_lightning.compression.pipeline import calibrate, plan
from zssvd_lightning.errors import BudgetError, CalibrationError, TargetError
from zssvd_lightning.model.targets import find_targets

LAYER = "model.layers.0.mlp.up_proj"


class Packed(nn.Parameter):
    """Weight of another shape in a type of its own, as quantizing libraries have it."""


class Coded(torch.Tensor):
    """Tensor of float type that holds codes."""

    @staticmethod
    def __new__(cls, codes):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes):
        self.codes = codes

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes)
        raise NotImplementedError(function)


class Linear4bit(nn.Linear):
    """Layer with codes in place of a weight, as bitsandbytes has it."""


def with_weight(weight, layer=LAYER):
    model = tiny_llama()
    model.get_submodule(layer).weight = nn.Parameter(weight, requires_grad=False)
    return model


def packed_in_layer():
    model = tiny_llama()
    linear = Linear4bit(32, 48, bias=False)
    linear.weight = nn.Parameter(torch.zeros(768, 1, dtype=torch.uint8), requires_grad=False)
    model.model.layers[0].mlp.up_proj = linear
    return model


def packed():
    model = tiny_llama()
    linear = model.get_submodule(LAYER)
    del linear.weight
    linear.weight = Packed(torch.randn(384, 1, dtype=torch.bfloat16))
    return model


def on_meta():
    with torch.device("meta"):
        return tiny_llama()


def offloaded():
    return accelerate.cpu_offload(tiny_llama(), execution_device=torch.device("cpu"))


def half_offloaded():
    model = tiny_llama()
    accelerate.cpu_offload(model.model.layers[1], execution_device=torch.device("cpu"))
    return model


def made_in_inference_mode():
    with torch.inference_mode():
        return tiny_llama()


def with_an_inference_buffer():
    model = tiny_llama()
    with torch.inference_mode():
        model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.clone()
    return model


def lazy():
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj = nn.LazyLinear(48)
    return model


UNREADY = {
    "meta": (on_meta, "is on the meta device, so it has no values; load the weights first"),
    "offloaded": (offloaded, "is offloaded to the memory of the CPU or to disk.* without device_map"),
    "half offloaded": (half_offloaded, r"model\.layers\.1\..* is offloaded"),
    "inference": (made_in_inference_mode, r"was made in torch\.inference_mode.* clone"),
    "inference buffer": (with_an_inference_buffer, r"inv_freq was made in torch\.inference_mode"),
    "lazy": (lazy, r"up_proj\.weight has no shape yet; run one batch through"),
    "int8": (lambda: with_weight(torch.zeros(48, 32, dtype=torch.int8)), rf"{LAYER} have quantized weights"),
    "float8": (
        lambda: with_weight(torch.zeros(48, 32, dtype=torch.float8_e4m3fn)),
        rf"{LAYER} have quantized weights \(Parameter, torch.float8_e4m3fn\)",
    ),
    "tensor of its own": (lambda: with_weight(Coded(torch.zeros(48, 32, dtype=torch.int8))), r"weights \(Coded, "),
    "parameter of its own": (packed, r"weights \(Packed, .* load the model in floating point"),
    "layer of its own": (packed_in_layer, r"weights \(Parameter, torch\.uint8\)"),
}


@pytest.mark.parametrize("case", UNREADY)
@pytest.mark.parametrize("function", [compress, calibrate, plan])
def test_a_model_that_is_not_ready_is_refused_before_the_first_batch(case, function):
    build, message = UNREADY[case]
    model = build()
    kinds = [type(module) for module in model.modules()]

    def batches():
        raise AssertionError
        yield

    with pytest.raises(TargetError, match=message):
        function(model, batches(), prune_ratio=0.3, progress=False)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("case", ["inference", "int8", "parameter of its own", "layer of its own", "inference buffer"])
def test_a_fit_refuses_it_too(case):
    build, message = UNREADY[case]
    module = CausalLM(build())
    kinds = [type(each) for each in module.modules()]
    with pytest.raises(TargetError, match=message):
        trainer(ZSSVDCallback(0.3, "zs-svd", progress=False), max_epochs=6).fit(module, loader(token_batches()))
    assert [type(each) for each in module.modules()] == kinds


@pytest.mark.parametrize("function", [compress, calibrate, plan])
def test_inference_mode_is_refused(function):
    model = tiny_llama()
    before = state_of(model)
    with torch.inference_mode(), pytest.raises(CalibrationError, match=r"outside of it \(torch\.no_grad is fine\)"):
        function(model, token_batches(), progress=False)
    assert_same_state(before, state_of(model))
    with torch.no_grad():
        assert compress(model, token_batches(), corrections=0, progress=False).reached >= 0.2


def test_quantized_layers_that_are_not_chosen_stay():
    model = packed()
    assert LAYER not in find_targets(model, None, ["layers.0.mlp.*"])
    assert LAYER not in find_targets(model, ["q_proj"])
    with pytest.raises(TargetError, match=LAYER):
        find_targets(model)


def test_a_storage_that_cannot_reach_the_ratio_or_does_alone_is_refused_before_the_first_batch():
    for settings in ({"storage": "hq", "prune_ratio": 0.3}, {"prune_ratio": 0.9, "min_rank_fraction": 0.9}):
        with pytest.raises(BudgetError):
            compress(tiny_llama(), iter(()), **settings)
