"""LaSagnA's words: each strategy's property, the published sampling, the fixed prompts, reading answers."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.llama_tokenizer import LLAMA
from data.tokens import added_tokens
from data.types import Dialogue, Mask, Record, Refuse, Target, Turn
from systems.base import build_system
from systems.lasagna import sample_classes
from systems.targets import ABSENT

ADE = tuple(f"class {index}" for index in range(150))


def mask() -> np.ndarray:
    return np.ones((2, 2), bool)


def picture(vocabulary=ADE, present=(3, 140, 77)) -> Record:
    targets = tuple(Target(vocabulary[index].title(), mask) for index in present)
    return Record(Path("photo.jpg"), "classes", targets, tuple(vocabulary))


def asked(dialogue: Dialogue) -> list[str]:
    match = re.search(r"<cat_start> (.*) <cat_end>$", dialogue[0].question)
    assert match, dialogue[0].question
    return match[1].split(", ")


def answered(dialogue: Dialogue) -> list[tuple[str, Mask | Refuse]]:
    script = dialogue[0].answer
    assert len(script) % 2 == 0
    names = [part for part in script if isinstance(part, str)]
    holes = [part for part in script if not isinstance(part, str)]
    assert script == tuple(part for pair in zip(names, holes, strict=True) for part in pair)
    return [(name.removeprefix(", "), hole) for name, hole in zip(names, holes, strict=True)]


def one(record: Record, seed: int = 0, **options) -> Dialogue:
    (dialogue,) = build_system("lasagna", options).task.converse(record, np.random.default_rng(seed))
    assert len(dialogue) == 1
    return dialogue


records = st.builds(
    lambda size, share, seed: picture(
        tuple(f"class {index}" for index in range(size)),
        tuple(int(i) for i in np.random.default_rng(seed).permutation(size)[: int(1 + share * (size - 1))]),
    ),
    st.integers(1, 190),
    st.floats(0, 1),
    st.integers(0, 99),
)
switches = st.fixed_dictionaries(
    {
        "random_list": st.sampled_from(["sampled", "all", "released"]),
        "sequence_augmentation": st.booleans(),
        "order_following": st.booleans(),
        "num_all_classes": st.sampled_from([5, 80]),
        "min_all_classes": st.sampled_from([0, 3]),
    }
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(records, switches, st.integers(0, 9))
def test_every_combination_keeps_its_promises(record, options, seed):
    dialogue = one(record, seed, **options)
    listed, pairs = asked(dialogue), answered(dialogue)
    names = [name for name, _ in pairs]
    assert len(set(listed)) == len(listed) and len(set(names)) == len(names)
    assert set(names) <= set(listed) <= set(record.vocabulary), "an answer names only what was asked"
    for name, hole in pairs:
        present = [i for i, target in enumerate(record.targets) if target.phrase.lower() == name]
        assert hole == (Mask(*present) if present else ABSENT), "each hole points at the target of its name"
    if options["random_list"] == "all":
        assert listed == list(record.vocabulary)
    if options["random_list"] == "released":
        assert sorted(listed) == sorted(record.vocabulary)
    if options["random_list"] == "sampled":
        assert len(listed) <= options["num_all_classes"]
        if options["sequence_augmentation"]:
            assert set(names) == set(listed), "all that is asked is answered"
    if not options["sequence_augmentation"]:
        assert ABSENT not in dict(pairs).values()
    if options["order_following"]:
        assert names == [name for name in listed if name in names]
    assert one(record, seed, **options) == dialogue, "the same generator gives the same words"


def test_paper_preset_samples_lengthens_and_keeps_the_order():
    dialogue = one(picture())
    listed, pairs = asked(dialogue), answered(dialogue)
    assert len(listed) == 80 < len(ADE)
    assert [name for name, _ in pairs] == listed
    assert sum(isinstance(hole, Mask) for _, hole in pairs) == 3
    assert sum(hole == ABSENT for _, hole in pairs) == 77
    lists = {tuple(asked(one(picture(), seed))) for seed in range(5)}
    assert len(lists) == 5 and len({frozenset(names) for names in lists}) == 5


def test_released_preset_lists_everything_and_shuffles_independently():
    dialogue = one(picture(), strategies="released")
    listed, names = asked(dialogue), [name for name, _ in answered(dialogue)]
    assert sorted(listed) == sorted(ADE) and listed != list(ADE)
    assert len(names) == 80
    assert names != [name for name in listed if name in names]


def test_released_preset_samples_the_list_of_an_open_label_set():
    record = picture(tuple(f"class {index}" for index in range(350)))
    assert len(asked(one(record, strategies="released"))) == 80
    assert len(asked(one(record, random_list="all"))) == 350


def test_a_switch_overrides_its_preset_alone():
    dialogue = one(picture(), strategies="released", order_following=True)
    listed, names = asked(dialogue), [name for name, _ in answered(dialogue)]
    assert len(listed) == 150 and names == [name for name in listed if name in names]
    assert len(answered(one(picture(), sequence_augmentation=False))) == 3


@pytest.mark.parametrize(
    ("size", "present", "wanted"),
    [
        (19, 5, (5, 14)),
        (65, 65, (65, 0)),
        (150, 12, (12, 68)),
        (171, 80, (40, 20)),
        (90, 85, (40, 5)),
        (80, 30, (30, 50)),
    ],
)
def test_published_sampling(size, present, wanted):
    """lasagna.md 4.4: all of a small label set; 40 and 20 where 80 or more are present; else filled up to 80."""
    names = [f"c{index}" for index in range(size)]
    targets = {name: index for index, name in enumerate(names[:present])}
    sample = sample_classes(names, targets, 80, np.random.default_rng(0))
    here = sum(name in targets for name in sample)
    assert (here, len(sample) - here) == wanted
    assert len(set(sample)) == len(sample)


def test_sample_size_is_drawn_between_the_bounds():
    task = build_system("lasagna", {"min_all_classes": 4, "num_all_classes": 8}).task
    rng = np.random.default_rng(0)
    assert {len(asked(task.converse(picture(), rng)[0])) for _ in range(60)} == {4, 5, 6, 7, 8}


def test_training_words_vary_and_the_answer_is_bare():
    dialogues = [one(picture(present=(0,)), seed, num_all_classes=1) for seed in range(40)]
    assert len({dialogue[0].question for dialogue in dialogues}) > 5
    assert len(dialogues[0][0].answer) == 2 and dialogues[0][0].question.startswith("<image>\n<semantic>")


def test_paper_tokens_write_the_papers_notation():
    system = build_system("lasagna", {"tokens": "paper", "num_all_classes": 3})
    assert (system.tokens.added, system.tokens.refuse) == (("[SEG]", "[NEG]"), "[NEG]")
    record = picture(("sky", "wall", "dog"), (0, 1))
    (dialogue,) = system.task.converse(record, np.random.default_rng(1))
    assert all(str(text).startswith(", ") for text in dialogue[0].answer[2::2])
    assert {name for name, _ in answered(dialogue)} == {"sky", "wall", "dog"}
    (query,) = system.task.queries(record)
    assert query.question == "<image>\nCan you segment the sky, wall, dog in this image?"
    assert query.reference_answer == ("sky", Mask(0), ", wall", Mask(1), ", dog", ABSENT)


def test_released_tokens_in_their_published_order():
    tokens = build_system("lasagna").tokens
    wrap = ("<im_start>", "<im_end>")
    assert added_tokens(LLAMA, tokens) == ("<cat_start>", "<cat_end>", "<semantic>", "<ins>", "<no_ins>", *wrap)
    assert (tokens.mask, tokens.refuse) == (("<ins>",), "<no_ins>")


def test_semantic_prompt_is_the_published_one():
    record = picture(("Wall", "traffic light", "sky"), (2, 0))
    (query,) = build_system("lasagna").task.queries(record)
    assert query.question == "<image>\n<semantic>Segment this image.<cat_start> wall, traffic light, sky <cat_end>"
    assert query.reference_answer == ("wall", Mask(1), "traffic light", ABSENT, "sky", Mask(0))
    assert (query.targets, query.phrases) == ((1, 0), ("wall", "traffic light", "sky"))


def test_chunked_queries_cover_the_label_set_once_in_order():
    queries = build_system("lasagna", {"classes_per_query": 40}).task.queries(picture())
    assert [len(query.phrases) for query in queries] == [40, 40, 40, 30]
    assert tuple(itertools.chain(*(query.phrases for query in queries))) == ADE
    assert [query.targets for query in queries] == [(0,), (2,), (), (1,)]


def test_refer_and_reason_are_single_target_conversations():
    system = build_system("lasagna")
    record = Record(Path("a.jpg"), "refer", tuple(Target(f"The {i}th Man", mask) for i in range(9)))
    dialogues = system.task.converse(record, np.random.default_rng(0))
    assert len(dialogues) == 5
    for (turn,) in dialogues:
        (hole,) = (part for part in turn.answer if isinstance(part, Mask))
        assert record.targets[hole.target].phrase.lower() in turn.question
    query = system.task.queries(record)[4]
    assert query.reference_answer == (Mask(4), ".") and query.targets == (4,)


def test_dialogues_of_a_dataset_pass_unchanged():
    rounds = (Turn("<image>\nHow many?", ("Two.",)), Turn("Sure?", ("Yes.",)))
    record = Record(Path("a.jpg"), "vqa", dialogues=(rounds,))
    assert build_system("lasagna").task.converse(record, np.random.default_rng(0)) == [rounds]


@pytest.mark.parametrize(
    ("text", "claims"),
    [
        ("sky<ins>traffic light<no_ins>wall<ins>", [("sky", 0), ("traffic light", None), ("wall", 1)]),
        ("sky <ins> traffic light <no_ins> wall <ins> ", [("sky", 0), ("traffic light", None), ("wall", 1)]),
        ("<ins>sky<ins><ins>wall<no_ins>", [("", 0), ("sky", 1), ("", 2), ("wall", None)]),
        ("sky<ins>sky<ins>", [("sky", 0), ("sky", 1)]),
        ("Here it is: <ins>.", [("Here it is", 0)]),
        ("<semantic>sea\nwater<ins>", [("sea water", 0)]),
        ("nothing here", []),
        ("", []),
    ],
)
def test_reading_names_before_tokens(text, claims):
    assert [(claim.phrase, claim.mask) for claim in build_system("lasagna").read(text)] == claims


def test_reading_the_papers_notation():
    claims = build_system("lasagna", {"tokens": "paper"}).read("Person [SEG], Tree [NEG], dog [SEG]")
    assert [(claim.phrase, claim.mask) for claim in claims] == [("Person", 0), ("Tree", None), ("dog", 1)]


@pytest.mark.parametrize("form", ["released", "paper"])
def test_reading_undoes_writing(form):
    system = build_system("lasagna", {"tokens": form})
    tokens = system.tokens
    (query,) = system.task.queries(picture())
    render: dict[type, str] = {Mask: tokens.mask[0], Refuse: str(tokens.refuse)}
    text = "".join(part if isinstance(part, str) else render[type(part)] for part in query.reference_answer)
    claims = system.read(text)
    assert tuple(claim.phrase for claim in claims) == query.phrases
    assert [claim.mask for claim in claims if claim.mask is not None] == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": True}, "no field in options 'order'"),
        ({"tokens": "old"}, "options.tokens: 'old' is not a choice; have: released, paper"),
        ({"strategies": "none"}, "options.strategies"),
        ({"random_list": "some"}, "options.random_list"),
        ({"classes_per_query": -1}, "options.classes_per_query"),
        ({"num_classes_per_sample": 0}, "options.num_classes_per_sample must be 1 or more, got 0"),
        ({"explanatory": 10}, "options.explanatory is a share"),
        ({"min_all_classes": 90}, "min_all_classes <= num_all_classes"),
    ],
)
def test_unknown_options_list_the_choices(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_system("lasagna", options)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (Record(Path("p.jpg"), "classes", (), ()), "p.jpg: a 'classes' record with an empty class list"),
        (picture(("sky", "Sky"), ()), "photo.jpg: the class list names sky more than once"),
        (Record(Path("p.jpg"), "classes", (Target("sun", mask),), ("sky",)), "p.jpg: targets sun are not in"),
    ],
)
def test_unusable_records_are_named(record, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        one(record)


def test_nothing_to_ask_gives_no_dialogue():
    rng = np.random.default_rng(0)
    empty = picture(present=())
    assert build_system("lasagna", {"sequence_augmentation": False}).task.converse(empty, rng) == []
    assert all(hole == ABSENT for _, hole in answered(one(empty)))
    absent = Record(Path("p.jpg"), "refer", (Target("sun", None),))
    assert build_system("lasagna").task.converse(absent, rng) == []
