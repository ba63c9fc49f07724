"""What is trained on when: nested rates, and one keyed generator a sample, whatever the workers and restarts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from torch.utils.data import DataLoader, Dataset

from data.collate import Maker, NothingToAsk, Sample, collate
from data.sources import Source, build_source
from data.types import Batch
from utils.config import DataConfig
from utils.log import log
from utils.registry import unknown

DRAWS = 100  # unusable draws in a row after which a mixture gives up
SHOWN = 20  # skipped samples that are logged one by one; further ones are only counted
ON_BAD_SAMPLE = ("raise", "skip")


@dataclass(frozen=True)
class Part:
    """One dataset of the mixture; `rate` is its share of all draws, up to a common factor."""

    name: str
    source: Source
    rate: float = 1.0


class Mixture(Dataset):
    """Sample number `index` of an endless stream: dataset by rate, then record uniformly, then the task's own chance.

    All chance comes from a generator keyed by (seed, index). A record with nothing to ask about is drawn anew from the
    same generator, and so is a bad sample where `on_bad_sample` is "skip"; both are noted in `Sample.skipped`.
    `excluded`: `picture_key`s that are never trained on.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        maker: Maker,
        *,
        seed: int = 0,
        on_bad_sample: str = "raise",
        excluded: frozenset[str] = frozenset(),
    ):
        if on_bad_sample not in ON_BAD_SAMPLE:
            raise ValueError(unknown("data.on_bad_sample", on_bad_sample, ON_BAD_SAMPLE))
        for part in parts:
            if part.rate < 0 or not np.isfinite(part.rate):
                raise ValueError(f"the rate of {part.name} is {part.rate}; it must be a number from 0 up")
        self.parts = [part for part in parts if part.rate > 0]
        if not self.parts:
            raise ValueError("data.mixture names no dataset with a rate above 0")
        for part in self.parts:
            if not len(part.source):
                raise ValueError(f"dataset {part.name} is empty")
        rates = np.array([part.rate for part in self.parts], np.float64)
        self.shares = rates / rates.sum()
        self.maker = maker
        self.seed = seed
        self.on_bad_sample = on_bad_sample
        self.excluded = excluded

    @classmethod
    def build(cls, data: DataConfig, maker: Maker, *, seed: int = 0, held_out: Sequence[str] = ()) -> Mixture:
        """The mixture of a recipe. `held_out`: names of validation sets, whose pictures `data.exclude_val` excludes."""
        root = Path(data.dataset_dir)
        parts = []
        for mix in data.mixture:
            total = sum(entry.rate for entry in mix.sets)
            for entry in mix.sets if mix.rate > 0 else ():
                if entry.rate > 0:
                    source = build_source(entry.source, root, **entry.options)
                    name = f"{mix.task}/{entry.source} ({root})"
                    parts.append(Part(name, source, mix.rate * entry.rate / total))
        excluded = frozenset().union(*(picture_keys(build_source(name, root)) for name in held_out if data.exclude_val))
        return cls(parts, maker, seed=seed, on_bad_sample=data.on_bad_sample, excluded=excluded)

    def __getitem__(self, index: int) -> Sample:
        return self.draw(index)

    def draw(self, index: int) -> Sample:
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(index,)))
        skipped = []
        for _ in range(DRAWS):
            part = self.parts[rng.choice(len(self.parts), p=self.shares)]
            position = int(rng.integers(len(part.source)))
            try:
                record = part.source[position]
                if self.excluded and picture_key(record.image) in self.excluded:
                    continue
                sample = self.maker.make_sample(record, rng)
            except NothingToAsk as error:
                skipped.append(f"{part.name}: {error}")
            except (OSError, ValueError) as error:
                if self.on_bad_sample == "raise":
                    error.add_note(f"while making sample {index}: record {position} of {part.name}")
                    raise
                skipped.append(f"{part.name}, record {position}: {error}")
            else:
                sample.skipped = skipped + sample.skipped
                return sample
        raise RuntimeError(f"{DRAWS} draws in a row gave no sample; the last: {(skipped or ['excluded pictures'])[-1]}")


class Stream:
    """Batches of a mixture for one process, from batch number `start` on, for ever.

    Batch number n of process r of w holds the samples (n * w + r) * batch_size + 0, 1, ...; n counts micro-batches, so
    a run that is resumed at `position` draws what the uninterrupted one would have drawn, with any number of workers.
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
        pin_memory: bool = False,
    ):
        self.position = start  # batches given so far, to resume from
        self.skipped = 0  # samples left out so far
        if workers:  # the tokenizer's own threads do not survive the fork
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._loader = DataLoader(
            mixture,
            batch_sampler=_Indices(batch_size, rank, world, start),
            num_workers=workers,
            collate_fn=partial(collate, image_tokens=image_tokens),
            pin_memory=pin_memory,
            worker_init_fn=_quiet_worker,
        )
        self._batches: Iterator[Batch] | None = None

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = iter(self._loader)
        batch = next(self._batches)
        self.position += 1
        for message in batch.skipped[: max(0, SHOWN - self.skipped)]:
            log.warning("left out: %s", message)
        self.skipped += len(batch.skipped)
        return batch


@dataclass(frozen=True)
class _Indices:
    """The sample numbers of each batch of one process, without end."""

    batch_size: int
    rank: int
    world: int
    start: int

    def __iter__(self) -> Iterator[list[int]]:
        number = self.start
        while True:
            first = (number * self.world + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))
            number += 1


def _quiet_worker(_: int) -> None:
    cv2.setNumThreads(0)  # one worker, one core


def picture_keys(source: Source) -> frozenset[str]:
    """The pictures of a dataset."""
    return frozenset(picture_key(source[index].image) for index in range(len(source)))


def picture_key(path: str | Path) -> str:
    """Tells pictures apart across datasets: the name without ending, and without COCO's split before the number."""
    stem = Path(path).stem
    return stem.rsplit("_", 1)[-1] if stem.startswith("COCO_") else stem
