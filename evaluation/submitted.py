"""Predictions of other programs: finds the question that each entry is about, and makes the answer that entries are.

Files come from strangers: entries are kept on disk, and their masks are decoded only when their image is scored.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from data.collate import NothingToAsk
from data.sources import Source
from data.types import Claim
from evaluation.asked import Asked, asked_about, image_id, image_name, query_id
from evaluation.entries import MASK_FIELDS, Found, check_entry, entries_of, phrase_of
from evaluation.metrics.matching import Names, compact
from evaluation.protocols import Reply
from utils.limits import ENTRIES
from utils.masks import segmentation_to_mask

Size = tuple[int, int]


class BadEntry(ValueError):
    """A prediction that cannot be read; the message names file and place. Nothing is scored then."""


class Unknown(Exception):
    """An entry that is about nothing that the suites ask; it is counted, and not scored."""


class OtherSuite(Unknown):
    """An entry of a suite that is not judged now."""


@dataclass
class Gaps:
    """Queries that no entry or several entries answer."""

    missing: Found = field(default_factory=Found)
    absent: int = 0  # of the missing ones, those about what is not there
    doubled: Found = field(default_factory=Found)

    def add_missing(self, catalogue: Catalogue, index: int, number: int) -> None:
        self.missing.add(query_id(catalogue.name, index, number))
        self.absent += (index, number) in catalogue.absent


@dataclass(frozen=True)
class Entry:
    """An entry of a file about one question. where: file and line or number of the entry, for messages.

    phrase: the one that it is about, where it names a phrase or class; "" where it names none.
    """

    where: str
    values: Mapping[str, Any]
    number: int
    phrase: str


class Catalogue:
    """The questions of one suite, to be looked up by what an entry says of them. keep_faults: a record that cannot be
    read has none here, and is met again where its answers are scored."""

    def __init__(self, name: str, source: Source, root: Path, keep_faults: bool = False):
        self.name = name
        self.asked: dict[int, dict[int, Asked]] = {}  # index -> number -> question
        self.absent: set[tuple[int, int]] = set()  # index and number of questions about what is not there
        self._images: dict[str, set[int]] = defaultdict(set)  # path, name or number -> indices
        for index in range(len(source)):
            try:
                record = source[index]
            except (OSError, ValueError):
                if not keep_faults:
                    raise
                continue
            for key in {image_name(record.image, root), record.image.name, str(image_id(record.image, index))}:
                self._images[key].add(index)
            with suppress(NothingToAsk):
                self.asked[index] = {asked.number: asked for asked in asked_about(record)}
            for number, asked in self.asked.get(index, {}).items():
                if len(asked.query.targets) == 1 and record.targets[asked.query.targets[0]].mask is None:
                    self.absent.add((index, number))

    def find(self, values: Mapping[str, Any]) -> tuple[int, int, str]:
        """(index, number, phrase) of the question of an entry. Unknown where there is none, ValueError where what the
        entry says fits several."""
        if "query" in values:
            index, number, phrase = self._by_id(values)
        else:
            index, phrase = self._by_image(values), ""
            number = self._by_words(self.asked[index], values)
        return index, number, mask_phrase(values, self.asked[index][number]) or phrase

    def _by_id(self, values: Mapping[str, Any]) -> tuple[int, int, str]:
        name = values["query"]
        suite, _, rest = name.partition("/")
        index, _, number = rest.partition("/")
        if suite != self.name or not (index.isdecimal() and number.isdecimal()) or len(rest) > 20:
            raise Unknown(f"no query {name!r}")
        wanted = int(number)
        for first, asked in self.asked.get(int(index), {}).items():
            if wanted != first and wanted not in asked.query.targets:  # any target of a question stands for it
                continue
            # The number of a whole answer is that of its first target; that of a single mask is its own.
            several = len(asked.phrases) > 1 and not asked.is_list
            whole = wanted == first and (_is_whole(values, asked) or not several)
            return int(index), first, "" if whole else asked.query.phrases[asked.query.targets.index(wanted)]
        raise Unknown(f"no query {name!r}")

    def _by_image(self, values: Mapping[str, Any]) -> int:
        keys = [str(values[key]).replace("\\", "/") for key in ("image", "file_name", "image_id") if key in values]
        if not keys:
            raise ValueError("names no query: it has neither 'query' nor 'image', 'file_name' or 'image_id'")
        found = self._images.get(keys[0], set())
        if not found:
            raise Unknown(f"no image {keys[0]!r}")
        if len(found) > 1:
            raise ValueError(f"{len(found)} images are called {keys[0]!r}; give 'query', or the path of the image")
        (index,) = found
        if index not in self.asked:
            raise Unknown(f"nothing is asked about {keys[0]!r}")
        return index

    def _by_words(self, questions: Mapping[int, Asked], values: Mapping[str, Any]) -> int:
        words = str(values.get("question") or phrase_of(values))
        if len(questions) == 1:
            ((number, asked),) = questions.items()
            # What a mask is called is no question where the question does not name it, or where it lists classes.
            if not words or (not asked.phrases and "question" not in values) or asked.is_list:
                return number
        if not words:
            raise ValueError(f"{len(questions)} queries are about its image; give 'query' or 'phrase'")
        numbers = [number for number, asked in questions.items() if _asks(asked, words)]
        if not numbers:
            raise Unknown(f"no query {words!r} about its image")
        if len(numbers) > 1:
            raise ValueError(f"{len(numbers)} queries about its image are {words!r}; give 'query'")
        return numbers[0]


class Submission:
    """The entries of files for some suites, on disk in a form that is read image by image."""

    def __init__(self, catalogues: Mapping[str, Catalogue]):
        self.catalogues = catalogues
        self.unknown = Found()
        self.others = Found()  # of suites that are not judged now
        self.protocols: dict[str, set[str]] = defaultdict(set)  # by suite
        self.worded: set[str] = set()  # suites with an answer in words
        self.files: list[str] = []
        self._places: dict[tuple[str, int], list[int]] = defaultdict(list)  # (suite, index) -> offsets
        self._answers: Counter[tuple[str, int, int]] = Counter()  # entries per question, and those that are answers
        self._entries: Counter[tuple[str, int, int]] = Counter()
        self._masks: Counter[tuple[str, int, int, str]] = Counter()  # masks and refusals per phrase of a question
        self._spool = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as this object)
        self._end = 0

    def add(self, path: Path) -> None:
        """Reads a file. ValueError with the file and the line or the number of the entry for a damaged one."""
        self.files.append(path.name)
        for count, (where, values) in enumerate(entries_of(path), 1):
            ENTRIES.check(count, str(path))
            check_entry(values, where)
            try:
                suite, (index, number, phrase) = self._find(values)
            except OtherSuite as error:
                self.others.add(str(error))
                continue
            except Unknown as error:
                self.unknown.add(f"{where}: {error}")
                continue
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            if "protocol" in values:
                self.protocols[suite].add(values["protocol"])
            if values.get("text", "").strip():
                self.worded.add(suite)
            self._count(suite, index, number, phrase, values, where)
            self._places[suite, index].append(self._end)
            self._end += self._spool.write((json.dumps([where, number, phrase, values]) + "\n").encode())

    def has(self, suite: str) -> bool:
        """Whether any entry is about the suite."""
        return any(name == suite for name, _ in self._places)

    def of_image(self, suite: str, index: int) -> list[Entry]:
        """The entries about an image, in the order of the files."""
        entries = []
        for place in self._places.get((suite, index), ()):
            self._spool.seek(place)
            where, number, phrase, values = json.loads(self._spool.readline())
            entries.append(Entry(where, values, number, phrase))
        return entries

    def gaps(self, suite: str, indices: Iterable[int], *, by_phrase: bool) -> Gaps:
        """The queries without an entry; those with several answers, or with several masks of one phrase."""
        gaps = Gaps()
        for index in indices:
            for number, asked in self.catalogues[suite].asked.get(index, {}).items():
                key = suite, index, number
                names = [_key(name, asked) for name in asked.query.phrases]
                several = by_phrase and any(self._masks[*key, name] > _room(name, asked) for name in names)
                if not self._entries[key]:
                    gaps.add_missing(self.catalogues[suite], index, number)
                elif several or self._answers[key] > 1:
                    gaps.doubled.add(query_id(*key))
        return gaps

    def _count(self, suite: str, index: int, number: int, phrase: str, values: Mapping[str, Any], where: str) -> None:
        asked = self.catalogues[suite].asked[index][number]
        key = suite, index, number
        self._entries[key] += 1
        self._answers[key] += _is_whole(values, asked)
        if "segmentation" in values or values.get("refused"):
            self._masks[*key, _key(phrase, asked)] += 1
        for place, mask in enumerate(values.get("masks", ())):
            try:
                name = mask_phrase(mask, asked) or phrase
            except Unknown as error:
                self.unknown.add(f"{where}: masks[{place}]: {error}")
            else:
                self._masks[*key, _key(name, asked)] += 1

    def _find(self, values: Mapping[str, Any]) -> tuple[str, tuple[int, int, str]]:
        """The suite and the question of an entry. Without a suite's name it is looked for in all of them."""
        suite = values.get("suite") or str(values.get("query", "")).partition("/")[0]
        if suite:
            if suite not in self.catalogues:
                raise OtherSuite(suite)
            return suite, self.catalogues[suite].find(values)
        hits, reasons = [], []
        for name, catalogue in self.catalogues.items():
            try:
                hits.append((name, catalogue.find(values)))
            except Unknown as error:
                reasons.append(str(error))
        if len(hits) > 1:
            raise ValueError(f"fits several suites ({', '.join(name for name, _ in hits)}); give 'suite' or 'query'")
        if not hits:
            raise Unknown(reasons[0])
        return hits[0]


