"""The page in a real browser: upload, ask, look, hide, download, go wrong, two visitors at once."""

from __future__ import annotations

import json
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.records import OWN
from tests.test_web import NO_GRADIO, page
from tests.test_web_visit import png_header
from tests.webdriver import MISSING, Browser, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(NO_GRADIO or MISSING), reason=NO_GRADIO or MISSING)]
IMAGE = OWN / "lisa" / "image0.png"
ROWS = "return [...document.querySelectorAll('#viewer .mask')].length"
TEXT = "return document.querySelector('#chat').innerText"
SHOWN = "return document.querySelector('#viewer canvas').dataset.shown"
SIZE = "const canvas = document.querySelector('#viewer canvas'); return [canvas.width, canvas.height]"
LOADED = "return performance.getEntries().map((entry) => entry.name).filter((name) => /^https?:/.test(name))"
NAMES = "return [...document.querySelectorAll('#viewer li b, #viewer li s')].map((node) => node.innerText)"
ANSWERED = """const canvas = document.querySelector('#viewer canvas');
return !!canvas && Number(canvas.dataset.answers) === arguments[0]"""
HIDE_ALL = "[...document.querySelectorAll('#viewer .tools button')].find((one) => one.innerText === 'Hide all').click()"
WATCH = """window.seen = new Set();
setInterval(() => window.seen.add(document.querySelector('#chat').innerText), 20)"""
PIXEL = """const canvas = document.querySelector('#viewer canvas');
return [...canvas.getContext('2d').getImageData(...arguments, 1, 1).data].slice(0, 3)"""


@pytest.fixture(scope="module")
def address():
    with page(seconds_per_token=0.05) as address:
        yield address


@pytest.fixture(scope="module")
def one_browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("downloads"))
    yield browser
    browser.close()


@pytest.fixture
def browser(one_browser):
    one_browser.console()  # what an earlier test left there
    return one_browser


def upload(browser: Browser, file: Path, said: str) -> None:
    """Uploads a file and waits for what the page says about it."""
    browser.wait("return !!document.querySelector('#upload input[type=file]')")
    browser.type("#upload input[type=file]", str(file))
    browser.wait("return document.body.innerText.includes(arguments[0])", said)


def ask(browser: Browser, words: str, kind: str = "question", rounds: int = 1) -> None:
    browser.click(f"#kind input[value={kind}]")
    browser.type("#words textarea", words)
    browser.click("#ask")
    browser.wait(ANSWERED, rounds)


def test_upload_ask_look_hide_and_download(browser, address):
    browser.open(address)
    upload(browser, IMAGE, "image0.png, ")
    width, height = Image.open(IMAGE).size
    assert browser.run(SIZE) == [
        width,
        height,
    ]
    plain = browser.run(PIXEL, 5, 5)

    asked = "<img src=x onerror=alert(1)> ${1 + 1} {{value}} Where?"
    ask(browser, asked)
    rows = browser.wait(ROWS)
    assert browser.text("#chat .question") == asked
    assert "score 0." in browser.text("#viewer .mask small") and " px (" in browser.text("#viewer .mask small")
    assert browser.run(SHOWN) == ",".join(map(str, range(rows)))

    for name in ("masks", "overlay", "coco"):
        browser.click(f"#download_{name}")
    endings = ("_overlay.png", "_coco.json", "_masks.zip")
    overlay, coco, masks = (wait_for(lambda end=end: list(browser.downloads.glob(f"*{end}"))) for end in endings)
    entries = wait_for(lambda: json.loads(coco[0].read_text()))
    archive = wait_for(lambda: zipfile.ZipFile(masks[0]))
    assert len(entries) == len(archive.namelist()) == rows
    pixels = [np.asarray(Image.open(archive.open(name))) > 0 for name in archive.namelist()]
    assert [int(mask.sum()) for mask in pixels] == [entry["area"] for entry in entries]
    assert Image.open(overlay[0]).width == width

    # hide: all, then one; the pixels under the masks are those of the image
    inside = next((mask, number) for number, mask in enumerate(pixels) if mask.any() and not mask.all())
    y, x = (int(one[0]) for one in np.nonzero(inside[0]))
    covered = browser.run(PIXEL, x, y)
    browser.run(
        "[...document.querySelectorAll('#viewer .tools button')].find((b) => b.innerText === 'Hide all').click()"
    )
    assert browser.run(SHOWN) == "" and browser.run(PIXEL, 5, 5) == plain
    assert browser.run(PIXEL, x, y) != covered
    browser.run(f"document.querySelectorAll('#viewer .mask input')[{inside[1]}].click()")
    assert browser.run(SHOWN) == str(inside[1])
    script = "const s = document.querySelector('#viewer input[type=range]'); s.value = arguments[0]; s.oninput()"
    browser.run(script, 100)
    entry = browser.run("return document.querySelectorAll('#viewer .mask i')[arguments[0]].style.background", inside[1])
    assert browser.run(PIXEL, x, y) == [int(part) for part in entry[4:-1].split(",")]

    # hover: the name of the mask under the pointer and no other
    scale = browser.run("return document.querySelector('#viewer canvas').getBoundingClientRect().width") / width
    browser.move_to("#viewer canvas", round((x + 0.5 - width / 2) * scale), round((y + 0.5 - height / 2) * scale))
    browser.wait("return !document.querySelector('#viewer .tip').hidden")
    assert browser.run("return document.querySelector('#viewer canvas').dataset.pointed") == str(inside[1])
    assert f"{entries[inside[1]]['area']:,} px" in browser.text("#viewer .tip")
    assert browser.console() == []
    loaded = browser.run(
        "return performance.getEntries().map((entry) => entry.name).filter((name) => /^https?:/.test(name))"
    )
    assert loaded and all(name.startswith(address) for name in loaded)


