"""Tiny configurations of many architectures, and inputs for them."""

from collections.abc import Callable

import torch

from support.helpers import (
    VOCABULARY,
    Architecture,
    Samples,
    image_samples,
    pairs,
    sequence_pairs,
    sound_samples,
    text_samples,
)


TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ENCODER = {**LAYERS, "vocab_size": VOCABULARY, "max_position_embeddings": 40, "pad_token_id": 1}
DECODER = {**LAYERS, **TOKENS, "num_key_value_heads": 2, "max_position_embeddings": 40}
VISION = {**LAYERS, "image_size": 16, "patch_size": 8}
GPT = {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
CLIP = {
    "text_config": {**ENCODER, "max_position_embeddings": 16, "eos_token_id": 2, "projection_dim": 24},
    "vision_config": {**VISION, "projection_dim": 24},
    "projection_dim": 24,
}
SEQUENCES = {
    **TOKENS,
    "d_model": 32,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
    "max_position_embeddings": 40,
    "decoder_start_token_id": 2,
}
T5 = {**TOKENS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
DEBERTA = {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 6}
WAVES = {
    **LAYERS,
    "vocab_size": VOCABULARY,
    "conv_dim": [16, 16],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 8],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 5,
    "num_conv_pos_embedding_groups": 2,
}
WAVES_BY_LAYER = {**WAVES, "feat_extract_norm": "layer", "do_stable_layer_norm": True}
SLIDING = {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
ROUTED = {"num_local_experts": 4, "num_experts_per_tok": 2}
STACKED = r"\.experts\.(gate_up|down)_proj$"


def captioned_images(seed: int) -> Samples:
    return pairs(text_samples(seed), image_samples(seed))


def prompts_with_images(seed: int) -> Samples:
    """Texts that begin with the four tokens that stand for an image."""
    texts = [sample["input_ids"].clamp(max=VOCABULARY - 2) for sample in text_samples(seed)]
    places = torch.full((4,), VOCABULARY - 1)
    return pairs([{"input_ids": torch.cat([places, text])} for text in texts], image_samples(seed))


def features(*shape: int) -> Callable[[int], Samples]:
    """Audio features of one shape, with transcripts."""

    def samples(seed: int) -> Samples:
        generator = torch.Generator().manual_seed(seed)
        sounds = [{"input_features": torch.randn(shape, generator=generator)} for _ in range(6)]
        return pairs([{"labels": text["input_ids"]} for text in text_samples(seed)], sounds)

    return samples


ARCHITECTURES = {
    # Encoders of text
    "bert": Architecture("BertModel", ENCODER),
    "roberta": Architecture("RobertaForMaskedLM", ENCODER),
    "distilbert": Architecture(
        "DistilBertForMaskedLM",
        {**TOKENS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 40},
    ),
    "deberta": Architecture("DebertaModel", DEBERTA, not_tokens="pos_q?_?proj"),
    "deberta-v2": Architecture("DebertaV2Model", {**DEBERTA, "share_att_key": False}, not_tokens=r"pos_\w+_proj"),
    # As many relative positions as the longest samples have tokens.
    "deberta-v3": Architecture(
        "DebertaV2ForMaskedLM",
        {**DEBERTA, "share_att_key": True, "position_buckets": 6, "max_relative_positions": 20},
        first_call=True,
    ),
    "mpnet": Architecture("MPNetModel", ENCODER),
    "albert": Architecture("AlbertModel", {**ENCODER, "embedding_size": 16}),  # one layer, run twice
    "modernbert": Architecture(
        "ModernBertForMaskedLM", {**ENCODER, **TOKENS, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 4}
    ),
    "xlnet": Architecture(  # hidden states are [L, B, d]
        "XLNetModel", {**TOKENS, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
    ),
    "convbert": Architecture("ConvBertModel", {**ENCODER, "embedding_size": 32}),  # padding leaks through convolutions
    "longformer": Architecture(
        "LongformerModel", {**ENCODER, "attention_window": [4, 4], "max_position_embeddings": 60}
    ),
    "fnet": Architecture("FNetModel", ENCODER),  # takes no mask
    # Encoders of images
    "vit": Architecture("ViTModel", VISION, image_samples),
    "clip-vision": Architecture("CLIPVisionModel", VISION, image_samples),
    "clip": Architecture("CLIPModel", CLIP, captioned_images),
    "siglip": Architecture(
        "SiglipModel", {**CLIP, "text_config": {**CLIP["text_config"], "projection_size": 32}}, captioned_images
    ),
    "dual-encoder": Architecture(
        "VisionTextDualEncoderModel",
        {
            "text_config": {**ENCODER, "model_type": "bert"},
            "vision_config": {**VISION, "model_type": "vit"},
            "projection_dim": 24,
        },
        captioned_images,
    ),
    "dinov2": Architecture("Dinov2Model", VISION, image_samples),
    "swin": Architecture(
        "SwinModel",
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        image_samples,
    ),
    "convnext": Architecture(
        "ConvNextModel", {"num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1]}, lambda s: image_samples(s, 32)
    ),
    "resnet": Architecture(  # with running means and counts
        "ResNetModel", {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}, image_samples
    ),
    # Encoders of sound
    "wav2vec2": Architecture("Wav2Vec2Model", WAVES_BY_LAYER, sound_samples),
    "wav2vec2-group-norm": Architecture("Wav2Vec2ForCTC", WAVES, sound_samples),
    # Decoders
    "gpt2": Architecture("GPT2LMHeadModel", GPT),
    "gpt-neox": Architecture("GPTNeoXForCausalLM", DECODER),
    "opt": Architecture("OPTForCausalLM", {**DECODER, "ffn_dim": 48, "word_embed_proj_dim": 16}),
    "bloom": Architecture("BloomForCausalLM", {**TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "llama": Architecture("LlamaForCausalLM", DECODER),
    "mistral": Architecture("MistralForCausalLM", {**DECODER, "sliding_window": 4}),
    "qwen3": Architecture("Qwen3ForCausalLM", {**DECODER, "head_dim": 8, "tie_word_embeddings": True}),
    "gemma3": Architecture("Gemma3ForCausalLM", {**DECODER, **SLIDING}),
    "phi3": Architecture("Phi3ForCausalLM", DECODER),
    "mamba": Architecture("MambaForCausalLM", {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "llava": Architecture(
        "LlavaForConditionalGeneration",
        {
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
            "text_config": {**DECODER, "model_type": "llama"},
            "image_token_id": VOCABULARY - 1,
            "image_seq_length": 4,
            "vision_feature_layer": -1,
        },
        prompts_with_images,
    ),
    # Mixtures of experts
    "mixtral": Architecture("MixtralForCausalLM", {**DECODER, **ROUTED}, stacked=STACKED),
    "qwen3-moe": Architecture(
        "Qwen3MoeForCausalLM",
        {**DECODER, **ROUTED, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16, "mlp_only_layers": [0]},
        stacked=STACKED,
    ),
    "gpt-oss": Architecture("GptOssForCausalLM", {**DECODER, **ROUTED, **SLIDING}, stacked=STACKED),
    "switch": Architecture(  # experts are modules, which read some of the tokens
        "SwitchTransformersForConditionalGeneration",
        {**T5, "num_experts": 3, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        sequence_pairs,
    ),
    # Encoder-decoders
    "t5": Architecture("T5ForConditionalGeneration", T5, sequence_pairs),
    "t5-v1.1": Architecture(
        "T5ForConditionalGeneration",
        {**T5, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
        sequence_pairs,
    ),
    "bart": Architecture("BartForConditionalGeneration", SEQUENCES, sequence_pairs),
    "mbart": Architecture("MBartForConditionalGeneration", SEQUENCES, sequence_pairs),
    "marian": Architecture("MarianMTModel", {**SEQUENCES, "decoder_vocab_size": VOCABULARY}, sequence_pairs),
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        {**SEQUENCES, "decoder_start_token_id": 1, "max_source_positions": 15, "num_mel_bins": 8},
        features(8, 30),
    ),
    "encoder-decoder": Architecture(
        "EncoderDecoderModel",
        {
            "encoder": {**ENCODER, "model_type": "bert"},
            "decoder": {**ENCODER, "model_type": "bert", "hidden_size": 16, "is_decoder": True}
            | {"add_cross_attention": True},
            "pad_token_id": 1,
            "decoder_start_token_id": 2,
        },
        sequence_pairs,
    ),
}


T5 = Architecture(
    "T5ForConditionalGeneration",
    {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 2,
        "decoder_start_token_id": 0,
    },
)
