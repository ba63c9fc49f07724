"""What a language model has read of a conversation, so that its next round costs its own tokens only."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import takewhile
from typing import cast

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


@dataclass
class Past:
    """Of one row: the ids that have been read (an image as IMAGE_ID per token), with the keys and values of their
    positions. The image of a row must not change."""

    ids: list[int] = field(default_factory=list)
    cache: DynamicCache | None = None

    def resume(self, ids: list[int], fresh: DynamicCache) -> tuple[DynamicCache, int]:
        """The cache with which to read `ids`, and the number of them that are already in it.

        That is the beginning that both have in common, whatever made them differ: a round that was dropped, or words
        that became other ids. What lies beyond it is forgotten. The last id is always left to be read: its state
        predicts the first new token. fresh: an empty cache.
        """
        pairs = zip(self.ids, ids[:-1], strict=False)
        known = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        layers = [] if self.cache is None else cast(list[DynamicLayer], self.cache.layers)
        # A layer may hold more than `ids` says, and more than the next one does: a reading that was interrupted.
        surplus = [layer.get_seq_length() - known for layer in layers]
        if self.cache is None or known == 0 or (any(surplus) and not self.cache.is_croppable):
            self.ids.clear()
            self.cache = fresh
            return fresh, 0
        del self.ids[known:]  # first: an interrupt may leave more in the cache than here, never less
        for layer, extra in zip(layers, surplus, strict=True):
            if extra:
                layer.crop(-extra)
        return self.cache, known
