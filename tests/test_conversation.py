"""Conversations: what is read once is what reading everything again gives, whatever happens between the rounds."""

from __future__ import annotations

import gc
import re
import threading
import weakref
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.encode import Encoder, without_image
from data.pieces import KEEP, STRIP
from data.templates import TEMPLATES
from data.tokens import load_tokenizer
from data.types import IMAGE_ID, IMAGE_PLACEHOLDER, Mask, Record, Refuse, Target, Turn
from evaluation.predictor import Predictor, free_query
from evaluation.protocols import answer_prompts
from model.vlm.base import Vision
from model.vlm.past import Past
from systems.base import SYSTEMS, build_system
from tests.records import OWN, ROOT
from tests.tiny_assistant import tiny
from tests.tiny_model import EOS, tiny_batch, tiny_model
from tests.tiny_qwen import FAMILIES, load_backbone, stock_model
from tests.tiny_words import tiny_qwen_tokenizer

IMAGE = OWN / "lisa" / "image0.png"
QUESTIONS = ["Where is the dog in this image?", "And the cat?", "Is it next to the car, or on the road?"]
TINY = {"lisa": 5.0, "lasagna": 8.0, "gsva": 1.0, "pixellm": 5.0, "sesame": 5.0}  # how loud the mask token is
NEW = 12
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def predictors():
    made = {}

    def get(name: str = "lisa") -> Predictor:
        if name not in made:
            made[name] = Predictor(tiny(name, eager=TINY[name]), max_new_tokens=NEW)
        return made[name]

    return get


# --- ids -------------------------------------------------------------------------------------------------------------


