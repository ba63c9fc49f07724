"""Results in COCO's form: one entry per mask, with its category or phrase, run-length encoding, box, area and score."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.asked import image_id, query_id
from evaluation.metrics import SCORERS
from evaluation.metrics.matching import Names, assign, read_list
from evaluation.prediction_schema import Answer, Prediction
from evaluation.predictions import reply_of
from evaluation.predictor import Segment
from utils.files import open_atomically
from utils.masks import encode_rle

OBJECT = "object"  # the category of a mask without a name


def coco_result(
    mask: np.ndarray, *, image_id: int, category_id: int, score: float = 1.0, **names: Any
) -> dict[str, Any]:
    """The entry of a (H, W) bool mask; names: further fields, such as phrase or category.

    segmentation: RLE with compressed counts as text. bbox: [x, y, width, height] in pixels, zeros of an empty mask.
    """
    return {
        "image_id": image_id,
        "category_id": category_id,
        **names,
        "segmentation": encode_rle(mask),
        "bbox": box_of(mask),
        "area": int(mask.sum()),
        "score": score,
    }


def box_of(mask: np.ndarray) -> list[int]:
    """[x, y, width, height] of the smallest box around a (H, W) bool mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return [0, 0, 0, 0]
    return [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0]) + 1, int(rows[-1] - rows[0]) + 1]


def coco_results(segments: Iterable[Segment], image_id: int = 0, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Entries of what a `Predictor` found in an image; what is not there has none.

    names: the label set, in which category_id is the place; without it names are numbered as they come. Empty names
    are of the category "object".
    """
    numbers = {name: place for place, name in enumerate(names)}
    results = []
    for segment in segments:
        category = segment.phrase or OBJECT
        number = numbers.setdefault(category, len(numbers))
        if segment.mask is not None:
            score = 1.0 if segment.score is None else segment.score
            results.append(
                coco_result(segment.mask, image_id=image_id, category_id=number, category=category, score=score)
            )
    return results


def coco_of_line(line: Prediction, numbers: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Entries of an image's predictions, which the judge reads again: masks as they are scored, a class's as one.

    numbers: category_id by name, which grows by new names.
    """
    number = image_id(line["image"], line["index"])
    for name, query, mask, score in _named_masks(line):
        yield coco_result(
            mask,
            image_id=number,
            category_id=numbers.setdefault(name or OBJECT, len(numbers)),
            score=score,
            category=name or OBJECT,
            query=query_id(line["suite"], line["index"], query),
            protocol=line["protocol"],
            **({"phrase": name} if name else {}),
        )


def write_coco(
    lines: Iterable[Prediction], file: Path, sizes: Mapping[int, tuple[int, int]], classes: Sequence[str] = ()
) -> None:
    """Writes `file`, the results, and next to it `<name>.images.json`: a COCO data set of images and categories.

    sizes: (H, W) by index. classes: the label set, whose places are the category ids; phrases are numbered as they
    come. `COCO(images).loadRes(results)` reads both.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    numbers = {name: place for place, name in enumerate(classes)}
    images: dict[int, dict[str, Any]] = {}
    with open_atomically(file) as out:
        out.write("[")
        separator = "\n"
        for line in lines:
            number = image_id(line["image"], line["index"])
            if images.get(number, {}).get("file_name", line["image"]) != line["image"]:
                raise ValueError(f"{line['image']} and {images[number]['file_name']} have the same number {number}")
            images[number] = {"id": number, "file_name": line["image"]}
            if line["index"] in sizes:
                images[number] |= dict(zip(("height", "width"), sizes[line["index"]], strict=True))
            for entry in coco_of_line(line, numbers):
                out.write(separator + json.dumps(entry))
                separator = ",\n"
        out.write("\n]\n")
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    dataset = {"info": {}, "images": list(images.values()), "annotations": [], "categories": categories}
    with open_atomically(file.with_suffix(".images.json")) as out:
        json.dump(dataset, out)


def line_size(line: Prediction) -> tuple[int, int] | None:
    """(H, W) of an image from its masks; None where it has none, or one of a strange size."""
    sizes = [rle.get("size") for answer in line["answers"] for rle in answer["masks"]]
    size = sizes[0] if sizes else None
    if not isinstance(size, list) or len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        return None
    return size[0], size[1]


def _named_masks(line: Prediction) -> Iterator[tuple[str, int, np.ndarray, float]]:
    """(phrase or class, number of the question, (H, W) bool, score) of every mask of an image that is scored."""
    size = line_size(line)
    if size is None:
        return
    counts = line["counts"]
    if "classes" in counts:
        yield from _class_masks(line, counts["classes"], size)
        return
    for answer in line["answers"]:
        reply = reply_of(answer, size)
        targets = answer.get("targets", [])
        of_list = counts.get("kind") == "classes"
        if SCORERS[line["metric"]].by_phrase:
            masks = assign(reply.claims, answer["asked"])
            for place, (phrase, mask) in enumerate(zip(answer["asked"], masks, strict=True)):
                if mask is not None:
                    number = 0 if of_list or place >= len(targets) else targets[place]
                    yield phrase.strip(), number, (reply.masks[mask] > 0).numpy(), _score(answer, mask)
        else:
            for claim in reply.claims:
                if claim.mask is not None:
                    number = targets[0] if targets else 0
                    mask = (reply.masks[claim.mask] > 0).numpy()
                    yield claim.phrase.strip(), number, mask, _score(answer, claim.mask)


def _class_masks(
    line: Prediction, classes: Sequence[str], size: tuple[int, int]
) -> Iterator[tuple[str, int, np.ndarray, float]]:
    """The pixels of each class in the map of classes; of several masks of a class the best score."""
    names = Names(classes)
    masks: dict[int, np.ndarray] = {}
    scores: dict[int, float] = {}
    for answer in line["answers"]:
        reply = reply_of(answer, size)
        won = answer.get("won") or [None] * len(reply.masks)
        for index, mask in read_list(reply.claims, answer["asked"], names).masks:
            # Where a mask does not take all of its pixels, 0.5 stands for the others.
            pixels = (reply.masks[mask] > (0.0 if won[mask] is None else 0.75)).numpy()
            masks[index] = masks[index] | pixels if index in masks else pixels
            scores[index] = max(scores.get(index, 0.0), _score(answer, mask))
    for index, pixels in sorted(masks.items()):
        yield classes[index], 0, pixels, scores[index]


def _score(answer: Answer, mask: int) -> float:
    return float(answer["scores"][mask]) if "scores" in answer else 1.0
