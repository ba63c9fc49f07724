"""A sheet of example answers: one question per row, the answer of every system side by side, from saved predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.types import Claim, Record
from evaluation.metrics.matching import assign_claims
from evaluation.prediction_schema import Answer, Prediction
from evaluation.predictions import predictions
from evaluation.report.draw import Layer, with_legend, wrap_text
from evaluation.report.panels import replay
from evaluation.suites import find_suites
from toy.study.exam_parts import CLASSES
from toy.study.rows import Trial

SIDE, LINE, MARGIN = 190, 15, 5  # pixels: width of a cell, height of a line, margin
MAX_LINES = 7  # of text per cell
FONT = ImageFont.load_default(11)
INK, SOFT = (30, 30, 30), (120, 120, 120)


@dataclass(frozen=True)
class SheetRow:
    """A row of the sheet: an image and the answers to show.

    index: position among the evaluated images, modulo their number. absent: show only the answer about one phrase, the
    first that the image has (False) or has not (True). number: show only this question.
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


def write_answer_sheet(out: Path, trials: Sequence[Trial]) -> list[Path]:
    """Write answers.png into `out`: a column for the truth and one per system, a row per question that all answered."""
    strips = []
    for sheet_row in SHEET:
        found = {trial.row.title: find_prediction(out / trial.name, sheet_row) for trial in trials}
        lines = {name: line for name, line in found.items() if line is not None}
        if not lines or len(lines) < len(found):
            continue
        record = open_record(out / "dataset", sheet_row, next(iter(lines.values()))["index"])
        answers = {name: select_answers(line, record, sheet_row) for name, line in lines.items()}
        if all(answers.values()):
            strips.append(render_row(record, sheet_row, answers))
    if not strips:
        return []
    file = out / "answers.png"
    Image.fromarray(np.concatenate(strips)).quantize(256).save(file, optimize=True)
    return [file]


def open_record(dataset_dir: Path, sheet_row: SheetRow, index: int) -> Record:
    (suite,) = find_suites([sheet_row.suite])
    options = {"classes": CLASSES.format(source=suite.base)} if suite.metric == "semantic" else {}
    return suite.open(dataset_dir, options)[index]


def find_prediction(folder: Path, sheet_row: SheetRow) -> Prediction | None:
    """The saved answers of a system about the image; None where it was not evaluated on the suite."""
    file = folder / sheet_row.part / "predictions" / f"{sheet_row.suite.replace('|', '_')}.jsonl"
    lines = predictions([file])[sheet_row.suite] if file.is_file() else []
    return lines[sheet_row.index % len(lines)] if lines else None


def select_answers(line: Prediction, record: Record, sheet_row: SheetRow) -> list[Answer]:
    """The answers to show: all, one question, or one phrase without the rest of the answer around it."""
    if sheet_row.absent is None:
        return line["answers"] if sheet_row.number is None else [line["answers"][sheet_row.number]]
    target = next((i for i, t in enumerate(record.targets) if (t.mask is None) == sheet_row.absent), None)
    for answer in line["answers"]:
        if target in answer["targets"]:
            place = answer["targets"].index(target)
            claims = [Claim(*claim) for claim in answer["claims"]]
            claim = assign_claims(claims, answer["asked"])[place]
            claims_left = [(claim.phrase, claim.mask)] if claim else []
            return [{**answer, "claims": claims_left, "asked": [answer["asked"][place]], "targets": [target]}]
    return []


def render_row(record: Record, sheet_row: SheetRow, answers: dict[str, list[Answer]]) -> np.ndarray:
    """One row of the sheet; answers: title of a system -> its answers."""
    panels = {name: replay(record, mine) for name, mine in answers.items()}
    first = next(iter(panels.values()))
    first_answers = next(iter(answers.values()))
    if sheet_row.number is None:
        words = ", ".join(dict.fromkeys(name for answer in first_answers for name in answer["asked"]))
    else:
        words = first_answers[0]["question"].partition("\n")[2]  # after the line of the image token
    cells = [render_cell(first.image, first.true, f"{sheet_row.title}: {words.strip()}", "truth")]
    for title, mine in answers.items():
        words = " | ".join(answer["text"] for answer in masks_first(mine))
        cells.append(render_cell(first.image, panels[title].predicted, f"({panels[title].note}) {words}", title))
    height = max(len(part) for part in cells)
    room = [((0, height - len(part)), (0, 0), (0, 0)) for part in cells]
    padded = [np.pad(part, width, constant_values=255) for part, width in zip(cells, room, strict=True)]
    return np.concatenate(padded, axis=1)


def masks_first(answers: Sequence[Answer]) -> list[Answer]:
    """Answers with a mask first: long lists of answers are cut after MAX_LINES."""
    return sorted(answers, key=lambda answer: not answer["masks"])


def render_cell(image: np.ndarray, layers: Sequence[Layer], words: str, title: str) -> np.ndarray:
    """A title, the image with masks and legend, and text below."""
    overlay = Image.fromarray(with_legend(_resize_image(image), [_resize_layer(layer) for layer in layers]))
    lines = wrap_text(words.replace("]", "] "), SIDE - 2 * MARGIN)  # lines may break after every token
    lines = lines if len(lines) <= MAX_LINES else [*lines[: MAX_LINES - 1], "[...]"]
    page = Image.new("RGB", (SIDE + MARGIN, LINE + overlay.height + LINE * (len(lines) + 1)), (255, 255, 255))
    page.paste(overlay, (0, LINE))
    pen = ImageDraw.Draw(page)
    pen.text((MARGIN, 0), title, fill=SOFT, font=FONT)
    for number, line in enumerate(lines):
        pen.text((MARGIN, LINE + overlay.height + number * LINE), line, fill=INK, font=FONT)
    return np.asarray(page)


def _resize_image(image: np.ndarray) -> np.ndarray:
    height = round(image.shape[0] * SIDE / image.shape[1])
    return np.asarray(Image.fromarray(image).resize((SIDE, height), Image.Resampling.BICUBIC))


def _resize_layer(layer: Layer) -> Layer:
    height = round(layer.mask.shape[0] * SIDE / layer.mask.shape[1])
    mask = Image.fromarray(layer.mask).resize((SIDE, height), Image.Resampling.NEAREST)
    return Layer(np.asarray(mask), layer.name, layer.colour)
