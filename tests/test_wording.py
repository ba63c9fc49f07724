"""Words as published: what templates may hold, the shares of their kinds, and which words are lower-cased where."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from data.types import Mask, Record, Refuse, Target, Turn
from systems.base import SYSTEMS, build_system
from systems.gsva import answer_of
from systems.pixellm import one_by_one
from systems.single import FIELDS
from systems.wording import WORDING, Wording, load_wording, pattern_before_mask

THE = {  # share of phrase questions that say "the {phrase}": as published, where known, else from 0.50 to 0.78
    "lisa": 2 / 4,
    "gsva": 2 / 4,
    "lasagna": 28 / 36,
    "pixellm": 2 / 4,
    "sesame": 10 / 18,
    "unified": 4 / 7,
}
PHRASE = "Red Umbrella"


def mask() -> np.ndarray:
    return np.ones((2, 2), bool)


def record(kind: str, *phrases: str, absent: tuple[str, ...] = (), **fields) -> Record:
    targets = [Target(phrase, mask) for phrase in phrases] + [Target(phrase, None) for phrase in absent]
    return Record(Path("photo.jpg"), kind, tuple(targets), **fields)


def turns(system: str, record: Record, seeds: int = 2000, **options: Any) -> list[Turn]:
    task, rng = build_system(system, options).task, np.random.default_rng(1)
    return [turn for _ in range(seeds) for dialogue in task.converse(record, rng) for turn in dialogue]


def text(turn: Turn) -> str:
    return "".join(part if isinstance(part, str) else "*" if isinstance(part, Mask) else "-" for part in turn.answer)


def close_to(share: float, number: int):
    """Within four standard deviations of a share among `number` samples."""
    return pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / number))


def share(found: list[bool]) -> float:
    return sum(found) / len(found)


# --- shares


@pytest.mark.parametrize("system", sorted(THE))
def test_questions_say_the_phrase_as_often_as_published(system):
    options: dict[str, Any] = {"listed_phrases": 0.0} if system == "unified" else {}
    kind = "phrase" if system in ("gsva", "unified") else "refer"  # gsva lists expressions
    asked = [turn.question for turn in turns(system, record(kind, PHRASE), **options)]
    assert share([f"the {PHRASE.lower()}" in question for question in asked]) == close_to(THE[system], len(asked))


def test_questions_about_lists_say_the_as_well():
    for seed in range(3):
        asked = [
            turn.question for turn in turns("gsva", record("refer", *(f"Thing {i + seed}" for i in range(3))), 900)
        ]
        assert share(["the thing" in question for question in asked]) == close_to(2 / 4, len(asked))


@pytest.mark.parametrize(("lists", "base"), [("released", 4 / 32), ("once", 4 / 18)])
def test_pixellm_mixes_its_two_lists_of_questions_as_released(lists, base):
    """pixellm.md 3.2: 12.5 and 87.5 %, since the longer list joins once a data set object; sentences 2 and 5 of 7."""
    wording = yaml.safe_load((WORDING / "pixellm.yaml").read_text())
    options = {"use_expand_question_list": True, "expanded_lists": lists}
    short = {template.format(phrase=PHRASE.lower()) for template in wording["phrase"]}
    asked = [turn.question[8:] for turn in turns("pixellm", record("refer", PHRASE), **options)]
    assert share([question in short for question in asked]) == close_to(base, len(asked))
    shipped = record("multi", PHRASE, dialogues=((Turn("Where?", (Mask(0),)),),))
    long = {template.format(sentence="Where?") for template in wording["sentence"]}
    asked = [turn.question[8:] for turn in turns("pixellm", shipped, **options)]
    assert share([question in long for question in asked]) == close_to(2 / 7, len(asked))
    if lists == "released":
        named = share(
            [f"the {PHRASE.lower()}" in t.question for t in turns("pixellm", record("refer", PHRASE), **options)]
        )
        assert 0.50 < named < 0.78


@pytest.mark.parametrize(
    ("system", "kind", "bare"),
    [
        ("lisa", "refer", 1 / 5),
        ("gsva", "reason", 1 / 5),
        ("pixellm", "refer", 1 / 5),
        ("lasagna", "refer", 1 / 17),
        ("sesame", "reason", 1 / 35),
    ],
)
def test_bare_masks_are_answered_as_often_as_published(system, kind, bare):
    """lisa.md 3.4, lasagna.md 3.1, sesame.md 3.2."""
    answers = [text(turn) for turn in turns(system, record(kind, PHRASE), 3000)]
    assert share([answer == "*." for answer in answers]) == close_to(bare, len(answers))


def test_lasagnas_class_questions_speak_of_all_objects_half_of_the_time():
    """lasagna.md 3.1: nine instructions twice; the evaluation's own is one of the eighteen."""
    asked = turns("lasagna", record("classes", "sky", vocabulary=("sky", "sea")))
    words = [turn.question.partition("<semantic>")[2].partition("<cat_start>")[0] for turn in asked]
    assert len(set(words)) == 18
    assert share([bool(re.search(r"\ball\b.*\bobjects\b|objects .* in all", word)) for word in words]) == close_to(
        0.5, len(words)
    )
    assert share([word == "Segment this image." for word in words]) == close_to(1 / 18, len(words))


