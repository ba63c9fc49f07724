"""Large JSON files entry by entry: in memory are a few megabytes of text and one entry, never the full file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.limits import Limit
from utils.plain import not_finite, parse_json

CHUNK = 1 << 22  # characters read at once
SPACE = " \t\n\r"
AFTER = frozenset(SPACE + ",:]}")  # what may follow a value


def read_entries(path: Path) -> Iterator[tuple[str, Any]]:
    """(key, value) of a JSON object in the order of the file; for a value that is a list, (key, entry) per entry.

    A damaged or truncated file raises ValueError with its name and the place.
    """
    with path.open(encoding="utf-8-sig") as file:
        yield from _Reader(file, path).entries()


def read_list(path: Path, limit: Limit) -> Iterator[Any]:
    """The entries of a JSON file that is one list, with finite numbers only; an entry longer than `limit` is refused.

    A damaged or truncated file raises ValueError with its name and the place.
    """
    with path.open(encoding="utf-8-sig") as file:
        reader = _Reader(file, path, limit)
        yield from reader.items()
        if reader.peek():
            raise reader.error("text after the end")


def read_json_lines(path: Path, limit: Limit) -> Iterator[tuple[int, Any]]:
    """(number, value) of the lines of a file that hold anything, with finite numbers only.

    A line that is no JSON, or longer than `limit`, raises ValueError with file and line.
    """
    with path.open(encoding="utf-8-sig", errors="strict") as file:
        number = 0
        while True:
            number += 1
            try:
                text = file.readline(limit.value + 1)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number} or later: not utf-8 text: {error.reason}") from None
            if not text:
                return
            limit.check(len(text), f"{path}, line {number}")
            if text.strip():
                try:
                    yield number, parse_json(text, finite=True)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from None


class _Reader:
    """A window over the file that moves forward: `text` is the window, `at` the next character in it.

    limit: on a single value, which is the most that the window has to hold; finite numbers only if there is one.
    """

    def __init__(self, file: Any, path: Path, limit: Limit | None = None):
        self.file = file
        self.path = path
        self.text = ""
        self.at = 0
        self.before = 0  # characters of the file before the window
        self.at_end = False  # of the file
        self.limit = limit
        self.decode = json.JSONDecoder(parse_constant=not_finite if limit else None).raw_decode

    def entries(self) -> Iterator[tuple[str, Any]]:
        if self.peek() == "[":
            raise self.error("a list, where an object with its lists under their names is expected")
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
        """The next character that is not white space; "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in SPACE:
                self.at += 1
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def take(self, choices: str) -> str:
        """Consumes the next character that is not white space, which must be one of `choices`."""
        character = self.peek()
        if not character or character not in choices:
            raise self.error(f"expected {' or '.join(choices)}, found {character or 'the end'}")
        self.at += 1
        return character

    def value(self) -> Any:
        """The next value.

        The window may end inside it. Then decoding fails, and more text is read; but a number cut in two still decodes
        ("12" of "123"), so a value only counts once the character after it is in the window and ends a value.
        """
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
            except ValueError as error:  # a whole number with thousands of digits
                raise ValueError(f"{self.path}: {error}") from None
            if self.limit:
                self.limit.check(end - self.at, f"{self.path}: the entry at character {self.before + self.at}")
            if self.text[end : end + 1] in AFTER or not self.more():
                self.at = end
                return value

    def more(self) -> bool:
        """Moves the window to `at` and reads on; False at the end of the file.

        At least as much as the window still holds, so that it doubles: a huge entry is then decoded a logarithmic
        number of times.
        """
        if self.at_end:
            return False
        if self.limit and self.at < len(self.text):
            self.limit.check(len(self.text) - self.at, f"{self.path}: the entry at character {self.before + self.at}")
        try:
            chunk = self.file.read(max(CHUNK, len(self.text) - self.at))
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: not utf-8 text: {error.reason} near character {self.before}") from None
        if not chunk:
            self.at_end = True
            return False
        self.before += self.at
        self.text = self.text[self.at :] + chunk
        self.at = 0
        return True

    def error(self, reason: str, at: int | None = None) -> ValueError:
        place = self.before + (self.at if at is None else at)
        return ValueError(
            f"{self.path}: not valid JSON, perhaps cut off ({reason} at character {place}); copy or download it again"
        )
