"""GSVA's words: phrases in lists, rejections, the published prompts to the letter, reading answers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from data.types import EmptyMask, Mask, Record, Refuse, Target, Turn
from systems.base import build_system
from systems.gsva import LIST_PART, GsvaTask

NAMES = ("Red Car", "a dog.", " tall tree ", "no such thing", "nobody")


def mask() -> np.ndarray:
    return np.ones((2, 2), bool)


def nothing() -> np.ndarray:
    return np.zeros((2, 2), bool)


def record(kind: str = "refer", absent=(3, 4), names=NAMES, **fields) -> Record:
    targets = tuple(Target(name, None if index in absent else mask) for index, name in enumerate(names))
    return Record(Path("photo.jpg"), kind, targets, **fields)


def converse(record: Record, seed: int = 0, **options):
    return build_system("gsva", options).task.converse(record, np.random.default_rng(seed))


def holes(turn: Turn) -> list[Mask | Refuse]:
    return [part for part in turn.answer if not isinstance(part, str)]


@pytest.mark.parametrize("seed", range(12))
def test_one_answer_gives_each_asked_phrase_its_own_slot(seed):
    for dialogue in converse(record(), seed, num_classes_per_sample=4):
        (turn,) = dialogue
        slots = holes(turn)
        assert len(slots) == len({slot.target for slot in slots}) == 4
        words = [part for part in turn.answer if isinstance(part, str)]
        for before, slot in zip(words, slots, strict=False):
            name = NAMES[slot.target].strip().strip(".")
            assert name in before and name.lower() in turn.question, "the name stands before its slot, as it is written"
            assert isinstance(slot, Refuse) == (slot.target >= 3)
        assert turn.question.startswith("<image>\n") and words[-1].endswith(".")
        asked = [turn.question.index(NAMES[slot.target].strip(" .").lower()) for slot in slots]
        assert asked == sorted(asked), "answers keep the order of the question"


def test_an_expression_whose_mask_is_empty_is_no_absent_thing_unless_told_as_published():
    def broken() -> np.ndarray:
        raise EmptyMask("instances.json: annotation 7: no pixel")

    one = Record(Path("p.jpg"), "refer", (Target("a", mask), Target("b", nothing), Target("c", broken)))
    ((turn,),) = converse(one)
    assert holes(turn) == [Mask(0), Mask(1), Mask(2)]  # whoever draws the masks meets the fault
    ((turn,),) = converse(one, empty_mask="refuse")
    assert holes(turn) == [Mask(0), Refuse(1), Refuse(2)]


def test_all_absent_is_not_trained_on_unless_asked_for():
    hopeless = record(absent=range(5))
    assert converse(hopeless) == [] == converse(Record(Path("p.jpg"), "refer"))
    ((turn,),) = converse(hopeless, all_absent="train")
    assert len(holes(turn)) == 3 and all(isinstance(slot, Refuse) for slot in holes(turn))


def test_words_vary_and_the_same_generator_gives_the_same():
    seen = {
        converse(record(absent=()), seed, num_classes_per_sample=2)[0][0].answer[0].split()[0] for seed in range(60)
    }
    assert len(seen) == 5 and converse(record(), 3) == converse(record(), 3)


def test_classes_are_joined_without_a_blank_and_never_rejected():
    classes = record("classes", absent=(), names=("sky", "road"), vocabulary=("sky", "road", "sea"))
    for seed in range(6):
        ((turn,),) = converse(classes, seed)
        assert [type(slot) for slot in holes(turn)] == [Mask, Mask]
        assert re.match(r",\S", turn.answer[2])
    ((turn,),) = converse(record(absent=(), names=("sky", "road")))
    assert ", " in turn.answer[2]


def test_with_all_blanks_an_answer_names_a_class_as_the_question_does():
    """A vocabulary of whole words has the blank before them: without it "road" is another token than " road"."""
    names = ("sky", "road", "sea")
    classes = record("classes", absent=(), names=names, vocabulary=names)
    for seed in range(6):
        ((turn,),) = converse(classes, seed, blanks="all")
        answer = "".join(part for part in turn.answer if isinstance(part, str))
        assert all(f" {name}" in turn.question and f" {name}" in answer for name in names), (turn.question, answer)
    (query,) = build_system("gsva", {"blanks": "all"}).task.queries(classes)
    assert "sky, road, sea in this image" in query.question
    assert [part for part in query.reference_answer if isinstance(part, str)] == [
        "Sure, sky:",
        ", road:",
        ", sea:",
        ".",
    ]


@pytest.mark.parametrize("kind", ["reason", "phrase"])
def test_reasoning_is_asked_one_by_one(kind):
    dialogues = converse(record(kind, absent=(), names=("What swims?", "What flies?")))
    assert [len(holes(turn)) for (turn,) in dialogues] == [1, 1]
    assert all(("What" in turn.question) == (kind == "reason") for (turn,) in dialogues)


def test_the_published_prompt_to_the_letter():
    """gsva.md 3.2: blanks after the line, none before "in", none after "Sure,", the last one without a comma."""
    (query,) = build_system("gsva").task.queries(record(names=NAMES[:4]))
    assert query.question == (
        "<image>\n What are red car, a dog, tall tree, no such thingin this image? Please output segmentation masks."
    )
    text = "".join(
        part if isinstance(part, str) else f"<{type(part).__name__} {part.target}>" for part in query.reference_answer
    )
    assert text == "Sure,red car:<Mask 0>, a dog:<Mask 1>, tall tree:<Mask 2>, no such thing:<Refuse 3>."
    assert query.phrases == ("red car", "a dog", "tall tree", "no such thing") and query.targets == (0, 1, 2, 3)


def test_the_published_reasoning_prompts():
    task = build_system("gsva").task
    (query,) = task.queries(record("reason", names=("What swims?",)))
    assert query.question == "<image>\n What swims? Please output segmentation mask." and query.reference_answer == (
        Mask(0),
    )
    (query,) = task.queries(record("phrase", names=("The swimmer",)))
    assert query.question == "<image>\n What is The swimmer in this image? Please output segmentation mask."
    assert query.reference_answer == (Mask(0),)


def test_phrases_may_be_asked_in_pieces():
    queries = build_system("gsva", {"phrases_per_query": 2}).task.queries(record())
    assert [query.targets for query in queries] == [(0, 1), (2, 3), (4,)]
    assert queries[1].phrases == ("tall tree", "no such thing")
    assert [type(part) for part in queries[1].reference_answer] == [str, Mask, str, Refuse, str]


def test_a_label_set_is_asked_whole():
    classes = record("classes", absent=(), names=("sea",), vocabulary=("sky", "sea", "road"))
    (query,) = build_system("gsva").task.queries(classes)
    assert query.phrases == ("sky", "sea", "road") and query.targets == (0,)
    assert [part for part in query.reference_answer if not isinstance(part, str)] == [Refuse(-1), Mask(0), Refuse(-1)]


def test_reading_frees_names_of_the_words_around_them():
    system = build_system("gsva")
    words = cast(GsvaTask, system.task).lists.wording.lists
    styles = [*zip(words["start"], words["part"], strict=True), ("Sure,", LIST_PART)]
    for start, part in styles:
        slots = [("red car", "[SEG]"), ("blue dog, left", "[REJ]"), ("tree", "[SEG]")]
        said = ", ".join(part.format(phrase=name, mask=token) for name, token in slots)
        claims = system.read(f"{start} {said}.")
        assert [(claim.phrase, claim.mask) for claim in claims] == [
            ("red car", 0),
            ("blue dog, left", None),
            ("tree", 1),
        ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"empty_mask": "drop"}, "options.empty_mask: 'drop' is not a choice; have: error, refuse"),
        ({"all_absent": "maybe"}, "options.all_absent: 'maybe' is not a choice; have: skip, train"),
        ({"phrases_per_query": -1}, "phrases_per_query must be 0"),
        ({"num_classes_per_sample": 0}, "num_classes_per_sample must be 1 or more"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_system("gsva", options)


def test_starts_and_parts_belong_together(tmp_path):
    lines = (
        "list: ['{list}']\nstart: [a, b]\npart: ['{phrase}{mask}']\nphrase: ['{phrase}']\nsentence: ['{sentence}']\n"
    )
    (tmp_path / "w.yaml").write_text(lines + "explain: [why]\nanswer: ['{mask}']")
    with pytest.raises(ValueError, match="start and part belong together"):
        build_system("gsva", {"wording": str(tmp_path / "w.yaml")})
    (tmp_path / "w.yaml").write_text(lines.replace("[a, b]", "[a]").replace("{phrase}{mask}", "{mask}"))
    with pytest.raises(ValueError, match=r"expected the lists|must hold \{mask\} once and \{phrase\} once"):
        build_system("gsva", {"wording": str(tmp_path / "w.yaml")})
