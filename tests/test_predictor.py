"""The Python API: what it returns is what the model says, for every kind of image and question."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.types import Claim
from evaluation import predictor as module
from evaluation import protocols
from evaluation.predictor import Predictor
from model.seg_model import Answer, find_groups
from systems.assistant import build
from tests.records import OWN
from tests.tiny_assistant import tiny
from utils.config import load_recipe

ROOT = Path(__file__).resolve().parents[1]
IMAGE = OWN / "lisa" / "image0.png"
PHRASES = ["the dog", "the unicorn"]


@pytest.fixture(scope="module")
def lisa() -> Predictor:
    return Predictor(tiny("lisa", eager=5), max_new_tokens=12)


@pytest.fixture(scope="module")
def lasagna() -> Predictor:
    return Predictor(tiny("lasagna", eager=8), max_new_tokens=12)


@pytest.fixture(scope="module")
def size() -> tuple[int, int]:
    return np.asarray(Image.open(IMAGE)).shape[:2]


def test_phrases_get_masks_of_the_images_size_with_scores(lisa, size):
    segments = lisa(IMAGE, PHRASES)
    assert [segment.phrase for segment in segments] == PHRASES and any(segment.present for segment in segments)
    for segment in segments:
        assert segment.present == ("[SEG]" in segment.text)
        if segment.present:
            assert segment.mask.shape == size and segment.mask.dtype == bool
            assert 0.5 < segment.score <= 1 if segment.mask.any() else segment.score == 0


def test_paths_images_and_arrays_are_the_same_image_and_batches_change_nothing(lisa):
    image = Image.open(IMAGE)
    alone = lisa(IMAGE, PHRASES)
    rotated = image.transpose(Image.Transpose.ROTATE_90)
    batch = lisa.batch([str(IMAGE), image, np.asarray(image.convert("RGB")), rotated], [PHRASES] * 3 + [["the cat"]])
    for group in batch[:3]:
        for one, other in zip(alone, group, strict=True):
            assert (one.text, one.present) == (other.text, other.present)
            if one.present:
                assert np.array_equal(one.mask, other.mask) and one.score == pytest.approx(other.score, abs=1e-4)
    assert len(batch[3]) == 1


def test_a_class_list_says_present_and_absent(lasagna, size, monkeypatch):
    masks = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    claims = (Claim("Sky", 1), Claim("dog", None), Claim("sky", 0))
    monkeypatch.setattr(module, "generate", lambda *_: [[module.Reply("said", claims, masks)]])
    sky, dog, cat = lasagna.classes(IMAGE, ["sky", "dog", "cat"])
    assert sky.present and not dog.present and not cat.present and dog.score is None
    assert np.array_equal(sky.mask, (masks.amax(0) > 0).numpy()) and sky.text == "said"


def test_a_class_list_is_asked_in_the_words_of_the_system(lisa, lasagna):
    for predictor, questions in ((lisa, 2), (lasagna, 1)):
        assert len(predictor.class_queries(["sky", "dog"])) == questions
        assert [segment.phrase for segment in predictor.classes(IMAGE, ["sky", "dog"])] == ["sky", "dog"]


def test_many_questions_about_an_image_are_asked_in_several_batches(lisa, monkeypatch):
    names = ["sky", "dog", "cat", "road", "tree"]
    together = lisa.classes(IMAGE, names)
    monkeypatch.setattr(protocols, "MOST_QUESTIONS", 2)
    batches, answer = [], protocols.answer_prompts
    monkeypatch.setattr(protocols, "answer_prompts", lambda *args: batches.append(len(args[2][0])) or answer(*args))
    for one, other in zip(together, lisa.classes(IMAGE, names), strict=True):
        assert (one.phrase, one.text, one.present) == (other.phrase, other.text, other.present)
        assert not one.present or (one.mask != other.mask).mean() < 0.01  # sums of batches of other sizes
    assert batches == [2, 2, 1] and any(one.present for one in together)


def test_questions_in_free_words(lisa):
    answer = lisa.ask(IMAGE, "Where is the dog in this image?")
    assert answer.text.count("[SEG]") == len([segment for segment in answer.segments if segment.present]) > 0
    assert not answer.finished, "its 12 tokens are not enough"


def test_the_example_of_the_module_runs_with_the_toy_base(tmp_path, monkeypatch, capsys):
    toy = build(load_recipe(ROOT / "configs" / "toy" / "lasagna.yaml"), device="cpu", trainable=False)
    monkeypatch.setattr(
        Predictor, "from_pretrained", lambda path, **options: Predictor(toy, max_new_tokens=24, **options)
    )
    monkeypatch.chdir(tmp_path)
    for name in ("kitchen.jpg", "street.jpg", "a.jpg", "b.jpg"):
        Image.open(IMAGE).convert("RGB").save(name)
    example = (module.__doc__ or "").split("\n\n", 1)[1].rpartition("\n\n")[0]
    capsys.readouterr()  # what loading logs
    exec(textwrap.dedent(example), {})
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in shown[:2]] == [["the", "cup"], ["the", "unicorn"]]
    assert [line.split()[0] for line in shown[2:5]] == ["road", "car", "zebra"] and len(shown) == 7


def test_published_checkpoints_load():
    loaded = Predictor.from_pretrained(
        OWN / "lisa", device="cpu", max_new_tokens=2, model={"vision_tower": str(OWN / "lisa" / "clip")}
    )
    assert len(loaded(IMAGE, PHRASES)) == 2


def test_bad_input_is_refused_with_what_is_wrong(lisa):
    for phrases in ([], ["dog", " "], "dog"):
        with pytest.raises(ValueError, match="phrases are a list"):
            lisa(IMAGE, phrases)
    with pytest.raises(ValueError, match="at least one name"):
        lisa.classes(IMAGE, [])
    for names, phrases in ((["sky", 7], ["dog", None]), (["sky", " "], ["dog", "\n"])):
        with pytest.raises(ValueError, match="no empty one"):
            lisa.classes(IMAGE, names)
        with pytest.raises(ValueError, match="no empty one"):
            lisa(IMAGE, phrases)
    for names in (["misc.", "misc"], ["traffic light", "TrafficLight"], ["car", " car"]):
        with pytest.raises(ValueError, match=f"cannot tell the classes {names[0]!r} and {names[1]!r} apart"):
            lisa.classes(IMAGE, names)
    for classes in (lisa.classes, lisa.label_map, lambda image, names: lisa.chat(image).ask(classes=names)):
        with pytest.raises(ValueError, match=r"pass \['road'\]"):
            classes(IMAGE, "road")
    with pytest.raises(ValueError, match="question is empty"):
        lisa.ask(IMAGE, " ")
    with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8 .*not \(4, 4\)"):
        lisa(np.zeros((4, 4), np.uint8), ["dog"])
    for nothing in (np.zeros((0, 4, 3), np.uint8), Image.new("RGB", (4, 0))):
        with pytest.raises(ValueError, match="at least one pixel"):
            lisa.ask(nothing, "Where is it?")
    for other in (None, IMAGE.read_bytes(), [[[0, 0, 0]]]):
        with pytest.raises(ValueError, match=f"a PIL image .*not {type(other).__name__}"):
            lisa.ask(other, "Where is it?")
    with pytest.raises(ValueError, match="2 images, but questions about 1"):
        lisa.batch([IMAGE, IMAGE], [PHRASES])
    for ask in (lambda: lisa(IMAGE, ["an <IMAGE>"]), lambda: lisa.ask(IMAGE, "Where is <image>?")):
        with pytest.raises(ValueError, match=r"<image> .*stands for the image, and no phrase, class or question"):
            ask()
    assert lisa.batch([], []) == [] and lisa.replies([IMAGE], [[]]) == [[]], "nothing is asked"
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        lisa("none.png", PHRASES)


def test_the_mask_head_s_own_score_counts_where_it_has_one(lasagna, size, monkeypatch):
    """Of several masks of a class the highest; an empty mask has 0 whatever the head says."""
    masks = torch.randn(3, *size, generator=torch.Generator().manual_seed(0))
    masks[2] = -1
    claims = (Claim("sky", 1), Claim("dog", None), Claim("sky", 0), Claim("cat", 2))
    reply = module.Reply("said", claims, masks, scores=torch.tensor([0.25, 0.75, 0.9]))
    monkeypatch.setattr(module, "generate", lambda *_: [[reply]])
    assert [segment.score for segment in lasagna.classes(IMAGE, ["sky", "dog", "cat"])] == [0.75, None, 0.0]
    assert [segment.score for segment in lasagna.ask(IMAGE, "What is here?").segments] == [0.75, None, 0.25, 0.0]


def test_an_answer_ends_at_the_last_position_of_the_language_model(monkeypatch):
    """Each row of a batch at its own."""
    predictor = Predictor(tiny("lisa", eager=5), max_new_tokens=12)
    queries = [module.free_query(question) for question in ("Where is the dog in this image?", "Where?")]
    free = predictor.replies([IMAGE], [queries])[0]
    prompt = len(predictor.assistant.encoder.prompt(queries[0].question)) - 1 + predictor._sample(IMAGE).image_tokens
    monkeypatch.setattr(predictor.assistant.model.vlm.language.config, "max_position_embeddings", prompt + 3)
    cut, other = predictor.replies([IMAGE], [queries])[0]
    assert free[0].text.startswith(cut.text) and len(cut.text) < len(free[0].text) and not cut.finished
    assert len(cut.masks) < len(free[0].masks)
    assert len(cut.text) < len(other.text), "its prompt is shorter"
    monkeypatch.setattr(predictor.assistant.model.vlm.language.config, "max_position_embeddings", prompt)
    with pytest.raises(ValueError, match=f"leaves none of {prompt} for an answer"):
        module.generate(predictor.assistant, [predictor._sample(IMAGE)], [queries], 12)


def test_masks_that_are_no_numbers_are_an_error_not_an_empty_mask():
    predictor = Predictor(tiny("lisa", eager=100), max_new_tokens=12)
    for weights in predictor.assistant.model.project.parameters():
        weights.data.fill_(torch.nan)
    conversation = predictor.chat(IMAGE)
    for ask in (
        lambda: predictor(IMAGE, PHRASES),
        lambda: predictor.classes(IMAGE, ["sky"]),
        lambda: conversation.ask("Where is the dog in this image?"),
    ):
        with pytest.raises(ValueError, match=r"image0\.png: the masks of the answer hold NaN.*--precision fp32"):
            ask()
    assert conversation.session.rounds == []


def test_only_tokens_count_as_masks_not_words_that_spell_them(monkeypatch):
    """Nor do parts of a group that lack the rest, or between which something without a letter stands."""
    one, several = Predictor(tiny("gsva")), Predictor(tiny("pixellm"))

    def said(predictor: Predictor, *parts: str) -> list[tuple[str, bool]]:
        """Name and presence of what an answer of these words and tokens (by their names) marks or refuses."""
        pieces, table = predictor.assistant.tokenizer.pieces, predictor.assistant.tokenizer.get_vocab()
        added, mask = predictor.assistant.system.tokens.added, predictor.assistant.system.tokens.mask
        ids = [i for part in parts for i in ([table[part]] if part in added else pieces.encode(part, blank=True))]
        masks = torch.ones(len(find_groups(ids, [table[name] for name in mask])), 4, 4)
        monkeypatch.setattr(predictor.assistant.model, "generate", lambda *_, **__: [Answer(ids, masks)])
        answer = predictor.ask(IMAGE, "What is here?")
        assert "\u2060" not in answer.text
        return [(segment.phrase, segment.present) for segment in answer.segments]

    assert said(one, "dog:", "[SEG]", ", cat:", "[REJ]") == [("dog", True), ("cat", False)]
    assert said(one, "I write [SEG] for dog:", "[SEG]") == [("I write [SEG] for dog", True)]
    assert said(one, "no [REJ], a dog:", "[SEG]") == [("no [REJ], a dog", True)]
    group = several.assistant.system.tokens.mask
    assert said(several, "cat is", *group, "and dog is", *group) == [("cat", True), ("dog", True)]
    assert said(several, "cat is", *group[:3], " ", *group[3:], "and dog is", *group) == [("dog", True)]
    assert said(several, "cat is", *group[:3], "and dog is", *group, *group[3:]) == [("dog", True)]
