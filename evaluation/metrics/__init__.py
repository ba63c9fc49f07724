"""Scorers by the name of their metric; importing this package registers them."""

from evaluation.metrics import exact, matched, no_target, overlap, semantic  # noqa: F401
from evaluation.metrics.base import SCORERS, Figure, Scorer

__all__ = ["SCORERS", "Figure", "Scorer"]
