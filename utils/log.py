"""What a run says: messages to the terminal from the main process, numbers to log.jsonl and TensorBoard."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

log = logging.getLogger("assistant")


class _AboveBars(logging.Handler):
    """Writes above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))


def setup_logging(main: bool = True) -> None:
    """Messages from the main process (others: warnings only), and quiet libraries."""
    handler = _AboveBars()
    handler.setFormatter(logging.Formatter("%(message)s" if main else "[process] %(message)s"))
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO if main else logging.WARNING)
    for name in ("DeepSpeed", "transformers", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.WARNING)


class RunLog:
    """Numbers of a run under one monotonic global step: `log.jsonl` always, TensorBoard on request.

    A run that goes on from `step` first drops what a killed process logged beyond it. Off (`enabled=False`, processes
    other than the main one) it writes nothing.
    """

    def __init__(self, folder: Path, *, step: int = 0, tensorboard: bool = True, enabled: bool = True):
        self.file = self.board = None
        if not enabled:
            return
        path = folder / "log.jsonl"
        _drop_beyond(path, step)
        self.file = path.open("a", encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # a second's import that many callers never need

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line of `values` of a kind (train, val, final, event); its numbers go to TensorBoard as `kind/name`."""
        if self.file:
            self.file.write(json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3), **values}) + "\n")
            self.file.flush()
        if self.board:
            for name, value in flat(values).items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    self.board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        for sink in (self.file, self.board):
            if sink:
                sink.close()


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as `outer/inner` keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}/")
        else:
            found[f"{prefix}{key}"] = value
    return found


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl; a half-written last line (a killed run) is left out."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _drop_beyond(path: Path, step: int) -> None:
    if path.exists():
        kept = [row for row in read_log(path) if row.get("step", 0) <= step]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
