"""One training at a time in a run folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from utils.files import describe_write_error
from utils.log import log

LOCK = ".lock"
NOT_THERE = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # how file systems say that they have no locks


class Lock:
    """Held by the main process of a run from before anything is read until it ends, however it ends.

    A record lock of the process itself: the system lets go of it when the process dies, and loader workers, which are
    forked, neither inherit it nor keep it alive, as they would a lock of an open file (flock).
    """

    def __init__(self, folder: Path):
        self.path, self._file, self._signed = folder / LOCK, None, False

    def acquire(self) -> None:
        """Raises OSError where another process trains in the folder, or nothing can be written there."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+", encoding="utf-8")
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self.release()
            raise OSError(
                f"{self.path.parent} is in use: {holder} trains there. Wait for it or stop it, or choose another "
                "--exp_name (nothing was changed)"
            ) from None
        except OSError as error:
            if self._file is None or error.errno not in NOT_THERE:
                raise OSError(
                    f"the run folder cannot be used: {describe_write_error(error, self.path.parent)}"
                ) from None
            log.warning("%s: no locks on this file system; see that no second training starts there", self.path)

    def sign(self) -> None:
        """Says in the file who holds the lock, for those who find it taken."""
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        self._file.flush()
        self._signed = True

    def release(self) -> None:
        if self._file is not None:
            if self._signed:
                self._file.truncate(0)
            self._file.close()
            self._file, self._signed = None, False