def mask_phrase(values: Mapping[str, Any], asked: Asked) -> str:
    """The phrase or class that a mask names, "" where it names none. Unknown for one that is not in a class list."""
    phrase, names = phrase_of(values), asked.query.phrases
    if not asked.is_list:
        return phrase
    if phrase:
        place = _look_up(names).exact(phrase)
        if place is None:
            raise Unknown(f"no class {phrase!r}")
        return names[place]
    place = values.get("category_id")
    if place is not None and not 0 <= place < len(names):
        raise Unknown(f"no category {place} in a list of {len(names)}")
    return "" if place is None else names[place]


def _key(name: str, asked: Asked) -> str:
    """Stands for the phrase that a mask of this name is of; a single phrase has all masks, whatever their names."""
    return compact(name) if len(asked.query.phrases) > 1 else ""


def _room(key: str, asked: Asked) -> int:
    """How many masks of this key an answer may have: a question may ask for two things by one name."""
    return max(1, sum(_key(phrase, asked) == key for phrase in asked.query.phrases)) if key else 1


def _place(entry: Entry, asked: Asked) -> int | None:
    """Of a single mask without a name that has the number of one of several targets: the target's place among them."""
    number = str(entry.values.get("query", "")).rpartition("/")[2]
    named = _is_whole(entry.values, asked) or phrase_of(entry.values)
    if named or len(asked.phrases) < 2 or not number.isdecimal():
        return None
    targets = asked.query.targets
    return targets.index(int(number)) if int(number) in targets else None


