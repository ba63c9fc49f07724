"""Sizes of the toy LLaVA and the toy SAM: the real architectures, small enough for two CPU cores and 20 MB."""

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, SamConfig
from transformers.models.sam.configuration_sam import SamMaskDecoderConfig, SamPromptEncoderConfig, SamVisionConfig

SCENE_SIDE = 160  # pixels of a toy scene, and of SAM's input
TOWER_SIDE, PATCH = 128, 8
GRID = TOWER_SIDE // PATCH  # patches per side; also the grid of the place words
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SAM_MEAN, SAM_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
# of models with random weights (toy/base/blank.py)
TOWER_POSITIONS = 0.3  # amplitude of the sines that the tower's position table starts from
STATE_SCALE = 4.0  # gain of the final norm: the states from which words and masks are predicted
MAX_BYTES = 20_000_000  # of the two weight files together


def llava_config(
    vocab_size: int,
    image_token: int,
    *,
    patch: int = PATCH,
    tower_layers: int = 6,
    width: int = 256,
    inner: int = 640,
    layers: int = 4,
) -> LlavaConfig:
    """LLaVA with features of tower layer -2: the last tower layer is present, as in the real one, and never used."""
    grid = TOWER_SIDE // patch
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=tower_layers,
        num_attention_heads=3,
        image_size=TOWER_SIDE,
        patch_size=patch,
        projection_dim=192,
    )
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
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
        image_seq_length=grid * grid,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def sam_config(
    side: int = SCENE_SIDE, patch: int = PATCH, encoder_width: int = 160, window: int = 10, decoder_heads: int = 8
) -> SamConfig:
    """SAM with every size derivable from tensor shapes; `initializer_range` is 0.02, since it trains from scratch."""
    width, depth = 128, 6
    vision = SamVisionConfig(
        hidden_size=encoder_width,
        output_channels=width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        image_size=side,
        patch_size=patch,
        window_size=window,
        global_attn_indexes=[2, 5],
        num_pos_feats=width // 2,
        mlp_dim=4 * encoder_width,
        initializer_range=0.02,
    )
    prompt = SamPromptEncoderConfig(hidden_size=width, image_size=side, patch_size=patch)
    decoder = SamMaskDecoderConfig(
        hidden_size=width,
        mlp_dim=512,
        num_hidden_layers=2,
        num_attention_heads=decoder_heads,
        iou_head_hidden_dim=width,
    )
    return SamConfig(
        vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder, initializer_range=0.02
    )
