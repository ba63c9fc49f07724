"""Inputs that look right and are not: each kind is read as it is meant, or refused with file, entry and way out."""

from __future__ import annotations

import base64
import datetime
import io
import json
import math
import pickle
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data.readers.digest import annotation_digest, annotation_paths
from data.readers.index import keeping_faults
from data.sources import build_source
from data.sources.base import IMAGE_SUFFIXES, image_size
from data.sources.reason import NOTHING_INSIDE
from data.sources.semantic import read_label_map
from tests import messy
from tests.messy import AREA, BOX, SIZE
from utils.images import read_image

COCO = {"annotations": "a.json", "images": "img"}


def drawn(source, record=0):
    """Phrase -> pixels of its mask, None where it is absent."""
    return {t.phrase: None if t.mask is None else int(t.mask().sum()) for t in source[record].targets}


def as_coco(root, **options):
    return build_source("coco", root, **COCO, **options)


# --- labelme shapes


def reason(root, *shapes, **fields):
    folder = root / "reason_seg/ReasonSeg/train"
    messy.picture(folder / "0.jpg")
    shapes = [{"label": "target", "image_name": "0.jpg"} | shape for shape in shapes]
    entry = {"shapes": shapes, "text": ["the bright box"], "is_sentence": False} | fields
    (folder / "0.json").write_text(json.dumps(entry))
    return build_source("ReasonSeg", root)


def small_mask() -> str:
    file = io.BytesIO()
    Image.fromarray(np.eye(6, dtype=bool)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("corners", [[[10, 8], [39, 29]], [[39, 29], [10, 8]], [[10, 29], [39, 8]]])
@pytest.mark.parametrize("size_of_points", [2, 4])
def test_a_labelme_rectangle_is_its_box(tmp_path, corners, size_of_points):
    (x, y), (u, v) = corners
    points = corners if size_of_points == 2 else [[x, y], [u, y], [u, v], [x, v]]
    mask = reason(tmp_path, {"shape_type": "rectangle", "points": points})[0].targets[0].mask()
    assert mask.sum() == AREA and mask[8:30, 10:40].all()


def test_a_labelme_circle_is_its_centre_and_rim(tmp_path):
    mask = reason(tmp_path, {"shape_type": "circle", "points": [[30, 24], [42, 24]]})[0].targets[0].mask()
    rows, columns = np.indices(SIZE)
    assert (
        mask[np.hypot(columns - 30, rows - 24) < 10].all() and not mask[np.hypot(columns - 30, rows - 24) > 13.5].any()
    )
    assert abs(mask.sum() - math.pi * 144) < 2 * math.pi * 12


@pytest.mark.parametrize(("corner", "pixels"), [((10, 8), 6), ((60, 8), 4), ((-2, -2), 4)])
def test_a_labelme_mask_lies_where_its_corner_says(tmp_path, corner, pixels):
    points = [list(corner), [corner[0] + 5, corner[1] + 5]]
    mask = reason(tmp_path, {"shape_type": "mask", "points": points, "mask": small_mask()})[0].targets[0].mask()
    assert mask.sum() == pixels and mask[max(8, corner[1]) if corner[1] > 0 else 0, max(0, corner[0])]


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        *(({"shape_type": kind, "points": [[1, 1], [9, 9]]}, f"type '{kind}'") for kind in NOTHING_INSIDE),
        ({"shape_type": "star", "points": [[1, 1]]}, "shape_type 'star' is not known; have: polygon, rectangle"),
        ({"shape_type": "mask", "points": [[1, 1], [5, 5]]}, "needs 'mask'"),
        ({"shape_type": "mask", "points": [[1, 1], [5, 5]], "mask": "AAAA"}, "cannot read the mask"),
        ({"shape_type": "circle", "points": [[1, 1]]}, "a circle has two points"),
        ({"shape_type": "rectangle", "points": [[1, 1], [1, 9]]}, "encloses nothing"),
        ({"points": None}, "points must be a list, got None"),
        ({"points": [[0.1, 0.2], [0.7, 0.2], [0.7, 0.9]]}, "normalised"),
        ({"label": None, "points": []}, "label must be text, got None"),
    ],
)  # fmt: skip
def test_a_shape_that_is_no_area_names_file_entry_and_type(tmp_path, shape, says):
    with pytest.raises((ValueError, OSError), match=rf"0\.json.*{says}|{says}.*0\.json"):
        reason(tmp_path, shape)[0].targets[0].mask()


