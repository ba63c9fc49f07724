"""A digest of what the annotations of a source hold: it differs if a label, a class or an image differs.

The content of every annotation file counts. A file is read once: its digest is kept in `digests.json` next to the
indexes, together with the file's size, times and inode. Among the times is that of the last change of the inode
(ctime), which no program can set back, so even an edit that keeps size and modification time is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.readers.index import index_folders
from data.sources.base import Source, image_paths
from utils.files import write_atomically
from utils.log import log

DIGESTS = "digests.json"
SETTLED = 2.0  # seconds; two changes further apart have different times on any file system
SLOW = 5.0  # seconds of reading after which a message is logged


def annotation_digest(source: Source, root: Path) -> str:
    """32 hex digits over the contents of annotation files, class names with label values, names and sizes of images.

    Paths count relative to `root`, so data that are moved or copied keep their digest.
    """
    files = [Path(path) for path in annotation_paths(source)]
    parts = [f"{_below(root, path)} {digest}" for path, digest in zip(files, digests(files, root), strict=True)]
    parts.append(json.dumps(class_table(source), sort_keys=True))
    parts += [f"{_below(root, Path(path))} {_size(path)}" for path in image_paths(source)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def annotation_paths(source: Source) -> list[Path]:
    """Every file that says what is in the images: `annotation_paths()` of the source if it has it, else its `files`."""
    own_paths = getattr(source, "annotation_paths", None)
    return list(own_paths() if own_paths else getattr(source, "files", ()))


def class_table(source: Source) -> Any:
    """Class names, with their label values if the source has any; wrappers are looked through."""
    inner: Any = source
    while hasattr(inner, "source"):
        inner = inner.source
    return getattr(inner, "classes", None) or list(getattr(inner, "vocabulary", ()))


def digests(files: Iterable[Path], root: Path) -> list[str]:
    """SHA-256 of each file's content, in their order; "" for a missing file. Only new and changed files are read."""
    started = time.monotonic()
    cache = _load(root)
    additions: dict[str, list[Any]] = {}
    results: list[str] = []
    for path in files:
        if not path.is_file():
            results.append("")
            continue
        key, state = str(path.absolute()), _state(path)
        entry = cache.get(key)
        if not (isinstance(entry, list) and entry[:-1] == state):
            with path.open("rb") as file:
                entry = [*state, hashlib.file_digest(file, "sha256").hexdigest()]
            # A file that changed just now may change again within the resolution of its times, unnoticed: its digest
            # is used but not saved. The same if it changed while it was read.
            if time.time() - max(state[1:3]) / 1e9 > SETTLED and _state(path) == state:
                additions[key] = entry
        results.append(str(entry[-1]))
    if additions:
        _save(root, {**_load(root), **additions})  # another process may have added its own in the meantime
    if (seconds := time.monotonic() - started) > SLOW:
        log.info("read %d annotation files in %.0f s to see whether they have changed", len(results), seconds)
    return results


def _state(path: Path) -> list[int]:
    """Size, times of modification and of the inode's last change, inode: a file with the same state has not changed."""
    about = path.stat()
    return [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]


def _load(root: Path) -> dict[str, Any]:
    for home in index_folders(root):
        try:
            cache = json.loads((home / DIGESTS).read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(cache, dict):
            return cache
    return {}


def _save(root: Path, cache: dict[str, Any]) -> None:
    """Writes the cache to the first folder that allows it; if none does, the files are read again the next time."""
    for home in index_folders(root):
        try:
            home.mkdir(parents=True, exist_ok=True)
            write_atomically(home / DIGESTS, json.dumps(cache))
            return
        except OSError:
            continue


def _below(root: Path, path: Path) -> str:
    return os.path.relpath(path, root)


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return -1  # missing; evaluation reports it at that image
