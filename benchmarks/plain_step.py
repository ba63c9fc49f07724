"""A training step as the original programs take it, and with what saves work added thing by thing.

As published: the vision tower sees a picture once a dialogue, every dialogue is a row of its own, logits are computed
at all positions and shifted by a copy, pictures are encoded, drawn on and scored one by one (lisa.md 1.6, 3.2, 5.3).
Kinder than they are: SAM's attention goes through SDPA, where they write the scores out and normalise a copy.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.sam.modeling_sam import SamVisionSdpaAttention

from data.types import IGNORE_ID, Batch
from model.heads.sam_attention import ChunkedGlobalAttention
from model.losses import COUNT_EPS, text_loss
from model.runtime import RuntimeOptions
from model.seg_model import SegModel
from utils.config import LossConfig

LADDER = ("vision_once", "packed_rows", "supervised_logits", "encoder_strips")  # then pictures together: the product


def take_apart(model: SegModel, on: Collection[str]) -> None:
    """Undoes what a model has that is not on."""
    model.configure(RuntimeOptions(pack_rows="packed_rows" in on, checkpoint_decoder=len(on) > len(LADDER)))
    for layer in model.head.encoder.layers if "encoder_strips" not in on else ():
        if isinstance(layer.attn, ChunkedGlobalAttention):
            layer.attn.__class__ = SamVisionSdpaAttention  # the same weights


def plain_loss(model: SegModel, batch: Batch, config: LossConfig, on: Collection[str]) -> Tensor:
    """What `objective(model(batch), batch, config).total` is."""
    views = [replace(batch, seg_pixels=picture[None]) for picture in batch.seg_pixels]
    features = [model.head.features(view, None) for view in views]  # first, as released
    once = "vision_once" in on
    vision = model.vlm.encode_images(batch.pixels if once else batch.pixels[batch.row_image])
    row_image = batch.row_image if once else torch.arange(len(batch.ids), device=batch.ids.device)
    hidden = model.vlm(batch.ids, batch.attention, vision, row_image)
    ce = _text_loss(model, batch, hidden, on)
    states = hidden[batch.mask_rows[:, None], batch.mask_positions]
    query_image = batch.row_image[batch.mask_rows]
    bce, dice, count = 0.0, 0.0, 0
    for index, (place, truth) in enumerate(zip(batch.geometry, batch.masks, strict=True)):
        mine = query_image == index
        queries = model.project(states[mine].to(model.dtype))
        (drawn,) = model.head.decode(features[index], queries, query_image[mine] * 0, [place])
        bce, dice, count = bce + _bce(drawn, truth), dice + _dice(drawn, truth), count + len(truth)
    return config.ce * ce + (config.bce * bce + config.dice * dice) / (count + COUNT_EPS)


def _text_loss(model: SegModel, batch: Batch, hidden: Tensor, on: Collection[str]) -> Tensor:
    targets = batch.labels[:, 1:]
    supervised = targets != IGNORE_ID
    if "supervised_logits" in on:
        return text_loss(model.vlm.logits(hidden[:, :-1][supervised]), targets[supervised])
    logits = model.vlm.logits(hidden).float()
    shifted = logits[:, :-1].contiguous()
    return F.cross_entropy(shifted.view(-1, shifted.shape[-1]), targets.reshape(-1), ignore_index=IGNORE_ID)


def _bce(logits: Tensor, truth: Tensor) -> Tensor:
    """(N, H, W) to the sum over masks of their means over pixels."""
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="none").flatten(1, 2).mean(1).sum()


def _dice(logits: Tensor, truth: Tensor) -> Tensor:
    drawn, truth = logits.sigmoid().flatten(1, 2), truth.flatten(1, 2)
    overlap = 2 * (drawn / 1000 * truth).sum(-1)
    area = (drawn / 1000).sum(-1) + (truth / 1000).sum(-1)
    return (1 - (overlap + 1e-6) / (area + 1e-6)).sum()
