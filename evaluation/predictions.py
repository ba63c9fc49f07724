"""Predictions as JSON lines, written as soon as an image is done: an interrupted run resumes from them, and they can be
scored without model or data.

`<suite>.jsonl` holds the predictions of the main process, `<suite>.1.jsonl`, ... those of others, `<suite>.run.json`
the settings that they were made with.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, TextIO

import torch

from data.types import Claim, Query, Record
from evaluation.metrics.matching import Names
from evaluation.metrics.semantic import pixels_taken
from evaluation.prediction_schema import LEFT_OUT, Answer, Prediction, check_line
from evaluation.protocols import Reply
from utils import dist
from utils.files import write_atomically
from utils.limits import MASK_PIXELS, MASKS
from utils.log import log
from utils.masks import encode_rle, rle_to_mask
from utils.plain import parse_json, read_mapping
from utils.text import preview

MAY_DIFFER = ("data", "batch_size")  # settings that shards of one evaluation may differ in


class PredictionFile:
    """The predictions of one suite in a folder; without a folder nothing is read or written."""

    def __init__(self, folder: Path | None, suite: str):
        self.folder = folder
        self.stem = suite.replace("|", "_")
        self._file: TextIO | None = None

    def begin(
        self, settings: dict[str, Any], batches: Sequence[Sequence[int]], *, resume: bool
    ) -> tuple[list[Prediction], list[Sequence[int]]]:
        """Opens the file of this process; must be called on all processes, as one of them reads for all. What that one
        raises, all do.

        batches: the indices of all images, in batches. Returns the lines of an earlier run with the same settings (on
        the main process only), and the batches still to do. A batch is done if all its images are: the other images of
        a batch may change the last digits of an answer, so a batch is never completed in parts.
        """
        if self.folder is None:
            return [], list(batches)
        folder = self.folder
        earlier: dict[int, Prediction] = {}
        settings = json.loads(json.dumps(settings, default=str))  # as they will be read back

        def prepare() -> set[int]:
            folder.mkdir(parents=True, exist_ok=True)
            earlier.update(self._recover(folder, settings, batches) if resume else {})
            self._rewrite(folder, earlier, settings)
            return set(earlier)

        done = dist.on_main(prepare)
        self._file = self._part(folder, dist.rank()).open("a", encoding="utf-8")
        return list(earlier.values()), [batch for batch in batches if batch[0] not in done]

    def __enter__(self) -> PredictionFile:
        return self

    def __exit__(self, *_) -> None:
        if self._file:
            self._file.close()

    def write(self, line: Prediction) -> None:
        """Appends a line and flushes it. Call it from one thread, which need not be the one that called `begin`."""
        if self._file:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def _recover(
        self, folder: Path, settings: dict[str, Any], batches: Sequence[Sequence[int]]
    ) -> dict[int, Prediction]:
        """Earlier lines by index. Lines of other settings, or of images not wanted now, are copied to other names.

        Images that were left out are tried again, since their files may have been mended.
        """
        parts = self._parts(folder)
        lines = {line["index"]: line for part in parts for line in read_lines(part)}
        if not lines:
            return {}
        before = _read_settings(self._settings(folder))
        same = before == settings
        wanted = {index for batch in batches for index in batch}
        if not same or lines.keys() - wanted:
            differ = sorted(key for key in settings.keys() | before.keys() if settings.get(key) != before.get(key))
            reason = f"other {', '.join(differ)}" if differ else "of images not asked for"
            ending = self._copy_aside(folder)
            log.warning("%s: earlier predictions do not fit this run (%s); they are now *%s", parts[0], reason, ending)
        if not same:
            return {}
        lines = {index: line for index, line in lines.items() if LEFT_OUT not in line["counts"]}
        done = [index for batch in batches if lines.keys() >= set(batch) for index in batch]
        if done:
            log.info("%s: %d images are done already", self.stem, len(done))
        return {index: lines[index] for index in done}

    def _copy_aside(self, folder: Path) -> str:
        """Copies predictions and settings under the first ending that none of them has yet, and returns it."""
        files = [path for path in (*self._parts(folder), self._settings(folder)) if path.exists()]
        endings = (".old" if number == 1 else f".old.{number}" for number in count(1))
        ending = next(ending for ending in endings if not any(Path(f"{path}{ending}").exists() for path in files))
        for path in files:
            shutil.copy2(path, f"{path}{ending}")
        return ending

    def _rewrite(self, folder: Path, lines: dict[int, Prediction], settings: dict[str, Any]) -> None:
        """Leaves one file with these lines, and the settings.

        Safe against a kill at any moment: the new file is complete on disk before it replaces the old one, and the
        parts of other processes are deleted only after that.
        """
        fresh = folder / f"{self.stem}.tmp"
        with fresh.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines.values())
            file.flush()
            os.fsync(file.fileno())
        parts = self._parts(folder)
        main = self._part(folder, 0)
        fresh.replace(main)
        for part in parts:
            if part != main:
                part.unlink()
        write_atomically(self._settings(folder), json.dumps(settings) + "\n")

    def _settings(self, folder: Path) -> Path:
        return folder / f"{self.stem}.run.json"

    def _part(self, folder: Path, rank: int) -> Path:
        return folder / (f"{self.stem}.{rank}.jsonl" if rank else f"{self.stem}.jsonl")

    def _parts(self, folder: Path) -> list[Path]:
        name = re.compile(re.escape(self.stem) + r"(\.\d+)?\.jsonl")
        return sorted(path for path in folder.iterdir() if name.fullmatch(path.name))


def read_lines(path: Path) -> Iterator[Prediction]:
    """The predictions in a file. A last line cut off by a crash is left out; other damage raises ValueError."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, 1):
            try:
                line = parse_json(text, finite=True)
            except ValueError as error:
                if text.endswith("\n"):
                    raise ValueError(f"{path}, line {number}: not a prediction ({error}); delete that line") from None
                log.warning("%s ends in half a line, which does not count", path)
                return
            yield check_line(line, f"{path}, line {number}")


