"""Decodes the boxes of a detector with a SAM, image by image, into a file of predictions."""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import SamImageProcessor, SamModel

from data.readers.json_stream import read_json_lines
from data.sources.base import path_below
from evaluation.entries import entries_of
from evaluation.export.coco import box_of
from model.checkpoints.hub import fetch
from utils.dist import device
from utils.files import open_atomically
from utils.images import read_image
from utils.limits import ENTRY
from utils.masks import encode_rle
from utils.text import preview

Box = tuple[float, float, float, float]  # x, y of the upper left corner, x, y of the lower right one; pixels


def run(args: argparse.Namespace) -> int:
    """Reads boxes and questions, writes masks; returns the exit status. Bad input ends the program with a message."""
    try:
        images = Images(args.questions)
        sam = Sam(args.sam)
        count, left_out = convert(args.boxes, args.out, images, args.dataset_dir, sam, args.batch_size)
    except (OSError, ValueError) as error:
        raise SystemExit(f"boxes_to_masks: {error}") from None
    print(f"{count} masks: {args.out}; boxes of images that no question is about: {left_out}")
    return 0


class Images:
    """The images that a file of questions is about, by everything that an entry may call them."""

    def __init__(self, questions: Path):
        self._names: dict[str, set[str]] = defaultdict(set)
        for number, line in read_json_lines(questions, ENTRY):
            if not isinstance(line, dict) or not isinstance(line.get("image"), str) or "query" not in line:
                raise ValueError(f"{questions}, line {number}: no question of test_sem.py --write_questions")
            image = line["image"]
            suite_and_index = str(line["query"]).rpartition("/")[0]
            for key in (suite_and_index, image, Path(image).name, str(line.get("image_id"))):
                self._names[key].add(image)

    def of(self, entry: Mapping[str, Any], where: str) -> str | None:
        """The image of an entry, None of one that no question is about. ValueError where its name fits several."""
        query = entry.get("query")
        keys = [str(query).rpartition("/")[0]] if query is not None else []
        keys += [str(entry[key]) for key in ("image", "file_name", "image_id") if key in entry]
        if not keys:
            raise ValueError(f"{where}: names no image: it has neither query, image, file_name nor image_id")
        found = self._names.get(keys[0], set())
        if len(found) > 1:
            raise ValueError(f"{where}: {len(found)} images are called {keys[0]!r}; give 'query'")
        return next(iter(found), None)


class Sam:
    """SAM with boxes as prompts."""

    def __init__(self, name: str):
        folder = fetch(name)
        self.model = SamModel.from_pretrained(folder, local_files_only=True).to(device()).eval()
        size = self.model.config.vision_config.image_size
        self.processor = SamImageProcessor(
            size={"longest_edge": size},
            pad_size={"height": size, "width": size},
            mask_size={"longest_edge": size // 4},
            mask_pad_size={"height": size // 4, "width": size // 4},
        )

    @torch.no_grad()
    def __call__(self, image: np.ndarray, boxes: Sequence[Box], batch_size: int) -> Iterator[tuple[np.ndarray, float]]:
        """(mask, quality that SAM expects of it) per box; image: (H, W, 3) uint8, masks: (H, W) bool."""
        inputs = self.processor(image, return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.model.device)
        features = self.model.get_image_embeddings(pixels)
        height, width = image.shape[:2]
        resized_height, resized_width = inputs["reshaped_input_sizes"][0].tolist()
        scale = torch.tensor([resized_width / width, resized_height / height] * 2)
        for start in range(0, len(boxes), batch_size):
            part = torch.tensor(boxes[start : start + batch_size]) * scale
            output = self.model(
                image_embeddings=features, input_boxes=part[None].to(self.model.device), multimask_output=False
            )
            (masks,) = self.processor.post_process_masks(
                output.pred_masks.cpu(), inputs["original_sizes"].tolist(), inputs["reshaped_input_sizes"].tolist()
            )
            for mask, quality in zip(masks[:, 0], output.iou_scores[0, :, 0].tolist(), strict=True):
                yield mask.numpy().astype(bool), quality


def convert(boxes: Path, out: Path, images: Images, dataset_dir: Path, sam: Sam, batch_size: int) -> tuple[int, int]:
    """Writes the entries of `boxes` with masks, image by image. Returns the numbers of masks and of boxes left out.

    An entry without a box that says `refused` is kept as it is.
    """
    by_image: dict[str, list[tuple[dict[str, Any], Box | None, str]]] = defaultdict(list)
    left_out = 0
    for where, entry in entries_of(boxes):
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: expected a mapping, got {preview(entry)}")
        image = images.of(entry, where)
        if image is None:
            left_out += 1
            continue
        by_image[image].append((entry, None if entry.get("refused") else box_from(entry.get("bbox"), where), where))
    count = 0
    with open_atomically(out) as file:
        file.write("[")
        separator = "\n"
        for image, entries in tqdm(by_image.items(), desc="images", leave=False):
            pixels = read_image(path_below(dataset_dir, image, entries[0][2]))
            masks = sam(pixels, [box for _, box, _ in entries if box], batch_size)
            for entry, box, _ in entries:
                if box:
                    mask, quality = next(masks)
                    entry = {
                        **entry,
                        "segmentation": encode_rle(mask),
                        "area": int(mask.sum()),
                        "bbox": box_of(mask),
                        "score": entry.get("score", quality),
                    }
                    count += 1
                file.write(separator + json.dumps(entry))
                separator = ",\n"
        file.write("\n]\n")
    return count, left_out


def box_from(bbox: Any, where: str) -> Box:
    """The corners of a COCO box. ValueError unless it is four finite numbers with a positive width and height."""
    numbers = isinstance(bbox, list) and len(bbox) == 4 and all(isinstance(n, (int, float)) for n in bbox)
    if not numbers or not all(map(math.isfinite, bbox)) or bbox[2] <= 0 or bbox[3] <= 0:
        raise ValueError(f"{where}: bbox must be [x, y, width, height] with a positive size, got {preview(bbox)}")
    x, y, width, height = map(float, bbox)
    return x, y, x + width, y + height
