"""Drafts of answers: what a row will probably write next, guessed from its question; the model verifies it.

The answer to a class list repeats the question's names in their order, with something of its own in between:

    question   Segment this image.<cat_start> sky, car, bus <cat_end>
    answer     sky <ins> car <no_ins> bus <no_ins>

Decoding goes token by token, and every token costs a pass over all weights. A pass over a token and a draft of those
that follow costs hardly more, and the model's own choice at each position says how much of the draft is what it would
have written (speculative decoding, arXiv 2211.17192, here greedy): that much is kept, so that a draft saves passes and
never changes an answer. Drafting needs no second model and no knowledge of any system's wording: looking the last
tokens up in the prompt (prompt lookup decoding) finds nothing here, as no two names of the answer are neighbours, so a
draft copies the question with the changes that the answer has made so far.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

REACH = 4  # tokens that a change of the question writes, or leaves out, at most
FIRST = 4  # tokens of a draft after one that failed


class Draft:
    """Of one row. prompt: ids of what it answers; an image in it is negative ids."""

    def __init__(self, prompt: Sequence[int]):
        self._prompt = list(prompt)
        self._next = len(self._prompt)  # of the prompt, what the answer should copy next; at the end it copies nothing
        self._own: list[int] = []  # what the answer has written since the last token that it copied
        # at a token of the prompt: how often the answer wrote what instead of it and of how many of its neighbours
        self._changes: defaultdict[int, Counter[tuple[tuple[int, ...], int]]] = defaultdict(Counter)
        self._length = FIRST

    def wrote(self, tokens: Iterable[int], right: int = 0) -> None:
        """Takes what the row has written. right: how many of them the last draft had guessed."""
        self._length = max(FIRST, 2 * right)
        for token in tokens:
            place = self._place(token)
            if place is None:
                self._own.append(token)
                continue
            left_out = place - self._next
            if 0 <= left_out < REACH and len(self._own) < REACH and (left_out or self._own):
                self._changes[self._prompt[self._next]][tuple(self._own), left_out] += 1
            self._next, self._own = place + 1, []

    def _place(self, token: int) -> int | None:
        """Where the prompt has a token that was written: near what should come next, or, if the answer has lost the
        prompt, anywhere."""
        prompt, near = self._prompt, self._next
        if token in (ahead := prompt[near : near + REACH]):
            return near + ahead.index(token)
        if token not in prompt or (ahead and len(self._own) < REACH):
            return None
        return len(prompt) - 1 - prompt[::-1].index(token)

    def guess(self, most: int) -> list[int]:
        """The next tokens, at most `most` of them, and none before the answer has shown how it changes the question."""
        prompt, place, own, guess = self._prompt, self._next, self._own, []
        length = min(most, self._length) if self._changes else 0
        while len(guess) < length and place < len(prompt):
            if changes := self._changes.get(prompt[place]):
                ((instead, left_out), _), *_ = changes.most_common(1)
                if len(own) > len(instead):
                    break
                guess += instead[len(own) :]
                place += left_out
            elif own:
                break
            if place >= len(prompt) or prompt[place] < 0:
                break
            guess.append(prompt[place])
            place, own = place + 1, []
        return guess[:length]


class Writing:
    """An answer of at most `limit` tokens that grows by those that the model chooses, each draft of `most` at most.

    ids: what is written, the end token included. reading: what the next pass reads: the last token, then a draft.
    """

    def __init__(self, prompt: Sequence[int], limit: int, eos: int, most: int):
        self._draft, self._limit, self._eos, self._most = Draft(prompt), limit, eos, most
        self.ids: list[int] = []
        self.reading: list[int] = []

    @property
    def done(self) -> bool:
        return len(self.ids) == self._limit or self.ids[-1:] == [self._eos]

    def write(self, chosen: Sequence[int]) -> list[int]:
        """Takes the token that the model would write after each position of `reading`; those that follow upon a wrong
        one of the draft do not count. Returns the new tokens, of a finished answer none."""
        if self.done:
            return []
        drafted = self.reading[1:]
        right = next((at for at, token in enumerate(drafted) if chosen[at] != token), len(drafted))
        new = list(chosen[: right + 1])
        if self._eos in new:
            new = new[: new.index(self._eos) + 1]
        self.ids += new
        self._draft.wrote(new, right)
        self.reading = self.ids[-1:]
        if not self.done:
            self.reading += self._draft.guess(min(self._most, self._limit - len(self.ids) - 1))
        return new
