"""Checkpoints: complete or not there, whole weights beside the engine's shards, a bounded number of them.

checkpoints/step_500/trainable.safetensors   every trained weight, fp32, by its name in the model
checkpoints/step_500/engine/                 DeepSpeed's shards: optimizer, schedule
checkpoints/step_500/state.json              step, samples drawn, best score, processes
checkpoints/last, checkpoints/best           text files that name one of the folders
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from safetensors.torch import save_file

from training.engine import SHARDS, Engine
from utils import dist
from utils.config import Recipe
from utils.log import log

WEIGHTS, STATE = "trainable.safetensors", "state.json"
UNFINISHED = ".unfinished"  # prefix of folders that are being written or removed


@dataclass
class TrainState:
    """What the loop knows beside weights and optimizer. Random numbers are keyed by (seed, step), so none are kept."""

    step: int = 0  # optimizer steps done
    samples: int = 0  # draws from the mixture, all processes together: where it goes on
    validated: int = 0  # step of the last validation
    best: float | None = None  # best validation score so far
    processes: int = 1
    zero_stage: int = 2

    @classmethod
    def begin(cls, recipe: Recipe) -> TrainState:
        return cls(processes=dist.world_size(), zero_stage=recipe.train.zero_stage)

    def advance(self, recipe: Recipe) -> None:
        """One optimizer step is done."""
        self.step += 1
        self.samples += recipe.train.batch_size * recipe.train.grad_accumulation_steps * self.processes


class Checkpoints:
    """The folder `checkpoints/` of a run."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, max(1, keep)

    def prepare(self) -> None:
        """Makes the folder and removes what a killed process left half done (main process)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(f"{UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)

    def save(self, engine: Engine, state: TrainState) -> Path:
        """Writes a checkpoint on all processes; it gets its name only when everything is on the disk."""
        name = f"step_{state.step}"
        target, draft = self.folder / name, self.folder / f"{UNFINISHED}_{name}"
        if dist.is_main():
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        dist.barrier()
        engine.save(draft)
        weights = engine.trained_weights()
        if dist.is_main():
            save_file(weights, draft / WEIGHTS)
            (draft / STATE).write_text(json.dumps(asdict(state)), encoding="utf-8")
            _flush(draft)
        dist.barrier()
        if dist.is_main():
            shutil.rmtree(target, ignore_errors=True)
            os.replace(draft, target)
            self._point("last", name)
            self._thin()
        dist.barrier()
        return target

    def note(self, state: TrainState, *, best: bool) -> None:
        """What is known of the saved checkpoint of this step since it was validated (of another run's: nothing)."""
        target = self.folder / f"step_{state.step}"
        if dist.is_main() and target.is_dir():
            _write(target / STATE, json.dumps(asdict(state)))
            if best:
                self._point("best", target.name)
                self._thin()
        dist.barrier()

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = [path for path in self.folder.glob("step_*") if (path / STATE).is_file()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))

    def last(self) -> Path | None:
        """The newest complete checkpoint, whatever the pointer says (a process may die between the two)."""
        complete = self.complete()
        return complete[-1] if complete else None

    def _point(self, pointer: str, name: str) -> None:
        _write(self.folder / pointer, name + "\n")

    def _thin(self) -> None:
        """Keeps the newest ones and the best one."""
        pointer = self.folder / "best"
        best = pointer.read_text(encoding="utf-8").strip() if pointer.exists() else None
        for path in self.complete()[: -self.keep]:
            if path.name != best:
                doomed = self.folder / f"{UNFINISHED}_removing_{path.name}"
                os.replace(path, doomed)
                shutil.rmtree(doomed, ignore_errors=True)


def restore(engine: Engine, folder: Path, recipe: Recipe) -> TrainState:
    """Puts engine and state where they were when `folder` was saved.

    Raises when the checkpoint is incomplete or was saved by another number of processes or ZeRO stage, whose shards do
    not fit.
    """
    path = folder / STATE
    if not path.is_file() or not (folder / SHARDS).is_dir():
        raise FileNotFoundError(f"{folder} is not a complete checkpoint: expected {STATE} and {SHARDS}/ there")
    known = {field.name for field in fields(TrainState)}
    values = json.loads(path.read_text(encoding="utf-8"))
    state = TrainState(**{key: value for key, value in values.items() if key in known})
    now = (dist.world_size(), recipe.train.zero_stage)
    if (state.processes, state.zero_stage) != now:
        raise ValueError(
            f"{folder} was saved by {state.processes} process(es) with ZeRO stage {state.zero_stage}, this run has "
            f"{now[0]} with stage {now[1]}; start it the same way, or without auto_resume in a new run folder"
        )
    engine.load(folder)
    log.info("resumed %s: step %d, best score %s", folder, state.step, state.best)
    return state


def check_writable(folder: Path, needed_bytes: int = 0) -> None:
    """Raises, before anything is computed, when the run folder cannot be written or has no room for a checkpoint."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"{UNFINISHED}_probe"
        probe.write_text("x", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        raise OSError(f"the run folder {folder} cannot be written ({error.strerror}); see --log_base_dir") from None
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OSError(
            f"the run folder {folder} has {free / 2**30:.1f} GiB free and a checkpoint needs about "
            f"{needed_bytes / 2**30:.1f} GiB; free some, or see --log_base_dir and train.keep_checkpoints"
        )


def _write(path: Path, text: str) -> None:
    """Replaces a file in one go."""
    draft = path.with_name(f"{UNFINISHED}_{path.name}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def _flush(folder: Path) -> None:
    """Everything below the folder is on the disk, not only in its cache."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
