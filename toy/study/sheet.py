"""A sheet of pictures: the same question to every system, the answers side by side, from the answers they wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.types import Claim, Record
from evaluation.metrics.matching import assign_claims
from evaluation.predictions import Prediction, predictions
from evaluation.report.draw import Layer, with_legend, wrap_text
from evaluation.report.panels import replay
from evaluation.suites import find_suites
from toy.study.exam import CLASSES
from toy.study.rows import Row

SIDE, LINE, MARGIN, LINES = 190, 15, 5, 7  # pixels: width of a cell, height of a line; lines of words at most
FONT = ImageFont.load_default(11)
INK, SOFT = (30, 30, 30), (120, 120, 120)


@dataclass(frozen=True)
class SheetRow:
    """A row of the sheet: which answers, about which picture.

    absent: those about one phrase alone, the first that is there (False) or is not (True). number: one question alone.
    """

    title: str
    part: str
    suite: str
    index: int
    absent: bool | None = None
    number: int | None = None


SHEET = (
    SheetRow("class list", "whole", "ade20k|val", 1),
    SheetRow("phrase", "own", "refcoco|unc|val", 4, absent=False),
    SheetRow("false premise", "own", "fprefcoco|berkeley_exclude_unified|val", 6, absent=True),
    SheetRow("reasoning", "own", "ReasonSeg|val", 3),
    SheetRow("several at once", "shipped", "muse|val", 5, number=-1),
)


def write_answer_sheet(out: Path, rows: Sequence[Row]) -> list[Path]:
    """Writes answers.png into `out`: a column for the truth and one a system, a row a question that all answered."""
    strips = []
    for shown in SHEET:
        lines = {row.name: find_prediction(out / row.name, shown) for row in rows}
        if lines and all(lines.values()):
            record = open_record(out / "dataset", shown, next(iter(lines.values()))["index"])
            answers = {name: select_answers(line, record, shown) for name, line in lines.items()}
            strips += [render_row(record, shown, rows, answers)] if all(answers.values()) else []
    file = out / "answers.png"
    if strips:
        Image.fromarray(np.concatenate(strips)).quantize(256).save(file, optimize=True)
    return [file] if strips else []


def open_record(dataset_dir: Path, shown: SheetRow, index: int) -> Record:
    (suite,) = find_suites([shown.suite])
    options = {"classes": CLASSES.format(source=suite.base)} if suite.metric == "semantic" else {}
    return suite.open(dataset_dir, options)[index]


def find_prediction(folder: Path, shown: SheetRow) -> Prediction | None:
    """What a system answered about the picture, of few pictures about another; None where it was not asked."""
    file = folder / shown.part / "predictions" / f"{shown.suite.replace('|', '_')}.jsonl"
    lines = predictions([file])[shown.suite] if file.is_file() else []
    return lines[shown.index % len(lines)] if lines else None


def select_answers(line: Prediction, record: Record, shown: SheetRow) -> list[dict[str, Any]]:
    """The answers to be shown: all, or that about one phrase, with what else stood in the same answer left out."""
    if shown.absent is None:
        return line["answers"] if shown.number is None else [line["answers"][shown.number]]
    target = next((i for i, t in enumerate(record.targets) if (t.mask is None) == shown.absent), None)
    for answer in line["answers"]:
        if target in answer["targets"]:
            place = answer["targets"].index(target)
            claims = [Claim(*claim) for claim in answer["claims"]]
            claim = assign_claims(claims, answer["asked"])[place]
            kept = [[claim.phrase, claim.mask]] if claim else []
            return [{**answer, "claims": kept, "asked": [answer["asked"][place]], "targets": [target]}]
    return []


def render_row(
    record: Record, shown: SheetRow, rows: Sequence[Row], answers: dict[str, list[dict[str, Any]]]
) -> np.ndarray:
    """One row of the sheet."""
    panels = {name: replay(record, mine) for name, mine in answers.items()}
    first = next(iter(panels.values()))
    asked = dict.fromkeys(name for answer in answers[rows[0].name] for name in answer["asked"])
    words = ", ".join(asked) if shown.number is None else answers[rows[0].name][0]["question"].partition("\n")[2]
    cells = [render_cell(first.image, first.true, f"{shown.title}: {words.strip()}", "truth")]
    for row in rows:
        words = " | ".join(answer["text"] for answer in masks_first(answers[row.name]))
        cells.append(
            render_cell(first.image, panels[row.name].predicted, f"({panels[row.name].note}) {words}", row.title)
        )
    height = max(len(part) for part in cells)
    room = [((0, height - len(part)), (0, 0), (0, 0)) for part in cells]
    padded = [np.pad(part, width, constant_values=255) for part, width in zip(cells, room, strict=True)]
    return np.concatenate(padded, axis=1)


def masks_first(answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers with a mask first: they are the ones to be seen where there are many."""
    return sorted(answers, key=lambda answer: not answer["masks"])


def render_cell(image: np.ndarray, layers: Sequence[Layer], words: str, title: str) -> np.ndarray:
    """A title, the picture with masks and legend, and words below."""
    picture = Image.fromarray(with_legend(_resize_image(image), [_resize_layer(layer) for layer in layers]))
    lines = wrap_text(words.replace("]", "] "), SIDE - 2 * MARGIN)  # may break behind every token
    lines = lines if len(lines) <= LINES else [*lines[: LINES - 1], "[...]"]
    page = Image.new("RGB", (SIDE + MARGIN, LINE + picture.height + LINE * (len(lines) + 1)), (255, 255, 255))
    page.paste(picture, (0, LINE))
    pen = ImageDraw.Draw(page)
    pen.text((MARGIN, 0), title, fill=SOFT, font=FONT)
    for number, line in enumerate(lines):
        pen.text((MARGIN, LINE + picture.height + number * LINE), line, fill=INK, font=FONT)
    return np.asarray(page)


def _resize_image(image: np.ndarray) -> np.ndarray:
    height = round(image.shape[0] * SIDE / image.shape[1])
    return np.asarray(Image.fromarray(image).resize((SIDE, height), Image.Resampling.BICUBIC))


def _resize_layer(layer: Layer) -> Layer:
    height = round(layer.mask.shape[0] * SIDE / layer.mask.shape[1])
    mask = Image.fromarray(layer.mask).resize((SIDE, height), Image.Resampling.NEAREST)
    return Layer(np.asarray(mask), layer.name, layer.colour)
