"""One visitor's image, the conversation about it, its answers and their files, apart from everybody else's."""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
import traceback
from collections import OrderedDict
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from data.types import Query
from evaluation.export.answers import save_answer, unmentioned
from evaluation.export.suites import COCO
from evaluation.predictor import Conversation, Predictor, free_query
from evaluation.session import Exchange
from utils.images import open_image
from utils.limits import NAMES

FREE, PHRASES, CLASSES = "question", "phrases", "classes"
KINDS = (FREE, PHRASES, CLASSES)
NO_IMAGE = "There is no image yet: upload one, or choose an example."
STOPPED = "Stopped: the conversation is as if this had not been asked."
FAILED = "This could not be answered because the program failed; the server's log says why."


class Refused(ValueError):
    """What a visitor asked for cannot be done; the message is a sentence for them."""


@dataclass
class Answer:
    """What was asked, the text of the answer, what it found, and its files.

    report: that of `save_answer`: masks, absent names, file names. unmentioned: names that were asked for and of which
    the answer says nothing.
    """

    asked: str
    text: str
    notes: list[str]
    report: dict[str, Any]
    unmentioned: list[str]


@dataclass
class Talk:
    """A conversation about one image, and its answers."""

    image: Path
    size: tuple[int, int]  # height, width
    conversation: Conversation
    answers: list[Answer] = field(default_factory=list)


@dataclass
class Question:
    """What was asked, and in which conversation; None where there was no image. stop: set to interrupt its answer, also
    before that has begun."""

    kind: str
    words: str
    talk: Talk | None
    stop: threading.Event = field(default_factory=threading.Event)


class Visit:
    """Opens images and asks about them. Everything that a visitor can do wrong raises `Refused`.

    folder: of the visit alone; it and what it holds are made and removed by `Visits`.
    """

    def __init__(self, predictor: Predictor, folder: Path, max_pixels: int):
        self.predictor, self.folder, self.max_pixels = predictor, folder, max_pixels
        self.talk: Talk | None = None
        self.waiting: Question | None = None
        self.answering: Question | None = None

    def open(self, file: str | Path | None) -> Talk:
        """Starts a conversation about a copy of an image file; where it cannot be used, the one before continues."""
        if file is None:
            raise Refused("There is no file: upload an image.")
        source = Path(file)
        place = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            with open_image(source) as header:
                if header.width * header.height > self.max_pixels:
                    raise ValueError(
                        f"{header.width} x {header.height} pixels are too many: at most "
                        f"{self.max_pixels / 1e6:g} million; make the image smaller first"
                    )
            image = Path(shutil.copyfile(source, place / safe_name(source.name)))
            conversation = self.predictor.chat(image)
        except (OSError, ValueError) as error:
            shutil.rmtree(place, ignore_errors=True)
            raise Refused(f"The image cannot be opened: {_for_visitors(error, source.parent, place)}") from None
        self.close()
        height, width = conversation.session.sample.geometry.original
        self.talk = Talk(image, (height, width), conversation)
        return self.talk

    def wait(self, kind: str, words: str) -> bool:
        """A question about the image as it is now waits for the model, in place of one that waits already. False where
        it is not taken: an answer is being written, or nothing was typed and a question waits, as at a second Enter."""
        if self.answering is not None or (self.waiting is not None and not words.strip()):
            return False
        self.waiting = Question(kind, words, self.talk)
        return True

    def turn(self) -> Question | None:
        """The question that waits, which `ask` must answer now; None where there is none, or an answer is being
        written."""
        if self.answering is None:
            self.answering, self.waiting = self.waiting, None  # in this order: `stop` finds it at any time
            return self.answering
        return None

    def ask(self, question: Question) -> Generator[str, None, Answer]:
        """Yields the text so far as it grows, and returns the answer.

        Closing the generator, `stop`, another image or `forget` interrupts the answer, and the conversation is as if
        nothing had been asked.
        """
        self.answering = question
        try:
            return (yield from self._ask(question))
        finally:
            self.answering = None

    def _ask(self, question: Question) -> Generator[str, None, Answer]:
        talk = question.talk
        if talk is None:
            raise Refused(NO_IMAGE)
        if question.stop.is_set() or self.talk is not talk:
            raise Refused(STOPPED)
        queries = self._queries(question.kind, question.words)
        said: SimpleQueue[str | None] = SimpleQueue()
        done: list[Exchange | BaseException] = []
        thread = threading.Thread(target=_answer, args=(talk, queries, question.stop, said, done), daemon=True)
        thread.start()
        try:
            while (text := said.get()) is not None:
                yield text
        finally:
            if not done:  # the visitor left while the model was writing
                question.stop.set()
            thread.join()
        exchange = done[0]
        if isinstance(exchange, _Stopped):
            raise Refused(STOPPED) from None
        if isinstance(exchange, (OSError, ValueError)):
            raise Refused(f"This cannot be answered: {_for_visitors(exchange, talk.image.parent)}") from None
        if isinstance(exchange, BaseException):
            traceback.print_exception(exchange)
            raise Refused(FAILED) from None
        if self.talk is not talk:  # another conversation was begun just when the model had finished
            raise Refused(STOPPED)
        try:
            report = save_answer(talk.image, exchange.queries, exchange.replies, talk.image.parent / "answers", [COCO])
        except (OSError, ValueError) as error:
            talk.conversation.session.take_back(len(exchange.queries))  # nobody sees these rounds
            if self.talk is None or self.talk.image != talk.image:  # opened another image while masks were written
                shutil.rmtree(talk.image.parent, ignore_errors=True)
                raise Refused(STOPPED) from None
            raise Refused(f"The answer cannot be saved: {_for_visitors(error, talk.image.parent)}") from None
        silent = [name for pair in zip(exchange.queries, exchange.replies, strict=True) for name in unmentioned(*pair)]
        answer = Answer(question.words.strip(), exchange.text, exchange.notes, report, silent)
        talk.answers.append(answer)
        return answer

    def _queries(self, kind: str, words: str) -> list[Query]:
        try:
            if kind == FREE:
                return [free_query(words)]
            if kind not in KINDS:
                raise ValueError(f"no kind of question {kind!r}; have: {', '.join(KINDS)}")
            if not (names := names_of(words)):
                raise ValueError(f"{kind} are names with commas between them: sky, red car, dog")
            NAMES.check(len(names), "one question")
            return self.predictor.class_queries(names) if kind == CLASSES else self.predictor.phrase_queries(names)
        except ValueError as error:
            raise Refused(f"This cannot be asked: {_for_visitors(error)}") from None

    def stop(self) -> None:
        """Interrupts the answer that is being written, and one that waits for its turn."""
        for question in (self.waiting, self.answering):
            if question is not None:
                question.stop.set()

    def forget(self) -> None:
        """Drops all rounds and answers, not the image."""
        if self.talk is None:
            raise Refused(NO_IMAGE)
        self.stop()
        self.talk = replace(self.talk, answers=[])
        self.talk.conversation.forget()

    def close(self) -> None:
        """Ends the conversation and removes its files."""
        self.stop()
        if self.talk is not None:
            shutil.rmtree(self.talk.image.parent, ignore_errors=True)
            self.talk = None


