"""Annotation files are parsed once, into an index on disk that every later start and every worker maps.

An index is a folder `<dataset>/.index/<name>-<key>/`: `rows.jsonl` holds one JSON row per line, `ends.npy` where each
line ends, `images.json` the image of each row, `meta.json` the files it was made from. Rows are decoded when they
are asked for; the mapped pages belong to the page cache, so all processes share them.
"""

from __future__ import annotations

import ctypes
import hashlib
import inspect
import json
import mmap
import os
import re
import shutil
import tempfile
import time
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any, cast

import numpy as np
from filelock import FileLock, Timeout

from utils.log import log

FORMAT = 2  # of the index folder; a change invalidates old ones
HOME = "ASSISTANT_INDEX_DIR"  # environment variable: where indexes go instead of into the dataset folder
DRAFT = re.compile(r"(.+-[0-9a-f]{16})\.\w{8}(?:\.old)?")  # name of a folder that is being written, or removed
ROWS, ENDS, IMAGES, META = "rows.jsonl", "ends.npy", "pictures.json", "meta.json"
PROJECT = Path(__file__).resolve().parents[2]
GIVE_BACK = 1000  # reads after which a process unmaps the pages that it has touched; they stay in the page cache
SLOW = 5.0  # seconds from which building an index is worth a message
FAULT = "\0fault"  # key of a row that stands for a bad entry
_keep_faults = False


@dataclass(frozen=True)
class Fault:
    """Stands in for the row of a bad entry; reading that row raises ValueError.

    text: what is wrong with the entry. image: the name of its image, "" if it is not known.
    """

    text: str
    image: str = ""


def attempt(make: Callable[[], Any], image: Any = "") -> Any:
    """`make()`, or a Fault with the ValueError that it raises. image: the name of the entry's image."""
    try:
        return make()
    except ValueError as error:
        return Fault(str(error), with_slashes(image) if isinstance(image, str) else "")


def with_slashes(name: str) -> str:
    """A path as an annotation file writes it, with / between its parts: in files made on Windows it is a backslash."""
    return name.replace("\\", "/")


@contextmanager
def keeping_faults(keep: bool = True) -> Generator[None]:
    """Inside this block, sources with bad entries can be opened; reading the record of one raises ValueError.

    Outside, the first bad entry of a file is raised when the source is opened, long before training samples it.
    """
    global _keep_faults
    before = _keep_faults
    _keep_faults = keep
    try:
        yield
    finally:
        _keep_faults = before


