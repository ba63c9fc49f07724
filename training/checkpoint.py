"""Checkpoints: complete or not there, plain tensors by name, a bounded number of them.

checkpoints/step_500/trainable.safetensors             every trained weight, fp32, by its name in the model
checkpoints/step_500/{exp_avg,exp_avg_sq}.safetensors  the optimizer's moments of each
checkpoints/step_500/engine.json                       updates made, place in the schedule, loss scale
checkpoints/step_500/state.json                        step, samples drawn, best score, processes
checkpoints/last, checkpoints/best                     text files that name one of the folders
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.engine import Engine
from training.moments import MOMENTS, WEIGHT
from utils import dist
from utils.config import Recipe, TrainConfig
from utils.log import log

WEIGHTS, STATE, COUNTERS = "trainable.safetensors", "state.json", "engine.json"
TENSORS = {WEIGHT: WEIGHTS, **{kind: f"{kind}.safetensors" for kind in MOMENTS}}
UNFINISHED = ".unfinished"  # prefix of folders that are being written or removed


@dataclass
class TrainState:
    """What the loop knows beside weights and optimizer. Random numbers are keyed by (seed, step), so none are kept."""

    step: int = 0  # optimizer steps done
    samples: int = 0  # draws from the mixture, all processes together: where it goes on
    skipped: int = 0  # micro-batches left out for a loss that is no number
    validated: int = 0  # step of the last validation
    best: float | None = None  # best validation score so far
    processes: int = 1
    pictures: int = 0  # a step, all processes together

    @classmethod
    def begin(cls, recipe: Recipe) -> TrainState:
        return cls(processes=dist.world_size(), pictures=pictures_a_step(recipe.train, dist.world_size()))


def pictures_a_step(train: TrainConfig, processes: int) -> int:
    return train.batch_size * train.grad_accumulation_steps * processes


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
        for kind, file in TENSORS.items():  # one kind at a time in the main process's memory
            tensors = engine.gather(kind)
            if dist.is_main():
                save_file(tensors, draft / file)
        if dist.is_main():
            (draft / COUNTERS).write_text(json.dumps(engine.counters()), encoding="utf-8")
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
    """Puts engine and state where they were when `folder` was saved, by any number of processes and any ZeRO stage.

    Raises when the checkpoint is incomplete or of a model in which other weights train.
    """
    wanted = (STATE, COUNTERS, *TENSORS.values())
    if missing := [name for name in wanted if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} is not a complete checkpoint: expected {', '.join(missing)} there")
    known = {field.name for field in fields(TrainState)}
    values = json.loads((folder / STATE).read_text(encoding="utf-8"))
    state = TrainState(**{key: value for key, value in values.items() if key in known})
    counters = json.loads((folder / COUNTERS).read_text(encoding="utf-8"))
    engine.restore({kind: Stored(folder / file) for kind, file in TENSORS.items()}, counters)
    now = TrainState.begin(recipe)
    if state.pictures and state.pictures != now.pictures:
        log.warning(
            "%s was trained with %d pictures a step, now it is %d (batch size x accumulation x processes): "
            "set train.grad_accumulation_steps for the same",
            *(folder, state.pictures, now.pictures),
        )
    state.processes, state.pictures = now.processes, now.pictures
    log.info("resumed %s: step %d, best score %s", folder, state.step, state.best)
    return state


class Stored(Mapping[str, Tensor]):
    """Tensors of a safetensors file, each read when it is asked for."""

    def __init__(self, path: Path):
        self.path = path
        with safe_open(path, "pt") as file:
            self.names = list(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


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
