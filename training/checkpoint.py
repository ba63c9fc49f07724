"""Checkpoints of a run: plain tensors by name, either complete or not there, a bounded number of them.

checkpoints/step_500/trainable.safetensors             every trained weight, fp32, by its name in the model
checkpoints/step_500/{exp_avg,exp_avg_sq}.safetensors  the optimizer's moments of each
checkpoints/step_500/engine.json                       updates made, place in the schedule, loss scale
checkpoints/step_500/state.json                        step, samples taken, best score, processes
checkpoints/step_500/sums.json                         size and checksum of each tensor file
checkpoints/last, checkpoints/best                     text files that name one of the folders
checkpoints/aside_step_500                             a newer one, renamed when a run resumed from an earlier one

Any other folder there is the user's own and is neither read nor removed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.checkpoints.files import save_safetensors
from training.engine import Engine
from training.optimizer_state import MOMENTS, WEIGHT
from utils import dist
from utils.config import Recipe, TrainConfig
from utils.files import DRAFT, describe_write_error, flush, free_space, write_atomically
from utils.log import log

WEIGHTS, STATE, COUNTERS, SUMS = "trainable.safetensors", "state.json", "engine.json", "sums.json"
TENSORS = {WEIGHT: WEIGHTS, **{kind: f"{kind}.safetensors" for kind in MOMENTS}}
FILES = (STATE, COUNTERS, *TENSORS.values())  # that every checkpoint has; early ones have no sums
NAME = re.compile(r"step_(0|[1-9]\d*)")
ASIDE = "aside_"
EXPLODED = 1e3  # Adam moves a weight by its rate per step; those of trained models stay below 100
CHUNK = 1 << 24  # bytes read at once


@dataclass
class TrainState:
    """What the loop needs to resume besides weights and optimizer. Random numbers depend on (seed, step) alone, so no
    generator state is saved."""

    step: int = 0  # optimizer steps done
    samples: int = 0  # taken from the mixture by all processes together: its position
    skipped: int = 0  # micro-batches left out because of a loss that is not finite
    lost_updates: int = 0  # steps whose update was dropped because of a gradient that is not finite
    validated: int = 0  # step of the last validation
    best: float | None = None  # best validation score so far
    best_step: int | None = None  # of the checkpoint that has it
    no_better: int = 0  # validations since then, none of which had a better score
    processes: int = 1
    pictures: int = 0  # global batch size: images per step, all processes together
    meters: list[dict[str, Any]] = field(default_factory=list)  # each process's sums since the last line of the log

    @classmethod
    def begin(cls, recipe: Recipe) -> TrainState:
        return cls(processes=dist.world_size(), pictures=global_batch_size(recipe.train, dist.world_size()))

    def forget_best(self) -> None:
        """The next score is the best, whatever came before."""
        self.best, self.no_better = None, 0


def global_batch_size(train: TrainConfig, processes: int) -> int:
    return train.batch_size * train.grad_accumulation_steps * processes


class Checkpoints:
    """The folder `checkpoints/` of a run.

    keep: how many of the newest ones stay (the best one stays as well). size: bytes of one, for error messages.
    """

    def __init__(self, folder: Path, keep: int = 2, size: int = 0):
        self.folder = folder
        self.keep = max(1, keep)
        self.size = size

    def prepare(self) -> None:
        """Makes the folder and removes what a killed process left half done (main process)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(f"{DRAFT}*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def save(self, engine: Engine, state: TrainState) -> Path:
        """Writes a checkpoint. All processes call it; the main process writes.

        A process may be killed at any line of this, by SIGKILL or with the machine. So everything is written into a
        draft folder, flushed to the disk, and only then renamed: a rename either happened or did not. A folder named
        step_500 is therefore complete, and `prepare` removes drafts. The pointer `last` follows the rename and is only
        a convenience: `last()` looks at the folders.

        Raises on all processes, and leaves earlier checkpoints as they were, where a weight is not finite or beyond
        EXPLODED (FloatingPointError) or something cannot be written (OSError).
        """
        name = f"step_{state.step}"
        target = self.folder / name
        draft = self.folder / f"{DRAFT}{name}"
        try:
            dist.on_main(partial(_empty, draft))
            # Gathering is collective, so all processes do it; one kind at a time, to hold a third in CPU memory.
            for kind, file in TENSORS.items():
                tensors = engine.gather(kind)
                dist.on_main(partial(_store, tensors, draft / file, self.last()))
            counters = engine.counters()
            dist.on_main(partial(self._finish, draft, target, counters, state))
        except OSError as error:
            raise OSError(
                f"{error}. The checkpoint of step {state.step} takes about {self.size / 2**30:.2f} GiB and was not "
                f"saved; what was saved before is complete ({self.last() or 'nothing'}). Make room and give the same "
                "command again"
            ) from None
        finally:
            if dist.is_main():
                shutil.rmtree(draft, ignore_errors=True)
        return target

    def _finish(self, draft: Path, target: Path, counters: dict[str, Any], state: TrainState) -> None:
        try:
            (draft / COUNTERS).write_text(json.dumps(counters), encoding="utf-8")
            (draft / STATE).write_text(json.dumps(asdict(state)), encoding="utf-8")
            (draft / SUMS).write_text(json.dumps({file: _sum(draft / file) for file in TENSORS.values()}))
            flush(*draft.iterdir(), draft)
            self._set_aside(target)  # this run has not saved this step: a folder of that name is somebody else's
            os.replace(draft, target)
            flush(self.folder)  # the rename itself is an entry of this folder
        except OSError as error:
            raise describe_write_error(error, target) from None
        self._point("last", target.name)
        self._thin()

    def note(self, state: TrainState, *, best: bool) -> None:
        """Adds the result of validation to the checkpoint of this step, if this run has saved one.

        The pointer `best` is written before the state. A run killed between the two resumes from a state without this
        validation, validates again and points again; the other way round, the pointer would stay wrong.
        """
        target = self.folder / f"step_{state.step}"
        saved = dist.on_main(target.is_dir)
        if best and not saved:  # weights of another run: a score to which nothing here belongs
            state.forget_best()
            best = False
        if best:
            state.best_step = state.step
        if dist.is_main() and saved:
            if best:
                self._point("best", target.name)
            store_state(state, target)
            self._thin()
        dist.barrier()

    def complete(self) -> list[Path]:
        """Checkpoints, oldest first, judged by their names (`damage` reads the files)."""
        paths = [path for path in self.folder.glob("step_*") if NAME.fullmatch(path.name)]
        checkpoints = [path for path in paths if path.is_dir() and any((path / file).is_file() for file in FILES)]
        return sorted(checkpoints, key=step_of)

    def last(self) -> Path | None:
        """The newest checkpoint, whatever the pointer says: a process may be killed between the two."""
        complete = self.complete()
        return complete[-1] if complete else None

    def check(self, checkpoint: Path) -> None:
        """Raises where the checkpoint to resume from is damaged; the message names the newest undamaged one."""
        reason = damage(checkpoint)
        if reason is None:
            return
        message = f"{checkpoint} {reason}"
        if checkpoint.parent.resolve() == self.folder.resolve():
            older = [path for path in self.complete() if step_of(path) < step_of(checkpoint)]
            undamaged = next((path for path in reversed(older) if not damage(path)), None)
            if undamaged:
                message += (
                    f". {undamaged.name}, which came before, is complete: --resume {undamaged} resumes from it and "
                    f"renames what is newer to {ASIDE}*"
                )
            else:
                message += ". No earlier one here is complete: choose another --exp_name to begin again"
        raise (FileNotFoundError if "not a complete" in reason else ValueError)(message)

    def resume_at(self, checkpoint: Path | None, state: TrainState) -> TrainState:
        """Makes the folder consistent with a run that resumes from `checkpoint` (main process).

        Newer checkpoints of this run are renamed, `last` and `best` point at what is there, drafts are removed. Returns
        the state, without a best score where its checkpoint is not in this folder.
        """
        self.prepare()
        if checkpoint is None or checkpoint.parent.resolve() != self.folder.resolve():  # new, or from another run
            for pointer in ("last", "best"):
                (self.folder / pointer).unlink(missing_ok=True)
            state.forget_best()
            state.best_step = None
            state.meters = []  # sums since the last line of the other run's log
            return state
        for path in self.complete():
            if step_of(path) > state.step:
                self._set_aside(path)
        self._point("last", checkpoint.name)
        best = f"step_{state.best_step}" if state.best_step is not None else self._pointed("best")
        if best and (self.folder / best / WEIGHTS).is_file() and NAME.fullmatch(best):
            self._point("best", best)
            return state
        if best:
            log.warning("%s: the best checkpoint, %s, is not there any more; the next one counts", checkpoint, best)
        (self.folder / "best").unlink(missing_ok=True)
        state.forget_best()
        state.best_step = None
        return state

    def _set_aside(self, path: Path) -> None:
        """Renames a checkpoint to aside_<name>, aside_<name>_1, ...: nothing that could be of use is removed."""
        if not path.exists():
            return
        names = (f"{ASIDE}{path.name}{f'_{number}' if number else ''}" for number in range(10**6))
        place = next(self.folder / name for name in names if not (self.folder / name).exists())
        path.rename(place)
        log.warning("%s was renamed to %s", path, place.name)

    def _point(self, pointer: str, name: str) -> None:
        write_atomically(self.folder / pointer, name + "\n")

    def _pointed(self, pointer: str) -> str | None:
        """The name in a pointer file."""
        path = self.folder / pointer
        return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else None

    def _thin(self) -> None:
        """Removes all but the newest ones and the best one."""
        best = self._pointed("best")
        for path in self.complete()[: -self.keep]:
            if path.name != best:
                # Renamed first: a folder that is half removed must not have a checkpoint's name.
                removing = self.folder / f"{DRAFT}removing_{path.name}"
                os.replace(path, removing)
                shutil.rmtree(removing, ignore_errors=True)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words that follow its name; None where nothing is.

    Compares checksums, so it reads the tensor files from end to end.
    """
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        return f"is not a complete checkpoint: expected {', '.join(missing)} there"
    sums: dict[str, Any] = {}
    for name in (STATE, COUNTERS, SUMS):
        try:
            values = json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else {}
            if name == STATE and f"step_{values['step']}" != folder.name and NAME.fullmatch(folder.name):
                return f"is damaged: {name} is of step {values['step']}"
            if name == SUMS:
                sums = values
            if name == COUNTERS and not {"updates", "schedule", "loss_scale"} <= values.keys():
                return f"is damaged: {name} lacks fields"
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"is damaged: {name} cannot be read"
    for name in TENSORS.values():
        try:
            with safe_open(folder / name, "pt"):
                pass
        except SafetensorError as error:
            return f"is damaged: {name}: {error}"
        if name in sums and sums[name] != _sum(folder / name):
            return f"is damaged: {name} is not what was written"
    return None


def store_state(state: TrainState, checkpoint: Path) -> None:
    """Replaces the state in a checkpoint (main process)."""
    write_atomically(checkpoint / STATE, json.dumps(asdict(state)))


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint, also of one that stands aside (`aside_step_500_1`)."""
    found = NAME.match(checkpoint.name.removeprefix(ASIDE))
    return int(found[1]) if found else 0


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise describe_write_error(error, folder) from None


def _store(tensors: dict[str, Tensor], file: Path, before: Path | None) -> None:
    """Writes tensors to a file. Raises FloatingPointError, so that no run resumes from diverged weights, where a value
    is not finite or a weight is larger than EXPLODED. before: the last checkpoint, for the message."""
    # Minimum and maximum take one pass over a tensor and need no copy of it, and NaN passes through both.
    extremes = {name: torch.stack(tensor.aminmax()) for name, tensor in tensors.items() if tensor.numel()}
    not_finite = [name for name, pair in extremes.items() if not pair.isfinite().all()]
    largest = {name: float(pair.abs().max()) for name, pair in extremes.items()}
    huge = [name for name, value in largest.items() if value > EXPLODED] if file.name == WEIGHTS else []
    if not_finite or huge:
        if not_finite:
            what = f"{len(not_finite)} are not finite"
        else:
            what = f"{len(huge)} have weights up to {max(largest[name] for name in huge):.3g}"
        examples = ", ".join((not_finite or huge)[:5])
        raise FloatingPointError(
            f"the run has diverged: of {len(tensors)} tensors for {file.parent.name.removeprefix(DRAFT)}/{file.name} "
            f"{what} ({examples}). Nothing was saved; the last checkpoint is {before or 'none'}. A lower train.lr, a "
            "longer train.warmup_steps or model.precision=bf16 instead of fp16 may help"
        )
    try:
        save_safetensors(tensors, file)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{file} cannot be written: {error} ({free_space(file)})") from None


def _sum(file: Path) -> list[int]:
    """Size and CRC-32 of a file."""
    checksum = 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return [file.stat().st_size, checksum]


def restore(engine: Engine, folder: Path, recipe: Recipe) -> TrainState:
    """Loads a checkpoint into the engine and returns its state. It may have been saved by another number of processes
    and another ZeRO stage.

    Raises FileNotFoundError where it is incomplete, ValueError where it is of a model in which other weights train, or
    counts epochs in other steps.
    """
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} is not a complete checkpoint: expected {', '.join(missing)} there")
    names = {field.name for field in fields(TrainState)}  # a later version may have saved more
    values = json.loads((folder / STATE).read_text(encoding="utf-8"))
    state = TrainState(**{key: value for key, value in values.items() if key in names})
    now = TrainState.begin(recipe)
    by_records = recipe.data.sampling == "epoch" and recipe.train.steps is None and recipe.train.steps_per_epoch is None
    if by_records and state.pictures not in (0, now.pictures):
        raise ValueError(
            f"{folder}: its {state.step} steps had {state.pictures} images each; with {now.pictures} an epoch of "
            "data.sampling epoch has another number of steps, and the run would not have train.epochs of them: choose "
            "train.batch_size x train.grad_accumulation_steps x processes as before, or state train.steps"
        )
    counters = json.loads((folder / COUNTERS).read_text(encoding="utf-8"))
    engine.restore({kind: Stored(folder / file) for kind, file in TENSORS.items()}, counters)
    if state.pictures and state.pictures != now.pictures:
        log.warning(
            "%s was trained with %d images per step, now it is %d (batch size x accumulation x processes): "
            "set train.grad_accumulation_steps for the same",
            *(folder, state.pictures, now.pictures),
        )
    state.processes = now.processes
    state.pictures = now.pictures
    log.info("resumed %s: step %d, best score %s", folder, state.step, state.best)
    return state


class Stored(Mapping[str, Tensor]):
    """Tensors of a safetensors file by name, each read when it is looked up: no more than one is in memory."""

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
        probe = folder / f"{DRAFT}probe"
        probe.write_text("x", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        raise OSError(f"the run folder {folder} cannot be written ({error.strerror}); see --log_base_dir") from None
    room = shutil.disk_usage(folder).free
    if room < needed_bytes:
        raise OSError(
            f"the run folder {folder} has {room / 2**30:.1f} GiB free and a checkpoint needs about "
            f"{needed_bytes / 2**30:.1f} GiB; free some, or see --log_base_dir and train.keep_checkpoints"
        )