@pytest.mark.parametrize("size", [SIZE, (96, 128), (48, 65), SIZE[::-1], (None, None)])
def test_a_labelme_file_of_an_image_of_another_size_is_refused(tmp_path, size):
    source = reason(tmp_path, {"points": [[1, 1], [9, 1], [9, 9]]}, imageHeight=size[0], imageWidth=size[1])
    if size in (SIZE, (None, None)):
        assert source[0].targets[0].mask().any()
    else:
        with pytest.raises(ValueError, match=r"0\.jpg: the mask of .*0\.json .*the image \(H, W\) \(48, 64\)"):
            source[0]


@pytest.mark.parametrize("fields", [{"shapes": None}, {"text": [None]}, {"text": None}, {"is_sentence": "yes"}])
def test_a_reasonseg_entry_of_wrong_types_names_its_file(tmp_path, fields):
    with pytest.raises(ValueError, match=r"0\.json"):
        reason(tmp_path, {"points": [[1, 1], [9, 1], [9, 9]]}, **fields)[0]


# --- folders of label maps


@pytest.mark.parametrize("classes", ["cup", "background\ncup", "cup\r\n", "0: background\n1: cup"])
def test_binary_masks_and_names_without_numbers_are_refused_with_two_ways(tmp_path, classes):
    messy.folder(tmp_path, classes, inside=255)
    with pytest.raises(ValueError, match=r"write `255: cup` .* or `0: "):
        build_source("folder", tmp_path)[0]
    for way, pixels in (("255: cup", AREA), ("0: cup", math.prod(SIZE) - AREA)):
        (tmp_path / "classes.txt").write_text(way)
        assert drawn(build_source("folder", tmp_path)) == {"cup": pixels}


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        ("1: cup\n1: mug", r"value 1 is given twice, in line 1 \('1: cup'\) and line 2 \('1: mug'\)"),
        ("1: cup\n\n+1: mug", r"line 1 .* line 3"),
        ("-1: cup", r"line 1 \('-1: cup'\): a label value is 0 to 65535"),
        ("70000: cup", "a label value is 0 to 65535"),
        ("0,background\n1,cup", "'0,background' begins with a number; write `value: name`"),
        ("0 background\n1 cup", "begins with a number"),
        ("1. background\n2. cup", "'1. background' begins with a number"),
        ("0) background\n1) cup", "begins with a number"),
        ("id,name\n0,background\n1,cup", "'0,background' begins with a number, as all lines but 'id,name'"),
        ("Idx\tName\n0\tbackground\n1\tcup", "begins with a number, as all lines but"),
        ("background: 0\ncup: 1", "'background: 0' ends with a number"),
        ("background\t0\ncup\t1", "ends with a number"),
        ("# of the kitchen\nbackground\ncup", "'# of the kitchen' is no plain name"),
        ("background\n#cup", "'#cup' is no plain name"),
        ("- background\n- cup", "'- background' is no plain name"),
        ("background\n\ncup", "a blank line stands before 'cup'"),
        (b"caf\xe9", "classes.txt: not utf-8 text .*byte 3"),
    ],
)
def test_contradictory_class_files_name_their_lines(tmp_path, classes, says):
    messy.folder(tmp_path, classes)
    with pytest.raises(ValueError, match=f"classes.txt.*{says}|{says}"):
        build_source("folder", tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_class_files_as_other_programs_save_them(tmp_path, encoding):
    messy.folder(tmp_path, "Hintergrund\r\nTür\r\n".encode(encoding))
    assert drawn(build_source("folder", tmp_path)) == {"hintergrund": math.prod(SIZE) - AREA, "tür": AREA}


@pytest.mark.parametrize("suffix", [".tif", ".TIFF", ".bmp", ".webp", ".JPG", ".png", ".ppm"])
def test_pictures_of_any_format_are_paired(tmp_path, suffix):
    messy.folder(tmp_path)
    (tmp_path / "images/a.jpg").unlink()
    messy.picture(tmp_path / f"images/a{suffix}")
    source = build_source("folder", tmp_path)
    assert source[0].image.suffix == suffix and read_image(source[0].image).shape == (*SIZE, 3)
    assert suffix.lower() in IMAGE_SUFFIXES and drawn(source)["cup"] == AREA


@pytest.mark.parametrize("places", [("images/a.png", "images/a.jpg"), ("masks/a.tif", "masks/a.png")])
def test_two_files_of_one_name_are_an_error_that_names_both(tmp_path, places):
    messy.folder(tmp_path)
    (messy.picture if "images" in places[0] else messy.mask)(tmp_path / places[0])
    with pytest.raises(ValueError, match=r"have the same name") as caught:
        build_source("folder", tmp_path)
    assert all(place in str(caught.value) for place in places)


def test_one_name_in_two_subfolders_is_two_pictures(tmp_path):
    messy.folder(tmp_path)
    messy.picture(tmp_path / "images/kitchen/a.png")
    messy.mask(tmp_path / "masks/kitchen/a.png")
    assert len(build_source("folder", tmp_path)) == 2


def test_what_is_left_out_is_counted_and_said(tmp_path, caplog, capsys):
    root = messy.folder(tmp_path / "data")
    for name in ("b", "c"):
        messy.picture(root / f"images/{name}.jpg")
    messy.picture(root / "masks/b.jpg")
    with caplog.at_level("WARNING", logger="assistant"):
        source = build_source("folder", root)
    assert len(source) == 1
    assert [r.getMessage().partition(" in ")[0] for r in caplog.records] == [
        "left out 2 images without a label map", "left out 1 files"
    ]  # fmt: skip
    status, printed = messy.doctor(root, ["folder"], capsys)
    assert status == 0 and "images without a label map" in printed and "(2 times" in printed
    assert "b.jpg" in printed and "no label map (.png" in printed


def test_masks_of_another_format_alone_are_said(tmp_path):
    messy.folder(tmp_path)
    (tmp_path / "masks/a.png").rename(tmp_path / "masks/a.jpg")
    with pytest.raises(FileNotFoundError, match=r"no label maps .*no label map \(.png.*JPEG changes.*a.jpg"):
        build_source("folder", tmp_path)


def test_hidden_files_are_no_data(tmp_path, capsys):
    root = messy.folder(tmp_path / "data")
    for place in ("images/._a.jpg", "masks/._a.png", "images/.DS_Store", "masks/Thumbs.db", "masks/sub/._b.png",
                  "images/@eaDir/a.jpg", "masks/__MACOSX/a.png", "images/.hidden/b.jpg"):  # fmt: skip
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_bytes(b"\0\5\x16\7")
    status, printed = messy.doctor(root, ["folder"], capsys)
    assert status == 0 and "all well" in printed and len(build_source("folder", root)) == 1
    reason_root = tmp_path / "reason"
    reason(reason_root, {"points": [[1, 1], [9, 1], [9, 9]]})
    for name in ("._0.jpg", "._0.json", ".DS_Store", "Thumbs.db"):
        (reason_root / "reason_seg/ReasonSeg/train" / name).write_bytes(b"\0")
    assert len(build_source("ReasonSeg", reason_root)) == 1


def test_links_are_followed_but_not_in_circles(tmp_path):
    root = messy.folder(tmp_path / "data")
    messy.picture(tmp_path / "far/b.jpg")
    messy.mask(tmp_path / "farmasks/b.png")
    (root / "images/far").symlink_to(tmp_path / "far")
    (root / "masks/far").symlink_to(tmp_path / "farmasks")
    (root / "images/loop").symlink_to(root / "images")
    assert len(build_source("folder", root)) == 2


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: messy.mask(p, -1, kind=np.int32), None),
        (lambda p: Image.fromarray(np.full(SIZE, 70000, np.int32)).save(p), "from 70000 to 70000; expected 0 to 65535"),
        (lambda p: Image.fromarray(np.full(SIZE, 0.5, np.float32)).save(p), "some not whole"),
        (lambda p: Image.fromarray(np.full(SIZE, np.nan, np.float32)).save(p), "some not whole"),
        (lambda p: Image.fromarray(np.zeros((*SIZE, 4), np.uint8)).save(p), "one channel, this one is RGBA"),
        (lambda p: p.write_bytes(b"II*\0 nothing"), "cannot read label map"),
    ],
)
def test_strange_label_maps_name_themselves(tmp_path, make, says):
    messy.folder(tmp_path)
    (tmp_path / "masks/a.png").unlink()
    make(tmp_path / "masks/a.tif")
    with pytest.raises((ValueError, OSError), match=rf"a\.tif.*{says or 'label values from -1 to 0'}|{says}.*a\.tif"):
        build_source("folder", tmp_path)[0]


