"""The unified model's words: every kind of record, verdicts before words, tested as trained, read as meant."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.types import Claim, Mask, Query, Record, Refuse, Target, Turn
from evaluation.metrics.matching import Names, assign, assign_claims, read_list
from systems.base import build_system
from systems.unified import LISTS, TOKENS
from systems.wording import load_wording

RED = Target("red car", lambda: np.ones((2, 2), bool))
SKY = Target("sky", lambda: np.ones((2, 2), bool))
GONE = Target("blue dog", None)
WRONG = Target("blue car", None, correction="red car")
QUESTION = (Turn("What objects are here?", (Mask(0), Mask(1))),)
WORDED = (Turn("What moves?", ("the red car ", Mask(0), " under the sky ", Mask(1), ". It has wheels.")),)
TALK = (Turn("<image>\nHi?", ("Hello.",)),)
WHY = (Turn("What drives?", ("It has wheels.",)),)


def record(kind: str, *targets: Target, **fields) -> Record:
    return Record(Path("photo.jpg"), kind, targets, **fields)


RECORDS = {
    "classes": record("classes", RED, SKY, vocabulary=("tree", "sky", "sea", "red car", "road")),
    "refer": record("refer", RED, GONE, SKY, WRONG),
    "reason": record("reason", Target("What drives?", RED.mask), Target("What flies?", None, "Nothing flies here.")),
    "explained": record("reason", Target("What drives?", RED.mask), dialogues=(WHY,)),
    "phrase": record("phrase", Target("the thing with wheels", RED.mask), Target("the thing with wings", None, "No.")),
    "multi": record("multi", RED, SKY, dialogues=(QUESTION, WORDED)),
    "vqa": record("vqa", dialogues=(TALK,)),
}
SYSTEM = build_system("unified")


def converse(name: str, seed: int = 0, **options):
    return build_system("unified", options).task.converse(RECORDS[name], np.random.default_rng(seed))


def spoken(turn: Turn) -> str:
    """The answer as the model would write it."""
    names: dict[type, str] = {Mask: TOKENS.mask[0], Refuse: str(TOKENS.refuse)}
    return "".join(part if isinstance(part, str) else names[type(part)] for part in turn.answer)


def holes(turn: Turn) -> list[Mask | Refuse]:
    return [part for part in turn.answer if not isinstance(part, str)]


def query(name: str, index: int = 0) -> Query:
    return SYSTEM.task.queries(RECORDS[name])[index]


@given(name=st.sampled_from(sorted(RECORDS)), seed=st.integers(0, 999))
def test_masks_are_of_what_is_there_and_refusals_of_what_is_not(name, seed):
    one = RECORDS[name]
    dialogues = SYSTEM.task.converse(one, np.random.default_rng(seed))
    assert dialogues == SYSTEM.task.converse(one, np.random.default_rng(seed)), "pure"
    assert dialogues
    for (turn,) in dialogues:
        assert turn.question.startswith("<image>\n")
        for hole in holes(turn):
            there = hole.target >= 0 and one.targets[hole.target].mask is not None
            assert there == isinstance(hole, Mask)


@given(name=st.sampled_from(["classes", "refer", "reason", "phrase", "multi"]), seed=st.integers(0, 999))
def test_every_answer_is_read_as_it_was_meant(name, seed):
    """One claim per hole, in order, masks counted; after an opening refusal comes what is there instead."""
    for (turn,) in SYSTEM.task.converse(RECORDS[name], np.random.default_rng(seed)):
        claims, slots = SYSTEM.read(spoken(turn)), holes(turn)
        assert [claim.mask is None for claim in claims] == [isinstance(slot, Refuse) for slot in slots]
        assert [claim.mask for claim in claims if claim.mask is not None] == list(
            range(sum(c.mask is not None for c in claims))
        )
        opened = isinstance(turn.answer[0], Refuse)
        assert [claim.is_substitute for claim in claims] == [opened and index > 0 for index in range(len(claims))]
        assert all(claim.phrase in ("red car", "sky") for claim in claims if claim.is_substitute)


def test_what_is_asked_about_one_thing_is_answered_verdict_first():
    """No word before the token gives the verdict away, whatever the template."""
    seen = set()
    for name in ("refer", "classes", "reason", "phrase"):
        for seed in range(40):
            for (turn,) in converse(name, seed, listed_classes=0, listed_phrases=0):
                assert isinstance(turn.answer[0], (Mask, Refuse))
                seen.add((name, type(turn.answer[0])))
    assert len(seen) == 8, "every kind has true and false premises"


def test_a_correction_segments_what_was_meant():
    texts = set()
    for seed in range(30):
        for (turn,) in converse("refer", seed, listed_phrases=0):
            if "blue car" in turn.question:
                assert holes(turn) == [Refuse(3), Mask(0)]
                texts.add(spoken(turn))
    assert texts == {"[REJ]. There is no blue car here, but there is red car: [SEG]."}
    refused, offered = SYSTEM.read(texts.pop())
    assert refused == Claim("", None) and offered == Claim("red car", 0, is_substitute=True)
    assert assign_claims([refused, offered], ["blue car"]) == [refused], (
        "what is offered is no answer to what was asked"
    )
    assert read_list([refused, offered], ["sea"], Names(["sea", "red car"])).masks == ()


def test_a_nameless_refusal_before_several_answers_is_no_correction():
    phrases = ["unicorn", "cat", "dog"]
    claims = SYSTEM.read("[REJ], cat: [SEG], dog: [SEG].")
    assert assign(claims, phrases) == [None, 0, 1] and not any(claim.is_substitute for claim in claims)


@pytest.mark.parametrize("number", [2, 5])
def test_phrases_in_one_question_are_answered_by_name_in_order(number):
    for seed in range(20):
        ((turn,),) = converse("refer", seed, listed_phrases=1, num_classes_per_question=number)
        claims = SYSTEM.read(spoken(turn))
        assert len(claims) == min(number, 4)
        names = [claim.phrase for claim in claims]
        assert sorted(names, key=turn.question.index) == names
        assert [claim.mask is None for claim in claims] == [name.startswith("blue") for name in names]


def test_a_class_list_is_answered_whole_in_its_order():
    for seed in range(20):
        ((turn,),) = converse("classes", seed, listed_classes=1)
        match = re.search(r"<cat_start> (.*) <cat_end>$", turn.question)
        assert match, turn.question
        names = match[1].split(", ")
        claims = SYSTEM.read(spoken(turn))
        assert [claim.phrase for claim in claims] == names and len(names) == 5
        assert {claim.phrase for claim in claims if claim.mask is not None} == {"red car", "sky"}


def test_options_share_pictures_out():
    def listed(name: str, mark: str, **options) -> float:
        task, rng = build_system("unified", options).task, np.random.default_rng(0)
        return np.mean([mark in task.converse(RECORDS[name], rng)[0][0].question for _ in range(600)])

    assert listed("classes", "<semantic>", listed_classes=0.7) == pytest.approx(0.7, abs=0.06)
    wide = {"num_classes_per_sample": 1, "num_classes_per_question": 4}
    assert listed("refer", "red car, blue dog, sky", listed_phrases=0.3, **wide) == pytest.approx(0.3, abs=0.06)
    assert listed("reason", "What flies?", false_reason=0.4) == pytest.approx(0.4, abs=0.06)


def test_explanations_are_asked_for_and_given():
    answers = {spoken(converse("explained", seed)[0][0]) for seed in range(80)}
    assert answers == {"[SEG].", "[SEG]. It has wheels.", "It has wheels."}
    assert {spoken(converse("explained", seed, explanatory=-1)[0][0]) for seed in range(40)} == {"[SEG]."}


def test_several_objects_keep_the_words_of_the_dataset_or_are_named():
    (named,), (worded,) = converse("multi")
    assert spoken(named) == "red car [SEG] and sky [SEG]."
    assert worded.answer == WORDED[0].answer
    assert [claim.phrase for claim in SYSTEM.read(spoken(named))] == ["red car", "sky"]
    assert len(converse("multi", questions_per_picture=1)) == 1


def test_evaluation_asks_in_trained_words():
    """Blanks after the image's line carry no meaning: tokens next to them strip them."""
    lists = load_wording("unified", LISTS).lists
    assert query("classes").question.removeprefix("<image>\n").lstrip() in {
        text.format(list="tree, sky, sea, red car, road") for text in lists["classes"]
    }
    for name, key, text in (("refer", "phrase", "red car"), ("reason", "sentence", "What drives?")):
        trained = {template.format(**{key: text}) for template in lists[key]}
        assert query(name).question.removeprefix("<image>\n").lstrip() in trained
    assert query("multi").question == "<image>\n" + lists["several"][-1].format(sentence="What objects are here?")
    together = build_system("unified", {"phrases_per_query": 0}).task.queries(RECORDS["refer"])[0]
    names = "red car, blue dog, sky, blue car"
    assert together.question.removeprefix("<image>\n").lstrip() == lists["list"][-1].format(list=names)


