"""ADE20K, COCO-Stuff, Cityscapes and Mapillary read from tiny real layouts, and what is wrong with a layout is said."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.sources import build_source

RNG = np.random.default_rng(0)


def put_picture(path: Path, size=(6, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)


def put_map(path: Path, values, size=(6, 8), mode: str | None = None) -> np.ndarray:
    """A map whose columns hold `values` in turn."""
    labels = np.resize(np.array(values), size[1])[None].repeat(size[0], 0).astype(np.int32)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels.astype(np.uint16 if mode == "I;16" else np.uint8))
    if mode == "P":
        image = image.convert("P")
        image.putdata(labels.ravel().tolist())
    image.save(path)
    return labels


def ade(root: Path, values=(0, 1, 3, 3), base="ade20k", split="training", name="ADE_train_1", mode=None) -> np.ndarray:
    put_picture(root / base / "images" / split / f"{name}.jpg")
    return put_map(root / base / "annotations" / split / f"{name}.png", values, mode=mode)


def masks_by_name(record) -> dict[str, np.ndarray]:
    return {target.phrase: target.mask() for target in record.targets}


@pytest.mark.parametrize("base", ["ade20k", "ADEChallengeData2016"])
@pytest.mark.parametrize("mode", [None, "P", "I;16"])
def test_ade20k_reads_both_layouts_and_every_png_mode(tmp_path, base, mode):
    labels = ade(tmp_path, base=base, mode=mode)
    source = build_source("ade20k", tmp_path)
    record = source[0]
    assert len(source) == 1 and record.kind == "classes"
    assert record.image == tmp_path / base / "images/training/ADE_train_1.jpg"
    assert record.vocabulary == source.vocabulary and len(record.vocabulary) == 150
    masks = masks_by_name(record)
    assert list(masks) == ["wall", "sky"]
    assert np.array_equal(masks["wall"], labels == 1) and np.array_equal(masks["sky"], labels == 3)
    assert np.array_equal(record.ignore(), labels == 0) and record.ignore().dtype == bool


def test_a_split_by_flag_syntax(tmp_path):
    ade(tmp_path, split="validation", name="ADE_val_1")
    assert len(build_source("ade20k|val", tmp_path)) == 1
    with pytest.raises(FileNotFoundError, match=r"(?s)ade20k train not found.*images/training.*holds validation/"):
        build_source("ade20k|train", tmp_path)


def test_records_travel_to_workers(tmp_path):
    ade(tmp_path)
    record = pickle.loads(pickle.dumps(build_source("ade20k", tmp_path)))[0]
    assert np.array_equal(pickle.loads(pickle.dumps(record)).targets[0].mask(), record.targets[0].mask())


def test_a_root_whose_path_holds_the_folder_names(tmp_path):
    root = tmp_path / "images" / "annotations" / "ünï cödé 4"
    ade(root, name="picture (1) é")
    assert build_source("ade20k", root)[0].image.name == "picture (1) é.jpg"


def test_a_class_list_limits_the_vocabulary(tmp_path):
    labels = ade(tmp_path, (0, 1, 3, 6))
    (tmp_path / "few.txt").write_text("Sky\nbed\n\nwall\n", encoding="utf-8")
    for classes in ("few.txt", str(tmp_path / "few.txt"), ["Sky", "bed", "wall"]):
        source = build_source("ade20k", tmp_path, classes=classes)
        record = source[0]
        assert record.vocabulary == ("wall", "sky", "bed"), "dataset order"
        assert list(masks_by_name(record)) == ["wall", "sky"]
        assert np.array_equal(record.ignore(), (labels == 0) | (labels == 6))


@pytest.mark.parametrize(
    ("classes", "error", "says"),
    [
        ([], ValueError, "class list is empty"),
        ("empty.txt", ValueError, "empty.txt: the class list is empty"),
        ("none.txt", FileNotFoundError, "no class list none.txt; looked for"),
        (["wal"], ValueError, "no class 'wal' .did you mean 'wall'"),
    ],
)
def test_bad_class_lists(tmp_path, classes, error, says):
    ade(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(error, match=says):
        build_source("ade20k", tmp_path, classes=classes)


def test_unknown_label_values_name_the_file_and_the_way_out(tmp_path):
    labels = ade(tmp_path, (1, 151, 200))
    with pytest.raises(ValueError, match=r"ADE_train_1.png: unknown label values 151, 200.*ignore_unknown"):
        build_source("ade20k", tmp_path)[0]
    record = build_source("ade20k", tmp_path, ignore_unknown=True)[0]
    assert list(masks_by_name(record)) == ["wall"] and np.array_equal(record.ignore(), labels > 150)


def test_a_map_without_a_picture_and_an_empty_folder(tmp_path):
    ade(tmp_path)
    put_map(tmp_path / "ade20k/annotations/training/lonely.png", [1])
    with pytest.raises(FileNotFoundError, match=r"1 of 2 label maps have no image: .*lonely.png needs .*lonely\.jpg"):
        build_source("ade20k", tmp_path)
    for path in (tmp_path / "ade20k/annotations/training").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no label maps"):
        build_source("ade20k", tmp_path)


def test_damaged_and_coloured_maps_name_the_file(tmp_path):
    ade(tmp_path)
    path = tmp_path / "ade20k/annotations/training/ADE_train_1.png"
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"not a png"):
        path.write_bytes(data)
        with pytest.raises(OSError, match=r"cannot read label map .*ADE_train_1\.png"):
            build_source("ade20k", tmp_path)[0]
    put_picture(path)
    with pytest.raises(ValueError, match=r"ADE_train_1\.png: a label map has one channel, this one is RGB"):
        build_source("ade20k", tmp_path)[0]


def test_a_missing_root_and_a_wrong_one_say_what_is_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"(?s)which does not exist.*ade20k/images/training"):
        build_source("ade20k", tmp_path / "nowhere")
    (tmp_path / "ade20k" / "images" / "training").mkdir(parents=True)
    (tmp_path / "coco").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"(?s)holds ade20k/, coco/.*no ade20k/annotations; ade20k holds images/"
    ):
        build_source("ade20k", tmp_path)


def test_names_options_and_splits_are_checked(tmp_path):
    with pytest.raises(KeyError, match="did you mean 'ade20k'"):
        build_source("ade20", tmp_path)
    with pytest.raises(ValueError, match=r"no option 'clases' .did you mean 'classes'"):
        build_source("ade20k", tmp_path, clases=[])
    with pytest.raises(ValueError, match="no split of ade20k 'test'; have: train, val"):
        build_source("ade20k|test", tmp_path)
    with pytest.raises(ValueError, match="no option 'split_by'"):
        build_source("ade20k|unc|val", tmp_path)
    with pytest.raises(ValueError, match="says split 'val', the options say 'train'"):
        build_source("ade20k|val", tmp_path, split="train")


@pytest.mark.parametrize("folder", ["cocostuff/train2017", "coco/stuffthingmaps_trainval2017/train2017"])
def test_cocostuff_171_by_label_value(tmp_path, folder):
    put_picture(tmp_path / "coco/train2017/000000000009.jpg")
    labels = put_map(tmp_path / folder / "000000000009.png", (0, 109, 181, 102, 101, 255, 65))
    source = build_source("cocostuff", tmp_path)
    masks = masks_by_name(source[0])
    assert len(source.vocabulary) == len(set(source.vocabulary)) == 171
    assert list(masks) == ["person", "ceiling", "ceiling-tile", "desk", "wood"]
    assert np.array_equal(masks["desk"], labels == 109), "found by value: the unused thing 'desk' (68) does not matter"
    assert np.array_equal(source[0].ignore(), (labels == 255) | (labels == 65)), "65 is a value no image should hold"


def test_cocostuff_182_ignores_names_with_a_dash(tmp_path):
    put_picture(tmp_path / "coco/val2017/1.jpg")
    labels = put_map(tmp_path / "cocostuff/val2017/1.png", (0, 109, 181, 102, 255))
    source = build_source("cocostuff|val", tmp_path, table=182)
    assert len(source.vocabulary) == 182 - 28 and not any("-" in name for name in source.vocabulary)
    assert list(masks_by_name(source[0])) == ["person", "wood"]
    assert np.array_equal(source[0].ignore(), np.isin(labels, (109, 102, 255)))
    with pytest.raises(ValueError, match="no table of cocostuff '91'; have: 171, 182"):
        build_source("cocostuff", tmp_path, table="91")


def test_cityscapes_pairs_across_cities_and_knows_its_void(tmp_path):
    for city in ("aachen", "ulm"):
        put_picture(tmp_path / f"cityscapes/leftImg8bit/train/{city}/{city}_0_1_leftImg8bit.png")
        base = tmp_path / f"cityscapes/gtFine/train/{city}/{city}_0_1_gtFine"
        labels = put_map(Path(f"{base}_labelIds.png"), (0, 3, 7, 26, 29, 33))
        put_map(Path(f"{base}_instanceIds.png"), (7, 26001), mode="I;16")
        put_picture(Path(f"{base}_color.png"))
    source = build_source("cityscapes", tmp_path)
    assert len(source) == 2 and len(source.vocabulary) == 19
    assert [record.image.parent.name for record in (source[0], source[1])] == ["aachen", "ulm"]
    masks = masks_by_name(source[1])
    assert list(masks) == ["road", "car", "bicycle"] and np.array_equal(masks["car"], labels == 26)
    assert np.array_equal(source[1].ignore(), np.isin(labels, (0, 3, 29)))


def mapillary(root: Path, base: str, maps: str, names: str, values) -> np.ndarray:
    put_picture(root / base / "training/images/a b.jpg")
    labels = put_map(root / base / "training" / maps / "a b.png", values, mode="P")
    known = ["Bird", "Ground Animal", "Car", "Unlabeled"]
    path = root / base / names
    path.parent.mkdir(parents=True, exist_ok=True)
    if "panoptic" in names:
        content = {"categories": [{"id": i + 1, "name": name} for i, name in enumerate(known[:-1])], "annotations": []}
    else:
        content = {"labels": [{"name": f"x--{name}", "readable": name} for name in known]}
    path.write_text(json.dumps(content))
    return labels


def test_mapillary_2_keeps_unlabeled_as_a_class_unless_told(tmp_path):
    labels = mapillary(tmp_path, "mapillary", "v2.0/labels", "config_v2.0.json", (0, 2, 3))
    source = build_source("mapillary", tmp_path)
    assert source.vocabulary == ("bird", "ground animal", "car", "unlabeled")
    assert list(masks_by_name(source[0])) == ["bird", "car", "unlabeled"] and not source[0].ignore().any()
    record = build_source("mapillary", tmp_path, unlabeled="ignore")[0]
    assert record.vocabulary == ("bird", "ground animal", "car")
    assert np.array_equal(record.ignore(), labels == 3)


@pytest.mark.parametrize(
    ("base", "maps", "names"),
    [
        ("mapillary_vistas", "labels", "validation/panoptic/panoptic_2018.json"),
        ("mapillary", "labels", "config.json"),
        ("mapillary", "v1.2/labels", "config_v1.2.json"),
    ],
)
def test_mapillary_1_2_layouts(tmp_path, base, maps, names):
    labels = mapillary(tmp_path, base, maps, names, (0, 2, 3, 255))
    source = build_source("mapillary", tmp_path)
    assert source.vocabulary == ("bird", "ground animal", "car")
    assert np.array_equal(source[0].ignore(), np.isin(labels, (3, 255)))
    assert "unlabeled" in build_source("mapillary", tmp_path, unlabeled="class").vocabulary
    with pytest.raises(FileNotFoundError, match=r"config_v2\.0\.json"):
        build_source("mapillary", tmp_path, version="v2.0")


def test_of_two_mapillary_label_sets_the_papers_one_is_taken_and_the_other_by_name(tmp_path):
    new = mapillary(tmp_path, "mapillary", "v2.0/labels", "config_v2.0.json", (0, 2, 3))
    old = mapillary(tmp_path, "mapillary", "v1.2/labels", "config_v1.2.json", (1, 2, 3))
    for version, labels, names in (
        (None, old, ("bird", "ground animal", "car")),
        ("v1.2", old, ("bird", "ground animal", "car")),
        ("v2.0", new, ("bird", "ground animal", "car", "unlabeled")),
    ):
        source = build_source("mapillary", tmp_path, version=version)
        assert source.vocabulary == names
        assert np.array_equal(masks_by_name(source[0])["car"], labels == 2)


def test_a_truncated_config_names_its_file(tmp_path):
    mapillary(tmp_path, "mapillary", "v2.0/labels", "config_v2.0.json", (0,))
    path = tmp_path / "mapillary/config_v2.0.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match=r"config_v2\.0\.json: not valid JSON, perhaps cut off"):
        build_source("mapillary", tmp_path)
    path.write_text('{"labels": [{"name": "x"}]}')
    with pytest.raises(ValueError, match=r"labels\[0\]: no 'readable'; it has name"):
        build_source("mapillary", tmp_path)