@pytest.mark.parametrize("mode", ["P", "I;16", "1", "F", "I"])
def test_label_maps_of_every_one_channel_mode_give_their_values(tmp_path, mode):
    messy.folder(tmp_path)
    labels = np.asarray(Image.open(tmp_path / "masks/a.png"))
    kinds = {"I;16": np.uint16, "1": bool, "F": np.float32, "I": np.int32}
    image = Image.fromarray(labels.astype(kinds.get(mode, np.uint8)))
    if mode == "P":
        image.putpalette([0, 0, 0, 255, 0, 0])
    (tmp_path / "masks/a.png").unlink()
    image.save(tmp_path / "masks/a.tif")
    assert drawn(build_source("folder", tmp_path))["cup"] == AREA


def grey_png(labels, bits) -> bytes:
    """A grey PNG of `bits` per pixel, which Pillow does not write."""
    rows = [np.unpackbits(row[:, None], axis=1)[:, -bits:].ravel() for row in labels]
    data = zlib.compress(b"".join(b"\0" + np.packbits(row).tobytes() for row in rows))
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", *labels.shape[::-1], bits, 0, 0, 0, 0)),
        (b"IDAT", data),
        (b"IEND", b""),
    ]
    framed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def pgm(labels, largest, plain=False) -> bytes:
    head = f"P{2 if plain else 5} {labels.shape[1]} {labels.shape[0]} {largest}\n".encode()
    if plain:
        return head + b"\n".join(b" ".join(b"%d" % value for value in row) for row in labels)
    return head + labels.astype(">u2" if largest > 255 else np.uint8).tobytes()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("width", [5, 16])
