"""chat.py in conversation: lines from a pipe, and keys typed at a pseudo-terminal."""

from __future__ import annotations

import io
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import chat
from evaluation.console import Console, Typist, remembered_interrupt, typed_path
from tests.records import OWN, ROOT
from tests.tiny_assistant import tiny

IMAGE = OWN / "lisa" / "image0.png"
NEW = 10
# a tiny assistant whose mask token is loud, and that takes its time for every word
PROGRAM = """
import sys, time, chat
from tests.tiny_assistant import tiny
assistant = tiny("lisa", eager=5)
assistant.model.vlm.language.model.layers[0].register_forward_pre_hook(lambda *_: time.sleep(0.15))
chat.load_assistant = lambda args: assistant
raise SystemExit(chat.main(sys.argv[1:]))
"""


def flags(folder: Path) -> list[str]:
    return ["--version", "tiny", "--max_new_tokens", str(NEW), "--vis_save_path", str(folder)]


@pytest.fixture
def piped(monkeypatch, capsys):
    """Runs the program in this process, with lines from a pipe; returns its exit status and what it printed."""
    assistant = tiny("lisa", eager=5)
    monkeypatch.setattr(chat, "load_assistant", lambda args: assistant)

    def run(folder: Path, lines: list[str], *words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        status = chat.main([*flags(folder), *words])
        return status, capsys.readouterr().out

    return run


def test_a_conversation_through_a_pipe(tmp_path, piped):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    damaged = tmp_path / "broken.png"
    damaged.write_bytes(IMAGE.read_bytes()[:200])
    lines = ["/new", "/image", "/image nowhere.png", f"/image {damaged}", f"/image {IMAGE}", "/save"]
    lines += ["Where is the dog?", "And the cat?", "", "/classes sky, dog", "/classes ,", "/classes sky, sky"]
    lines += ["/sav", "a [SEG] b", f"/save {elsewhere}", "/save", "/new", "Where is the dog?", "/help"]
    status, said = piped(out, lines)
    assert status == 0
    for sentence in (
        "There is no conversation yet",
        "/image needs the path",
        "Cannot open the image: no image nowhere.png",
        "broken.png",
        f"A conversation about {IMAGE} (160 x 120)",
        "nothing was asked yet",
        "The prompt is empty",
        "/classes needs names",
        "Cannot answer: ",
        "no command '/sav' (did you mean '/save'?); have: /classes, /help, /image, /new, /quit, /save",
        "may not be typed",
        f"Saved 3 answers in {elsewhere / 'image0_conversation'}",
        f"Saved 3 answers in {out / 'image0_conversation'}",
        f"A new conversation about {IMAGE}",
        f"The answer was cut after {NEW} tokens (max_new_tokens).",
        f"Answer 2 of 2 was cut after {NEW} tokens",
    ):
        assert sentence in said, sentence
    reports = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in out.glob("*.json")}
    assert sorted(reports) == ["image0", "image0_2", "image0_3", "image0_4"]
    first, second, classes, again = (reports[name] for name in sorted(reports))
    assert again["answers"] == first["answers"] and second["answers"] != first["answers"]
    assert len(classes["answers"]) == 2 and first["masks"]
    for report in reports.values():
        assert all(answer["text"] in said for answer in report["answers"])
        assert all(np.asarray(Image.open(mask["file"])).shape == (120, 160) for mask in report["masks"])
    whole = json.loads((elsewhere / "image0_conversation" / "conversation.json").read_text(encoding="utf-8"))
    assert [entry["answers"] for entry in whole["rounds"]] == [r["answers"] for r in (first, second, classes)]
    files = [Path(mask["file"]) for entry in whole["rounds"] for mask in entry["masks"]]
    files += [Path(entry["overlay"]) for entry in whole["rounds"]]
    assert len(set(files)) == len(files) and all((elsewhere / "image0_conversation" / file).is_file() for file in files)


def test_an_image_on_the_command_line_opens_its_conversation(tmp_path, piped):
    status, _ = piped(tmp_path, ["Where is the dog?", "/quit", "never asked"], "--image", str(IMAGE))
    assert status == 0 and [path.name for path in tmp_path.glob("*.json")] == ["image0.json"]
    status, said = piped(tmp_path / "c", [], "--image", "nowhere.png")
    assert status == 1 and "Cannot open the image: no image nowhere.png" in said


def test_in_the_loop_of_the_original_a_question_knows_nothing_of_earlier_ones(tmp_path, piped):
    status, said = piped(tmp_path, ["Where is the dog?", str(IMAGE)] * 2 + ["Where?"])
    assert status == 0 and said.count("Please input the image path") == 3
    first, second = (json.loads((tmp_path / name).read_text())["answers"] for name in ("image0.json", "image0_2.json"))
    assert first == second


def test_a_command_or_nothing_in_place_of_the_image_drops_the_question(tmp_path, piped):
    status, said = piped(tmp_path, ["Where?", "", "Where?", f"/image {IMAGE}", "/new", "/quit", "never asked"])
    assert status == 0 and "No image: the question is dropped." in said and f"A conversation about {IMAGE}" in said
    status, said = piped(tmp_path, ["Where?", "/quit", "never asked"])
    assert status == 0 and said.count("Please input your prompt") == 1 and "Cannot answer" not in said
    status, said = piped(tmp_path, ["Where?", f"'{IMAGE}'"])  # a path that begins with a slash is no command
    assert status == 0 and "saved " in said


def test_ctrl_c_drops_a_line_and_asks_again_or_returns(monkeypatch):
    keys = iter([KeyboardInterrupt, "typed ", KeyboardInterrupt])

    def read(_: str) -> str:
        key = next(keys)
        if isinstance(key, str):
            return key
        raise key

    monkeypatch.setattr("builtins.input", read)
    assert Console([]).read("> ") == "typed" and Console([]).read("> ", again=False) == ""


@pytest.mark.skipif(os.sep != "/", reason="backslashes stand between folders here")
def test_paths_are_read_as_they_are_typed_and_pasted(tmp_path, monkeypatch, piped):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ["plain.png", "two words.png", "it's (1).png", 'a "b" c.png', "back\\slash.png", "~", "'quoted'.png"]
    for name in names:
        file = tmp_path / name
        file.write_bytes(IMAGE.read_bytes())
        pasted = re.sub(r"([^\w/.~-])", r"\\\1", str(file))
        for typed in (str(file), shlex.quote(str(file)), pasted, f"~/{name}"):
            assert typed_path(typed) == str(file), typed
    assert typed_path("new folder") == "new folder" and typed_path("'new folder'") == "new folder"
    assert typed_path("~/new") == str(tmp_path / "new") and typed_path("") == "" and typed_path("it's") == "it's"
    _, said = piped(tmp_path / "out", [f'/image "{tmp_path}/two words.png"', "Where?", "/save ~/kept"])
    assert "Saved 1 answers in" in said and (tmp_path / "kept").is_dir() and not Path("~").exists()


def test_rounds_that_no_longer_fit_are_dropped_with_a_sentence(tmp_path, piped):
    lines = ["Where is the dog?", "And the cat?", "Is it on the road?"]
    _, said = piped(tmp_path, lines, "--image", str(IMAGE), "--model_max_length", "400")
    assert "would take more than 400 positions" in said and len(list(tmp_path.glob("*.json"))) == 3
    _, said = piped(tmp_path, ["Where?"], "--image", str(IMAGE), "--model_max_length", "100")
    assert "Cannot answer: " in said and "leaves none of 100 for an answer" in said


def test_a_ctrl_c_that_something_drops_stops_at_the_next_word(capsys):
    """C code that looks up an attribute drops what Python code raises in it (`PyObject_HasAttr`)."""
    before = signal.default_int_handler
    signal.signal(signal.SIGINT, before)
    with remembered_interrupt() as check:
        typist = Typist(check)
        typist("The cat")
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            typist("The cat is")
    assert capsys.readouterr().out == "The cat" and signal.getsignal(signal.SIGINT) is before


class Terminal:
    """A program at a pseudo-terminal."""

    def __init__(self, words: list[str]):
        import pty

        self.master, slave = pty.openpty()
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "TERM": "dumb"}
        self.program = subprocess.Popen(
            words,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=ROOT,
            env=env,
            start_new_session=True,
            preexec_fn=_own_terminal,
        )
        os.close(slave)
        self.shown = ""

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def wait_for(self, pattern: str, seconds: float = 120) -> str:
        """What was shown up to the pattern, which is taken away."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown)):
            ready, _, _ = select.select([self.master], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no {pattern!r} in {self.shown!r}"
            try:
                self.shown += os.read(self.master, 4096).decode(errors="replace")
            except OSError:
                raise AssertionError(f"the program ended without {pattern!r}: {self.shown!r}") from None
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before


def _own_terminal() -> None:
    """Makes the pseudo-terminal that of the process, so that Ctrl-C reaches it."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_keys_at_a_terminal(tmp_path):
    pytest.importorskip("readline")
    long = ["--max_new_tokens", "50"]  # an answer that lasts until the key is pressed, on a busy machine, too
    terminal = Terminal([sys.executable, "-c", PROGRAM, *flags(tmp_path), "--image", str(IMAGE), *long])
    try:
        terminal.wait_for("lists the commands.\r?\n.*> ")
        terminal.type("Where is the dog?\r")
        terminal.wait_for("Where is the dog\\?\r?\n")
        terminal.wait_for("[^\\s]")  # the first word is there
        assert "saved" not in terminal.shown, "words come one by one"
        terminal.type("\x03")
        terminal.wait_for("Stopped: the conversation is as if this had not been asked.*\\n.*> ")
        assert not list(tmp_path.glob("*.json"))
        terminal.type("\x1b[A")  # the arrow key brings the question back
        terminal.wait_for("Where is the dog\\?")
        terminal.type("\r")
        terminal.wait_for("saved .*image0_overlay.png\r?\n(.*\n)*.*> ")
        terminal.type("half a line")
        terminal.wait_for("half a line")
        time.sleep(0.5)  # Python notices a signal at a prompt only once it waits for the next key
        terminal.type("\x03")
        terminal.wait_for("/quit or Ctrl-D leaves.*\n.*> ")
        terminal.type("\x04")
        assert terminal.program.wait(60) == 0
    finally:
        terminal.program.kill()
        terminal.program.wait()
        os.close(terminal.master)
    assert [path.name for path in tmp_path.glob("*.json")] == ["image0.json"]
