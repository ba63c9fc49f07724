"""A conversation with an assistant about one image: each question is answered with the earlier rounds before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from data.collate import Sample
from data.tokens import decode
from data.types import Query
from evaluation.protocols import Reply, answer_prompts, check_numbers, check_room, positions_taken
from model.seg_model import Memory
from systems.assistant import Assistant

OnText = Callable[[str], None]  # called with the text so far, which begins with that of the call before


@dataclass(frozen=True)
class Round:
    """A question, as if it were the first about the image, and the ids of its answer as they were generated."""

    question: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Exchange:
    """Questions that were asked together, their answers, and what there is to say about them, in sentences: rounds that
    were dropped, answers that were cut."""

    queries: list[Query]
    replies: list[Reply]
    notes: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All answers, one per line."""
        return "\n".join(reply.text for reply in self.replies)


class Session:
    """Rounds of questions about one image, the first with the image before it.

    The image is encoded once. What the language model has read, the ids of its own answers included, stays in its
    cache, so that a round costs its own tokens; the answers are those of reading everything again.

    max_new_tokens: of an answer. most_positions: that all rounds may take, image and answers included; None: those
    that the language model was made for. Where a question does not fit with an answer of `max_new_tokens`, the oldest
    rounds are dropped and a note says so; the image never is.

    Sessions of one assistant may be used from several threads: they wait for one another.
    """

    def __init__(self, assistant: Assistant, sample: Sample, max_new_tokens: int, most_positions: int | None = None):
        most = assistant.model.vlm.most_positions
        if most_positions is not None and not 0 < most_positions <= most:
            raise ValueError(f"a conversation takes 1 to {most} positions of this language model, not {most_positions}")
        self.assistant = assistant
        self.sample = sample
        self.max_new_tokens = max_new_tokens
        self.most_positions = most_positions or most
        self.rounds: list[Round] = []
        self._memory = Memory()

    def ask(self, queries: Sequence[Query], on_text: OnText | None = None) -> Exchange:
        """Asks one question after another, as rounds.

        on_text: called with the text of all answers so far, at each new piece of it; it must not ask itself. ValueError
        for a question that cannot be asked. Whatever is raised, also by `on_text` or Ctrl-C, leaves the conversation as
        it was before.
        """
        exchange = Exchange(list(queries), [])
        with self.assistant.lock:
            rounds = begun = self.rounds
            for number, query in enumerate(queries, 1):
                rounds, ids, room = self._fit(rounds, query.question, exchange.notes)
                begin = "".join(f"{reply.text}\n" for reply in exchange.replies)
                written = _Written(self.assistant.tokenizer, begin, on_text)
                (reply,) = answer_prompts(self.assistant, [self.sample], [[ids]], room, self._memory, written)
                check_numbers(self.assistant, self.sample, [reply])
                written.finish(reply.text)
                if not reply.finished:
                    what = "The answer" if len(queries) == 1 else f"Answer {number} of {len(queries)}"
                    full = f": with it all {self.most_positions} positions are taken"
                    limit = " (max_new_tokens)" if room == self.max_new_tokens else full
                    exchange.notes.append(f"{what} was cut after {room} tokens{limit}.")
                exchange.replies.append(reply)
                rounds = [*rounds, Round(query.question, tuple(written.ids))]
            begun[:] = rounds  # in place: where `forget` has begun a new list meanwhile, that one stays empty
        return exchange

    def take_back(self, rounds: int) -> None:
        """Drops the last rounds, as if they had not been asked."""
        with self.assistant.lock:
            del self.rounds[max(0, len(self.rounds) - rounds) :]

    def forget(self) -> None:
        """Drops all rounds, also that of an answer that is being written; the image stays encoded and read. Waits for
        nobody's answer."""
        self.rounds = []

    def _fit(self, rounds: list[Round], question: str, notes: list[str]) -> tuple[list[Round], list[int], int]:
        """The rounds that stay, the ids of the prompt, and the number of tokens that the answer may take."""
        encoder, kept = self.assistant.encoder, rounds
        while True:
            try:
                ids = encoder.continued([(past.question, past.ids) for past in kept], question)
            except ValueError as error:
                raise ValueError(f"{self.sample.name}: {error}") from None
            room = self.most_positions - positions_taken(self.sample, ids)
            if room >= self.max_new_tokens or not kept:
                break
            kept = kept[1:]
        check_room(self.sample, ids, self.most_positions)
        if dropped := len(rounds) - len(kept):
            what = "The oldest round is" if dropped == 1 else f"The {dropped} oldest rounds are"
            notes.append(
                f"{what} forgotten: the conversation and an answer of up to {self.max_new_tokens} tokens would take "
                f"more than {self.most_positions} positions."
            )
        return kept, ids, min(room, self.max_new_tokens)


class _Written:
    """Collects the ids of an answer and passes its text on. begin: the text before it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, begin: str, on_text: OnText | None):
        self.ids: list[int] = []
        self._tokenizer, self._begin, self._on_text, self._said = tokenizer, begin, on_text, begin

    def __call__(self, token: int) -> None:
        self.ids.append(token)
        if self._on_text is not None:
            text = decode(self.ids, self._tokenizer)
            if not text.endswith("\ufffd"):  # a letter of which some bytes are still to come
                self.finish(text)

    def finish(self, text: str) -> None:
        whole = self._begin + text
        if self._on_text is not None and whole != self._said and whole.startswith(self._said):
            self._said = whole
            self._on_text(whole)
