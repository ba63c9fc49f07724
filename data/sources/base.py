"""What every source needs: the registry, finding files in any known layout, reading fields with errors that say where.

Index and row helpers of `data.readers` can be imported from here as well, so a source file needs one import.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol

from PIL.TiffImagePlugin import TiffImageFile

from data.readers.index import Fault, Rows, attempt, indexed_rows, with_slashes  # noqa: F401  (re-exported for source files)
from data.readers.json_stream import read_entries  # noqa: F401
from data.types import Record
from utils.images import TURNED, open_image, orientation_of
from utils.plain import parse_json
from utils.registry import Registry, unknown
from utils.text import preview, read_text

SOURCES = Registry("source")
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".avif", ".gif", ".jp2"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
TIFF_SIZE = (256, 257)  # tags of the width and height that a TIFF stores
NO_DATA = frozenset({"thumbs.db", "desktop.ini", "__macosx", "@eadir"})  # what file managers leave next to data
MOST_KEYS = 12  # that an error shows
BOOLEANS = {"true": True, "false": False}


class EmptySplit(ValueError):
    """The annotation files exist, but hold nothing of the requested split."""


class Source(Protocol):
    """Facts only: a pure map from index to record, one record per image.

    Optional members: `image_paths() -> list[str]`, the image of every record without making the records; `files`, the
    annotation files that it reads; `annotation_paths()`, all annotation files where masks or notes are files as well.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def image_paths(source: Source) -> list[str]:
    """The image of every record: from the source's own `image_paths` if it has it, else from its records."""
    own_paths = getattr(source, "image_paths", None)
    return own_paths() if own_paths else [str(source[index].image) for index in range(len(source))]


def first_of(source: Source, read: Callable[[Record], Any], tries: int = 20) -> Any:
    """`read(record)` for the first record that can be read, None if none of the first `tries` can.

    What is wrong with the others is reported when they are read in earnest.
    """
    for index in range(min(tries, len(source))):
        try:
            return read(source[index])
        except Exception:  # whatever a damaged file may raise
            continue
    return None


def locate(root: Path, what: str, *places: Sequence[str]) -> list[Path]:
    """The paths of the first place of which every part exists below `root`.

    Otherwise FileNotFoundError with all places, and for each how far it exists.
    """
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


def existing_file(root: Path, name: str, what: str) -> Path:
    """A file or folder given in the recipe, below the dataset folder or absolute."""
    if not (root / name).exists():
        raise FileNotFoundError(f"{what}: there is no {root / name}")
    return root / name


def read_json(path: Path, encodings: Sequence[str] = ("utf-8-sig",)) -> Any:
    """The value of a JSON file in the first encoding that fits; a damaged file raises ValueError with its name."""
    try:
        return parse_json(read_text(path, encodings))
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at line {error.lineno} column {error.colno} of {path.stat().st_size} bytes"
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None
    raise ValueError(f"{path}: not valid JSON, perhaps cut off ({reason}); copy or download it again")


def field(entry: Any, key: str, where: str, kind: type | None = None) -> Any:
    """`entry[key]`, or a ValueError that names the place and the keys there are.

    kind: the type that the value must have: str, list or dict.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected a mapping with {key!r}, got {type(entry).__name__}")
    if key not in entry:
        have = [*map(str, islice(entry, MOST_KEYS)), *(["..."] if len(entry) > MOST_KEYS else [])]
        raise ValueError(f"{where}: no {key!r}; it has {', '.join(have) or 'no keys'}")
    return entry[key] if kind is None else of_kind(entry[key], kind, key, where)


def file_field(entry: Any, key: str, where: str) -> str:
    """`field` for the path of a file, with / between its parts."""
    return with_slashes(field(entry, key, where, str))


KINDS: dict[type, str] = {str: "text", list: "a list", dict: "a mapping"}


def of_kind(value: Any, kind: type, what: str, where: str) -> Any:
    """`value` if it is a `kind` (str, list or dict), else a ValueError that shows what it is."""
    if not isinstance(value, kind):
        raise ValueError(f"{where}: {what} must be {KINDS[kind]}, got {preview(value)}")
    return value


def non_blank(value: Any, what: str, where: str) -> str:
    """`value` without outer blanks, if it is text with anything else in it."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {what} must be text, got {preview(value)}")
    return value.strip()


