"""Two-way tables of weight names: one list serves for reading a layout and for writing it."""

from __future__ import annotations

import re
from collections.abc import Iterable

Pair = tuple[str, str]
WILDCARDS = {"#": r"(\d+)", "*": r"(.+)"}  # a number; the rest of a name


class NameTable:
    """Pairs of patterns, their name and ours; the first that matches decides.

    `#` stands for a number and `*` for anything; both sides hold the same wildcards in the same order. With the pairs
    ("blocks.#.norm#.*", "layers.#.layer_norm#.*") and ("blocks.*", "layers.*"), in this order,

        blocks.3.norm1.bias  <->  layers.3.layer_norm1.bias
        blocks.3.attn.bias   <->  layers.3.attn.bias
    """

    def __init__(self, pairs: Iterable[Pair]):
        pairs = list(pairs)
        self._ours = [(_compile(theirs), _template(ours)) for theirs, ours in pairs]
        self._theirs = [(_compile(ours), _template(theirs)) for theirs, ours in pairs]

    def to_model(self, name: str) -> str | None:
        """Our name for theirs; None when no pattern matches."""
        return _apply(self._ours, name)

    def to_layout(self, name: str) -> str | None:
        """Their name for ours; None when no pattern matches."""
        return _apply(self._theirs, name)


def under(pairs: Iterable[Pair], theirs: str, ours: str) -> list[Pair]:
    """The same pairs with a prefix before each side."""
    return [(theirs + left, ours + right) for left, right in pairs]


def _compile(pattern: str) -> re.Pattern:
    return re.compile("".join(WILDCARDS.get(part, re.escape(part)) for part in re.split(r"([#*])", pattern)))


def _template(pattern: str) -> str:
    return re.sub(r"[#*]", "{}", pattern)


def _apply(rules: list[tuple[re.Pattern, str]], name: str) -> str | None:
    for pattern, template in rules:
        if match := pattern.fullmatch(name):
            return template.format(*match.groups())
    return None
