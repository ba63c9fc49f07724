"""One training at a time in a run folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from utils.files import describe_write_error
from utils.log import log

LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # the errors of file systems without locks


class Lock:
    """A lock on a run folder. The main process holds it from before anything is read there until it ends.

    It is a POSIX record lock (`lockf`), which belongs to the process: the system releases it when the process dies,
    even by SIGKILL, so no stale lock is left. A lock of an open file (`flock`) would be shared with the data loader's
    workers, which are forked, and a worker that outlives a killed run would keep the folder locked.
    """

    def __init__(self, folder: Path):
        self.path = folder / LOCK
        self._file: TextIO | None = None
        self._signed = False

    def acquire(self) -> None:
        """Raises OSError where another process trains in the folder, or nothing can be written there."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self._file = self.path.open("a+", encoding="utf-8")
        except OSError as error:
            raise OSError(f"the run folder cannot be used: {describe_write_error(error, self.path.parent)}") from None
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            self.release()
            raise OSError(
                f"{self.path.parent} is in use: {holder} trains there. Wait for it or stop it, or choose another "
                "--exp_name (nothing was changed)"
            ) from None
        except OSError as error:
            if self._file is None or error.errno not in NO_LOCKS:
                raise OSError(
                    f"the run folder cannot be used: {describe_write_error(error, self.path.parent)}"
                ) from None
            log.warning("%s: no locks on this file system; see that no second training starts there", self.path)

    def sign(self) -> None:
        """Writes into the file who holds the lock, for a process that finds it taken. Not before the run begins to
        write: a start that is refused must leave the folder as it was."""
        assert self._file is not None, "acquire the lock first"
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        self._file.flush()
        self._signed = True

    def release(self) -> None:
        if self._file is not None:
            if self._signed:
                self._file.truncate(0)
            self._file.close()
            self._file = None
            self._signed = False
