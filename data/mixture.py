"""What is trained on when: rates or epochs, and one keyed generator a sample, whatever the workers and restarts."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import cv2
import numpy as np
from torch.utils.data import DataLoader, Dataset

from data.blocklist import Blocklist
from data.collate import NothingToAsk, Sample, SampleBuilder, collate
from data.readers.index import keeping_faults
from data.sources import Source, build_source
from data.sources.base import image_paths
from data.types import Batch
from utils.config import DataConfig, DatasetConfig
from utils.log import log

DRAWS = 100  # unusable draws in a row after which a mixture gives up
SHOWN = 20  # skipped samples that are logged one by one; further ones are only counted
ON_BAD_SAMPLE = ("raise", "skip")
MISTAKES = (NameError, ImportError, NotImplementedError, AssertionError)  # of the code, whatever the data
ORDER = 1  # keys the order of an epoch apart from the samples, whose key is one number


@dataclass(frozen=True)
class Part:
    """One dataset of the mixture; `rate` is its share of all draws, up to a common factor.

    usable: the records that may be drawn; None: all. family: the entry of `data.mixture` it belongs to; what cannot be
    used is replaced within the family, as in the releases, so that the rates hold whatever is left out (lisa.md 4.1).
    """

    name: str
    source: Source
    rate: float = 1.0
    usable: Sequence[int] | None = None
    family: int = 0

    @property
    def records(self) -> Sequence[int]:
        return range(len(self.source)) if self.usable is None else self.usable


class ByRate:
    """`sampling: rates`, as published: a dataset by its rate, then one of its records uniformly."""

    def __init__(self, parts: Sequence[Part], seed: int):
        rates = np.array([part.rate for part in parts], np.float64)
        self.parts, self.shares = parts, rates / rates.sum()

    def __call__(self, index: int, rng: np.random.Generator, family: int | None) -> tuple[Part, int]:
        shares = self.shares
        if family is not None:
            shares = shares * [part.family == family for part in self.parts]
            shares = shares / shares.sum()
        part = self.parts[rng.choice(len(self.parts), p=shares)]
        return part, int(part.records[int(rng.integers(len(part.records)))])


class OnceEach:
    """`sampling: epoch`: every record of every dataset once an epoch, in an order keyed by (seed, epoch).

    Rates other than 0 mean nothing. A record that cannot be used is replaced by any other of its family.
    """

    def __init__(self, parts: Sequence[Part], seed: int):
        self.parts, self.seed = parts, seed
        self.sizes = np.array([len(part.records) for part in parts])
        self.ends = np.cumsum(self.sizes)
        self.total = int(self.ends[-1])
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __call__(self, index: int, rng: np.random.Generator, family: int | None) -> tuple[Part, int]:
        if family is not None:
            sizes = self.sizes * [part.family == family for part in self.parts]
            part = self.parts[rng.choice(len(self.parts), p=sizes / sizes.sum())]
            return part, int(part.records[int(rng.integers(len(part.records)))])
        epoch, place = divmod(index, self.total)
        number = int(self._shuffled(epoch)[place])
        which = int(np.searchsorted(self.ends, number, side="right"))
        part = self.parts[which]
        return part, int(part.records[number - int(self.ends[which]) + len(part.records)])

    def _shuffled(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            keyed = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(ORDER, epoch)))
            self._epoch, self._order = epoch, keyed.permutation(self.total)
        return self._order


SAMPLING = {"rates": ByRate, "epoch": OnceEach}


class Mixture(Dataset):
    """Sample number `index` of an endless stream: a dataset and a record by `sampling`, then the task's own chance.

    All chance comes from a generator keyed by (seed, index). A record with nothing to ask about is replaced by another
    of its family with the same generator, and so is a bad sample where `on_bad_sample` is "skip"; both are noted in
    `Sample.skipped`.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        maker: SampleBuilder,
        *,
        seed: int = 0,
        on_bad_sample: str = "raise",
        sampling: str = "rates",
    ):
        for part in parts:
            if part.rate < 0 or not np.isfinite(part.rate):
                raise ValueError(f"the rate of {part.name} is {part.rate}; it must be a number from 0 up")
        self.parts = [part for part in parts if part.rate > 0]
        if not self.parts:
            raise ValueError("data.mixture names no dataset with a rate above 0")
        for part in self.parts:
            if not len(part.records):
                raise ValueError(
                    f"dataset {part.name} is empty" + " without evaluated pictures" * bool(len(part.source))
                )
        self.pick = SAMPLING[sampling](self.parts, seed)
        self.maker = maker
        self.seed = seed
        self.on_bad_sample = on_bad_sample

    @classmethod
    def build(
        cls, data: DataConfig, maker: SampleBuilder, *, seed: int = 0, held_out: Sequence[DatasetConfig] = ()
    ) -> Mixture:
        """The mixture of a recipe. `held_out`: the sources that it is evaluated on, for `data.exclude_val`."""
        root = Path(data.dataset_dir)
        blocklist = Blocklist.build(data.exclude_val, root, held_out)
        parts, skip = [], data.on_bad_sample == "skip"
        for family, mix in enumerate(data.mixture):
            total = sum(entry.rate for entry in mix.sets)
            for entry in mix.sets if mix.rate > 0 else ():
                if entry.rate > 0:
                    with keeping_faults(skip):
                        source = build_source(entry.source, root, **entry.options)
                    name = f"{mix.task}/{entry.source} ({root})"
                    usable = blocklist.usable(entry.source, source)
                    parts.append(Part(name, source, mix.rate * entry.rate / total, usable, family))
        return cls(parts, maker, seed=seed, on_bad_sample=data.on_bad_sample, sampling=data.sampling)

    @property
    def pictures(self) -> int:
        """Records that may be drawn: the samples of an epoch where `sampling` is "epoch"."""
        return sum(len(part.records) for part in self.parts)

    def __getitem__(self, index: int) -> Sample:
        return self.sample(index)

    def sample(self, index: int) -> Sample:
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(index,)))
        skipped: list[str] = []
        family = None
        for _ in range(DRAWS):
            part, position = self.pick(index, rng, family)
            family = part.family
            try:
                sample = self.maker.build(part.source[position], rng)
            except NothingToAsk as error:
                skipped.append(f"{part.name}: {error}")
            except MISTAKES:
                raise
            except Exception as error:  # decoders raise many kinds, which may not end a run that skips bad samples
                where = picture_of(part, position, error)
                if self.on_bad_sample == "raise":
                    error.add_note(f"while making sample {index}: record {position} of {part.name}{where}")
                    raise
                skipped.append(f"{part.name}, record {position}{where}: {said(error)}")
            else:
                sample.skipped = skipped + sample.skipped
                return sample
        raise RuntimeError(f"{DRAWS} draws in a row gave no sample; the last: {skipped[-1]}")