class Visits:
    """The visits that are open, by the name of the session. Of more than `most`, the one unused for the longest ends.

    folder: below which each visit has its own.
    """

    def __init__(self, predictor: Predictor, folder: Path, *, max_pixels: int, most: int):
        self.predictor, self.folder, self.max_pixels, self.most = predictor, folder, max_pixels, most
        self._open: OrderedDict[str, Visit] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, session: str) -> Visit:
        """The visit of a session, begun where there is none."""
        with self._lock:
            if session not in self._open:
                place = Path(tempfile.mkdtemp(dir=self.folder, prefix="visit"))
                self._open[session] = Visit(self.predictor, place, self.max_pixels)
            self._open.move_to_end(session)
            ended = [self._open.popitem(last=False)[1] for _ in range(len(self._open) - self.most)]
            visit = self._open[session]
        for old in ended:
            self._end(old)
        return visit

    def leave(self, session: str) -> None:
        """Ends the visit of a session: its memory and its files are freed."""
        with self._lock:
            visit = self._open.pop(session, None)
        if visit is not None:
            self._end(visit)

    def close(self) -> None:
        """Ends all visits, and waits until the model has stopped."""
        for session in list(self._open):
            self.leave(session)
        with self.predictor.assistant.lock:
            pass

    def __len__(self) -> int:
        return len(self._open)

    @staticmethod
    def _end(visit: Visit) -> None:
        visit.close()
        shutil.rmtree(visit.folder, ignore_errors=True)


class _Stopped(Exception):
    """Raised in the thread of an answer to interrupt it."""


def _answer(
    talk: Talk,
    queries: list[Query],
    stop: threading.Event,
    said: SimpleQueue[str | None],
    done: list[Exchange | BaseException],
) -> None:
    """Asks; says the text as it grows, then None, after whatever came of it was put into `done`."""

    def on_text(text: str) -> None:
        if stop.is_set():
            raise _Stopped
        said.put(text)

    try:
        done.append(talk.conversation.session.ask(queries, on_text))
    except BaseException as error:  # it is raised again, or reported, in the thread that waits
        done.append(error)
    finally:
        said.put(None)


def names_of(words: str) -> list[str]:
    """The names of a list with commas or line ends between them, each once."""
    return list(dict.fromkeys(name.strip() for name in re.split(r"[,\n]", words) if name.strip()))


def safe_name(name: str) -> str:
    """A file name made of letters, digits, dots, dashes and underscores, of at most 80 characters."""
    stem = re.sub(r"[^\w-]+", "_", Path(name).stem)[:70]
    suffix = re.sub(r"[^\w.]", "", Path(name).suffix)[:9]
    return f"{stem or 'image'}{suffix}"


def _for_visitors(error: Exception, *folders: Path) -> str:
    """The message of an error without what is this machine's own: folders before file names, names of settings."""
    message = re.sub(r" \(set ASSISTANT_\w+ [^)]*\)", "", str(error))
    for folder in folders:
        message = message.replace(f"{folder}/", "")
    return message
