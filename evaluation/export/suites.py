"""Exports files of predictions, suite by suite, in forms that other programs read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data.sources.base import image_size
from evaluation.export.coco import line_size, write_coco
from evaluation.export.label_maps import write_panoptic, write_semantic
from evaluation.names import COCO, FORMS, PANOPTIC, SEMANTIC
from evaluation.prediction_schema import LEFT_OUT, Prediction, reading
from evaluation.predictions import predictions
from evaluation.report.examples import EVERYWHERE, allowed
from utils.log import log
from utils.registry import unknown


def export(
    paths: Sequence[str | Path],
    folder: Path,
    forms: Sequence[str],
    image_folders: Sequence[Path] = EVERYWHERE,
) -> list[Path]:
    """Writes `folder`/coco/<suite>.json, `folder`/semantic/<suite>/ and `folder`/panoptic/<suite>/, as far as wanted.

    paths: files or folders of predictions. forms: of FORMS; the latter two are for suites of class lists. Returns what
    it wrote. image_folders: the folders whose images may be opened, which is needed for the size of an image without
    any mask; one that cannot be opened is left out with a message.
    """
    for form in forms:
        if form not in FORMS:
            raise ValueError(unknown("form of export", form, FORMS))
    written = []
    for name, lines in predictions(paths).items():
        with reading(name):
            written += _export_suite(name, lines, folder, forms, image_folders)
    return written


def _export_suite(
    name: str, lines: Sequence[Prediction], folder: Path, forms: Sequence[str], image_folders: Sequence[Path]
) -> list[Path]:
    scored = sorted((line for line in lines if LEFT_OUT not in line["counts"]), key=lambda line: line["index"])
    sizes = {}
    for line in scored:
        if size := line_size(line) or _size_of_image(line["image"], image_folders):
            sizes[line["index"]] = size
    classes = list(dict.fromkeys(name for line in scored for name in line["counts"].get("classes", ())))
    stem = name.replace("|", "_")
    written = []
    if COCO in forms:
        written.append(folder / COCO / f"{stem}.json")
        write_coco(scored, written[-1], sizes, classes)
    maps = {form: write for form, write in ((SEMANTIC, write_semantic), (PANOPTIC, write_panoptic)) if form in forms}
    if maps and not classes:
        log.info("%s: no class list, so there is no %s export", name, " or ".join(maps))
        return written
    shown = [line for line in scored if line["index"] in sizes]
    if maps and len(shown) < len(scored):
        log.warning("%s: %d images without a mask or a readable file get no PNG", name, len(scored) - len(shown))
    for form, write in maps.items():
        written.append(folder / form / stem)
        write(shown, written[-1], sizes, classes)
    return written


def _size_of_image(image: str, image_folders: Sequence[Path]) -> tuple[int, int] | None:
    if not allowed(image, image_folders):
        return None
    try:
        return image_size(Path(image))
    except OSError:
        return None
