"""The stage of toy/base/repeat.py: turns that repeat, the language model alone, its probe."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from toy.base.blank_parts import FILES
from toy.base.dense import COLOR_NAMES
from toy.base.facts import Facts
from toy.base.llava import run_language_model
from toy.base.pictures import Sample, held_out_batches, normalise_tower, prefetch, tower_view
from toy.base.publish import LLAVA_FOLDER, save_llava
from toy.base.rows import IGNORED, RowWriter
from toy.base.tower import patch_features
from toy.base.trainer import StagePlan, train_stage
from toy.base.turns import MENU, Turn, sample_classes
from toy.base.vocabulary import IMAGE_PATCH
from toy.world.scene import CLASSES, Scene

BATCH, RATE = 8, 5e-4
MOST = 6  # phrases of a question
_QUESTIONS = ("say again: {}.", "mark {} here.", "what are {} in this image?", "i look for {}.", "find {}, please.",
              "is there {} in this image?", "which of {} do you see?", "{}")  # fmt: skip
_FRAMES = ("{}", "{}:", "here is {}", "{} it is", "for {} yes", "the place of {} is", "no {} here", "one {} is this")
_RELATIONS = ("left of", "right of", "above", "below")


def repeat(facts: Facts, rng: np.random.Generator) -> Turn:
    """Phrases, in the order of the question, in one frame of the answer. What is in the image does not matter."""
    if rng.random() < 0.3:
        phrases = sample_classes(facts, rng)[: 2 * MOST]
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


class RepeatRows:
    """Makes the samples: called with (scene, step, rng). share: of the turns that repeat."""

    def __init__(self, folder: Path, share: float):
        others = sum(MENU.values())
        self.writer = RowWriter(folder)
        self.menu = {repeat: 1.0} if share == 1 else {**MENU, repeat: others * share / (1 - share)}

    def __call__(self, scene: Scene, step: int, rng: np.random.Generator) -> Sample:
        return {"pixels": tower_view(scene.image), **self.writer.write(scene, rng, self.menu)}


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
        with torch.no_grad():
            patches = patch_features(model.vision_tower, normalise_tower(batch["pixels"]))
            projected = model.multi_modal_projector(patches)
        states = model.language_model.embed_tokens(ids)
        states = states.masked_scatter((ids == self.image_token)[..., None], projected.flatten(0, 1).to(states.dtype))
        states = run_language_model(model.language_model, states, batch["group"], batch["place"])
        labels = batch["labels"][:, 1:]  # the state at t predicts the token at t + 1
        supervised = labels != IGNORED
        return self.llava.lm_head(states[:, :-1][supervised]).float(), labels[supervised]


def objective(model: RepeatStage, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    logits, labels = model(batch)
    correct = (logits.detach().argmax(-1) == labels).float().mean()
    return F.cross_entropy(logits, labels), {"token_accuracy": correct}


def teach(out: Path, base: Path, seconds: float, seed: int, *, resume: bool = False) -> dict[str, float]:
    """Writes out/llava; returns the held-out token accuracies of turns that repeat and of the others."""
    folder = base / LLAVA_FOLDER
    tests = {
        name: held_out_batches(RepeatRows(folder, share), batches=2, size=BATCH, seed=seed, first=800 + 100 * index)
        for index, (name, share) in enumerate({"repeat": 1.0, "others": 0.0}.items())
    }
    (out / LLAVA_FOLDER).mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copy(folder / name, out / LLAVA_FOLDER / name)
    rows = RepeatRows(folder, 0.5)

    def probe(model: RepeatStage) -> dict[str, float]:
        return {
            name: torch.stack([objective(model, batch)[1]["token_accuracy"] for batch in batches]).mean().item()
            for name, batches in tests.items()
        }

    return train_stage(
        StagePlan("repeat", seconds, RATE, out / "repeat", resume),
        RepeatStage(folder, rows.writer.images[IMAGE_PATCH]),
        lambda step: prefetch(rows, "repeat", first=step, size=BATCH, seed=seed),
        objective,
        probe,
        publish=lambda trained: save_llava(trained.llava, out),
    )
