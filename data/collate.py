"""Records to samples, and samples to batches: an image is read once; its rows and masks keep one order throughout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data.encode import Encoded, Encoder, SequenceTooLong
from data.types import IGNORE_ID, IMAGE_ID, Batch, Dialogue, EmptyMask, Geometry, MaskFn, Record
from data.views import Views
from utils.images import read_image, size_mismatch


class NothingToAsk(ValueError):
    """A record gives no question, e.g. an image without a labelled pixel: a fact about the set, no fault of a file."""


@dataclass
class Sample:
    """One image of size (H, W) with its rows; `masks` follow the holes of the rows, row by row."""

    name: str
    pixels: Tensor  # (3, h, w), (n, C) or (n, 3, s, s), as LanguageView.show gives them
    seg_pixels: Tensor | None  # (3, S, S), as SegView.show gives them
    geometry: Geometry
    image_tokens: int  # positions that the image takes in each of its rows
    rows: list[Encoded] = field(default_factory=list)
    masks: Tensor | None = None  # (N, H, W) bool
    ignore: Tensor | None = None  # (H, W) bool
    skipped: list[str] = field(default_factory=list)  # what was left out on the way to this sample, and why


class Task(Protocol):
    """Turns facts into words. Each system has one."""

    def converse(self, record: Record, rng: np.random.Generator) -> list[Dialogue]: ...


class SampleBuilder:
    """Builds samples: words from the task, ids from the encoder, pixels from the views, masks from the record.

    ignore_region: keep the record's ignored pixels.
    drop_long_rows: leave out a row that does not fit, with a note in `Sample.skipped`, instead of raising
        SequenceTooLong. When no row is left, it is raised anyway.
    """

    def __init__(
        self, task: Task, encoder: Encoder, views: Views, *, ignore_region: bool = False, drop_long_rows: bool = False
    ):
        tokens = views.language.most_tokens
        if encoder.max_length and encoder.max_length <= tokens and encoder.long_rows != "keep":
            raise ValueError(
                f"model_max_length {encoder.max_length} leaves no room for words next to the {tokens} positions that "
                "an image may take: raise it, or let images take fewer (model.tower.max_pixels). The LISA family "
                "counts 256 of them whatever the vision tower: there, this limit means model_max_length "
                f"{encoder.max_length + tokens - 256} here"
            )
        self.task = task
        self.encoder = encoder
        self.views = views
        self.ignore_region = ignore_region
        self.drop_long_rows = drop_long_rows

    def build(self, record: Record, rng: np.random.Generator) -> Sample:
        """A training sample. Errors name the image: NothingToAsk, SequenceTooLong, another ValueError or an OSError."""
        dialogues = self.task.converse(record, rng)
        if not dialogues:
            raise NothingToAsk(f"{record.image}: nothing to ask about it")
        image = read_image(record.image)
        rows, skipped = self._encode_rows(record, dialogues, self.views.language.tokens(*image.shape[:2]))
        # The views are made after the words are known to fit, and only the masks that these words name are rasterized:
        # a record may have hundreds of targets, of which a dialogue samples three.
        sample = make_views(image, self.views, str(record.image))
        sample.rows = rows
        sample.skipped = skipped
        sample.masks = rasterize_masks(record, [hole for row in rows for hole in row.holes], sample.geometry.original)
        if self.ignore_region and record.ignore is not None:
            sample.ignore = torch.from_numpy(rasterize_ignored(record, sample.geometry.original))
        return sample

    def _encode_rows(
        self, record: Record, dialogues: list[Dialogue], image_tokens: int
    ) -> tuple[list[Encoded], list[str]]:
        """The rows that fit, at least one, and messages about those that do not."""
        rows: list[Encoded] = []
        skipped: list[str] = []
        for dialogue in dialogues:
            try:
                rows.append(_encode_with_image_name(record, self.encoder, dialogue, image_tokens))
            except SequenceTooLong as error:
                if not self.drop_long_rows:
                    raise
                skipped.append(str(error))
        if not rows:
            raise SequenceTooLong(skipped[0])
        return rows, skipped


def load_views(path: str | Path, views: Views) -> Sample:
    """The image file in both views, without rows or masks; enough for generation."""
    return make_views(read_image(path), views, str(path))


def make_views(image: np.ndarray, views: Views, name: str) -> Sample:
    """An (H, W, 3) uint8 RGB image in both views."""
    if views.seg is None:
        seg_pixels, geometry = None, views.language.geometry(*image.shape[:2])
    else:
        seg_pixels, geometry = views.seg.show(image), views.seg.geometry(*image.shape[:2])
    return Sample(name, views.language.show(image), seg_pixels, geometry, views.language.tokens(*image.shape[:2]))


def rasterize_masks(record: Record, targets: Sequence[int], shape: tuple[int, int]) -> Tensor:
    """(N, H, W) bool: the masks of these targets of an image of `shape`, each rasterized once."""
    masks: dict[int, np.ndarray] = {}
    for index in targets:
        if index not in masks:
            target = record.targets[index]
            if target.mask is None:
                raise ValueError(f"{record.image}: an answer has a mask for {target.phrase!r}, which is absent")
            masks[index] = rasterize_target(record, index, shape)
    stacked = np.empty((len(targets), *shape), bool)  # row by row in memory, whichever way the masks were made
    for place, index in enumerate(targets):
        stacked[place] = masks[index]
    return torch.from_numpy(stacked)


def collate(samples: Sequence[Sample], pad_id: int = 0) -> Batch:
    """A training or teacher-forced batch, padded on the right. Raises ValueError where a sample lacks a mask."""
    rows = [row for sample in samples for row in sample.rows]
    expanded = [_expand(row, sample.image_tokens) for sample in samples for row in sample.rows]
    length = max((len(ids) for ids, _, _ in expanded), default=0)
    batch = _empty_batch(samples, [len(sample.rows) for sample in samples], length, pad_id)
    for index, (ids, labels, _) in enumerate(expanded):
        batch.ids[index, : len(ids)] = torch.from_numpy(ids)
        batch.labels[index, : len(ids)] = torch.from_numpy(labels)
        batch.attention[index, : len(ids)] = True
    positions = [torch.from_numpy(positions) for _, _, positions in expanded if len(positions)]
    if positions:
        batch.mask_positions = torch.cat(positions)
    # One entry per mask in the order of mask_positions: rows first, then holes. `masks` follows the same order.
    batch.mask_rows = torch.tensor([index for index, row in enumerate(rows) for _ in row.holes], dtype=torch.long)
    batch.masks = [_masks(sample) for sample in samples]
    batch.refused = [sum(row.refused for row in sample.rows) for sample in samples]
    batch.cut_rows = sum(row.cut > 0 for row in rows)
    batch.cut_tokens = sum(row.cut for row in rows)
    return batch


def collate_prompts(samples: Sequence[Sample], prompts: Sequence[Sequence[list[int]]], pad_id: int = 0) -> Batch:
    """A generation batch, padded on the left so that all rows end where the answer begins.

    prompts: `prompts[b]` holds the open prompts (ids) about `samples[b]`.
    """
    expanded = [
        _expand(Encoded(ids, [IGNORE_ID] * len(ids), (), ()), sample.image_tokens)[0]
        for sample, group in zip(samples, prompts, strict=True)
        for ids in group
    ]
    length = max(map(len, expanded), default=0)
    batch = _empty_batch(samples, [len(group) for group in prompts], length, pad_id)
    for index, ids in enumerate(expanded):
        batch.ids[index, length - len(ids) :] = torch.from_numpy(ids)
        batch.attention[index, length - len(ids) :] = True
    return batch


def _empty_batch(samples: Sequence[Sample], rows: list[int], length: int, pad_id: int) -> Batch:
    """A batch with its images, and with rows that hold nothing but padding; `rows[b]` rows are about image b."""
    shape = (sum(rows), length)
    seg_pixels = [sample.seg_pixels for sample in samples if sample.seg_pixels is not None]
    return Batch(
        # One image per sample, not per row: the towers encode an image once, and row_image spreads it over its rows.
        pixels=join_pixels([sample.pixels for sample in samples]),
        seg_pixels=torch.stack(seg_pixels) if seg_pixels else None,
        ids=torch.full(shape, pad_id),
        labels=torch.full(shape, IGNORE_ID),
        attention=torch.zeros(shape, dtype=torch.bool),
        row_image=torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(rows)),
        mask_rows=torch.zeros(0, dtype=torch.long),
        mask_positions=torch.zeros(0, 1, dtype=torch.long),
        masks=[torch.zeros(0, *sample.geometry.original, dtype=torch.bool) for sample in samples],
        geometry=[sample.geometry for sample in samples],
        names=[sample.name for sample in samples],
        ignore=[sample.ignore for sample in samples],
        skipped=[message for sample in samples for message in sample.skipped],
    )


def join_pixels(pixels: list[Tensor]) -> Tensor:
    """Images of one size are stacked; patches and tiles, whose number differs, are laid end to end."""
    return torch.stack(pixels) if pixels[0].ndim == 3 else torch.cat(pixels)


def _masks(sample: Sample) -> Tensor:
    """(N, H, W) of a sample, which must have as many masks as its rows have holes."""
    holes = sum(len(row.holes) for row in sample.rows)
    if sample.masks is None or len(sample.masks) != holes:
        have = 0 if sample.masks is None else len(sample.masks)
        raise ValueError(f"{sample.name}: its rows have {holes} holes for masks, but it has {have} masks")
    return sample.masks


def _expand(row: Encoded, image_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids and labels with `image_tokens` positions for the image, and (N, K) mask positions in the expanded row.

    With 4 image tokens, an image (I) between two tokens before and three after it:

        ids            5 6 I 7 8 9             expanded     5 6 I I I I 7 8 9
        repeats        1 1 4 1 1 1
        last           0 1 5 6 7 8             a position p of the row becomes last[p]

    so a mask at position 3 (token 7) moves to 6. For a mask token right after the image, whose position is that of the
    image itself, 2, the answer is 5: the state of the *last* patch predicts the token after the image.
    """
    ids, labels = np.asarray(row.ids, np.int64), np.asarray(row.labels, np.int64)
    repeats = np.where(ids == IMAGE_ID, image_tokens, 1)
    last = np.cumsum(repeats) - 1  # index of the last copy of every id
    return ids.repeat(repeats), labels.repeat(repeats), last[np.array(row.mask_positions, int)]


