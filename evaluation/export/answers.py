"""An answer as files: a PNG per mask, an overlay with names, a JSON file, and exports; a conversation as a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.types import Query
from evaluation.asked import image_id
from evaluation.export.coco import coco_results
from evaluation.export.label_maps import panoptic_image, save_png, semantic_image
from evaluation.export.suites import COCO, PANOPTIC, SEMANTIC
from evaluation.metrics.matching import Names, about_one, assign_claims, without_substitutes
from evaluation.metrics.semantic import read_masks, standard_map
from evaluation.predictor import mask_score, segments_of
from evaluation.protocols import Reply
from evaluation.report.draw import Layer, colour_of, with_legend
from utils.files import write_atomically
from utils.images import read_image

ENDINGS = {COCO: "_coco.json", SEMANTIC: "_semantic.png", PANOPTIC: "_panoptic.png"}  # of exported files


def save_answer(
    image: Path, queries: Sequence[Query], replies: Sequence[Reply], folder: Path, forms: Sequence[str] = ()
) -> dict[str, Any]:
    """Writes masks, overlay, JSON and exports under names that are still free; returns the content of the JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = free_name(folder, image.stem)
    exported = export_answers(folder / stem, queries, replies, forms, image_id(image, 0))
    pixels = read_image(image)
    report: dict[str, Any] = {"image": str(image), "answers": [], "masks": [], "absent": []}
    layers = []
    for query, reply in zip(queries, replies, strict=True):
        report["answers"].append({"question": query.question, "text": reply.text, "finished": reply.finished})
        for name, claim in zip(claim_names(query, reply), reply.claims, strict=True):
            if claim.mask is None:
                if name:  # a refusal without a name is already in the text
                    report["absent"].append(name)
                continue
            mask = (reply.masks[claim.mask] > 0).cpu().numpy()
            file = folder / f"{stem}_mask_{len(layers)}.png"
            Image.fromarray(mask.astype(np.uint8) * 255).save(file)
            colour = colour_of(len(layers))
            size = {"area": int(mask.sum()), "share": float(mask.mean())}
            confidence = None if reply.scores is None else float(reply.scores[claim.mask])
            entry = {
                "name": name,
                "instead": claim.is_substitute,
                "score": mask_score(reply.masks[claim.mask], confidence),
                "colour": "#" + bytes(colour).hex(),
                "file": str(file),
            }
            report["masks"].append({**entry, **size})
            layers.append(Layer(mask, name, colour))
    report["overlay"] = str(folder / f"{stem}_overlay.png")
    Image.fromarray(with_legend(pixels, layers)).save(report["overlay"])
    if exported:
        report["exports"] = [str(path) for path in exported]
    _write_json(folder / f"{stem}.json", report)
    return report


def claim_names(query: Query, reply: Reply) -> list[str]:
    """What each claim of an answer is called: the phrase of a question about one thing, where it answers that
    (`about_one`); else its own name, spelled as in the question, or that of the phrase to which it belongs. "" where
    there is neither."""
    if len(query.phrases) == 1:
        answers = set(map(id, about_one(without_substitutes(reply.claims), query.phrases[0])))
        return [query.phrases[0] if id(claim) in answers else claim.phrase for claim in reply.claims]
    assigned = zip(query.phrases, assign_claims(reply.claims, query.phrases), strict=True)
    phrases = {id(claim): phrase for phrase, claim in assigned if claim is not None}
    names = Names(query.phrases)
    places = [names.exact(claim.phrase) for claim in reply.claims]
    return [
        claim.phrase or phrases.get(id(claim), "") if place is None else query.phrases[place]
        for place, claim in zip(places, reply.claims, strict=True)
    ]


def unmentioned(query: Query, reply: Reply) -> list[str]:
    """The phrases of a question of which the answer says nothing."""
    names = Names(query.phrases)
    mentioned = {names.exact(name) for name in claim_names(query, reply)}
    return [phrase for place, phrase in enumerate(query.phrases) if place not in mentioned]


def export_answers(
    stem: Path, queries: Sequence[Query], replies: Sequence[Reply], forms: Sequence[str], number: int = 0
) -> list[Path]:
    """Writes the answers in these forms to files that begin with `stem`; returns the files. number: of the image.

    Semantic and panoptic images are of class lists: the classes are numbered as they were asked.
    """
    written = []
    names = list(dict.fromkeys(name for query in queries for name in query.phrases))
    if COCO in forms:
        segments = [
            replace(segment, phrase=name)
            for query, reply in zip(queries, replies, strict=True)
            for name, segment in zip(claim_names(query, reply), segments_of(reply), strict=True)
        ]
        written.append(stem.with_name(f"{stem.name}{ENDINGS[COCO]}"))
        write_atomically(
            written[-1], json.dumps(coco_results(segments, number, names)) + "\n", errors="backslashreplace"
        )
    if not names or not set(forms) - {COCO}:
        return written
    masks, _ = read_masks(replies, queries, Names(names), fuzzy=False)
    class_map = standard_map(masks, replies[0].size, none=len(names), device=replies[0].masks.device).cpu().numpy()
    class_map[class_map == len(names)] = -1
    categories = [{"id": place, "name": name} for place, name in enumerate(names)]
    if SEMANTIC in forms:
        written.append(stem.with_name(f"{stem.name}{ENDINGS[SEMANTIC]}"))
        save_png(semantic_image(class_map, len(names)), written[-1])
    if PANOPTIC in forms:
        written.append(stem.with_name(f"{stem.name}{ENDINGS[PANOPTIC]}"))
        shown, info = panoptic_image(class_map)
        save_png(shown, written[-1])
        content = {"file_name": written[-1].name, "segments_info": info, "categories": categories}
        written.append(written[-1].with_suffix(".json"))
        write_atomically(written[-1], json.dumps(content) + "\n")
    return written


def save_conversation(image: Path, reports: Sequence[dict[str, Any]], folder: Path) -> Path:
    """Writes `conversation.json`, whose rounds are reports of `save_answer`, with copies of their files into a new
    folder; returns it."""
    place = folder / free_name(folder, f"{image.stem}_conversation")
    place.mkdir(parents=True)

    def copied(file: str) -> str:
        return Path(shutil.copy2(file, place)).name

    rounds = []
    for report in reports:
        masks = [{**mask, "file": copied(mask["file"])} for mask in report["masks"]]
        files = {"masks": masks, "overlay": copied(report["overlay"])}
        if "exports" in report:
            files["exports"] = [copied(file) for file in report["exports"]]
        rounds.append({**report, **files})
    _write_json(place / "conversation.json", {"image": str(image), "rounds": rounds})
    return place


def _write_json(file: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    # A tokenizer can produce half a surrogate pair, which is no UTF-8; a backslash escape is what JSON has for it.
    file.write_text(text, encoding="utf-8", errors="backslashreplace")


def free_name(folder: Path, stem: str) -> str:
    """`dog`, or `dog_2`, `dog_3` where the folder holds earlier answers about that image, or files of that name."""
    names = chain([stem], (f"{stem}_{number}" for number in count(2)))
    endings = ("", ".json", "_mask_0.png", "_overlay.png", *ENDINGS.values(), "_panoptic.json")
    return next(name for name in names if not any((folder / f"{name}{ending}").exists() for ending in endings))