def predictions(paths: Iterable[str | Path]) -> dict[str, list[Prediction]]:
    """Suite -> lines of these files, and of all `*.jsonl` in these folders; of an image that occurs twice the last one.
    A file `x.jsonl` comes with `x.1.jsonl`, ..., which other processes of the same evaluation have written.

    Raises ValueError for files of different protocols, weights or data, whose figures must not be mixed.
    """
    lines_of: dict[str, dict[int, Prediction]] = {}
    for path in map(Path, paths):
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path, *_other_parts(path)]
        if not files:
            raise FileNotFoundError(f"{path} holds no predictions (*.jsonl)")
        for file in files:
            for line in read_lines(file):
                lines = lines_of.setdefault(line["suite"], {})
                if lines:
                    first = next(iter(lines.values()))
                    _check_same(file, line["suite"], "protocol", {first["protocol"], line["protocol"]})
                    _check_same(file, line["suite"], "metric", {first["metric"], line["metric"]})
                lines[line["index"]] = line
    settings_of(paths)  # raises where weights or data differ
    return {suite: list(lines.values()) for suite, lines in lines_of.items()}


def _other_parts(path: Path) -> list[Path]:
    """The files of other processes next to that of the first."""
    if path.suffix != ".jsonl" or not path.is_file() or re.search(r"\.\d+\.jsonl$", path.name):
        return []
    part = re.compile(re.escape(path.stem) + r"\.\d+\.jsonl")
    return sorted(file for file in path.parent.glob("*.jsonl") if part.fullmatch(file.name))


def answers_of(record: Record, queries: Sequence[Query], replies: Sequence[Reply]) -> list[Answer]:
    """The answers about an image as they are written to its line."""
    answers = [_answer(query, reply) for query, reply in zip(queries, replies, strict=True)]
    if record.kind == "classes":
        for (number, mask), pixels in pixels_taken(replies, queries, Names(record.vocabulary)).items():
            won = answers[number].setdefault("won", [None] * len(answers[number]["masks"]))
            won[mask] = encode_rle(pixels.cpu().numpy())
    return answers


def _answer(query: Query, reply: Reply) -> Answer:
    masks = (reply.masks > 0).to(torch.uint8).cpu().numpy()
    answer: Answer = {
        "question": query.question,
        "asked": list(query.phrases),
        "targets": list(query.targets),
        "text": reply.text,
        "claims": [(claim.phrase, claim.mask) for claim in reply.claims],
        "masks": [encode_rle(mask) for mask in masks],
        "finished": reply.finished,
        "unread": reply.unread,
    }
    if reply.scores is not None:
        answer["scores"] = [round(score, 6) for score in reply.scores.tolist()]
    if substitutes := [number for number, claim in enumerate(reply.claims) if claim.is_substitute]:
        answer["substitutes"] = substitutes
    if reply.released is not None:
        answer["released"] = [(claim.phrase, claim.mask, claim.withheld_mask) for claim in reply.released]
    return answer


