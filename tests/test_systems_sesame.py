"""SESAME's words: true and false premises, published shares, evaluation prompts, the template of generated answers."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data.types import Claim, Dialogue, Mask, Record, Refuse, Target
from systems.base import build_system
from systems.sesame import LISTS
from systems.single import PHRASE_PROMPT, SENTENCE_PROMPT
from systems.wording import load_wording

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


def many(one: Record, times: int, **options) -> list[list[Dialogue]]:
    """The dialogues about an image, sampled `times` times."""
    task, rng = build_system("sesame", {"num_classes_per_sample": 9, **options}).task, np.random.default_rng(0)
    return [task.converse(one, rng) for _ in range(times)]


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


def test_the_mask_of_a_correction_is_not_that_of_what_was_asked():
    one = record(TRUE, CORRECTED)
    system = build_system("sesame", {"num_classes_per_sample": 9, "segment_correction": True})
    for seed in range(20):
        said = [
            "".join(part if isinstance(part, str) else "[SEG]" for part in turn.answer)
            for (turn,) in system.task.converse(one, np.random.default_rng(seed))
        ]
        assert system.read(said[0]) == [Claim("", 0)]
        assert system.read(said[1]) == [Claim("", None), Claim("red car", 0, is_substitute=True)], said[1]


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


def parts(**fields) -> Record:
    """Two wheels and two lids of PACO's kind: one target per annotation, and classes that the image lacks."""
    named = [("car wheel", "the wheel of the car"), ("trash_can lid", "the lid of the trash_can")]
    named += [("dog leg", "the leg of the dog"), ("cup handle", "the handle of the cup"), ("car", "")]
    vocabulary = tuple(name for name, _ in named)
    aliases = tuple((alias,) if alias else () for _, alias in named)
    targets = [Target(vocabulary[i], mask, aliases=aliases[i]) for i in (0, 0, 1, 1, 4)]
    return Record(Path("photo.jpg"), "classes", tuple(targets), vocabulary, vocabulary_aliases=aliases, **fields)


def test_every_annotation_of_a_name_is_asked_about():
    asked = Counter()
    for dialogues in many(parts(), 400, num_classes_per_sample=2, false_denial=0.0, false_correction=0.0):
        for (hole,) in (answer(dialogue)[1] for dialogue in dialogues):
            asked[hole.target] += 1
    assert set(asked) == set(range(5)) and min(asked.values()) > 110, "160 expected of each"


@pytest.mark.parametrize("false", ["false_denial", "false_correction"])
def test_parts_go_by_both_names_whether_they_are_there_or_not(false):
    """Published: a fair coin; whole objects have one name. Names of a data set that keeps underscores keep them."""
    plain = ("dog leg", "cup handle", "car wheel", "trash_can lid")
    long = tuple("the {1} of the {0}".format(*name.split()) for name in plain)
    for share in (0.0, 1.0):
        shares = {"false_denial": 0.0, "false_correction": 0.0, false: share}
        texts = [d[0].question for ds in many(parts(), 300, num_classes_per_sample=2, **shares) for d in ds]
        names = [sum(any(name in text for name in group) for text in texts) for group in (plain, long)]
        assert 0.42 < names[0] / sum(names) < 0.58 and sum(names) > 400
        assert all(any(name in text for name in plain[:2] + long[:2]) == bool(share) for text in texts)


@pytest.mark.parametrize("number", [1, 2, 3, 9])
def test_false_questions_are_as_many_as_the_true_ones_and_correct_to_each_once(number):
    """Published: absent class i goes with sampled annotation i, both without replacement."""
    present = tuple(Target(name, mask) for name in CLASSES[:2])
    one = record(*present, kind="classes", vocabulary=CLASSES)
    for dialogues in many(one, 40, num_classes_per_sample=number, false_denial=0.0, false_correction=1.0):
        questions = [re.findall(r"class \d+", dialogue[0].question) for dialogue in dialogues]
        instead = [set(re.findall(r"class \d+", answer(d)[0])) & set(CLASSES[:2]) for d in dialogues]
        assert len(dialogues) == min(number, 2)
        assert len({tuple(names) for names in questions}) == len({tuple(names) for names in instead}) == len(dialogues)
    most = record(*(Target(name, mask) for name in CLASSES[:11]), kind="classes", vocabulary=CLASSES)
    assert len(converse(most, num_classes_per_sample=3, false_denial=1.0, false_correction=0.0)) == 1, "all it lacks"


