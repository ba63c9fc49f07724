"""Answers to class lists as PNG files: semantic (one class number per pixel) and panoptic (COCO's form).

Semantic: a pixel's value is the place of its class in the label set, from 0; pixels without an answer are void: 255, or
65535 in a 16-bit PNG where the label set has more than 255 classes. Panoptic: the number of a segment is
R + 256 G + 256^2 B, 0 is void, and a JSON file says which category each segment has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.types import Query
from evaluation.asked import image_id
from evaluation.export.coco import box_of
from evaluation.metrics.matching import Names
from evaluation.metrics.semantic import read_masks, standard_map
from evaluation.prediction_schema import Prediction
from evaluation.predictions import reply_of
from utils.files import DRAFT, atomic_folder, write_atomically

VOID, WIDE_VOID = 255, 65535
NONE = -1  # in a map of classes: no class


def semantic_image(class_map: np.ndarray, classes: int) -> Image.Image:
    """A (H, W) map of classes, -1 where none is, as an image; `classes`: the number of classes in the label set."""
    if classes >= WIDE_VOID:
        raise ValueError(f"a label set of {classes} classes does not fit into 16 bits")
    wide = classes > VOID
    values = np.where(class_map < 0, WIDE_VOID if wide else VOID, class_map)
    return Image.fromarray(values.astype(np.uint16 if wide else np.uint8))


def save_png(image: Image.Image, file: Path) -> None:
    """Writes a PNG that appears complete or not at all."""
    draft = file.with_name(f"{DRAFT}{file.name}")
    image.save(draft, format="PNG")
    draft.replace(file)


def read_semantic(file: str | Path) -> np.ndarray:
    """(H, W) int64 map of classes of a semantic PNG, -1 where none is."""
    with Image.open(file) as image:
        values = np.asarray(image).astype(np.int64)
        void = VOID if image.mode == "L" else WIDE_VOID
    return np.where(values == void, NONE, values)


def panoptic_image(class_map: np.ndarray) -> tuple[Image.Image, list[dict[str, Any]]]:
    """A (H, W) map of classes as COCO's panoptic image and its `segments_info`: one segment per class."""
    ids = np.zeros(class_map.shape, np.int64)
    segments = []
    for number, category in enumerate(sorted(set(np.unique(class_map).tolist()) - {NONE}), 1):
        mask = class_map == category
        ids[mask] = number
        area = int(mask.sum())
        segments.append({"id": number, "category_id": category, "area": area, "bbox": box_of(mask), "iscrowd": 0})
    channels = np.stack([ids % 256, ids // 256 % 256, ids // 256**2], axis=-1).astype(np.uint8)
    return Image.fromarray(channels), segments


def read_panoptic(file: str | Path) -> np.ndarray:
    """(H, W) int64 segment numbers of a panoptic PNG, 0 where void."""
    with Image.open(file) as image:
        values = np.asarray(image.convert("RGB")).astype(np.int64)
    return values[..., 0] + 256 * values[..., 1] + 256**2 * values[..., 2]


def class_map_of(line: Prediction, classes: Sequence[str], size: tuple[int, int]) -> np.ndarray:
    """(H, W) int64 map of an image's classes as it is scored, -1 where none is."""
    queries = [Query(answer["question"], (), (), tuple(answer["asked"])) for answer in line["answers"]]
    replies = [reply_of(answer, size) for answer in line["answers"]]
    masks, _ = read_masks(replies, queries, Names(line["counts"]["classes"]), fuzzy=False)
    own = standard_map(masks, size, none=len(classes)).numpy()
    place = {name: number for number, name in enumerate(classes)}
    numbers = np.full(len(classes) + 1, NONE)
    numbers[: len(line["counts"]["classes"])] = [place[name] for name in line["counts"]["classes"]]
    return numbers[own]


def write_semantic(
    lines: Iterable[Prediction], folder: Path, sizes: dict[int, tuple[int, int]], classes: Sequence[str]
) -> None:
    """Replaces `folder` by a PNG per image and `classes.json`: class names in order, void, and the image of each file.

    A file is named after the image's index in the suite, so that images of the same name have files of their own.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as draft:
        files = []
        for line in lines:
            name = file_name(line)
            class_map = class_map_of(line, classes, sizes[line["index"]])
            semantic_image(class_map, len(classes)).save(draft / name)
            number = image_id(line["image"], line["index"])
            files.append({"file_name": name, "image": line["image"], "image_id": number})
        void = WIDE_VOID if len(classes) > VOID else VOID
        write_atomically(
            draft / "classes.json", json.dumps({"classes": list(classes), "void": void, "files": files}, indent=1)
        )


def write_panoptic(
    lines: Iterable[Prediction], folder: Path, sizes: dict[int, tuple[int, int]], classes: Sequence[str]
) -> None:
    """Replaces `folder` by a panoptic PNG per image and `panoptic.json` with images, annotations and categories."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as draft:
        images, annotations = [], []
        for line in lines:
            name = file_name(line)
            height, width = sizes[line["index"]]
            image, segments = panoptic_image(class_map_of(line, classes, (height, width)))
            image.save(draft / name)
            number = image_id(line["image"], line["index"])
            images.append({"id": number, "file_name": line["image"], "height": height, "width": width})
            annotations.append({"image_id": number, "file_name": name, "segments_info": segments})
        categories = [{"id": place, "name": name, "isthing": 0} for place, name in enumerate(classes)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        write_atomically(draft / "panoptic.json", json.dumps(content))


def file_name(line: Prediction) -> str:
    """The name of an image's PNG: its index in the suite, then its own name."""
    stem = re.sub(r"[^\w.-]+", "_", Path(line["image"]).stem)[:80]
    return f"{line['index']:06d}_{stem}.png"
