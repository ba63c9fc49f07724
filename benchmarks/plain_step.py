"""A training step as in the original programs, to which the optimisations are added one by one.

As published: the vision tower encodes an image once per dialogue, every dialogue is a row of its own, logits are
computed at all positions and shifted by a copy, and masks are encoded, decoded and scored image by image (lisa.md 1.6,
3.2, 5.3). In favour of the originals, SAM's attention uses SDPA; they materialise the scores and normalise a copy.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamVisionSdpaAttention

from benchmarks.shapes import sam_head
from data.types import IGNORE_ID, Batch
from model.heads.sam_attention import ChunkedGlobalAttention
from model.heads.sam_decoder import SamCellDecoder
from model.losses import COUNT_EPS, text_loss
from model.runtime import RuntimeOptions
from model.seg_model import SegModel
from model.vlm.base import Vision
from utils.config import LossConfig


class ReleasedDecoder(SamMaskDecoder):
    """transformers' mask decoder with the weights of ours, and called as ours is."""

    def __init__(self, ours: SamCellDecoder):
        super().__init__(ours.transformer.config)
        self.load_state_dict(ours.state_dict(), assign=True)

    def forward(  # ty: ignore[incompatible-method-override]
        self, cells: Tensor, positions: Tensor, prompts: Tensor, size: tuple[int, int]
    ) -> Tensor:
        number = len(prompts)
        images, places = (part.mT.unflatten(2, size).expand(number, -1, -1, -1) for part in (cells, positions))
        nothing = images.new_zeros(1, 1, 1, 1)  # the cells have the dense prompt
        logits, _ = super().forward(images, places, prompts[:, None], nothing, multimask_output=False)
        return logits[:, 0, 0]


LADDER = ("vision_once", "packed_rows", "supervised_logits", "encoder_strips")  # then all images together: the product


def take_apart(model: SegModel, on: Collection[str]) -> None:
    """Switch off the optimisations of `model` that are not in `on`."""
    together = len(on) > len(LADDER)
    model.configure(RuntimeOptions(pack_rows="packed_rows" in on, checkpoint_decoder=together))
    if not together:
        model.head.decoder = ReleasedDecoder(sam_head(model).decoder)
    if "encoder_strips" not in on:
        for attention in sam_head(model).encoder.modules():
            if isinstance(attention, ChunkedGlobalAttention):
                attention.__class__ = SamVisionSdpaAttention  # the same weights


def plain_loss(model: SegModel, batch: Batch, config: LossConfig, on: Collection[str]) -> Tensor:
    """The same loss as `objective(model(batch), batch, config).total`."""
    head = sam_head(model)
    images = cast(Tensor, batch.seg_pixels)  # SAM has a view of its own
    features = []  # of all images before the language model runs, as released; SAM needs no `vision`
    for image in images:
        features.append(head.features(replace(batch, seg_pixels=image[None]), cast(Vision, None)))
    once = "vision_once" in on
    vision = _vision(model, batch, batch.row_image if not once else torch.arange(len(batch)))
    row_image = batch.row_image if once else torch.arange(len(batch.ids), device=batch.ids.device)
    hidden = model.vlm(batch.ids, batch.attention, vision, row_image).final
    ce = _text_loss(model, batch, hidden, on)
    states = hidden[batch.mask_rows[:, None], batch.mask_positions]
    query_image = batch.row_image[batch.mask_rows]
    bce = dice = torch.zeros((), device=batch.ids.device)
    count = 0
    for index, (place, truth) in enumerate(zip(batch.geometry, batch.masks, strict=True)):
        mine = query_image == index
        queries = model.project(states[mine].to(model.dtype))
        (logits,) = head.decode(features[index], queries, query_image[mine] * 0, [place]).masks
        bce = bce + _bce(logits, truth)
        dice = dice + _dice(logits, truth)
        count += len(truth)
    return config.ce * ce + (config.bce * bce + config.dice * dice) / (count + COUNT_EPS)


def _vision(model: SegModel, batch: Batch, chosen: Tensor) -> Vision:
    """Of the images of these numbers, with repetitions. The images of a benchmark have one size."""
    pixels = batch.pixels.unflatten(0, (len(batch), -1))[chosen].flatten(0, 1)
    return model.vlm.encode_images(pixels, [batch.geometry[index] for index in chosen.tolist()])


def _text_loss(model: SegModel, batch: Batch, hidden: Tensor, on: Collection[str]) -> Tensor:
    targets = batch.labels[:, 1:]
    supervised = targets != IGNORE_ID
    if "supervised_logits" in on:
        return text_loss(model.vlm.logits(hidden[:, :-1][supervised]), targets[supervised])
    logits = model.vlm.logits(hidden).float()
    shifted = logits[:, :-1].contiguous()
    return F.cross_entropy(shifted.view(-1, shifted.shape[-1]), targets.reshape(-1), ignore_index=IGNORE_ID)


def _bce(logits: Tensor, truth: Tensor) -> Tensor:
    """(N, H, W) logits and truth -> the sum over masks of the mean over pixels."""
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="none").flatten(1, 2).mean(1).sum()


def _dice(logits: Tensor, truth: Tensor) -> Tensor:
    probability, truth = logits.sigmoid().flatten(1, 2), truth.flatten(1, 2)
    overlap = 2 * (probability / 1000 * truth).sum(-1)  # LISA's scale of 1000
    area = (probability / 1000).sum(-1) + (truth / 1000).sum(-1)
    return (1 - (overlap + 1e-6) / (area + 1e-6)).sum()
