"""InternVL folders as the library writes them, with random weights, small enough for milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from transformers import InternVLConfig, InternVLForConditionalGeneration

from tests.tiny_qwen import IMAGE_PAD, TEXT
from tests.tiny_words import tiny_qwen_tokenizer

TEXTS = ("qwen2", "qwen3")
SIDE, PATCH = 16, 4  # of a tile: 4 tokens
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "attention_bias": True,
    "image_size": [SIDE, SIDE],
    "patch_size": [PATCH, PATCH],
}
WORDS = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")


def stock_internvl(
    text: str = "qwen2", seed: int = 0, *, tied: bool = False, vision: dict[str, Any] | None = None, **sizes: Any
) -> InternVLForConditionalGeneration:
    """The library's model, in evaluation mode, with weights of a size that lets every part matter."""
    heads = {"head_dim": 12} if text == "qwen3" else {}
    config = InternVLConfig(
        text_config={"model_type": text, **TEXT, **heads, **sizes},
        vision_config=VISION | (vision or {}),
        image_token_id=IMAGE_PAD,
        image_seq_length=(SIDE // PATCH // 2) ** 2,
        tie_word_embeddings=tied,
    )
    model = InternVLForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 or "norm" not in name:
                weight.normal_(0, 0.2 if weight.dim() > 1 else 0.5, generator=generator)
    return model


def tiny_internvl_tokenizer(folder: Path) -> int:
    """Writes the tokenizer files of an InternVL3 folder; returns the number of its ids."""
    tiny_qwen_tokenizer(folder, version=2)
    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in WORDS])
    tokenizer.save(str(file))
    settings = folder / "tokenizer_config.json"
    values = json.loads(settings.read_text(encoding="utf-8"))
    style = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    described = {str(tokenizer.token_to_id(name)): {"content": name, **style} for name in WORDS}
    values["added_tokens_decoder"] |= described
    settings.write_text(json.dumps(values), encoding="utf-8")
    return tokenizer.get_vocab_size()


def write_internvl(folder: Path) -> dict[str, Any]:
    """A base with its tokenizer; the section of a recipe about it."""
    size = tiny_internvl_tokenizer(folder)
    stock_internvl(vocab_size=size, max_position_embeddings=4096).save_pretrained(folder)
    return {"version": str(folder), "vision_tower": None, "tower": {"max_pixels": 3 * SIDE**2}}
