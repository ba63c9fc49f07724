"""Which sample comes next in training: by rates or by epochs, from one generator per sample.

The generator of sample n is keyed by (seed, n) and by nothing else, so the stream of samples is the same for any number
of workers and processes, and a resumed run continues it exactly.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

MAX_TRIES = 100  # unusable records in a row after which a mixture gives up
LOGGED_SKIPS = 20  # skipped samples that are logged one by one; further ones are only counted
ON_BAD_SAMPLE = ("raise", "skip")
MISTAKES = (NameError, ImportError, NotImplementedError, AssertionError)  # of the code, whatever the data
# Prefix of the seed key of an epoch's permutation: keys of samples have length 1, so the two never collide.
ORDER = 1


@dataclass(frozen=True)
class Part:
    """One dataset of the mixture.

    rate: its share of all samples, up to a common factor.
    usable: the records that may be sampled; None: all.
    family: the entry of `data.mixture` that it belongs to. A record that cannot be used is replaced within its family,
        as in the releases, so that the rates of the families hold whatever is left out (lisa.md 4.1).
    """

    name: str
    source: Source
    rate: float = 1.0
    usable: Sequence[int] | np.ndarray | None = None
    family: int = 0

    @property
    def records(self) -> Sequence[int] | np.ndarray:
        return range(len(self.source)) if self.usable is None else self.usable


class ByRate:
    """`sampling: rates`, as published: a dataset by its rate, then one of its records uniformly.

    Called with (sample number, generator, family); a family other than None restricts the datasets to that family.
    """

    def __init__(self, parts: Sequence[Part], seed: int):
        rates = np.array([part.rate for part in parts], np.float64)
        self.parts = parts
        self.shares = rates / rates.sum()

    def __call__(self, index: int, rng: np.random.Generator, family: int | None) -> tuple[Part, int]:
        shares = self.shares
        if family is not None:  # a replacement: the rates inside the family, rescaled
            shares = shares * [part.family == family for part in self.parts]
            shares = shares / shares.sum()
        part = self.parts[rng.choice(len(self.parts), p=shares)]
        return part, int(part.records[int(rng.integers(len(part.records)))])


class OnceEach:
    """`sampling: epoch`: every record of every dataset once per epoch, in an order keyed by (seed, epoch).

    Rates other than 0 have no effect. A record that cannot be used is replaced by any other of its family.
    """

    def __init__(self, parts: Sequence[Part], seed: int):
        self.parts, self.seed = parts, seed
        self.sizes = np.array([len(part.records) for part in parts])
        self.ends = np.cumsum(self.sizes)
        self.total = int(self.ends[-1])
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __call__(self, index: int, rng: np.random.Generator, family: int | None) -> tuple[Part, int]:
        if family is not None:  # a replacement, at random: the order of the epoch has no place for it
            sizes = self.sizes * [part.family == family for part in self.parts]
            part = self.parts[rng.choice(len(self.parts), p=sizes / sizes.sum())]
            return part, int(part.records[int(rng.integers(len(part.records)))])
        epoch, place = divmod(index, self.total)
        number = int(self._permutation(epoch)[place])  # of a record, counted through all datasets
        which = int(np.searchsorted(self.ends, number, side="right"))
        part = self.parts[which]
        first = int(self.ends[which]) - len(part.records)
        return part, int(part.records[number - first])

    def _permutation(self, epoch: int) -> np.ndarray:
        """The order of an epoch; the last one is kept, as samples of one epoch follow each other."""
        if epoch != self._epoch:
            keyed = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(ORDER, epoch)))
            self._epoch, self._order = epoch, keyed.permutation(self.total)
        return self._order


SAMPLING = {"rates": ByRate, "epoch": OnceEach}


class Mixture(Dataset):
    """Sample number `index` of an endless stream: a dataset and a record by `sampling`, then words by the task.

    All randomness comes from a generator keyed by (seed, index). A record with nothing to ask about is replaced by
    another of its family with the same generator, and so is a bad sample if `on_bad_sample` is "skip"; both are noted
    in `Sample.skipped`.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        builder: SampleBuilder,
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
                left_out = " without evaluated images" if len(part.source) else ""
                raise ValueError(f"dataset {part.name} is empty{left_out}")
        self.pick = SAMPLING[sampling](self.parts, seed)
        self.builder = builder
        self.seed = seed
        self.on_bad_sample = on_bad_sample

    @classmethod
    def build(
        cls, data: DataConfig, builder: SampleBuilder, *, seed: int = 0, held_out: Sequence[DatasetConfig] = ()
    ) -> Mixture:
        """The mixture of a recipe. `held_out`: the sources that it is evaluated on, for `data.exclude_val`."""
        root = Path(data.dataset_dir)
        parts = []
        skip = data.on_bad_sample == "skip"
        with keeping_faults(skip):
            blocklist = Blocklist.build(data.exclude_val, root, held_out)
        for family, mix in enumerate(data.mixture):
            total = sum(entry.rate for entry in mix.sets)
            if mix.rate > 0 and total == 0:
                raise ValueError(
                    f"data.mixture: {mix.task} has the rate {mix.rate:g} and no set with a rate above 0; with rate: 0 "
                    "it is left out"
                )
            for entry in mix.sets:
                if mix.rate > 0 and entry.rate > 0:  # datasets without a rate need not be there
                    with keeping_faults(skip):
                        source = build_source(entry.source, root, **entry.options)
                    name = f"{mix.task}/{entry.source} ({root})"
                    usable = blocklist.usable(entry.source, source)
                    parts.append(Part(name, source, mix.rate * entry.rate / total, usable, family))
        return cls(parts, builder, seed=seed, on_bad_sample=data.on_bad_sample, sampling=data.sampling)

    @property
    def num_records(self) -> int:
        """Number of records that may be sampled, the length of an epoch if `sampling` is "epoch"."""
        return sum(len(part.records) for part in self.parts)

    def __getitem__(self, index: int) -> Sample:
        return self.sample(index)

    def sample(self, index: int) -> Sample:
        """Sample number `index`, the same for every call. RuntimeError after MAX_TRIES unusable records in a row."""
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(index,)))
        skipped: list[str] = []
        family = None
        for _ in range(MAX_TRIES):
            # The first record decides the family, and replacements stay in it: else a family with many unusable
            # records would lose part of its rate to the others. They take further numbers from the same generator,
            # so a sample depends on its index alone, not on what was skipped before it.
            part, position = self.pick(index, rng, family)
            family = part.family
            try:
                sample = self.builder.build(part.source[position], rng)
            except NothingToAsk as error:
                skipped.append(f"{part.name}: {error}")
            except MISTAKES:
                raise
            except Exception as error:  # damaged files raise almost anything, and must not end a run that skips them
                where = image_note(part, position, error)
                if self.on_bad_sample == "raise":
                    error.add_note(f"while making sample {index}: record {position} of {part.name}{where}")
                    raise
                skipped.append(f"{part.name}, record {position}{where}: {error_text(error)}")
            else:
                sample.skipped = skipped + sample.skipped
                return sample
        raise RuntimeError(f"{MAX_TRIES} records in a row gave no sample; the last: {skipped[-1]}")


