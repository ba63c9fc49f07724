"""A conversation in a terminal: reads questions and commands, prints answers, saves them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data.types import Query
from evaluation.console import Command, Console, Typist, remembered_interrupt, typed_path
from evaluation.export.answers import save_answer, save_conversation
from evaluation.predictor import Conversation, Predictor, free_query


@dataclass
class Subject:
    """What a conversation is about, the conversation, and the reports of its answers."""

    image: Path
    conversation: Conversation
    reports: list[dict[str, Any]] = field(default_factory=list)


class Talk:
    """Reads questions and commands until the input ends.

    With an image, from --image or /image, questions are rounds of a conversation about it. Without one, the program
    asks for an image after each question, which knows nothing of earlier ones, as in the original.
    """

    def __init__(self, predictor: Predictor, args: argparse.Namespace):
        self.predictor, self.args = predictor, args
        self.subject: Subject | None = None
        self.leaving = False
        self.console = Console(
            [
                Command(
                    "/image PATH", "starts a conversation about an image", lambda words: self.open(typed_path(words))
                ),
                Command("/new", "forgets the conversation, not its image", self.forget),
                Command("/classes A, B, C", "looks for each of these classes", self.classes),
                Command("/save [FOLDER]", "saves the whole conversation with its masks in a new folder", self.save),
                Command("/help", "lists the commands", lambda _: print(self.console.help())),
                Command("/quit", "leaves, as Ctrl-D does", self.quit),
            ]
        )

    def run(self) -> int:
        """Returns the exit status."""
        if self.args.image:
            self.open(self.args.image)
            if self.subject is None:
                return 1
        else:
            print("/image PATH starts a conversation about an image; /help lists the commands.")
        while not self.leaving:
            line = self.console.read("> " if self.subject else "Please input your prompt (Ctrl-D leaves): ")
            if line is None:
                break
            if not line:
                print("The prompt is empty; type a question about an image.")
            elif self._command(line):
                continue
            elif self.subject is not None:
                self.answer(self.subject, line, "")
            else:
                self.ask_once(line)
        return 0

    def ask_once(self, prompt: str) -> None:
        """Asks for an image, and it alone the question. A command in place of the image drops the question."""
        line = self.console.read("Please input the image path: ", again=False)
        if line is None:
            self.leaving = True
            return
        if not line:
            print("No image: the question is dropped.")
            return
        if self.console.find(line):
            self.console.run(line)
            return
        try:
            answer(self.predictor, typed_path(line), prompt, "", self.args)
        except KeyboardInterrupt:
            print("\nStopped.")

    def _command(self, line: str) -> bool:
        try:
            return self.console.run(line)
        except KeyboardInterrupt:  # in the middle of a large image, or of many files
            print("\nStopped.")
            return True

    def answer(self, subject: Subject, prompt: str, classes: str) -> None:
        """Asks in the conversation, prints words as they come, saves."""
        with remembered_interrupt() as check:
            typist = Typist(check)
            try:
                queries = make_queries(self.predictor, prompt, classes)
                exchange = subject.conversation.session.ask(queries, typist)
            except KeyboardInterrupt:
                print("\nStopped: the conversation is as if this had not been asked.")
                return
            except (OSError, ValueError, torch.OutOfMemoryError) as error:
                print(f"{typist.line_end}Cannot answer: {error}")
                return
        print()
        try:
            report = save_answer(
                subject.image, exchange.queries, exchange.replies, self.args.vis_save_path, self.args.export
            )
        except KeyboardInterrupt:
            print("\nStopped: the files of this answer are incomplete.")
        except (OSError, ValueError) as error:
            print(f"Cannot save the answer: {error}")
        else:
            print_found(report)
            subject.reports.append({**report, "notes": exchange.notes})
        print("".join(f"  {note}\n" for note in exchange.notes), end="")

    def open(self, path: str) -> None:
        """Starts a conversation; where the image cannot be used, the one before continues."""
        if not path:
            print("/image needs the path of an image file.")
            return
        try:
            conversation = self.predictor.chat(path, most_positions=self.args.model_max_length)
        except (OSError, ValueError) as error:
            print(f"Cannot open the image: {error}")
            return
        self.subject = Subject(Path(path), conversation)
        height, width = conversation.session.sample.geometry.original
        print(f"A conversation about {path} ({width} x {height}); /help lists the commands.")

    def forget(self, _: str) -> None:
        if subject := self._subject():
            subject.conversation.forget()
            subject.reports.clear()
            print(f"A new conversation about {subject.image}.")

    def classes(self, names: str) -> None:
        if subject := self._subject():
            if names.strip(" ,"):
                self.answer(subject, "", names)
            else:
                print("/classes needs names: /classes road, car, sky")

    def save(self, words: str) -> None:
        if subject := self._subject():
            if not subject.reports:
                print("There is nothing to save: nothing was asked yet.")
                return
            folder = Path(typed_path(words) or self.args.vis_save_path)
            try:
                place = save_conversation(subject.image, subject.reports, folder)
            except OSError as error:
                print(f"Cannot save: {error}")
            else:
                print(f"Saved {len(subject.reports)} answers in {place}")

    def quit(self, _: str) -> None:
        self.leaving = True

    def _subject(self) -> Subject | None:
        if self.subject is None:
            print("There is no conversation yet: /image PATH starts one about an image.")
        return self.subject


def answer(predictor: Predictor, image: str, prompt: str, classes: str, args: argparse.Namespace) -> bool:
    """Asks, prints and saves. Prints what is wrong with the image or the words and returns False where there is no
    answer."""
    try:
        queries = make_queries(predictor, prompt, classes)
        (replies,) = predictor.replies([image], [queries])
    except (OSError, ValueError) as error:
        print(f"Cannot answer: {error}")
        return False
    print("\n".join(reply.text for reply in replies))
    try:
        report = save_answer(Path(image), queries, replies, args.vis_save_path, args.export)
    except (OSError, ValueError) as error:
        print(f"Cannot save the answer: {error}")
        return False
    print_found(report)
    if cut := sum(not reply.finished for reply in replies):
        what = "The answer was" if len(replies) == 1 else f"{cut} of {len(replies)} answers were"
        print(f"  {what} cut at --max_new_tokens {args.max_new_tokens}, or at the language model's last position.")
    return True


def print_found(report: dict[str, Any]) -> None:
    """Prints what `save_answer` has saved."""
    for mask in report["masks"]:
        size = f"{mask['area']} pixels ({mask['share']:.1%})"
        name = mask["name"] or "mask"
        if mask["instead"]:
            name += " (what is there instead)"
        print(f"  {name}: {size}, {mask['colour']} -> {mask['file']}")
    for name in report["absent"]:
        print(f"  {name}: not in the image")
    if not report["masks"]:
        print("  no mask in this answer")
    print(f"  saved {report['overlay']}")


def make_queries(predictor: Predictor, prompt: str, classes: str) -> list[Query]:
    """The prompt as it is, after the image, or the system's own questions about a class list."""
    if prompt.strip():
        return [free_query(prompt)]
    return predictor.class_queries([name.strip() for name in classes.split(",") if name.strip()])