def _is_whole(values: Mapping[str, Any], asked: Asked) -> bool:
    """Whether an entry is the whole answer to its question, not one mask of it or the refusal of one of its phrases."""
    if values.get("refused") and len(asked.query.phrases) == 1:
        return True
    return "masks" in values or not any(key in values for key in MASK_FIELDS)


@cache
def _look_up(names: tuple[str, ...]) -> Names:
    return Names(names)


def _asks(asked: Asked, words: str) -> bool:
    """Whether a question is these words, or asks for them among others."""
    return compact(words) in (compact(asked.query.question), *map(compact, asked.phrases))


def answer_from(entries: Sequence[Entry], asked: Asked, size: Size, by_phrase: bool) -> tuple[Reply, list[float]]:
    """The answer that entries about a question stand for, and the score of each of its masks, 1 where none is given.

    The last whole answer counts, with all masks that are entries of their own and are not refused later. by_phrase: of
    several masks of a phrase the one of the highest score counts, the first of equal ones. Where masks of classes
    overlap, a higher score wins.
    """
    whole = [entry for entry in entries if _is_whole(entry.values, asked)][-1:]
    parts = _parts_of(entries, asked)
    found: list[tuple[str, float, torch.Tensor, int]] = []
    taken: dict[str | int, list[int]] = defaultdict(list)  # what masks are of -> their places in `found`
    for entry, values, where in _masks_of([*whole, *parts]):
        try:
            name = mask_phrase(values, asked) or entry.phrase
        except Unknown:  # counted when the file was read
            continue
        score = float(values.get("score", 1.0))
        key, place = _key(name, asked), _place(entry, asked)
        once = by_phrase and (key or len(asked.query.phrases) == 1)
        slots = taken[key if place is None else place]
        full = once and len(slots) >= (1 if place is not None else _room(key, asked))
        lowest = min(slots, key=lambda slot: found[slot][1], default=0)
        if full and found[lowest][1] >= score:
            continue
        try:
            mask = torch.from_numpy(segmentation_to_mask(values["segmentation"], size))
        except ValueError as error:
            raise BadEntry(f"{where}: {error}") from None
        one = name, score, mask, len(asked.query.phrases) if place is None else place
        if full:
            found[lowest] = one
        else:
            slots.append(len(found))
            found.append(one)
    found.sort(key=itemgetter(3))  # of phrases with the same words, the first one has the first mask
    scores = [score for _, score, *_ in found]
    ranks = {score: place for place, score in enumerate(sorted(set(scores)), 1)}
    masks = torch.full((len(found), *size), -1.0)
    for place, (_, score, mask, _) in enumerate(found):
        masks[place][mask] = ranks[score] / len(ranks) if asked.is_list else 1.0
    text = next((entry.values["text"] for entry in reversed(entries) if "text" in entry.values), "")
    claims = tuple(Claim(name, place) for place, (name, *_) in enumerate(found))
    return Reply(text, claims, masks), scores


def _parts_of(entries: Sequence[Entry], asked: Asked) -> list[Entry]:
    """The masks that are entries of their own, without those that a later entry refuses by their phrase."""
    parts: list[Entry] = []
    for entry in entries:
        if entry.values.get("refused"):
            parts = [part for part in parts if _key(part.phrase, asked) != _key(entry.phrase, asked)]
        elif not _is_whole(entry.values, asked):
            parts.append(entry)
    return parts


def _masks_of(entries: Sequence[Entry]) -> Iterator[tuple[Entry, dict[str, Any], str]]:
    """(entry, mask, its place) of every mask of entries."""
    for entry in entries:
        if "segmentation" in entry.values and not entry.values.get("refused"):
            yield entry, dict(entry.values), entry.where
        for place, mask in enumerate(entry.values.get("masks", ())):
            if not mask.get("refused"):
                yield entry, mask, f"{entry.where}: masks[{place}]"
