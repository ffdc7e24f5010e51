"""Tiny models of many classes of transformers, built from configs, with inputs that they take."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as T
from torch import Tensor, nn

from zssvd_lightning import LowRankLinear
from zssvd_lightning.errors import TargetError
from zssvd_lightning.layers.int8 import Int8LowRankLinear
from zssvd_lightning.layers.registry import form_for
from zssvd_lightning.model.replace import replace_module
from zssvd_lightning.model.targets import find_targets

BLOCKS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = BLOCKS | {"vocab_size": 97, "max_position_embeddings": 64}
IMAGE = BLOCKS | {"image_size": 16, "patch_size": 4}
T5 = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
SPEECH = BLOCKS | {
    "vocab_size": 32,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
PAIR = {
    "vocab_size": 97,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
WHISPER = PAIR | {
    "num_mel_bins": 16,
    "max_source_positions": 30,
    "max_target_positions": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
DISTIL = {"vocab_size": 97, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
SEGFORMER = {
    "hidden_sizes": [16, 32],
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "num_attention_heads": [2, 4],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 32,
}
MAE = IMAGE | {
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 48,
}


def _ids(*shape: int) -> Tensor:
    return torch.randint(3, 90, shape, generator=torch.Generator().manual_seed(0))


def _floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


TOKENS: dict[str, Any] = {"input_ids": _ids(2, 7)}
CHOICES: dict[str, Any] = {"input_ids": _ids(1, 2, 7)}
BOTH: dict[str, Any] = TOKENS | {"decoder_input_ids": _ids(2, 5)}
PIXELS: dict[str, Any] = {"pixel_values": _floats(2, 3, 16, 16)}
SOUND: dict[str, Any] = {"input_values": _floats(2, 400)}
MEL: dict[str, Any] = {"input_features": _floats(2, 16, 60)}
NOISE: dict[str, Any] = PIXELS | {"noise": _floats(2, 16)}


def _composed(make: Callable[..., Any], *parts: Any) -> Callable[[], Any]:
    return lambda: make(*parts)


CLASSES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "WhisperForConditionalGeneration": (
        _composed(T.WhisperConfig.from_dict, WHISPER),
        MEL | {"decoder_input_ids": _ids(2, 5)},
    ),
    "WhisperForAudioClassification": (_composed(T.WhisperConfig.from_dict, WHISPER), MEL),
    "Wav2Vec2ForCTC": (_composed(T.Wav2Vec2Config.from_dict, SPEECH), SOUND),
    "Wav2Vec2ForPreTraining": (_composed(T.Wav2Vec2Config.from_dict, SPEECH), SOUND),
    "HubertForCTC": (_composed(T.HubertConfig.from_dict, SPEECH), SOUND),
    "SegformerForSemanticSegmentation": (_composed(T.SegformerConfig.from_dict, SEGFORMER), PIXELS),
    "ViTMAEForPreTraining": (_composed(T.ViTMAEConfig.from_dict, MAE), NOISE),
    "ViTForMaskedImageModeling": (_composed(T.ViTConfig.from_dict, IMAGE | {"encoder_stride": 4}), PIXELS),
    "ViTModel": (_composed(T.ViTConfig.from_dict, IMAGE), PIXELS),
    "Dinov2ForImageClassification": (_composed(T.Dinov2Config.from_dict, IMAGE | {"mlp_ratio": 2}), PIXELS),
    "CLIPVisionModelWithProjection": (_composed(T.CLIPVisionConfig.from_dict, IMAGE), PIXELS),
    "CLIPTextModelWithProjection": (_composed(T.CLIPTextConfig.from_dict, TEXT | {"eos_token_id": 2}), TOKENS),
    "CLIPModel": (
        _composed(T.CLIPConfig.from_dict, {"text_config": TEXT | {"eos_token_id": 2}, "vision_config": IMAGE}),
        TOKENS | PIXELS,
    ),
    "T5EncoderModel": (_composed(T.T5Config.from_dict, T5), TOKENS),
    "T5ForTokenClassification": (_composed(T.T5Config.from_dict, T5), TOKENS),
    "T5ForConditionalGeneration": (_composed(T.T5Config.from_dict, T5), BOTH),
    "BertForMultipleChoice": (_composed(T.BertConfig.from_dict, TEXT), CHOICES),
    "BertForPreTraining": (_composed(T.BertConfig.from_dict, TEXT), TOKENS),
    "BertForNextSentencePrediction": (_composed(T.BertConfig.from_dict, TEXT), TOKENS),
    "BertLMHeadModel": (_composed(T.BertConfig.from_dict, TEXT | {"is_decoder": True}), TOKENS),
    "DistilBertForMultipleChoice": (_composed(T.DistilBertConfig.from_dict, DISTIL), CHOICES),
    "ElectraForPreTraining": (_composed(T.ElectraConfig.from_dict, TEXT | {"embedding_size": 16}), TOKENS),
    "RobertaForMaskedLM": (_composed(T.RobertaConfig.from_dict, TEXT), TOKENS),
    "BartForSequenceClassification": (
        _composed(T.BartConfig.from_dict, PAIR),
        {"input_ids": torch.cat([TOKENS["input_ids"], torch.full((2, 1), 2)], 1)},
    ),
    "MarianMTModel": (_composed(T.MarianConfig.from_dict, PAIR | {"pad_token_id": 0}), BOTH),
    "GPT2DoubleHeadsModel": (_composed(T.GPT2Config.from_dict, GPT2), CHOICES),
    "LlamaForSequenceClassification": (_composed(T.LlamaConfig.from_dict, TEXT | {"pad_token_id": 0}), TOKENS),
    "MixtralForCausalLM": (
        _composed(T.MixtralConfig.from_dict, TEXT | {"num_local_experts": 2, "num_key_value_heads": 2}),
        TOKENS,
    ),
    "ASTForAudioClassification": (
        _composed(T.ASTConfig.from_dict, BLOCKS | {"max_length": 32, "num_mel_bins": 16, "patch_size": 4}),
        {"input_values": _floats(2, 32, 16)},
    ),
    "TimesformerForVideoClassification": (
        _composed(T.TimesformerConfig.from_dict, IMAGE | {"num_frames": 2}),
        {"pixel_values": _floats(1, 2, 3, 16, 16)},
    ),
    "EncoderDecoderModel": (
        lambda: T.EncoderDecoderConfig.from_encoder_decoder_configs(T.BertConfig(**TEXT), T.BertConfig(**TEXT)),
        BOTH,
    ),
    "VisionTextDualEncoderModel": (
        lambda: T.VisionTextDualEncoderConfig.from_vision_text_configs(T.ViTConfig(**IMAGE), T.BertConfig(**TEXT)),
        TOKENS | PIXELS,
    ),
}
"""By class name: function that returns the config, and inputs."""


def built(name: str) -> Any:
    """A model of the class with random weights."""
    return getattr(T, name)(CLASSES[name][0]()).eval()


@torch.no_grad()
def factored(model: nn.Module, form: str = "low_rank") -> int:
    """Replace every layer that can be compressed by a random one of low rank, and return how many there were."""
    try:
        targets = find_targets(model)
    except TargetError:
        return 0
    for target in targets.values():
        m, n = target.shape
        k = max(1, min(m, n) // 4)
        up, down, bias = torch.randn(m, k) / k, torch.randn(k, n) / n**0.5, target.module.bias
        new: nn.Module = LowRankLinear.from_factors(up, down, bias)
        if form == "int8":
            new = Int8LowRankLinear.of(new, torch.arange(m) == 1, torch.arange(n) < 0)  # type: ignore[arg-type]
        elif form == "pivoted":
            new = form_for("pivoted", m, n).from_factors(up, down, bias)
        new.transposed = isinstance(target.module, T.pytorch_utils.Conv1D)
        replace_module(model, target.module, new.eval())
    return len(targets)


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors in a model's output, in order."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]