def test_forced_answers_do_not_give_a_verdict_away():
    there, gone, *_ = SYSTEM.task.queries(RECORDS["refer"])
    assert there.reference_answer[0] == Mask(0) and gone.reference_answer[0] == Refuse(1)
    assert query("classes").reference_answer == (
        "tree", Refuse(-1), "sky", Mask(1), "sea", Refuse(-1), "red car", Mask(0), "road", Refuse(-1)
    )  # fmt: skip
    (together,) = build_system("unified", {"phrases_per_query": 0}).task.queries(RECORDS["refer"])
    assert [part for part in together.reference_answer if isinstance(part, str)] == [
        "Sure, red car:", ", blue dog:", ", sky:", ", blue car:", "."
    ]  # fmt: skip


@pytest.mark.parametrize("name", sorted(RECORDS.keys() - {"vqa"}))
@pytest.mark.parametrize("together", [0, 1])
def test_the_true_answer_scores_as_true(name, together):
    """Every target of a query gets its claim back from the forced answer: its mask, or its refusal."""
    one = RECORDS[name]
    for asked in build_system("unified", {"phrases_per_query": together}).task.queries(one):
        claims = SYSTEM.read(spoken(Turn("", asked.reference_answer)))
        if name == "classes":
            reading = read_list(claims, asked.phrases, Names(one.vocabulary))
            assert {index for index, _ in reading.masks} == {1, 3} and not reading.unmatched
            continue
        for target, claim in zip(asked.targets, assign_claims(claims, asked.phrases), strict=True):
            assert claim is not None and (claim.mask is None) == (one.targets[target].mask is None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"listed_classes": 1.5}, "options.listed_classes is a share of 1, got 1.5"),
        ({"listed_phrases": -1}, "options.listed_phrases is a share of 1"),
        ({"phrases_per_query": -1}, "phrases_per_query must be 0"),
        ({"false_denial": 0.9, "false_correction": 0.2}, "shares of 1"),
        ({"num_classes_per_question": 0}, "num_classes_per_question must be 1 or more"),
        ({"tokens": "paper"}, "no field in options 'tokens'"),
        ({"random_list": "some"}, "random_list"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_system("unified", options)


def test_the_wording_gives_no_verdict_before_its_token():
    lists = load_wording("unified", LISTS).lists
    assert lists.keys() == LISTS.keys() and all(len(set(items)) == len(items) for items in lists.values())
    assert all(text.startswith("{mask}") for key in ("answer", "confirm") for text in lists[key])
    assert all(
        text.startswith("{refuse}") for key in ("deny", "correct", "correct_and_mask", "told") for text in lists[key]
    )
