"""Vision-language models by name; importing this package registers them."""

from model.vlm import internvl, llava, qwen_vl  # noqa: F401
from model.vlm.base import VLMS, VisionLanguageModel

__all__ = ["VLMS", "VisionLanguageModel"]