def name_of(value: Any, what: str, where: str) -> str:
    """A class name: text, or a whole number, which is read as written.

    YAML turns a bare yes into true and 2024-01-01 into a date; what was meant cannot be known, so these are refused.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        hint = "; a name is text: write it in quotes"
        raise ValueError(f"{where}: {what} is {preview(value)} ({type(value).__name__}){hint}")
    return value.strip()


def read_bool(value: Any, where: str) -> bool:
    """A bool, or what stands for one in files that went through other tools: 0, 1, "true", "False"."""
    parsed = BOOLEANS.get(value.strip().lower(), value) if isinstance(value, str) else value
    if parsed not in (True, False):
        raise ValueError(f"{where} is {value!r}; expected true or false")
    return bool(parsed)


def is_data(name: str) -> bool:
    """Whether a file or folder of this name is data: not hidden, and not left there by a file manager."""
    return not name.startswith(".") and name.lower() not in NO_DATA


def list_files(folder: Path) -> Iterator[tuple[str, str]]:
    """(path below `folder`, extension in lower case) of every file that `is_data`, sorted, subfolders included.

    Links are followed, but not back into a folder that is being walked, which would never end.
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


def group_by_stem(paths: Iterable[str], ends: str = "") -> dict[str, list[str]]:
    """Paths by their stem: without extension and without the ending `ends`. Paths without that ending are left out."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        stem = os.path.splitext(path)[0]
        if stem.endswith(ends):
            groups.setdefault(stem[: len(stem) - len(ends)], []).append(path)
    return groups


def single_file(paths: Sequence[Any], what: str, folder: Path) -> Any:
    """The only file of a stem; ValueError with their names if there are several."""
    if len(paths) > 1:
        names = " and ".join(str(folder / path) for path in paths)
        raise ValueError(f"{names} have the same name: which is the {what}? Keep one of them there")
    return paths[0]


def file_below(folder: Path, name: Any, where: str, what: str = "image") -> Path:
    """The existing file that an annotation names; see `path_below`. where: the annotation file and the entry."""
    path = path_below(folder, name, where, what)
    if not path.is_file():
        # Letters with accents have two spellings in Unicode, and an export may have changed one into the other.
        spelled = [path.with_name(unicodedata.normalize(form, path.name)) for form in ("NFC", "NFD")]
        hint = "; one of the same letters in another Unicode form is there" if any(p.is_file() for p in spelled) else ""
        raise FileNotFoundError(f"{where}: names the {what} {name!r}, but there is no file {path}{hint}")
    return path


def path_below(folder: Path, name: Any, where: str, what: str = "image") -> Path:
    """`folder / name`; ValueError unless `name` is a relative path that stays below `folder`.

    Annotation files come from strangers, and an absolute path or ".." would let them read any file of this machine.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{where}: names no {what} ({name!r})")
    parts = PurePosixPath(with_slashes(name))
    if parts.is_absolute() or PureWindowsPath(name).drive or ".." in parts.parts:
        raise ValueError(f"{where}: the path {name!r} leaves {folder}; annotations may only name files below it")
    return folder / parts


def image_size(path: Path) -> tuple[int, int]:
    """(H, W) that `read_image` will give, EXIF orientation applied, read from the header alone."""
    with open_image(path) as image:
        width, height = image.size
        if isinstance(image, TiffImageFile):  # Pillow versions differ in whether its `size` is before or after turning
            width, height = (image.tag_v2[tag] for tag in TIFF_SIZE)
        swapped = orientation_of(image) in TURNED
    return (width, height) if swapped else (height, width)


def _first_gap(root: Path, parts: Sequence[str]) -> str:
    """What is missing first of a place, and what its nearest existing folder holds."""
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
    """What a folder holds, as the rest of a sentence."""
    if not folder.exists():
        return "does not exist"
    if not folder.is_dir():
        return "is a file"
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    more = f", … ({len(names)} in all)" if len(names) > at_most else ""
    return f"holds {', '.join(names[:at_most])}{more}" if names else "is empty"
