"""Write annotation files of real size, for benchmarks/annotations.py; the images are empty files.

    python benchmarks/make_big_annotations.py /tmp/big                  # 150,000 images, 1.2 M polygons, 0.7 GB
    python benchmarks/make_big_annotations.py /tmp/small --scale 0.01

Writes instances.json (COCO), refer_seg/refcoco (50,000 objects, 140,000 expressions) and
llava_dataset/llava_instruct_150k.json (150,000 dialogues), all on the images in coco/train2017.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

IMAGES, POLYGONS, CATEGORIES, REFS, EXPRESSIONS = 150_000, 1_200_000, 80, 50_000, 140_000
SHAPES, CORNERS = 5_000, (6, 46)  # distinct polygons, used in turn, and the range of their corners
HEIGHT, WIDTH = 480, 640
WORDS = ("the", "man", "left", "red", "cup", "near", "table", "dog", "on", "chair", "blue", "woman", "holding", "ball")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    rng = np.random.default_rng(args.seed)
    images, polygons = (max(1, round(number * args.scale)) for number in (IMAGES, POLYGONS))
    make_images(args.out / "coco/train2017", images)
    print(f"{images:,} images (empty files)", flush=True)
    shapes = [json.dumps(shape) for shape in make_shapes(rng)]
    write_instances(args.out / "instances.json", images, polygons, shapes, rng)
    print_size(args.out / "instances.json", f"{polygons:,} polygons")
    write_refer(args.out / "refer_seg/refcoco", images, args.scale, shapes, rng)
    write_dialogues(args.out / "llava_dataset/llava_instruct_150k.json", images, rng)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the real size (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def make_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / file_name(number)).touch()


def make_shapes(rng: np.random.Generator) -> Iterator[list[list[float]]]:
    """Star-shaped polygons [[x0, y0, ...]] inside the image, two decimals, as in COCO."""
    for _ in range(SHAPES):
        corners = int(rng.integers(*CORNERS))
        angles = np.sort(rng.random(corners)) * 2 * np.pi
        radii = rng.uniform(20, 100) * rng.uniform(0.6, 1.0, corners)
        centre = rng.uniform((100, 100), (WIDTH - 100, HEIGHT - 100))
        points = centre + np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]
        yield [points.round(2).ravel().tolist()]


def write_instances(path: Path, images: int, polygons: int, shapes: list[str], rng: np.random.Generator) -> None:
    """A COCO file, written piece by piece; annotations in random order of their images, as in the real one."""
    image_ids = rng.integers(images, size=polygons)
    categories = rng.integers(CATEGORIES, size=polygons)
    with path.open("w") as file:
        file.write('{"info": {}, "images": [')
        file.writelines(separated(image_entry(number) for number in range(images)))
        file.write('], "annotations": [')
        file.writelines(
            separated(
                f'{{"segmentation": {shapes[number % SHAPES]}, "area": 702.25, "iscrowd": 0, "image_id": {image}, '
                f'"bbox": [473.07, 395.93, 38.65, 28.67], "category_id": {category + 1}, "id": {number + 1}}}'
                for number, (image, category) in enumerate(zip(image_ids, categories, strict=True))
            )
        )
        names = [{"supercategory": "x", "id": number + 1, "name": f"thing {number}"} for number in range(CATEGORIES)]
        file.write(f'], "categories": {json.dumps(names)}}}')


def write_refer(folder: Path, images: int, scale: float, shapes: list[str], rng: np.random.Generator) -> None:
    """refs(unc).p and instances.json: one object per ref, several expressions per object."""
    folder.mkdir(parents=True, exist_ok=True)
    count = max(1, round(REFS * scale))
    used = max(1, images // 8)  # images that have refs
    entries = [json.loads(image_entry(number)) for number in range(used)]
    annotations = [
        {"id": number, "image_id": number % used, "category_id": 1, "segmentation": json.loads(shapes[number % SHAPES])}
        for number in range(count)
    ]
    refs = [
        {
            "ref_id": number,
            "ann_id": number,
            "image_id": number % used,
            "category_id": 1,
            "split": "train",
            "sentences": [{"sent_id": k, "sent": words(rng, 4)} for k in range(round(EXPRESSIONS / REFS))],
        }
        for number in range(count)
    ]
    (folder / "instances.json").write_text(json.dumps({"images": entries, "annotations": annotations}))
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    print_size(folder / "instances.json", f"{count:,} objects")


def write_dialogues(path: Path, images: int, rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [
        {
            "id": f"{number:012d}",
            "image": file_name(number),
            "conversations": [
                message
                for _ in range(3)
                for message in ({"from": "human", "value": words(rng, 9)}, {"from": "gpt", "value": words(rng, 25)})
            ],
        }
        for number in range(images)
    ]
    path.write_text(json.dumps(entries))
    print_size(path, f"{images:,} dialogues")


def image_entry(number: int) -> str:
    return (
        f'{{"license": 3, "file_name": "{file_name(number)}", "height": {HEIGHT}, "width": {WIDTH}, '
        f'"date_captured": "2013-11-14 11:18:45", "id": {number}}}'
    )


def file_name(number: int) -> str:
    return f"{number:012d}.jpg"


def words(rng: np.random.Generator, count: int) -> str:
    return " ".join(WORDS[index] for index in rng.integers(len(WORDS), size=count))


def separated(entries: Iterator[str]) -> Iterator[str]:
    for number, entry in enumerate(entries):
        yield (", " if number else "") + entry


def print_size(path: Path, what: str) -> None:
    print(f"{path}: {what}, {path.stat().st_size / 1e6:,.0f} MB", flush=True)


if __name__ == "__main__":
    sys.exit(main())