def test_a_grey_png_of_few_bits_gives_its_values(tmp_path, bits, width):
    labels = np.random.default_rng(0).integers(0, 2**bits, (7, width)).astype(np.uint8)
    (tmp_path / "a.png").write_bytes(grey_png(labels, bits))
    assert np.array_equal(read_label_map(tmp_path / "a.png"), labels)


@pytest.mark.parametrize("largest", [1, 3, 20, 150, 254, 255, 256, 1000, 40000, 65535])
@pytest.mark.parametrize("plain", [False, True])
def test_a_pgm_gives_its_values_whatever_its_largest(tmp_path, largest, plain):
    labels = np.linspace(0, largest, 7 * 300).round().astype(np.uint16).reshape(7, 300)
    (tmp_path / "a.pgm").write_bytes(pgm(labels, largest, plain))
    assert np.array_equal(read_label_map(tmp_path / "a.pgm"), labels)


@pytest.mark.parametrize("kind", ["JPEG", "JPEG2000", "MPO"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_a_jpeg_is_no_label_map_whatever_its_name(tmp_path, kind, suffix):
    labels = np.zeros(SIZE, np.uint8)
    labels[8:30, 10:40] = 255
    messy.folder(tmp_path / "f", "255: cup")
    messy.jsonl(tmp_path / "j", {"mask": f"m.{suffix}"})
    (tmp_path / "f/masks/a.png").unlink()
    for path in (tmp_path / "j" / f"m.{suffix}", tmp_path / "f/masks" / f"a.{suffix}"):
        Image.fromarray(labels).save(path, kind)
    with pytest.raises(
        OSError, match=rf"m\.{suffix}: it is a (JPEG|MPO).* which changes label values.* save it as PNG"
    ):
        drawn(build_source("jsonl", tmp_path / "j", file="q.jsonl"))
    if suffix != "jpg":
        with pytest.raises(OSError, match="changes label values"):
            build_source("folder", tmp_path / "f")[0]


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("mode", ["L", "P", "1", "I;16"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_turned_as_a_picture_with_its_orientation_is(tmp_path, suffix, mode, orientation):
    bright = read_image(messy.turned(tmp_path / f"a.{suffix}", orientation))[..., 0] > 150
    labels = np.asarray(Image.open(messy.mask(tmp_path / "plain.png")))
    image = Image.fromarray(labels.astype({"1": bool, "I;16": np.uint16}.get(mode, np.uint8)))
    if mode == "P":
        image.putpalette([0, 0, 0, 255, 0, 0])
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"m.{suffix}", exif=exif)
    assert np.array_equal(read_label_map(tmp_path / f"m.{suffix}") > 0, bright)


# --- COCO files


@pytest.mark.parametrize("segmentation", [[], None, {}, [[]], [[], []], "absent"])
def test_a_box_alone_is_no_mask_unless_it_is_asked_to_be(tmp_path, segmentation):
    entry = messy.annotation(segmentation=segmentation, bbox=[10, 8, 30, 22])
    if segmentation == "absent":
        del entry["segmentation"]
    messy.coco(tmp_path, annotations=[entry])
    with pytest.raises(ValueError, match=r"a\.json: annotation 1: no 'segmentation'.* boxes: draw"):
        as_coco(tmp_path)
    assert drawn(as_coco(tmp_path, boxes="draw")) == {"cup": AREA}
    assert drawn(as_coco(tmp_path, boxes="draw", serve="refer")) == {"cup": AREA}


@pytest.mark.parametrize("box", [None, [1, 2, 3], [1, 2, 0, 4], ["1", 2, 3, 4]])
def test_neither_segmentation_nor_box(tmp_path, box):
    messy.coco(tmp_path, annotations=[messy.annotation(segmentation=[], bbox=box)])
    with pytest.raises(ValueError, match=r"a\.json: annotation 1: "):
        as_coco(tmp_path, boxes="draw")


def test_a_mask_without_a_pixel_names_its_annotation(tmp_path):
    messy.coco(tmp_path, annotations=[messy.annotation(segmentation={"size": list(SIZE), "counts": [48 * 64]})])
    with pytest.raises(ValueError, match=r"a\.json: image 0: annotation 1: the mask covers no pixel"):
        drawn(as_coco(tmp_path))


@pytest.mark.parametrize(("there", "named"), [(0, "0"), ("0", 0), (7, "007"), ("7", 7.0), ("x1", "x1")])
def test_ids_are_read_in_any_unambiguous_spelling(tmp_path, there, named):
    image = {"id": there, "file_name": "0.jpg", "height": 48.0, "width": 64}
    messy.coco(tmp_path, images=[image], annotations=[messy.annotation(image_id=named, category_id="1", id="5")])
    assert drawn(as_coco(tmp_path)) == {"cup": AREA}


def test_ambiguous_ids_name_both_spellings(tmp_path):
    image = {"id": 1, "file_name": "0.jpg", "height": 48, "width": 64}
    messy.coco(tmp_path, images=[image, image | {"id": "1"}], annotations=[messy.annotation(image_id=1)])
    with pytest.raises(ValueError, match=r"given twice, as 1 and '1'"):
        as_coco(tmp_path)
    messy.coco(
        tmp_path,
        images=[image | {"id": "01"}, image | {"id": "001"}],
        annotations=[messy.annotation(image_id=1)],
    )
    with pytest.raises(ValueError, match=r"names image 1, .*in this spelling, but as '01' and '001'"):
        as_coco(tmp_path)


def test_an_id_of_one_file_is_not_blamed_on_two(tmp_path):
    messy.coco(tmp_path, annotations=[messy.annotation(image_id=9)])
    with pytest.raises(ValueError, match=r"names image 9, which is not in .*: it has 1 \(0\)") as caught:
        as_coco(tmp_path)
    assert "two files" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"id": None}, "id must be a whole number or text, got None"),
        ({"image_id": [1]}, r"image_id must be a whole number or text, got \[1\]"),
        ({"iscrowd": "no"}, "iscrowd must be 0 or 1, got 'no'"),
    ],
)
def test_a_coco_annotation_of_wrong_types_says_where(tmp_path, fields, says):
    messy.coco(tmp_path, annotations=[messy.annotation(**fields)])
    with pytest.raises(ValueError, match=rf"a\.json: annotation.*{says}"):
        as_coco(tmp_path)


