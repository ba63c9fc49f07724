"""Limits on what files and prompts from outside may ask for, each changed by the environment variable of its name."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """A largest value, and the environment variable that changes it. Its errors are ValueErrors.

    name: of the environment variable. unit: for messages.
    """

    name: str
    default: int
    unit: str

    @property
    def value(self) -> int:
        text = os.environ.get(self.name, "").strip()
        if not text:
            return self.default
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"the environment variable {self.name} must be a whole number above 0, got {text!r}")
        return int(text)

    def check(self, number: int, what: str) -> None:
        """ValueError if `number` is above the limit. what: the beginning of the message."""
        if number > (most := self.value):
            raise ValueError(
                f"{what}: {number} {self.unit}, more than the limit of {most} (set {self.name} to raise it)"
            )


PIXELS = Limit("ASSISTANT_MAX_PIXELS", 2 * 89_478_485, "pixels")  # of an image or mask; the default is Pillow's own
VIEW = Limit("ASSISTANT_MAX_VIEW", 4096, "pixels per side")  # of the input of a tower or mask encoder
PROMPT = Limit("ASSISTANT_MAX_PROMPT", 32_768, "characters")  # of a question, class lists and dialogues included
NAMES = Limit("ASSISTANT_MAX_NAMES", 200, "names")  # of phrases or classes in one question of the web page
ENTRY = Limit("ASSISTANT_MAX_ENTRY", 2**26, "characters")  # of one entry or line of a file of predictions
ENTRIES = Limit("ASSISTANT_MAX_ENTRIES", 20_000_000, "entries")  # of a file of predictions
MASKS = Limit("ASSISTANT_MAX_MASKS", 2000, "masks")  # of one image in a file of predictions
MASK_PIXELS = Limit("ASSISTANT_MAX_MASK_PIXELS", 2**31, "pixels of masks")  # of one image in a file of predictions
