"""Mask heads by name; importing this package registers them."""

from model.heads import sam  # noqa: F401
from model.heads.base import HEADS, MaskHead

__all__ = ["HEADS", "MaskHead"]
