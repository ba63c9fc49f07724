"""Finds images that a recipe both trains and evaluates on, after its own rule, `data.exclude_val`, was applied."""

from __future__ import annotations

from pathlib import Path

from data.blocklist import Blocklist, ImageSet, picture_key
from data.readers.index import keeping_faults
from tools.doctor.examine import FAULT, WARNING, Report
from tools.doctor.plan import EVAL, TRAIN
from utils.config import DatasetConfig, Recipe


def check_overlap(reports: list[Report], recipe: Recipe, root: Path) -> None:
    """Notes in the report of each training source how many of the images that the rule leaves in are in each suite."""
    readable = [report for report in reports if report.images]
    evaluated = [report for report in readable if report.need.role == EVAL]
    trained = [report for report in readable if report.need.role == TRAIN]
    suites = [DatasetConfig(report.need.source, options=report.need.options) for report in evaluated]
    held_out = {report.need.label: ImageSet(report.images) for report in evaluated}
    try:
        with keeping_faults(recipe.data.on_bad_sample == "skip"):
            blocklist = Blocklist.build(recipe.data.exclude_val, root, suites)
    except (ValueError, OSError) as error:
        for report in trained:
            report.note(FAULT, "exclude_val", str(error))
        return
    for report in trained:
        usable = blocklist.usable(report.need.source, report.opened)
        if not len(usable):
            report.note(FAULT, "nothing left", f"exclude_val {blocklist.rule} leaves no image of it")
        images = [report.images[index] for index in usable]
        keys = [picture_key(image) for image in images]
        for name, evaluated_images in held_out.items():
            if count := sum(map(evaluated_images.has, images, keys)):
                text = f"{count} of {len(images)} training images are in {name}; see data.exclude_val"
                report.note(WARNING, f"trained and evaluated on ({name})", text, count)
