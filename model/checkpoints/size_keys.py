"""Which keys of a part's configuration are sizes, and what bounds them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SizeKeys:
    """Keys of a backbone's or a mask head's configuration, by what they count. `bounds.check_sizes` uses them."""

    widths: frozenset[str]  # sides of weights: at most the largest side of all weights
    counts: frozenset[str]  # of modules: at most the number of weights
    others: frozenset[str] = frozenset()  # no sizes of weights
    parts: tuple[str, ...] = ()  # keys that hold a mapping of such keys

    @property
    def all(self) -> set[str]:
        return {*self.widths, *self.counts, *self.others, *self.parts}
