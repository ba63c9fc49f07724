"""Converts a loaded checkpoint to a folder of the project's or the published layout, and accounts for each weight."""

from __future__ import annotations

import argparse
import re
from functools import partial
from pathlib import Path
from typing import Any

from evaluation.cli import load_assistant
from model.checkpoints.layouts import IGNORED, LORA_WRAPPER, Report
from model.checkpoints.save import check_target, read_from, save_folder, save_original
from tools.portable.folder import complete
from utils.log import setup_logging

REASONS = ((IGNORED, "a table that is computed"), (re.compile(".*"), "part of no assistant, e.g. CLIP's text side"))


def run(args: argparse.Namespace) -> int:
    """Converts, and prints what came of each weight that was not simply mapped; returns the exit status."""
    setup_logging()
    folder = Path(args.save_path)
    try:
        check_target(folder, (args.version, args.weight, args.vision_tower), overwrite=args.overwrite)
        args.precision = args.precision or "fp32"  # of a GPU machine, too: what is written depends on no device
        assistant = load_assistant(args, device="cpu")
        check_target(folder, read_from(assistant.recipe.model), overwrite=args.overwrite)
        weights = conversion_report(assistant.model.report)
        how = {"notes": {"conversion.json": weights}, "overwrite": args.overwrite}
        if args.format == "original":
            published = assistant.system.released.architectures
            class_name = published[0] if published else "LlavaLlamaForCausalLM"
            save_original(assistant.model, folder, assistant.tokenizer, class_name, **how)
        else:
            more = partial(complete, assistant=assistant, name=folder.name)
            save_folder(assistant.model, folder, assistant.tokenizer, assistant.recipe, more=more, **how)
    except (OSError, ValueError) as error:
        raise SystemExit(f"convert_weights.py: {error}") from None
    print(f"{folder}: a {assistant.system.name} assistant; {assistant.model.report}")
    for name, reason in weights["ignored"].items():
        print(f"  ignored {name}: {reason}")
    for kind in ("new", "missing", "unexpected"):
        print("".join(f"  {kind} {name}\n" for name in weights[kind]), end="")
    return 0


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
