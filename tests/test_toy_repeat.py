"""The stage that teaches the toy base to repeat: its turns, its rows, and the folder that it writes."""

import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

from toy.base.pictures import held_out_batches
from toy.base.publish import LLAVA_FOLDER, save_llava
from toy.base.repeat import RepeatStage, image_row, objective, repeat, text_batch, train_repeat
from toy.base.rows import IGNORED, RowWriter
from toy.base.trainer import StagePlan
from toy.base.vocabulary import IMAGE_PATCH
from toy.world.scene import CLASSES

BASE = Path("assets/toy")


def named(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text) if word in CLASSES]


def test_an_answer_repeats_the_phrases_of_its_question_in_their_order():
    turns = [repeat(None, np.random.default_rng(seed)) for seed in range(50)]
    assert all(named(question) == named(answer) != [] for question, answer in turns)
    assert len({len(named(question)) for question, _ in turns}) > 5


def test_rows_of_text_have_no_image_and_supervise_the_answers():
    writer = RowWriter(BASE / LLAVA_FOLDER)
    batch = text_batch(writer, np.random.default_rng(0))
    assert writer.images[IMAGE_PATCH] not in batch["ids"]
    supervised = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][supervised], batch["ids"][supervised])
    assert 0.3 < supervised.float().mean() < 0.7
    assert (batch["group"][supervised] > 0).all()


def test_only_the_language_model_is_taught(tmp_path):
    folder = tmp_path / LLAVA_FOLDER
    shutil.copytree(BASE / LLAVA_FOLDER, folder)
    before = weights(folder)
    plan = StagePlan("repeat", 2, 5e-4, tmp_path)
    figures = train_repeat(plan, 0, folder, publish=lambda trained: save_llava(trained.llava, tmp_path))
    assert figures.keys() == {"repeat", "others"}
    after = weights(folder)
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed and not any("vision_tower" in name or "projector" in name for name in changed)


def test_the_shipped_base_can_repeat():
    """After an image, on scenes that no stage trained on."""
    writer = RowWriter(BASE / LLAVA_FOLDER)
    (batch,) = held_out_batches(partial(image_row, writer, {repeat: 1.0}), batches=1, size=4, seed=77)
    with torch.no_grad():
        figures = objective(RepeatStage(BASE / LLAVA_FOLDER, writer.images[IMAGE_PATCH]), batch)[1]
    assert figures["token_accuracy"] > 0.8


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).state_dict()
