"""The transformers part of the corpus: models of transformers built from small configurations, with random weights.

Three layers of width 256 with four heads and a feed-forward width of 1024, where the configuration class has such
fields: small enough for hundreds of files, and with the structure of the full model.

Source: the model and configuration classes of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.corpus_networks import Input, Network, Outputs

VOCABULARY = 1000
LENGTH = 24
_SMALL: Mapping[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
}
_GROUPED: Mapping[str, Any] = {
    **_SMALL,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
_GPT: Mapping[str, Any] = {
    "n_embd": 256,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "vocab_size": VOCABULARY,
}
_SEQ2SEQ: Mapping[str, Any] = {
    "d_model": 256,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 1024,
    "decoder_ffn_dim": 1024,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
}
_T5: Mapping[str, Any] = {
    "d_model": 256,
    "d_kv": 64,
    "d_ff": 1024,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 0,
}
_VISION: Mapping[str, Any] = {
    **{k: _SMALL[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
}
_CLIP: Mapping[str, Any] = {**_SMALL, "projection_dim": 128}
_AUDIO: Mapping[str, Any] = {
    **{
        k: _SMALL[k]
        for k in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "vocab_size",
        )
    },
    "conv_dim": (128, 128, 128),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
#: name -> (model class, configuration class, configuration, what it reads, output fields)
TRANSFORMERS: Mapping[str, tuple[str, str, Mapping[str, Any], str, Outputs]] = {
    "bert": ("BertModel", "BertConfig", _SMALL, "text", ("last_hidden_state",)),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT, "text", ("logits",)),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED, "text", ("logits",)),
    "t5_encoder": ("T5EncoderModel", "T5Config", _T5, "text", ("last_hidden_state",)),
    "albert": (
        "AlbertModel",
        "AlbertConfig",
        {**_SMALL, "embedding_size": 128},
        "text",
        ("last_hidden_state",),
    ),
    "whisper_encoder": (
        "WhisperModel.encoder",
        "WhisperConfig",
        {**_SEQ2SEQ, "max_source_positions": 100, "max_target_positions": 64, "pad_token_id": 0},
        "mel",
        ("last_hidden_state",),
    ),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        {"dim": 256, "n_layers": 3, "n_heads": 4, "hidden_dim": 1024, "vocab_size": VOCABULARY},
        "text",
        ("last_hidden_state",),
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {"hidden_sizes": [32, 64, 96, 128], "num_attention_heads": [1, 2, 3, 4], "decoder_hidden_size": 128},
        "image",
        ("logits",),
    ),
    "mamba": (
        "MambaModel",
        "MambaConfig",
        {"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "use_mambapy": False},
        "short",
        ("last_hidden_state",),
    ),
    "bert_features": ("BertModel!", "BertConfig", _SMALL, "text", ("last_hidden_state", "pooler_output")),
    "roberta": ("RobertaModel", "RobertaConfig", _SMALL, "text", ("last_hidden_state",)),
    "electra": (
        "ElectraModel",
        "ElectraConfig",
        {**_SMALL, "embedding_size": 128},
        "text",
        ("last_hidden_state",),
    ),
    "deberta_v2": (
        "DebertaV2Model",
        "DebertaV2Config",
        {
            **_SMALL,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 16,
            "share_att_key": True,
        },
        "text",
        ("last_hidden_state",),
    ),
    "mpnet": ("MPNetModel", "MPNetConfig", _SMALL, "text", ("last_hidden_state",)),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5, "pair", ("logits",)),
    "bart": ("BartModel", "BartConfig", _SEQ2SEQ, "pair", ("last_hidden_state",)),
    "marian": (
        "MarianModel",
        "MarianConfig",
        {**_SEQ2SEQ, "pad_token_id": 0},
        "pair",
        ("last_hidden_state",),
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            **{k: _SMALL[k] for k in _SMALL if k != "intermediate_size"},
            "ffn_dim": 1024,
            "word_embed_proj_dim": 256,
        },
        "text",
        ("logits",),
    ),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "hidden_size": 256,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": VOCABULARY,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 128,
        },
        "text",
        ("logits",),
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _SMALL, "text", ("logits",)),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**_GPT, "rotary_dim": 32}, "text", ("logits",)),
    "mistral": ("MistralForCausalLM", "MistralConfig", _GROUPED, "text", ("logits",)),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED, "text", ("logits",)),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _GROUPED, "text", ("logits",)),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _GROUPED, "text", ("logits",)),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _GROUPED, "text", ("logits",)),
    "phi": ("PhiForCausalLM", "PhiConfig", _SMALL, "text", ("logits",)),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**_GROUPED, "pad_token_id": 0}, "text", ("logits",)),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        {**_SMALL, "multi_query": True, "new_decoder_architecture": False},
        "text",
        ("logits",),
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 256, "n_layer": 3, "n_head": 4, "vocab_size": VOCABULARY},
        "text",
        ("logits",),
    ),
    "codegen": ("CodeGenForCausalLM", "CodeGenConfig", {**_GPT, "rotary_dim": 32}, "text", ("logits",)),
    "stablelm": (
        "StableLmForCausalLM",
        "StableLmConfig",
        {**_SMALL, "num_key_value_heads": 2},
        "text",
        ("logits",),
    ),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _GROUPED, "text", ("logits",)),
    "granite": ("GraniteForCausalLM", "GraniteConfig", _GROUPED, "text", ("logits",)),
    "cohere": ("CohereForCausalLM", "CohereConfig", _GROUPED, "text", ("logits",)),
    "modernbert": (
        "ModernBertModel",
        "ModernBertConfig",
        {**_SMALL, "pad_token_id": 0},
        "text",
        ("last_hidden_state",),
    ),
    "convbert": (
        "ConvBertModel",
        "ConvBertConfig",
        {**_SMALL, "embedding_size": 128, "head_ratio": 2},
        "text",
        ("last_hidden_state",),
    ),
    "squeezebert": (
        "SqueezeBertModel",
        "SqueezeBertConfig",
        {**_SMALL, "embedding_size": 256},
        "text",
        ("last_hidden_state",),
    ),
    "fnet": ("FNetModel", "FNetConfig", _SMALL, "text", ("last_hidden_state",)),
    "rembert": (
        "RemBertModel",
        "RemBertConfig",
        {**_SMALL, "input_embedding_size": 64},
        "text",
        ("last_hidden_state",),
    ),
    "xlm_roberta": ("XLMRobertaModel", "XLMRobertaConfig", _SMALL, "text", ("last_hidden_state",)),
    "mobilebert": (
        "MobileBertModel",
        "MobileBertConfig",
        {**_SMALL, "embedding_size": 64, "intra_bottleneck_size": 128, "true_hidden_size": 128},
        "text",
        ("last_hidden_state",),
    ),
    "esm": (
        "EsmModel",
        "EsmConfig",
        {**_SMALL, "position_embedding_type": "rotary", "pad_token_id": 1},
        "text",
        ("last_hidden_state",),
    ),
    "vit": ("ViTModel", "ViTConfig", _VISION, "image", ("last_hidden_state",)),
    "dinov2": (
        "Dinov2Model",
        "Dinov2Config",
        {**_VISION, "mlp_ratio": 4, "image_size": 224},
        "image",
        ("last_hidden_state",),
    ),
    "clip_text": ("CLIPTextModelWithProjection", "CLIPTextConfig", _CLIP, "text", ("text_embeds",)),
    "clip_vision": (
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        {**_VISION, "projection_dim": 128},
        "image",
        ("image_embeds",),
    ),
    "siglip_vision": ("SiglipVisionModel", "SiglipVisionConfig", _VISION, "image", ("pooler_output",)),
    "convnextv2": (
        "ConvNextV2ForImageClassification",
        "ConvNextV2Config",
        {"hidden_sizes": [40, 80, 160, 320], "depths": [2, 2, 4, 2]},
        "image",
        ("logits",),
    ),
    "resnet_hf": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"layer_type": "basic", "hidden_sizes": [64, 128, 192, 256]},
        "image",
        ("logits",),
    ),
    "cvt": (
        "CvtForImageClassification",
        "CvtConfig",
        {"embed_dim": [32, 96, 192], "num_heads": [1, 3, 6], "depth": [1, 1, 3]},
        "image",
        ("logits",),
    ),
    "dpt": (
        "DPTForDepthEstimation",
        "DPTConfig",
        {
            **_VISION,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [32, 64, 96, 128],
            "fusion_hidden_size": 64,
        },
        "image",
        ("predicted_depth",),
    ),
    "yolos": (
        "YolosForObjectDetection",
        "YolosConfig",
        {**_VISION, "image_size": [224, 224]},
        "image",
        ("logits", "pred_boxes"),
    ),
    "wav2vec2": ("Wav2Vec2Model", "Wav2Vec2Config", _AUDIO, "wave", ("last_hidden_state",)),
    "hubert": ("HubertModel", "HubertConfig", _AUDIO, "wave", ("last_hidden_state",)),
    "speech_spectrogram": (
        "ASTModel",
        "ASTConfig",
        {**_VISION, "num_mel_bins": 64, "max_length": 128},
        "spectrogram",
        ("last_hidden_state",),
    ),
    "patchtst": (
        "PatchTSTModel",
        "PatchTSTConfig",
        {
            "d_model": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 256,
            "context_length": 64,
            "num_input_channels": 3,
        },
        "series",
        ("last_hidden_state",),
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_GROUPED, "num_hidden_layers": 2, "num_local_experts": 4, "experts_implementation": "eager"},
        "text",
        ("logits",),
    ),
}
_READS: Mapping[str, tuple[Input, ...]] = {
    "text": (("input_ids", (2, LENGTH), VOCABULARY),),
    "short": (("input_ids", (2, 8), VOCABULARY),),
    "pair": (("input_ids", (2, LENGTH), VOCABULARY), ("decoder_input_ids", (2, 12), VOCABULARY)),
    "image": (("pixel_values", (2, 3, 224, 224), 0),),
    "mel": (("input_features", (2, 80, 200), 0),),
    "wave": (("input_values", (2, 3200), 0),),
    "spectrogram": (("input_values", (2, 128, 64), 0),),
    "series": (("past_values", (2, 64, 3), 0),),
}
_TEXT_DYNAMIC = frozenset(
    {
        "bert",
        "gpt2",
        "llama",
        "t5_encoder",
        "distilbert",
        "qwen2",
        "gpt_neox",
        "opt",
        "albert",
        "t5",
        "roberta",
    }
)
_TEXT_SIZES = ({"batch": 1, "length": 16}, {"batch": 3, "length": 24}, {"batch": 2, "length": 41})
#: Where it is not ``transformer``; of a network that gives out its residual stream nothing is expected.
_KINDS = {"convnextv2": "normalised", "resnet_hf": "convolution", "bert_features": "features"}


def _transformer(name: str) -> Callable[[], Any]:
    def build() -> Any:
        from benchmarks import corpus_modules as modules

        model_class, config_class, config, reads, outputs = TRANSFORMERS[name]
        return modules.hugging_face(
            model_class, config_class, dict(config), tuple(i[0] for i in _READS[reads]), outputs
        )

    return build


def transformers_networks() -> list[Network]:
    """One network for each name of `TRANSFORMERS`, from its configuration class."""
    found = []
    for name, (_, _, _, reads, _) in TRANSFORMERS.items():
        dynamic: Mapping[str, Mapping[int, str]] = {}
        if name in _TEXT_DYNAMIC:
            dynamic = {
                i[0]: {0: "batch", 1: "length" if i[0] == "input_ids" else "decoder_length"}
                for i in _READS[reads]
            }
        sizes: tuple[Mapping[str, int], ...] = _TEXT_SIZES if dynamic else ()
        if reads == "pair" and dynamic:
            sizes = tuple({**s, "decoder_length": s["length"] - 7} for s in _TEXT_SIZES)
        kind = _KINDS.get(name, "transformer")
        found.append(Network(name, "transformers", kind, _READS[reads], _transformer(name), dynamic, sizes))
    return found
