"""Answers as pictures: what was asked, said, predicted and true, ready for a grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from data.types import IMAGE_PLACEHOLDER, Query, Record
from data.views import read_image
from evaluation.draw import Layer, Panel, colour_of
from evaluation.matching import Names, assign
from evaluation.protocols import Reply
from evaluation.scoring import IGNORE, read_masks, standard_map, true_map, true_mask


def panel(record: Record, queries: Sequence[Query], replies: Sequence[Reply]) -> Panel:
    """One picture with its questions; class lists are shown as maps of one colour a class, phrases as their masks."""
    question = " | ".join(query.question.replace(IMAGE_PLACEHOLDER, "").strip() for query in queries)
    answer = " | ".join(reply.text for reply in replies) or "(nothing)"
    draw = class_layers if record.kind == "classes" else phrase_layers
    predicted, true, note = draw(record, queries, replies)
    return Panel(read_image(record.image), question, answer, predicted, true, note)


def class_layers(
    record: Record, queries: Sequence[Query], replies: Sequence[Reply]
) -> tuple[list[Layer], list[Layer], str]:
    """Predicted and true layers of a class list, and the share of labelled pixels that are right."""
    names = Names(record.vocabulary)
    shape, none = tuple(replies[0].masks.shape[-2:]), len(names.names)
    masks, _ = read_masks(replies, queries, names, fuzzy=False)
    predicted = standard_map([(index, mask.cpu()) for index, mask in masks], shape, none)
    truth = true_map(record, names, shape)
    known = truth != IGNORE
    right = (predicted == truth)[known].float().mean().item() if known.any() else 0.0
    layers = [_of_map(values, names) for values in (predicted, truth)]
    return layers[0], layers[1], f"pixels right: {right:.0%}"


def phrase_layers(
    record: Record, queries: Sequence[Query], replies: Sequence[Reply]
) -> tuple[list[Layer], list[Layer], str]:
    """Predicted and true layers of phrases, one colour each, and their IoU."""
    predicted, true, notes = [], [], []
    for query, reply in zip(queries, replies, strict=True):
        shape = tuple(reply.masks.shape[-2:])
        for target, mask in zip(query.targets, assign(reply.claims, query.asked), strict=True):
            guess = (reply.masks[mask] > 0).cpu().numpy() if mask is not None else np.zeros(shape, bool)
            truth = true_mask(record, target, shape).numpy()
            union = int((guess | truth).sum())
            notes.append(f"IoU {(guess & truth).sum() / union:.2f}" if union else "rightly empty")
            colour = colour_of(len(true))
            predicted.append(Layer(guess, "", colour))
            true.append(Layer(truth, "", colour))
    return predicted, true, ", ".join(notes)


def _of_map(values: torch.Tensor, names: Names) -> list[Layer]:
    found = [index for index in values.unique().tolist() if 0 <= index < len(names.names)]
    return [Layer((values == index).numpy(), names.names[index], colour_of(index)) for index in found]
