"""Vision towers of a LLaVA by the `model_type` of their `config.json`; importing this package registers them."""

from model.vlm.towers import clip, dinov2, dinov3, siglip  # noqa: F401
from model.vlm.towers.base import TOWERS, TowerFamily, tower_family

__all__ = ["TOWERS", "TowerFamily", "tower_family"]
