"""Drafts save passes and change nothing: the answers are those of writing token by token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.types import IMAGE_ID
from evaluation.predictor import Predictor
from model.vlm.draft import Draft, Writing
from model.vlm.past import Past
from tests.test_prefix_cache import alone, answers, many, talkative
from tests.tiny_model import EOS, LANGUAGE, LLAVA, PLAN, SEG
from toy.world.scene import CLASSES, make_scene, scene_seed

TOY = Path(__file__).resolve().parents[1] / "assets" / "toy" / "assistant"

IMAGE = [IMAGE_ID] * 4
COMMA, END, REJ = 30, 31, 36
NAMES = [[10], [11, 12], [13], [14, 15, 16], [17], [18], [19, 20], [21]]


def question(names: list[list[int]], between: int = COMMA) -> list[int]:
    listed = [token for name in names for token in [*name, between]]
    return [1, 5, *IMAGE, 6, *listed[:-1], END]


def answer_to(names: list[list[int]], verdicts: list[list[int]]) -> list[int]:
    pairs = zip(names, verdicts, strict=True)
    return [*[token for name, verdict in pairs for token in [*name, *verdict]], EOS]


def passes_of(prompt: list[int], answer: list[int], most: int = 32) -> int:
    """The number of passes of a model that writes `answer` whatever it reads, with drafts verified."""
    writing, passes = Writing(prompt, 100, EOS, most), 0
    while not writing.done:
        begin = len(writing.ids)
        # at a position beyond a wrong guess a model may choose anything
        right = [token for token, _ in zip(answer[begin:], writing.reading or [0], strict=False)]
        writing.write([*right, *[REJ] * (len(writing.reading) - len(right))])
        passes += 1
    assert writing.ids == answer
    return passes


@pytest.mark.parametrize("verdict", [[REJ], [SEG, REJ], [7, REJ, COMMA]], ids=["instead", "longer", "inserted"])
def test_a_list_that_is_repeated_takes_few_passes(verdict):
    answer = answer_to(NAMES, [verdict] * len(NAMES))
    assert 2 * passes_of(question(NAMES), answer) < len(answer)
    assert passes_of(question(NAMES), answer, most=0) == len(answer)


def test_another_verdict_costs_one_pass():
    verdicts = [[REJ]] * len(NAMES)
    refused = passes_of(question(NAMES), answer_to(NAMES, verdicts), most=100)
    verdicts[4] = [SEG]
    assert passes_of(question(NAMES), answer_to(NAMES, verdicts), most=100) <= refused + 2


def test_words_of_its_own_are_not_guessed():
    prompt, draft = question(NAMES), Draft(question(NAMES))
    for token in (33, SEG, 34, 35):
        draft.wrote([token])
        assert draft.guess(32) == []
    assert passes_of(prompt, [33, 10, SEG, 34, EOS]) == 5


def test_an_image_is_never_guessed():
    draft = Draft([1, COMMA, 5, *IMAGE, 6, 7])
    draft.wrote([1, REJ, 5])  # a change; then the prompt continues with the image
    assert draft.guess(32) == []


def test_writing_ends_at_the_end_token_and_at_the_limit():
    writing = Writing(question(NAMES), 6, EOS, 32)
    assert [writing.write([token]) for token in (10, REJ, 11)] == [[10], [REJ], [11]]
    assert writing.reading == [11, 12, REJ], "of 6 tokens 3 are left, and the model writes one after the draft"
    assert writing.write([12, REJ, 13]) == [12, REJ, 13] and writing.done and writing.write([1, 2, 3]) == []
    ended = Writing([EOS, COMMA, 8, EOS, 9], 99, EOS, 32)
    for token in (COMMA, REJ, EOS):
        ended.write([token])
    assert ended.done and ended.ids == [COMMA, REJ, EOS]
    ended = Writing([4, 3, COMMA, 8, COMMA, 9, EOS, 7, 5], 99, EOS, 32)
    for token in (3, REJ, 8):
        ended.write([token])
    assert ended.reading == [8, REJ, 9, EOS, 7], "the end token is inside the draft"
    assert ended.write([REJ, 9, EOS, 7, 5]) == [REJ, 9, EOS] and ended.done


# --- with a model ---------------------------------------------------------------------------------------------------


class Oracle(Draft):
    """Guesses what the row will write, with some tokens wrong, and more after the end."""

    truth: dict[tuple[int, ...], list[int]]
    wrong: float

    def __init__(self, prompt):
        super().__init__(prompt)
        self.rest = [*self.truth.get(tuple(prompt), []), *range(3, 30)]
        self.chance = torch.Generator().manual_seed(len(prompt))

    def wrote(self, tokens, right=0):
        self.rest = self.rest[len(tokens) :]

    def guess(self, most):
        length = int(torch.randint(0, 9, (1,), generator=self.chance))
        wrong = torch.rand(length, generator=self.chance) < self.wrong
        return [3 + token % 30 if bad else token for token, bad in zip(self.rest, wrong.tolist(), strict=False)][:most]


def prompts_of(batch) -> list[tuple[int, ...]]:
    return [tuple(row[real].tolist()) for row, real in zip(batch.ids, batch.attention, strict=True)]


def drafted(model, batch, monkeypatch, wrong: float):
    """Answers token by token, and with drafts of an oracle; passes of both."""
    passes: list[list[tuple[int, int]]] = [[], []]
    monkeypatch.setattr(model.vlm, "draft_tokens", 0)
    results = []
    for seen, most in zip(passes, (0, 32), strict=True):
        hook = model.vlm.language.model.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append((args[0] if args else kwargs["hidden_states"]).shape[:2]),
            with_kwargs=True,
        )
        monkeypatch.setattr(model.vlm, "draft_tokens", most)
        results.append(answers(model, batch))
        hook.remove()
        truth = {prompt: answer.ids for prompt, answer in zip(prompts_of(batch), results[0], strict=True)}
        monkeypatch.setattr(Oracle, "truth", truth, raising=False)
        monkeypatch.setattr(Oracle, "wrong", wrong, raising=False)
        monkeypatch.setattr("model.vlm.draft.Draft", Oracle)
    return results, passes


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("several", [True, False], ids=["shared prefix", "one row per image"])
def test_answers_and_masks_are_those_of_writing_token_by_token(monkeypatch, attention, wrong, several):
    language = {**LANGUAGE, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = talkative(replace(PLAN, vlm_config={**LLAVA, "language": language}))
    model.vlm.language.config._attn_implementation = attention
    batch = many()
    if not several:
        kept = [0, 5, 6]
        batch = replace(
            batch, **{name: getattr(batch, name)[kept] for name in ("ids", "labels", "attention", "row_image")}
        )
    (plain, fast), (one_each, together) = drafted(model, batch, monkeypatch, wrong)
    if several:
        assert len({len(answer.ids) for answer in plain}) > 1 and any(answer.ids[-1] == EOS for answer in plain)
    assert sum(len(answer.masks) for answer in plain) >= 3, "the test needs masks"
    assert max(width for _, width in together[2:]) > 1, "the test needs drafts"
    if not wrong:
        assert len(together) < len(one_each)
    for one, other in zip(plain, fast, strict=True):
        assert one.ids == other.ids
        torch.testing.assert_close(one.masks, other.masks, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("wrong", [0.0, 0.4])
def test_a_conversation_remembers_what_it_wrote_and_no_wrong_guess(monkeypatch, wrong):
    model, batch = talkative(), alone(many(), 0)
    vision, told = model.vlm.encode_images(batch.pixels, batch.geometry), []

    def write(ids, past, on_token=None):
        row = torch.tensor([ids])
        return model.vlm.generate(
            row, torch.ones_like(row, dtype=torch.bool), vision, torch.tensor([0]),
            max_new_tokens=12, eos=EOS, past=past, on_token=on_token,
        )  # fmt: skip

    ids, past = batch.ids[0].tolist(), Past()
    for words in ([11, 12], [13], [14, 15]):
        monkeypatch.setattr(model.vlm, "draft_tokens", 0)
        plain = write(ids, None)
        monkeypatch.setattr("model.vlm.draft.Draft", Oracle)
        monkeypatch.setattr(Oracle, "truth", {tuple(ids): plain.ids[0]}, raising=False)
        monkeypatch.setattr(Oracle, "wrong", wrong, raising=False)
        monkeypatch.setattr(model.vlm, "draft_tokens", 32)
        told.clear()
        going = write(ids, past, told.append)
        assert going.ids == plain.ids and told == plain.ids[0]
        assert past.ids == [*ids, *going.ids[0][:-1]]
        assert past.cache is not None and past.cache.get_seq_length() == len(past.ids)
        torch.testing.assert_close(going.states, plain.states, atol=1e-5, rtol=1e-4)
        ids = [*ids, *going.ids[0], *words]


def test_a_trained_assistant_answers_a_class_list_in_a_fraction_of_the_passes():
    predictor = Predictor.from_pretrained(TOY, model={"precision": "fp32"})
    vlm, widths = predictor.assistant.model.vlm, []
    vlm.language.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: widths.append((args[0] if args else kwargs["hidden_states"]).shape[1]), with_kwargs=True
    )
    images = [make_scene(scene_seed("val", index)).image for index in range(2)]
    # two images in one batch: other answers to the same question, so that drafts go wrong in one row and not the other
    queries = [predictor.class_queries(CLASSES)] * 2
    assert vlm.draft_tokens > 0
    fast, passes = predictor.replies(images, queries), len(widths)
    vlm.draft_tokens = 0
    widths.clear()
    for (one,), (other,) in zip(fast, predictor.replies(images, queries), strict=True):
        assert one.text == other.text and len(one.claims) > 20 and one.finished
        torch.testing.assert_close(one.masks, other.masks, atol=1e-3, rtol=1e-3)
    assert 2 * passes < len(widths)
