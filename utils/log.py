"""What a run says: messages to the terminal from the main process, numbers and pictures to files and boards."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.config import RunConfig
from utils.files import describe_write_error, write_atomically
from utils.plain import read_yaml

log = logging.getLogger("assistant")
ROW = ("kind", "step", "time")  # of every line of the log, beside its values


class _AboveBars(logging.Handler):
    """Writes above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))


def setup_logging(main: bool = True) -> None:
    """Messages from the main process (others: warnings only), and quiet libraries. File names that are no UTF-8 are
    printed with their bytes escaped instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    handler = _AboveBars()
    handler.setFormatter(logging.Formatter("%(message)s" if main else "[process] %(message)s"))
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO if main else logging.WARNING)
    for name in ("DeepSpeed", "transformers", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.WARNING)


class RunLog:
    """Numbers and pictures of a run under one monotonic global step: `log.jsonl` and `pictures/` always, TensorBoard
    and Weights & Biases on request.

    `log.jsonl` is the truth: a run that goes on from `step` first drops what a killed process logged beyond it, and of
    `step` itself the kinds in `again`, which will be written again; TensorBoard's files are then written from it, so
    that they hold the same. Off (`enabled=False`, processes other than the main one) it writes nothing.
    """

    def __init__(self, run: RunConfig, *, step: int = 0, again: Collection[str] = (), enabled: bool = True):
        self.folder = folder = run.folder
        self.file = self.board = self.wandb = None
        if not enabled:
            return
        path = folder / "log.jsonl"
        rows = _drop_beyond(path, step, again)
        self.file = path.open("a", encoding="utf-8")
        if run.tensorboard:
            self._start_board(rows)
        if run.wandb:
            self.wandb = _start_wandb(run.wandb, folder)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line of `values` of a kind (train, val, final, event); its numbers go to the boards as `kind/name`."""
        if self.file is None:
            return
        now = time.time()
        try:
            self.file.write(json.dumps({"kind": kind, "step": step, "time": round(now, 3), **values}) + "\n")
            self.file.flush()
        except OSError as error:
            raise describe_write_error(error, self.folder / "log.jsonl") from None
        self._to_board(lambda board: _add_numbers(board, kind, step, values, now))
        if self.wandb:
            self.wandb.log({**_numbers(kind, values), "step": step})

    def picture(self, kind: str, step: int, image: np.ndarray) -> None:
        """(H, W, 3) uint8, as `pictures/<kind>_<step>.png` and on the boards."""
        if self.file is None:
            return
        path = self._picture(kind, step)
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
        self._to_board(partial(_add_image, kind=kind, step=step, image=image))
        if self.wandb:
            self.wandb.log({f"{kind}/pictures": import_wandb().Image(str(path)), "step": step})

    def sync(self) -> None:
        """What was logged is on the disk: to be called before a checkpoint of the same step is."""
        if self.file is not None:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        self._to_board(lambda board: board.close())
        if self.wandb:
            self.wandb.finish()

    def _start_board(self, rows: Sequence[dict[str, Any]]) -> None:
        """A new file of events with the rows and their pictures; the files of earlier starts go, which a kill may have
        left without their last rows, or with some that count no more."""
        from torch.utils.tensorboard import SummaryWriter  # a second's import that many callers never need

        place = self.folder / "tensorboard"
        before = list(place.glob("events.out.tfevents.*"))
        self.board = SummaryWriter(str(place), purge_step=0)
        for row in rows:
            kind, step, values = row["kind"], row["step"], {k: v for k, v in row.items() if k not in ROW}
            self._to_board(partial(_add_numbers, kind=kind, step=step, values=values, now=row.get("time")))
            if (path := self._picture(kind, step)).is_file():
                image = np.asarray(Image.open(path).convert("RGB"))
                self._to_board(partial(_add_image, kind=kind, step=step, image=image))
        self._to_board(lambda board: board.flush())
        if self.board:
            for path in before:
                path.unlink()

    def _to_board(self, action: Callable[[Any], None]) -> None:
        """TensorBoard never stops a run: what it cannot write is in the log, and the next start writes it."""
        if self.board is None:
            return
        try:
            action(self.board)
        except OSError as error:
            log.warning(
                "no more to TensorBoard, log.jsonl goes on: %s",
                describe_write_error(error, self.folder / "tensorboard"),
            )
            self.board = None

    def _picture(self, kind: str, step: int) -> Path:
        return self.folder / "pictures" / f"{kind}_{step:08d}.png"


def _numbers(kind: str, values: dict[str, Any]) -> dict[str, float]:
    numbers = {name: value for name, value in flat(values).items() if isinstance(value, (int, float))}
    return {f"{kind}/{name}": value for name, value in numbers.items() if not isinstance(value, bool)}


def _add_numbers(board: Any, kind: str, step: int, values: dict[str, Any], now: float | None) -> None:
    for name, value in _numbers(kind, values).items():
        board.add_scalar(name, value, step, walltime=now)


def _add_image(board: Any, kind: str, step: int, image: np.ndarray) -> None:
    board.add_image(kind, image, step, dataformats="HWC")


def import_wandb() -> Any:
    """Weights & Biases, or an error that says what to do without it."""
    try:
        import wandb  # optional, and slow to import
    except ImportError:
        raise ImportError(
            "run.wandb names a project, but wandb is not installed: pip install wandb, or set run.wandb=null"
        ) from None
    return wandb


def _start_wandb(project: str, folder: Path) -> Any:
    """The run of this folder in the project, gone on with where it was; its recipe is what it shows as config."""
    ticket, recipe = folder / "wandb_id", folder / "recipe.yaml"
    if not ticket.exists():
        write_atomically(ticket, uuid.uuid4().hex[:12])
    run = import_wandb().init(
        project=project,
        name=folder.name,
        id=ticket.read_text(encoding="utf-8").strip(),
        resume="allow",
        dir=str(folder),
        config=read_yaml(recipe) if recipe.exists() else None,
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")  # its own counter cannot go back to a checkpoint
    return run


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
    """The lines of a log.jsonl. A half-written last line (a killed run) is left out; another that cannot be read is
    left out with a warning."""
    rows, lines = [], Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({**row, "kind": row["kind"], "step": int(row["step"])})
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                log.warning("%s, line %d: not a line of a log, left out: %.80s", path, number, line)
    return rows


def _drop_beyond(path: Path, step: int, again: Collection[str]) -> list[dict[str, Any]]:
    """The rows that stay; the file is replaced where others are in it."""
    if not path.exists():
        return []
    kept = [row for row in read_log(path) if row["step"] < step or (row["step"] == step and row["kind"] not in again)]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept
