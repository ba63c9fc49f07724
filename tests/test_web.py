"""The page's server as programs meet it: the documented API, and what it refuses. Sessions do not mix."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

import app
from evaluation.predictor import Predictor
from tests.records import OWN, ROOT
from tests.test_chat_talk import Terminal
from tests.test_web_visit import png_header
from tests.tiny_assistant import tiny
from tests.webdriver import wait_for
from toy.page_examples import EXAMPLES, write_examples
from toy.world.scene import make_scene, scene_seed

IMAGE = OWN / "lisa" / "image0.png"
NEW = 12  # tokens of an answer
NO_GRADIO = "" if find_spec("gradio") else "Gradio is not installed (requirements-web.txt)"
needs_gradio = pytest.mark.skipif(bool(NO_GRADIO), reason=NO_GRADIO)


@contextmanager
def page(*words: str, seconds_per_token: float = 0.0) -> Generator[str]:
    """The address of a page with these flags, of a tiny assistant that takes its time for a word."""
    assistant = tiny("lisa", eager=5)
    layer = assistant.model.vlm.language.model.layers[0]
    layer.register_forward_pre_hook(lambda *_: time.sleep(seconds_per_token))
    args = app.parse(
        ["--version", "tiny", "--max_new_tokens", str(NEW), "--max_upload", "1", "--max_pixels", "2", *words]
    )
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(app, "load_assistant", lambda _: assistant)
            address = stack.enter_context(app.served(args))
        yield address.rstrip("/")


@pytest.fixture(scope="module")
def address():
    with page() as address:
        yield address


def request(address: str, method: str, path: str, body: object = None, kind: str = "application/json"):
    """Status, headers and body of a plain HTTP request; the path is sent as it stands."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    connection.request(method, path, data, {"Content-Type": kind})
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def upload(address: str, name: str, content: bytes):
    body = (
        f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
        "Content-Type: image/png\r\n\r\n".encode()
        + content
        + b"\r\n--x--\r\n"
    )
    return request(address, "POST", "/gradio_api/upload", body, "multipart/form-data; boundary=x")


def call(address: str, name: str, data: list, session: str = "") -> tuple[str, object]:
    """What an endpoint says last, by the plain protocol: the name of the event and its data."""
    body = {"data": data} | ({"session_hash": session} if session else {})
    status, _, found = request(address, "POST", f"/gradio_api/call/{name}", body)
    assert status == 200, found
    events = request(address, "GET", f"/gradio_api/call/{name}/{json.loads(found)['event_id']}")[2].decode()
    event, said = re.findall(r"event: (\w+)\ndata: (.*)", events)[-1]
    return event, json.loads(said)


@needs_gradio
def test_the_documented_call_gives_the_answers_of_the_predictor(address):
    """Two clients in turn: each has its own image and conversation."""
    from gradio_client import Client, handle_file

    one, other = (Client(address, verbose=False) for _ in range(2))
    assert {"/open", "/ask", "/forget"} == set(one.view_api(return_format="dict")["named_endpoints"])
    opened = one.predict(handle_file(str(IMAGE)), api_name="/open")
    height, width = np.asarray(Image.open(IMAGE)).shape[:2]
    assert opened == {"image": "image0.png", "width": width, "height": height}
    with pytest.raises(Exception, match="no image yet"):
        other.predict("Where is the dog?", "question", api_name="/ask")

    conversation = Predictor(tiny("lisa", eager=5), max_new_tokens=NEW).chat(IMAGE)
    job = one.submit("Where is the dog?", "question", api_name="/ask")
    answer = job.result(timeout=60)
    same = conversation.ask("Where is the dog?")
    assert answer["text"] == same.text and answer["notes"] == same.notes
    texts = [part["text"] for part in job.outputs()]
    assert len(texts) > 3 and all(new.startswith(old) for old, new in pairwise(texts))
    present = [segment for segment in same.segments if segment.present]
    assert len(answer["masks"]) == len(answer["coco"]) == len(present) > 0
    for shown, entry, segment in zip(answer["masks"], answer["coco"], present, strict=True):
        assert np.array_equal(coco_mask.decode(entry["segmentation"]).astype(bool), segment.mask)
        assert shown["area"] == entry["area"] == segment.mask.sum() and shown["score"] == pytest.approx(segment.score)
    second = one.predict("And the cat?", "question", api_name="/ask")
    assert second["text"] == conversation.ask("And the cat?").text
    assert one.predict(api_name="/forget") == {"rounds": 0}
    assert one.predict("Where is the dog?", "question", api_name="/ask")["text"] == answer["text"]
    with pytest.raises(Exception, match="names with commas between them"):
        one.predict(" ", "phrases", api_name="/ask")


