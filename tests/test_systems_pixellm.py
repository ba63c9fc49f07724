"""PixelLM's words: targets dealt to questions, answers that name them apart or together, shipped questions, reading."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data.types import IMAGE_PLACEHOLDER, Mask, Record, Target, Turn
from systems.base import build_system, systems_accepting
from systems.pixellm import LISTS, RENAMED, list_words
from systems.wording import load_wording
from utils.config import TowerConfig, load_recipe
from utils.flags import resolve

CONFIGS = Path(__file__).parents[1] / "configs"
README = (
    "--version=LLAVA --dataset_dir=./data --vision-tower=CLIP --dataset='sem_seg||refer_seg||vqa||multi_reason_seg' "
    "--sample_rates=2,9,2,4 --exp_name=pixellm-7b --seg_token_num=3 --num_classes_per_question=3 --batch_size=2 "
    f"--pad_train_clip_images --preprocessor_config={CONFIGS}/preprocessor_448.json --resize_vision_tower "
    "--resize_vision_tower_size=448 --vision_tower_for_mask --use_expand_question_list --image_feature_scale_num=2 "
    "--separate_mm_projector"
)
GROUP = "".join(f"[SEG{i}]" for i in range(6))


def mask() -> np.ndarray:
    return np.ones((2, 2), bool)


def record(kind: str, *phrases: str, absent: tuple[str, ...] = (), vocabulary=(), asked=(), aliases=()) -> Record:
    targets = [Target(phrase, mask, aliases=aliases) for phrase in phrases]
    targets += [Target(phrase, None) for phrase in absent]
    return Record(Path("photo.jpg"), kind, tuple(targets), tuple(vocabulary), tuple(asked))


def converse(record: Record, seed: int = 0, **options):
    return build_system("pixellm", options).task.converse(record, np.random.default_rng(seed))


def holes(turn: Turn) -> list[int]:
    return [part.target for part in turn.answer if isinstance(part, Mask)]


def text(turn: Turn) -> str:
    return "".join(part if isinstance(part, str) else "*" for part in turn.answer)


def test_targets_are_dealt_to_the_questions():
    """pixellm.md 3.3: up to nine of them, one to each of three questions, the rest where there is room."""
    names = [f"thing {index}" for index in range(12)]
    shares = Counter()
    for seed in range(200):
        dialogues = converse(record("refer", *names, absent=("ghost",)), seed)
        dealt = [holes(turn) for (turn,) in dialogues]
        all_dealt = [index for hand in dealt for index in hand]
        assert len(dealt) == 3 and sorted(map(len, dealt)) == [3, 3, 3]
        assert len(set(all_dealt)) == 9 and 12 not in all_dealt
        shares.update(all_dealt)
        for (turn,), indices in zip(dialogues, dealt, strict=True):
            question = turn.question.removeprefix(f"{IMAGE_PLACEHOLDER}\n")
            assert list_words([names[i] for i in indices]) in question
    assert max(shares.values()) < 1.3 * min(shares.values())
    for count in (1, 2, 4, 5, 7):
        sizes = [
            sorted(len(holes(turn)) for (turn,) in converse(record("refer", *names[:count]), s)) for s in range(60)
        ]
        assert {sum(size) for size in sizes} == {count} and {len(size) for size in sizes} == {min(3, count)}
        assert max(max(size) for size in sizes) <= 3
    spread = {
        tuple(sorted(len(holes(turn)) for (turn,) in converse(record("refer", *names[:5]), s))) for s in range(60)
    }
    assert spread == {(1, 1, 3), (1, 2, 2)}


def test_one_class_a_question_is_the_plain_way():
    dialogues = converse(record("classes", "Sky", "Sea", vocabulary=("Sky", "Sea")), num_classes_per_question=1)
    assert [len(holes(turn)) for (turn,) in dialogues] == [1, 1]
    wording = load_wording("pixellm", LISTS)
    assert {text(turn) for (turn,) in dialogues} <= {answer.format(mask="*") for answer in wording.lists["answer"]}


def test_several_targets_are_answered_apart_or_together():
    wording, apart, together = load_wording("pixellm", LISTS), 0, 0
    for seed in range(300):
        ((turn,),) = converse(record("refer", "Red Cat", "dog", "tree"), seed, num_classes_per_sample=1)
        names = [["Red Cat", "dog", "tree"][index] for index in holes(turn)]
        clauses = [c.removesuffix(".") for c in wording.lists["each"]]
        each = {list_words([c.format(phrase=n, mask="*") for n in names]) + "." for c in clauses}
        listing = list_words(names).lower()
        whole = {t.format(phrases=listing, masks="*, * and *") for t in wording.lists["together"]}
        assert text(turn) in each | whole and listing in turn.question
        apart, together = apart + (text(turn) in each), together + (text(turn) in whole)
    assert 0.4 < apart / 300 < 0.65  # the bare list is both an apart and a together one
    assert 0.4 < together / 300 < 0.7


def test_more_questions_are_asked_with_the_expanded_list():
    wording = load_wording("pixellm", LISTS)
    assert [len(wording.lists[key]) for key in ("phrase", "phrase_more", "sentence", "sentence_more")] == [4, 14, 2, 5]
    assert [
        len(wording.lists[key]) for key in ("answer", "each", "together", "each_named", "together_named", "explain")
    ] == [
        5,
        3,
        11,
        1,
        8,
        3,
    ]

    def asked(**options):
        turns = [turn for seed in range(300) for (turn,) in converse(record("refer", "cat"), seed, **options)]
        return len({turn.question for turn in turns})

    assert (asked(), asked(use_expand_question_list=True)) == (4, 18)


def test_shipped_questions_with_text_are_trained_as_they_are():
    answer = ("Sit on ", Mask(0), " and read under ", Mask(1), ".")
    shipped = record("multi", "chair", "lamp", asked=[(Turn("Where can I read?", answer),)] * 4)
    dialogues = converse(shipped)
    assert len(dialogues) == 4 and all(turn.answer == answer for (turn,) in dialogues)
    assert all(turn.question.startswith(f"{IMAGE_PLACEHOLDER}\nWhere can I read? ") for (turn,) in dialogues)
    assert len(converse(shipped, questions_per_picture=2)) == 2


def test_shipped_questions_without_text_name_their_targets():
    """pixellm.md 3.4: of each target the rephrased name nine times of ten, else its category; apart or together."""
    shipped = record(
        "multi", "Left Chair", "right lamp", asked=[(Turn("What?", (Mask(0), Mask(1))),)], aliases=("thing",)
    )
    named, number = Counter(), 3000
    task, rng = build_system("pixellm").task, np.random.default_rng(0)
    for _ in range(number):
        ((turn,),) = task.converse(shipped, rng)
        assert holes(turn) == [0, 1]
        words = text(turn)
        first, second = ("chair" in words.lower()), ("lamp" in words)
        named[first, second] += 1
        assert words.count("thing") == 2 - first - second
        if "Left Chair" in words:
            assert words == f"Left Chair is * and {'right lamp' if second else 'thing'} is *."
        elif first and second and " are *" in words:
            assert "left chair, right lamp are *" in words and "* and *" in words
    both, one = RENAMED**2, RENAMED * (1 - RENAMED)  # one draw per target, so that a question mixes the two
    expected = {(True, True): both, (True, False): one, (False, True): one, (False, False): (1 - RENAMED) ** 2}
    assert all(abs(named[key] / number - share) < 0.02 for key, share in expected.items())
    alone = record("multi", "Left Chair", asked=[(Turn("What?", (Mask(0),)),)])
    assert {"Left Chair is *.", "left chair are *."} <= {text(converse(alone, seed)[0][0]) for seed in range(80)}


def test_evaluation_prompts_are_the_published_ones():
    task = build_system("pixellm").task
    (query,) = task.queries(record("refer", " red dog"))
    assert query.question == "<image>\n What is red dog in this image? Please output segmentation mask."
    assert query.reference_answer == (Mask(0), ".")
    (query,) = task.queries(record("multi", "a", "b", asked=[(Turn("Where?", (Mask(0), Mask(1))),)]))
    assert query.question == "<image>\nWhere? Please output segmentation mask."
    assert query.targets == (0, 1) and query.reference_answer == (Mask(0), " and ", Mask(1), ".")
    present, absent = task.queries(record("classes", "sky", vocabulary=("sky", "sea")))
    assert present.targets == (0,) and absent.targets == () and absent.reference_answer == (Mask(-1), ".")


def test_multi_refcoco_groups():
    """pixellm.md 12: 17 expressions make groups of 6, 5, 4 and 2; a group of one is answered without a full stop."""
    task = build_system("pixellm", {"eval_targets": [6, 5, 4]}).task
    names = [f"e{index}" for index in range(17)]
    queries = task.queries(record("refer", *names))
    assert [len(query.targets) for query in queries] == [6, 5, 4, 2]
    assert "What is e0, e1, e2, e3, e4 and e5 in this image?" in queries[0].question
    assert "".join(p if isinstance(p, str) else "*" for p in queries[0].reference_answer) == "*, *, *, *, * and *."
    assert task.queries(record("refer", *names[:7]))[1].reference_answer == (Mask(6),)


@pytest.mark.parametrize("seed", range(20))
def test_our_own_answers_are_read_back(seed):
    system = build_system("pixellm")
    ((turn,),) = converse(record("refer", "red cat", "dog", "tall tree"), seed, num_classes_per_sample=1)
    names = [["red cat", "dog", "tall tree"][index] for index in holes(turn)]
    claims = system.read("".join(part if isinstance(part, str) else GROUP for part in turn.answer))
    assert [claim.mask for claim in claims] == [0, 1, 2]
    named = names[0] in text(turn)
    assert [claim.phrase for claim in claims] == (names if named else ["", "", ""])


def test_a_broken_group_is_no_mask():
    claims = build_system("pixellm").read("the cat is [SEG0][SEG1][SEG2], the dog is " + GROUP + ".")
    assert [(claim.phrase, claim.mask) for claim in claims] == [("the dog", 0)]


def test_tokens_and_ranges():
    tokens = build_system("pixellm", {"seg_token_num": 4}).tokens
    assert tokens.mask == tokens.added == tuple(f"[SEG{i}]" for i in range(8))
    for options, message in (
        ({"image_feature_scale_num": 3}, "image_feature_scale_num: 3"),
        ({"seg_token_num": 0}, "seg_token_num must be 1"),
        ({"eval_targets": [6, 0]}, "eval_targets"),
        ({"num_class": 3}, "num_classes_per"),
    ):
        with pytest.raises(ValueError, match=message):
            build_system("pixellm", options)
    for name in ("pixellm", "sa2va", "unipixel", "unified"):
        with pytest.raises(ValueError, match=r"options\.questions_per_picture must be 0 \(all\) or more, got -1"):
            build_system(name, {"questions_per_picture": -1})


def test_the_published_command_line():
    said = []
    found = resolve(shlex.split(README), systems_accepting, say=said.append)
    assert found.system == "pixellm" and found.options["use_expand_question_list"] is True
    assert found.model.vision_tower == "CLIP" and found.model.vision_pretrained is None
    tower = TowerConfig(
        size=448,
        pad=True,
        stats="sam",
        pool=2,
        position_resize="released",
        preprocessor=f"{CONFIGS}/preprocessor_448.json",
        train_projector=True,
        new_projector=True,
    )
    assert found.model.tower == tower
    rates = {task.task: task.rate for task in found.data.mixture}
    assert rates == {"sem_seg": 2, "refer_seg": 9, "vqa": 2, "multi_reason_seg": 4}
    assert [line.split()[0] for line in said] == [
        "--resize_vision_tower",
        "--vision_tower_for_mask",
        "--separate_mm_projector",
    ]
    line = f"{README} --weight=pytorch_model.bin --eval_only --val_dataset='refcoco|unc|val||refcoco|unc|testA'"
    found = resolve(shlex.split(line), systems_accepting, say=said.append)
    assert found.model.checkpoint_file == "pytorch_model.bin" and found.eval.eval_only
    assert found.eval.suites == ("refcoco|unc|val", "refcoco|unc|testA")


@pytest.mark.parametrize("name", ["released/pixellm", "pixellm_7b", "pixellm_13b", "toy/pixellm"])
def test_recipes_ask_for_no_sam(name):
    found = load_recipe(CONFIGS / f"{name}.yaml")
    system = build_system(found.system, found.options)
    assert system.head == "pixel" and found.model.vision_pretrained is None and found.model.tower.pad
