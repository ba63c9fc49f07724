"""From what an answer claims to what was asked: names to classes, claims to phrases."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rapidfuzz import fuzz, process, utils

from data.types import Claim

MARKS = " ,.;:"  # what `systems.reading.read_claims` takes off the words before a mask
TOKEN = re.compile(r"\[[A-Z]+\d*\]|</?[a-z_]+>")  # as systems add them


def compact(name: str) -> str:
    """A name without its blanks and capitals: decoders differ in where they put them."""
    return "".join(name.lower().split())


def bare(name: str) -> str:
    """The same without the marks around it, which an answer's punctuation cannot be told from: `misc.`, `.38`."""
    return compact(name).strip(MARKS)


def without_tokens(answer: str) -> str:
    """The words of an answer, its mask and refusal tokens gone."""
    return TOKEN.sub(" ", answer).strip()


class Names:
    """The label set of a picture, for looking claimed names up."""

    def __init__(self, names: Sequence[str]):
        self.names = list(names)
        numbered = list(reversed(list(enumerate(self.names))))
        self._index = {compact(name): index for index, name in numbered}
        self._bare = {bare(name): index for index, name in numbered if bare(name)}

    def exact(self, name: str) -> int | None:
        """Index of the class so named, blanks and capitals aside, and the marks around names that have some."""
        index = self._index.get(compact(name))
        return self._bare.get(bare(name)) if index is None else index

    def fuzzy(self, name: str) -> int | None:
        """Index of the most similar class, however little similar: as released (lasagna.md 7.2). None of no name."""
        if not compact(name):
            return None
        best = process.extractOne(compact(name), self.names, scorer=fuzz.WRatio, processor=utils.default_process)
        return best[2] if best else None


@dataclass(frozen=True)
class ListReading:
    """What an answer to a class list claims: (class, k-th mask) in the answer's order.

    `unmatched` counts the claims that name none of the classes: parse failures.
    """

    masks: tuple[tuple[int, int], ...]
    unmatched: int = 0


def read_list(claims: Sequence[Claim], asked: Sequence[str], names: Names, *, fuzzy: bool = False) -> ListReading:
    """Claims to classes of `names`. Whatever answers a question about a single class is about that class."""
    find = names.fuzzy if fuzzy else names.exact
    masks, unmatched = [], 0
    for claim in about_asked(claims):
        index = names.exact(asked[0]) if len(asked) == 1 else find(claim.phrase)
        if index is None:
            unmatched += 1
        elif claim.mask is not None:
            masks.append((index, claim.mask))
    return ListReading(tuple(masks), unmatched)


def assign(claims: Sequence[Claim], asked: Sequence[str]) -> list[int | None]:
    """The mask of each asked phrase: index into the answer's masks, None where it was refused or not answered."""
    return [claim.mask if claim else None for claim in assign_claims(claims, asked)]


def assign_claims(claims: Sequence[Claim], asked: Sequence[str]) -> list[Claim | None]:
    """The claim about each asked phrase, None where there is none.

    One phrase: the first mask of the answer, or its first refusal. Several: by name where the claims carry the names
    asked, each claim used once; claims without a known name take the phrases still open, in order.
    """
    claims = about_asked(claims)
    if len(asked) == 1:
        return [next((claim for claim in claims if claim.mask is not None), claims[0] if claims else None)]
    found: dict[int, Claim] = {}
    nameless = []
    for claim in claims:
        still = [i for i in range(len(asked)) if i not in found]
        same = [i for i in still if compact(asked[i]) == compact(claim.phrase)]
        same = same or [i for i in still if bare(asked[i]) == bare(claim.phrase) != ""]
        if same:
            found[same[0]] = claim
        else:
            nameless.append(claim)
    still_open = [index for index in range(len(asked)) if index not in found]
    found.update(zip(still_open, nameless, strict=False))
    return [found.get(index) for index in range(len(asked))]


def about_asked(claims: Sequence[Claim]) -> list[Claim]:
    """Without what an answer offers in the place of what it refuses."""
    return [claim for claim in claims if not claim.is_substitute]
