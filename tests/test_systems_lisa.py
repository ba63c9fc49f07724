"""LISA's words, the parts that every system shares, and the wording files."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from data.llama_tokenizer import LLAMA
from data.tokens import added_tokens
from data.types import Mask, Record, Target, Turn
from systems.base import SYSTEMS, build_system
from systems.single import FIELDS
from systems.wording import load_wording


def mask() -> np.ndarray:
    return np.ones((2, 2), bool)


def record(kind: str, *phrases: str, explanation: str = "", vocabulary=()) -> Record:
    asked = ((Turn("<image>\nwhy", (explanation,)),),) if explanation else ()
    return Record(Path("photo.jpg"), kind, tuple(Target(phrase, mask) for phrase in phrases), vocabulary, asked)


def converse(record: Record, seed: int = 0, **options):
    return build_system("lisa", options).task.converse(record, np.random.default_rng(seed))


def test_one_dialogue_a_target_up_to_the_limit_without_replacement():
    names = [f"Thing {index}" for index in range(7)]
    for seed in range(10):
        dialogues = converse(record("classes", *names, vocabulary=tuple(names)), seed)
        holes = [part.target for (turn,) in dialogues for part in turn.answer if isinstance(part, Mask)]
        assert len(dialogues) == len(set(holes)) == 3
        for (turn,), hole in zip(dialogues, holes, strict=True):
            assert turn.question.startswith("<image>\n") and names[hole].lower() in turn.question
    assert len(converse(record("refer", *names), num_classes_per_sample=5)) == 5
    assert len(converse(record("refer", "a", "b"))) == 2


def test_same_generator_same_words_and_words_vary():
    one = record("refer", "left man", "right man")
    assert converse(one, 3) == converse(one, 3)
    assert len({converse(one, seed)[0][0] for seed in range(40)}) > 8


def test_sentences_stay_as_they_are_and_phrases_are_lower_cased():
    (dialogue,) = converse(record("reason", "What Swims?"))
    assert dialogue[0].question.startswith("<image>\nWhat Swims? ")
    (dialogue,) = converse(record("refer", "Red FISH"))
    assert "red fish" in dialogue[0].question


def test_explanations_follow_the_published_shares():
    """lisa.md 4.6: a tenth in text only; the rest half plain, half mask with explanation; sampled once per image."""
    one = record("reason", "What swims?", "Name the swimmer.", explanation="A fish swims.")
    styles = {"text": 0, "plain": 0, "explained": 0}
    rng, task = np.random.default_rng(0), build_system("lisa").task
    for _ in range(4000):
        kinds = set()
        for (turn,) in task.converse(one, rng):
            masks = sum(isinstance(part, Mask) for part in turn.answer)
            told = "A fish swims." in "".join(part for part in turn.answer if isinstance(part, str))
            kinds.add("text" if not masks else "explained" if told else "plain")
            if not masks:
                assert turn.answer == ("A fish swims.",) and turn.question[8:] in [t.phrase for t in one.targets]
            elif told:
                assert turn.answer[-1] == " A fish swims."
        (style,) = kinds
        styles[style] += 1
    assert styles["text"] == pytest.approx(400, abs=60)
    assert styles["plain"] == pytest.approx(1800, abs=110)


@pytest.mark.parametrize("options", [{"explanatory": -1}, {"explanatory": 1.0}])
def test_explanatory_extremes(options):
    one = record("phrase", "fish", explanation="It swims.")
    for seed in range(20):
        ((turn,),) = converse(one, seed, **options)
        assert (turn.answer == ("It swims.",)) == (options["explanatory"] == 1.0)
        assert options["explanatory"] == 1.0 or "It swims." not in turn.answer[-1]


def test_evaluation_prompts_are_the_published_ones():
    task = build_system("lisa").task
    first, second = task.queries(record("refer", "the left man ", "a dog"))
    assert first.question == "<image>\n What is the left man in this image? Please output segmentation mask."
    assert first.reference_answer == (Mask(0), ".") and second.reference_answer == (Mask(1), ".")
    sentence, _ = task.queries(record("reason", "What swims?", "Which one lives in water?"))
    assert sentence.question == "<image>\n What swims? Please output segmentation mask."


def test_a_label_set_is_asked_class_by_class():
    queries = build_system("lisa").task.queries(record("classes", "Sky", vocabulary=("wall", "Sky")))
    assert [query.phrases for query in queries] == [("wall",), ("sky",)]
    assert [query.targets for query in queries] == [(), (0,)]
    assert queries[1].question == "<image>\n What is sky in this image? Please output segmentation mask."


def test_reading_counts_masks():
    claims = build_system("lisa").read("Sure, [SEG] and [SEG] . The cat")
    assert [(claim.phrase, claim.mask) for claim in claims] == [("", 0), ("", 1)]
    assert build_system("lisa").read("no") == []


def test_tokens_and_registry():
    system = build_system("lisa")
    assert added_tokens(LLAMA, system.tokens) == ("[SEG]", "<im_start>", "<im_end>") and system.tokens.refuse is None
    assert {"lisa", "lasagna"} <= set(SYSTEMS)
    published = [name for system in SYSTEMS for name in build_system(system).released.architectures]
    assert len(published) == len(set(published))
    with pytest.raises(KeyError, match=r"no system 'lisaa'.*did you mean 'lisa'"):
        build_system("lisaa")


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (
            "phrase: ['no slot']\nsentence: ['{sentence}']\nexplain: [why]\nanswer: ['{mask}']",
            "'no slot' must hold {phrase}",
        ),
        (
            "phrase: ['{phrase}']\nsentence: ['{phrase}']\nexplain: [why]\nanswer: ['{mask}']",
            "must hold {sentence} once",
        ),
        ("phrase: ['{phrase}']\nsentence: ['{sentence}']\nexplain: ['{x}']\nanswer: ['{mask}']", "must hold no field"),
        ("phrase: ['{phrase}']\nsentence: ['{sentence}']\nexplain: [why]\nanswer: []", "the list 'answer' is empty"),
        ("phrase: ['{phrase}']", "expected the lists answer, explain, phrase, sentence"),
    ],
)
def test_wording_files_are_checked(tmp_path, lists, message):
    path = tmp_path / "words.yaml"
    path.write_text(lists)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_wording(str(path), FIELDS)


def test_wording_choices_are_listed():
    with pytest.raises(FileNotFoundError, match=r"no wording 'klingon'; have: .*lasagna, lisa"):
        build_system("lisa", {"wording": "klingon"})
