"""Answers as pictures: what was asked, said, predicted and true, ready for a grid or a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from data.types import IMAGE_PLACEHOLDER, Claim, Query, Record
from data.views import read_image
from evaluation.metrics.matched import match
from evaluation.metrics.matching import Names, assign
from evaluation.metrics.scorers import IGNORE, read_masks, standard_map, true_map, true_mask
from evaluation.protocols import Reply
from evaluation.report.draw import Layer, Panel, colour_of
from utils.masks import rle_to_mask

Layers = list[Layer]
EXTRA_COLOUR = (120, 120, 120)  # of a mask that matches nothing asked for


def panel(record: Record, queries: Sequence[Query], replies: Sequence[Reply]) -> Panel:
    """One picture with its questions; class lists are shown as maps of one colour a class, phrases as their masks."""
    question = " | ".join(query.question.replace(IMAGE_PLACEHOLDER, "").strip() for query in queries)
    answer = " | ".join(reply.text for reply in replies) or "(nothing)"
    draw = {"classes": class_layers, "multi": several_layers}.get(record.kind, phrase_layers)
    predicted, true, note = draw(record, queries, replies)
    return Panel(read_image(record.image), question, answer, predicted, true, note)


def replay(record: Record, answers: Sequence[dict[str, Any]]) -> Panel:
    """The panel of answers as a file of predictions keeps them: of the logits only the signs are left."""
    shape = read_image(record.image).shape[:2]
    queries = [Query(one["question"], (), tuple(one["targets"]), tuple(one["asked"])) for one in answers]
    replies = []
    for one in answers:
        masks = [rle_to_mask(rle, shape) for rle in one["masks"]]
        inside = torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, *shape)
        claims = tuple(Claim(phrase, mask) for phrase, mask in one["claims"])
        replies.append(Reply(one["text"], claims, inside.float() - 0.5, one["finished"], one["unread"]))
    return panel(record, queries, replies)


def class_layers(record: Record, queries: Sequence[Query], replies: Sequence[Reply]) -> tuple[Layers, Layers, str]:
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


def phrase_layers(record: Record, queries: Sequence[Query], replies: Sequence[Reply]) -> tuple[Layers, Layers, str]:
    """Predicted and true layers of phrases, one colour each, and their IoU."""
    predicted, true, notes = [], [], []
    alone = sum(len(query.phrases) for query in queries) == 1  # then the question says it all
    for query, reply in zip(queries, replies, strict=True):
        shape = tuple(reply.masks.shape[-2:])
        found = assign(reply.claims, query.phrases)
        for phrase, target, mask in zip(query.phrases, query.targets, found, strict=True):
            guess = _inside(reply.masks[mask]) if mask is not None else np.zeros(shape, bool)
            truth = true_mask(record, target, shape).numpy()
            name, colour = "" if alone else phrase, colour_of(len(true))
            predicted.append(Layer(guess, name, colour))
            true.append(Layer(truth, name, colour))
            notes.append(_iou(guess, truth))
    return predicted, true, ", ".join(notes)


def several_layers(record: Record, queries: Sequence[Query], replies: Sequence[Reply]) -> tuple[Layers, Layers, str]:
    """Predicted and true layers of questions about several objects: a mask has the colour of the object that it is
    matched to, one that matches none is grey; and what was missed or too much."""
    predicted, true, notes, seen = [], [], [], {}
    for query, reply in zip(queries, replies, strict=True):
        drawn = reply.masks[[claim.mask for claim in reply.claims if claim.mask is not None]].cpu() > 0
        truths = [true_mask(record, target, tuple(drawn.shape[-2:])) for target in query.targets]
        truth = torch.stack(truths) if truths else drawn[:0]
        pairs = dict(zip(*match(drawn, truth), strict=True))
        colours = [seen.setdefault(phrase, colour_of(len(seen))) for phrase in query.phrases]
        true += [Layer(*one) for one in zip(truth.numpy(), query.phrases, colours, strict=True)]
        for index, mask in enumerate(drawn.numpy()):
            hit = pairs.get(index)
            named = ("extra", EXTRA_COLOUR) if hit is None else (query.phrases[hit], colours[hit])
            predicted.append(Layer(mask, *named))
            notes += [] if hit is None else [_iou(mask, truth[hit].numpy())]
        notes += ["missed"] * (len(truth) - len(pairs)) + ["extra"] * (len(drawn) - len(pairs))
    return predicted, true, ", ".join(notes)


def _inside(logits: torch.Tensor) -> np.ndarray:
    return (logits > 0).cpu().numpy()


def _iou(guess: np.ndarray, truth: np.ndarray) -> str:
    union = int((guess | truth).sum())
    return f"IoU {(guess & truth).sum() / union:.2f}" if union else "rightly empty"


def _of_map(values: torch.Tensor, names: Names) -> list[Layer]:
    found = [index for index in values.unique().tolist() if 0 <= index < len(names.names)]
    return [Layer((values == index).numpy(), names.names[index], colour_of(index)) for index in found]
