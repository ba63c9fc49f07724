"""Command-line flags that load a finished assistant, in the originals' spelling, for every program that uses one."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from utils.config import ModelConfig, choices, with_overrides
from utils.flags import FLAGS, underscored

if TYPE_CHECKING:  # torch and transformers take seconds, and `--help` needs neither
    from systems.assistant import Assistant

PRECISIONS = choices(ModelConfig, "precision")
MODEL_FIELDS = {  # flag: field of `model`
    "weight": "checkpoint_file",
    **{
        name: name
        for name in ("precision", "vision_tower", "conv_type", "load_in_8bit", "load_in_4bit", "allow_missing")
    },
}


class Parser(argparse.ArgumentParser):
    """A parser of flags with dashes or underscores. Flags that only training has are ignored with a message; others are
    refused."""

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        args, extra = self.parse_known_args(underscored(sys.argv[1:] if argv is None else argv))
        known = {spelling for flag in FLAGS for spelling in flag.spellings} | {"--local_rank"}
        position = 0
        while position < len(extra):
            name, _, value = extra[position].partition("=")
            if name not in known:
                near = difflib.get_close_matches(name, self._option_string_actions, n=1)
                self.error(f"unknown argument {name!r}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
            if name != "--local_rank":
                print(f"{name} has no meaning here: the checkpoint says it, or it is for training only")
            alone = value or position + 1 == len(extra) or extra[position + 1].startswith("--")
            position += 1 if alone else 2
        return args

    def error(self, message: str) -> NoReturn:
        raise SystemExit(f"{self.prog}: {message}")


def add_model_flags(parser: Parser) -> None:
    """Adds --version and the flags that say how to load it."""
    parser.add_argument("--version", help="run folder, merged folder, or published checkpoint (folder or hub name)")
    parser.add_argument("--system", help="the system of the checkpoint, where its files do not say")
    parser.add_argument("--checkpoint", default="best", help="of a run folder: best, last, or a name like step_500")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: as trained; fp32 on a CPU")
    parser.add_argument("--weight", help="training's bare .bin file, loaded over the weights of --version, a base")
    parser.add_argument("--vision_tower", help="folder or hub name of the tower, for checkpoints without one")
    parser.add_argument("--conv_type", help="conversation template; default: as trained")
    parser.add_argument("--load_in_8bit", action="store_true", help="8-bit language model (bitsandbytes, GPU)")
    parser.add_argument("--load_in_4bit", action="store_true", help="4-bit language model (bitsandbytes, GPU)")
    parser.add_argument("--allow_missing", action="store_true", help="load in spite of missing or unexpected weights")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=V",
        help="replace a field of the checkpoint's recipe, model.* or options.*; may be repeated",
    )


def load_assistant(args: argparse.Namespace, device: str | None = None) -> Assistant:
    """The assistant of `--version`, ready to answer. Ends the program with a message where it cannot be loaded. device:
    None for the fastest there is."""
    from systems.assistant import load
    from utils import dist

    try:
        fields = overrides(args)
        where = device or dist.device()
        return load(args.version, system=args.system, checkpoint=args.checkpoint, device=where, **fields)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise SystemExit(f"cannot load {args.version}: {error}") from None


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of the checkpoint's recipe that flags and `--set` replace: those of `model` and `options` count here."""
    given = {field: getattr(args, flag) for flag, field in MODEL_FIELDS.items()}
    model = {field: value for field, value in given.items() if value not in (None, False)}
    values: dict[str, Any] = with_overrides({"model": model, "options": {}}, args.set)
    if strange := values.keys() - {"model", "options"}:
        raise ValueError(f"--set {', '.join(sorted(strange))}: only model.* and options.* can be set for a checkpoint")
    return values
