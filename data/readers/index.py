"""Annotation files are parsed once, into an index on disk that every later start and every worker maps.

An index is a folder `<dataset>/.index/<name>-<key>/`: `rows.jsonl` holds one JSON row a line, `ends.npy` where each
line ends, `pictures.json` the picture of each row, `meta.json` the files it was made from. Rows are decoded when they
are asked for; the mapped pages belong to the page cache, so processes share them.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from utils.log import log

FORMAT = 2  # of the folder; a change makes old ones useless
HOME = "ASSISTANT_INDEX_DIR"  # environment: where indexes go instead of into the dataset folder
DRAFT = re.compile(r"(.+-[0-9a-f]{16})\.\w{8}(?:\.old)?")  # name of a folder that is being made, or makes way
ROWS, ENDS, PICTURES, META = "rows.jsonl", "ends.npy", "pictures.json", "meta.json"
PROJECT = Path(__file__).resolve().parents[2]
GIVE_BACK = 1000  # reads after which a process lets go of the pages it has mapped; they stay in the page cache
SLOW = 5.0  # seconds from which making an index is worth a message
FAULT = "\0fault"  # the key of a row that stands for a bad entry
_keep_faults = False


@dataclass(frozen=True)
class Fault:
    """In the place of a row: what is wrong with an entry of an annotation file, to be raised where its row is asked
    for. picture: its picture's name, as far as that is known."""

    text: str
    picture: str = ""


def attempt(make: Callable[[], Any], picture: Any = "") -> Any:
    """The row that `make` gives, or the fault that it finds."""
    try:
        return make()
    except ValueError as error:
        return Fault(str(error), picture if isinstance(picture, str) else "")


@contextmanager
def keeping_faults(keep: bool = True) -> Iterator[None]:
    """In this block sources open although some of their entries are bad; reading the record of one raises ValueError.

    Otherwise the first bad entry of a file is raised when it is opened, so that nobody waits until it is drawn.
    """
    global _keep_faults
    before, _keep_faults = _keep_faults, keep
    try:
        yield
    finally:
        _keep_faults = before


