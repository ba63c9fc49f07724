"""Embeddings of a frozen mask encoder on disk: a picture seen before costs a read of 2 MiB, not an encoding.

<folder>/<weights>/<ab>/<picture>.bin, each 16 bytes of checksum and safetensors in fp16. What a picture is named after
is its view, number by number, so other sizes, norms or augmentations never meet. Any number of processes may share a
folder: files appear whole (`os.replace`) and may vanish at any time.
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
SLACK = 0.1  # of the room: so much is made when it is full, and written at most before anyone looks again
GIB = 2**30
WEIGHTS_NAME = 16 * "[0-9a-f]"  # a fingerprint


class EmbeddingCache:
    """At most `max_gib` in `folder`; what was not used for longest goes first. weights: tells the encoder's apart.

    hits, misses and damaged count pictures; a damaged file is reported and computed again.
    """

    def __init__(self, folder: str | Path, max_gib: float, weights: str):
        self.folder, self.room = Path(folder), int(max_gib * GIB)
        if self.room <= 0:
            raise ValueError(f"model.embedding_cache.max_gib must be above 0, got {max_gib}")
        self.weights = weights
        self.hits = self.misses = self.damaged = 0
        self._unchecked = self.room  # bytes written since the last look at the folder: look at the first
        try:
            self._place("probe").parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"model.embedding_cache.folder: {error}") from None

    @classmethod
    def of(cls, encoder: nn.Module, settings: CacheConfig) -> EmbeddingCache:
        """A cache for a frozen encoder, its weights final and on their device; one that trains raises."""
        if any(parameter.requires_grad for parameter in encoder.parameters()):
            raise ValueError(
                "model.embedding_cache: the image encoder trains, so its embeddings change with every step"
            )
        return cls(settings.folder, settings.max_gib, fingerprint(encoder))

    def __call__(self, pictures: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """(B, 3, S, S) to `encode(pictures)` (B, C, h, w), rounded to fp16 whether it was there or not."""
        names = [self._name(picture) for picture in pictures]
        found = [self._read(name) for name in names]
        missing = [index for index, embedding in enumerate(found) if embedding is None]
        self.hits, self.misses = self.hits + len(names) - len(missing), self.misses + len(missing)
        if missing:
            for index, embedding in zip(missing, encode(pictures[missing]), strict=True):
                rounded = embedding.to(torch.float16)
                if bool(rounded.isfinite().all()):
                    self._write(names[index], rounded)
                    found[index] = rounded
                else:
                    found[index] = embedding  # too large for fp16: never kept
        embeddings = [embedding for embedding in found if embedding is not None]  # all of them by now
        return torch.stack([embedding.to(pictures.device, pictures.dtype) for embedding in embeddings])

    def _name(self, picture: Tensor) -> str:
        numbers = picture.detach().contiguous().cpu().view(torch.uint8).numpy()
        return hashlib.blake2b(numbers, digest_size=16, key=str((picture.dtype, picture.shape)).encode()).hexdigest()

    def _place(self, name: str) -> Path:
        return self.folder / self.weights / name[:2] / f"{name}.bin"

    def _read(self, name: str) -> Tensor | None:
        path = self._place(name)
        try:
            content = path.read_bytes()
            os.utime(path)  # used now
            if _checksum(content[CHECKSUM:]) != content[:CHECKSUM]:
                raise ValueError("its checksum is wrong")
            return load(content[CHECKSUM:])["embedding"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            self.damaged += 1
            log.warning("%s cannot be read (%s): the picture is encoded again", path, error)
            return None

    def _write(self, name: str, embedding: Tensor) -> None:
        """A cache that cannot be written to (no room on the disk) costs a warning, not the run."""
        content, path = save({"embedding": embedding.cpu().contiguous()}), self._place(name)
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
            log.warning("%s cannot be kept: %s", path, error)
            return
        self._unchecked += CHECKSUM + len(content)
        if self._unchecked > SLACK * self.room:
            self._make_room()

    def _make_room(self) -> None:
        """Removes what was not used for longest, of any weights, where less than the slack is free."""
        self._unchecked, files = 0, []
        for path in self.folder.glob(f"{WEIGHTS_NAME}/??/*"):
            try:
                told = path.stat()
            except FileNotFoundError:  # another process made room
                continue
            files.append((told.st_mtime_ns, told.st_size, path))
        surplus = sum(size for _, size, _ in files) - int((1 - SLACK) * self.room)
        for _, size, path in sorted(files):
            if surplus <= 0:
                return
            path.unlink(missing_ok=True)
            surplus -= size


def fingerprint(model: nn.Module) -> str:
    """Tells weights apart: the exact sum of their bits, in any order of summing, and a sample of each."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        bits = tensor.detach().reshape(-1).view(BITS[tensor.element_size()])
        sample = bits[:: max(1, len(bits) // SAMPLED)].tolist()
        digest.update(f"{name} {tuple(tensor.shape)} {int(bits.sum(dtype=torch.int64))} {sample}".encode())
    return digest.hexdigest()[:16]


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=CHECKSUM).digest()
