"""Families of Hugging Face: encoders, decoders, encoder-decoders, vision, speech, mixtures of experts, state spaces."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.network.sources import import_transformers

from .family import Call, Family

VOCABULARY = 50
_WIDE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_MORE = {"max_position_embeddings": 32, "pad_token_id": 0, "num_labels": 3}
ENCODER = {**_WIDE, **_MORE}
DECODER = {**_WIDE, "num_key_value_heads": 2, "max_position_embeddings": 32, "use_cache": False, "pad_token_id": 0}
BART = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32,
    "use_cache": False, "pad_token_id": 0,
}  # fmt: skip
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "use_cache": False,
}
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "num_labels": 3,
}  # fmt: skip
SPEECH = {
    **ENCODER, "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "vocab_size": 12,
}  # fmt: skip
EXPERTS = {**DECODER, "num_experts_per_tok": 2}


def _ids(length: int = 7) -> Tensor:
    return torch.randint(2, VOCABULARY, (2, length))


def _text() -> Call:
    return {"input_ids": _ids()}


def _two_texts() -> Call:
    return {"input_ids": _ids(), "decoder_input_ids": _ids(5)}


def _image() -> Call:
    return {"pixel_values": torch.randn(1, 3, 32, 32)}


def _large_image() -> Call:
    return {"pixel_values": torch.randn(1, 3, 64, 64)}


def _wave() -> Call:
    return {"input_values": torch.randn(1, 400)}


def _spectrogram() -> Call:
    return {"input_values": torch.randn(1, 48, 16)}


def _mel() -> Call:
    return {"input_features": torch.randn(1, 16, 64), "decoder_input_ids": _ids(5)}


def _image_and_text() -> Call:
    return {"input_ids": _ids(), "pixel_values": torch.randn(2, 3, 32, 32)}


def _build(network: str, config: str, sizes: dict[str, Any]) -> nn.Module:
    t = import_transformers()
    return getattr(t, network)(getattr(t, config)(**sizes))


def _family(
    network: str,
    config: str,
    sizes: dict[str, Any],
    inputs: Any = _text,
    answer: str = "logits",
    *,
    tag: str = "",
    **more: Any,
) -> Family:
    return Family(
        f"hf:{network}{tag}", "transformers", partial(_build, network, f"{config}Config", sizes), inputs, answer, **more
    )


def _decoder(name: str, **more: Any) -> Family:
    return _family(f"{name}ForCausalLM", name, {**DECODER, **more}, whole_heads=True)


def _classifier(name: str, **more: Any) -> Family:
    return _family(f"{name}ForSequenceClassification", name, {**ENCODER, **more})


def _of_images(name: str, inputs: Any = _image, **more: Any) -> Family:
    return _family(f"{name}ForImageClassification", name, {**VISION, **more}, inputs)


def _clip(name: str, **more: Any) -> Family:
    text = {k: v for k, v in ENCODER.items() if k != "num_labels"}
    vision = {k: v for k, v in VISION.items() if k != "num_labels"}
    sizes = {"text_config": text | more, "vision_config": vision, "projection_dim": 24}
    return _family(f"{name}Model", name, sizes, _image_and_text, "logits_per_image")


HUGGING_FACE = (
    _classifier("Bert"),
    _classifier("Albert", embedding_size=16),
    _classifier("MPNet"),
    _classifier(
        "DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, norm_rel_ebd="layer_norm"
    ),
    _classifier("ModernBert", bos_token_id=1, eos_token_id=1, cls_token_id=1, sep_token_id=1),
    _family(
        "DistilBertForSequenceClassification",
        "DistilBert",
        {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "hidden_dim": 48,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 32,
        },
    ),
    _family(
        "XLNetForSequenceClassification",
        "XLNet",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    ),
    _family(
        "FNetForSequenceClassification",
        "FNet",
        {**_WIDE, "max_position_embeddings": 32, "num_labels": 3, "pad_token_id": 0},
    ),
    _decoder("Llama"),
    _family("LlamaForCausalLM", "Llama", {**DECODER, "tie_word_embeddings": True}, whole_heads=True, tag=" (tied)"),
    _decoder("Qwen3", head_dim=8),
    _decoder("Gemma2", head_dim=8),
    _decoder("Phi"),
    _decoder("Olmo2"),
    _decoder("StableLm"),
    _decoder("Cohere"),
    _family(
        "FalconForCausalLM",
        "Falcon",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "use_cache": False,
        },
        whole_heads=True,
    ),
    _family(
        "GPT2LMHeadModel",
        "GPT2",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "use_cache": False},
        whole_heads=True,
    ),
    _family(
        "GPTNeoXForCausalLM", "GPTNeoX", {**_WIDE, "max_position_embeddings": 32, "use_cache": False}, whole_heads=True
    ),
    _family(
        "OPTForCausalLM",
        "OPT",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            "word_embed_proj_dim": 32,
            "use_cache": False,
        },
        whole_heads=True,
    ),
    _family(
        "BloomForCausalLM",
        "Bloom",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "use_cache": False},
        whole_heads=True,
    ),
    _family("MixtralForCausalLM", "Mixtral", {**EXPERTS, "num_local_experts": 3}, whole_heads=True, single=True),
    _family(
        "MixtralForCausalLM",
        "Mixtral",
        {**EXPERTS, "num_local_experts": 3, "experts_implementation": "eager"},
        whole_heads=True,
        tag=" (eager)",
    ),
    _family(
        "Qwen2MoeForCausalLM",
        "Qwen2Moe",
        {**EXPERTS, "num_experts": 3, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
        whole_heads=True,
        single=True,
    ),
    _family(
        "DeepseekV3ForCausalLM",
        "DeepseekV3",
        {
            **DECODER,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 12,
            "q_lora_rank": 12,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
        whole_heads=True,
        single=True,
    ),
    _family(
        "MambaForCausalLM",
        "Mamba",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 24,
            "state_size": 4,
            "num_hidden_layers": 2,
            "use_cache": False,
            "time_step_rank": 4,
        },
    ),
    _family(
        "Mamba2ForCausalLM",
        "Mamba2",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
            "num_hidden_layers": 2,
            "use_cache": False,
            "chunk_size": 4,
        },
    ),
    _family(
        "RwkvForCausalLM",
        "Rwkv",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "attention_hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "use_cache": False,
            "context_length": 32,
        },
    ),
    _family("T5ForConditionalGeneration", "T5", T5, _two_texts),
    _family("BartForConditionalGeneration", "Bart", BART, _two_texts),
    _family("PegasusForConditionalGeneration", "Pegasus", BART, _two_texts),
    _family(
        "WhisperForConditionalGeneration",
        "Whisper",
        {
            **BART,
            "num_mel_bins": 16,
            "max_source_positions": 32,
            "max_target_positions": 16,
            "decoder_start_token_id": 1,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        _mel,
    ),
    _family("Wav2Vec2ForCTC", "Wav2Vec2", SPEECH, _wave),
    _family(
        "ASTForAudioClassification",
        "AST",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "patch_size": 8,
            "frequency_stride": 8,
            "time_stride": 8,
            "max_length": 48,
            "num_mel_bins": 16,
            "num_labels": 3,
        },
        _spectrogram,
    ),
    _of_images("ViT"),
    _of_images("Beit"),
    _of_images("Dinov2"),
    _family(
        "SwinForImageClassification",
        "Swin",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 4],
            "window_size": 4,
            "num_labels": 3,
        },
        _image,
    ),
    _family(
        "ConvNextForImageClassification",
        "ConvNext",
        {"hidden_sizes": [16, 24], "depths": [1, 1], "num_stages": 2, "num_labels": 3},
        _image,
    ),
    _family(
        "ResNetForImageClassification",
        "ResNet",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 3},
        _image,
    ),
    _family(
        "MobileViTForImageClassification",
        "MobileViT",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 32],
            "num_attention_heads": 4,
            "num_labels": 3,
        },
        _large_image,
    ),
    _family(
        "SegformerForSemanticSegmentation",
        "Segformer",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [16, 24],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [2, 4],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 24,
            "num_labels": 3,
        },
        _image,
    ),
    _family(
        "DPTForDepthEstimation",
        "DPT",
        {
            **VISION,
            "is_hybrid": False,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 8, 16, 16],
            "fusion_hidden_size": 16,
        },
        _image,
        "predicted_depth",
    ),
    _family("YolosForObjectDetection", "Yolos", {**VISION, "image_size": [32, 32], "num_detection_tokens": 5}, _image),
    _family(
        "DetrForObjectDetection",
        "Detr",
        {
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "num_queries": 5,
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": {
                "model_type": "resnet",
                "embedding_size": 16,
                "hidden_sizes": [16, 24],
                "depths": [1, 1],
                "out_features": ["stage2"],
            },
            "num_labels": 3,
        },
        _large_image,
    ),
    _clip("CLIP"),
    _clip("Siglip"),
)
