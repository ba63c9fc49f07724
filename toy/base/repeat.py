"""Stage 3: the language model alone learns to repeat phrases of a question in its answer.

Every real LLaVA can do that; stage 2 teaches to name classes and places. GSVA and SESAME write a phrase before its
mask, and the mask follows what was repeated; a class list repeats its names. Vision tower and projector stay as they
are, and every other step has images and turns of stage 2, so that nothing is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from toy.base.dense import COLOR_NAMES
from toy.base.facts import Facts
from toy.base.llava import run_language_model
from toy.base.pictures import Sample, held_out_batches, normalise_tower, prefetch, stack_samples, tower_view
from toy.base.rows import BOS, IGNORED, RowWriter
from toy.base.tower import patch_features
from toy.base.trainer import StagePlan, train_stage
from toy.base.turns import MENU, Turn, TurnBuilder
from toy.base.vocabulary import IMAGE_PATCH, SYSTEM
from toy.world.scene import CLASSES, Scene

BATCH = 8
IMAGE_EVERY = 2  # steps from one with images to the next
MOST = 6  # phrases of a question
HELD_OUT = 800  # first of the batches that are only measured
_QUESTIONS = ("say again: {}.", "mark {} here.", "what are {} in this image?", "i look for {}.", "find {}, please.",
              "is there {} in this image?", "which of {} do you see?", "{}")  # fmt: skip
_FRAMES = ("{}", "{}:", "here is {}", "{} it is", "for {} yes", "the place of {} is", "no {} here", "one {} is this")
_RELATIONS = ("left of", "right of", "above", "below")


def repeat(_: Facts | None, rng: np.random.Generator) -> Turn:
    """Phrases, in the order of the question, in one frame of the answer; an image does not matter."""
    if rng.random() < 0.3:
        phrases = [CLASSES[i] for i in rng.permutation(len(CLASSES))[: rng.integers(1, 2 * MOST)]]
    else:
        phrases = [_phrase(rng) for _ in range(rng.integers(1, MOST + 1))]
    frame = _FRAMES[rng.integers(len(_FRAMES))]
    start = ("", "yes. ", "here they are: ")[rng.integers(3)]
    separator = (", ", " ", " and ")[rng.integers(3)]
    question = _QUESTIONS[rng.integers(len(_QUESTIONS))].format(", ".join(phrases))
    return question, start + separator.join(frame.format(phrase) for phrase in phrases)


def _phrase(rng: np.random.Generator) -> str:
    """ "small red car left of the tree", or less of it."""
    words = ["the"] if rng.random() < 0.3 else []
    words += [("small", "large")[rng.integers(2)]] if rng.random() < 0.4 else []
    words += [COLOR_NAMES[rng.integers(len(COLOR_NAMES))]] if rng.random() < 0.5 else []
    words.append(CLASSES[rng.integers(len(CLASSES))])
    if rng.random() < 0.3:
        words += [_RELATIONS[rng.integers(len(_RELATIONS))], "the", CLASSES[rng.integers(len(CLASSES))]]
    return " ".join(words)


# After an image, phrases must be found among 256 other positions, so rows with an image have turns that repeat, too.
# About half of their answers are those of stage 2, so that nothing is forgotten.
MIXED: dict[TurnBuilder, float] = {**MENU, repeat: 10.0}


def text_batch(writer: RowWriter, rng: np.random.Generator) -> dict[str, Tensor]:
    """Rows of turns that repeat, without an image: there is nothing to see in it."""
    opening = [BOS, *writer.encode(f"{SYSTEM} USER:")]
    return stack_samples([writer.fill(list(opening), (repeat(None, rng) for _ in count()), rng) for _ in range(BATCH)])


def image_row(
    writer: RowWriter, menu: dict[TurnBuilder, float], scene: Scene, step: int, rng: np.random.Generator
) -> Sample:
    """A row of stage 2 with turns of `menu`."""
    return {"pixels": tower_view(scene.image), **writer.write(scene, rng, menu)}


def batches(writer: RowWriter, first: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """From step `first` on; of IMAGE_EVERY steps, one has images."""
    begun = -(-first // IMAGE_EVERY)  # batches with images before `first`: a resumed run repeats none
    images = prefetch(partial(image_row, writer, MIXED), "repeat", first=begun, size=BATCH, seed=seed)
    for step in count(first):
        rng = np.random.default_rng((seed, step))
        yield next(images) if step % IMAGE_EVERY == 0 else text_batch(writer, rng)


class RepeatStage(nn.Module):
    """A LLaVA whose language model trains."""

    def __init__(self, folder: Path, image_token: int):
        super().__init__()
        self.llava = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        self.image_token = image_token
        for part in (self.llava.model.vision_tower, self.llava.model.multi_modal_projector):
            part.requires_grad_(False)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (N, V) and labels (N,) of the supervised positions."""
        model, ids = self.llava.model, batch["ids"]
        states = model.language_model.embed_tokens(ids)
        if "pixels" in batch:
            with torch.no_grad():
                patches = patch_features(model.vision_tower, normalise_tower(batch["pixels"]))
                projected = model.multi_modal_projector(patches).flatten(0, 1).to(states.dtype)
            states = states.masked_scatter((ids == self.image_token)[..., None], projected)
        states = run_language_model(model.language_model, states, batch["group"], batch["place"])
        labels = batch["labels"][:, 1:]  # the state at t predicts the token at t + 1
        supervised = labels != IGNORED
        return self.llava.lm_head(states[:, :-1][supervised]).float(), labels[supervised]


def objective(model: RepeatStage, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    logits, labels = model(batch)
    correct = (logits.detach().argmax(-1) == labels).float().mean()
    return F.cross_entropy(logits, labels), {"token_accuracy": correct}


def train_repeat(
    plan: StagePlan, seed: int, folder: Path, publish: Callable[[RepeatStage], object]
) -> dict[str, float]:
    """Trains the LLaVA of `folder` further; the held-out token accuracies of turns that repeat and of the others."""
    writer = RowWriter(folder)
    menus: dict[str, dict[TurnBuilder, float]] = {"repeat": {repeat: 1.0}, "others": MENU}
    tests = {
        name: held_out_batches(partial(image_row, writer, menu), batches=2, size=BATCH, seed=seed, first=HELD_OUT)
        for name, menu in menus.items()
    }

    def probe(model: RepeatStage) -> dict[str, float]:
        return {
            name: torch.stack([objective(model, batch)[1]["token_accuracy"] for batch in made]).mean().item()
            for name, made in tests.items()
        }

    stage = RepeatStage(folder, writer.images[IMAGE_PATCH])
    return train_stage(plan, stage, lambda step: batches(writer, step, seed), objective, probe, publish)
