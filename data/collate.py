"""Records to samples and samples to batches: a picture is read once, its rows and masks stay in one order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data.encode import Encoded, Encoder, SequenceTooLong
from data.sources.base import misfit
from data.types import IGNORE_ID, IMAGE_ID, Batch, Dialogue, Geometry, MaskFn, Record
from data.views import Views, read_image
from utils.masks import EmptyMask


class NothingToAsk(ValueError):
    """A record gives no question, e.g. a picture without a labelled pixel: a fact about the set, no fault of a file."""


@dataclass
class Sample:
    """One picture (H, W) with its rows; `masks` follow the holes of the rows, row by row."""

    name: str
    pixels: Tensor  # (3, h, w)
    seg_pixels: Tensor | None  # (3, S, S)
    geometry: Geometry
    rows: list[Encoded] = field(default_factory=list)
    masks: Tensor | None = None  # (N, H, W) float32 in {0, 1}
    ignore: Tensor | None = None  # (H, W) bool
    skipped: list[str] = field(default_factory=list)


class Task(Protocol):
    """Facts to words; the systems have them."""

    def converse(self, record: Record, rng: np.random.Generator) -> list[Dialogue]: ...


class SampleBuilder:
    """Makes samples: words from the task, ids from the encoder, pictures from the views, masks from the record.

    ignore_region: carry the record's ignored pixels. drop_long_rows: leave a row out that does not fit, and note it,
    instead of raising SequenceTooLong; when none is left it raises all the same.
    """

    def __init__(
        self, task: Task, encoder: Encoder, views: Views, *, ignore_region: bool = False, drop_long_rows: bool = False
    ):
        if encoder.max_length and encoder.max_length <= encoder.image_tokens and encoder.long_rows != "keep":
            raise ValueError(
                f"model_max_length {encoder.max_length} leaves no room for words beside the {encoder.image_tokens} "
                "positions of a picture. The LISA family counts 256 of them whatever the vision tower: there, this "
                f"limit means model_max_length {encoder.max_length + encoder.image_tokens - 256} here"
            )
        self.task = task
        self.encoder = encoder
        self.views = views
        self.ignore_region = ignore_region
        self.drop_long_rows = drop_long_rows

    def build(self, record: Record, rng: np.random.Generator) -> Sample:
        """A training sample. Errors name the picture: NothingToAsk, SequenceTooLong, other ValueErrors, OSErrors."""
        dialogues = self.task.converse(record, rng)
        if not dialogues:
            raise NothingToAsk(f"{record.image}: nothing to ask about it")
        rows, skipped = self._rows(record, dialogues)
        sample = load_views(record.image, self.views)
        sample.rows, sample.skipped = rows, skipped
        sample.masks = rasterize_masks(record, [hole for row in rows for hole in row.holes], sample.geometry.original)
        if self.ignore_region and record.ignore is not None:
            sample.ignore = torch.from_numpy(draw_ignored(record, sample.geometry.original))
        return sample

    def _rows(self, record: Record, dialogues: list[Dialogue]) -> tuple[list[Encoded], list[str]]:
        rows, skipped = [], []
        for dialogue in dialogues:
            try:
                rows.append(_named(record, self.encoder, dialogue))
            except SequenceTooLong as error:
                if not self.drop_long_rows:
                    raise
                skipped.append(str(error))
        if not rows:
            raise SequenceTooLong(skipped[0])
        return rows, skipped


def load_views(path: str | Path, views: Views) -> Sample:
    """The picture of a file in both views, without rows or masks; enough for generation."""
    return make_views(read_image(path), views, str(path))


def make_views(image: np.ndarray, views: Views, name: str) -> Sample:
    """An (H, W, 3) uint8 RGB picture in both views."""
    seg_pixels, geometry = views.seg(image) if views.seg else (None, views.language.geometry(*image.shape[:2]))
    return Sample(name, views.language(image), seg_pixels, geometry)


def rasterize_masks(record: Record, targets: Sequence[int], shape: tuple[int, int]) -> Tensor:
    """(N, H, W) float32 in {0, 1}: the masks of these targets of a picture of `shape`, each drawn once."""
    drawn = {}
    for index in targets:
        if index not in drawn:
            target = record.targets[index]
            if target.mask is None:
                raise ValueError(f"{record.image}: an answer has a mask for {target.phrase!r}, which is absent")
            drawn[index] = torch.from_numpy(draw_target(record, index, shape)).float()
    return torch.stack([drawn[index] for index in targets]) if drawn else torch.zeros(0, *shape)


def collate(samples: Sequence[Sample], image_tokens: int, pad_id: int = 0) -> Batch:
    """A training or teacher-forced batch, padded on the right."""
    rows = [row for sample in samples for row in sample.rows]
    expanded = [_expand(row, image_tokens) for row in rows]
    length = max((len(ids) for ids, _, _ in expanded), default=0)
    batch = _pictures(samples, [len(sample.rows) for sample in samples], length, pad_id)
    for index, (ids, labels, _) in enumerate(expanded):
        batch.ids[index, : len(ids)] = torch.from_numpy(ids)
        batch.labels[index, : len(ids)] = torch.from_numpy(labels)
        batch.attention[index, : len(ids)] = True
    positions = [torch.from_numpy(positions) for _, _, positions in expanded if len(positions)]
    if positions:
        batch.mask_positions = torch.cat(positions)
    batch.mask_rows = torch.tensor([index for index, row in enumerate(rows) for _ in row.holes], dtype=torch.long)
    batch.masks = [_masks(sample) for sample in samples]
    batch.refused = [sum(row.refused for row in sample.rows) for sample in samples]
    batch.cut_rows, batch.cut_tokens = sum(row.cut > 0 for row in rows), sum(row.cut for row in rows)
    return batch


def collate_prompts(
    samples: Sequence[Sample], prompts: Sequence[Sequence[list[int]]], image_tokens: int, pad_id: int = 0
) -> Batch:
    """A generation batch, padded on the left: `prompts[b]` holds the open prompts (ids) about `samples[b]`."""
    rows = [Encoded(ids, [IGNORE_ID] * len(ids), (), ()) for group in prompts for ids in group]
    expanded = [_expand(row, image_tokens)[0] for row in rows]
    length = max(map(len, expanded), default=0)
    batch = _pictures(samples, [len(group) for group in prompts], length, pad_id)
    for index, ids in enumerate(expanded):
        batch.ids[index, length - len(ids) :] = torch.from_numpy(ids)
        batch.attention[index, length - len(ids) :] = True
    return batch


def _pictures(samples: Sequence[Sample], rows: list[int], length: int, pad_id: int) -> Batch:
    """A batch with its pictures and nothing but padding in its rows; `rows[b]` rows belong to picture b."""
    shape = (sum(rows), length)
    seg_pixels = [sample.seg_pixels for sample in samples if sample.seg_pixels is not None]
    return Batch(
        pixels=torch.stack([sample.pixels for sample in samples]),
        seg_pixels=torch.stack(seg_pixels) if seg_pixels else None,
        ids=torch.full(shape, pad_id),
        labels=torch.full(shape, IGNORE_ID),
        attention=torch.zeros(shape, dtype=torch.bool),
        row_image=torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(rows)),
        mask_rows=torch.zeros(0, dtype=torch.long),
        mask_positions=torch.zeros(0, 1, dtype=torch.long),
        masks=[torch.zeros(0, *sample.geometry.original) for sample in samples],
        geometry=[sample.geometry for sample in samples],
        names=[sample.name for sample in samples],
        ignore=[sample.ignore for sample in samples],
        skipped=[message for sample in samples for message in sample.skipped],
    )


def _masks(sample: Sample) -> Tensor:
    count = sum(len(row.holes) for row in sample.rows)
    if sample.masks is None or len(sample.masks) != count:
        have = 0 if sample.masks is None else len(sample.masks)
        raise ValueError(f"{sample.name}: {count} masks named in its rows, {have} drawn")
    return sample.masks


def _expand(row: Encoded, image_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids and labels with `image_tokens` places for the picture, and (N, K) mask positions in that row.

    A token's state is that of its last place: right behind the picture, the last patch predicts.
    """
    ids, labels = np.asarray(row.ids, np.int64), np.asarray(row.labels, np.int64)
    repeats = np.where(ids == IMAGE_ID, image_tokens, 1)
    last = np.cumsum(repeats) - 1
    return ids.repeat(repeats), labels.repeat(repeats), last[np.array(row.mask_positions, int)]


