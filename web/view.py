"""What the viewer of the page shows, as JSON: the image, and each answer's masks with names, scores and areas."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from evaluation.report.draw import scale_image, scale_mask
from utils.images import read_image
from web.visit import Answer, Talk

SIDE = 1280  # pixels of the longer side of what is shown; files to download have the image's own size
MASKS = 300  # at most this many are shown at once: those of the newest answers
QUESTION, ANSWER, NOTE = "question", "answer", "note"  # who speaks in the conversation
THUMBNAIL = 200  # pixels of the width of an example
PARTS = Path(__file__).parent / "parts"


@dataclass(frozen=True)
class Sample:
    """An example: an image's file and a question that goes with it."""

    file: Path
    kind: str
    words: str


def shown(talk: Talk | None) -> dict[str, Any]:
    """The viewer's value. Masks are PNG files of the size of `image`, areas are pixels of the image itself."""
    if talk is None:
        return {"image": "", "answers": []}
    image = read_image(talk.image)
    height, width = image.shape[:2]
    most = round(width * SIDE / max(height, width))
    small = image if width <= most else scale_image(image, max(1, most))
    answers: list[dict[str, Any]] = []
    room = MASKS
    for number, answer in reversed(list(enumerate(talk.answers, 1))):
        room -= len(answer.report["masks"])
        if room < 0 and answers:
            break
        answers.insert(0, {"number": number, **_answer(answer, small.shape[:2])})
    return {"image": _data(small, "JPEG", quality=90), "name": talk.image.name, "answers": answers}


def said(talk: Talk | None, *more: tuple[str, str]) -> list[dict[str, str]]:
    """The conversation's value: questions, answers and notes in their order. more: role and text of what follows."""
    messages: list[tuple[str, str]] = []
    for answer in talk.answers if talk else []:
        messages += [(QUESTION, answer.asked), (ANSWER, answer.text), *((NOTE, note) for note in answer.notes)]
    return [{"role": role, "text": text} for role, text in (*messages, *more)]


def _answer(answer: Answer, size: tuple[int, ...]) -> dict[str, Any]:
    masks = []
    for entry in answer.report["masks"]:
        mask = np.asarray(Image.open(entry["file"])) > 0
        png = _data(scale_mask(mask, (size[0], size[1])), "PNG")
        kept = {key: entry[key] for key in ("name", "instead", "score", "colour", "area", "share")}
        masks.append({**kept, "png": png})
    absent = answer.report["absent"]
    return {"asked": answer.asked, "masks": masks, "absent": absent, "unmentioned": answer.unmentioned}


def example_buttons(samples: Sequence[Sample]) -> str:
    """HTML of a button per example: its image, small, and its words."""
    parts = []
    for number, sample in enumerate(samples):
        image = scale_image(read_image(sample.file), THUMBNAIL)
        words = html.escape(sample.words)
        parts.append(
            f'<button type="button" data-number="{number}" title="{words}"><img alt="{html.escape(sample.file.stem)}" '
            f'src="{_data(image, "JPEG", quality=90)}"><span>{words}</span></button>'
        )
    return f'<div class="examples">{"".join(parts)}</div>'


def code(name: str) -> str:
    """A script or style of the page's own components."""
    return (PARTS / name).read_text(encoding="utf-8")


def _data(pixels: np.ndarray, form: str, **options: int) -> str:
    """A data URI of (H, W, 3) uint8 or (H, W) bool pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
