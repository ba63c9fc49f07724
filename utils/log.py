"""What a run says: messages to the terminal from the main process, numbers and pictures to files and boards."""

from __future__ import annotations

import json
import logging
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.config import RunConfig
from utils.plain import read_yaml

log = logging.getLogger("assistant")


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

    A run that goes on from `step` first drops what a killed process logged beyond it. Off (`enabled=False`, processes
    other than the main one) it writes nothing.
    """

    def __init__(self, run: RunConfig, *, step: int = 0, enabled: bool = True):
        self.folder = folder = run.folder
        self.file = self.board = self.wandb = None
        if not enabled:
            return
        path = folder / "log.jsonl"
        _drop_beyond(path, step)
        self.file = path.open("a", encoding="utf-8")
        if run.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # a second's import that many callers never need

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if run.wandb:
            self.wandb = _start_wandb(run.wandb, folder)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line of `values` of a kind (train, val, final, event); its numbers go to the boards as `kind/name`."""
        if self.file:
            self.file.write(json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3), **values}) + "\n")
            self.file.flush()
        numbers = {
            f"{kind}/{name}": value
            for name, value in flat(values).items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        if self.board:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log({**numbers, "step": step})

    def picture(self, kind: str, step: int, image: np.ndarray) -> None:
        """(H, W, 3) uint8, as `pictures/<kind>_<step>.png` and on the boards."""
        if self.file is None:
            return
        path = self.folder / "pictures" / f"{kind}_{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
        if self.board:
            self.board.add_image(kind, image, step, dataformats="HWC")
        if self.wandb:
            self.wandb.log({f"{kind}/pictures": import_wandb().Image(str(path)), "step": step})

    def close(self) -> None:
        for sink in (self.file, self.board):
            if sink:
                sink.close()
        if self.wandb:
            self.wandb.finish()


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
        ticket.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
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
