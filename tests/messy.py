"""Small inputs of one's own for the tests of what fools a reader: images, masks, COCO files, the doctor's word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from tools.doctor.__main__ import main as doctor_main

ROOT = Path(__file__).resolve().parents[1]
SIZE = (48, 64)  # (H, W)
BOX = [10.0, 8.0, 40.0, 8.0, 40.0, 30.0, 10.0, 30.0]  # 30 x 22
AREA = 30 * 22


def picture(path: Path, size: tuple[int, int] = SIZE, **save: Any) -> Path:
    """An image with something to see; the format is the suffix's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 90, (*size, 3), dtype=np.uint8)
    pixels[8:30, 10:40] = 220
    Image.fromarray(pixels).save(path, **save)
    return path


def turned(path: Path, orientation: int) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return picture(path, exif=exif)


def mask(path: Path, inside: int = 1, outside: int = 0, kind: Any = np.uint8) -> Path:
    labels = np.full(SIZE, outside, kind)
    labels[8:30, 10:40] = inside
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(path)
    return path


def folder(root: Path, classes: str | bytes = "background\ncup", inside: int = 1) -> Path:
    """images/a.jpg, masks/a.png, classes.txt."""
    picture(root / "images/a.jpg")
    mask(root / "masks/a.png", inside)
    (root / "classes.txt").write_bytes(classes if isinstance(classes, bytes) else classes.encode())
    return root


def coco(root: Path, *, images: Any = (), annotations: Any = None, categories: Any = None) -> Path:
    """img/0.jpg and a.json; what is given replaces a list of the file."""
    picture(root / "img/0.jpg")
    values = {
        "images": list(images) or [{"id": 0, "file_name": "0.jpg", "height": SIZE[0], "width": SIZE[1]}],
        "annotations": annotations or [annotation()],
        "categories": categories or [{"id": 1, "name": "cup"}, {"id": 7, "name": "dog"}],
    }
    (root / "a.json").write_text(json.dumps(values))
    return root


def annotation(**fields: Any) -> dict[str, Any]:
    return {"id": 1, "image_id": 0, "category_id": 1, "segmentation": [BOX], "iscrowd": 0} | fields


def jsonl(root: Path, *lines: Any) -> Path:
    picture(root / "a.jpg")
    text = [
        line if isinstance(line, str) else json.dumps({"image": "a.jpg", "phrase": "the cup"} | line) for line in lines
    ]
    (root / "q.jsonl").write_text("\n".join(text), encoding="utf-8")
    return root


def recipe(path: Path, sets: list[Any], base: str = "toy/lisa", **sections: Any) -> Path:
    data = {"workers": 0, "mixture": [{"task": "mine", "sets": sets}]}
    values = {"base": str(ROOT / "configs" / f"{base}.yaml"), "data": data | sections.pop("data", {})}
    values["eval"] = {"validate": False, "suites": [], "final_suites": []}
    path.write_text(yaml.safe_dump(values | sections))
    return path


def doctor(root: Path, sets: list[Any], capsys: Any, base: str = "toy/lisa", **sections: Any) -> tuple[int, str]:
    """(exit status, what was printed) of a look at every record."""
    path = recipe(root.parent / f"{root.name}.yaml", sets, base, **sections)
    capsys.readouterr()
    status = doctor_main([str(path), "--dataset_dir", str(root), "--full"])
    printed = capsys.readouterr()
    return status, printed.out + printed.err
