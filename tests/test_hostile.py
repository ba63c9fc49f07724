"""Files by others: predictions, weights folders, prompts. What they hold is data, never orders."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import test_sem
from data.sources import build_source
from data.sources.base import read_entries, read_json
from evaluation.metrics import Figure
from evaluation.report.markdown import as_markdown
from evaluation.results import EvaluationResults, SuiteResult
from evaluation.score import rescore
from model.checkpoints.files import INDEXES, read_tensors
from utils.masks import encode_rle

EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>&lt;"
SIZE = (40, 60)


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


def line(image: Path | str, **changes) -> dict:
    mask = np.zeros(SIZE, np.uint8)
    mask[:20] = 1
    answer = {
        "question": "<image>\nWhere?",
        "asked": ["a cat"],
        "text": "It is [SEG].",
        "claims": [["", 0]],
        "unread": 0,
    }
    answer |= {"masks": [encode_rle(mask)], "finished": True}
    counts = {"kind": "refer", "overlaps": [[5, 10, 10, 5, 0]], "unmatched": 0}
    values = {"suite": "refcoco|unc|val", "metric": "overlap", "index": 0, "image": str(image), "protocol": "generate"}
    return values | {"seconds": 0.5, "counts": counts, "answers": [answer]} | changes


def predictions(folder: Path, *lines: dict, settings: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "predictions.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    if settings:
        (folder / "predictions.run.json").write_text(json.dumps(settings))
    return file


def report(file: Path, out: Path, *more: str) -> str:
    """The page that --from writes."""
    assert test_sem.main(["--from", str(file), "--out", str(out), *more]) == 0
    return (out / "report" / "index.html").read_text(encoding="utf-8")


@pytest.fixture
def photo(tmp_path) -> Path:
    folder = tmp_path / "data" / "deep"
    folder.mkdir(parents=True)
    Image.new("RGB", SIZE[::-1], (200, 40, 40)).save(folder / "photo.png")
    return folder / "photo.png"


def evil_everywhere(value, path=()):
    """Copies of a line, each with one of its texts replaced."""
    if isinstance(value, str):
        yield EVIL, path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        for changed, place in evil_everywhere(inner, (*path, key)):
            copy = dict(value) if isinstance(value, dict) else list(value)
            copy[key] = changed
            yield copy, place


def test_every_text_of_a_line_is_escaped_in_the_page(photo, tmp_path):
    tried = set()
    failing = line(photo, notes=["a note"], counts={"kind": "refer", "overlaps": [[5, 10, 10, 5, 0]], "unmatched": 1})
    for number, (changed, place) in enumerate(evil_everywhere(failing)):
        folder = tmp_path / str(number)
        settings = {"suite": changed["suite"], "system": EVIL, "weights": EVIL, "precision": EVIL, "data": EVIL}
        file = predictions(folder, changed, settings=settings)
        try:
            page = report(file, folder / "out", "--dataset_dir", str(tmp_path / "data"))
        except SystemExit as error:
            assert place in (("metric",), ("counts", "kind")) or "masks" in place, (place, error)
            continue
        tried.add(place[-1])
        seen = Tags(page).seen
        assert [tag for tag, _ in seen].count("script") == 1, place
        assert not any(name.startswith("on") for _, attributes in seen for name in attributes), place
        assert all(a["src"].startswith("data:image/jpeg") for tag, a in seen if tag == "img"), place
        assert "<script>" not in (folder / "out" / "results.md").read_text(), place
    assert {"suite", "protocol", "image", "question", "text"} <= tried


def test_the_page_may_load_nothing(photo, tmp_path):
    page = report(predictions(tmp_path / "p", line(photo)), tmp_path / "out")
    (policy,) = [a["content"] for tag, a in Tags(page).seen if tag == "meta" and "http-equiv" in a]
    assert policy.startswith("default-src 'none'; img-src data:;")


def shown(page: str) -> int:
    return sum(tag == "img" for tag, _ in Tags(page).seen)


def test_pictures_are_shown_from_the_named_folder_alone(photo, tmp_path):
    secret = tmp_path / "p" / "secret.png"
    secret.parent.mkdir()
    Image.new("RGB", SIZE[::-1]).save(secret)
    data = tmp_path / "data"
    (data / "linked").symlink_to(tmp_path / "p")  # the owner's own link
    for number, (image, there) in enumerate(
        (
            (photo, 1),
            (secret, 0),  # next to the predictions
            (data / "deep" / ".." / ".." / "p" / "secret.png", 0),
            (os.path.relpath(secret), 0),
            ("/etc/passwd", 0),
            (data / "linked" / "secret.png", 1),
            (tmp_path / "data2" / "x.png", 0),
        )
    ):
        file = predictions(tmp_path / "p", line(image))
        assert shown(report(file, tmp_path / f"a{number}")) == 0
        page = report(file, tmp_path / f"b{number}", "--dataset_dir", str(data))
        assert shown(page) == there, image
        assert there or "is not below a folder given for images (--dataset_dir)" in page


def test_settings_beside_predictions_open_no_other_data(photo, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("evaluation.catalog.build_source", lambda name, root, **options: opened.append(root) or [])
    answers = [{**line(photo)["answers"][0], "targets": [0]}]
    for data, options, expected in (
        ("/", {}, 0),
        (str(tmp_path / "data" / ".." / ".."), {}, 0),
        (str(tmp_path / "data"), {"classes": "/etc/passwd"}, 0),
        (str(tmp_path / "data"), {"classes": ["../../x"]}, 0),
        (str(tmp_path / "data"), {}, 1),
        (7, {}, 0),
        (None, None, 0),
    ):
        opened.clear()
        settings = {"suite": "refcoco|unc|val", "data": data, "options": options, "records": 1}
        file = predictions(tmp_path / "p", line(photo, answers=answers), settings=settings)
        assert shown(report(file, tmp_path / "out", "--dataset_dir", str(tmp_path / "data"))) == 1
        assert len(opened) == expected, data


@pytest.mark.parametrize("where", ["question", "text", "image", "asked"])
def test_half_characters_are_written(where, photo, tmp_path):
    broken = line(photo)
    if where == "image":
        broken["image"] += "\ud800"
    else:
        broken["answers"][0][where] = ["\ud800"] if where == "asked" else "x\ud800y"
    broken["counts"]["unmatched"] = 1
    page = report(predictions(tmp_path / "p", broken), tmp_path / "out", "--dataset_dir", str(tmp_path / "data"))
    assert "&#55296;" in page or where in ("image", "asked")


BAD_LINES = {
    "an RLE that wraps": ({"masks": [{"size": list(SIZE), "counts": [2**63, 2**63, 2400]}]}, None),
    "an RLE of another size": ({"masks": [{"size": [10**9, 10**9], "counts": [10**18]}]}, None),
    "no RLE": ({"masks": [{}]}, None),
    "a mask that is none": ({"masks": [7]}, "masks must be a list of RLEs"),
    "a claim of no mask": ({"claims": [["", 5]]}, "claims mask 5 of 1"),
    "a claim of the last mask": ({"claims": [["", -1]]}, "claims mask -1"),
    "claims of another form": ({"claims": [[1, 2, 3]]}, "a claim is"),
    "text that is none": ({"text": ["x"]}, "text must be text"),
    "finished": ({"finished": "yes"}, "finished must be true or false"),
    "unread": ({"unread": 1.5}, "unread must be a whole number"),
    "unread negative": ({"unread": -1}, "unread must be a whole number"),
}


@pytest.mark.parametrize(("change", "says"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_damaged_answer_is_an_error_or_not_shown(change, says, photo, tmp_path):
    answers = [{**line(photo)["answers"][0], **change}]
    file = predictions(tmp_path / "p", line(photo, answers=answers))
    if says is None:
        page = report(file, tmp_path / "out", "--dataset_dir", str(tmp_path / "data"))
        assert shown(page) == 0 and "RLE" in page
    else:
        with pytest.raises(SystemExit, match=rf"predictions\.jsonl, line 1: answers\[0\]: .*{says}"):
            report(file, tmp_path / "out")


ANSWERED = {"question": "q", "asked": [], "text": "t", "claims": [], "masks": [], "finished": True, "unread": 0}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"suite": "x\x1b]0;title\x07"}, "suite must be a name of printable characters"),
        ({"suite": ["a"]}, "suite must be"),
        ({"protocol": None}, "protocol must be"),
        ({"metric": "none"}, "no metric 'none'"),
        ({"index": "0"}, "index must be a whole number"),
        ({"index": 10**400}, "index must be a whole number"),
        ({"seconds": "1"}, "seconds must be"),
        ({"seconds": True}, "seconds must be"),
        ({"notes": ["\x1b[2J"]}, "notes must be"),
        ({"counts": {"kind": "refer", "overlaps": [[1e300, 1, 1, 1, 0]], "unmatched": 0}}, "is not a count"),
        ({"counts": {"kind": "refer", "overlaps": [[-5, 1, 1, 1, 0]], "unmatched": 0}}, "is not a count"),
        ({"counts": {"kind": "refer", "overlaps": [[10**30, 1, 1, 1, 0]], "unmatched": 0}}, "is not a count"),
        ({"counts": {"kind": "refer", "overlaps": [7], "unmatched": 0}}, "damaged or of another program"),
        ({"counts": {"kind": "refer", "overlaps": "none", "unmatched": 0}}, "damaged or of another program"),
        ({"counts": {"unmatched": 0}}, "damaged or of another program"),
        ({"counts": {}}, "no 'unmatched'"),
        ({"metric": "semantic", "counts": {"classes": ["a"], "standard": [[0, 7, 1]], "unmatched": 0}}, "damaged"),
        (
            {
                "metric": "semantic",
                "counts": {
                    "classes": [str(n) for n in range(6000)],
                    "standard": [],
                    "as_released": [],
                    "unmatched": 0,
                    "presence": None,
                },
            },
            "6000 names, more than the limit of 5000",
        ),
        ({"answers": {}}, "answers must be a list"),
        ({"answers": [{**ANSWERED, "scores": ["1"]}]}, "scores must be a list of numbers"),
        ({"answers": [{**ANSWERED, "scores": [True]}]}, "scores must be a list of numbers"),
        ({"answers": [{**ANSWERED, "scores": [0.5, 0.5]}]}, "2 scores of 0 masks"),
    ],
)
def test_a_damaged_line_is_an_error_with_its_place(changes, says, photo, tmp_path):
    file = predictions(tmp_path, line(photo, **changes))
    with pytest.raises(ValueError, match=says):
        rescore([file])


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": NaN}', "7", "{}", "1" * 5000])
def test_a_line_that_is_no_prediction_is_an_error(text, tmp_path):
    (tmp_path / "x.jsonl").write_text(text + "\n")
    with pytest.raises(ValueError, match=r"x\.jsonl, line 1: .*not a prediction"):
        rescore([tmp_path / "x.jsonl"])


def test_markdown_holds_no_html_and_no_further_cells():
    suite = SuiteResult([Figure("a|b", "<b>", None)], protocol="p", images=1, queries=1, notes=["<u>"])
    text = as_markdown(EvaluationResults({"<i>": suite}, missing={"x": "<script>"}))
    assert not re.search(r"<[a-z]", text) and "a\\|b" in text


class Calls:
    def __reduce__(self):
        return os.system, ("true",)


def packed(tensors: dict, path: Path, kind: int) -> Path:
    torch.save(tensors, path)
    with zipfile.ZipFile(path) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return path


def test_the_refusal_of_a_pickle_gives_no_advice_to_read_it_all_the_same(tmp_path):
    for number, old in enumerate((False, True)):
        file = tmp_path / f"{number}.bin"
        torch.save({"a": torch.ones(2), "b": Calls()}, file, _use_new_zipfile_serialization=not old)
        with pytest.raises(ValueError, match=r"refused, the pickle asks for \w+\.system") as error:
            read_tensors(file)
        assert not re.search("weights_only|trusted|load it|likely succeed|PyTorch 2", str(error.value))
        assert error.value.__suppress_context__
    (tmp_path / "plain.bin").write_bytes(pickle.dumps({"a": Calls()}))
    with pytest.raises(ValueError, match="refused") as error:
        read_tensors(tmp_path / "plain.bin")
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.ones(1).expand(10**6, 10**6), "not weights as they are saved"),
        (torch.ones(4, 4).to_sparse(), "not weights as they are saved"),
        (torch.ones(4, device="meta"), "not weights as they are saved"),
        ("text", "a mapping of names to tensors"),
    ],
)
def test_only_whole_dense_tensors_are_weights(tensor, says, tmp_path):
    torch.save({"a": tensor}, tmp_path / "x.bin")
    with pytest.raises(ValueError, match=rf"x\.bin: .*{says}"):
        read_tensors(tmp_path / "x.bin")


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(tmp_path):
    file = packed({"a": torch.zeros(10**7)}, tmp_path / "bomb.bin", zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 10**5
    with pytest.raises(ValueError, match=r"bomb\.bin: refused, its records are compressed"):
        read_tensors(file)
    assert read_tensors(packed({"a": torch.ones(3)}, tmp_path / "whole.bin", zipfile.ZIP_STORED))["a"].sum() == 3


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\3\4" + bytes(40), b"\x80\2}q\0.", b"\x80\4\x8c\xff."])
@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_damaged_weights_name_the_file(content, ending, tmp_path):
    (tmp_path / f"x.{ending}").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.{ending}"):
        read_tensors(tmp_path / f"x.{ending}")


@pytest.mark.parametrize("size", [2**62, 10**9])
def test_a_safetensors_header_that_lies_is_an_error(size, tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged"):
        read_tensors(tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").write_bytes(size.to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"y\.safetensors is damaged"):
        read_tensors(tmp_path / "y.safetensors")


@pytest.mark.parametrize("name", ["../other/x.safetensors", "/etc/hostname", "a/b.safetensors", 7, None])
def test_a_weight_index_names_files_beside_it(name, tmp_path):
    (tmp_path / "other").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "other" / "x.safetensors")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / INDEXES[0]).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match=r"index\.json: (names|expected weight_map)"):
        read_tensors(tmp_path / "m")


@pytest.mark.parametrize(
    ("annotation", "image", "says"),
    [
        (
            {"segmentation": {"size": [30, 40], "counts": [2**63, 2**63, 1200]}},
            {},
            "annotation 5: run 0 of the RLE is 9",
        ),
        ({"segmentation": {"size": [30, 40], "counts": [1300, -100]}}, {}, "annotation 5: run 0 of the RLE is 1300"),
        ({}, {"height": 10**6, "width": 10**6}, "image 1: 1000000 x 1000000 .height x width.: 10{12} pixels"),
        ({}, {"file_name": "../../secret.png"}, r"image 1: the path '\.\./\.\./secret\.png' leaves"),
        ({}, {"file_name": "/etc/passwd"}, "image 1: the path '/etc/passwd' leaves"),
    ],
)
def test_a_data_set_that_lies_is_an_error_with_file_and_entry(annotation, image, says, tmp_path):
    """Trained on or evaluated, masks come from the same readers."""
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    shape = {"id": 5, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 9, 1, 9, 9]], "iscrowd": 0} | annotation
    values = {"images": [{"id": 1, "file_name": "a.png", "height": 30, "width": 40} | image]}
    values |= {"categories": [{"id": 1, "name": "cup"}], "annotations": [shape]}
    (tmp_path / "x.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"x\.json: .*{says}"):
        record = build_source("coco", tmp_path, annotations="x.json", images=".")[0]
        record.targets[0].mask()


@pytest.mark.parametrize("text", ["[" * 10**5, '{"images": ' + "[" * 10**5, '{"images": [' + "1" * 5000])
def test_an_annotation_file_that_is_nested_or_numbered_without_end_is_named(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    for read in (lambda path: list(read_entries(path)), read_json):
        with pytest.raises(ValueError, match=r"x\.json: "):
            read(tmp_path / "x.json")