class Rows:
    """JSON values packed in one buffer and decoded when asked for: in memory, or mapped from an index (`indexed`).

    picture: the key or place of the picture's name in a row, for sources whose rows are pictures.
    """

    def __init__(self, rows: Iterable[Any], picture: str | int | None = None):
        self._buffer, self._ends, self._picture, self.folder = bytearray(), array("q", [0]), picture, None
        self._reads, self.faults = 0, []
        for line in _lines(_noting(rows, self.faults)):
            self._buffer += line
            self._ends.append(len(self._buffer))

    @classmethod
    def load(cls, folder: Path, made_from: dict[str, Any]) -> Rows | None:
        """The index in `folder`; None if there is none, it was made from other files, or it is damaged."""
        try:
            meta = json.loads((folder / META).read_bytes())
            ends = np.load(folder / ENDS, mmap_mode="r", allow_pickle=False)
            with (folder / ROWS).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except (OSError, ValueError, EOFError):
            return None
        whole = ends.dtype == np.int64 and ends.shape == (meta.get("rows", -1) + 1,) and ends[0] == 0
        if not whole or ends[-1] != size or meta.get("made_from") != made_from:
            return None
        rows = cls(())
        rows._buffer, rows._ends, rows._picture, rows.folder = buffer, ends, meta["picture"], folder
        rows.faults = meta.get("faults", [])
        return rows

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Any:
        row = self._decoded(index)
        if isinstance(row, dict) and FAULT in row:
            raise ValueError(row[FAULT])
        return row

    def _decoded(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        self._reads += 1
        if self.folder is not None and self._reads % GIVE_BACK == 0:
            self._buffer.madvise(mmap.MADV_DONTNEED)  # or else the whole index would count as resident, in time
        line = self._buffer[int(self._ends[index]) : int(self._ends[index + 1])]
        try:
            return json.loads(line)
        except ValueError as error:
            raise ValueError(f"{self.folder}: row {index} is damaged ({error}); remove that folder") from None

    def pictures(self) -> list[str]:
        """The picture's name of every row, without decoding the rows where an index keeps them."""
        if self._picture is None:
            raise TypeError("these rows were made without saying where a row names its picture")
        if self.folder is not None:
            return json.loads((self.folder / PICTURES).read_bytes())
        rows = [self._decoded(index) for index in range(len(self))]
        return [row["picture"] if isinstance(row, dict) and FAULT in row else row[self._picture] for row in rows]

    def __reduce__(self) -> tuple:
        """Processes that are spawned, not forked, map the index anew."""
        if self.folder is None:
            return _in_memory, (bytes(self._buffer), self._ends, self._picture, self.faults)
        return _mapped, (self.folder,)


def indexed_rows(
    root: Path,
    parse: Callable[..., Iterable[Any]],
    files: Sequence[Path],
    *options: Any,
    picture: str | int | None = None,
) -> Rows:
    """The rows of `parse(*files, *options)`, from the index of `root` if it is of these very files and this code.

    A missing, stale or damaged index is made anew by one process while others wait for it, and put in place whole.
    Where the dataset folder cannot be written, `~/.cache/assistant_index` is used; where nothing can, the rows stay in
    memory.
    options: plain values, or functions, which count as changed when their file does.
    A bad entry (`Fault`) raises ValueError, unless `keeping_faults` leaves that to the record.
    """
    rows = _indexed(root, parse, files, options, picture)
    if rows.faults and not _keep_faults:
        more = f" ({len(rows.faults)} entries are bad; data.on_bad_sample=skip leaves them out)"
        try:
            rows[rows.faults[0]]
        except ValueError as error:
            raise ValueError(f"{error}{more if len(rows.faults) > 1 else ''}") from None
    return rows


def _indexed(
    root: Path, parse: Callable[..., Iterable[Any]], files: Sequence[Path], options: Sequence[Any], picture: Any
) -> Rows:
    name, made_from = _name(root, parse, files, options, picture), _fingerprint(root, files)
    places = homes(root)
    for home in places:
        if rows := Rows.load(home / name, made_from):
            return rows
    for home in places:
        try:
            home.mkdir(parents=True, exist_ok=True)
            lock = FileLock(home / f"{name}.lock")
            _acquire(lock, files)
        except (OSError, NotImplementedError):
            continue
        try:
            rows = Rows.load(home / name, made_from)  # another process may have made it meanwhile
            return rows or _make(home / name, parse(*files, *options), picture, made_from, files)
        finally:
            lock.release()
    log.warning("no index of %s: none of %s can be written; set %s", files[0], ", ".join(map(str, places)), HOME)
    return Rows(parse(*files, *options), picture)


def set_index_folder(folder: str | None) -> None:
    """From here on, in this process and those it starts, indexes are kept below `folder`; None changes nothing."""
    if folder is not None:
        os.environ[HOME] = str(Path(folder).absolute())


def _make(folder: Path, rows: Iterable[Any], picture: str | int | None, made_from: dict, files: Sequence[Path]) -> Rows:
    """Write the index beside its place, then move it there; what was there before goes."""
    _sweep(folder)
    started, ends, pictures, faults = time.monotonic(), array("q", [0]), [], []
    draft = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        with (draft / ROWS).open("wb", buffering=1 << 20) as file:
            for line in _lines(_noting(_watched(rows, picture, pictures), faults)):
                ends.append(ends[-1] + file.write(line))
        np.save(draft / ENDS, np.frombuffer(ends, np.int64))
        (draft / PICTURES).write_text(json.dumps(pictures))
        meta = {"rows": len(ends) - 1, "picture": picture, "faults": faults, "made_from": made_from}
        (draft / META).write_text(json.dumps(meta, indent=1))
        draft.chmod(0o755)  # mkdtemp hides it from other users
        _swap(draft, folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    if (seconds := time.monotonic() - started) > SLOW:
        log.info("indexed %s in %.0f s: %s", ", ".join(path.name for path in files), seconds, folder)
    made = Rows.load(folder, made_from)
    _give_back_memory()
    if made is None:
        raise OSError(f"the index just written to {folder} cannot be read back")
    return made


def _sweep(folder: Path) -> None:
    """Removes what processes that were killed while they made an index have left beside it. `folder` is locked by this
    process; of the other drafts, those go whose lock nobody holds."""
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
    """What parsing took goes back to the system; glibc would keep it for this process, which needs it no more."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _swap(draft: Path, folder: Path) -> None:
    """Put the draft in place. Processes that have the old one mapped keep it."""
    old = folder.with_name(f"{draft.name}.old")
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _lines(rows: Iterable[Any]) -> Iterator[bytes]:
    for row in rows:
        yield json.dumps(row, separators=(",", ":")).encode("ascii") + b"\n"


def _watched(rows: Iterable[Any], picture: str | int | None, pictures: list[str]) -> Iterator[Any]:
    """The rows as they come; their pictures are noted."""
    for row in rows:
        if picture is not None:
            pictures.append(row.picture if isinstance(row, Fault) else row[picture])
        yield row


def _noting(rows: Iterable[Any], faults: list[int]) -> Iterator[Any]:
    """The rows as JSON takes them; the numbers of the bad ones are noted."""
    for number, row in enumerate(rows):
        if isinstance(row, Fault):
            faults.append(number)
            row = {FAULT: row.text, "picture": row.picture}
        yield row


def _acquire(lock: FileLock, files: Sequence[Path]) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another process that indexes %s", ", ".join(map(str, files)))
        lock.acquire()


def homes(root: Path) -> list[Path]:
    """Where the indexes of a dataset folder may be, best first."""
    apart = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    if home := os.environ.get(HOME):
        return [Path(home) / apart]
    return [root / ".index", Path.home() / ".cache" / "assistant_index" / apart]


def _fingerprint(root: Path, files: Sequence[Path]) -> dict[str, list[int]]:
    """Size and time of the annotation files, by their place below the dataset folder, which may move."""
    return {_below(root, path): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def _name(root: Path, parse: Callable, files: Sequence[Path], options: Sequence[Any], picture: Any) -> str:
    """Tells apart what is made from the same files by other code, or with other options."""
    what = [FORMAT, _code(parse), [_below(root, path) for path in files], [_plain(o) for o in options], picture]
    label = re.sub(r"[^\w.+-]+", "_", "-".join(Path(_below(root, files[0])).parts[-2:])).strip("_")
    return f"{label}-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}"


def _plain(option: Any) -> Any:
    return _code(option) if callable(option) else option


def _code(function: Callable) -> list[Any]:
    """A function's name and place, with the text of its file and of the project's files whose functions that uses."""
    used = [value for value in vars(inspect.getmodule(function)).values() if inspect.isfunction(value)]
    files = {Path(inspect.getsourcefile(value)) for value in [function, *used]}
    texts = [path.read_bytes() for path in sorted(files) if path.is_relative_to(PROJECT)]
    place = [function.__module__, function.__qualname__, function.__code__.co_firstlineno]
    return [*place, hashlib.sha256(b"\0".join(texts)).hexdigest()]


def _below(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path.absolute())


def _in_memory(buffer: bytes, ends: array, picture: str | int | None, faults: list[int]) -> Rows:
    rows = Rows((), picture)
    rows._buffer, rows._ends, rows.faults = bytearray(buffer), ends, faults
    return rows


def _mapped(folder: Path) -> Rows:
    made_from = json.loads((folder / META).read_bytes())["made_from"]
    rows = Rows.load(folder, made_from)
    if rows is None:
        raise OSError(f"{folder}: the index is damaged; remove that folder")
    return rows