def left_out_line(suite: str, metric: str, protocol: str, notes: Sequence[str], index: int, reason: str) -> Prediction:
    """The line of an image that is not scored."""
    return {
        "suite": suite,
        "metric": metric,
        "index": index,
        "image": "",
        "protocol": protocol,
        "notes": list(notes),
        "seconds": 0.0,
        "counts": {LEFT_OUT: reason, "unmatched": 0},
        "answers": [],
    }


def reply_of(answer: Answer, size: tuple[int, int]) -> Reply:
    """The answer of a line again, with binary masks: the logit is 1 inside and -1 outside.

    Where masks of a class list overlap, the pixels that a mask does not take in the map of classes have 0.5. size:
    (H, W) of the image; a mask of another size, or one that is damaged, raises ValueError.
    """
    MASKS.check(len(answer["masks"]), f"the answer to {preview(answer['question'])}")
    MASK_PIXELS.check(len(answer["masks"]) * size[0] * size[1], f"the answer to {preview(answer['question'])}")
    masks = torch.full((len(answer["masks"]), *size), -1.0)
    won = answer.get("won") or [None] * len(masks)
    for number, (rle, part) in enumerate(zip(answer["masks"], won, strict=True)):
        inside = torch.from_numpy(rle_to_mask(rle, size))
        masks[number][inside] = 1.0 if part is None else 0.5
        if part is not None:
            masks[number][torch.from_numpy(rle_to_mask(part, size)) & inside] = 1.0
    substitutes = set(answer.get("substitutes", ()))
    claims = tuple(
        Claim(phrase, mask, is_substitute=number in substitutes)
        for number, (phrase, mask) in enumerate(answer["claims"])
    )
    released = tuple(Claim(*claim) for claim in answer["released"]) if "released" in answer else None
    scores = torch.tensor(answer["scores"]) if "scores" in answer else None
    return Reply(answer["text"], claims, masks, answer["finished"], answer["unread"], released, scores)


def place_of(path: str | Path) -> Path:
    """The folder of predictions in a folder of results, else the path itself."""
    folder = Path(path) / "predictions"
    return folder if folder.is_dir() else Path(path)


def settings_of(paths: Iterable[str | Path]) -> dict[str, dict[str, Any]]:
    """Suite -> the settings that its predictions, in these files or folders, were made with; none of a suite without.

    Raises ValueError for a suite whose predictions in different places were made with different weights or data.
    """
    settings_by_suite: dict[str, dict[str, Any]] = {}
    for path in map(Path, paths):
        files = path.glob("*.run.json") if path.is_dir() else [_settings_path(path)]
        for file in sorted(file for file in files if file.is_file()):
            settings = read_mapping(file)
            if not isinstance(settings.get("suite"), str):
                raise ValueError(f"{file}: does not say of which suite it is")
            first = settings_by_suite.setdefault(settings["suite"], settings)
            differ = [key for key in settings if key not in MAY_DIFFER and settings[key] != first.get(key)]
            if differ:
                raise ValueError(
                    f"{file}: {settings['suite']} was made with other {', '.join(differ)} than in another file"
                )
    return settings_by_suite


def _check_same(file: Path, suite: str, key: str, values: set[str]) -> None:
    if len(values) > 1:
        raise ValueError(f"{file}: {suite} in several {key}s: {', '.join(sorted(values))}")


def _read_settings(file: Path) -> dict[str, Any]:
    """The settings in a file; {} where there is no file, or none that can be read."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _settings_path(path: Path) -> Path:
    """The settings file of predictions: x.run.json of x.jsonl and x.1.jsonl, x.run.json.old of x.jsonl.old."""
    name = re.fullmatch(r"(.+?)(?:\.\d+)?\.jsonl(\.old(?:\.\d+)?)?", path.name)
    return path.with_name(f"{name[1]}.run.json{name[2] or ''}" if name else f"{path.name}.run.json")