@needs_gradio
def test_a_question_leaves_its_line_when_it_is_asked_and_returns_when_it_is_refused(tmp_path):
    """So that a next one may be typed while the model answers."""
    import gradio as gr

    from web.page import _Page
    from web.visit import FREE, PHRASES, Visits

    page = _Page(Visits(Predictor(tiny("lisa", eager=5), max_new_tokens=NEW), tmp_path, max_pixels=10**6, most=2))
    visitor = SimpleNamespace(session_hash="one")

    def lines() -> list[object]:
        return [update[0] for update in page.ask(visitor)]

    assert page.wait(FREE, "No image?", visitor)[0] == "" and lines() == ["No image?"]
    page.open(str(IMAGE), visitor)
    assert page.wait(FREE, "Where is the dog?", visitor)[0] == ""
    answers = page.ask(visitor)
    next(answers)
    assert page.wait(FREE, "And the cat?", visitor) == (gr.skip(), gr.skip()), "the model is not free: it stays typed"
    assert {str(update[0]) for update in answers} == {str(gr.skip())} and lines() == [gr.skip()]
    assert page.wait(PHRASES, " , ", visitor)[0] == "" and lines() == [" , "]
    page.wait(FREE, "Stopped?", visitor)
    page.stop(visitor)
    assert lines() == ["Stopped?"]


@needs_gradio
def test_a_question_is_about_the_image_that_was_open_when_it_was_asked(tmp_path):
    """Not about one that its client opened while it waited for another's answer."""
    from gradio_client import Client, handle_file

    other = tmp_path / "other.png"
    Image.new("RGB", (90, 50)).save(other)
    with page(seconds_per_token=0.2) as address:
        one, busy = (Client(address, verbose=False) for _ in range(2))
        for client in (one, busy):
            client.predict(handle_file(str(IMAGE)), api_name="/open")
        first = busy.submit("Where is the dog?", "question", api_name="/ask")
        wait_for(lambda: first.outputs())
        waiting = one.submit("Where is the dog?", "question", api_name="/ask")
        wait_for(lambda: waiting.status().rank is not None)
        assert not first.done() and one.predict(handle_file(str(other)), api_name="/open")["width"] == 90
        with pytest.raises(Exception, match="Stopped: the conversation is as if this had not been asked"):
            waiting.result(timeout=60)
        with pytest.raises(Exception, match="no kind of question 'colours'; have: question, phrases, classes"):
            one.predict("Where?", "colours", api_name="/ask")


@needs_gradio
def test_nothing_outside_the_folder_of_the_page_can_be_read(address, tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (40, 30), (1, 2, 3)).save(secret)
    (cached,) = json.loads(upload(address, "mine.png", IMAGE.read_bytes())[2])
    uploads = Path(cached).parents[1]
    meta = {"meta": {"_type": "gradio.FileData"}}
    for path in (
        "/etc/passwd", str(secret), str(ROOT / "app.py"), f"{cached}/../../../../../etc/passwd",
        f"{uploads}/../toy_images/toy_scene_0.png", f"{address}/gradio_api/file={cached}", "file:///etc/passwd",
    ):  # fmt: skip
        for data in ({"path": path, **meta}, {"path": path, "url": path, **meta}):
            event, said = call(address, "open", [data])
            assert event == "error", (path, said)
            assert not isinstance(said, dict) or "image" not in said
        assert request(address, "GET", f"/gradio_api/file={path}")[0] == 403, path
        assert request(address, "GET", f"/gradio_api/file={path.replace('/', '%2F')}")[0] in (403, 404), path
    assert call(address, "open", [{"path": cached, **meta}])[0] == "complete"
    event, said = call(address, "open", [{"path": "https://example.com/a.png", **meta}])
    assert event == "error" and "addresses are not opened" in json.dumps(said)
    assert request(address, "GET", "/gradio_api/proxy=https://example.com/a.png")[0] == 403


@needs_gradio
def test_a_file_too_large_is_refused_before_it_is_stored_and_one_with_too_many_pixels_before_it_is_decoded(address):
    assert upload(address, "large.png", b"\0" * (2**20 + 1000))[0] == 413
    for size in ((2000, 1001), (60000, 60000)):
        (cached,) = json.loads(upload(address, "bomb.png", png_header(*size))[2])
        event, said = call(address, "open", [{"path": cached, "meta": {"_type": "gradio.FileData"}}])
        assert event == "error" and "pixels" in said["error"] and cached not in said["error"]


@needs_gradio
def test_the_page_names_no_other_server(address):
    status, headers, page = request(address, "GET", "/")
    assert status == 200 and "connect-src 'self'" in headers["content-security-policy"]
    loaded = re.findall(rb"(?:src|href)=\"(https?:)?//([^\"]+)\"", page)
    assert not loaded, loaded


