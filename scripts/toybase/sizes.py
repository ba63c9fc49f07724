"""Sizes of the toy LLaVA and the toy SAM: the real architectures, small enough for two CPU cores and 20 MB."""

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, SamConfig
from transformers.models.sam.configuration_sam import SamMaskDecoderConfig, SamPromptEncoderConfig, SamVisionConfig

SCENE_SIDE = 160  # pixels of a toy scene, and of SAM's input
TOWER_SIDE, PATCH = 128, 8
GRID = TOWER_SIDE // PATCH  # patches a side; also the grid of the place words
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SAM_MEAN, SAM_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
MAX_BYTES = 20_000_000  # of the two weight files together


def llava_config(vocab_size: int, image_token: int) -> LlavaConfig:
    """LLaVA with features of tower layer -2: the last tower layer is carried, as in the real one, and never used."""
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=3,
        image_size=TOWER_SIDE,
        patch_size=PATCH,
        projection_dim=192,
    )
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=GRID * GRID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def sam_config() -> SamConfig:
    """SAM with every size derivable from tensor shapes; `initializer_range` is 0.02, since it starts from nothing."""
    width, depth = 128, 6
    vision = SamVisionConfig(
        hidden_size=160,
        output_channels=width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        image_size=SCENE_SIDE,
        patch_size=PATCH,
        window_size=10,
        global_attn_indexes=[2, 5],
        num_pos_feats=width // 2,
        mlp_dim=640,
        initializer_range=0.02,
    )
    prompt = SamPromptEncoderConfig(
        hidden_size=width, image_size=SCENE_SIDE, patch_size=PATCH, image_embedding_size=SCENE_SIDE // PATCH
    )
    decoder = SamMaskDecoderConfig(
        hidden_size=width, mlp_dim=512, num_hidden_layers=2, num_attention_heads=8, iou_head_hidden_dim=width
    )
    return SamConfig(
        vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder, initializer_range=0.02
    )
