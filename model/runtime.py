"""Speed and memory switches of a model in one typed place: how it computes, not what."""

from __future__ import annotations

from dataclasses import dataclass

from utils.config import Recipe


@dataclass(frozen=True)
class RuntimeOptions:
    """Outputs are the same up to rounding whatever is set; `full_size_masks` alone changes where masks are compared."""

    pack_rows: bool = False  # the dialogues of an image share their common prefix in training
    pack_length: int = 0  # positions up to which images share a sequence; 0: none do
    draft_tokens: int = 32  # of an answer, drafted and verified in one pass (model/vlm/draft.py); 0: none
    checkpoint_decoder: bool = False  # masks are decoded again in the backward pass, not kept
    full_size_masks: bool = True  # training masks at the size of the image; else as the mask decoder gives them


def training_options(recipe: Recipe, *, pack_rows: bool) -> RuntimeOptions:
    """Of a recipe, for training. pack_rows: whether its attention can pack (`prefix_packing.can_pack`).

    ZeRO-3 gathers weights with all processes at every pass, and the number of decoder chunks differs between them:
    masks are then decoded in one piece and kept.
    """
    return RuntimeOptions(
        pack_rows=pack_rows,
        pack_length=recipe.model.pack_length,
        draft_tokens=recipe.model.draft_tokens,
        checkpoint_decoder=recipe.model.decoder_checkpointing and recipe.train.zero_stage != 3,
        full_size_masks=recipe.loss.mask_size == "full",
    )


def inference_options(recipe: Recipe, *, pack_rows: bool) -> RuntimeOptions:
    """Of a recipe, for evaluation and chat (teacher forcing packs rows, too)."""
    model = recipe.model
    return RuntimeOptions(pack_rows=pack_rows, pack_length=model.pack_length, draft_tokens=model.draft_tokens)