def test_sesame_names_the_thing_as_often_as_published():
    """sesame.md 3.2: 34 of 100 questions twice, 50 of 81 confirmations, 76 of 100 denials; all corrections twice."""
    both = record("refer", PHRASE, absent=("Green Cow",))
    said = turns("sesame", both, 3000)
    about = {name: [turn for turn in said if name in turn.question] for name in ("red umbrella", "green cow")}
    assert all(turn.question.count(name) in (1, 2) for name, found in about.items() for turn in found)
    twice = [turn.question.count(name) == 2 for name, found in about.items() for turn in found]
    confirmed = ["red umbrella" in text(turn) for turn in about["red umbrella"]]
    denied = ["green cow" in text(turn) for turn in about["green cow"]]
    assert share(twice) == pytest.approx(0.34, abs=0.05)
    assert share(confirmed) == pytest.approx(50 / 81, abs=0.05) and share(denied) == pytest.approx(0.76, abs=0.05)


# --- templates


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_no_template_is_given_twice(system):
    lists = yaml.safe_load((WORDING / f"{system}.yaml").read_text())
    assert all(len(set(templates)) == len(templates) for templates in lists.values())


def changed(tmp_path: Path, system: str, *, without: str = "", **lists) -> dict[str, str]:
    """The option for a wording with other lists than the system's own, and without one of these."""
    words = yaml.safe_load((WORDING / f"{system}.yaml").read_text())
    words.pop(without, None)
    (tmp_path / "words.yaml").write_text(yaml.safe_dump({**words, **lists}))
    return {"wording": str(tmp_path / "words.yaml")}


def written(tmp_path: Path, **lists) -> str:
    usual = {"phrase": ["{phrase}"], "sentence": ["{sentence}"], "explain": ["why"], "answer": ["{mask}"]}
    (tmp_path / "words.yaml").write_text(yaml.safe_dump({**usual, **lists}))
    return str(tmp_path / "words.yaml")


