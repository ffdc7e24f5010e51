"""Small mixtures of experts of several families, built from config."""

from typing import Any

import torch
import transformers as T
from torch import nn
from transformers import PreTrainedModel

from support.models import VOCABULARY
from zssvd_lightning.layers.apart.removed import router_beside

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
FAMILIES: dict[str, tuple[type[PreTrainedModel], type[T.PreTrainedConfig], dict[str, Any]]] = {
    "mixtral": (T.MixtralForCausalLM, T.MixtralConfig, {"num_local_experts": 4}),
    "qwen3_moe": (
        T.Qwen3MoeForCausalLM,
        T.Qwen3MoeConfig,
        {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
    ),
    "olmoe": (T.OlmoeForCausalLM, T.OlmoeConfig, {"num_experts": 4}),
    "gpt_oss": (
        T.GptOssForCausalLM,
        T.GptOssConfig,
        {
            "num_local_experts": 4,
            "head_dim": 8,
            "layer_types": ["full_attention"] * 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "deepseek_v3": (
        T.DeepseekV3ForCausalLM,
        T.DeepseekV3Config,
        {
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 2,
            "num_key_value_heads": 4,
        }
        | LATENT,
    ),
    "granitemoe": (T.GraniteMoeForCausalLM, T.GraniteMoeConfig, {"num_local_experts": 4}),
}
"""By family: class of the model and of its config, and settings besides `TEXT`."""


def tiny_experts(family: str = "mixtral", **changes: Any) -> PreTrainedModel:
    """A model with four experts in each layer, two of them for each token, and weights that matter."""
    kind, config, own = FAMILIES[family]
    model = kind(config(**(TEXT | own | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 3:
                parameter.normal_(std=0.2)
            elif name.endswith("_proj_bias"):
                parameter.normal_(std=0.5)
    return model.eval()


def tiny_llama4() -> PreTrainedModel:
    """A model whose experts are called with the tokens once for each of the four; two of them for each token."""
    torch.manual_seed(0)
    own = {"num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1}
    model = T.Llama4ForCausalLM(T.Llama4TextConfig(**(TEXT | own)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 3:
                parameter.normal_(std=0.2)
    return model.eval()


def experts_in(model: nn.Module) -> list[nn.Module]:
    """The modules that hold experts, stacked or separate."""
    return [module for name, module in model.named_modules() if name.endswith(".experts")]


def lopsided_experts(family: str = "mixtral", **changes: Any) -> PreTrainedModel:
    """A `tiny_experts` whose experts get different numbers of tokens, so that removing some costs little.

    DeepSeek-V3 has groups of four, of which two may go.
    """
    model = tiny_experts(family, **({"n_routed_experts": 8} if family == "deepseek_v3" else {}) | changes)
    generator = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            router = router_beside(model, name, len(module.down_proj))
            rows = router.weight.data
            rows.copy_(torch.randn(rows.shape, generator=generator) * 0.3)
            rows[1] = -0.5 * (rows[0] + rows[2] + rows[3])
    return model
