"""Annotation pickles (`refs(unc).p`) without their power: only plain containers, text and numbers come out."""

from __future__ import annotations

import io
import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

DAMAGE = (EOFError, IndexError, KeyError, AttributeError, TypeError, ValueError, OverflowError, MemoryError)
DAMAGE += (AssertionError, struct.error)


def load_plain(path: str | Path) -> Any:
    """The object of a pickle that calls nothing; otherwise a ValueError that names the file and the global it wanted.

    Strings of Python 2 pickles are read as UTF-8, or as Latin-1 where that fails. NumPy scalars become Python numbers.
    """
    path = Path(path)
    data = path.read_bytes()
    try:
        try:
            return _PlainUnpickler(io.BytesIO(data), encoding="utf-8").load()
        except UnicodeDecodeError:
            return _PlainUnpickler(io.BytesIO(data), encoding="latin-1").load()
    except _Forbidden as error:
        raise ValueError(
            f"{path}: refused, the pickle asks for {error}; an annotation file holds only lists, dicts, text and "
            "numbers. Do not load it another way unless you know who wrote it"
        ) from None
    except (pickle.UnpicklingError, *DAMAGE) as error:
        raise ValueError(f"{path}: not a complete pickle ({error}); copy or download it again") from None


class _Forbidden(Exception):
    """Carries the dotted name of a global that is not on the list."""


class _PlainUnpickler(pickle._Unpickler):
    """Python's own in Python: the one in C makes room for as many objects as the largest place that a pickle puts one
    at, so that ten bytes can ask for 32 GB."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise _Forbidden(f"{module}.{name}") from None


class _Dtype:
    """Stands in for numpy.dtype: keeps its name, ignores the state that the pickle would set."""

    def __init__(self, name: str, *_: Any):
        if not isinstance(name, str) or not re.fullmatch(r"[biuf][1248]", name):
            raise _Forbidden(f"numpy.dtype({name!r})")
        self.name = name

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if ">" in state:
            self.name = f">{self.name}"


def _scalar(dtype: _Dtype, raw: bytes | str) -> Any:
    return np.frombuffer(raw.encode("latin-1") if isinstance(raw, str) else raw, dtype.name, count=1)[0].item()


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes into old pickles; any other codec could be made to run code or fill the memory."""
    if encoding != "latin1":
        raise _Forbidden(f"_codecs.encode(…, {encoding!r})")
    return text.encode("latin-1")


ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("__builtin__", "set"): set,
    ("__builtin__", "frozenset"): frozenset,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("_codecs", "encode"): _encode,
}
