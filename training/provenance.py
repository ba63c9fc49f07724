"""The history of a run, in `meta.json`: for each start its command, code, packages, devices and data."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from data.mixture import Part
from systems.assistant import META
from utils import dist
from utils.files import write_atomically
from utils.log import log

ROOT = Path(__file__).resolve().parents[1]


def describe_start(folder: Path, **more: Any) -> None:
    """Adds an entry about this start to `meta.json`: command, versions, revision, devices, and `more`."""
    device = dist.device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    start = {
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join(sys.argv),
        "revision": revision(),
        "processes": dist.world_size(),
        "device": f"{device.type}: {name}",
        "python": platform.python_version(),
        "versions": versions(),
        **more,
    }
    _write(folder, [*starts(folder), start])


def describe_data(folder: Path, parts: Sequence[Part]) -> None:
    """Adds the training data to the last start in `meta.json`, and warns where they differ from the start before."""
    all_starts = starts(folder)
    data_now = {part.name: fingerprint(part) for part in parts}
    data_before = all_starts[-2].get("data", {}) if len(all_starts) > 1 else {}
    for name, before in data_before.items():
        now = data_now.get(name, before)
        if now != before:
            changed = ", ".join(key for key in now if now[key] != before.get(key))
            log.warning("%s is not what it was when this run was last started: %s differ", name, changed)
    all_starts[-1]["data"] = data_now
    _write(folder, all_starts)


def fingerprint(part: Part) -> dict[str, Any]:
    """What distinguishes versions of a dataset: the numbers of its records and of those in use, size and time of its
    annotation files, and, where the source lists its images, a digest of their names in order."""
    source: Any = part.source  # not every source has `files` and `image_paths`
    stats = {str(path): path.stat() for path in getattr(source, "files", ())}
    values: dict[str, Any] = {
        "rate": part.rate,
        "records": len(source),
        "used": len(part.records),
        "files": {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()},
    }
    if hasattr(source, "image_paths"):
        names = "\n".join(Path(path).name for path in source.image_paths())
        values["pictures"] = hashlib.sha256(names.encode()).hexdigest()[:16]
    return values


def revision() -> str:
    """The git revision of the code, with `+changes` where the tree differs from it; "unknown" without git."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str | None]:
    """The installed version of every package in requirements.txt; None of one that is not installed under that name,
    e.g. because another build of OpenCV is there."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in lines if line[:1].isalpha()]
    found: dict[str, str | None] = dict.fromkeys(names)
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def starts(folder: Path) -> list[dict[str, Any]]:
    """The starts of the run in this folder, oldest first. Raises ValueError where the file is damaged."""
    path = folder / META
    try:
        entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError("expected a list of starts")
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): put a copy back, or rename it; the history of the run then begins again"
        ) from None
    return entries


def last_start(folder: Path) -> dict[str, Any]:
    return (starts(folder) or [{}])[-1]


def _write(folder: Path, entries: list[dict[str, Any]]) -> None:
    write_atomically(folder / META, json.dumps(entries, indent=1) + "\n")
