"""Pictures that are trained and evaluated on, after the recipe's own rule (`data.exclude_val`) took out its share."""

from __future__ import annotations

from pathlib import Path

from data.blocklist import Blocklist, picture_key
from tools.doctor.examine import FAULT, WARNING, Report
from tools.doctor.plan import EVAL, TRAIN
from utils.config import DatasetConfig, Recipe


def look_at_overlap(reports: list[Report], recipe: Recipe, root: Path) -> None:
    """Adds to each training source what of it the rule leaves out and what is evaluated on all the same."""
    seen = [report for report in reports if report.pictures]
    suites = [DatasetConfig(r.need.source, options=r.need.options) for r in seen if r.need.role == EVAL]
    evaluated = {r.need.label: {picture_key(path) for path in r.pictures} for r in seen if r.need.role == EVAL}
    trained = [report for report in seen if report.need.role == TRAIN]
    try:
        blocklist = Blocklist.build(recipe.data.exclude_val, root, suites)
    except (ValueError, OSError) as error:
        for report in trained:
            report.note(FAULT, "exclude_val", str(error))
        return
    for report in trained:
        usable = blocklist.usable(report.need.source, report.source)
        if not len(usable):
            report.note(FAULT, "nothing left", f"exclude_val {blocklist.rule} leaves no picture of it")
        keys = [picture_key(report.pictures[index]) for index in usable]
        for name, held_out in evaluated.items():
            if count := sum(key in held_out for key in keys):
                text = f"{count} of {len(keys)} training pictures are in {name}; see data.exclude_val"
                report.note(WARNING, f"trained and evaluated on ({name})", text, count)
