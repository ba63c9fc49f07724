"""What the weights that a recipe names hold, as digests: whether a base is the one that a run was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

from utils.config import ModelConfig

PATHS = ("version", "vision_tower", "checkpoint_file", "vision_pretrained", "tower.preprocessor")  # of `model`
# The digest of a weight file takes SAMPLES pieces of SAMPLE bytes: reading 14 GB at each start would take a minute.
SAMPLE, SAMPLES = 1 << 16, 8
CONTENT = (".safetensors", ".bin", ".pth", ".pt", ".json", ".model")


def contents(config: ModelConfig) -> dict[str, str | None]:
    """Field -> digest of the weights and settings at the path that it names; None where nothing is there."""
    return {f"model.{name}": digest_of(reduce(getattr, name.split("."), config)) for name in PATHS}


def replaced(config: ModelConfig, recorded: Mapping[str, str | None]) -> list[tuple[str, str, str]]:
    """(field, digest before, digest now) of the places that do not hold what they held. recorded: an earlier result of
    `contents`; what is not known on both sides is not compared."""
    now = contents(config)
    return [
        (name, before, digest)
        for name, digest in now.items()
        if digest and (before := recorded.get(name)) and before != digest
    ]


def digest_of(place: Any) -> str | None:
    """A digest of a file, or of a folder's weights, sizes and tokenizer: all of small files, samples of large ones."""
    path = Path(str(place)).expanduser()
    if not place or not path.exists():
        return None  # None, or a name on the hub, which identifies its content itself
    files = sorted(file for file in path.iterdir() if file.suffix in CONTENT) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name if path.is_dir() else ''} {size}\n".encode())
        with file.open("rb") as stream:
            for start in range(0, size, max(SAMPLE, size // SAMPLES)):
                stream.seek(start)
                digest.update(stream.read(SAMPLE))
    return digest.hexdigest()[:16]