@needs_gradio
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="no /proc/net/tcp, which lists what listens")
def test_only_this_machine_can_connect(address):
    port = int(address.rpartition(":")[2])
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = {line[1] for line in lines if line[3] == "0A" and line[1].endswith(f":{port:04X}")}
    assert listening == {f"0100007F:{port:04X}"}


def start(*words: str, before: str = "") -> subprocess.CompletedProcess:
    program = f"import sys; {before}; import app; raise SystemExit(app.main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True, timeout=100
    )


HANGING_UP = """
import contextlib, os, pathlib, signal, sys, time, app
app.importlib.util.find_spec = lambda name: name
keeps, cleaned = sys.argv.pop(), pathlib.Path(sys.argv.pop())
signal.signal(signal.SIGHUP, signal.SIG_IGN if keeps else signal.SIG_DFL)  # whatever the tests run under

@contextlib.contextmanager
def served(args):
    try:
        yield str(os.getpid())
    finally:
        os.kill(os.getpid(), signal.SIGHUP)  # a shell sends it again
        time.sleep(0.1)
        cleaned.touch()

app.served = served
raise SystemExit(app.main([]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="terminals that hang up are POSIX")
@pytest.mark.parametrize("keeps", ["", "nohup"])
def test_a_terminal_that_is_closed_ends_the_page_with_its_clean_up_but_not_under_nohup(tmp_path, keeps):
    cleaned = tmp_path / "cleaned"
    terminal = Terminal([sys.executable, "-c", HANGING_UP, str(cleaned), keeps])
    try:
        terminal.wait_for("page is at .*\n")  # the whole line: what is still being written would fail
        os.close(terminal.master)
        if keeps:
            with pytest.raises(subprocess.TimeoutExpired):
                terminal.program.wait(1)
            terminal.program.terminate()
        terminal.program.wait(60)
        assert cleaned.exists()
    finally:
        terminal.program.kill()
        terminal.program.wait()


def test_without_gradio_the_program_says_in_one_line_what_to_install():
    hidden = "import importlib.util as u; u.find_spec = lambda name: None"
    done = start(before=hidden)
    assert (
        done.returncode == 1 and done.stderr.count("\n") == 1 and "pip install -r requirements-web.txt" in done.stderr
    )


@needs_gradio
def test_an_address_that_cannot_be_had_is_an_error_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for words in (["--port", str(taken.getsockname()[1])], ["--port", "99999"], ["--host", "no such host"]):
            with pytest.raises(SystemExit, match=r"app.py: cannot listen at \S+"):
                app.main(words)


def test_help_loads_neither_torch_nor_gradio():
    watch = "import atexit; atexit.register(lambda: print({'torch', 'gradio', 'numpy'} & set(sys.modules)))"
    done = start("--help", before=watch)
    assert "usage:" in done.stdout and done.stdout.endswith("set()\n")


@needs_gradio
@pytest.mark.slow
def test_the_program_serves_the_toy_assistant_and_leaves_nothing_behind(tmp_path):
    command = [sys.executable, str(ROOT / "app.py")]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as server:
        line = next(line for line in server.stdout if "page is at" in line)
        address = re.search(r"http://127\.0\.0\.1:\d+", line).group()
        assert request(address, "GET", "/")[0] == 200
        assert len(list(tmp_path.iterdir())) == 1
        server.terminate()
        assert server.wait(60) == 0
    assert not list(tmp_path.iterdir())


def test_the_toy_assistant_answers_the_examples(tmp_path, monkeypatch):
    """What a newcomer sees: from any folder, and with masks that are right."""
    monkeypatch.chdir(tmp_path)
    args = app.parse([])
    app.use_toy(args)
    predictor = Predictor(app.load_assistant(args), max_new_tokens=64)
    right = {}
    for (index, kind, words), (file, *_) in zip(EXAMPLES, write_examples(tmp_path), strict=True):
        truth: dict[str, np.ndarray] = {}
        for thing in make_scene(scene_seed("val", index)).things:
            for name in (thing.name, f"the {thing.color} {thing.name}"):
                truth[name] = truth.get(name, False) | thing.mask
        conversation, names = predictor.chat(file), words.split(", ")
        asked = {"classes": {"classes": names}, "phrases": {"question": names}, "question": {"question": words}}[kind]
        for segment in conversation.ask(**asked).segments:
            name = "boat" if kind == "question" else segment.phrase  # what the question is about
            right[index, name] = segment.present == (name in truth)
            if segment.present and name in truth:
                right[index, name] = iou(segment.mask, truth[name]) > 0.6
    assert len(right) == 14 and sum(right.values()) >= 13, right


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return (one & other).sum() / (one | other).sum()
