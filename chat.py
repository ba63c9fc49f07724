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
from pathlib import Path

from evaluation.cli import Parser, add_model_flags, load_assistant
from evaluation.names import COCO, FORMS
from utils.flags import at_least
from utils.log import setup_logging


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    setup_logging()
    from evaluation.predictor import Predictor  # takes seconds, and `--help` does without
    from evaluation.talk import Talk, answer

    predictor = Predictor(load_assistant(args), max_new_tokens=args.max_new_tokens)
    most = predictor.assistant.model.vlm.most_positions
    if args.model_max_length is not None and args.model_max_length > most:
        raise SystemExit(
            f"chat.py: --model_max_length {args.model_max_length}: this language model has {most} positions"
        )
    if args.prompt or args.classes:
        return 0 if answer(predictor, args.image, args.prompt, args.classes, args) else 1
    return Talk(predictor, args).run()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_model_flags(parser)
    chat = parser.add_argument_group("question and answer")
    chat.add_argument("--image", metavar="FILE", help="image of a conversation, or of a single question")
    chat.add_argument("--prompt", metavar="TEXT", help="a single question about --image")
    chat.add_argument("--classes", metavar="A,B,C", help="look for each of these classes in --image")
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
    single = args.prompt is not None or args.classes is not None  # also empty, as of a shell variable that is not set
    args.prompt, args.classes = args.prompt or "", args.classes or ""
    if single and not args.image:
        parser.error("--prompt and --classes go with --image; without them the program asks")
    if single and bool(args.prompt.strip()) == bool(args.classes.strip(" ,")):
        parser.error("--image needs a --prompt or a list of --classes, one of the two, and not an empty one")
    if single and args.model_max_length is not None:
        print("--model_max_length has no meaning here: it limits a conversation")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