@pytest.mark.parametrize(
    "segmentation", [[[[1, 2, 3]] * 4], [[{"x": 1}] * 6], ["polygon"], [5], {"size": 5, "counts": 3}]
)
def test_a_segmentation_of_any_nesting_is_drawn_or_names_its_annotation(tmp_path, segmentation):
    messy.coco(tmp_path, annotations=[messy.annotation(segmentation=segmentation)])
    with pytest.raises(ValueError, match=r"a\.json: image 0: annotation 1: "):
        drawn(as_coco(tmp_path))


@pytest.mark.parametrize("name", [None, True, 1.5, ["cup"], " "])
def test_a_category_without_a_name_is_no_class(tmp_path, name):
    messy.coco(tmp_path, categories=[{"id": 1, "name": name}])
    with pytest.raises(ValueError, match=r"a\.json: category 1: .*name"):
        as_coco(tmp_path)


def test_class_names_that_are_numbers(tmp_path):
    messy.coco(tmp_path, categories=[{"id": 1, "name": "0"}, {"id": 2, "name": 1}])
    assert as_coco(tmp_path, classes=[0, 1]).vocabulary == ("0", "1")


@pytest.mark.parametrize("classes", [[True, False], [None], [datetime.date(2024, 1, 1)], [1.0], [["cup"]], 5, {"a": 1}])
def test_class_lists_of_other_types_say_how_to_write_them(tmp_path, classes):
    messy.coco(tmp_path)
    messy.folder(tmp_path)
    for open_it in (
        lambda: as_coco(tmp_path, classes=classes),
        lambda: build_source("folder", tmp_path, classes=classes),
    ):
        with pytest.raises(
            ValueError, match=r"classes: (classes\[0\] is .*write it in quotes|expected a list of names)"
        ):
            open_it()


