"""Expressions that name several objects or none: gRefCOCO and Ref-ZOM (gsva.md 4)."""

from __future__ import annotations

from pathlib import Path

from data.sources.base import SOURCES
from data.sources.refer import FOLDERS, Refer

REFZOM_NAMES = ("Ref_ZOM.p", "Ref-ZOM(final).p", "refs(final).p")  # as renamed by readers, as distributed


@SOURCES.register("grefcoco")
def grefcoco(
    root: Path, split: str = "train", split_by: str = "unc", overlap: str = "union", bad_polygons: str = "drop"
) -> Refer:
    """Splits train, val, testA, testB. `ann_id` is a list, [-1] for no target. The pickle is preferred to the JSON."""
    files = tuple(
        (f"{base}grefcoco/grefs({split_by}){ending}", f"{base}grefcoco/instances.json")
        for base in FOLDERS
        for ending in (".p", ".json")
    )
    return Refer(root, f"grefcoco {split_by}", split, files=files, overlap=overlap, bad_polygons=bad_polygons)


@SOURCES.register("refzom")
def refzom(
    root: Path, split: str = "train", split_by: str = "final", overlap: str = "union", bad_polygons: str = "drop"
) -> Refer:
    """Splits train, val, test; images of train2014 and val2014.

    `split_by` has the one value "final", so that flags can write the name as `refzom|final|test`.
    """
    if split_by != "final":
        raise ValueError(f"refzom has no split_by {split_by!r}; have: final")
    files = tuple((f"{base}refzom/{name}", f"{base}refzom/instances.json") for base in FOLDERS for name in REFZOM_NAMES)
    return Refer(root, "refzom", split, files=files, overlap=overlap, bad_polygons=bad_polygons)
