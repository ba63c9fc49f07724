"""Visits of the page without its server: what a visitor can ask, what goes wrong, and that nobody sees another's."""

from __future__ import annotations

import base64
import gc
import io
import struct
import threading
import time
import weakref
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.types import Claim, Query
from evaluation.export.answers import claim_names, unmentioned
from evaluation.predictor import Predictor
from evaluation.protocols import Reply
from tests.records import OWN
from tests.tiny_assistant import tiny
from web.view import MASKS, SIDE, shown
from web.visit import CLASSES, FREE, PHRASES, STOPPED, Answer, Question, Refused, Visit, Visits, names_of, safe_name

IMAGE = OWN / "lisa" / "image0.png"
ASKED = "Where is the dog?"


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(tiny("lisa", eager=5), max_new_tokens=6)


@pytest.fixture
def visits(predictor, tmp_path) -> Visits:
    return Visits(predictor, tmp_path, max_pixels=10**6, most=2)


def ask(visit: Visit, kind: str, words: str) -> Answer:
    """The answer, whose texts grow."""
    texts, answers = [""], visit.ask(Question(kind, words, visit.talk))
    while True:
        try:
            texts.append(next(answers))
        except StopIteration as done:
            assert all(new.startswith(old) for old, new in pairwise(texts))
            assert texts[-1] == done.value.text
            return done.value


def test_answers_are_those_of_the_predictor_and_each_has_its_files(visits, predictor):
    visit, conversation = visits.of("one"), predictor.chat(IMAGE)
    talk = visit.open(IMAGE)
    assert talk.size == np.asarray(Image.open(IMAGE)).shape[:2]
    for kind, words, same in (
        (FREE, ASKED, {"question": ASKED}),
        (PHRASES, "the dog, a cat", {"question": ["the dog", "a cat"]}),
        (CLASSES, "sky\nroad,sky ", {"classes": ["sky", "road"]}),
    ):
        answer = ask(visit, kind, words)
        assert answer.text == conversation.ask(**same).text
        assert answer.report["masks"] and Path(answer.report["overlay"]).is_file()
    assert [one.asked for one in talk.answers] == [ASKED, "the dog, a cat", "sky\nroad,sky"]
    view = shown(talk)
    assert [len(one["masks"]) for one in view["answers"]] == [len(one.report["masks"]) for one in talk.answers]
    visit.forget()
    assert ask(visit, FREE, ASKED).text == predictor.ask(IMAGE, ASKED).text


