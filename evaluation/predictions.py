"""Predictions as JSON lines, each on disk when its picture is done: a cut run goes on from them, scoring needs no more.

`<suite>.jsonl` holds the predictions of one process, `<suite>.1.jsonl`, ... those of others, `<suite>.run.json` what
they were made with.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any, TextIO

import torch

from data.types import Query
from evaluation.prediction_schema import check_line
from evaluation.protocols import Reply
from utils import dist
from utils.files import write_atomically
from utils.log import log
from utils.masks import encode_rle
from utils.plain import parse_json, read_mapping

LEFT_OUT = "left_out"  # among the counts of a picture that was not asked about: why
APART = ("data", "batch_size")  # settings that shards of one evaluation may differ in
Prediction = dict[str, Any]


class PredictionFile:
    """The predictions of one suite in a folder; without a folder nothing is read or written."""

    def __init__(self, folder: Path | None, suite: str):
        self.folder = folder
        self.stem = suite.replace("|", "_")
        self._file: TextIO | None = None

    def begin(
        self, settings: dict[str, Any], batches: Sequence[Sequence[int]], *, resume: bool
    ) -> tuple[list[Prediction], list[Sequence[int]]]:
        """Opens the file of this process; to be called on all of them at once.

        Returns the lines of an earlier run with the same settings (main process only), and the batches still to do.
        Only whole batches count as done, as what stands beside a picture in a batch may change its last digits.
        """
        if self.folder is None:
            return [], list(batches)
        kept: dict[int, Prediction] = {}
        settings = json.loads(json.dumps(settings, default=str))  # as they will be read back
        if dist.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = self._recover(settings, batches) if resume else {}
            self._rewrite(kept, settings)
        done = dist.broadcast(set(kept))
        self._file = self._part(dist.rank()).open("a", encoding="utf-8")
        return list(kept.values()), [batch for batch in batches if batch[0] not in done]

    def __enter__(self) -> PredictionFile:
        return self

    def __exit__(self, *_) -> None:
        if self._file:
            self._file.close()

    def write(self, line: Prediction) -> None:
        """To be called from one thread, which need not be the one that opened it."""
        if self._file:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def _recover(self, settings: dict[str, Any], batches: Sequence[Sequence[int]]) -> dict[int, Prediction]:
        """Earlier lines by index. Those made otherwise, or of pictures not asked for now, are set aside, not lost.

        Pictures that were left out are looked at again: their files may have been mended.
        """
        parts = self._parts()
        found = {line["index"]: line for part in parts for line in read_lines(part)}
        if not found:
            return {}
        before = _settings_in(self._settings)
        same = before == settings
        wanted = {index for batch in batches for index in batch}
        if not same or found.keys() - wanted:
            differ = sorted(key for key in settings.keys() | before.keys() if settings.get(key) != before.get(key))
            log.warning(
                "%s: earlier predictions do not fit this run (%s); they are now *%s",
                *(parts[0], f"other {', '.join(differ)}" if differ else "of pictures not asked for", self._set_aside()),
            )
        found = {index: line for index, line in found.items() if LEFT_OUT not in line["counts"]}
        whole = [index for batch in batches if found.keys() >= set(batch) for index in batch] if same else []
        if whole:
            log.info("%s: %d pictures are done already", self.stem, len(whole))
        return {index: found[index] for index in whole}

    def _set_aside(self) -> str:
        """Copies predictions and settings under the first ending that none of them has yet, and returns it."""
        files = [path for path in (*self._parts(), self._settings) if path.exists()]
        endings = (".old" if number == 1 else f".old.{number}" for number in count(1))
        ending = next(ending for ending in endings if not any(Path(f"{path}{ending}").exists() for path in files))
        for path in files:
            shutil.copy2(path, f"{path}{ending}")
        return ending

    def _rewrite(self, kept: dict[int, Prediction], settings: dict[str, Any]) -> None:
        """One file of whole lines; at no time are there fewer of them on disk than before."""
        fresh = self.folder / f"{self.stem}.tmp"
        with fresh.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept.values())
            file.flush()
            os.fsync(file.fileno())
        parts = self._parts()
        fresh.replace(self._part(0))
        for part in parts:
            if part != self._part(0):
                part.unlink()
        write_atomically(self._settings, json.dumps(settings) + "\n")

    @property
    def _settings(self) -> Path:
        return self.folder / f"{self.stem}.run.json"

    def _part(self, rank: int) -> Path:
        return self.folder / (f"{self.stem}.{rank}.jsonl" if rank else f"{self.stem}.jsonl")

    def _parts(self) -> list[Path]:
        name = re.compile(re.escape(self.stem) + r"(\.\d+)?\.jsonl")
        return sorted(path for path in self.folder.iterdir() if name.fullmatch(path.name))


def read_lines(path: Path) -> Iterator[Prediction]:
    """The predictions in a file. A last line cut off by a crash is left out; other damage is an error."""
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
    """Suite -> lines of these files, and of all `*.jsonl` in these folders; a picture found twice counts once.

    Raises for files of different protocols, weights or data: their figures must not be mixed.
    """
    found: dict[str, dict[int, Prediction]] = {}
    for path in map(Path, paths):
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise FileNotFoundError(f"{path} holds no predictions (*.jsonl)")
        for file in files:
            for line in read_lines(file):
                lines = found.setdefault(line["suite"], {})
                for key in ("protocol", "metric"):
                    found_here = {line[key], *(other[key] for other in islice(lines.values(), 1))}
                    if len(found_here) > 1:
                        raise ValueError(f"{file}: {line['suite']} in several {key}s: {', '.join(sorted(found_here))}")
                lines[line["index"]] = line
    settings_of(paths)  # raises
    return {suite: list(lines.values()) for suite, lines in found.items()}


def prediction(query: Query, reply: Reply) -> dict[str, Any]:
    """One answer as JSON: text, claims as [phrase, mask], masks as RLE."""
    masks = (reply.masks > 0).to(torch.uint8).cpu().numpy()
    return {
        "question": query.question,
        "asked": list(query.phrases),
        "targets": list(query.targets),
        "text": reply.text,
        "claims": [[claim.phrase, claim.mask] for claim in reply.claims],
        "masks": [encode_rle(mask) for mask in masks],
        "finished": reply.finished,
        "unread": reply.unread,
    }


def settings_of(paths: Iterable[str | Path]) -> dict[str, dict[str, Any]]:
    """Suite -> the settings that its predictions, in these files or folders, were made with; {} where none are kept.

    Raises for a suite whose predictions here and there were made with other weights or data.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in map(Path, paths):
        files = path.glob("*.run.json") if path.is_dir() else [_settings_of(path)]
        for file in sorted(file for file in files if file.is_file()):
            settings = read_mapping(file)
            if not isinstance(settings.get("suite"), str):
                raise ValueError(f"{file}: does not say of which suite it is")
            other = found.setdefault(settings["suite"], settings)
            if differ := [key for key in settings if key not in APART and settings[key] != other.get(key)]:
                raise ValueError(f"{file}: {settings['suite']} was made with other {', '.join(differ)} than beside it")
    return found


def _settings_in(file: Path) -> dict[str, Any]:
    """The settings kept in a file; {} where there is none, or none that can be read."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _settings_of(path: Path) -> Path:
    """The settings beside predictions: x.run.json of x.jsonl and x.1.jsonl, x.run.json.old of x.jsonl.old."""
    name = re.fullmatch(r"(.+?)(?:\.\d+)?\.jsonl(\.old(?:\.\d+)?)?", path.name)
    return path.with_name(f"{name[1]}.run.json{name[2] or ''}" if name else f"{path.name}.run.json")