def picture_of(part: Part, position: int, error: Exception) -> str:
    """The record's picture, where the error is of a kind that does not name a file itself."""
    if isinstance(error, (OSError, ValueError)):
        return ""
    try:
        return f" (picture {image_paths(part.source)[position]})"
    except Exception:  # the record that would tell it is the bad one
        return ""


def said(error: Exception) -> str:
    """The error's text, with its kind where that is not one of those written for people."""
    return str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"


class Stream:
    """Batches of a mixture for one process, from sample number `start` of all processes on, for ever.

    Batch number n of process r of w holds the samples start + (n * w + r) * batch_size + 0, 1, ...; so a run that is
    resumed at `position` draws what the uninterrupted one would have drawn, with any number of workers and processes.
    Workers live as long as the stream, each `prefetch` batches ahead of it.
    """

    def __init__(
        self,
        mixture: Mixture,
        batch_size: int,
        *,
        image_tokens: int,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
    ):
        self.position = start  # samples given so far by all processes, to resume from
        self._stride = batch_size * world
        self.skipped = 0  # samples left out so far
        self.cut_rows = 0  # rows so far that lack their end
        if workers:  # the tokenizer's own threads do not survive the fork
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._loader = DataLoader(
            mixture,
            batch_sampler=_Indices(batch_size, rank, world, start),
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            collate_fn=partial(collate, image_tokens=image_tokens),
            pin_memory=pin_memory,
            worker_init_fn=_quiet_worker,
        )
        self._batches: Iterator[Batch] | None = None

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            with _sigterm_blocked():
                self._batches = iter(self._loader)
        batch = next(self._batches)
        self.position += self._stride
        for message in batch.skipped[: max(0, SHOWN - self.skipped)]:
            log.warning("left out: %s", message)
        self.skipped += len(batch.skipped)
        if batch.cut_rows and not self.cut_rows:
            log.warning(
                "rows are cut at model_max_length (data.long_rows): the first %d by %d ids. The log counts them",
                batch.cut_rows,
                batch.cut_tokens,
            )
        self.cut_rows += batch.cut_rows
        return batch

    def close(self) -> None:
        """Ends the workers."""
        self._batches = None


@dataclass(frozen=True)
class _Indices:
    """The sample numbers of each batch of one process, without end."""

    batch_size: int
    rank: int
    world: int
    start: int

    def __iter__(self) -> Iterator[list[int]]:
        for first in count(self.start + self.rank * self.batch_size, self.world * self.batch_size):
            yield list(range(first, first + self.batch_size))


@contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Workers started meanwhile are born with SIGTERM blocked: a scheduler sends it to all processes of a job, and the
    batches they make are needed until the one that trains has saved."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _quiet_worker(_: int) -> None:
    cv2.setNumThreads(0)  # one worker, one core
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """SIGTERM from the process that started this worker still ends it."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
