"""The judge: scores files of predictions, of any program, against the data of suites. No model is loaded.

Predictions of this program are judged by their own questions, those of others by the questions of `evaluation.asked`.
Either way masks are decoded and compared with the truth again; counts that a file may hold are not believed. Every line
that is scored can be written as this program's own predictions, so that report, export and comparison read it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.collate import NothingToAsk
from data.mixture import MISTAKES
from data.sources import Source
from data.sources.base import image_size
from data.types import Query, Record
from evaluation import identity
from evaluation.asked import Asked, asked_about, query_id
from evaluation.catalog import Suite
from evaluation.entries import Found, entries_of, printable
from evaluation.metrics import SCORERS
from evaluation.metrics.base import released_truth
from evaluation.metrics.matching import bare
from evaluation.names import ON_MISSING
from evaluation.prediction_schema import LEFT_OUT, Answer, Prediction
from evaluation.predictions import (
    PredictionFile,
    answers_of,
    left_out_line,
    place_of,
    read_lines,
    reply_of,
    settings_of,
)
from evaluation.protocols import Reply
from evaluation.results import EvaluationResults, SuiteResult, write_results
from evaluation.runner import BrokenSuite, source_options
from evaluation.score import SuiteScore
from evaluation.submitted import BadEntry, Catalogue, Gaps, Size, Submission, answer_from
from evaluation.suites import find_suites
from systems.base import ReleasedTruth
from utils.config import Recipe, SuiteConfig
from utils.limits import MASK_PIXELS, MASKS
from utils.log import log
from utils.registry import unknown

EXTERNAL = "external"  # protocol of predictions that do not say how they came about


@dataclass(frozen=True)
class Scored:
    """What is scored about one image. scores: the confidence in each mask, per reply."""

    queries: list[Query]
    replies: list[Reply]
    scores: list[list[float]] | None = None


@dataclass
class OwnLines:
    """Predictions of this program for one suite. lines: by index, with the place of each for messages."""

    lines: dict[int, tuple[str, Prediction]] = field(default_factory=dict)
    doubled: Found = field(default_factory=Found)


def judge(
    paths: Sequence[str | Path],
    suites: Sequence[str],
    dataset_dir: str | Path,
    *,
    limit: int = 0,
    out_dir: str | Path | None = None,
    classes: str | None = None,
    custom: Sequence[SuiteConfig] = (),
    system: str | None = None,
    on_missing: str = "empty",
    on_bad_sample: str = "raise",
) -> EvaluationResults:
    """Scores files (or folders of this program's predictions) on suites (names, groups, globs).

    limit, classes, custom, on_bad_sample: as in `evaluate`. out_dir: gets results.json and predictions. system: whose
    released scoring the as-released figures follow; default: the one that made the predictions, else the first paper's.
    on_missing: "empty" scores a query without an entry as an answer without a mask, "error" refuses; it is counted and
    named either way, and so are doubled and unknown entries.

    A suite whose data are not there, or that no entry is about, is reported in `missing`. Raises ValueError that names
    file and place for an entry that cannot be read: damage, an unknown field's type, a mask of another size. Raises it
    as well, before anything is written, where the predictions in out_dir are those that are judged.
    """
    if on_missing not in ON_MISSING:
        raise ValueError(unknown("way with missing entries", on_missing, ON_MISSING))
    places = [place_of(path) for path in paths]
    own_files, other_files = sort_files(places)
    folder = Path(out_dir) / "predictions" if out_dir else None
    if folder and folder.resolve() in (file.resolve().parent for file in (*own_files, *other_files)):
        raise ValueError(f"--out {out_dir} is the folder that is judged, and would be overwritten; give another")
    settings = settings_of(places)
    own = read_own(own_files)
    skip_bad = on_bad_sample == "skip"
    root = Path(dataset_dir)
    results = EvaluationResults(limit=limit, sources=[str(path) for path in paths])
    opened: dict[str, tuple[Suite, Source, dict[str, Any], Catalogue]] = {}
    for suite in find_suites(suites, custom):
        try:
            options = dict(settings.get(suite.name, {}).get("options") or {}) if suite.name in own else {}
            options |= source_options(Recipe(), suite, classes)
            source = suite.open(root, options, keep_faults=skip_bad)
            opened[suite.name] = suite, source, options, Catalogue(suite.name, source, root, skip_bad)
        except (OSError, ValueError, TypeError) as error:
            log.warning("%s cannot be judged: %s", suite.name, error)
            results.missing[suite.name] = str(error)
    submission = Submission({name: catalogue for name, (*_, catalogue) in opened.items()})
    for path in other_files:
        submission.add(path)
    for name, (suite, source, options, catalogue) in opened.items():
        if (name in own) == submission.has(name):
            why = "predictions of this program and others in one call" if name in own else "no entry is about it"
            results.missing[name] = f"{why}{_strangers(submission, own)}"
            continue
        judged = SuiteJudge(
            suite=suite,
            source=source,
            catalogue=catalogue,
            own=own.get(name),
            submission=submission,
            truth=released_truth(system or settings.get(name, {}).get("system")),
            skip_bad=skip_bad,
            strict=on_missing == "error",
        )
        made_by = settings.get(name, {}) if name in own else {"weights": _digest(other_files)}
        made_by |= {"system": system} if system else {}
        try:
            data = identity.of_data(suite, source, root, options) if out_dir else {}
            results.suites[name] = judged(limit, PredictionFile(folder, name), {**made_by, **data})
        except BrokenSuite as error:
            log.warning("%s was given up: %s", name, error)
            results.missing[name] = f"given up: {error}"
    if out_dir:
        write_results(results, Path(out_dir))
    return results


@dataclass
class SuiteJudge:
    """One suite: every image's predictions against its truth."""

    suite: Suite
    source: Source
    catalogue: Catalogue
    own: OwnLines | None
    submission: Submission
    truth: ReleasedTruth
    skip_bad: bool
    strict: bool

    def __call__(self, limit: int, file: PredictionFile, settings: dict[str, Any]) -> SuiteResult:
        """Scores and writes the first `limit` images, 0: all."""
        count = min(limit or len(self.source), len(self.source))
        protocol = self._protocol()
        notes = self._notes(count)
        score = SuiteScore(self.suite.metric)
        settings = {**settings, "suite": self.suite.name, "protocol": protocol, "records": len(self.source)}
        with file:
            file.begin(settings, [[index] for index in range(count)], resume=False)
            for index in tqdm(range(count), desc=self.suite.name, leave=False):
                line = self._line(index, protocol, notes)
                score.add(line)
                file.write(line)
        if not score.images:
            raise BrokenSuite(f"none of its {count} images can be scored; {score.why_left_out()}")
        return score.result(protocol, len(self.source))

    def _protocol(self) -> str:
        if self.own:
            protocols = {line["protocol"] for _, line in self.own.lines.values()}
        else:
            protocols = self.submission.protocols.get(self.suite.name) or {EXTERNAL}
        if len(protocols) > 1:
            raise ValueError(f"{self.suite.name}: predictions of several protocols: {', '.join(sorted(protocols))}")
        return next(iter(protocols))

    def _notes(self, count: int) -> list[str]:
        """Sentences on what the figures stand on: where they come from, and what is missing, doubled or unknown."""
        by_phrase = SCORERS[self.suite.metric].by_phrase
        if self.own:
            (_, first), *_ = self.own.lines.values()
            notes = [*first.get("notes", []), "judged again from masks"]
            gaps = Gaps(doubled=self.own.doubled)
            for index in range(count):
                for number in self._numbers_missing(index):
                    gaps.add_missing(self.catalogue, index, number)
        else:
            notes = [printable(f"judged from {', '.join(self.submission.files)}")]
            gaps = self.submission.gaps(self.suite.name, range(count), by_phrase=by_phrase)
        if gaps.missing.count and self.strict:
            raise ValueError(f"{self.suite.name}: queries without an entry: {gaps.missing}")
        if gaps.missing.count:
            absent = f"; {gaps.absent} of them are about what is not there and count as refused" if gaps.absent else ""
            notes.append(f"missing, scored as answers without a mask: {gaps.missing}{absent}")
        if gaps.doubled.count:
            rule = "the last and the highest score count" if by_phrase and not self.own else "the last counts"
            notes.append(f"answered several times, of which {rule}: {gaps.doubled}")
        if self.submission.unknown.count and not self.own:
            notes.append(f"unknown entries, which do not count: {self.submission.unknown}")
        if self.submission.others.count and not self.own:
            notes.append(f"entries of other suites: {self.submission.others}")
        return notes

    def _numbers_missing(self, index: int) -> list[int]:
        """The questions about an image that this program's line about it does not answer; of a class list none."""
        asked = self.catalogue.asked.get(index, {})
        assert self.own
        if index not in self.own.lines:
            return list(asked)
        line = self.own.lines[index][1]
        answered = {target for answer in line["answers"] for target in answer.get("targets", ())}
        if LEFT_OUT in line["counts"]:
            return []
        return [
            number
            for number, question in asked.items()
            if question.query.targets and not answered.issuperset(question.query.targets)
        ]

    def _line(self, index: int, protocol: str, notes: list[str]) -> Prediction:
        """The line of an image; one that is left out where the data, not the predictions, are at fault."""
        suite, metric = self.suite.name, self.suite.metric
        own = self.own.lines.get(index) if self.own else None
        if own and LEFT_OUT in own[1]["counts"]:
            return {**own[1], "protocol": protocol, "notes": notes}
        try:
            record = self.source[index]
            asked = asked_about(record)
            size = image_size(record.image)
            scored = self._own_answers(record, size, asked, own) if self.own else self._answers(index, size, asked)
            counts = SCORERS[metric].count(record, scored.queries, scored.replies, protocol, self.truth)
            if SCORERS[metric].needs_logits(scored.queries, scored.replies, counts):
                counts["by_logits"] = True
            if "said" in counts and not self.own and self.suite.name not in self.submission.worded:
                counts["said"] = []  # no words were given, so none are judged
        except NothingToAsk as error:
            return left_out_line(suite, metric, protocol, notes, index, str(error))
        except (BadEntry, *MISTAKES):
            raise
        except Exception as error:  # a damaged file raises what its reader happens to raise
            message = str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
            reason = f"record {index}: {message}"
            if not self.skip_bad:
                raise BrokenSuite(f"{reason} (on_bad_sample: skip leaves it out and counts it)") from error
            return left_out_line(suite, metric, protocol, notes, index, reason)
        answers = answers_of(record, scored.queries, scored.replies)
        for answer, scores in zip(answers, scored.scores or (), strict=scored.scores is not None):
            answer["scores"] = scores
        return {
            "suite": suite,
            "metric": metric,
            "index": index,
            "image": str(record.image),
            "protocol": protocol,
            "notes": notes,
            "seconds": own[1]["seconds"] if own else 0.0,
            "counts": counts,
            "answers": answers,
        }

    def _own_answers(
        self, record: Record, size: Size, asked: Sequence[Asked], own: tuple[str, Prediction] | None
    ) -> Scored:
        """This program's answers about an image; targets that it was not asked about get an answer without a mask."""
        queries: list[Query] = []
        replies: list[Reply] = []
        if own:
            where, line = own
            if Path(line["image"]).name != record.image.name:
                raise BadEntry(f"{where}: is about {line['image']!r}, but image {line['index']} is {record.image}")
            answers = line["answers"]
            _check_size(sum(len(answer["masks"]) for answer in answers), size, where)
            _check_targets(record, answers, where)
            for number, answer in enumerate(answers):
                queries.append(Query(answer["question"], (), tuple(answer["targets"]), tuple(answer["asked"])))
                try:
                    replies.append(reply_of(answer, size))
                except ValueError as error:
                    raise BadEntry(f"{where}: answers[{number}]: {error}") from None
        answered = {target for query in queries for target in query.targets}
        nothing = not queries
        for question in asked:
            left = [place for place, target in enumerate(question.query.targets) if target not in answered]
            if left or (nothing and not question.query.targets):
                targets, phrases = question.query.targets, question.query.phrases
                part = replace(
                    question.query,
                    targets=tuple(targets[place] for place in left),
                    phrases=tuple(phrases[place] for place in left) if targets else phrases,
                )
                queries.append(part)
                replies.append(_silence(size))
        return Scored(queries, replies)

    def _answers(self, index: int, size: Size, asked: Sequence[Asked]) -> Scored:
        """The answers of another program about an image."""
        entries = self.submission.of_image(self.suite.name, index)
        masks_total = sum(len(entry.values.get("masks", ())) or 1 for entry in entries)
        _check_size(masks_total, size, entries[0].where if entries else "")
        by_phrase = SCORERS[self.suite.metric].by_phrase
        answers = [answer_from([e for e in entries if e.number == q.number], q, size, by_phrase) for q in asked]
        return Scored([q.query for q in asked], [reply for reply, _ in answers], [scores for _, scores in answers])


def sort_files(places: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Files of this program's predictions, and files of other programs. A folder holds the former."""
    own: list[Path] = []
    others: list[Path] = []
    for path in places:
        if path.is_dir():
            files = sorted(path.glob("*.jsonl"))
            if not files:
                raise FileNotFoundError(f"{path} holds no predictions (*.jsonl)")
            own += files  # not looked into: that of a process may be empty, or end in half a line
            continue
        if not path.is_file():
            raise FileNotFoundError(f"no file of predictions {path}")
        first = next(entries_of(path), ("", None))[1]
        is_own = isinstance(first, dict) and "counts" in first and "answers" in first
        (own if is_own else others).append(path)
    return own, others


def read_own(files: Sequence[Path]) -> dict[str, OwnLines]:
    """Suite -> this program's lines."""
    suites: dict[str, OwnLines] = {}
    for file in files:
        for number, line in enumerate(read_lines(file), 1):
            own = suites.setdefault(line["suite"], OwnLines())
            if line["index"] in own.lines:
                own.doubled.add(query_id(line["suite"], line["index"], 0))
            own.lines[line["index"]] = f"{file}, line {number}", line
    return suites


def _check_size(masks: int, size: Size, where: str) -> None:
    try:
        MASKS.check(masks, where)
        MASK_PIXELS.check(masks * size[0] * size[1], where)
    except ValueError as error:
        raise BadEntry(str(error)) from None


def _check_targets(record: Record, answers: Sequence[Answer], where: str) -> None:
    """Every target is asked about once at most, so that none weighs more than others."""
    seen: set[int] = set()
    for number, answer in enumerate(answers):
        place = f"{where}: answers[{number}]"
        if "targets" not in answer:
            raise BadEntry(f"{place}: no 'targets'; a file of an early version can be scored with --from only")
        for target in answer["targets"]:
            if not 0 <= target < len(record.targets):
                raise BadEntry(f"{place}: asks about target {target}, but the image has {len(record.targets)}")
            if target in seen:
                raise BadEntry(f"{place}: asks about target {target} again")
            seen.add(target)
        if record.kind == "refer":
            for target, phrase in zip(answer["targets"], answer["asked"], strict=False):
                if bare(phrase) != bare(now := record.targets[target].phrase):
                    raise BadEntry(
                        f"{place}: asks for {phrase!r}, but target {target} is {now!r}: the annotations have changed"
                    )
        if record.kind != "classes" and len(answer["targets"]) != len(answer["asked"]):
            raise BadEntry(f"{place}: asks {len(answer['asked'])} phrases of {len(answer['targets'])} targets")


def _silence(size: Size) -> Reply:
    return Reply("", (), torch.zeros(0, *size))


def _digest(files: Sequence[Path]) -> str:
    """What stands for the weights of another program: the content of its files."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return f"of another program, predictions {digest.hexdigest()[:16]}"


def _strangers(submission: Submission, own: dict[str, OwnLines]) -> str:
    """What the files hold instead, for a message."""
    parts = [f"unknown entries {submission.unknown}"] if submission.unknown.count else []
    parts += [f"entries of other suites {submission.others}"] if submission.others.count else []
    parts += [f"predictions for {', '.join(map(printable, own))}"] if own else []
    return f"; the files hold {'; '.join(parts)}" if parts else ""
