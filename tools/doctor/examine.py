"""One source looked at from all sides: is it there, are its pictures, do its records draw and speak."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.collate import NothingToAsk
from data.readers.index import keeping_faults
from data.sources import Source
from data.sources.base import image_paths, orientation, orientation_hint
from data.types import Record
from data.views import read_image
from evaluation.questions import questions
from tools.doctor.plan import TRAIN, Need
from tools.doctor.rehearsal import Rehearsal, texts_of

FAULT, WARNING, NOTE = "fault", "warning", "note"
EXAMPLES = 3  # of a finding that are shown
SORTS = 12  # of broken items that are listed apart
OWN = ("coco", "folder")  # sources whose class list is the user's
VARYING = re.compile(r"\bgot .*|\S*/\S+|'[^']*'|\"[^\"]*\"|\d+(\.\d+)?")  # of messages: paths, quotations, numbers
STDERR = 2  # the descriptor that C code writes to


@dataclass(frozen=True)
class Finding:
    """Something found `count` times; `text` tells the first time in full, `examples` the first few. sort: what tells
    findings of one kind apart."""

    level: str
    kind: str
    text: str
    count: int = 1
    sort: str = ""
    examples: tuple[str, ...] = ()


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
    vocabulary: dict[str, bool] = field(default_factory=dict)  # class -> is it anywhere in the records drawn
    findings: list[Finding] = field(default_factory=list)

    def note(self, level: str, kind: str, text: str, count: int = 1, sort: str = "") -> None:
        """Adds a finding; of further ones of its kind and sort a few are kept, all are counted."""
        same = [finding for finding in self.findings if (finding.level, finding.kind) == (level, kind)]
        if len(same) >= SORTS and sort not in {finding.sort for finding in same}:
            sort = same[-1].sort
        for index, known in enumerate(self.findings):
            if (known.level, known.kind, known.sort) == (level, kind, sort):
                examples = (*known.examples, text)[:EXAMPLES]
                self.findings[index] = Finding(level, kind, known.text, known.count + count, sort, examples)
                return
        self.findings.append(Finding(level, kind, text, count, sort, (text,)))

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


def examine(need: Need, root: Path, rehearsal: Rehearsal, check: int | None) -> Report:
    """Opens a source and draws `check` of its records, spread evenly; None: all of them."""
    report = Report(need)
    try:
        with keeping_faults():  # each of them is a finding of its record
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
        look_at_record(report, int(index), rehearsal)
    look_at_repeats(report)
    look_at_classes(report)
    return report


def look_at_files(report: Report, root: Path) -> None:
    """Where the pictures are, and whether all are there."""
    folder = os.path.commonpath([os.path.dirname(path) for path in report.pictures[:100]])
    report.place = os.path.relpath(folder, root) if Path(folder).is_relative_to(root) else folder
    missing = [path for path in report.pictures if not path.endswith("/") and not os.path.isfile(path)]
    for what, paths in getattr(report.source, "left_out", {}).items():
        for path in paths:
            report.note(WARNING, f"left out: {what}", path)
    if missing:
        report.note(FAULT, "pictures missing", f"no file {missing[0]}", len(missing))


def look_at_repeats(report: Report) -> None:
    """A picture in several records; dialogues without masks are given so, other sets join all of a picture."""
    twice = [path for path, count in Counter(map(os.path.normpath, report.pictures)).items() if count > 1]
    if twice and report.kinds != {"vqa"}:
        report.note(WARNING, "pictures in several records", twice[0], len(twice))


def look_at_classes(report: Report) -> None:
    """Classes of a list that no record has: a slip in one's own list, to be expected of a part of a published set."""
    never = [name for name, occurs in report.vocabulary.items() if not occurs]
    if not never or report.checked < len(report.pictures) or report.need.role != TRAIN:
        return
    own = report.need.base in OWN or "classes" in report.need.options
    text = f"{len(never)} of {len(report.vocabulary)}: {', '.join(never[:12])}{', ...' * (len(never) > 12)}"
    report.note(WARNING if own else NOTE, "classes that never occur", text)


def look_at_record(report: Report, index: int, rehearsal: Rehearsal) -> None:
    """Reads a picture, draws its masks and does what training does with it, or evaluation."""
    report.checked += 1
    try:
        record = report.source[index]
        with decoder_warnings() as said:
            shape = read_image(record.image).shape[:2]
        if said:
            report.note(WARNING, "damaged pictures", f"{record.image}: {said[0]}")
        if (tag := orientation(record.image)) > 1:
            text = f"{record.image}: EXIF orientation {tag}; annotations must be of the picture as it is shown then"
            report.note(NOTE, "turned pictures", text)
        look_at_masks(record, shape)
        if report.need.role == TRAIN:
            look_at_training(report, record, index, rehearsal)
        else:
            for query in questions(record, rehearsal.system):
                rehearsal.maker.encoder.prompt(query.question)
    except Exception as error:
        known = isinstance(error, FileNotFoundError) and not os.path.isfile(report.pictures[index])
        if not known or report.pictures[index].endswith("/"):
            text = _said(error)
            report.note(FAULT, "broken items", f"record {index}: {text}", sort=VARYING.sub("*", text))
    else:
        said = sum(len(dialogue) for dialogue in record.dialogues)
        report.targets += len(record.targets) or said
        report.kinds.add(record.kind)
        report.classes = max(report.classes, len(record.vocabulary))
        present = {target.phrase for target in record.targets if target.mask is not None}
        for name in record.vocabulary:
            report.vocabulary[name] = report.vocabulary.get(name, False) or name in present


def look_at_training(report: Report, record: Record, index: int, rehearsal: Rehearsal) -> None:
    """Makes the sample of a record as training does; texts that it cannot encode are found whatever chance picks."""
    check, sound = rehearsal.maker.encoder.check_text, True
    for text in (*texts_of(record), *(name for name in record.vocabulary if name not in report.vocabulary)):
        try:
            check(text)
        except ValueError as error:
            sort = VARYING.sub("*", str(error))
            report.note(FAULT, "words that cannot be encoded", f"{record.image}: {error}", sort=sort)
            sound = False
    if not sound:
        return
    try:
        sample = rehearsal.maker.build(record, np.random.default_rng(index))
    except NothingToAsk as error:
        report.note(WARNING, "nothing to ask", str(error))
    else:
        for text in sample.skipped:
            report.note(WARNING, "rows left out", text)


def look_at_masks(record: Record, shape: tuple[int, int]) -> None:
    """Raises ValueError at a mask that does not lie on the picture, or that covers nothing of it."""
    for target in record.targets:
        if not target.phrase.strip():
            raise ValueError(f"{record.image}: a target without words")
        mask = target.mask() if target.mask is not None else None
        if mask is not None and mask.shape != shape:
            turned = orientation_hint(record.image, mask.shape, shape)
            raise ValueError(f"{record.image}: is {shape}, the mask of {target.phrase!r} {mask.shape} (H, W){turned}")
        if mask is not None and not mask.any():
            raise ValueError(f"{record.image}: the mask of {target.phrase!r} is empty, though it is given as present")
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
