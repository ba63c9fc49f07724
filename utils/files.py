"""Files and folders that appear complete or not at all: written next to their place, then renamed in one step."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
DRAFT = ".unfinished_"  # prefix of what is being written or removed; anything with it may be deleted


def write_atomically(path: str | Path, text: str, errors: str = "strict") -> None:
    """Replaces a file by `text`; see `open_atomically`."""
    with open_atomically(path, errors) as file:
        file.write(text)


@contextmanager
def open_atomically(path: str | Path, errors: str = "strict") -> Generator[TextIO]:
    """A text file to write, which replaces `path` when the block ends. If the block raises, `path` stays as it was.

    At every moment, also after a crash, the file has either its old or its new content. errors: what to do with
    characters that UTF-8 cannot encode, as in `open`. OSError with the file and the reason.
    """
    path = Path(path)
    draft = path.with_name(f"{DRAFT}{path.name}.{os.getpid()}")  # several processes may write the same file
    try:
        with draft.open("w", encoding="utf-8", errors=errors) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        flush(path.parent)
    except BaseException as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise describe_write_error(error, path) from None
        raise


@contextmanager
def atomic_folder(target: str | Path) -> Generator[Path]:
    """A new folder next to `target` to write into, which replaces `target` when the block ends.

    If the block raises, `target` stays as it was. OSError with the folder and the reason.
    """
    target = Path(target).resolve()  # if it is a link, the folder that it leads to
    draft = target.with_name(f"{DRAFT}{target.name}")
    old = target.with_name(f"{DRAFT}replaced_{target.name}")
    if old.is_dir() and not target.exists():  # a process was killed between the two renames below
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        yield draft
        flush(*draft.rglob("*"), draft)  # before the rename: after a power cut, the new name must not hold empty files
        if target.exists():
            target.rename(old)
        draft.rename(target)
        flush(target.parent)
    except BaseException as error:
        if old.is_dir() and not target.exists():
            old.rename(target)
        shutil.rmtree(draft, ignore_errors=True)
        if isinstance(error, OSError):
            raise describe_write_error(error, target) from None
        raise
    shutil.rmtree(old, ignore_errors=True)


def flush(*paths: Path) -> None:
    """Waits until these files and folders are on the disk, not only in the system's cache."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def describe_write_error(error: OSError, path: Path) -> OSError:
    """The same kind of error with the path and the free space, if writing failed; else `error` itself."""
    if error.errno not in CANNOT_WRITE:
        return error
    return type(error)(error.errno, f"{path} cannot be written: {os.strerror(error.errno)} ({free_space(path)})")


def free_space(path: Path) -> str:
    """The free space where `path` is, or would be, for messages."""
    place = next((parent for parent in (path, *path.absolute().parents) if parent.exists()), Path("/"))
    return f"{shutil.disk_usage(place).free / 2**30:.2f} GiB free there"