def about(question: str) -> str:
    return f"{IMAGE_PLACEHOLDER}\n{question}"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A folder with a byte-level tokenizer, whose templates close in another way."""
    folder = tmp_path_factory.mktemp("qwen")
    tiny_qwen_tokenizer(folder)
    return folder


def encoders(folder: Path, system: str = "lisa", **options) -> list[Encoder]:
    """Of a tokenizer, with each template that is for it."""
    spec = build_system(system).tokens
    tokenizer = load_tokenizer(folder, spec, **options)
    names = [name for name, layout in TEMPLATES.items() if tokenizer.eos_token in layout.close]
    assert len(names) >= 3
    return [Encoder(tokenizer, spec, name) for name in names]


def check_continued(encoder: Encoder) -> None:
    answers = [("It is ", Mask(0), "."), (Mask(0),), (" the dog",), ("the dog ",), (Mask(0), " ", Mask(1))]
    answers += [(Refuse(0),), ("the dog ", Refuse(0), " and the cat ", Mask(1))] if encoder.spec.refuse else []
    questions = ["Where is the dog?", " And the cat? ", "\n\nwhat is it", "Is it a dog\n", "a"]
    asked = [about(questions[index % len(questions)]) for index in range(len(answers) + 1)]
    words, rounds = [asked[0], *map(without_image, asked[1:])], []
    whole = encoder.prompt(words[-1], tuple(Turn(*turn) for turn in zip(words, answers, strict=False)))
    for question in asked[:-1]:
        prompt = encoder.continued(rounds, question)
        assert whole[: len(prompt)] == prompt
        end = whole.index(encoder.tokenizer.eos_token_id, len(prompt))
        rounds.append((question, whole[len(prompt) : end + 1]))
    assert encoder.continued(rounds, asked[-1]) == whole


@pytest.mark.parametrize(("release", "legacy"), [(STRIP, True), (KEEP, True), (KEEP, False)])
@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_a_continued_dialogue_has_the_ids_of_the_whole_dialogue(system, release, legacy):
    for encoder in encoders(OWN / "lisa", system, release=release, legacy=legacy):
        check_continued(encoder)


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_so_it_has_with_a_byte_level_tokenizer(system, qwen):
    for encoder in encoders(qwen, system):
        check_continued(encoder)


@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_an_answer_that_was_cut_is_closed_as_the_template_closes(family, qwen):
    for encoder in encoders(qwen if family == "qwen" else OWN / "lisa"):
        question = about("Where is the dog?")
        whole = encoder.prompt("And the cat?", (Turn(question, ("the dog",)),))
        start = len(encoder.prompt(question))
        end = whole.index(encoder.tokenizer.eos_token_id, start) - encoder.template.close.startswith(" ")
        assert encoder.continued([(question, whole[start:end])], about("And the cat?")) == whole


def test_the_models_own_ids_stay_where_its_text_would_become_others(predictors):
    encoder = predictors().assistant.encoder
    letters = [encoder.tokenizer.convert_tokens_to_ids(piece) for piece in ("▁", "d", "o", "g")]
    assert encoder.tokenizer.unk_token_id not in letters
    answer = [*letters, encoder.tokenizer.eos_token_id]
    question = about("Where?")
    start = len(encoder.prompt(question))
    assert encoder.continued([(question, answer)], question)[start : start + 5] == answer
    assert encoder.prompt("Where?", (Turn(question, ("dog",)),))[start : start + 5] != answer


# --- the cache -------------------------------------------------------------------------------------------------------


def read_again(predictor: Predictor, session, ids: list[int]):
    """The reply to a prompt that is read from its beginning, and its ids."""
    written: list[int] = []
    (reply,) = answer_prompts(predictor.assistant, [session.sample], [[ids]], NEW, None, written.append)
    return reply, written


@pytest.mark.parametrize("name", TINY)
def test_answers_are_those_of_reading_everything_again(predictors, name):
    predictor = predictors(name)
    session, masks = predictor.chat(IMAGE).session, 0
    for question in QUESTIONS:
        query = free_query(question)
        earlier = [(past.question, past.ids) for past in session.rounds]
        reply, written = read_again(predictor, session, predictor.assistant.encoder.continued(earlier, query.question))
        (said,) = session.ask([query]).replies
        assert session.rounds[-1].ids == tuple(written) and said.text == reply.text and said.claims == reply.claims
        torch.testing.assert_close(said.masks, reply.masks, **CLOSE)
        masks += len(said.masks)
    assert len(session.rounds) == 3 and (masks > 0 or TINY[name] == 1.0 or name == "pixellm")


def test_the_rounds_before_matter(predictors):
    conversation = predictors().chat(IMAGE)
    conversation.ask(QUESTIONS[0])
    later = conversation.ask(QUESTIONS[1]).text
    assert later != predictors().ask(IMAGE, QUESTIONS[1]).text
    conversation.forget()
    assert conversation.ask(QUESTIONS[1]).text == predictors().ask(IMAGE, QUESTIONS[1]).text


def test_a_round_that_is_forgotten_while_it_is_written_is_not_kept(predictors):
    conversation = predictors().chat(IMAGE)
    conversation.ask(QUESTIONS[0])
    conversation.ask(QUESTIONS[1], on_text=lambda _: conversation.forget())
    assert conversation.session.rounds == []
    assert conversation.ask(QUESTIONS[1]).text == predictors().ask(IMAGE, QUESTIONS[1]).text


def test_a_round_costs_its_own_tokens_and_the_image_is_encoded_once(predictors, monkeypatch):
    model = predictors().assistant.model
    monkeypatch.setattr(model.vlm, "draft_tokens", 0)
    read, encoded = [], []
    hook = model.vlm.language.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: read.append((args[0] if args else kwargs["hidden_states"]).shape[1]), with_kwargs=True
    )
    for part, name in ((model.vlm, "encode_images"), (model.head, "features")):
        monkeypatch.setattr(
            part, name, lambda *a, whole=getattr(part, name), name=name: encoded.append(name) or whole(*a)
        )
    session = predictors().chat(IMAGE).session
    costs = []
    for question in QUESTIONS:
        session.ask([free_query(question)])
        costs.append(sum(read))
        read.clear()
    hook.remove()
    assert encoded == ["encode_images", "features"]
    answers = [len(past.ids) for past in session.rounds]
    image = session.sample.image_tokens
    prompts = [
        len(
            session.assistant.encoder.continued(
                [(past.question, past.ids) for past in session.rounds[:n]], asked.question
            )
        )
        for n, asked in enumerate(session.rounds)
    ]
    # the last token of an answer is read with the next round; its state is not needed before
    assert costs[0] == prompts[0] - 1 + image + answers[0] - 1
    for n in (1, 2):
        assert costs[n] == prompts[n] - prompts[n - 1] - answers[n - 1] + 1 + answers[n] - 1


class Stop(Exception):
    pass


@pytest.mark.parametrize("when", ["between words", "inside a layer", "in the first reading"])
def test_what_interrupts_an_answer_leaves_the_conversation_as_it_was(predictors, when):
    predictor = predictors()
    expected = predictor.chat(IMAGE)
    texts = [expected.ask(question).text for question in QUESTIONS[:2]]
    conversation = predictor.chat(IMAGE)
    passes = []

    def interrupt(*_):
        passes.append(0)
        if len(passes) == (1 if when == "in the first reading" else 4):
            raise KeyboardInterrupt

    layer = predictor.assistant.model.vlm.language.model.layers[1]
    for question, text in zip(QUESTIONS, texts, strict=False):
        passes.clear()
        if when == "between words":
            with pytest.raises(Stop):
                conversation.ask("Something else?", on_text=lambda text: (_ for _ in ()).throw(Stop()))
        else:
            hook = layer.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                conversation.ask("Something else?")
            hook.remove()
        answer = conversation.ask(question)
        assert answer.text == text and len(conversation.session.rounds) == texts.index(text) + 1
    for one, other in zip(expected.ask(QUESTIONS[2]).segments, conversation.ask(QUESTIONS[2]).segments, strict=True):
        assert np.array_equal(one.mask, other.mask)


@pytest.mark.parametrize("family", ["llava", *FAMILIES])
def test_states_of_a_continued_row_are_those_of_the_whole_row(family, tmp_path):
    """Also with rotary positions on several axes and states added in the first layers."""
    if family == "llava":
        vlm, batch = tiny_model(seed=5).vlm, tiny_batch()
        vision = vlm.encode_images(batch.pixels[:1])
    else:
        stock_model(family).save_pretrained(tmp_path)
        vlm = load_backbone(tmp_path)
        image = np.random.default_rng(0).integers(0, 255, (30, 20, 3), np.uint8)
        vision = vlm.encode_images(vlm.view(image), [vlm.view.geometry(30, 20)])
    past, ids, read = Past(), [1, 5, *[IMAGE_ID] * vision.counts[0], 6, 7], []
    hook = vlm.language.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: read.append((args[0] if args else kwargs["hidden_states"]).shape[1]), with_kwargs=True
    )
    for question in ([11, 12, 13], [14, 15], [16]):
        row = torch.tensor([ids])
        inputs = (row, torch.ones_like(row, dtype=torch.bool), vision, torch.tensor([0]))
        again = vlm.generate(*inputs, max_new_tokens=6, eos=EOS)
        read.clear()
        going = vlm.generate(*inputs, max_new_tokens=6, eos=EOS, past=past)
        assert going.ids == again.ids and past.ids == [*ids, *going.ids[0][:-1]]
        torch.testing.assert_close(going.states, again.states, **CLOSE)
        assert read[0] == len(ids) if question[0] == 11 else read[0] < 5
        ids = [*ids, *going.ids[0], *question]
    hook.remove()


def test_a_cache_that_cannot_be_cropped_is_read_again():
    layer = SimpleNamespace(get_seq_length=lambda: 3)
    kept, fresh = SimpleNamespace(layers=[layer], is_croppable=False), SimpleNamespace(layers=[])
    assert Past([1, 2, 3], kept).resume([1, 2, 3, 4], fresh) == (kept, 3)
    past = Past([1, 2, 3], kept)
    assert past.resume([1, 2, 4, 5], fresh) == (fresh, 0) and past.ids == []


def test_more_rows_than_one_are_no_conversation():
    model, batch = tiny_model(), tiny_batch(masks=False)
    with pytest.raises(ValueError, match="one row"):
        model.vlm.generate(
            batch.ids.flip(1), batch.attention.flip(1), Vision(torch.zeros(8, 16), [4, 4]), batch.row_image,
            max_new_tokens=1, eos=EOS, past=Past(),
        )  # fmt: skip


# --- limits ----------------------------------------------------------------------------------------------------------


def test_the_oldest_rounds_are_dropped_never_the_image_and_it_is_said(predictors):
    predictor = predictors()
    full = predictor.chat(IMAGE)
    for question in QUESTIONS:
        full.ask(question)
    taken = len(full.session._memory.past.ids) + 1
    session = predictor.chat(IMAGE, most_positions=taken - 5).session
    first, second = (session.ask([free_query(question)]) for question in QUESTIONS[:2])
    assert not any("forgotten" in note for note in first.notes + second.notes)
    third = session.ask([free_query(QUESTIONS[2])])
    assert third.notes[0].startswith("The oldest round is forgotten") and str(taken - 5) in third.notes[0]
    assert [without_image(past.question) for past in session.rounds] == QUESTIONS[1:]
    assert session._memory.past.ids.count(IMAGE_ID) == session.sample.image_tokens
    kept = [(past.question, past.ids) for past in session.rounds[:1]]
    ids = predictor.assistant.encoder.continued(kept, free_query(QUESTIONS[2]).question)
    assert session.rounds[-1].ids == tuple(read_again(predictor, session, ids)[1])


def test_an_answer_that_is_cut_says_why(predictors):
    predictor = predictors()
    assert predictor.chat(IMAGE).ask(QUESTIONS[0]).notes == ["The answer was cut after 12 tokens (max_new_tokens)."]
    session = predictor.chat(IMAGE).session
    prompt = (
        len(predictor.assistant.encoder.prompt(free_query(QUESTIONS[0]).question)) - 1 + session.sample.image_tokens
    )
    answer = predictor.chat(IMAGE, most_positions=prompt + 7).ask(QUESTIONS[0])
    assert not answer.finished and answer.notes == [
        f"The answer was cut after 7 tokens: with it all {prompt + 7} positions are taken."
    ]
    with pytest.raises(ValueError, match=rf"takes {prompt} positions, .* leaves none of {prompt} for an answer"):
        predictor.chat(IMAGE, most_positions=prompt).ask(QUESTIONS[0])
    with pytest.raises(ValueError, match="1 to 2048 positions of this language model, not 4096"):
        predictor.chat(IMAGE, most_positions=4096)


# --- the API ---------------------------------------------------------------------------------------------------------


def test_questions_phrases_and_classes_are_rounds(predictors):
    conversation = predictors().chat(IMAGE)
    alone = predictors().ask(IMAGE, QUESTIONS[0])
    answer = conversation.ask(QUESTIONS[0])
    assert answer.text == alone.text
    for one, other in zip(answer.segments, alone.segments, strict=True):
        assert np.array_equal(one.mask, other.mask)
    answer = conversation.ask(["the dog", "the unicorn"])
    assert [segment.phrase for segment in answer.segments] == ["the dog", "the unicorn"]
    assert len(conversation.session.rounds) == 3 and answer.text.count("\n") >= 1
    assert [note.split(" was")[0] for note in answer.notes] == ["Answer 1 of 2", "Answer 2 of 2"]
    answer = conversation.ask(classes=["sky", "dog"])
    assert [segment.phrase for segment in answer.segments] == ["sky", "dog"]
    before = list(conversation.session.rounds)
    for words, match in (
        ({"question": None}, "one of the three"),
        ({"question": "a", "classes": ["b"]}, "one of the three"),
        ({"question": " "}, "empty"),
        ({"question": []}, "phrases are a list"),
        ({"classes": []}, "at least one name"),
        ({"question": "a [SEG] b"}, "may not be typed"),
        ({"question": f"{IMAGE_PLACEHOLDER} again"}, "in no other"),
    ):
        with pytest.raises(ValueError, match=match):
            conversation.ask(**words)
    assert conversation.session.rounds == before


@pytest.mark.parametrize("name", ["lisa", "pixellm"])
def test_the_text_streams_and_never_takes_a_word_back(predictors, name):
    conversation = predictors(name).chat(IMAGE)
    for words in (QUESTIONS[0], ["the dog", "the cat"]):
        texts = []
        answer = conversation.ask(words, on_text=texts.append)
        assert len(texts) > 3 and texts[-1] == answer.text
        assert all(later.startswith(text) for text, later in pairwise(texts))


def test_the_memory_of_a_conversation_is_freed_with_it(predictors):
    conversation = predictors().chat(IMAGE)
    conversation.ask(QUESTIONS[0])
    memory = conversation.session._memory
    kept = [weakref.ref(part) for part in (memory.past.cache.layers[0].keys, memory.vision, *memory.features)]
    gc.disable()  # without waiting for a collection of cycles
    try:
        del memory, conversation
        assert not [ref for ref in kept if ref() is not None]
    finally:
        gc.enable()


def test_threads_mix_nothing(predictors):
    predictor = predictors()
    other = np.asarray(Image.open(IMAGE).convert("RGB"))[::-1].copy()
    jobs = {
        "a": lambda: _talk(predictor, IMAGE, QUESTIONS[:2]),
        "b": lambda: _talk(predictor, other, QUESTIONS[1::-1]),
        # rows that share a prefix switch the model's attention while they are decoded
        "c": lambda: [segment.text for segment in predictor(IMAGE, ["the dog", "the cat", "the car"])],
    }
    expected = {name: job() for name, job in jobs.items()}
    found: dict[str, list[str]] = {}
    start = threading.Barrier(len(jobs))

    def work(name: str) -> None:
        start.wait()
        found[name] = jobs[name]()

    threads = [threading.Thread(target=work, args=[name]) for name in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def _talk(predictor: Predictor, image, questions: list[str]) -> list[str]:
    conversation = predictor.chat(image)
    return [conversation.ask(question).text for question in questions]


def test_the_example_of_the_documents_runs(predictors, tmp_path, monkeypatch):
    monkeypatch.setattr(Predictor, "from_pretrained", lambda path: predictors())
    monkeypatch.chdir(tmp_path)
    Image.open(IMAGE).convert("RGB").save("street.jpg")
    page = (ROOT / "docs" / "conversation.md").read_text(encoding="utf-8")
    found: dict[str, Any] = {}
    exec(re.search("```python\n(.*?)```", page, re.DOTALL)[1], found)
    assert len(found["answer"].segments) == 3 and found["conversation"].session.rounds == []


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_which_systems_train_on_several_rounds_with_masks(system):
    """What docs/conversation.md says of them."""

    def mask():
        return np.ones((4, 4), bool)

    targets = (Target("red car", mask), Target("tree", mask))
    explained = ((Turn("", ("Because it is red.",)),),)
    asked = tuple((Turn(f"Where {number}?", ("It is ", Mask(number), ".")),) for number in range(2))
    records = [
        Record(IMAGE, "classes", targets, vocabulary=("red car", "tree", "sea")),
        Record(IMAGE, "refer", targets),
        Record(IMAGE, "reason", (Target("What is red?", mask),), dialogues=explained),
        Record(IMAGE, "multi", targets, dialogues=asked),
    ]
    task = build_system(system).task
    rounds = set()
    for record, seed in product(records, range(3)):
        try:
            dialogues = task.converse(record, np.random.default_rng(seed))
        except (ValueError, KeyError):  # a system without this kind of data
            continue
        rounds.update(map(len, dialogues))
    assert (max(rounds) > 1) == (system == "sa2va")