class Rows:
    """JSON values packed in one buffer and decoded on access: in memory, or mapped from an index (`indexed_rows`).

    One buffer, because Python objects would take several times the memory, and every forked worker would copy them
    page by page as it touches their reference counts.

    image_key: the key or index of the image's name in a row, for sources with one row per image.
    """

    def __init__(self, rows: Iterable[Any], image_key: str | int | None = None):
        buffer, ends = bytearray(), array("q", [0])
        self.folder: Path | None = None  # of the index; None: in memory
        self.faults: list[int] = []  # numbers of the rows that stand for bad entries
        self._image_key = image_key
        self._reads = 0
        for line in _lines(_note_faults(rows, self.faults)):
            buffer += line
            ends.append(len(buffer))
        self._buffer: bytearray | bytes | mmap.mmap = buffer
        self._ends: array[int] | np.ndarray = ends  # row i is _buffer[_ends[i] : _ends[i + 1]]

    @classmethod
    def load(cls, folder: Path, made_from: dict[str, Any]) -> Rows | None:
        """The rows of the index in `folder`; None if there is none, or if it is damaged or made from other files."""
        try:
            meta = json.loads((folder / META).read_bytes())
            ends = np.load(folder / ENDS, mmap_mode="r", allow_pickle=False)
            with (folder / ROWS).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except (OSError, ValueError, EOFError):
            return None
        complete = ends.dtype == np.int64 and ends.shape == (meta.get("rows", -1) + 1,) and ends[0] == 0
        if not complete or ends[-1] != size or meta.get("made_from") != made_from:
            return None
        rows = cls((), meta["picture"])
        rows._buffer, rows._ends = buffer, ends
        rows.folder = folder
        rows.faults = meta.get("faults", [])
        return rows

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Any:
        row = self._decode(index)
        if isinstance(row, dict) and FAULT in row:
            raise ValueError(row[FAULT])
        return row

    def sound(self, count: int | None = None) -> Iterator[Any]:
        """Those of the first `count` rows (None: of all) that do not stand for bad entries."""
        bad = set(self.faults)
        return (self[index] for index in range(len(self))[:count] if index not in bad)

    def _decode(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        self._reads += 1
        if isinstance(self._buffer, mmap.mmap) and self._reads % GIVE_BACK == 0:
            self._buffer.madvise(
                mmap.MADV_DONTNEED
            )  # else the full index would count as this process's memory, in time
        line = self._buffer[int(self._ends[index]) : int(self._ends[index + 1])]
        try:
            return json.loads(line)
        except ValueError as error:
            raise ValueError(f"{self.folder}: row {index} is damaged ({error}); remove that folder") from None

    def image_names(self) -> list[str]:
        """The image's name of every row; an index has them in a file of their own, so no row is decoded."""
        if self._image_key is None:
            raise TypeError("these rows were made without an image_key, which says where a row names its image")
        if self.folder is not None:
            return json.loads((self.folder / IMAGES).read_bytes())
        rows = [self._decode(index) for index in range(len(self))]
        return [row["picture"] if isinstance(row, dict) and FAULT in row else row[self._image_key] for row in rows]

    def __reduce__(self) -> tuple:
        """A copy in another process maps the index again instead of receiving it."""
        if self.folder is None:
            return _from_memory, (bytes(self._buffer), self._ends, self._image_key, self.faults)
        return _from_folder, (self.folder,)


def indexed_rows(
    root: Path,
    parse: Callable[..., Iterable[Any]],
    files: Sequence[Path],
    *options: Any,
    image_key: str | int | None = None,
) -> Rows:
    """The rows of `parse(*files, *options)`, from an index if there is one of the same files, options and code.

    A missing, stale or damaged index is built again by one process while the others wait, and appears in one step. If
    the dataset folder cannot be written, `~/.cache/assistant_index` is used; if that cannot either, the rows stay in
    memory.

    options: plain values, or functions, which count as changed when their file does.
    image_key: see `Rows`.
    Raises ValueError at a bad entry (`Fault`), unless `keeping_faults` leaves that to the record.
    """
    rows = _indexed(root, parse, files, options, image_key)
    if rows.faults and not _keep_faults:
        more = ""
        if len(rows.faults) > 1:
            more = f" ({len(rows.faults)} entries are bad; data.on_bad_sample=skip leaves them out)"
        try:
            rows[rows.faults[0]]
        except ValueError as error:
            raise ValueError(f"{error}{more}") from None
    return rows


def _indexed(
    root: Path, parse: Callable[..., Iterable[Any]], files: Sequence[Path], options: Sequence[Any], image_key: Any
) -> Rows:
    name = _name(root, parse, files, options, image_key)
    made_from = _fingerprint(root, files)
    places = index_folders(root)
    # Reading needs no lock: an index appears under its name in one rename, complete.
    for home in places:
        if rows := Rows.load(home / name, made_from):
            return rows
    for home in places:
        try:
            home.mkdir(parents=True, exist_ok=True)
            lock = FileLock(home / f"{name}.lock")  # per index, so that processes can build different ones
            _acquire(lock, files)
        except (OSError, NotImplementedError):
            continue
        try:
            rows = Rows.load(home / name, made_from)  # another process may have built it while this one waited
            return rows or _build(home / name, parse(*files, *options), image_key, made_from, files)
        finally:
            lock.release()
    log.warning("no index of %s: none of %s can be written; set %s", files[0], ", ".join(map(str, places)), HOME)
    return Rows(parse(*files, *options), image_key)


def set_index_folder(folder: str | None) -> None:
    """Keep indexes below `folder` from now on, in this process and those that it starts; None changes nothing."""
    if folder is not None:
        os.environ[HOME] = str(Path(folder).absolute())


def _build(
    folder: Path, rows: Iterable[Any], image_key: str | int | None, made_from: dict, files: Sequence[Path]
) -> Rows:
    """Writes the index next to its place, then moves it there; what was there before goes."""
    _sweep(folder)
    started = time.monotonic()
    ends = array("q", [0])
    names: list[str] = []  # of the images
    faults: list[int] = []
    draft = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        with (draft / ROWS).open("wb", buffering=1 << 20) as file:
            for line in _lines(_note_faults(_note_images(rows, image_key, names), faults)):
                ends.append(ends[-1] + file.write(line))
        np.save(draft / ENDS, np.frombuffer(ends, np.int64))
        (draft / IMAGES).write_text(json.dumps(names))
        meta = {"rows": len(ends) - 1, "picture": image_key, "faults": faults, "made_from": made_from}
        (draft / META).write_text(json.dumps(meta, indent=1))
        draft.chmod(0o755)  # mkdtemp makes folders that other users cannot read
        _swap(draft, folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    if (seconds := time.monotonic() - started) > SLOW:
        log.info("indexed %s in %.0f s: %s", ", ".join(path.name for path in files), seconds, folder)
    index = Rows.load(folder, made_from)
    _give_back_memory()
    if index is None:
        raise OSError(f"the index just written to {folder} cannot be read back")
    return index


def _sweep(folder: Path) -> None:
    """Removes the drafts that processes left next to `folder` when they were killed.

    This process holds the lock of `folder`; drafts of other indexes go only if nobody holds their lock.
    """
    for draft in folder.parent.iterdir():
        name = DRAFT.fullmatch(draft.name)
        if not name or not draft.is_dir():
            continue
        if name[1] == folder.name:
            shutil.rmtree(draft, ignore_errors=True)
            continue
        with suppress(Timeout), FileLock(folder.with_name(f"{name[1]}.lock"), timeout=0):
            shutil.rmtree(draft, ignore_errors=True)


def _give_back_memory() -> None:
    """Returns the memory that parsing took to the system; glibc would keep it for this process."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _swap(draft: Path, folder: Path) -> None:
    """Puts the draft in place of `folder`. Processes that have the old index mapped keep its pages."""
    # A folder that is not empty cannot be replaced in one rename, so the old one makes way first. A process that looks
    # in between finds no index and waits for the lock.
    old = folder.with_name(f"{draft.name}.old")
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _lines(rows: Iterable[Any]) -> Iterator[bytes]:
    for row in rows:
        yield json.dumps(row, separators=(",", ":")).encode("ascii") + b"\n"


def _note_images(rows: Iterable[Any], image_key: str | int | None, names: list[str]) -> Iterator[Any]:
    """The rows as they come; their images are noted."""
    for row in rows:
        if image_key is not None:
            names.append(row.image if isinstance(row, Fault) else row[image_key])
        yield row


def _note_faults(rows: Iterable[Any], faults: list[int]) -> Iterator[Any]:
    """The rows as JSON takes them; the numbers of the bad ones are noted."""
    for number, row in enumerate(rows):
        if isinstance(row, Fault):
            faults.append(number)
            row = {FAULT: row.text, "picture": row.image}
        yield row


def _acquire(lock: FileLock, files: Sequence[Path]) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another process that indexes %s", ", ".join(map(str, files)))
        lock.acquire()


def index_folders(root: Path) -> list[Path]:
    """Where the indexes of a dataset folder may be, best first."""
    root_name = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]  # keeps dataset folders apart
    if home := os.environ.get(HOME):
        return [Path(home) / root_name]
    return [root / ".index", Path.home() / ".cache" / "assistant_index" / root_name]


def _fingerprint(root: Path, files: Sequence[Path]) -> dict[str, list[int]]:
    """Size and time of modification of the annotation files: when these differ, an index is stale.

    By size and time, not by content: reading gigabytes at every start would cost what the index saves. By paths below
    the dataset folder, so that the index stays valid when that folder is moved. The parsing code is not part of it but
    of the index's name (`_name`): different code has different indexes, which live next to each other.
    """
    return {_below(root, path): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def _name(root: Path, parse: Callable, files: Sequence[Path], options: Sequence[Any], image_key: Any) -> str:
    """Folder name of the index: another one for other files, other code or other options."""
    what = [
        FORMAT,
        _code(cast(FunctionType, parse)),
        [_below(root, path) for path in files],
        [_plain(o) for o in options],
        image_key,
    ]
    label = re.sub(r"[^\w.+-]+", "_", "-".join(Path(_below(root, files[0])).parts[-2:])).strip("_")
    return f"{label}-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}"


def _plain(option: Any) -> Any:
    return _code(cast(FunctionType, option)) if callable(option) else option


def _code(function: FunctionType) -> list[Any]:
    """What identifies the code of a parsing function: its name and line, and a digest of the source that it may run.

    That source is the function's own file, and every project file that defines a function which that file imports: for
    `parse` of data/sources/refer.py, among others data/readers/coco_file.py, since refer.py imports `rasterize` from
    there. So editing a parser, or a helper that it imports, builds the index again, and nobody trains on the rows of
    an older parser; editing a class list or another source does not. Imports are followed one level only: a helper of
    a helper is missed, and FORMAT is there to be raised for such a change.
    """
    module = inspect.getmodule(function)
    imported = [value for value in vars(module).values() if inspect.isfunction(value)]
    files = {Path(inspect.getsourcefile(value) or "") for value in [function, *imported]}
    texts = [path.read_bytes() for path in sorted(files) if path.is_relative_to(PROJECT)]
    # The line distinguishes lambdas and local functions of one name.
    place = [function.__module__, function.__qualname__, function.__code__.co_firstlineno]
    return [*place, hashlib.sha256(b"\0".join(texts)).hexdigest()]


def _below(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path.absolute())


def _from_memory(buffer: bytes, ends: array, image_key: str | int | None, faults: list[int]) -> Rows:
    """Rows from their pickled parts."""
    rows = Rows((), image_key)
    rows._buffer, rows._ends, rows.faults = bytearray(buffer), ends, faults
    return rows


def _from_folder(folder: Path) -> Rows:
    """Rows from the index that they were mapped from, whatever files it was made from."""
    made_from = json.loads((folder / META).read_bytes())["made_from"]
    rows = Rows.load(folder, made_from)
    if rows is None:
        raise OSError(f"{folder}: the index is damaged; remove that folder")
    return rows
