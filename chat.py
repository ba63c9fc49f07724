"""Answers questions about images with text and masks.

    python chat.py --version CHECKPOINT --image dog.jpg     # a conversation about an image; /help lists its commands
    python chat.py --version CHECKPOINT                     # asks for a question and an image path, again and again
    python chat.py --version CHECKPOINT --image dog.jpg --prompt "Where is the dog?"
    python chat.py --version CHECKPOINT --image street.jpg --classes "road,car,sky"  # a class list

In a conversation a question knows the earlier ones, words are printed as they are written, and Ctrl-C stops an answer.
Each answer writes one PNG per mask, an overlay, and a JSON file with text, names, scores and areas to
--vis_save_path; --export adds COCO results, and for class lists semantic and panoptic PNG files.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.types import Query
from evaluation.cli import Parser, add_model_flags, load_assistant
from evaluation.console import Command, Console, Typist
from evaluation.export.answers import save_answer, save_conversation
from evaluation.export.suites import COCO, FORMS
from evaluation.predictor import Conversation, Predictor, free_query
from utils.flags import at_least
from utils.log import setup_logging


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    setup_logging()
    predictor = Predictor(load_assistant(args), max_new_tokens=args.max_new_tokens)
    if args.prompt or args.classes:
        return 0 if answer(predictor, args.image, args.prompt, args.classes, args) else 1
    return Talk(predictor, args).run()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_model_flags(parser)
    chat = parser.add_argument_group("question and answer")
    chat.add_argument("--image", metavar="FILE", help="image of a conversation, or of a single question")
    chat.add_argument("--prompt", default="", metavar="TEXT", help="a single question about --image")
    chat.add_argument("--classes", default="", metavar="A,B,C", help="look for each of these classes in --image")
    chat.add_argument(
        "--max_new_tokens", type=at_least(1), default=512, metavar="N", help="token limit of an answer [512]"
    )
    chat.add_argument(
        "--model_max_length",
        type=at_least(1),
        metavar="N",
        help="positions that a conversation may take, the image's included; default: all of the language model",
    )
    chat.add_argument(
        "--vis_save_path", type=Path, default=Path("./vis_output"), metavar="FOLDER", help="for answers [./vis_output]"
    )
    chat.add_argument(
        "--export",
        nargs="+",
        default=[],
        choices=FORMS,
        metavar="FORM",
        help="also write coco (results JSON), semantic or panoptic (PNG; of --classes); see docs/judge.md",
    )
    args = parser.parse(argv)
    if set(args.export) - {COCO} and args.prompt:
        parser.error("--export semantic and panoptic are of a class list: give --classes")
    if not args.version:
        parser.error("--version is needed: a run folder, a merged folder or a published checkpoint")
    if (args.prompt or args.classes) and not args.image:
        parser.error("--prompt and --classes go with --image; without them the program asks")
    if (args.prompt or args.classes) and bool(args.prompt.strip()) == bool(args.classes.strip(" ,")):
        parser.error("--image needs a --prompt or a list of --classes, one of the two, and not an empty one")
    return args


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
                Command("/image PATH", "starts a conversation about an image", self.open),
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
            elif self.console.run(line):
                continue
            elif self.subject is not None:
                self.answer(self.subject, line, "")
            else:
                self.ask_once(line)
        return 0

    def ask_once(self, prompt: str) -> None:
        """Asks for an image, and it alone the question."""
        image = self.console.read("Please input the image path: ")
        if image is None:
            self.leaving = True
            return
        try:
            answer(self.predictor, image, prompt, "", self.args)
        except KeyboardInterrupt:
            print("\nStopped.")

    def answer(self, subject: Subject, prompt: str, classes: str) -> None:
        """Asks in the conversation, prints words as they come, saves."""
        typist = Typist()
        try:
            queries = make_queries(self.predictor, prompt, classes)
            exchange = subject.conversation.session.ask(queries, typist)
        except KeyboardInterrupt:
            print("\nStopped: the conversation is as if this had not been asked.")
            return
        except (OSError, ValueError) as error:
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

    def save(self, folder: str) -> None:
        if subject := self._subject():
            if not subject.reports:
                print("There is nothing to save: nothing was asked yet.")
                return
            try:
                place = save_conversation(subject.image, subject.reports, Path(folder or self.args.vis_save_path))
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
        report = save_answer(Path(image), queries, replies, args.vis_save_path, args.export)
    except (OSError, ValueError) as error:
        print(f"Cannot answer: {error}")
        return False
    print("\n".join(entry["text"] for entry in report["answers"]))
    print_found(report)
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


if __name__ == "__main__":
    raise SystemExit(main())
