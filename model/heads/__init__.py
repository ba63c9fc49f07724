"""Mask heads by name; importing this package registers them."""

from model.heads import pixel, sam, sam2, sam3  # noqa: F401
from model.heads.base import HEADS, Decoded, HeadContext, MaskHead

__all__ = ["HEADS", "Decoded", "HeadContext", "MaskHead"]
