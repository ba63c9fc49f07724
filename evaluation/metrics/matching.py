"""Matches what an answer claims with what the question is about: names with classes, claims with phrases."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from data.types import Claim
from systems.reading import MARKS

TOKEN = re.compile(r"\[[A-Z]+\d*\]|</?[a-z_]+>|<\|[a-z_]+\|>")  # tokens that systems add: [SEG0], <ins>, </p>, <|seg|>


def compact(name: str) -> str:
    """A name without blanks and in lower case: tokenizers differ in where they decode blanks. Some also compose letters
    and accents, as in a `é` that a file has as two characters."""
    return "".join(unicodedata.normalize("NFC", name).lower().split())


def bare(name: str) -> str:
    """The same without punctuation around it, since an answer may put its own there.

    `misc.` at the end of a sentence and the class `misc.` are the same name, `misc`.
    """
    return compact(name).strip(MARKS)


def without_tokens(answer: str) -> str:
    """The words of an answer, without mask and refusal tokens."""
    return TOKEN.sub(" ", answer).strip()


class Names:
    """The class list of an image, to look up claimed names in."""

    def __init__(self, names: Sequence[str]):
        self.names = list(names)
        # Reversed, so that of two names with the same form the first keeps its index.
        numbered = list(reversed(list(enumerate(self.names))))
        self._index = {compact(name): index for index, name in numbered}
        self._bare = {bare(name): index for index, name in numbered if bare(name)}

    def exact(self, name: str) -> int | None:
        """Index of the class of this name, whatever its blanks and capitals; else by `bare`. None of another name."""
        index = self._index.get(compact(name))
        return self._bare.get(bare(name)) if index is None else index

    def fuzzy(self, name: str) -> int | None:
        """Index of the most similar class, however small the similarity: as released (lasagna.md 7.2). None of an empty
        name."""
        if not compact(name):
            return None
        from rapidfuzz import fuzz, process, utils  # of the published scoring alone: answering does without

        best = process.extractOne(compact(name), self.names, scorer=fuzz.WRatio, processor=utils.default_process)
        return None if best is None else best[2]


@dataclass(frozen=True)
class ListReading:
    """What an answer to a class list claims.

    masks: (class index, index into the answer's masks) in the answer's order. unmatched: the number of claims that name
    none of the classes.
    """

    masks: tuple[tuple[int, int], ...]
    unmatched: int = 0


def read_list(claims: Sequence[Claim], phrases: Sequence[str], names: Names, *, fuzzy: bool = False) -> ListReading:
    """Matches claims with classes of `names`; for a question about a single class see `about_one`."""
    find = names.fuzzy if fuzzy else names.exact
    masks, unmatched = [], 0
    claims = without_substitutes(claims)
    if len(phrases) == 1:
        whole, claims = len(claims), about_one(claims, phrases[0])
        unmatched = whole - len(claims)
    for claim in claims:
        index = names.exact(phrases[0]) if len(phrases) == 1 else find(claim.phrase)
        if index is None:
            unmatched += 1
        elif claim.mask is not None:
            masks.append((index, claim.mask))
    return ListReading(tuple(masks), unmatched)


def assign(claims: Sequence[Claim], phrases: Sequence[str]) -> list[int | None]:
    """The mask of each phrase of a question: index into the answer's masks, None if refused or not answered."""
    return [claim.mask if claim else None for claim in assign_claims(claims, phrases)]


def assign_claims(claims: Sequence[Claim], phrases: Sequence[str]) -> list[Claim | None]:
    """The claim about each phrase of a question, None where there is none.

    One phrase: of the claims `about_one`, the first with a mask, else the first refusal. Several: claims with a
    phrase's name belong to that phrase, each claim used once; claims with another name or none take the remaining
    phrases, in order. Asked for "cup", "plate", "fork", an answer that claims "plate", "it", "cup" gives "fork" the
    claim "it".
    """
    claims = without_substitutes(claims)
    if len(phrases) == 1:
        claims = about_one(claims, phrases[0])
        return [next((claim for claim in claims if claim.mask is not None), claims[0] if claims else None)]
    claim_of: dict[int, Claim] = {}
    unnamed = []
    for claim in claims:
        remaining = [i for i in range(len(phrases)) if i not in claim_of]
        same = [i for i in remaining if compact(phrases[i]) == compact(claim.phrase)]
        if not same and bare(claim.phrase):
            same = [i for i in remaining if bare(phrases[i]) == bare(claim.phrase)]
        if same:
            claim_of[same[0]] = claim
        else:
            unnamed.append(claim)
    remaining = [index for index in range(len(phrases)) if index not in claim_of]
    claim_of.update(zip(remaining, unnamed, strict=False))
    return [claim_of.get(index) for index in range(len(phrases))]


def about_one(claims: Sequence[Claim], phrase: str) -> list[Claim]:
    """The claims that answer a question about a single thing: those that have its name. Where none has it, all of them,
    since such an answer is about that thing whatever it calls it ("sky [REJ], road [SEG]" says nothing of a mask of the
    sky; "It is [SEG]" and "the heavens [SEG]" do)."""
    named = [claim for claim in claims if bare(claim.phrase) and bare(claim.phrase) == bare(phrase)]
    return named or list(claims)


def without_substitutes(claims: Sequence[Claim]) -> list[Claim]:
    """The claims about what was asked, not those about what an answer offers in place of what it refuses."""
    return [claim for claim in claims if not claim.is_substitute]
