"""Messages of the main process to the terminal."""

from __future__ import annotations

import io
import logging
import sys

from tqdm import tqdm

log = logging.getLogger("assistant")


class _AboveBars(logging.Handler):
    """Prints messages above a progress bar instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))


def setup_logging(main: bool = True) -> None:
    """Messages of the main process (of the others warnings only), and quiet libraries. A file name that is not valid
    UTF-8 is printed with its bytes escaped, where Python's default would end the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler: logging.Handler = _AboveBars()
    handler.setFormatter(logging.Formatter("%(message)s" if main else "[process] %(message)s"))
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if main else logging.WARNING)
    for name in ("DeepSpeed", "transformers", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.WARNING)
