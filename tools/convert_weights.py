"""Converts a finished checkpoint to the project's folder or back to the published layout; accounts for each weight.

    python -m tools.convert_weights --version LISA-7B-v1 --save_path lisa-7b
    python -m tools.convert_weights --version LLAVA --weight gsva-7b-ft-gres.bin --system gsva --save_path gsva-7b
    python -m tools.convert_weights --version lisa-7b --format original --save_path lisa-7b-published

Reads what chat.py and test_sem.py read: published folders of .bin or .safetensors shards, a bare training file on top
of its base (LoRA is merged with --set model.lora.alpha divided by its rank), run folders, merged folders. Writes fp32
unless --precision says otherwise. SAVE_PATH/conversion.json lists the weights that were ignored (with the reason),
newly initialised, or missing.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from evaluation.cli import Parser, add_model_flags, load_assistant
from model.checkpoints.layouts import IGNORED, LORA_WRAPPER, Report
from model.checkpoints.save import check_target, read_from, save_folder, save_original
from tools.portable.folder import complete
from utils.log import setup_logging

FORMATS = ("project", "original")
REASONS = ((IGNORED, "a table that is computed"), (re.compile(".*"), "part of no assistant, e.g. CLIP's text side"))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    setup_logging()
    folder = Path(args.save_path)
    try:
        check_target(folder, (args.version, args.weight, args.vision_tower), overwrite=args.overwrite)
        assistant = load_assistant(args)
        check_target(folder, read_from(assistant.recipe.model), overwrite=args.overwrite)
    except (OSError, ValueError) as error:
        raise SystemExit(f"convert_weights.py: {error}") from None
    weights = conversion_report(assistant.model.report)
    how = {"notes": {"conversion.json": weights}, "overwrite": args.overwrite}
    if args.format == "original":
        published = assistant.system.released.architectures
        class_name = published[0] if published else "LlavaLlamaForCausalLM"
        save_original(assistant.model, folder, assistant.tokenizer, class_name, **how)
    else:
        more = partial(complete, assistant=assistant, name=folder.name)
        save_folder(assistant.model, folder, assistant.tokenizer, assistant.recipe, more=more, **how)
    print(f"{folder}: a {assistant.system.name} assistant; {assistant.model.report}")
    for name, reason in weights["ignored"].items():
        print(f"  ignored {name}: {reason}")
    for kind in ("new", "missing", "unexpected"):
        print("".join(f"  {kind} {name}\n" for name in weights[kind]), end="")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="python -m tools.convert_weights", description=__doc__, formatter_class=style, allow_abbrev=False
    )
    add_model_flags(parser)
    parser.add_argument("--save_path", help="folder to write")
    parser.add_argument(
        "--format", choices=FORMATS, default="project", help="project: safetensors; original: as released"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a --save_path that this did not write")
    args = parser.parse(argv)
    if not args.version or not args.save_path:
        parser.error("--version (what to convert) and --save_path (where to) are needed")
    return args


def conversion_report(report: Report) -> dict[str, Any]:
    """Every weight that was not simply mapped, by its name on disk, or in the model where no file has it."""
    ignored = {name: _reason(name.removeprefix(LORA_WRAPPER)) for name in sorted(report.ignored)}
    return {
        "mapped": report.mapped,
        "ignored": ignored,
        "new": sorted(report.fresh),
        "missing": sorted(report.missing),
        "unexpected": sorted(report.unexpected),
    }


def _reason(name: str) -> str:
    return next(reason for pattern, reason in REASONS if pattern.fullmatch(name))


if __name__ == "__main__":
    raise SystemExit(main())
