"""Embeddings of a frozen image encoder on disk: an image that was encoded before costs a read of 2 MiB (SAM), 8 MiB
(the three levels of SAM 2) or of the tower's hidden states that a mask head decodes.

<folder>/<weights>/<ab>/<image>.bin, each 16 bytes of checksum and safetensors in fp16, one tensor per level. An image's
name is a hash of the numbers in its view, so that other sizes, norms or augmentations have other names. Any number of
processes may share a folder: files appear complete (`os.replace`) and may vanish at any time.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from utils.config import CacheConfig
from utils.log import log

CHECKSUM = 16  # bytes
SAMPLED = 64  # numbers of each weight whose place counts in its fingerprint
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SLACK = 0.1  # share of the room that is freed when it is full, and that may be written before the next check
GIB = 2**30
WEIGHTS_NAME = 16 * "[0-9a-f]"  # a fingerprint


class EmbeddingCache:
    """At most `max_gib` in `folder`; the least recently used go first. weights: a fingerprint of the encoder's.

    hits, misses and damaged count images; a damaged file is reported and computed again.
    """

    def __init__(self, folder: str | Path, max_gib: float, weights: str):
        self.folder, self.room = Path(folder), int(max_gib * GIB)
        if self.room <= 0:
            raise ValueError(f"model.embedding_cache.max_gib must be above 0, got {max_gib}")
        self.weights = weights
        self.hits = self.misses = self.damaged = 0
        self._unchecked = self.room  # bytes written since the last check of the folder; full: check at the first
        try:
            self._place("probe").parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"model.embedding_cache.folder: {error}") from None

    @classmethod
    def of(cls, encoder: nn.Module, settings: CacheConfig, *taken: int) -> EmbeddingCache:
        """A cache for a frozen encoder, its weights final and on their device; one that trains raises. taken: the
        layers that are kept, where that is a choice: others have other names."""
        if any(parameter.requires_grad for parameter in encoder.parameters()):
            raise ValueError(
                "model.embedding_cache: the image encoder trains, so its embeddings change with every step"
            )
        return cls(settings.folder, settings.max_gib, fingerprint(encoder, *taken))

    def __call__(self, images: Tensor, encode: Callable[..., tuple[Tensor, ...]], *more: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, S, S) to `encode(images, *more)`, levels of (B, ...) each, rounded to fp16 whether they were in the
        cache or not: a run's numbers must not depend on what is in the cache. more: (B, ...) each, what else the
        embeddings depend on."""
        names = [self._name(*parts) for parts in zip(images, *more, strict=True)]
        embeddings = {index: self._read(name) for index, name in enumerate(names)}
        missing = [index for index, embedding in embeddings.items() if embedding is None]
        self.hits += len(names) - len(missing)
        self.misses += len(missing)
        if missing:
            for index, embedding in zip(
                missing, zip(*encode(*(part[missing] for part in (images, *more))), strict=True), strict=True
            ):
                rounded = tuple(level.to(torch.float16) for level in embedding)
                if all(bool(level.isfinite().all()) for level in rounded):
                    self._write(names[index], rounded)
                    embeddings[index] = rounded
                else:
                    embeddings[index] = embedding  # too large for fp16: never written
        complete = [embedding for embedding in embeddings.values() if embedding is not None]  # all of them by now
        levels = zip(*complete, strict=True)
        return tuple(torch.stack([part.to(images.device, images.dtype) for part in level]) for level in levels)

    def _name(self, image: Tensor, *more: Tensor) -> str:
        digest = hashlib.blake2b(digest_size=16, key=str((image.dtype, image.shape)).encode())
        for part in (image, *more):
            digest.update(part.detach().contiguous().cpu().view(torch.uint8).numpy())
        return digest.hexdigest()

    def _place(self, name: str) -> Path:
        return self.folder / self.weights / name[:2] / f"{name}.bin"

    def _read(self, name: str) -> tuple[Tensor, ...] | None:
        path = self._place(name)
        try:
            content = path.read_bytes()
            os.utime(path)  # the time of the last use, by which room is made
            if _checksum(content[CHECKSUM:]) != content[:CHECKSUM]:
                raise ValueError("its checksum is wrong")
            tensors = load(content[CHECKSUM:])
            return tuple(tensors[_level(index)] for index in range(len(tensors)))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            self.damaged += 1
            log.warning("%s cannot be read (%s): the image is encoded again", path, error)
            return None

    def _write(self, name: str, embedding: tuple[Tensor, ...]) -> None:
        """A cache that cannot be written to (no room on the disk) costs a warning, not the run."""
        levels = {_level(index): level.cpu().contiguous() for index, level in enumerate(embedding)}
        content, path = save(levels), self._place(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
                try:
                    file.write(_checksum(content) + content)
                    file.close()
                    os.replace(file.name, path)
                except OSError:
                    os.unlink(file.name)
                    raise
        except OSError as error:
            log.warning("%s cannot be written: %s", path, error)
            return
        self._unchecked += CHECKSUM + len(content)
        if self._unchecked > SLACK * self.room:
            self._make_room()

    def _make_room(self) -> None:
        """Removes the least recently used files, of any weights, where less than the slack is free."""
        self._unchecked = 0
        files = []
        for path in self.folder.glob(f"{WEIGHTS_NAME}/??/*"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process made room
                continue
            files.append((status.st_mtime_ns, status.st_size, path))
        surplus = sum(size for _, size, _ in files) - int((1 - SLACK) * self.room)
        for _, size, path in sorted(files):
            if surplus <= 0:
                return
            path.unlink(missing_ok=True)
            surplus -= size


def fingerprint(model: nn.Module, *taken: int) -> str:
    """A name for weights: from the exact integer sum of their bits, which no order of summing changes, and from 64
    numbers of each, whose place counts; and for what is taken of the model, if that is a choice."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        bits = tensor.detach().reshape(-1).view(BITS[tensor.element_size()])
        sample = bits[:: max(1, len(bits) // SAMPLED)].tolist()
        digest.update(f"{name} {tuple(tensor.shape)} {int(bits.sum(dtype=torch.int64))} {sample}".encode())
    if taken:
        digest.update(str(taken).encode())
    return digest.hexdigest()[:16]


def _level(index: int) -> str:
    """A level's name in a file; the first is that of the files of earlier versions, which held one."""
    return f"embedding_{index}" if index else "embedding"


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=CHECKSUM).digest()
