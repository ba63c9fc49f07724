"""What every source needs: the registry, finding folders in either layout, reading annotation files, compact rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol

from PIL import Image, UnidentifiedImageError

from data.sources.index import Rows, indexed  # noqa: F401  (part of what a source file imports from here)
from data.sources.stream import read_entries  # noqa: F401
from data.types import Record
from utils.registry import Registry, unknown

SOURCES = Registry("source")
EXIF_ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # values of the tag with which rows and columns change places


class EmptySplit(ValueError):
    """The annotation files are there, but hold nothing of the split that was asked for."""


class Source(Protocol):
    """Facts only: a pure map from index to record, one record a picture.

    A source may have `image_paths() -> list[str]`, the picture of every record without making the records, `files`, the
    annotation files it reads, and `annotation_paths()`, all of these where masks or notes stand in files of their own.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def image_paths(source: Source) -> list[str]:
    """The picture of every record: what the source lists itself, else what its records say."""
    listed = getattr(source, "image_paths", None)
    return listed() if listed else [str(source[index].image) for index in range(len(source))]


def first_of(source: Source, read: Callable[[Record], Any], tries: int = 20) -> Any:
    """`read` of the first record of which that is possible, None where it is of none of the first few; what is wrong
    with the others is found, and said, when their turn comes."""
    for index in range(min(tries, len(source))):
        try:
            return read(source[index])
        except Exception:  # whatever a damaged file may raise
            continue
    return None


def locate(root: Path, what: str, *places: Sequence[str]) -> list[Path]:
    """The first place whose every part exists below `root`; FileNotFoundError with all places and what is there."""
    for parts in places:
        paths = [root / part for part in parts]
        if all(path.exists() for path in paths):
            return paths
    tried = "\n".join(f"  {' + '.join(parts)}{_first_gap(root, parts)}" for parts in places)
    raise FileNotFoundError(f"{what} not found below {root}, which {_holding(root)}. Expected one of:\n{tried}")


def choice(what: str, value: str, choices: Iterable[str]) -> str:
    """`value` if it is one of the choices, else a ValueError that lists them."""
    if value not in (choices := list(choices)):
        raise ValueError(unknown(what, str(value), choices))
    return value


def read_json(path: Path, encodings: Sequence[str] = ("utf-8-sig",)) -> Any:
    """The value of a JSON file under the first encoding that works; what is damaged raises ValueError with the file."""
    data, reason = path.read_bytes(), ""
    for encoding in encodings:
        try:
            return json.loads(data.decode(encoding))
        except UnicodeDecodeError as error:
            reason = reason or f"not {encoding}: {error.reason} at byte {error.start}"
        except json.JSONDecodeError as error:
            reason = reason or f"{error.msg} at line {error.lineno} column {error.colno} of {len(data)} bytes"
    raise ValueError(f"{path}: not valid JSON, perhaps cut off ({reason}); copy or download it again")


def field(entry: Any, key: str, where: str) -> Any:
    """`entry[key]`, or a ValueError that names the place and the keys there are."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected a mapping with {key!r}, got {type(entry).__name__}")
    if key not in entry:
        raise ValueError(f"{where}: no {key!r}; it has {', '.join(map(str, entry)) or 'no keys'}")
    return entry[key]


def picture(folder: Path, name: Any, where: str, what: str = "picture") -> Path:
    """The file that an annotation names, which must lie below `folder`; `where`: the annotation file and the entry."""
    path = inside(folder, name, where, what)
    if not path.is_file():
        raise FileNotFoundError(f"{where}: names the {what} {name!r}, but there is no file {path}")
    return path


def inside(folder: Path, name: Any, where: str, what: str = "picture") -> Path:
    """`folder / name`, refused where `name` is no relative path that stays below `folder`."""
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{where}: names no {what} ({name!r})")
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or PureWindowsPath(name).drive or ".." in parts.parts:
        raise ValueError(f"{where}: the path {name!r} leaves {folder}; annotations may only name files below it")
    return folder / parts


def picture_size(path: Path) -> tuple[int, int]:
    """(H, W) of a picture as `read_image` will give it (EXIF orientation applied), from its header."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(EXIF_ORIENTATION) in TURNED
    except (UnidentifiedImageError, OSError) as error:
        raise OSError(f"cannot read picture {path}: {error}") from None
    return (width, height) if turned else (height, width)


def _first_gap(root: Path, parts: Sequence[str]) -> str:
    for part in parts:
        if (root / part).exists():
            continue
        missing = root / part
        while missing.parent != root and not missing.parent.exists():
            missing = missing.parent
        near = "" if missing.parent == root else f"; {missing.parent.relative_to(root)} {_holding(missing.parent)}"
        return f"  (no {missing.relative_to(root)}{near})"
    return ""


def _holding(folder: Path, at_most: int = 12) -> str:
    if not folder.exists():
        return "does not exist"
    if not folder.is_dir():
        return "is a file"
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    more = f", … ({len(names)} in all)" if len(names) > at_most else ""
    return f"holds {', '.join(names[:at_most])}{more}" if names else "is empty"