def test_lists_conversation_and_starting_over(browser, address):
    browser.open(address)
    browser.wait("return document.querySelectorAll('#examples button').length")
    browser.run("document.querySelector('#examples button').click()")
    browser.wait("return document.querySelector(`#words textarea`).value.includes(`sky`)")
    browser.wait("return document.querySelector('#chat').innerText.includes('toy_scene')")
    browser.click("#ask")
    browser.wait(ANSWERED, 1)
    names = browser.run(
        "return [...document.querySelectorAll('#viewer li b, #viewer li s')].map((node) => node.innerText)"
    )
    assert set(names) >= {"sky", "airplane", "clock"}
    ask(browser, "the bottle, the house", "phrases", rounds=2)
    options = browser.wait("return [...document.querySelectorAll('#viewer select option')].map((one) => one.innerText)")
    assert options == ["1: sky, sand, airplane, boat, clock", "2: the bottle, the house"]
    browser.run("const s = document.querySelector('#viewer select'); s.value = '1'; s.onchange()")
    assert "sky" in browser.text("#viewer ul")
    browser.click("#new")
    browser.wait("return document.querySelector('#chat').innerText.includes('A new conversation')")
    assert browser.run(ROWS) == 0
    assert browser.run("return document.querySelector('#download_coco').disabled")
    assert browser.console() == []


def test_what_goes_wrong_is_said_in_a_sentence(browser, address, tmp_path):
    bad, bomb, huge = (tmp_path / f"{name}.png" for name in ("bad", "bomb", "huge"))
    bad.write_bytes(b"no image")
    bomb.write_bytes(png_header(60000, 60000))
    huge.write_bytes(b"\0" * (2**20 + 5000))
    browser.open(address)
    browser.wait("return !!document.querySelector('#ask')")
    browser.type("#words textarea", "Where?")
    browser.click("#ask")
    browser.wait("return document.querySelector('#chat').innerText.includes('There is no image yet')")
    browser.wait("return document.querySelector('#words textarea').value === 'Where?'")
    upload(browser, bad, "The image cannot be opened: cannot read image bad.png: damaged")
    upload(browser, bomb, "cannot read image bomb.png")
    upload(browser, huge, "exceed the maximum allowed size of 1.0 Mb")
    browser.open(address)
    upload(browser, IMAGE, "image0.png, ")
    ask(browser, "Where is the dog?")
    assert browser.wait(ROWS) > 0


def test_words_stream_and_can_be_stopped(browser, address):
    browser.open(address)
    upload(browser, IMAGE, "image0.png, ")
    browser.type("#words textarea", "Where is the dog?")
    browser.run(
        "window.seen = new Set(); setInterval(() => window.seen.add(document.querySelector('#chat').innerText), 20)"
    )
    browser.click("#ask")
    browser.wait(ANSWERED, 1)
    assert browser.run("return window.seen.size") > 4
    before = browser.text("#chat").count("Where is")
    browser.type("#words textarea", "And now, slowly, the cat?")
    browser.click("#ask")
    browser.wait("return document.querySelector('#chat').innerText.includes('slowly')")
    browser.type("#words textarea", "Typed meanwhile?")
    browser.click("#stop")
    browser.wait("return document.querySelector('#chat').innerText.includes('Stopped: ')")
    time.sleep(0.5)
    assert browser.run("return document.querySelector('#words textarea').value") == "Typed meanwhile?"
    assert before == 1 and browser.run("return document.querySelectorAll('#viewer select').length") == 0


def test_two_visitors_at_once_do_not_see_each_other(browser, address, tmp_path):
    other = tmp_path / "other_image.png"
    Image.open(IMAGE).convert("RGB").resize((90, 50)).save(other)
    browser.open(address)
    upload(browser, IMAGE, "image0.png, ")
    first = browser.tab()
    second = browser.new_tab()
    browser.open(address)
    upload(browser, other, "other_image.png, 90 x 50")
    browser.type("#words textarea", "The second?")
    browser.click("#ask")
    browser.go_to(first)
    browser.type("#words textarea", "The first?")
    browser.click("#ask")
    asked = {first: "The first?", second: "The second?"}
    for tab, size in ((first, Image.open(IMAGE).size), (second, (90, 50))):
        browser.go_to(tab)
        browser.wait(ANSWERED, 1)
        browser.wait(ROWS)
        assert [words for words in asked.values() if words in browser.text("#chat")] == [asked[tab]]
        assert browser.run(SIZE) == list(size)


@pytest.mark.parametrize("size", [(1280, 900), (500, 900)])
def test_it_fits_into_the_window(address, tmp_path, size):
    browser = Browser(tmp_path, size=size)
    try:
        browser.open(address)
        upload(browser, IMAGE, "image0.png, ")
        ask(browser, "Where is the dog?")
        time.sleep(0.5)
        wide = browser.run("return [document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert wide[0] <= wide[1]
    finally:
        browser.close()
