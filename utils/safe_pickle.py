"""Safe reading of annotation pickles (`refs(unc).p`): only plain containers, text and numbers, no code."""

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
    """The object in a pickle. ValueError if it asks for a global that is not in ALLOWED, naming file and global.

    A pickle is a program that may call any global; here it can only call those that build plain values. Strings of
    Python 2 pickles are read as UTF-8, or as Latin-1 where that fails. NumPy scalars become Python numbers.
    """
    path = Path(path)
    data = path.read_bytes()
    try:
        try:
            # Python 2 wrote text as bytes without an encoding; Latin-1 decodes any bytes, so it comes second.
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
    """Based on the unpickler in Python, not the one in C.

    The C version allocates its memo up to the largest index that a pickle names, so ten bytes can ask for 32 GB.
    """

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise _Forbidden(f"{module}.{name}") from None


class _Dtype:
    """Replaces numpy.dtype: keeps name and byte order, ignores the rest of the state that the pickle sets."""

    def __init__(self, name: str, *_: Any):
        if not isinstance(name, str) or not re.fullmatch(r"[biuf][1248]", name):
            raise _Forbidden(f"numpy.dtype({name!r})")
        self.name = name

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if ">" in state:  # big-endian; "<" and "|" are how frombuffer reads anyway
            self.name = f">{self.name}"


def _scalar(dtype: _Dtype, raw: bytes | str) -> Any:
    return np.frombuffer(raw.encode("latin-1") if isinstance(raw, str) else raw, dtype.name, count=1)[0].item()


def _encode(text: str, encoding: str) -> bytes:
    """_codecs.encode for Latin-1, which is how Python 3 writes bytes into old pickles.

    No other codec: some run code, others fill the memory.
    """
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