def png_header(width: int, height: int) -> bytes:
    """A PNG file that claims a size and has nearly no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def test_images_that_cannot_be_used_are_refused_in_a_sentence_and_leave_the_one_before(visits, tmp_path):
    visit = visits.of("one")
    with pytest.raises(Refused, match="no image yet"):
        next(visit.ask(Question(FREE, ASKED, visit.talk)))
    talk = visit.open(IMAGE)
    files = {
        "large.png": (png_header(2000, 1000), r"2000 x 1000 pixels are too many: at most 1 million"),
        "bomb.png": (png_header(60000, 60000), r"60000 x 60000|limit"),
        "text.png": (b"no image at all", "damaged, or in no known format"),
        "cut.png": (IMAGE.read_bytes()[:150], "cut.png"),
        "empty.jpg": (b"", "damaged, or in no known format"),
    }
    for name, (content, why) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Refused, match=why) as refused:
            visit.open(tmp_path / name)
        assert str(tmp_path) not in str(refused.value), "folders of this machine are not for visitors"
    with pytest.raises(Refused, match="upload an image"):
        visit.open(None)
    assert visit.talk is talk and talk.image.is_file()
    assert [place.name for place in visit.folder.iterdir()] == [talk.image.parent.name]


def test_questions_that_cannot_be_asked_are_refused_in_a_sentence(visits, monkeypatch):
    visit = visits.of("one")
    visit.open(IMAGE)
    monkeypatch.setenv("ASSISTANT_MAX_NAMES", "3")
    for kind, words, why in (
        (FREE, "  ", "the question is empty"),
        (PHRASES, " , ", "names with commas between them"),
        (CLASSES, "", "names with commas between them"),
        (CLASSES, "a, b, c, d", "4 names, more than the limit of 3"),
        ("prose", "x", "no kind of question 'prose'"),
        (FREE, "x" * 40000, "more than the limit of 32768"),
        (FREE, "a [SEG] b", "SEG"),
    ):
        with pytest.raises(Refused, match=why):
            ask(visit, kind, words)
    assert not visit.talk.answers and ask(visit, FREE, ASKED).text


def test_an_error_of_the_program_is_a_sentence_and_a_line_for_the_log(visits, monkeypatch, capsys):
    visit = visits.of("one")
    talk = visit.open(IMAGE)
    monkeypatch.setattr(talk.conversation.session, "ask", lambda *_: 1 / 0)
    with pytest.raises(Refused, match="the program failed"):
        ask(visit, FREE, ASKED)
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_an_answer_that_cannot_be_saved_is_a_sentence_and_no_round(visits, monkeypatch):
    visit = visits.of("one")
    talk = visit.open(IMAGE)
    assert ask(visit, FREE, ASKED).text

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("web.visit.save_answer", full)
        with pytest.raises(Refused, match=r"cannot be saved: .*No space left"):
            ask(visit, FREE, "And the sky?")
    assert len(talk.answers) == len(talk.conversation.session.rounds) == 1
    assert ask(visit, FREE, "And the sky?").text and len(talk.conversation.session.rounds) == 2


def test_a_second_enter_does_not_take_the_place_of_a_question_that_waits(visits):
    visit = visits.of("one")
    visit.open(IMAGE)
    assert visit.wait(FREE, ASKED) and not visit.wait(FREE, " ")
    assert visit.turn().words == ASKED


def test_an_answer_can_be_stopped_left_and_overtaken(visits, request):
    layer = visits.predictor.assistant.model.vlm.language.model.layers[0]
    hook = layer.register_forward_pre_hook(lambda *_: time.sleep(0.03))  # so that it is not written before that
    request.addfinalizer(hook.remove)
    visit = visits.of("one")
    visit.open(IMAGE)
    for interrupt in (
        lambda answers: visit.stop(),
        lambda answers: answers.close(),
        lambda answers: visit.open(IMAGE),
        lambda answers: visit.forget(),
    ):
        talk, answers = visit.talk, visit.ask(Question(FREE, ASKED, visit.talk))
        next(answers)
        interrupt(answers)
        with pytest.raises((Refused, StopIteration)) as refused:
            for _ in range(50):
                next(answers)
        if refused.type is Refused:
            assert "Stopped" in str(refused.value)
        assert not talk.answers and not talk.conversation.session.rounds
        assert not visit.talk.answers
    assert len(ask(visit, FREE, ASKED).report["masks"]) and len(visit.talk.answers) == 1


@pytest.mark.parametrize("interrupt", ["stop", "forget", "open"])
def test_a_question_that_waits_for_its_turn_is_interrupted_as_one_that_is_answered(visits, interrupt):
    visit = visits.of("one")
    visit.open(IMAGE)
    assert visit.turn() is None and visit.wait(FREE, "Never asked?") and visit.wait(FREE, ASKED)
    getattr(visit, interrupt)(*([IMAGE] if interrupt == "open" else []))
    question = visit.turn()
    with pytest.raises(Refused, match=STOPPED):
        next(visit.ask(question))
    assert question.words == ASKED and not visit.talk.conversation.session.rounds
    assert visit.wait(FREE, ASKED) and not visit.answering
    answers = visit.ask(visit.turn())  # an interruption counts for one question
    next(answers)
    assert not visit.wait(FREE, "Too early?") and visit.turn() is None
    answers.close()
    assert visit.wait(FREE, ASKED) and visit.turn().words == ASKED


def test_starting_over_waits_for_nobody_else_s_answer(visits):
    one, other = visits.of("one"), visits.of("two")
    one.open(IMAGE)
    other.open(IMAGE)
    ask(one, FREE, ASKED)
    with visits.predictor.assistant.lock:  # as while the other's answer is written
        done = threading.Thread(target=one.forget)
        done.start()
        done.join(10)
        assert not done.is_alive()
    assert not one.talk.answers and not one.talk.conversation.session.rounds


def test_visits_are_apart_and_end_with_their_memory_and_files(visits, tmp_path):
    other = tmp_path / "other.png"
    Image.fromarray(np.asarray(Image.open(IMAGE).convert("RGB"))[::-1].copy()).save(other)
    first, second = visits.of("one"), visits.of("two")
    first.open(IMAGE)
    second.open(other)
    answers = {}

    def talk(visit: Visit, words: str) -> None:
        answers[words] = [ask(visit, FREE, words).text for _ in range(2)]

    threads = [threading.Thread(target=talk, args=pair) for pair in ((first, ASKED), (second, "And the sky?"))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert visits.of("one") is first and [one.asked for one in first.talk.answers] == [ASKED] * 2
    assert [one.asked for one in second.talk.answers] == ["And the sky?"] * 2
    alone = visits.predictor.chat(other)
    assert answers["And the sky?"] == [alone.ask("And the sky?").text for _ in range(2)]

    memory, place = weakref.ref(second.talk.conversation.session), second.folder
    del second, threads
    visits.of("three")  # of more than two the one unused for the longest ends
    gc.collect()
    assert len(visits) == 2 and memory() is None and not place.exists()
    visits.leave("one")
    visits.leave("nobody")
    assert len(visits) == 1 and not first.folder.exists() and first.talk is None
    visits.close()
    assert len(visits) == 0 and not [place for place in tmp_path.iterdir() if place.is_dir()]


def test_what_is_shown_is_small_and_the_files_have_the_size_of_the_image(visits, tmp_path):
    wide = tmp_path / "wide.png"
    Image.open(IMAGE).convert("RGB").resize((1600, 160)).save(wide)
    visit = visits.of("one")
    talk = visit.open(wide)
    answer = ask(visit, FREE, ASKED)
    view = shown(talk)
    assert view["answers"][0]["masks"][0]["area"] == answer.report["masks"][0]["area"]
    assert Image.open(answer.report["masks"][0]["file"]).size == (1600, 160)
    for part in (view["image"], view["answers"][0]["masks"][0]["png"]):
        assert Image.open(io.BytesIO(base64.b64decode(part.partition(",")[2]))).size == (SIDE, 128)
    most = len(answer.report["masks"])
    talk.answers.extend([answer] * (MASKS // most + 5))
    assert sum(len(one["masks"]) for one in shown(talk)["answers"]) <= MASKS
    assert shown(talk)["answers"][-1]["number"] == len(talk.answers)


def test_names_of_files_and_lists():
    assert names_of(" sky, the car\nsky,,") == ["sky", "the car"]
    assert safe_name("../../etc/pass wd.PNG") == "pass_wd.PNG"
    assert safe_name("<img src=x onerror=1>.png") == "_img_src_x_onerror_1_.png"
    assert safe_name("猫.jpg") == "猫.jpg" and safe_name("") == "image"
    assert len(safe_name("x" * 500 + "." + "y" * 500)) < 90


def test_masks_are_named_by_what_was_asked_and_silence_is_noticed():
    def reply(*claims: Claim) -> Reply:
        return Reply("", claims, torch.zeros(len(claims), 2, 2))

    one = Query("Where is the dog?", (), phrases=("the dog",))
    said = reply(Claim("I found it", 0), Claim("a cat", 1, is_substitute=True))
    assert claim_names(one, said) == ["the dog", "a cat"]
    assert unmentioned(one, reply()) == ["the dog"] and unmentioned(one, reply(Claim("", None))) == []
    classes = Query("Segment.", (), phrases=("sky", "car", "dog"))
    said = reply(Claim("Sky", 0), Claim("", None), Claim("bus", 1))
    assert claim_names(classes, said) == ["sky", "car", "bus"] and unmentioned(classes, said) == ["dog"]
    free = Query("Where?", ())
    assert claim_names(free, reply(Claim("It is", 0))) == ["It is"] and unmentioned(free, reply(Claim("", 0))) == []