def test_words_may_be_filled_in_several_times(tmp_path):
    """As in a third of a published list."""
    twice = "Is the {phrase} here? Mark {phrase}, only {phrase}."
    path = written(tmp_path, phrase=[twice], sentence=["{sentence} Again: {sentence}"])
    assert load_wording(path, FIELDS).lists["phrase"] == (twice,)
    (turn,) = turns("lisa", record("refer", "cat"), 1, wording=path)
    assert turn.question == "<image>\nIs the cat here? Mark cat, only cat."
    (turn,) = turns("lisa", record("reason", "Who?"), 1, wording=path)
    assert turn.question == "<image>\nWho? Again: Who?"


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"answer": ["{mask} or {mask}"]}, "'{mask} or {mask}' must hold {mask} once"),
        ({"phrase": ["{phrase} {other}"]}, "must hold {phrase} once or more"),
        ({"phrase": ["{}"]}, "must hold {phrase}"),
        ({"phrase": ["{phrase"]}, "'{phrase' must hold {phrase}"),
        ({"phrase": [7]}, "phrase: a template is text in quotes; got 7"),
        ({"answer": [{"mask": None}]}, "answer: a template is text in quotes; got {'mask': None}"),  # - {mask}
        ({"phrase": "Mark {phrase}."}, "phrase must be a list, one template a line after `- `; got 'Mark {phrase}.'"),
        ({"phrase": 7}, "phrase must be a list"),
        ({"explain": ["{phrase}"]}, "must hold no field"),
    ],
)
def test_tokens_stand_once_and_broken_templates_are_named(tmp_path, lists, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_wording(written(tmp_path, **lists), FIELDS)
    assert "words.yaml" in str(caught.value)


def test_a_file_that_is_no_table_is_named(tmp_path):
    (tmp_path / "words.yaml").write_text("- a\n- b\n")
    with pytest.raises(ValueError, match=r"words.yaml: expected the lists .*; answer is missing"):
        load_wording(str(tmp_path / "words.yaml"), FIELDS)
    with pytest.raises(ValueError, match=r"words.yaml: expected the lists .*; explain is missing, explian is unknown$"):
        load_wording(changed(tmp_path, "lisa", without="explain", explian=["why"])["wording"], FIELDS)


@pytest.mark.parametrize("system", ["gsva", "unified"])
def test_every_start_of_an_answer_has_its_part(tmp_path, system):
    options = changed(tmp_path, system, start=["Sure,", "Well,"], part=["{phrase}: {mask}"])
    with pytest.raises(ValueError, match=r"words\.yaml: start and part belong together, .* not 2 and 1"):
        build_system(system, options)


@pytest.mark.parametrize("part", ["{phrase} is here, {mask}", "{phrase}  is; {mask}", "{phrase}: {mask} (found)"])
def test_names_are_read_whatever_marks_and_words_stand_around_a_mask(tmp_path, part):
    """Marks before a mask are stripped from the words, before they are compared with the template."""
    system = build_system("gsva", changed(tmp_path, "gsva", start=["Sure,"], part=[part]))
    script = answer_of("Sure, ", part, ", ", ["cat", "hereford cow"], [Mask(0), Refuse(1)])
    claims = system.read("".join(p if isinstance(p, str) else "[SEG]" if p == Mask(0) else "[REJ]" for p in script))
    assert [(claim.phrase, claim.mask) for claim in claims] == [("cat", 0), ("hereford cow", None)]
    each = f"{part.replace('(found)', 'I think')}."
    system = build_system("pixellm", changed(tmp_path, "pixellm", each_named=[each]))
    script = one_by_one(each, ["cat", "hereford cow"], [Mask(0), Mask(1)])
    claims = system.read("".join(p if isinstance(p, str) else "".join(system.tokens.mask) for p in script))
    assert [(claim.phrase, claim.mask) for claim in claims] == [("cat", 0), ("hereford cow", 1)]


def test_the_start_of_an_answer_is_no_name(tmp_path):
    options = changed(tmp_path, "gsva", start=["Well,  this is it:"], part=["{phrase} {mask}"])
    for system in (build_system("gsva"), build_system("gsva", options)):
        assert [claim.phrase for claim in system.read("Sure, [SEG], cat[REJ].")] == ["", "cat"]
    assert [claim.phrase for claim in system.read("Well,  this is it: [SEG], cat [REJ].")] == ["", "cat"]
    assert [claim.phrase for claim in system.read("Well, this is it: dog [SEG].")] == ["dog"]


@pytest.mark.parametrize(
    ("system", "key", "template", "message"),
    [
        ("gsva", "part", "{mask} is {phrase}", "part: '{mask} is {phrase}' names a mask after it; put {phrase} before"),
        ("pixellm", "each", "{mask} is {phrase}.", "put {phrase} before the mask"),
        ("pixellm", "together_named", "{masks} are {phrases}.", "put {phrases} before the mask"),
        ("unified", "each_named", "{mask} {phrase}", "put {phrase} before the mask"),
        ("unified", "correct_and_mask", "{refuse}. {mask} is {instead}, no {phrase}.", "put {instead} before the mask"),
        ("unified", "correct_and_mask", "No {phrase} {refuse}, but {instead}: {mask}.", "must begin with {refuse}"),
    ],
)
def test_templates_whose_masks_would_get_another_name_are_refused(tmp_path, system, key, template, message):
    """The words before a mask are read as its name, and after an opening refusal as what is there instead."""
    options = changed(tmp_path, system, **{key: [template], **({"start": ["Sure,"]} if key == "part" else {})})
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        build_system(system, options)
    assert "words.yaml" in str(caught.value)


def test_doubled_braces_are_one_brace_in_every_list(tmp_path):
    path = written(tmp_path, phrase=["{{a}} {phrase}"], explain=["{{b}}"], answer=["{{c}} {mask}."])
    (turn,) = turns("lisa", record("refer", "cat"), 1, wording=path)
    assert (turn.question, text(turn)) == ("<image>\n{a} cat", "{c} *.")
    assert load_wording(path, FIELDS).lists["explain"] == ("{b}",)


def test_answers_that_name_a_thing_twice_are_read_back(tmp_path):
    system = build_system("pixellm", changed(tmp_path, "pixellm", each=["{phrase}, yes, {phrase} is {mask}."]))
    group = "".join(system.tokens.mask)
    claims = system.read(f"red cat, yes, red cat is {group} and dog, yes, dog is {group}.")
    assert [(claim.phrase, claim.mask) for claim in claims] == [("red cat", 0), ("dog", 1)]
    assert re.fullmatch(pattern_before_mask("{phrase}, yes, {phrase} is {mask}"), "red cat, yes, a dog is") is None


def test_braces_in_a_phrase_are_words():
    script = answer_of("Sure, ", "{phrase}: {mask}", ", ", ["a {mask} {0}", "b"], [Mask(0), Refuse(1)])
    assert script == ("Sure, a {mask} {0}: ", Mask(0), ", b: ", Refuse(1), ".")


# --- capitals and outer blanks


@pytest.mark.parametrize("system", sorted(SYSTEMS))
@pytest.mark.parametrize("kind", ["refer", "phrase"])
def test_every_training_question_lower_cases_phrases(system, kind):
    for turn in turns(system, record(kind, f" {PHRASE} "), 60):
        assert PHRASE.lower() in turn.question and PHRASE not in turn.question


@pytest.mark.parametrize("system", ["gsva", "pixellm"])
def test_answers_keep_the_capitals_of_an_expression(system):
    """gsva.md 3.1, pixellm.md 3.3; joint answers of pixellm repeat the question's words."""
    names = (f" {PHRASE}. " if system == "gsva" else f" {PHRASE} ", "Blue TV")
    questions = {"num_classes_per_sample": 2 if system == "gsva" else 1}
    answers = [text(turn) for turn in turns(system, record("refer", *names), 300, **questions)]
    named = [answer for answer in answers if "umbrella" in answer.lower() and "tv" in answer.lower()]
    assert len(named) > 100 and not any("  " in answer for answer in named)
    apart = [answer for answer in named if PHRASE in answer and "Blue TV" in answer]
    assert len(apart) == len(named) if system == "gsva" else 0.2 < len(apart) / len(named) < 0.8
    assert all(PHRASE.lower() in answer for answer in named if answer not in apart)


def test_sesames_answers_are_lower_case():
    said = turns("sesame", record("refer", PHRASE, absent=("Green Cow",)), 200)
    assert {name for turn in said for name in re.findall("red umbrella|green cow", text(turn), re.IGNORECASE)} == {
        "red umbrella",
        "green cow",
    }


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_evaluation_lower_cases_expressions_and_leaves_reasoning_as_it_is(system):
    """lisa.md 3.3: stripped; referring sets are lower-cased, ReasonSeg's texts are not. SESAME's own questions are."""
    (query,) = build_system(system).task.queries(record("refer", f" {PHRASE} "))
    assert PHRASE.lower() in query.question and f"{PHRASE.lower()} " in query.question.replace("in this", " in this")
    assert PHRASE not in query.question
    (query,) = build_system(system).task.queries(record("reason", " What Swims? "))
    assert "What Swims? " in query.question and "What Swims?  " not in query.question
    if system != "sesame":
        (query,) = build_system(system).task.queries(record("phrase", f" {PHRASE} "))
        assert f" {PHRASE} in this image" in query.question


def test_reasoning_texts_and_explanations_are_trained_with_their_outer_blanks():
    """lisa.md 4.6: in training the text is unchanged."""
    why = ((Turn("<image>\nwhy", (" It swims. ",)),),)
    said = turns("lisa", record("reason", " What Swims? ", dialogues=why), 200)
    assert all(turn.question.startswith("<image>\n What Swims? ") for turn in said)
    told = Counter(turn.answer[-1] for turn in said if "It swims." in text(turn))
    assert set(told) == {" It swims. ", "  It swims. "}  # alone; after a mask and a blank
    assert all(f" {PHRASE.lower()} " in turn.question for turn in turns("lisa", record("phrase", f" {PHRASE} "), 60))
    for turn in turns("lisa", record("refer", f" {PHRASE} "), 60):
        assert f"  {PHRASE.lower()}" not in turn.question and f"{PHRASE.lower()}  " not in turn.question


def test_wording_draws_every_template():
    words = Wording("mine", {"a": ("x", "y", "z")})
    assert {words.sample("a", np.random.default_rng(seed)) for seed in range(30)} == {"x", "y", "z"}
