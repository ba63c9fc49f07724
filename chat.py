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
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.types import Query
from data.views import read_image
from evaluation.cli import Parser, add_model_flags, load_assistant
from evaluation.console import Command, Console, Typist
from evaluation.export.coco import coco_results
from evaluation.export.label_maps import panoptic_image, save_png, semantic_image
from evaluation.export.suites import COCO, FORMS, PANOPTIC, SEMANTIC
from evaluation.metrics.matching import Names
from evaluation.metrics.semantic import read_masks, standard_map
from evaluation.predictor import Conversation, Predictor, free_query, mask_score, segments_of
from evaluation.protocols import Reply
from evaluation.report.draw import Layer, colour_of, with_legend
from utils.files import write_atomically
from utils.flags import at_least
from utils.log import setup_logging

ENDINGS = {COCO: "_coco.json", SEMANTIC: "_semantic.png", PANOPTIC: "_panoptic.png"}  # of exported files


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
            report = save(subject.image, exchange.queries, exchange.replies, self.args.vis_save_path, self.args.export)
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
        report = save(Path(image), queries, replies, args.vis_save_path, args.export)
    except (OSError, ValueError) as error:
        print(f"Cannot answer: {error}")
        return False
    print("\n".join(entry["text"] for entry in report["answers"]))
    print_found(report)
    return True


def print_found(report: dict[str, Any]) -> None:
    """Prints what `save` has saved."""
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


def save(
    image: Path, queries: Sequence[Query], replies: Sequence[Reply], folder: Path, forms: Sequence[str] = ()
) -> dict[str, Any]:
    """Writes masks, overlay, JSON and exports under names that are still free; returns the content of the JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = free_name(folder, image.stem)
    exported = export_answers(folder / stem, queries, replies, forms)
    pixels = read_image(image)
    report: dict[str, Any] = {"image": str(image), "answers": [], "masks": [], "absent": []}
    layers = []
    for query, reply in zip(queries, replies, strict=True):
        report["answers"].append({"question": query.question, "text": reply.text, "finished": reply.finished})
        for claim in reply.claims:
            name = claim.phrase or (query.phrases[0] if len(query.phrases) == 1 else "")
            if claim.mask is None:
                if name:  # a refusal without a name is already in the text
                    report["absent"].append(name)
                continue
            mask = (reply.masks[claim.mask] > 0).cpu().numpy()
            file = folder / f"{stem}_mask_{len(layers)}.png"
            Image.fromarray(mask.astype(np.uint8) * 255).save(file)
            colour = colour_of(len(layers))
            size = {"area": int(mask.sum()), "share": float(mask.mean())}
            confidence = None if reply.scores is None else float(reply.scores[claim.mask])
            entry = {
                "name": name,
                "instead": claim.is_substitute,
                "score": mask_score(reply.masks[claim.mask], confidence),
                "colour": "#" + bytes(colour).hex(),
                "file": str(file),
            }
            report["masks"].append({**entry, **size})
            layers.append(Layer(mask, name, colour))
    report["overlay"] = str(folder / f"{stem}_overlay.png")
    Image.fromarray(with_legend(pixels, layers)).save(report["overlay"])
    if exported:
        report["exports"] = [str(path) for path in exported]
    _write_json(folder / f"{stem}.json", report)
    return report


def export_answers(stem: Path, queries: Sequence[Query], replies: Sequence[Reply], forms: Sequence[str]) -> list[Path]:
    """Writes the answers in these forms to files that begin with `stem`; returns the files.

    Semantic and panoptic images are of class lists: the classes are numbered as they were asked.
    """
    written = []
    names = list(dict.fromkeys(name for query in queries for name in query.phrases))
    if COCO in forms:
        segments = [
            replace(segment, phrase=segment.phrase or (query.phrases[0] if len(query.phrases) == 1 else ""))
            for query, reply in zip(queries, replies, strict=True)
            for segment in segments_of(reply)
        ]
        written.append(stem.with_name(f"{stem.name}{ENDINGS[COCO]}"))
        write_atomically(written[-1], json.dumps(coco_results(segments, names=names)) + "\n", errors="backslashreplace")
    if not names or not set(forms) - {COCO}:
        return written
    masks, _ = read_masks(replies, queries, Names(names), fuzzy=False)
    class_map = standard_map(masks, replies[0].size, none=len(names), device=replies[0].masks.device).cpu().numpy()
    class_map[class_map == len(names)] = -1
    categories = [{"id": place, "name": name} for place, name in enumerate(names)]
    if SEMANTIC in forms:
        written.append(stem.with_name(f"{stem.name}{ENDINGS[SEMANTIC]}"))
        save_png(semantic_image(class_map, len(names)), written[-1])
    if PANOPTIC in forms:
        written.append(stem.with_name(f"{stem.name}{ENDINGS[PANOPTIC]}"))
        shown, info = panoptic_image(class_map)
        save_png(shown, written[-1])
        content = {"file_name": written[-1].name, "segments_info": info, "categories": categories}
        write_atomically(written[-1].with_suffix(".json"), json.dumps(content) + "\n")
    return written


def save_conversation(image: Path, reports: Sequence[dict[str, Any]], folder: Path) -> Path:
    """Writes `conversation.json`, whose rounds are reports of `save`, with copies of their files into a new folder;
    returns it."""
    place = folder / free_name(folder, f"{image.stem}_conversation")
    place.mkdir(parents=True)

    def copied(file: str) -> str:
        return Path(shutil.copy2(file, place)).name

    rounds = []
    for report in reports:
        masks = [{**mask, "file": copied(mask["file"])} for mask in report["masks"]]
        files = {"masks": masks, "overlay": copied(report["overlay"])}
        if "exports" in report:
            files["exports"] = [copied(file) for file in report["exports"]]
        rounds.append({**report, **files})
    _write_json(place / "conversation.json", {"image": str(image), "rounds": rounds})
    return place


def _write_json(file: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    # A tokenizer can produce half a surrogate pair, which is no UTF-8; a backslash escape is what JSON has for it.
    file.write_text(text, encoding="utf-8", errors="backslashreplace")


def free_name(folder: Path, stem: str) -> str:
    """`dog`, or `dog_2`, `dog_3` where the folder holds earlier answers about that image, or files of that name."""
    names = chain([stem], (f"{stem}_{number}" for number in count(2)))
    endings = ("", ".json", *ENDINGS.values(), "_panoptic.json")
    return next(name for name in names if not any((folder / f"{name}{ending}").exists() for ending in endings))


if __name__ == "__main__":
    raise SystemExit(main())
