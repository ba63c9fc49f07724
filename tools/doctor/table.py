"""Prints the reports: a table of all sources, every finding, and how to get what is missing."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.doctor.examine import Report
from utils.plain import read_yaml
from utils.registry import unknown

HINTS = Path(__file__).with_name("hints.yaml")
COLUMNS = ("", "source", "state", "images", "annotations", "classes", "checked", "faults", "where")
WIDTH = 118


def load_hints() -> dict[str, dict[str, Any]]:
    """Name in SOURCES -> expects (paths below the dataset folder), from (the download), unpack (shell)."""
    return read_yaml(HINTS)


def as_table(reports: Sequence[Report]) -> str:
    hints = load_hints()
    rows = [COLUMNS, *(_row(report, hints) for report in reports)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    )


def findings(reports: Sequence[Report]) -> str:
    """Every finding: level, source, kind, count, and the first few in full."""
    lines = []
    for report in reports:
        for finding in report.findings:
            count = f" ({finding.count} times, such as:)" if finding.count > 1 else ""
            lines.append(f"{finding.level}: {report.need.role} {report.need.label}: {finding.kind}{count}")
            lines += [textwrap.indent(example, "    ") for example in finding.examples]
    return "\n".join(lines)


def fix_hints(reports: Sequence[Report]) -> str:
    """For each missing source: the paths that it expects, where it is downloaded, how it is unpacked."""
    hints = load_hints()
    lines: list[str] = []
    for name in dict.fromkeys(report.need.base for report in reports if report.state == "missing"):
        hint = hint_of(name, hints)
        lines.append(f"{name}:")
        lines += [f"    expects  {path}" for path in hint["expects"]]
        lines += textwrap.wrap(hint["from"], WIDTH, initial_indent="    from     ", subsequent_indent=" " * 13)
        lines += [f"    unpack   {line}" for line in hint["unpack"]]
    return "\n".join(lines)


def hint_of(name: str, hints: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if name not in hints:
        raise KeyError(f"{HINTS}: {unknown('hint for', name, hints)}")
    return hints[name]


def _row(report: Report, hints: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    found = report.state == "found"
    name = report.need.base
    expects = ", ".join(hints[name]["expects"]) if name in hints else ""
    return (
        report.need.role,
        report.need.label,
        report.state,
        f"{len(report.images):,}" if found else "-",
        report.annotations if found else "-",
        str(report.classes) if report.classes else "-",
        f"{report.checked:,}" if found else "-",
        str(report.faults) if report.faults else "-",
        report.place if found else f"expects {expects}",
    )