def test_normalised_polygons_are_named_by_doctor_and_training(tmp_path, capsys):
    polygon = [0.2, 0.2, 0.6, 0.2, 0.6, 0.7, 0.2, 0.7]
    root = messy.coco(tmp_path / "data", annotations=[messy.annotation(segmentation=[polygon])])
    status, printed = messy.doctor(root, [{"source": "coco", "options": COCO}], capsys)
    assert status == 1 and "annotation 1: all coordinates lie between 0 and 1" in printed
    with pytest.raises(ValueError, match="normalised"):
        drawn(build_source("jsonl", messy.jsonl(root, {"polygons": [polygon]}), file="q.jsonl"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_with_the_size_of_the_unturned_one(tmp_path, capsys, orientation):
    root = messy.coco(tmp_path / "data")
    messy.turned(root / "img/0.jpg", orientation)
    status, printed = messy.doctor(root, [{"source": "coco", "options": COCO}], capsys)
    assert status == (orientation >= 5)
    if orientation >= 5:
        assert f"its EXIF orientation is {orientation}" in printed and "remove the tag" in printed
    assert (orientation > 1) == ("turned images" in printed)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("folder", {"folder": False}, r"option folder: it is False \(bool\); .*quotes"),
        ("folder", {"ignore_unknown": "no"}, "option ignore_unknown must be true or false, got 'no'"),
        ("coco", {**COCO, "absent": "2"}, "option absent must be a whole number, got '2'"),
        ("coco", {**COCO, "absent": -1, "serve": "refer"}, "absent of coco must be 0 or more"),
        ("coco", {**COCO, "single": "false"}, "option single must be true or false"),
        ("coco", {**COCO, "images": datetime.date(2024, 1, 1)}, "option images: it is datetime.date.*quotes"),
    ],
)
def test_options_of_other_types_say_what_they_must_be(tmp_path, name, options, says):
    messy.coco(messy.folder(tmp_path))
    with pytest.raises(ValueError, match=says):
        build_source(name, tmp_path, **options)


def test_a_number_as_a_folder_is_its_name(tmp_path):
    messy.folder(tmp_path / "2017")
    assert len(build_source("folder", tmp_path, folder=2017)) == 1


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_in_a_header_is_that_of_the_picture_as_it_is_read(tmp_path, suffix, orientation):
    path = messy.turned(tmp_path / f"a.{suffix}", orientation)
    assert image_size(path) == read_image(path).shape[:2] == (SIZE[::-1] if orientation > 4 else SIZE)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize("in_exif", [None, 1, 3, 8])
def test_an_orientation_in_xmp_turns_neither_the_picture_nor_its_size(tmp_path, suffix, in_exif):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    exif, notes = Image.Exif(), PngInfo()
    if in_exif:
        exif[0x0112] = in_exif
    notes.add_itxt("XML:com.adobe.xmp", xmp.decode())
    options = {"png": {"pnginfo": notes}, "tif": {"tiffinfo": {700: xmp}}}.get(suffix, {"xmp": xmp})
    path = messy.picture(tmp_path / f"a.{suffix}", **options, **({"exif": exif} if in_exif and suffix != "tif" else {}))
    assert image_size(path) == read_image(path).shape[:2]
    if suffix == "png":
        assert read_label_map(messy.mask(tmp_path / "m.png")).shape == SIZE


def two_images(root, change, drop=()):
    """A file of two images, each with a cup; `change` goes into the annotation of the second."""
    messy.picture(root / "img/1.jpg")
    images = [{"id": n, "file_name": f"{n}.jpg", "height": SIZE[0], "width": SIZE[1]} for n in (0, 1)]
    bad = messy.annotation(id=20, image_id=1) | change
    return messy.coco(
        root, images=images, annotations=[messy.annotation(id=10), {k: bad[k] for k in bad.keys() - {*drop}}]
    )


BAD_ANNOTATIONS = [
    ({"iscrowd": "no"}, (), "annotation 20: iscrowd must be 0 or 1"),
    ({}, ("category_id",), "annotation 20: no 'category_id'"),
    ({"category_id": 99}, (), "annotation 20: names category 99"),
    ({"id": 10}, (), "the id 10 is given twice"),
    ({"segmentation": []}, (), "annotation 20: no 'segmentation'"),
    ({"image_id": None}, (), r"annotations\[1\]: image_id must be"),
    ({"image_id": 9}, (), "annotation 20: names image 9, which is not in"),
]


@pytest.mark.parametrize(("change", "drop", "says"), BAD_ANNOTATIONS)
@pytest.mark.parametrize("options", [{}, {"serve": "refer"}])
def test_a_bad_annotation_costs_its_image_only(tmp_path, change, drop, says, options):
    two_images(tmp_path, change, drop)
    with pytest.raises(ValueError, match=says):
        as_coco(tmp_path, **options)
    with keeping_faults():
        source = as_coco(tmp_path, **options)
    assert drawn(source) == {"cup": AREA}
    sound, faults = [], []
    for index in range(len(source)):
        try:
            sound.append(source[index].image.name)
        except ValueError as error:
            faults.append(str(error))
    (fault,) = faults
    assert re.search(says, fault)
    if "image_id" in change:  # its image, if it has one, is not known
        assert sound == (["0.jpg", "1.jpg"] if not options else ["0.jpg"])
    else:
        assert sound == ["0.jpg"] and source.image_paths()[1].endswith("/1.jpg")
    assert annotation_digest(source, tmp_path)


