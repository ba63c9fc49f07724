"""Your own pictures and label maps in a folder: images/, masks/ and classes.txt. See docs/your_data.md."""

from __future__ import annotations

import re
from pathlib import Path

from data.sources.base import SOURCES, locate
from data.sources.semantic import Classes, LabelMaps, Table, paired, selected

NUMBERED = re.compile(r"(\d+)\s*:\s*(.+)")
UNLABELLED = frozenset({0, 255})  # unless classes.txt gives them a name


@SOURCES.register("folder")
def folder(
    root: Path, folder: str = ".", split: str = "", classes: Classes = None, ignore_unknown: bool = False
) -> LabelMaps:
    """`<folder>/images[/<split>]/x.jpg` with `<folder>/masks[/<split>]/x.png` and `<folder>/classes.txt`."""
    base = Path(folder)
    places = [str(base / kind / split) for kind in ("images", "masks")]
    images, maps, names = locate(root, f"folder {folder}", (*places, str(base / "classes.txt")))
    entries = read_classes(names)
    table = Table.of(entries, UNLABELLED - {value for value, _ in entries})
    return LabelMaps(paired(images, maps), (images, maps), selected(table, classes, root), ignore_unknown)


def read_classes(path: Path) -> list[tuple[int, str]]:
    """(label value, name): `value: name` a line, or names alone, which count from 0."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    numbered = [NUMBERED.fullmatch(line) for line in lines]
    if not lines:
        raise ValueError(f"{path}: names no class; write one name a line, or `value: name`")
    if not any(numbered):
        return list(enumerate(lines))
    if not all(numbered):
        odd = lines[numbered.index(None)]
        raise ValueError(f"{path}: {odd!r} has no value, other lines have; number all lines or none")
    return [(int(match[1]), match[2]) for match in numbered]
