"""What every source needs: the registry, finding folders in either layout, reading annotation files, compact rows."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol

from data.readers.index import Fault, Rows, attempt, indexed_rows  # noqa: F401  (part of what a source file imports from here)
from data.readers.json_stream import read_entries  # noqa: F401
from data.types import Record
from utils.images import opened
from utils.plain import parse_json
from utils.registry import Registry, unknown
from utils.text import read_text

SOURCES = Registry("source")
PICTURES = (
    *(".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".avif", ".gif", ".jp2"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
TIFF_SIZE = (256, 257)  # tags of a TIFF's stored width and height
NO_DATA = frozenset({"thumbs.db", "desktop.ini", "__macosx", "@eadir"})  # what file managers leave beside data
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
    """The value of a JSON file under the first encoding that fits; what is damaged raises ValueError with the file."""
    try:
        return parse_json(read_text(path, encodings))
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at line {error.lineno} column {error.colno} of {path.stat().st_size} bytes"
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None
    raise ValueError(f"{path}: not valid JSON, perhaps cut off ({reason}); copy or download it again")


def field(entry: Any, key: str, where: str, kind: type | None = None) -> Any:
    """`entry[key]`, or a ValueError that names the place and the keys there are. kind: str, list or dict, which the
    value must be."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected a mapping with {key!r}, got {type(entry).__name__}")
    if key not in entry:
        raise ValueError(f"{where}: no {key!r}; it has {', '.join(map(str, entry)) or 'no keys'}")
    return entry[key] if kind is None else of_kind(entry[key], kind, key, where)


KINDS = {str: "text", list: "a list", dict: "a mapping"}


def of_kind(value: Any, kind: type, what: str, where: str) -> Any:
    """`value` if it is a `kind` (str, list, dict), else a ValueError that shows what it is."""
    if not isinstance(value, kind):
        raise ValueError(f"{where}: {what} must be {KINDS[kind]}, got {shortened(value)}")
    return value


def spoken(value: Any, what: str, where: str) -> str:
    """Text with something in it besides blanks, which go at both ends."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {what} must be text, got {shortened(value)}")
    return value.strip()


def name_of(value: Any, what: str, where: str) -> str:
    """A class name: text, or a whole number, which is read as written. YAML makes true of a bare yes, a date of
    2024-01-01; what was meant cannot be known then, so these are refused."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        hint = "; a name is text: write it in quotes"
        raise ValueError(f"{where}: {what} is {shortened(value)} ({type(value).__name__}){hint}")
    return value.strip()


def shortened(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + " ..."


def is_data(name: str) -> bool:
    """Whether a file or folder of this name is data: not hidden, and not what file managers put beside it."""
    return not name.startswith(".") and name.lower() not in NO_DATA


def listing(folder: Path) -> Iterator[tuple[str, str]]:
    """(path below `folder`, extension in lower case) of every file that `is_data`, sorted, subfolders included.

    Links are followed, but not back into a folder that is being walked.
    """

    def walk(where: str, below: str, above: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        real = os.path.realpath(where)
        if real in above:
            return
        entries = sorted((entry for entry in os.scandir(where) if is_data(entry.name)), key=lambda entry: entry.name)
        for entry in entries:
            if not entry.is_dir():
                yield below + entry.name, os.path.splitext(entry.name)[1].lower()
        for entry in entries:
            if entry.is_dir():
                yield from walk(entry.path, f"{below}{entry.name}/", (*above, real))

    return walk(str(folder), "", ())


def by_stem(paths: Iterable[str], ends: str = "") -> dict[str, list[str]]:
    """Paths by what is before the extension, and before `ends`; paths that do not end so are left out."""
    found: dict[str, list[str]] = {}
    for path in paths:
        stem = os.path.splitext(path)[0]
        if stem.endswith(ends):
            found.setdefault(stem[: len(stem) - len(ends)], []).append(path)
    return found


def only(paths: Sequence[Any], what: str, folder: Path) -> Any:
    """The one file of a stem; several are an error that names them."""
    if len(paths) > 1:
        names = " and ".join(str(folder / path) for path in paths)
        raise ValueError(f"{names} have the same name: which is the {what}? Keep one of them there")
    return paths[0]


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
    with opened(path) as image:
        width, height = image.size
        if image.format == "TIFF":  # whose size PIL gives as it is shown, or not, by version
            width, height = (image.tag_v2[tag] for tag in TIFF_SIZE)
        turned = image.getexif().get(EXIF_ORIENTATION) in TURNED
    return (width, height) if turned else (height, width)


def orientation(path: Path) -> int:
    """The EXIF orientation of a picture, 1 where there is none or it cannot be read."""
    try:
        with opened(path) as image:
            value = image.getexif().get(EXIF_ORIENTATION, 1)
    except OSError:
        return 1
    return value if value in range(1, 9) else 1


def misfit(image: Path, what: str, drawn: tuple[int, ...], shape: tuple[int, int]) -> str:
    """The message for a mask that is not of the picture's size."""
    turned = if_turned(image, drawn, shape)
    return f"{image}: the mask of {what} is {drawn}, the picture (H, W) {tuple(shape)}{turned}"


def if_turned(image: Path, drawn: tuple[int, ...], shape: tuple[int, int]) -> str:
    """What a turned picture has to do with a mask whose sides are the wrong way round, and what to do about it."""
    if drawn != tuple(shape)[::-1] or (tag := orientation(image)) not in TURNED:
        return ""
    return (
        f"; the picture is turned: its EXIF orientation is {tag}, and its annotations were made of the unturned one. "
        "Turn the annotations as well, or remove the tag so that the picture is shown as it is stored "
        "(exiftool -Orientation= FILE)"
    )


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
