"""The page: complete, self-contained, right in a browser, and with the words of answers made harmless."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.report.examples import best_and_worst, examples, query_ious
from evaluation.report.html import presence, write_report
from evaluation.report.published import SOURCE_NAMES, published
from evaluation.results import EvaluationResults
from evaluation.score import SuiteScore
from evaluation.suites import SUITES
from utils.masks import encode_rle

SIZE = (40, 60)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
QUIET = ("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-sync", "--enable-logging=stderr", *QUIET)


def line(suite: str, index: int, image: Path, counts: dict, text: str = "It is [SEG].", finished: bool = True) -> dict:
    mask = np.zeros(SIZE, np.uint8)
    mask[:20] = 1
    answer = {"question": "<image>\nWhere?", "asked": ["a <b>"], "text": text, "claims": [["", 0]], "unread": 0}
    answer |= {"masks": [encode_rle(mask)], "finished": finished}
    return {
        "suite": suite,
        "metric": SUITES[suite].metric,
        "index": index,
        "image": str(image),
        "protocol": "generate",
        "seconds": 0.5,
        "counts": counts,
        "answers": [answer],
    }


@pytest.fixture
def lines(tmp_path) -> dict[str, list[dict]]:
    photo = tmp_path / "photo.png"
    Image.new("RGB", SIZE[::-1], (200, 40, 40)).save(photo)
    phrases = [{"kind": "refer", "overlaps": [[n, 10, 10, n, 0]], "unmatched": 0} for n in range(10)]
    lists = {"classes": ["wall", "sky"], "standard": [[0, 0, 30], [1, 2, 10]], "as_released": [[0, 0, 30]]}
    lists |= {"unmatched": 0, "presence": [1, 2, 3, 4]}
    refer = [line("refcoco|unc|val", i, photo, counts) for i, counts in enumerate(phrases)]
    refer[0]["answers"][0] |= {"text": "<script>alert(1)</script>", "finished": False}
    refer[9]["image"] = str(tmp_path / "gone.png")
    return {"refcoco|unc|val": refer, "ade20k|val": [line("ade20k|val", 0, photo, lists)]}


def write(lines: dict[str, list[dict]], folder: Path) -> Path:
    """The report of these lines, by way of their file."""
    folder.mkdir(exist_ok=True)
    file = folder / "predictions.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entries in lines.values() for entry in entries))
    return write_report(results(lines), [file], folder / "report")


def results(lines: dict[str, list[dict]]) -> EvaluationResults:
    suites = {}
    for name, metric in (("refcoco|unc|val", "overlap"), ("ade20k|val", "semantic")):
        score = SuiteScore(metric)
        for entry in lines[name]:
            score.add(entry)
        suites[name] = score.result("generate")
    return EvaluationResults(suites, missing={"cityscapes|val": "no <folder>"})


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


@pytest.fixture
def page(lines, tmp_path) -> str:
    return write(lines, tmp_path).read_text(encoding="utf-8")


def test_the_page_needs_no_other_file(lines, tmp_path):
    file = write(lines, tmp_path)
    assert file.name == "index.html"
    page = file.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert "http" not in page


def test_the_page_has_a_section_per_suite_and_a_choice_of_them(page):
    tags = Tags(page)
    assert [a["data-suite"] for tag, a in tags.seen if tag == "section"] == ["refcoco|unc|val", "ade20k|val"]
    options = [a["value"] for tag, a in tags.seen if tag == "option"]
    assert options == ["", "group:refer", "group:semantic", "refcoco|unc|val", "ade20k|val"]


def test_texts_of_the_data_are_escaped(page):
    assert sum(tag == "script" for tag, _ in Tags(page).seen) == 1
    assert "&lt;script&gt;alert(1)" in page


def test_the_page_names_figures_variants_and_what_is_missing(page):
    for word in ("gIoU", "as released", "mIoU", "wall", "no &lt;folder&gt;", "gone.png", "not understood: 1"):
        assert word in page


def test_the_page_counts_present_and_absent_answers(page):
    assert re.search(r"present<td[^>]*><b>1</b>50.0 %<td[^>]*><b>1</b>50.0 %", page)
    assert re.search(r"absent<td[^>]*><b>1</b>25.0 %<td[^>]*><b>3</b>75.0 %", page)


def test_the_page_shows_the_best_and_worst_examples(page):
    shown = [a["src"] for tag, a in Tags(page).seen if tag == "img"]
    assert len(shown) == 8  # three of the four best phrases (one image is gone), four worst, one class list
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown[0].partition(",")[2]))))
    assert abs(image[10, 30].astype(int) - image[35, 30]).max() > 20  # the mask covers the upper half


def test_published_numbers_stand_next_to_the_measured_ones(lines, tmp_path):
    page = write(lines, tmp_path).read_text(encoding="utf-8")
    rows = [re.sub(r"<[^>]+>", " ", row).split() for row in page.split("<tr")]
    assert any(row[1:3] == ["LISA-7B", "LISA"] and "teacher_forced" in row and row[-1] == "74.1" for row in rows)
    assert any(row[1:3] == ["LaSagnA-7B", "LaSagnA"] and "generate" in row and "42.0" in row for row in rows)
    own = [row for row in rows if "measured" in row and "standard" in row]
    assert len(own) == 2 and "45.0" in own[0]  # gIoU of 0, 0.1, ... 0.9


def test_published_numbers_are_of_known_suites_and_in_range():
    suites = published()
    assert set(suites) <= set(SUITES) and {p.paper for models in suites.values() for p in models} == {
        "LISA",
        "LaSagnA",
        "GSVA",
        "PixelLM",
        "SESAME",
    }
    for suite, models in suites.items():
        assert len({(p.model, p.paper, p.protocol) for p in models}) == len(models), suite
        for model in models:
            assert model.source in SOURCE_NAMES and model.protocol in ("generate", "teacher_forced", "two_pass")
            assert re.fullmatch(r"\d+B", model.size) and model.values
            assert all(1 < value < 100 for value in model.values.values()), (suite, model)  # per cent, not shares


def test_published_metrics_are_those_that_the_suites_measure():
    for suite, models in published().items():
        score = SuiteScore(SUITES[suite].metric)
        measured = {figure.metric for figure in score.scorer.figures()} | {"N-acc", "T-acc"}
        named = {metric.removesuffix("_short").removesuffix("_long") for p in models for metric in p.values}
        assert named <= measured, suite


def test_images_are_ranked_by_what_their_suite_counts(lines):
    assert [query_ious(entry) for entry in lines["refcoco|unc|val"]] == [[pytest.approx(n / 10)] for n in range(10)]
    assert query_ious(lines["ade20k|val"][0]) == [0.75]
    assert query_ious({"counts": {"rows": {"standard": [[0, 0, 0, 0, 1], [1, 2, 2, 1, 0]]}}}) == [1.0, 0.5]
    pairs = [["both", [1, 4, 2, 3, 0], 0], ["missed", [0, 9, 9, 0, 0], 0], ["extra", [0, 5, 0, 5, 0], 2]]
    assert query_ious({"counts": {"pairs": pairs}}) == [0.25, 0, 0]
    assert query_ious({"counts": {"overlaps": []}}) == [] == query_ious({"counts": {}})
    best, worst = best_and_worst(lines["refcoco|unc|val"], 4)
    assert [entry["index"] for entry in best] == [9, 8, 7, 6] and [entry["index"] for entry in worst] == [0, 1, 2, 3]
    best, worst = best_and_worst(lines["refcoco|unc|val"][:3], 4)
    assert best == [] and len(worst) == 3


def test_refusals_are_counted_where_something_is_absent():
    rows = [[5, 9, 7, 7, 0], [0, 7, 7, 0, 1], [0, 0, 0, 0, 1], [0, 3, 0, 3, 0]]  # found, refused; refused, invented
    counts = {"rows": {"standard": rows}, "forced": False}
    assert presence([{"counts": counts}]) == [1, 2, 1, 2]
    assert presence([{"counts": {**counts, "forced": True}}]) is None  # forced answers decide nothing
    assert presence([{"counts": {"rows": {"standard": rows[:2]}, "forced": False}}]) is None


def test_examples_without_their_data_show_the_prediction_alone(lines, tmp_path):
    settings = {"suite": "refcoco|unc|val", "data": str(tmp_path / "gone"), "options": {}, "records": 10}
    first, *_, last = examples(lines["refcoco|unc|val"], settings)
    assert len(first.panel.predicted) == 1 and not first.panel.true
    assert last.panel is None and "gone.png" in last.problem


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on PATH")
class TestBrowser:
    """What a reader sees, after the script of the page has run."""

    @pytest.fixture
    def file(self, lines, tmp_path) -> Path:
        return write(lines, tmp_path)

    def open(self, file: Path, tmp_path: Path, *more: str, at: str = "") -> tuple[str, list[str]]:
        """The document as it stands, and what went to the console."""
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        command = [BROWSER, *FLAGS, profile, *(more or ("--dump-dom",)), f"{file.as_uri()}{at}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout, [said for said in done.stderr.splitlines() if "CONSOLE" in said]

    def hidden(self, page: str) -> dict[str, bool]:
        return {a["data-suite"]: "hidden" in a for tag, a in Tags(page).seen if tag == "section"}

    def test_everything_is_there_and_nothing_complains(self, file, tmp_path):
        page, console = self.open(file, tmp_path)
        assert console == []
        assert self.hidden(page) == {"refcoco|unc|val": False, "ade20k|val": False}
        assert ">2 of 2 suites</output>" in page
        overview = [a for tag, a in Tags(page).seen if tag == "tr" and "data-suite" in a]
        assert {a["data-suite"] for a in overview} == {"refcoco|unc|val", "ade20k|val"}

    @pytest.mark.parametrize("at", ["#ade20k%7Cval", "#group%3Asemantic"])
    def test_the_address_filters(self, file, tmp_path, at):
        page, console = self.open(file, tmp_path, at=at)
        assert console == [] and ">1 of 2 suites</output>" in page
        assert self.hidden(page) == {"refcoco|unc|val": True, "ade20k|val": False}
        rows = {a["data-suite"]: "hidden" in a for tag, a in Tags(page).seen if tag == "tr" and "data-suite" in a}
        assert rows == {"refcoco|unc|val": True, "ade20k|val": False}

    def test_the_choice_and_the_button_do_as_they_say(self, file, tmp_path):
        """A user's part, played by a script after the page's own; an error of its own shows that errors are seen."""
        acts = """const choose = document.getElementById("suite"); choose.value = "refcoco|unc|val";
          choose.onchange(); document.querySelector("button[data-sort]").click();
          window.onhashchange = ((before) => () => { before(); console.error("played"); })(window.onhashchange);"""
        played = file.with_name("played.html")
        played.write_text(file.read_text().replace("</body>", f"<script>{acts}</script></body>"))
        page, console = self.open(played, tmp_path)
        assert len(console) == 1 and "played" in console[0]
        assert self.hidden(page) == {"refcoco|unc|val": False, "ade20k|val": True}
        assert 'data-sort="iou">best first' in page

    def test_a_narrow_window_shows_it_too(self, file, tmp_path):
        picture = tmp_path / "narrow.png"
        self.open(file, tmp_path, "--window-size=500,900", f"--screenshot={picture}")
        pixels = np.asarray(Image.open(picture).convert("RGB"))
        assert pixels.shape == (900, 500, 3) and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
