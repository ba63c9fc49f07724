"""Text files as people save them: UTF-8 with or without a byte order mark, or UTF-16 with one."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path

UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: str | Path, encodings: Sequence[str] = ("utf-8-sig",)) -> str:
    """The text of a file under the first encoding that fits; ValueError with the file and the byte if none does."""
    path = Path(path)
    data, reason = path.read_bytes(), ""
    for encoding in ("utf-16",) if data[:2] in UTF_16 else encodings:
        try:
            return data.decode(encoding)
        except UnicodeDecodeError as error:
            reason = reason or f"{error.reason} at byte {error.start}"
            tried = encoding.removesuffix("-sig")
    raise ValueError(f"{path}: not {tried} text ({reason}); save it as UTF-8")
