"""The best and worst images of a suite, from its predictions. The data are opened again to show the truth as well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.sources import Source
from data.types import IMAGE_PLACEHOLDER
from evaluation.metrics.base import STANDARD
from evaluation.metrics.matched import BOTH
from evaluation.prediction_schema import LEFT_OUT, Prediction
from evaluation.predictions import predictions, settings_of
from evaluation.report.draw import Colour, Layer, Panel, colour_of, grid
from evaluation.report.panels import replay
from evaluation.suites import find_suites
from utils.config import EvalConfig, SuiteConfig
from utils.images import read_image
from utils.masks import rle_to_mask
from utils.plain import leaves

EVERYWHERE = (Path(Path.cwd().anchor),)  # for predictions that this process has just written
MOST_MASKS = 1000  # of an image that is shown


@dataclass(frozen=True)
class Example:
    """An image to be shown. iou: mean of `query_ious`, 0 to 1. panel: has no truth where the data are not there, and is
    None where the image is not; `problem` says why."""

    iou: float
    line: Prediction
    panel: Panel | None
    problem: str = ""


def query_ious(line: Prediction) -> list[float]:
    """IoU of each phrase or object of an image, from its counts; of a class list the share of right pixels.

    A missed object or an extra mask is 0; nothing there and nothing predicted is 1. [] where no masks are counted.
    """
    counts = line["counts"]
    if "classes" in counts:
        cells = np.array(counts[STANDARD], dtype=np.int64).reshape(-1, 3)
        return [float(cells[cells[:, 0] == cells[:, 1], 2].sum() / cells[:, 2].sum())] if len(cells) else []
    if "pairs" in counts:
        return [_iou(row) if kind == BOTH else 0.0 for kind, row, _ in counts["pairs"]]
    rows = counts.get("overlaps") or counts.get("rows", {}).get(STANDARD) or []
    return [_iou(row) for row in rows]


def best_and_worst(lines: Sequence[Prediction], number: int) -> tuple[list[Prediction], list[Prediction]]:
    """Up to `number` images each, best first and worst first; no image is in both."""
    scored = [line for line in lines if query_ious(line)]
    ranked = sorted(scored, key=lambda line: (np.mean(query_ious(line)), line["index"]))
    worst = ranked[:number]
    return ranked[len(worst) :][::-1][:number], worst


def examples(
    lines: Sequence[Prediction],
    settings: dict[str, Any] | None,
    custom: Sequence[SuiteConfig] = (),
    image_folders: Sequence[Path] = EVERYWHERE,
) -> list[Example]:
    """Images of one suite ready to be shown. settings: those of its predictions (`predictions.settings_of`).

    image_folders: the folders below which images and data may be read, since a file of predictions may name any path.
    """
    source = reopen_source(settings, custom, image_folders) if settings and lines else None
    return [_example(line, source, image_folders) for line in lines]


def sample_grid(folder: Path, config: EvalConfig) -> np.ndarray:
    """(H, W, 3) uint8: the first `config.num_examples` images of the first suite, from an evaluation's folder."""
    folder = folder / "predictions"
    name = find_suites(config.suites, config.custom)[0].name
    scored = (line for line in predictions([folder])[name] if LEFT_OUT not in line["counts"])
    lines = sorted(scored, key=lambda line: line["index"])[: config.num_examples]
    shown = examples(lines, settings_of([folder]).get(name), config.custom, EVERYWHERE)
    return grid([example.panel for example in shown if example.panel])


def reopen_source(
    settings: dict[str, Any], custom: Sequence[SuiteConfig] = (), image_folders: Sequence[Path] = EVERYWHERE
) -> Source | None:
    """The data that predictions were made on; None where they are not there, are others now, or may not be read."""
    try:
        options = settings["options"]
        if not allowed(settings["data"], image_folders):
            return None
        if image_folders != EVERYWHERE and leaves(options):  # options of somebody else may name any path
            return None
        (suite,) = find_suites([settings["suite"]], custom)
        source = suite.open(settings["data"], options, keep_faults=True)
        return source if len(source) == settings["records"] else None
    except (OSError, ValueError, TypeError, LookupError):
        return None


def allowed(path: str | Path, folders: Sequence[Path]) -> bool:
    """Whether a path lies in one of the folders as it is spelt. Links inside them belong to the folder's owner, so they
    are followed."""
    place = Path(path)
    if ".." in place.parts:
        return False
    tops = [top for folder in folders for top in (folder.absolute(), folder.resolve())]
    return any(place.absolute().is_relative_to(top) for top in tops)


def _example(line: Prediction, source: Source | None, image_folders: Sequence[Path]) -> Example:
    iou = float(np.mean(query_ious(line) or [0.0]))
    has_targets = all("targets" in answer for answer in line["answers"])  # not in files of early versions
    try:
        masks = sum(len(answer["masks"]) for answer in line["answers"])
        if masks > MOST_MASKS:
            raise ValueError(f"{masks} masks are not shown, more than the limit of {MOST_MASKS}")
        record = source[line["index"]] if source is not None and has_targets else None
        image = line["image"] if record is None else record.image
        if not allowed(image, image_folders):
            raise ValueError(f"{image} is not shown: it is not below a folder given for images (--dataset_dir)")
        return Example(iou, line, _predicted_only(line) if record is None else replay(record, line["answers"]))
    except (OSError, ValueError, TypeError, LookupError) as error:
        return Example(iou, line, None, str(error))


def _predicted_only(line: Prediction) -> Panel:
    """The panel without truth, for predictions whose data are not there."""
    image = read_image(line["image"])
    height, width = image.shape[:2]
    layers = []
    colours: dict[str, Colour] = {}
    for answer in line["answers"]:
        phrase_of = {mask: phrase for phrase, mask in answer["claims"] if mask is not None}
        single_phrase = answer["asked"][0] if len(answer["asked"]) == 1 else ""
        for index, rle in enumerate(answer["masks"]):
            mask = rle_to_mask(rle, (height, width)).astype(bool)
            name = phrase_of.get(index) or single_phrase
            colour = colours.setdefault(name or f"mask {len(layers)}", colour_of(len(colours)))
            layers.append(Layer(mask, name, colour))
    questions = " | ".join(answer["question"].replace(IMAGE_PLACEHOLDER, "").strip() for answer in line["answers"])
    return Panel(image, questions, " | ".join(answer["text"] for answer in line["answers"]), layers, ())


def _iou(row: Sequence[int]) -> float:
    return row[0] / row[1] if row[1] else 1.0
