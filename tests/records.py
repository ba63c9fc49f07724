"""Golden records: where they are, and their conversations as dialogues with holes.

GOLDEN_DIR names another folder of the same form (golden/README.md): other texts, other images, any number of rounds
in a conversation. Folders of systems that are not here are skipped with their architecture. Tests that need a tiny
model or tokenizer, whatever its texts, take the repository's own (OWN).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from data.templates import Template, template
from data.tokens import WRAPS, TokenSpec
from data.types import Dialogue, Mask, Refuse, Script, Turn
from model.checkpoints.config_file import class_names
from systems.base import SYSTEMS, build_system

ROOT = Path(__file__).resolve().parents[1]
OWN = ROOT / "tests" / "golden"
GOLDEN = Path(os.environ.get("GOLDEN_DIR") or OWN)
SHARED = ROOT.parent / "shared"  # material that is no part of the repository


def names(*systems: str) -> list[str]:
    """The records of `systems` by their architecture, and `systems` themselves, there or not. Default: all."""
    found = {file.parent.name for file in GOLDEN.glob("*/golden.json")}
    if systems:
        return sorted({name for name in found if system_of(name) in systems} | {*systems})
    return sorted(found | {name for name in SYSTEMS if build_system(name).released.architectures})


def system_of(name: str) -> str | None:
    """The system whose architecture a record's `config.json` names; None where it is missing or of another family."""
    file = GOLDEN / name / "config.json"
    if not file.is_file():
        return None
    known = class_names(json.loads(file.read_text(encoding="utf-8")))
    return next((system for system in SYSTEMS if known & set(build_system(system).released.architectures)), None)


def record_folder(name: str, *, several_runs: bool = False) -> Path:
    """The folder of a record; skips the test where it is missing, of a system that is not here, or of another form.

    several_runs: the form of Sa2VA's and UniPixel's records, whose `golden.json` lists training runs under "train".
    """
    folder = GOLDEN / name
    if not (folder / "golden.json").is_file():
        pytest.skip(f"no record {name} in {GOLDEN}")
    if system_of(name) is None:
        architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures")
        pytest.skip(f"{folder} is of a system that is not here: {architectures}")
    if ("train" in json.loads((folder / "golden.json").read_text(encoding="utf-8"))) != several_runs:
        pytest.skip(f"{folder} is of another form")
    return folder


def metrics_folder() -> Path:
    """The record of the published scoring programs."""
    folder = Path(os.environ.get("GOLDEN_METRICS_DIR") or GOLDEN / "metrics")
    if not folder.is_dir():
        pytest.skip(f"no record of the scoring programs: {folder}")
    return folder


def read_record(name: str) -> dict:
    return json.loads((record_folder(name) / "golden.json").read_text(encoding="utf-8"))


def read_dialogues(texts: Sequence[str], spec: TokenSpec, layout: str = "llava_v1") -> list[Dialogue]:
    """The conversations about one image, each of any number of rounds.

    Holes are numbered through all conversations of the image, masks and refusals together: the order of a record's
    masks.
    """
    parsed, slots = [], 0
    for text in texts:
        rounds, rest = _rounds(text, template(layout))
        assert rounds and not rest, f"no conversation of the template {layout}: {rest or text!r}"
        turns = []
        for question, answer in rounds:
            script = script_of(answer, spec, slots)
            slots += sum(not isinstance(part, str) for part in script)
            turns.append(Turn(question, script))
        parsed.append(tuple(turns))
    return parsed


def open_prompt(text: str, spec: TokenSpec, layout: str = "llava_v1") -> tuple[str, Dialogue]:
    """The question that a prompt ends with, and the rounds before it."""
    form = template(layout)
    rounds, rest = _rounds(text, form)
    found = _prefix(form, first=not rounds).fullmatch(rest)
    assert found, f"no open prompt of the template {layout}: {rest!r}"
    return _unwrapped(found[1]), tuple(Turn(question, script_of(answer, spec)) for question, answer in rounds)


def last_answer(text: str, layout: str = "llava_v1") -> str:
    """The answer that a conversation ends with, without the template's words and end around it."""
    form = template(layout)
    return text.rpartition(form.later.partition("{question}")[2])[2].removesuffix(form.close)


def script_of(answer: str, spec: TokenSpec, slot: int = 0) -> Script:
    """An answer with holes for its tokens, numbered from `slot`. Blanks may stand inside a group of mask tokens."""
    group = r"\s*".join(map(re.escape, spec.mask))
    refuse = f"|(?P<refuse>{re.escape(spec.refuse)})" if spec.refuse else ""
    script, end = [], 0
    for found in re.finditer(f"(?P<mask>{group}){refuse}", answer):
        script += [answer[end : found.start()], Mask(slot) if found["mask"] else Refuse(slot)]
        slot, end = slot + 1, found.end()
    return tuple(part for part in (*script, answer[end:]) if part)


def masks_in(dialogue: Dialogue) -> int:
    return sum(isinstance(part, Mask) for turn in dialogue for part in turn.answer)


def _rounds(text: str, form: Template) -> tuple[list[tuple[str, str]], str]:
    """Questions and answers of the whole rounds that a text begins with, and the rest of it."""
    rounds = []
    while found := re.compile(
        _prefix(form, first=not rounds).pattern + re.escape(form.separator) + "(.*?)" + re.escape(form.close), re.DOTALL
    ).match(text):
        rounds.append((_unwrapped(found[1]), found[2]))
        text = text[found.end() :]
    return rounds, text


def _prefix(form: Template, *, first: bool) -> re.Pattern[str]:
    before, after = form.prefix("\0", first=first).split("\0")
    return re.compile(f"{re.escape(before)}(.*?){re.escape(after)}", re.DOTALL)


def _unwrapped(question: str) -> str:
    return re.sub("|".join(map(re.escape, WRAPS)), "", question)
