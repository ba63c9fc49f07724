"""Short answers: what is taken off before they are compared, how they are counted, and what their file must hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from data.sources import build_source
from data.types import Query, Record, Turn
from evaluation.metrics.exact import ExactScorer, plain
from evaluation.protocols import FORCED, GENERATED, Reply
from evaluation.suites import find_suites

RECORD = Record(
    Path("x.jpg"),
    "vqa",
    dialogues=((Turn("<image>\nHow many?", ("two",)),), (Turn("<image>\nIs it?", ("yes",)),)),
    accepted=(("two", "a couple"), ("yes",)),
)


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ("The Dog.", "dog"),
        ("Two", "2"),
        ("1,000", "1000"),
        ("2.5 m", "2.5 m"),
        ("It's a cat!", "its cat"),
        ("red/blue", "red blue"),
        ("  an   apple ", "apple"),
        ("none", "0"),
        ("U.S.A.", "usa"),
        ("", ""),
    ],
)
def test_case_articles_punctuation_and_number_words_do_not_count(said, means):
    assert plain(said) == plain(means) == means


def score(*texts: str, protocol: str = GENERATED, masks: int = 0) -> ExactScorer:
    scorer = ExactScorer()
    replies = [Reply(text, (), torch.zeros(masks, 2, 2)) for text in texts]
    scorer.add(scorer.count(RECORD, [Query("", ())] * len(texts), replies, protocol))
    return scorer


def test_any_accepted_answer_is_right_and_nothing_else():
    values = {text: score(text, "no").figures()[0].value for text in ("2", "A couple.", "two dogs", "three")}
    assert values == {"2": 0.5, "A couple.": 0.5, "two dogs": 0, "three": 0}
    drawn = score("two [SEG]", "yes", masks=1)
    assert drawn.figures()[0].value == 1 and drawn.details() == {"answers_with_masks": 2}
    assert score("two", "yes", protocol=FORCED).figures()[0].value is None
    with pytest.raises(ValueError, match=r"x\.jpg: no accepted short answers"):
        score("two")


def test_the_file_gives_one_record_per_image_with_all_accepted_answers(tmp_path):
    (tmp_path / "vqa").mkdir()
    Image.new("RGB", (8, 6)).save(tmp_path / "vqa" / "a.png")
    entries = [
        {"image": "a.png", "question": "How many?", "answers": ["two", 2, "two"]},
        {"image": "a.png", "question": "Is it?", "answer": "yes", "id": 7},
    ]
    file = tmp_path / "vqa" / "val.json"
    file.write_text(json.dumps(entries))
    record = find_suites(["vqa"])[0].open(tmp_path)[0]
    assert record.accepted == (("two", "2"), ("yes",)) and not record.targets
    assert record.dialogues[0][0].question == "<image>\nHow many?\nAnswer the question using a single word or phrase."
    assert build_source("vqa", tmp_path, hint="")[0].dialogues[1] == (Turn("<image>\nIs it?", ("yes",)),)
    for entry, message in (
        ({"image": "a.png", "question": "How?"}, "entry 0: give answer or answers"),
        ({"image": "a.png", "question": "How?", "answers": []}, "entry 0: answers must be a list of one or more"),
        ({"image": "a.png", "question": " ", "answer": "x"}, "entry 0: question must be text"),
        ({"image": "a.png", "question": "How?", "answer": "x", "text": 1}, "entry 0: unknown text; an entry has image"),
        ({"image": "b.png", "question": "How?", "answer": "x"}, r"names the image 'b\.png'"),
    ):
        file.write_text(json.dumps([entry]))
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            build_source("vqa|val", tmp_path)[0]
