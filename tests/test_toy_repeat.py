"""The stage that teaches the toy base to repeat: its turns, its rows, and the folder that it writes."""

import re
from pathlib import Path

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

from toy.base.repeat_stage import repeat, teach, text_batch
from toy.base.rows import IGNORED, RowWriter
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
    writer = RowWriter(BASE / "llava")
    batch = text_batch(writer, np.random.default_rng(0))
    assert writer.images[IMAGE_PATCH] not in batch["ids"]
    supervised = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][supervised], batch["ids"][supervised])
    assert 0.3 < supervised.float().mean() < 0.7
    assert (batch["group"][supervised] > 0).all()


def test_only_the_language_model_is_taught(tmp_path):
    figures = teach(tmp_path, BASE, 2, seed=0)
    assert figures.keys() == {"repeat", "others"}
    before, after = (
        LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (BASE / "llava", tmp_path / "llava")
    )
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed and not any("vision_tower" in name or "projector" in name for name in changed)
    assert (tmp_path / "llava" / "tokenizer.model").is_file()
