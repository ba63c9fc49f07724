"""A LLaVA folder and a SAM file of a small size with weights drawn anew: nothing in them was ever trained.

    python scripts/make_blank_base.py runs/blank

The real architectures at sizes that two CPU cores can train whole, for recipes that start from nothing. The tokenizer,
which is no weight, is the toy base's (assets/toy). The same seed gives the same weights.
"""

import argparse
import shutil
import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # the project's own packages

import torch
from torch import nn
from toybase.llava import start_wide
from toybase.publish import save_llava, save_sam
from toybase.sam import start_afresh
from toybase.tower import sine_grid
from toybase.vocabulary import IMAGE_PATCH, added_ids, load_vocabulary
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SamConfig, SamModel
from transformers.models.sam.configuration_sam import SamMaskDecoderConfig, SamPromptEncoderConfig, SamVisionConfig

TOKENIZER = Path(__file__).parents[1] / "assets/toy/llava"
FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOWER_SIDE, TOWER_PATCH = 128, 16
SAM_SIDE, SAM_PATCH = 256, 16
TOWER_POSITIONS, SAM_POSITIONS = 0.3, 1.2  # size of the sines that position tables start from
STATES = 4.0  # size of the states that words and masks are read from


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default 0)")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    folder = args.out / "llava"
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copy(TOKENIZER / name, folder / name)
    save_llava(blank_llava(folder), args.out)
    print(f"wrote {folder} and {save_sam(blank_sam(), args.out)}")
    return 0


def blank_llava(folder: Path) -> LlavaForConditionalGeneration:
    """CLIP tower, projector and LLaMA with the vocabulary in `folder`."""
    pieces = load_vocabulary(folder)
    images, grid = added_ids(pieces), TOWER_SIDE // TOWER_PATCH
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=3,
        image_size=TOWER_SIDE,
        patch_size=TOWER_PATCH,
        projection_dim=192,
    )
    text = LlamaConfig(
        vocab_size=pieces.get_piece_size() + len(images),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=3,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=images[IMAGE_PATCH],
        image_seq_length=grid * grid,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    llava = LlavaForConditionalGeneration(config)
    tower = llava.model.vision_tower.embeddings
    with torch.no_grad():
        tower.position_embedding.weight[1:] = TOWER_POSITIONS * sine_grid(grid, vision.hidden_size).flatten(0, 1)
        nn.init.normal_(tower.patch_embedding.weight, std=0.05)
    language = llava.model.language_model
    for module in (language, llava.model.multi_modal_projector):
        start_wide(module)
    with torch.no_grad():
        nn.init.normal_(language.embed_tokens.weight)  # a word stays what it is through the layers
        language.norm.weight *= STATES
        llava.lm_head.weight /= STATES
    return llava


def blank_sam() -> SamModel:
    width, side = 128, SAM_SIDE // SAM_PATCH
    vision = SamVisionConfig(
        hidden_size=128,
        output_channels=width,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=SAM_SIDE,
        patch_size=SAM_PATCH,
        window_size=side // 2,
        global_attn_indexes=[2, 5],
        num_pos_feats=width // 2,
        mlp_dim=512,
        initializer_range=0.02,
    )
    prompt = SamPromptEncoderConfig(
        hidden_size=width, image_size=SAM_SIDE, patch_size=SAM_PATCH, image_embedding_size=side
    )
    decoder = SamMaskDecoderConfig(
        hidden_size=width, mlp_dim=512, num_hidden_layers=2, num_attention_heads=4, iou_head_hidden_dim=width
    )
    sam = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder))
    start_afresh(sam)
    with torch.no_grad():
        sam.vision_encoder.pos_embed.copy_(SAM_POSITIONS * sine_grid(side, vision.hidden_size)[None])
        nn.init.normal_(sam.vision_encoder.patch_embed.projection.weight, std=0.05)
    decoder = sam.mask_decoder
    decoder.transformer.apply(keep_size)
    for part in (decoder.output_hypernetworks_mlps, decoder.upscale_conv1, decoder.upscale_conv2):
        part.apply(partial(keep_size, gain=2**0.5))
    with torch.no_grad():
        for network in decoder.output_hypernetworks_mlps:
            network.proj_out.weight *= 0.4
        for token in (decoder.iou_token, decoder.mask_tokens):
            token.weight *= 0.02  # beside them the question is heard
    return sam


def keep_size(module: nn.Module, gain: float = 1.0) -> None:
    """Weights that neither shrink nor grow a signal. A mask is a product of what became of the question and of the
    picture; with torch's own weights it hardly depends on the question, and hundreds of steps pass before it does."""
    if isinstance(module, nn.Linear | nn.ConvTranspose2d):
        inputs = module.in_features if isinstance(module, nn.Linear) else module.in_channels
        nn.init.normal_(module.weight, std=gain * inputs**-0.5)
        nn.init.zeros_(module.bias)


if __name__ == "__main__":
    raise SystemExit(main())