def test_annotations_of_missing_images_are_counted(tmp_path):
    strays = [messy.annotation(id=n, image_id=9) for n in (5, 6, 7)]
    messy.coco(tmp_path, annotations=[messy.annotation(), *strays])
    with pytest.raises(ValueError, match=r"annotation 5 \(of 3\): names image 9"):
        as_coco(tmp_path)


# --- paths


@pytest.mark.parametrize("name", ["0.jpg", "sub/0.jpg", "sub\\0.jpg", "sub\\deep\\0.jpg", ".\\sub\\0.jpg"])
def test_paths_of_windows_are_those_of_the_files(tmp_path, name):
    plain = name.replace("\\", "/")
    messy.picture(tmp_path / "img" / plain)
    messy.mask(tmp_path / "img/masks/m.png")
    messy.coco(tmp_path, images=[{"id": 0, "file_name": name, "height": SIZE[0], "width": SIZE[1]}])
    line = {"image": name, "phrase": "the cup"}
    lines = [line | {"mask": "masks\\m.png"}, line | {"image": plain, "polygons": [BOX]}]
    (tmp_path / "img/q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    questions = [{"image": name, "question": "What?", "answer": "A cup."}]
    (tmp_path / "img/val.json").write_text(json.dumps(questions))
    for source in (
        as_coco(tmp_path),
        build_source("jsonl", tmp_path, file="img/q.jsonl"),
        build_source("vqa", tmp_path, file="img/val.json"),
    ):
        assert len(source) == 1, "both spellings are one image"
        (path,) = source.image_paths()
        assert Path(path) == source[0].image == tmp_path / "img" / plain
        assert all(path.is_file() for path in annotation_paths(source))


# --- referring sets


def refer(root, annotation_image=0, **ref):
    folder = root / "refer_seg/refcoco"
    for number in (0, 1):
        messy.picture(root / f"refer_seg/images/mscoco/images/train2014/{number}.jpg")
    folder.mkdir(parents=True, exist_ok=True)
    images = [{"id": n, "file_name": f"{n}.jpg", "height": SIZE[0], "width": SIZE[1]} for n in (0, 1)]
    values = {"images": images, "annotations": [messy.annotation(id=10, image_id=annotation_image)]}
    (folder / "instances.json").write_text(json.dumps(values))
    ref = {"ref_id": 3, "ann_id": 10, "image_id": 0, "split": "train", "sentences": [{"sent": "the cup"}]} | ref
    whole = {**ref, "ref_id": 4, "image_id": annotation_image, "ann_id": 10, "sentences": [{"sent": "whole"}]}
    (folder / "refs(unc).p").write_bytes(pickle.dumps([ref, whole]))
    return root


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"annotation_image": 1}, "ref 3: is of image 0, but its annotation 10 is of image 1"),
        ({"sentences": [{"sent": None}]}, "ref 3: a sentence is None"),
        ({"sentences": None}, "ref 3: sentences must be a list"),
        ({"ann_id": None}, "ref 3: annotation id must be a whole number or text, got None"),
        ({"image_id": 8}, "ref 3: names image 8, which is not in .*two files of one release"),
    ],
)
def test_a_bad_ref_is_an_error_and_the_others_are_kept_where_it_is_skipped(tmp_path, fields, says):
    refer(tmp_path, **fields)
    with pytest.raises(ValueError, match=says):
        build_source("refcoco", tmp_path)
    with keeping_faults():
        source = build_source("refcoco", tmp_path)
    with pytest.raises(ValueError, match=says):
        source[0]
    assert drawn(source, 1) == {"whole": AREA}


def test_refs_with_ids_as_text_are_read(tmp_path):
    assert drawn(build_source("refcoco", refer(tmp_path, ann_id="10", image_id="0")))["the cup"] == AREA


# --- lines, dialogues, questions


@pytest.mark.parametrize("points", range(3, 8))
def test_polygons_in_pairs_are_read_alike_whatever_their_number(tmp_path, points):
    angles = 2 * np.pi * np.arange(points) / points
    pairs = np.stack([30 + 15 * np.cos(angles), 24 + 15 * np.sin(angles)], axis=1).tolist()
    flat = [number for pair in pairs for number in pair]
    sizes = [
        drawn(build_source("jsonl", messy.jsonl(tmp_path / str(n), {"polygons": [polygon]}), file="q.jsonl"))["the cup"]
        for n, polygon in enumerate((flat, pairs))
    ]
    assert sizes[0] == sizes[1] > 0
    pairs_without_list = messy.jsonl(tmp_path / "none", {"polygons": pairs})
    with pytest.raises(ValueError, match="line 1: polygon 0 has 2 numbers"):
        drawn(build_source("jsonl", pairs_without_list, file="q.jsonl"))


