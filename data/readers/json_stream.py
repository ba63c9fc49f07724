"""Large JSON files entry by entry: what is in memory is a few megabytes of text and one entry, never the whole file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHUNK = 1 << 22  # characters read at once
SPACE = " \t\n\r"
AFTER = frozenset(SPACE + ",:]}")  # what may follow a value


def read_entries(path: Path) -> Iterator[tuple[str, Any]]:
    """(key, value) of a JSON object in the order of the file; of a value that is a list, (key, entry) for each entry.

    What is damaged or cut off raises ValueError with the file and the place.
    """
    with path.open(encoding="utf-8-sig") as file:
        yield from _Reader(file, path).entries()


class _Reader:
    def __init__(self, file: Any, path: Path):
        self.file, self.path = file, path
        self.text, self.at, self.passed, self.ended = "", 0, 0, False
        self.decode = json.JSONDecoder().raw_decode

    def entries(self) -> Iterator[tuple[str, Any]]:
        self.take("{")
        if self.peek() != "}":
            while True:
                key = self.value()
                self.take(":")
                if self.peek() == "[":
                    for entry in self.items():
                        yield key, entry
                else:
                    yield key, self.value()
                if self.take(",}") == "}":
                    break
        else:
            self.take("}")
        if self.peek():
            raise self.error("text after the end")

    def items(self) -> Iterator[Any]:
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            yield self.value()
            if self.take(",]") == "]":
                return

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in SPACE:
                self.at += 1
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def take(self, choices: str) -> str:
        found = self.peek()
        if not found or found not in choices:
            raise self.error(f"expected {' or '.join(choices)}, found {found or 'the end'}")
        self.at += 1
        return found

    def value(self) -> Any:
        """The next value; it may go on beyond the text read so far unless what follows is no part of a number."""
        self.peek()
        while True:
            try:
                value, end = self.decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if not self.more():
                    raise self.error(error.msg, error.pos) from None
                continue
            except RecursionError:
                raise ValueError(f"{self.path}: its lists and mappings are nested too deeply") from None
            except ValueError as error:  # a whole number of thousands of digits
                raise ValueError(f"{self.path}: {error}") from None
            if self.text[end : end + 1] in AFTER or not self.more():
                self.at = end
                return value

    def more(self) -> bool:
        if self.ended:
            return False
        try:
            chunk = self.file.read(max(CHUNK, len(self.text) - self.at))
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: not utf-8 text: {error.reason} near character {self.passed}") from None
        if not chunk:
            self.ended = True
            return False
        self.passed += self.at
        self.text, self.at = self.text[self.at :] + chunk, 0
        return True

    def error(self, reason: str, at: int | None = None) -> ValueError:
        place = self.passed + (self.at if at is None else at)
        return ValueError(
            f"{self.path}: not valid JSON, perhaps cut off ({reason} at character {place}); copy or download it again"
        )