def image_note(part: Part, position: int, error: Exception) -> str:
    """A note that names the record's image, if the error is of a kind that does not name a file itself."""
    if isinstance(error, (OSError, ValueError)):
        return ""
    try:
        return f" (image {image_paths(part.source)[position]})"
    except Exception:  # the source reads its records for the paths, and this record is the bad one
        return ""


def error_text(error: Exception) -> str:
    """The error's text, with its class unless it is one whose messages are written for people."""
    return str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"


class Stream:
    """Endless batches of a mixture for one process; `start` is the first sample number, over all processes.

    Batch number n of process r of w holds the samples start + (n * w + r) * batch_size + 0, 1, ...; so a run that is
    resumed at `position` samples what the uninterrupted one would have, with any number of workers and processes.
    Workers live as long as the stream, each `prefetch` batches ahead of it.
    """

    def __init__(
        self,
        mixture: Mixture,
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
    ):
        self.position = start  # samples used so far by all processes, to resume from
        self._stride = batch_size * world
        self.skipped = 0  # samples left out so far
        self.cut_rows = 0  # rows so far without their end
        if workers:  # the tokenizer's own threads do not survive a fork
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._loader = DataLoader(
            mixture,
            batch_sampler=_Indices(batch_size, rank, world, start),
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            collate_fn=collate,
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
        for message in batch.skipped[: max(0, LOGGED_SKIPS - self.skipped)]:
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
    """The sample numbers of every batch of one process, endlessly."""

    batch_size: int
    rank: int
    world: int
    start: int

    def __iter__(self) -> Iterator[list[int]]:
        for first in count(self.start + self.rank * self.batch_size, self.world * self.batch_size):
            yield list(range(first, first + self.batch_size))


@contextmanager
def _sigterm_blocked() -> Generator[None]:
    """Workers that start inside this block inherit a blocked SIGTERM.

    A scheduler sends SIGTERM to all processes of a job, but training still needs batches until it has saved.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _quiet_worker(_: int) -> None:
    cv2.setNumThreads(0)  # OpenCV's own threads would compete with the other workers
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """Ends this worker at a SIGTERM from its parent, e.g. when the loader is closed; other senders are ignored."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