@pytest.mark.parametrize(
    "line",
    [
        {"phrase": None}, {"phrase": ["a"]}, {"polygons": []}, {"polygons": "x"}, {"rle": []}, {"mask": 5},
        {"image": 1}, "[", "5",
    ],
)  # fmt: skip
def test_a_bad_line_is_named_and_only_it_is_skipped(tmp_path, line):
    bad = line if isinstance(line, str) or {"rle", "mask", "polygons"} & line.keys() else {"polygons": [BOX]} | line
    messy.jsonl(tmp_path, bad, {"polygons": [BOX], "phrase": "whole"})
    with pytest.raises(ValueError, match=r"q\.jsonl: line 1: "):
        build_source("jsonl", tmp_path, file="q.jsonl")
    with keeping_faults():
        source = build_source("jsonl", tmp_path, file="q.jsonl")
    assert len(source) == len(source.image_paths()) == 2 and drawn(source, 1) == {"whole": AREA}
    assert annotation_digest(source, tmp_path)
    with pytest.raises(ValueError, match=r"q\.jsonl: line 1: "):
        source[0]


def dialogues(root, *values):
    messy.picture(root / "coco/train2017/0.jpg")
    entries = [
        {
            "id": str(n),
            "image": "0.jpg",
            "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": v}],
        }
        for n, v in enumerate(values)
    ]
    (root / "llava_dataset").mkdir(exist_ok=True)
    (root / "llava_dataset/llava_instruct_150k.json").write_text(json.dumps(entries))
    return root


@pytest.mark.parametrize("value", [None, ["a"], 5, {"text": "a"}])
def test_a_dialogue_of_other_types_names_its_entry(tmp_path, value):
    with pytest.raises(
        ValueError, match=r"llava_instruct_150k.json: entry 1 \(id 1\): conversations\[1\]: value must be text"
    ):
        build_source("llava_instruct_150k", dialogues(tmp_path, "A box.", value))


@pytest.mark.parametrize(
    "entry", [None, {"image": None, "conversations": []}, {"image": "0.jpg", "conversations": None}]
)
def test_an_entry_that_is_no_dialogue_costs_only_itself(tmp_path, entry):
    root = dialogues(tmp_path, "A box.")
    path = root / "llava_dataset/llava_instruct_150k.json"
    path.write_text(json.dumps([entry, *json.loads(path.read_text())]))
    with keeping_faults():
        source = build_source("llava_instruct_150k", root)
    assert source[1].dialogues[0][0].answer == ("A box.",)
    with pytest.raises(ValueError, match="entry 0"):
        source[0]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"questions": ["x"]}, r"category_name must be text, got None"),
        ({"questions": [None]}, r"questions\[0\] must be text"),
        ({"questions": "Where?"}, "questions must be a list"),
        ({"text_answers": [5]}, r"text_answers\[0\] must be text"),
        ({"file_name": 5}, "file_name must be text"),
    ],
)
def test_a_muse_entry_of_other_types_names_itself(tmp_path, fields, says):
    item = {"category_name": None, "segmentation": [BOX]}
    entry = {
        "file_name": "0.jpg",
        "height": SIZE[0],
        "width": SIZE[1],
        "questions": ["x"],
        "answers": [[item]],
    } | fields
    (tmp_path / "muse").mkdir()
    (tmp_path / "muse/muse_train.json").write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match=rf"muse_train.json: entry 0.*{says}"):
        build_source("muse", tmp_path)
    with keeping_faults():
        source = build_source("muse", tmp_path)
    assert len(source.image_paths()) == 1, "what is wrong is said by the record, not by the list of images"
    with pytest.raises(ValueError, match=says):
        source[0]


@pytest.mark.parametrize(
    "entry", [{"question": None}, {"answers": []}, {"answer": True}, {"image": 5.0, "question": [1]}]
)
def test_a_short_answer_of_other_types_names_itself(tmp_path, entry):
    (tmp_path / "vqa").mkdir()
    whole = {"image": "0.jpg", "question": "What?", "answer": "a box"}
    bad = whole | entry
    if "answers" in entry:
        del bad["answer"]
    (tmp_path / "vqa/val.json").write_text(json.dumps([whole, bad]))
    with pytest.raises(ValueError, match=r"val\.json: entry 1: "):
        build_source("vqa", tmp_path)
