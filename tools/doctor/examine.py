"""Checks one source: whether its files are there, its masks fit its images, and its records can be trained on."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.collate import NothingToAsk
from data.readers.index import keeping_faults
from data.sources import Source
from data.sources.base import image_paths
from data.types import Record
from evaluation.questions import questions
from tools.doctor.plan import TRAIN, Need
from tools.doctor.rehearsal import Rehearsal, texts_of
from utils.images import orientation, orientation_hint, read_image

FAULT, WARNING, NOTE = "fault", "warning", "note"
EXAMPLES = 3  # shown per finding
SORTS = 12  # of findings of one kind, listed apart; further ones join the last
OWN = ("coco", "folder")  # sources whose class list is the user's
# What differs between two messages about the same fault: paths, quotations, numbers. Messages that are equal without it
# are one sort: "record 3: a.jpg: is (4, 5)" and "record 8: b.jpg: is (6, 7)" both become "record *: * is (*, *)".
VARYING = re.compile(r"\bgot .*|\S*/\S+|'[^']*'|\"[^\"]*\"|\d+(\.\d+)?")
STDERR = 2  # the descriptor that C code writes to


@dataclass(frozen=True)
class Finding:
    """Something found `count` times: the first in full (text) and the first few (examples).

    sort: distinguishes findings of one kind.
    """

    level: str
    kind: str
    text: str
    count: int = 1
    sort: str = ""
    examples: tuple[str, ...] = ()


@dataclass
class Report:
    """What was found in a source. targets: the things (or turns, where there are none) in its `checked` records."""

    need: Need
    state: str = "found"  # found | missing | broken
    source: Source | None = None
    place: str = ""
    images: list[str] = field(default_factory=list)  # the path of each record's
    checked: int = 0
    targets: int = 0
    classes: int = 0
    kinds: set[str] = field(default_factory=set)  # of the records checked
    vocabulary: dict[str, bool] = field(default_factory=dict)  # class -> is it in any of the records checked
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
        """The number of things in all records, estimated (~) where only some records were checked."""
        if not self.checked:
            return "-"
        if self.checked == len(self.images):
            return f"{self.targets:,}"
        return f"~{round(self.targets * len(self.images) / self.checked):,}"

    @property
    def opened(self) -> Source:
        if self.source is None:
            raise ValueError(f"{self.need.label} is {self.state}")
        return self.source


def examine(need: Need, root: Path, rehearsal: Rehearsal, check: int | None) -> Report:
    """Opens a source and checks `check` of its records, spread evenly; None: all of them."""
    report = Report(need)
    try:
        with keeping_faults():  # each of them is a finding of its record
            source = need.open(root)
        images = image_paths(source)
    except FileNotFoundError as error:
        report.state = "missing"
        report.note(FAULT, "missing", str(error))
        return report
    except Exception as error:  # a fault of a file that no check foresaw is a finding, too
        report.state = "broken"
        report.note(FAULT, "cannot be read", _message(error))
        return report
    report.source, report.images = source, images
    if not images:
        report.state = "broken"
        report.note(FAULT, "empty", f"{need.label} holds no image")
        return report
    check_files(report, root)
    count = len(images) if check is None else min(check, len(images))
    for index in np.unique(np.linspace(0, len(images) - 1, count).astype(int)):
        check_record(report, int(index), rehearsal)
    check_repeats(report)
    check_classes(report)
    return report


def check_files(report: Report, root: Path) -> None:
    """Notes where the images are, and which of them are missing or left out by the source itself."""
    folder = os.path.commonpath([os.path.dirname(path) for path in report.images[:100]])
    report.place = os.path.relpath(folder, root) if Path(folder).is_relative_to(root) else folder
    missing = [path for path in report.images if not path.endswith("/") and not os.path.isfile(path)]
    for what, paths in getattr(report.source, "left_out", {}).items():
        for path in paths:
            report.note(WARNING, f"left out: {what}", path)
    if missing:
        report.note(FAULT, "images missing", f"no file {missing[0]}", len(missing))


def check_repeats(report: Report) -> None:
    """Notes images that are in several records.

    Sources put all that is asked about an image into one record, so that it is encoded once. Dialogues without masks
    are an exception: their files have an entry per dialogue. So are files of queries: each kind has its own record.
    """
    repeated = [path for path, count in Counter(map(os.path.normpath, report.images)).items() if count > 1]
    if repeated and report.kinds != {"vqa"} and report.need.base != "jsonl":
        report.note(WARNING, "images in several records", repeated[0], len(repeated))


def check_classes(report: Report) -> None:
    """Notes classes of the list that no record has: a mistake in a list of one's own, but no surprise in a part of a
    published set."""
    never = [name for name, occurs in report.vocabulary.items() if not occurs]
    if not never or report.checked < len(report.images) or report.need.role != TRAIN:
        return
    own = report.need.base in OWN or "classes" in report.need.options
    more = ", ..." if len(never) > 12 else ""
    text = f"{len(never)} of {len(report.vocabulary)}: {', '.join(never[:12])}{more}"
    report.note(WARNING if own else NOTE, "classes that never occur", text)


def check_record(report: Report, index: int, rehearsal: Rehearsal) -> None:
    """Reads the image, rasterizes the masks, and does all that training or evaluation does with the record."""
    report.checked += 1
    try:
        record = report.opened[index]
        with decoder_warnings() as warnings:
            height, width = read_image(record.image).shape[:2]
        if warnings:
            report.note(WARNING, "damaged images", f"{record.image}: {warnings[0]}")
        if (tag := orientation(record.image)) > 1:
            text = f"{record.image}: EXIF orientation {tag}; annotations must be of the image as it is then shown"
            report.note(NOTE, "turned images", text)
        check_masks(record, (height, width))
        if report.need.role == TRAIN:
            check_training(report, record, index, rehearsal)
        else:
            check_questions(report, record, rehearsal)
    except Exception as error:
        # `check_files` has counted missing images; a path that ends in / stands for a record without a file of its own
        missing = isinstance(error, FileNotFoundError) and not os.path.isfile(report.images[index])
        if not missing or report.images[index].endswith("/"):
            text = _message(error)
            report.note(FAULT, "broken items", f"record {index}: {text}", sort=VARYING.sub("*", text))
    else:
        report.targets += len(record.targets) or sum(len(dialogue) for dialogue in record.dialogues)
        report.kinds.add(record.kind)
        report.classes = max(report.classes, len(record.vocabulary))
        present = {target.phrase for target in record.targets if target.mask is not None}
        for name in record.vocabulary:
            report.vocabulary[name] = report.vocabulary.get(name, False) or name in present


def check_questions(report: Report, record: Record, rehearsal: Rehearsal) -> None:
    """Makes the prompts of a record as evaluation does; one that it leaves out and counts is no fault."""
    try:
        for query in questions(record, rehearsal.system):
            rehearsal.maker.encoder.prompt(query.question)
    except NothingToAsk as error:
        report.note(WARNING, "nothing to ask", str(error))


def check_training(report: Report, record: Record, index: int, rehearsal: Rehearsal) -> None:
    """Builds the sample of a record as training does.

    Training samples a few of a record's texts. All are encoded here, so that a text which fails is found for certain.
    """
    check = rehearsal.maker.encoder.check_text
    encodable = True
    for text in (*texts_of(record), *(name for name in record.vocabulary if name not in report.vocabulary)):
        try:
            check(text)
        except ValueError as error:
            sort = VARYING.sub("*", str(error))
            report.note(FAULT, "words that cannot be encoded", f"{record.image}: {error}", sort=sort)
            encodable = False
    if not encodable:
        return
    try:
        sample = rehearsal.maker.build(record, np.random.default_rng(index))
    except NothingToAsk as error:
        report.note(WARNING, "nothing to ask", str(error))
    else:
        for text in sample.skipped:
            report.note(WARNING, "rows left out", text)


def check_masks(record: Record, shape: tuple[int, int]) -> None:
    """Raises ValueError at a mask of another size than the image's, `shape` (H, W), and at one without a pixel."""
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
def decoder_warnings() -> Generator[list[str]]:
    """The warnings that the JPEG library prints meanwhile; the list is filled when the context ends.

    The library decodes a damaged image nevertheless, and reports the damage on the error output alone: nearly always
    for a lost or overwritten block, less than half of the time for a single wrong byte. It is C code that knows nothing
    of sys.stderr, so that the descriptor itself is redirected to a file; lines of others are passed on afterwards.
    """
    warnings: list[str] = []
    sys.stderr.flush()
    with tempfile.TemporaryFile() as output:
        stderr = os.dup(STDERR)
        os.dup2(output.fileno(), STDERR)
        try:
            yield warnings
        finally:
            os.dup2(stderr, STDERR)
            os.close(stderr)
            output.seek(0)
            for line in output.read().decode(errors="replace").splitlines():
                if "JPEG" in line:
                    warnings.append(line)
                else:
                    print(line, file=sys.stderr)


def _message(error: Exception) -> str:
    """The text of an error, with its type where that is not one that our readers raise with a full sentence."""
    if isinstance(error, (OSError, ValueError)):
        return str(error)
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return f"{type(error).__name__}: {text}"
