"""A LLaVA folder and a SAM file of a small size with weights drawn anew: nothing in them was ever trained.

    python scripts/make_blank_base.py runs/blank

The real architectures at sizes that two CPU cores can train whole, for recipes that start from nothing. The tokenizer,
which is no weight, is the toy base's (assets/toy). The same seed gives the same weights.
"""

import argparse
import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, SamModel

from toy.base.llava import init_by_width
from toy.base.publish import save_llava, save_sam
from toy.base.sam import reset_sam
from toy.base.sizes import TOWER_SIDE, llava_config, sam_config
from toy.base.tower import sine_grid
from toy.base.vocabulary import IMAGE_PATCH, added_ids, load_vocabulary

TOKENIZER = Path(__file__).parents[2] / "assets/toy/llava"
FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SAM_SIDE, PATCH = 256, 16  # the patch is the tower's, too
TOWER_POSITIONS, SAM_POSITIONS = 0.3, 1.2  # size of the sines that position tables start from
STATES = 4.0  # size of the states that words and masks are read from


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default 0)")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    folder = args.out / "llava"
    if folder.is_dir() and any(folder.iterdir()):
        parser.error(f"{folder} is there already; give another OUT, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copy(TOKENIZER / name, folder / name)
    save_llava(blank_llava(folder), args.out)
    print(f"wrote {folder} and {save_sam(blank_sam(), args.out)}")
    return 0


def blank_llava(folder: Path) -> LlavaForConditionalGeneration:
    """CLIP tower, projector and LLaMA with the vocabulary in `folder`."""
    pieces = load_vocabulary(folder)
    images, grid = added_ids(pieces), TOWER_SIDE // PATCH
    vocabulary = pieces.get_piece_size() + len(images)
    config = llava_config(vocabulary, images[IMAGE_PATCH], patch=PATCH, tower_layers=5, width=192, inner=512, layers=3)
    llava = LlavaForConditionalGeneration(config)
    tower = llava.model.vision_tower.embeddings
    with torch.no_grad():
        tower.position_embedding.weight[1:] = TOWER_POSITIONS * sine_grid(
            grid, config.vision_config.hidden_size
        ).flatten(0, 1)
        nn.init.normal_(tower.patch_embedding.weight, std=0.05)
    language = llava.model.language_model
    for module in (language, llava.model.multi_modal_projector):
        init_by_width(module)
    with torch.no_grad():
        nn.init.normal_(language.embed_tokens.weight)  # a word stays what it is through the layers
        language.norm.weight *= STATES
        llava.lm_head.weight /= STATES
    return llava


def blank_sam() -> SamModel:
    side = SAM_SIDE // PATCH
    sam = SamModel(sam_config(SAM_SIDE, PATCH, encoder_width=128, window=side // 2, decoder_heads=4))
    reset_sam(sam)
    with torch.no_grad():
        sam.vision_encoder.pos_embed.copy_(SAM_POSITIONS * sine_grid(side, sam.config.vision_config.hidden_size)[None])
        nn.init.normal_(sam.vision_encoder.patch_embed.projection.weight, std=0.05)
    decoder = sam.mask_decoder
    # A mask is a product of what became of the question and of the picture; with torch's own weights it hardly depends
    # on the question, and hundreds of steps pass before it does.
    init_by_width(decoder.transformer, gain=1.0)
    for part in (decoder.output_hypernetworks_mlps, decoder.upscale_conv1, decoder.upscale_conv2):
        init_by_width(part, gain=2**0.5)
    with torch.no_grad():
        for network in decoder.output_hypernetworks_mlps:
            network.proj_out.weight *= 0.4
        for token in (decoder.iou_token, decoder.mask_tokens):
            token.weight *= 0.02  # beside them the question is heard
    return sam


if __name__ == "__main__":
    raise SystemExit(main())