def rasterize_target(record: Record, index: int, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: the mask of a target that is in the image.

    ValueError if its size is not the image's, EmptyMask if it has no pixel; they name image and phrase, and the
    annotation if the mask knows it.
    """
    target = record.targets[index]
    if target.mask is None:
        raise ValueError(f"{record.image}: {target.phrase!r} is absent and has no mask")
    mask = _rasterize(record, repr(target.phrase), target.mask, shape)
    if not mask.any():
        origin = getattr(target.mask, "where", "")
        raise EmptyMask(
            f"{record.image}: the mask of {target.phrase!r} has no pixel, although the data say that it is there"
            + (f" ({origin})" if origin else "")
        )
    return mask


def rasterize_ignored(record: Record, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: the pixels of an image of `shape` that neither loss nor metric may count."""
    if record.ignore is None:
        return np.zeros(shape, bool)
    return _rasterize(record, "ignored pixels", record.ignore, shape)


def _rasterize(record: Record, what: str, mask: MaskFn, shape: tuple[int, int]) -> np.ndarray:
    """`mask()` as (H, W) bool; ValueError if its size is not the image's. Errors of the mask itself pass through."""
    array = np.asarray(mask())
    if array.shape != tuple(shape):
        raise ValueError(size_mismatch(record.image, what, array.shape, shape))
    return array.astype(bool, copy=False)


def _encode_with_image_name(
    record: Record, encode: Callable[[Dialogue, int], Encoded], dialogue: Dialogue, image_tokens: int
) -> Encoded:
    """`encode(dialogue, image_tokens)`, whose errors get the name of the image."""
    try:
        return encode(dialogue, image_tokens)
    except ValueError as error:
        kind = SequenceTooLong if isinstance(error, SequenceTooLong) else ValueError
        raise kind(f"{record.image}: {error}") from error
