"""One source looked at from all sides: is it there, are its pictures, do its records draw and speak."""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.collate import NothingToAsk
from data.sources import Source
from data.sources.base import image_paths
from data.types import Record
from data.views import read_image
from doctor.plan import TRAIN, Need
from systems.base import SegTask

FAULT, WARNING = "fault", "warning"
STDERR = 2  # the descriptor that C code writes to


@dataclass(frozen=True)
class Finding:
    """Something found `count` times; `text` tells the first time in full."""

    level: str
    kind: str
    text: str
    count: int = 1


@dataclass
class Report:
    """What was found of a source. `checked` of its records were drawn; `targets` are the things in those."""

    need: Need
    state: str = "found"  # found | missing | broken
    source: Source | None = None
    place: str = ""
    pictures: list[str] = field(default_factory=list)
    checked: int = 0
    targets: int = 0
    classes: int = 0
    kinds: set[str] = field(default_factory=set)  # of the records drawn
    findings: list[Finding] = field(default_factory=list)

    def note(self, level: str, kind: str, text: str, count: int = 1) -> None:
        """Adds a finding; further ones of its kind are only counted."""
        for index, known in enumerate(self.findings):
            if (known.level, known.kind) == (level, kind):
                self.findings[index] = Finding(level, kind, known.text, known.count + count)
                return
        self.findings.append(Finding(level, kind, text, count))

    @property
    def faults(self) -> int:
        return sum(finding.count for finding in self.findings if finding.level == FAULT)

    @property
    def annotations(self) -> str:
        """Things in all records: counted where every record was drawn, else judged by those that were."""
        if not self.checked:
            return "-"
        whole = self.checked == len(self.pictures)
        return f"{self.targets:,}" if whole else f"~{round(self.targets * len(self.pictures) / self.checked):,}"


def examine(need: Need, root: Path, task: SegTask, check: int | None) -> Report:
    """Opens a source and draws `check` of its records, spread evenly; None: all of them."""
    report = Report(need)
    try:
        report.source = need.open(root)
        report.pictures = image_paths(report.source)
    except FileNotFoundError as error:
        report.state = "missing"
        report.note(FAULT, "missing", str(error))
    except Exception as error:  # a fault of a file that no check foresaw is a finding, too
        report.state = "broken"
        report.note(FAULT, "cannot be read", _said(error))
    if report.findings:
        return report
    if not report.pictures:
        report.state = "broken"
        report.note(FAULT, "empty", f"{need.label} holds no picture")
        return report
    look_at_files(report, root)
    count = len(report.pictures) if check is None else min(check, len(report.pictures))
    for index in np.unique(np.linspace(0, len(report.pictures) - 1, count).astype(int)):
        look_at_record(report, int(index), task)
    look_at_repeats(report)
    return report


def look_at_files(report: Report, root: Path) -> None:
    """Where the pictures are, and whether all are there."""
    folder = os.path.commonpath([os.path.dirname(path) for path in report.pictures[:100]])
    report.place = os.path.relpath(folder, root) if Path(folder).is_relative_to(root) else folder
    missing = [path for path in report.pictures if not os.path.isfile(path)]
    if missing:
        report.note(FAULT, "pictures missing", f"no file {missing[0]}", len(missing))


def look_at_repeats(report: Report) -> None:
    """A picture in several records; dialogues without masks are given so, other sets join all of a picture."""
    twice = [path for path, count in Counter(map(os.path.normpath, report.pictures)).items() if count > 1]
    if twice and report.kinds != {"vqa"}:
        report.note(WARNING, "pictures in several records", twice[0], len(twice))


def look_at_record(report: Report, index: int, task: SegTask) -> None:
    """Reads a picture, draws its masks and, for training, makes its dialogues."""
    report.checked += 1
    try:
        record = report.source[index]
        with decoder_warnings() as said:
            shape = read_image(record.image).shape[:2]
        if said:
            report.note(WARNING, "damaged pictures", f"{record.image}: {said[0]}")
        look_at_masks(report, record, shape)
        if report.need.role == TRAIN:
            try:
                why = "" if task.converse(record, np.random.default_rng(index)) else "no dialogue comes of it"
            except NothingToAsk as nothing:
                why = str(nothing)
            if why:
                report.note(WARNING, "nothing to ask", f"{record.image}: {why.removeprefix(f'{record.image}: ')}")
    except Exception as error:
        told = isinstance(error, FileNotFoundError) and not os.path.isfile(report.pictures[index])
        if not told:
            report.note(FAULT, "broken items", f"record {index}: {_said(error)}")
    else:
        said = sum(len(dialogue) for dialogue in record.asked)
        report.targets += len(record.targets) or said
        report.kinds.add(record.kind)
        report.classes = max(report.classes, len(record.vocabulary))


def look_at_masks(report: Report, record: Record, shape: tuple[int, int]) -> None:
    """Raises ValueError at a mask that does not lie on the picture; an empty one is a warning."""
    for target in record.targets:
        if not target.phrase.strip():
            raise ValueError(f"{record.image}: a target without words")
        mask = target.mask() if target.mask is not None else None
        if mask is not None and mask.shape != shape:
            raise ValueError(f"{record.image}: is {shape}, the mask of {target.phrase!r} {mask.shape} (H, W)")
        if mask is not None and not mask.any():
            report.note(WARNING, "empty masks", f"{record.image}: {target.phrase!r}")
    if record.ignore is not None and (ignored := record.ignore()).shape != shape:
        raise ValueError(f"{record.image}: is {shape}, its ignored region {ignored.shape} (H, W)")


@contextmanager
def decoder_warnings() -> Iterator[list[str]]:
    """What the JPEG library writes to the error output, the only place where it tells of damage inside a picture: it
    decodes it all the same. Of a lost or overwritten block it nearly always tells, of one wrong byte less than half the
    time."""
    said: list[str] = []
    sys.stderr.flush()
    with tempfile.TemporaryFile() as heard:
        errors = os.dup(STDERR)
        os.dup2(heard.fileno(), STDERR)
        try:
            yield said
        finally:
            os.dup2(errors, STDERR)
            os.close(errors)
            heard.seek(0)
            for line in heard.read().decode(errors="replace").splitlines():
                said.append(line) if "JPEG" in line else print(line, file=sys.stderr)


def _said(error: Exception) -> str:
    named = isinstance(error, (OSError, ValueError))
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return str(text) if named else f"{type(error).__name__}: {text}"
