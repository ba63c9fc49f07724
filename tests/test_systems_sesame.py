"""SESAME's words: true and false premises, published shares, evaluation prompts, the template of generated answers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from data.types import Claim, Dialogue, Mask, Record, Refuse, Target
from systems.base import build_system
from systems.sesame import LISTS

CLASSES = tuple(f"class {index}" for index in range(12))


def mask() -> np.ndarray:
    return np.ones((2, 2), bool)


def record(*targets: Target, kind: str = "refer", vocabulary=(), name: str = "photo.jpg") -> Record:
    return Record(Path(name), kind, targets, vocabulary)


TRUE, DENIED = Target("Red Car", mask), Target("Blue Dog", None)
CORRECTED = Target("blue car", None, correction="red car")


def converse(one: Record, seed: int = 0, **options) -> list[Dialogue]:
    options = {"num_classes_per_sample": 9, **options}
    return build_system("sesame", options).task.converse(one, np.random.default_rng(seed))


def answer(dialogue: Dialogue) -> tuple[str, list[Mask]]:
    (turn,) = dialogue
    assert not any(isinstance(part, Refuse) for part in turn.answer), "there is no token for absence"
    holes = [part for part in turn.answer if isinstance(part, Mask)]
    return "".join(part for part in turn.answer if isinstance(part, str)), holes


@pytest.mark.parametrize("seed", range(15))
def test_a_true_premise_is_confirmed_and_ends_in_its_mask(seed):
    (dialogue,) = converse(record(TRUE), seed)
    text, holes = answer(dialogue)
    assert holes == [Mask(0)] and dialogue[0].answer[-2:] == (Mask(0), ".")
    assert "red car" in dialogue[0].question and "Red" not in dialogue[0].question + text


@pytest.mark.parametrize("seed", range(15))
def test_a_false_premise_is_denied_or_corrected_in_words(seed):
    (denied,), (corrected,) = converse(record(DENIED), seed), converse(record(CORRECTED), seed)
    assert answer(denied)[1] == [] == answer(corrected)[1]
    assert "blue dog" in denied[0].question
    text, _ = answer(corrected)
    assert "blue car" in text and "red car" in text


def test_each_query_is_a_dialogue_of_its_own_with_its_own_words():
    many = record(*(Target(f"thing {index}", mask if index % 2 else None) for index in range(9)))
    dialogues = converse(many)
    assert len(dialogues) == 9 and len({d[0].question.replace(f"thing {i}", "") for i, d in enumerate(dialogues)}) > 4
    for index, dialogue in enumerate(dialogues):
        assert f"thing {index}" in dialogue[0].question and len(answer(dialogue)[1]) == index % 2
    assert len(converse(many, num_classes_per_sample=3)) == 3
    assert converse(many, 4) == converse(many, 4)


def test_a_correction_may_also_segment_what_was_meant():
    one = record(TRUE, CORRECTED)
    plain, segmented = converse(one)[1], converse(one, segment_correction=True)[1]
    assert answer(plain)[1] == [] and answer(segmented)[1] == [Mask(0)]
    alone = converse(record(CORRECTED), segment_correction=True)[0]
    assert answer(alone)[1] == [], "without a mask of what was meant, words alone"


def test_label_sets_have_the_published_shares_and_one_draw_a_picture():
    """sesame.md 3.2: 0.85 true, 0.07 denied, 0.08 corrected."""
    present = tuple(Target(name.title(), mask) for name in CLASSES[:3])
    one = record(*present, kind="classes", vocabulary=CLASSES)
    styles = {"true": 0, "denied": 0, "corrected": 0}
    task = build_system("sesame", {"num_classes_per_sample": 3}).task
    rng = np.random.default_rng(0)
    for _ in range(3000):
        kinds = set()
        for dialogue in task.converse(one, rng):
            text, holes = answer(dialogue)
            names = set(re.findall(r"class \d+", text))
            kinds.add("true" if holes else "corrected" if names & set(CLASSES[:3]) else "denied")
            if not holes:
                assert set(re.findall(r"class \d+", dialogue[0].question)) <= set(CLASSES[3:])
        (kind,) = kinds
        styles[kind] += 1
    assert styles["denied"] == pytest.approx(210, abs=50) and styles["corrected"] == pytest.approx(240, abs=50)
    everything = record(*(Target(name, mask) for name in CLASSES), kind="classes", vocabulary=CLASSES)
    assert all(
        answer(d)[1] for seed in range(30) for d in converse(everything, seed, false_denial=1.0, false_correction=0)
    )


def test_reasoning_answers_false_questions_with_the_stored_words():
    one = record(Target("What swims?", mask), Target("What flies?", None, "Nothing flies here."), kind="reason")
    false = 0
    rng, task = np.random.default_rng(0), build_system("sesame").task
    for _ in range(2000):
        (dialogue,) = task.converse(one, rng)
        text, holes = answer(dialogue)
        false += not holes
        assert (text == "Nothing flies here.") == (not holes) == ("What flies?" in dialogue[0].question)
    assert false == pytest.approx(300, abs=60)


def test_evaluation_questions_are_fixed_by_seed_picture_and_phrase():
    def questions(one: Record, **options) -> list[str]:
        return [query.question for query in build_system("sesame", options).task.queries(one)]

    one = record(*(Target(f"thing {index}", mask) for index in range(20)))
    assert questions(one) == questions(one) and len({q.replace(f"{i}", "") for i, q in enumerate(questions(one))}) > 5
    assert questions(one, eval_seed=1) != questions(one) != questions(record(*one.targets, name="other.jpg"))
    first = build_system("sesame").task.wording.lists["phrase"][0]
    assert questions(one, eval_prompt="first")[3] == "<image>\n" + first.format(phrase="thing 3")
    published = "<image>\n What is thing 3 in this image? Please output segmentation mask."
    assert questions(one, eval_prompt="lisa")[3] == published


def test_forced_answers_tell_the_truth():
    true, false = build_system("sesame").task.queries(record(TRUE, DENIED))
    assert true.forced == (Mask(0), ".") and true.targets == (0,)
    assert false.forced == ("There is no blue dog in this picture.",) and false.targets == (1,)
    queries = build_system("sesame").task.queries(record(TRUE, kind="classes", vocabulary=("sky", "red car")))
    assert [query.targets for query in queries] == [(), (0,)]


def test_reading_is_the_first_mask_or_a_refusal():
    assert build_system("sesame").read("Yes: [SEG]. And [SEG].</s>") == [Claim("", 0)]
    assert build_system("sesame", {"masks": "all"}).read("Yes: [SEG]. And [SEG].") == [Claim("", 0), Claim("", 1)]
    assert build_system("sesame").read("There is no dog.") == [Claim("", None)]


def test_generated_answers_have_a_template_of_their_own():
    assert build_system("sesame").prompt_template == "vicuna_v1"
    with pytest.raises(ValueError, match="no conversation template 'vicuna'"):
        build_system("sesame", {"prompt_template": "vicuna"})


@pytest.mark.parametrize(
    "options",
    [
        {"false_denial": 0.9, "false_correction": 0.2},
        {"false_reason": 2},
        {"num_classes_per_sample": 0},
        {"masks": "x"},
    ],
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match="options"):
        build_system("sesame", options)


def test_every_list_has_many_templates_and_confirmations_end_in_the_mask():
    lists = build_system("sesame").task.wording.lists
    assert lists.keys() == LISTS.keys() and all(len(set(items)) == len(items) for items in lists.values())
    assert len(lists["phrase"]) >= 15 and len(lists["deny"]) >= 10 and len(lists["correct"]) >= 10
    for name in ("confirm", "answer", "correct_and_mask"):
        assert all(template.endswith("{mask}.") for template in lists[name])
