"""The sizes of released Qwen2.5-VL and Qwen3-VL, as in their `config.json`, for planning without the weights."""

from __future__ import annotations

from typing import Any

_TEXT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_VISION = ("hidden_size", "intermediate_size", "depth")


def _qwen2_5(text: tuple[int, ...], vocabulary: int) -> dict[str, Any]:
    vision = dict(zip(_VISION, (1280, 3420, 32), strict=True)) | {"num_heads": 16, "out_hidden_size": text[0]}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    sizes = dict(zip(_TEXT, text, strict=True)) | {"vocab_size": vocabulary, "rope_parameters": rope}
    return {"text_config": sizes, "vision_config": vision}


def _qwen3(text: tuple[int, ...], vision: tuple[int, ...], deepstack: list[int]) -> dict[str, Any]:
    tower: dict[str, Any] = {**dict(zip(_VISION, vision, strict=True)), "num_heads": 16, "out_hidden_size": text[0]}
    tower |= {"num_position_embeddings": 2304, "deepstack_visual_indexes": deepstack}
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    sizes = dict(zip(_TEXT, text, strict=True)) | {"head_dim": 128, "vocab_size": 151936, "rope_parameters": rope}
    return {"text_config": sizes, "vision_config": tower}


QWEN2_5_VL = {
    "Qwen2.5-VL-3B": _qwen2_5((2048, 11008, 36, 16, 2), 151936),
    "Qwen2.5-VL-7B": _qwen2_5((3584, 18944, 28, 28, 4), 152064),
}
QWEN3_VL = {
    "Qwen3-VL-2B": _qwen3((2048, 6144, 28, 16, 8), (1024, 4096, 24), [5, 11, 17]),
    "Qwen3-VL-4B": _qwen3((2560, 9728, 36, 32, 8), (1024, 4096, 24), [5, 11, 17]),
    "Qwen3-VL-8B": _qwen3((4096, 12288, 36, 32, 8), (1152, 4304, 27), [8, 16, 24]),
}
