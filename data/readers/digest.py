"""What the annotations of a source hold, as one short text: another text where a label, a class or a picture differs.

The content of every annotation file counts. A file is read once: its digest is kept in `digests.json` beside the
indexes, under what the file system says of it. The time of the last change of a file's entry (ctime) is part of that,
which no program sets back, so an edit of the same size with the old time of modification is noticed, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.readers.index import homes
from data.sources.base import Source, image_paths
from utils.files import write_whole
from utils.log import log

KEPT = "digests.json"
SETTLED = 2.0  # seconds after a change from which another one has another time, on any file system
SLOW = 5.0  # seconds of reading from which a message is due


def annotation_digest(source: Source, root: Path) -> str:
    """Of the annotation files by content, of class lists with their label values, and of the pictures by name and size.

    Paths count as they are below `root`, so data that are moved or copied have the digest that they had.
    """
    files = [Path(path) for path in annotation_paths(source)]
    parts = [f"{_below(root, path)} {digest}" for path, digest in zip(files, digests(files, root), strict=True)]
    parts.append(json.dumps(class_table(source), sort_keys=True))
    parts += [f"{_below(root, Path(path))} {_size(path)}" for path in image_paths(source)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def annotation_paths(source: Source) -> list[Path]:
    """Every file that says what is in the pictures: what the source lists itself, else its `files`."""
    listed = getattr(source, "annotation_paths", None)
    return list(listed() if listed else getattr(source, "files", ()))


def class_table(source: Source) -> Any:
    """Class names, with their label values where the source has any."""
    while hasattr(source, "source"):  # a wrapper
        source = source.source
    return getattr(source, "classes", None) or list(getattr(source, "vocabulary", ()))


def digests(files: Iterable[Path], root: Path) -> list[str]:
    """SHA-256 of the content of each file, in their order, "" of what is not there; a file is read only where it is new
    or has changed."""
    started, known, fresh, found = time.monotonic(), _load(root), {}, []
    for path in files:
        if not path.is_file():
            found.append("")
            continue
        key, state = str(path.absolute()), _state(path)
        kept = known.get(key)
        if not (isinstance(kept, list) and kept[:-1] == state):
            with path.open("rb") as file:
                kept = [*state, hashlib.file_digest(file, "sha256").hexdigest()]
            if time.time() - max(state[1:3]) / 1e9 > SETTLED and _state(path) == state:
                fresh[key] = kept
        found.append(kept[-1])
    if fresh:
        _keep(root, {**_load(root), **fresh})  # another process may have added its own meanwhile
    if (seconds := time.monotonic() - started) > SLOW:
        log.info("read %d annotation files in %.0f s to tell whether they have changed", len(found), seconds)
    return found


def _state(path: Path) -> list[int]:
    about = path.stat()
    return [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]


def _load(root: Path) -> dict[str, Any]:
    for home in homes(root):
        try:
            kept = json.loads((home / KEPT).read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(kept, dict):
            return kept
    return {}


def _keep(root: Path, known: dict[str, Any]) -> None:
    """In the first place that can be written; in none, the files are read again the next time."""
    for home in homes(root):
        try:
            home.mkdir(parents=True, exist_ok=True)
            write_whole(home / KEPT, json.dumps(known))
            return
        except OSError:
            continue


def _below(root: Path, path: Path) -> str:
    return os.path.relpath(path, root)


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return -1  # evaluation says so when it comes to that picture