def draw_target(record: Record, index: int, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: the mask of a target that is in the picture. One of another size than the picture's, or without a
    pixel (EmptyMask), is an error that names picture and phrase, and the annotation where the mask knows it."""
    target = record.targets[index]
    mask = _draw(record, repr(target.phrase), target.mask, shape)
    if not mask.any():
        origin = getattr(target.mask, "where", "")
        raise EmptyMask(
            f"{record.image}: the mask of {target.phrase!r} has no pixel, although the data say that it is there"
            + (f" ({origin})" if origin else "")
        )
    return mask


def draw_ignored(record: Record, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: the pixels of a picture of `shape` that neither loss nor metric may count."""
    return np.zeros(shape, bool) if record.ignore is None else _draw(record, "ignored pixels", record.ignore, shape)


def _draw(record: Record, what: str, mask: MaskFn, shape: tuple[int, int]) -> np.ndarray:
    """The mask as (H, W) bool; another size than the picture's is an error (as are a source's own, which stay)."""
    drawn = np.asarray(mask())
    if drawn.shape != tuple(shape):
        raise ValueError(misfit(record.image, what, drawn.shape, shape))
    return drawn.astype(bool)


def _named(record: Record, encode: Callable[[Dialogue], Encoded], dialogue: Dialogue) -> Encoded:
    """Encodes; an error of the encoder gets the name of the picture."""
    try:
        return encode(dialogue)
    except ValueError as error:
        kind = SequenceTooLong if isinstance(error, SequenceTooLong) else ValueError
        raise kind(f"{record.image}: {error}") from error
