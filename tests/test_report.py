"""The page: complete, self-contained, and with the words of answers made harmless."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.report import histogram, picture_iou, write_report
from evaluation.runner import Score
from utils.masks import encode_rle

SIZE = (40, 60)


def line(suite: str, index: int, image: Path, counts: dict, text: str = "It is [SEG].", finished: bool = True) -> dict:
    mask = np.zeros(SIZE, np.uint8)
    mask[:20] = 1
    answer = {"question": "<image>\nWhere?", "asked": ["a <b>"], "text": text, "claims": [["", 0]], "unread": 0}
    answer |= {"masks": [encode_rle(mask)], "finished": finished}
    return {
        "suite": suite,
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


def results(lines: dict[str, list[dict]]) -> dict:
    suites = {}
    for name, metric in (("refcoco|unc|val", "overlap"), ("ade20k|val", "semantic")):
        score = Score(metric)
        for entry in lines[name]:
            score.add(entry)
        suites[name] = score.result("generate")
    return {"suites": suites, "missing": {"cityscapes|val": "no <folder>"}}


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


def test_the_page_holds_everything_and_needs_nothing(lines, tmp_path):
    file = write_report(results(lines), lines, tmp_path / "report")
    page, tags = file.read_text(encoding="utf-8"), Tags()
    tags.feed(page)
    assert file.name == "index.html" and not re.search(r"(src|href)=\"(?!data:)", page) and "http" not in page
    assert [a["data-suite"] for tag, a in tags.seen if tag == "section"] == ["refcoco|unc|val", "ade20k|val"]
    assert sum(tag == "option" for tag, _ in tags.seen) == 3
    assert sum(tag == "script" for tag, _ in tags.seen) == 1 and "&lt;script&gt;alert(1)" in page
    for word in (
        "gIoU",
        "as_released",
        "mIoU",
        "wall",
        "no &lt;folder&gt;",
        "gone.png",
        "cut off or not understood: 1",
    ):
        assert word in page
    assert re.search(r'<td>present<td class="n">1<td class="n">1<tr><td>absent<td class="n">1<td class="n">3', page)
    shown = [a["src"] for tag, a in tags.seen if tag == "img"]
    assert len(shown) == 8  # four worst and three of the four best phrases (one picture is gone), one class list
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown[0].partition(",")[2]))))
    assert abs(image[10, 30].astype(int) - image[35, 30]).max() > 20  # the mask covers the upper half


def test_pictures_are_ranked_by_what_their_suite_counts(lines):
    assert [picture_iou(entry) for entry in lines["refcoco|unc|val"]] == pytest.approx([n / 10 for n in range(10)])
    assert picture_iou(lines["ade20k|val"][0]) == 0.75
    assert picture_iou({"counts": {"rows": {"standard": [[0, 0, 0, 0, 1], [1, 2, 2, 1, 0]]}}}) == 0.75
    assert picture_iou({"counts": {"overlaps": []}}) is None
    assert histogram([0.05, 0.95, 1.0])["0.9 to 1.0"] == 2 and histogram([]) == {}
