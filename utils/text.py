"""Reading text files as people save them (UTF-8 with or without a byte order mark, or UTF-16), and quoting values."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import Any

UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: str | Path, encodings: Sequence[str] = ("utf-8-sig",)) -> str:
    """The text of a file, decoded with the first encoding that fits.

    A byte order mark of UTF-16 wins over `encodings`. ValueError with the file and the byte if none fits.
    """
    path = Path(path)
    data = path.read_bytes()
    reason, tried = "", ""
    for encoding in ("utf-16",) if data[:2] in UTF_16 else encodings:
        try:
            return data.decode(encoding)
        except UnicodeDecodeError as error:
            reason = reason or f"{error.reason} at byte {error.start}"
            tried = encoding.removesuffix("-sig")
    raise ValueError(f"{path}: not {tried} text ({reason}); save it as UTF-8")


def preview(value: Any, limit: int = 80) -> str:
    """The beginning of a value's repr, for error messages."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]} ..."
