"""Makes panels of answers: question, text, predicted and true masks of an image, for a grid or a page."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from data.sources.base import image_size
from data.types import IMAGE_PLACEHOLDER, Query, Record
from evaluation.metrics.counts import IGNORE
from evaluation.metrics.matched import match
from evaluation.metrics.matching import Names, assign
from evaluation.metrics.semantic import read_masks, standard_map, true_map
from evaluation.metrics.truth import true_mask
from evaluation.prediction_schema import Answer
from evaluation.predictions import reply_of
from evaluation.protocols import Reply
from evaluation.report.draw import Colour, Layer, Panel, colour_of
from utils.images import read_image

Layers = list[Layer]
EXTRA_COLOUR = (120, 120, 120)  # of a mask that matches nothing asked for


def panel(record: Record, queries: Sequence[Query], replies: Sequence[Reply]) -> Panel:
    """One image with its questions. Class lists are shown as maps with one colour per class, phrases as masks."""
    question = " | ".join(query.question.replace(IMAGE_PLACEHOLDER, "").strip() for query in queries)
    answer = " | ".join(reply.text for reply in replies) or "(nothing)"
    make_layers = {"classes": class_layers, "multi": multi_target_layers}.get(record.kind, phrase_layers)
    predicted, true, note = make_layers(record, queries, replies)
    return Panel(read_image(record.image), question, answer, predicted, true, note)


def replay(record: Record, answers: Sequence[Answer]) -> Panel:
    """The panel of answers from a file of predictions."""
    size = image_size(record.image)
    queries = [Query(answer["question"], (), tuple(answer["targets"]), tuple(answer["asked"])) for answer in answers]
    return panel(record, queries, [reply_of(answer, size) for answer in answers])


def class_layers(record: Record, queries: Sequence[Query], replies: Sequence[Reply]) -> tuple[Layers, Layers, str]:
    """Predicted and true layers of a class list, and the share of labelled pixels that are right."""
    names = Names(record.vocabulary)
    shape = replies[0].size
    masks, _ = read_masks(replies, queries, names, fuzzy=False)
    predicted = standard_map([(index, mask.cpu()) for index, mask in masks], shape, none=len(names.names))
    truth = true_map(record, names, shape)
    labelled = truth != IGNORE
    right = (predicted == truth)[labelled].float().mean().item() if labelled.any() else 0.0
    return _map_layers(predicted, names), _map_layers(truth, names), f"pixels right: {right:.0%}"


def phrase_layers(record: Record, queries: Sequence[Query], replies: Sequence[Reply]) -> tuple[Layers, Layers, str]:
    """Predicted and true layers of phrases, one colour each, and their IoU."""
    predicted, true, notes = [], [], []
    single = sum(len(query.phrases) for query in queries) == 1  # the question names it, so the legend need not
    for query, reply in zip(queries, replies, strict=True):
        masks = assign(reply.claims, query.phrases)
        for phrase, target, mask in zip(query.phrases, query.targets, masks, strict=True):
            prediction = _inside(reply.masks[mask]) if mask is not None else np.zeros(reply.size, bool)
            truth = true_mask(record, target, reply.size).numpy()
            name = "" if single else phrase
            colour = colour_of(len(true))
            predicted.append(Layer(prediction, name, colour))
            true.append(Layer(truth, name, colour))
            notes.append(_describe_iou(prediction, truth))
    return predicted, true, ", ".join(notes)


def multi_target_layers(
    record: Record, queries: Sequence[Query], replies: Sequence[Reply]
) -> tuple[Layers, Layers, str]:
    """Predicted and true layers of questions about several objects, and the IoU of each mask, misses and extras.

    A mask has the colour of the object that it is matched with; one that is matched with none is grey.
    """
    predicted, true, notes = [], [], []
    colour_by_phrase: dict[str, Colour] = {}
    for query, reply in zip(queries, replies, strict=True):
        masks = reply.masks[[claim.mask for claim in reply.claims if claim.mask is not None]].cpu() > 0
        truths = [true_mask(record, target, reply.size) for target in query.targets]
        truth = torch.stack(truths) if truths else masks[:0]
        target_of = dict(zip(*match(masks, truth), strict=True))
        for phrase in query.phrases:
            colour_by_phrase.setdefault(phrase, colour_of(len(colour_by_phrase)))
        for phrase, mask in zip(query.phrases, truth.numpy(), strict=True):
            true.append(Layer(mask, phrase, colour_by_phrase[phrase]))
        for index, mask in enumerate(masks.numpy()):
            target = target_of.get(index)
            if target is None:
                predicted.append(Layer(mask, "extra", EXTRA_COLOUR))
                continue
            phrase = query.phrases[target]
            predicted.append(Layer(mask, phrase, colour_by_phrase[phrase]))
            notes.append(_describe_iou(mask, truth[target].numpy()))
        notes += ["missed"] * (len(truth) - len(target_of)) + ["extra"] * (len(masks) - len(target_of))
    return predicted, true, ", ".join(notes)


def _inside(logits: torch.Tensor) -> np.ndarray:
    return (logits > 0).cpu().numpy()


def _describe_iou(prediction: np.ndarray, truth: np.ndarray) -> str:
    union = int((prediction | truth).sum())
    return f"IoU {(prediction & truth).sum() / union:.2f}" if union else "rightly empty"


def _map_layers(class_map: torch.Tensor, names: Names) -> Layers:
    classes = [index for index in class_map.unique().tolist() if 0 <= index < len(names.names)]
    return [Layer((class_map == index).numpy(), names.names[index], colour_of(index)) for index in classes]