@pytest.mark.parametrize("kind", ["reason", "phrase"])
@pytest.mark.parametrize("flag", [True, False, None])
def test_a_false_question_follows_its_own_flag(kind, flag):
    """sesame.md 4.3: its own flag, not the image's; a true phrase is in lower case, a false one is not."""
    false = Target("What Flies Here", None, "Nothing flies.", sentence=flag)
    one = record(Target("What Swims", mask), false, kind=kind)
    lists = load_wording("sesame", LISTS).lists
    sentence = kind == "reason" if flag is None else flag
    name = "sentence" if sentence else "phrase"
    asked = {template.format(**{name: false.phrase}) for template in lists[name]}
    questions = {d[0].question.removeprefix("<image>\n") for (d,) in many(one, 60, false_reason=1.0)}
    assert questions <= asked and len(questions) > 4
    true, wrong = build_system("sesame").task.queries(one)
    assert wrong.question.removeprefix("<image>\n") in asked
    assert ("What Swims" in true.question) == (kind == "reason")
    for system in ("sesame", "lisa", "gsva"):
        options = {"eval_prompt": "lisa"} if system == "sesame" else {}
        wrong = build_system(system, options).task.queries(one)[1]
        assert wrong.question == "<image>\n" + (SENTENCE_PROMPT if sentence else PHRASE_PROMPT).format(false.phrase)
        assert true.targets == (0,) and wrong.targets == (1,)


def test_as_many_false_questions_as_there_are_true_ones():
    wrong = [Target(f"no {i}", None, "None.") for i in range(5)]
    one = record(Target("a", mask), Target("b", mask), *wrong, kind="reason")
    drawn = many(one, 60, false_reason=1.0)
    assert {len(dialogues) for dialogues in drawn} == {2}
    assert all(any(f"no {i}" in d[0].question for dialogues in drawn for d in dialogues) for i in range(5))
    assert len(converse(one, num_classes_per_sample=1, false_reason=1.0)) == 1
    assert len(converse(record(*wrong, kind="reason"), num_classes_per_sample=3)) == 3, "nothing true to count by"


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
    first = load_wording("sesame", LISTS).lists["phrase"][0]
    assert questions(one, eval_prompt="first")[3] == "<image>\n" + first.format(phrase="thing 3")
    published = "<image>\n What is thing 3 in this image? Please output segmentation mask."
    assert questions(one, eval_prompt="lisa")[3] == published


def test_forced_answers_tell_the_truth():
    true, false = build_system("sesame").task.queries(record(TRUE, DENIED))
    assert true.reference_answer == (Mask(0), ".") and true.targets == (0,)
    assert false.reference_answer == ("There is no blue dog in this picture.",) and false.targets == (1,)
    queries = build_system("sesame").task.queries(record(TRUE, kind="classes", vocabulary=("sky", "red car")))
    assert [query.targets for query in queries] == [(), (0,)]


def test_reading_is_the_first_mask_or_a_refusal():
    assert build_system("sesame").read("Yes: [SEG]. And [SEG].") == [Claim("", 0)]
    assert build_system("sesame", {"masks": "all"}).read("Yes: [SEG]. And [SEG].") == [Claim("", 0), Claim("", 1)]
    assert build_system("sesame").read("There is no dog.") == [Claim("", None)]


def test_generated_answers_have_a_template_of_their_own():
    assert build_system("sesame").released.prompt_template == "vicuna_v1"
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
    lists = load_wording("sesame", LISTS).lists
    assert lists.keys() == LISTS.keys() and all(len(set(items)) == len(items) for items in lists.values())
    assert len(lists["phrase"]) >= 15 and len(lists["deny"]) >= 10 and len(lists["correct"]) >= 10
    for name in ("confirm", "answer", "correct_and_mask"):
        assert all(template.endswith("{mask}.") for template in lists[name])
