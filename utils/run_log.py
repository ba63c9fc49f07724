"""The output of a run: numbers and images to files and boards."""

from __future__ import annotations

import importlib
import json
import os
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image

from utils.config import RunConfig
from utils.files import describe_write_error, write_atomically
from utils.log import log
from utils.plain import read_yaml

LOG = "log.jsonl"
ROW = ("kind", "step", "time")  # fields of every line of the log, next to its values


class RunLog:
    """Numbers and images of a run by global step: to `log.jsonl` and `pictures/` always, to TensorBoard and Weights &
    Biases on request.

    `log.jsonl` is the reference. A run that resumes at `step` first drops from it what a killed process logged after
    that step, and at `step` itself the kinds in `again`, which will be written again. TensorBoard's files are then
    rewritten from it, so that both hold the same. With `enabled=False` (processes other than the main one) nothing
    is written.
    """

    def __init__(self, run: RunConfig, *, step: int = 0, again: Collection[str] = (), enabled: bool = True):
        self.folder = run.folder
        self.file: TextIO | None = None
        self.board: Any = None  # TensorBoard's SummaryWriter
        self.wandb: Any = None  # the run of Weights & Biases
        if not enabled:
            return
        path = self.folder / LOG
        rows = _drop_beyond(path, step, again)
        self.file = path.open("a", encoding="utf-8")
        if run.tensorboard:
            self._start_board(rows)
        if run.wandb:
            self.wandb = _start_wandb(run.wandb, self.folder)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line of `values` of a kind (train, val, final, event); its numbers go to the boards as `kind/name`."""
        if self.file is None:
            return
        now = time.time()
        try:
            self.file.write(json.dumps({"kind": kind, "step": step, "time": round(now, 3), **values}) + "\n")
            self.file.flush()
        except OSError as error:
            raise describe_write_error(error, self.folder / LOG) from None
        self._to_board(lambda board: _add_numbers(board, kind, step, values, now))
        if self.wandb:
            self.wandb.log({**_numbers(kind, values), "step": step})

    def rewrite(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """As `write`, in place of the line of this kind that an earlier start wrote at this step, the last of the log.
        Until then that one stays: this start may be killed before it has new values."""
        if self.file is None:
            return
        self.file.close()
        _drop_beyond(self.folder / LOG, step, (kind,))
        self.file = (self.folder / LOG).open("a", encoding="utf-8")
        self.write(kind, step, values)

    def picture(self, kind: str, step: int, image: np.ndarray) -> None:
        """Saves an image, (H, W, 3) uint8, as `pictures/<kind>_<step>.png` and on the boards."""
        if self.file is None:
            return
        path = self._image_path(kind, step)
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
        self._to_board(partial(_add_image, kind=kind, step=step, image=image))
        if self.wandb:
            name = f"{kind}/pictures"
            self.wandb.log({name: import_wandb().Image(str(path)), "step": step})

    def sync(self) -> None:
        """Flushes the log to the disk. To be called before a checkpoint of the same step is written: a run that resumes
        there expects every earlier line."""
        if self.file is not None:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        self._to_board(lambda board: board.close())
        if self.wandb:
            self.wandb.finish()

    def _start_board(self, rows: Sequence[dict[str, Any]]) -> None:
        """Writes a new event file with the rows and their images, and removes those of earlier starts: after a kill
        they may lack their last rows or hold rows that the log has dropped."""
        from torch.utils.tensorboard import SummaryWriter  # the import takes a second, and many callers never need it

        folder = self.folder / "tensorboard"
        old_files = list(folder.glob("events.out.tfevents.*"))
        self.board = SummaryWriter(str(folder), purge_step=0)
        for row in rows:
            kind = row["kind"]
            step = row["step"]
            values = {name: value for name, value in row.items() if name not in ROW}
            self._to_board(partial(_add_numbers, kind=kind, step=step, values=values, now=row.get("time")))
            if (path := self._image_path(kind, step)).is_file():
                try:
                    image = np.asarray(Image.open(path).convert("RGB"))
                except OSError as error:  # e.g. of a process that was killed while it wrote the file
                    log.warning("%s is not shown on TensorBoard: %s", path, error)
                else:
                    self._to_board(partial(_add_image, kind=kind, step=step, image=image))
        self._to_board(lambda board: board.flush())
        if self.board:
            for path in old_files:
                path.unlink()

    def _to_board(self, action: Callable[[Any], None]) -> None:
        """TensorBoard never stops a run: what it cannot write is in the log, and the next start writes it again."""
        if self.board is None:
            return
        try:
            action(self.board)
        except OSError as error:
            log.warning(
                "nothing more goes to TensorBoard, only to log.jsonl: %s",
                describe_write_error(error, self.folder / "tensorboard"),
            )
            self.board = None

    def _image_path(self, kind: str, step: int) -> Path:
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
    """Weights & Biases; raises an ImportError that says what to do where it is not installed."""
    try:
        wandb = importlib.import_module("wandb")  # optional, and slow to import
    except ImportError:
        raise ImportError(
            "run.wandb names a project, but wandb is not installed: pip install wandb, or set run.wandb=null"
        ) from None
    return wandb


def _start_wandb(project: str, folder: Path) -> Any:
    """The project's run for this folder, new or resumed, with the recipe as its config."""
    id_file = folder / "wandb_id"
    recipe = folder / "recipe.yaml"
    if not id_file.exists():
        write_atomically(id_file, uuid.uuid4().hex[:12])
    run = import_wandb().init(
        project=project,
        name=folder.name,
        id=id_file.read_text(encoding="utf-8").strip(),
        resume="allow",
        dir=str(folder),
        config=read_yaml(recipe) if recipe.exists() else None,
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")  # wandb's own step counter cannot go back to a checkpoint's step
    return run


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as `outer/inner` keys."""
    flattened: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flattened |= flat(value, f"{prefix}{key}/")
        else:
            flattened[f"{prefix}{key}"] = value
    return flattened


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl. A half-written last line (of a killed run) is left out; any other line that cannot be
    read is left out with a warning."""
    rows: list[dict[str, Any]] = []
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({**row, "kind": row["kind"], "step": int(row["step"])})
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                log.warning("%s, line %d: not a line of a log, left out: %.80s", path, number, line)
    return rows


def _drop_beyond(path: Path, step: int, again: Collection[str]) -> list[dict[str, Any]]:
    """Rewrites the log without rows after `step` and without those of the kinds `again` at it; returns the others."""
    if not path.exists():
        return []
    rows = [row for row in read_log(path) if row["step"] < step or (row["step"] == step and row["kind"] not in again)]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows
