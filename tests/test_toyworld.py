"""The toy world: its facts are true, its files have the real layouts, and its real loaders read them."""

import filecmp
import json
import pickle
import re
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from data.sources import build_source
from data.types import Target
from toy.world import __main__ as make_toy_dataset
from toy.world import words
from toy.world.expressions import expressions
from toy.world.knowledge import FACTS, implicit, unmet
from toy.world.layouts import LAYOUTS, refer
from toy.world.layouts.labels import label_table, mapillary_table, real_names
from toy.world.polygons import coco_polygons, pixel_polygons, rle
from toy.world.scene import CLASSES, COLORS, OBJECTS, PARTS, SIDE, STUFF, make_scene, scene_seed
from toy.world.several import absent, false_premises, none_of_several, several
from toy.world.talk import captions, dialogues
from toy.world.words import center, place, shows_color, shows_size

SCENES = [make_scene(scene_seed("train", index)) for index in range(40)]
IMAGES, VAL_IMAGES = 40, 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("toy") / "data")


def write(out: Path, *more: str) -> Path:
    arguments = [str(out), "--images", str(IMAGES), "--val_images", str(VAL_IMAGES), *more]
    assert make_toy_dataset.main(arguments) == 0
    return out


def test_the_same_seed_gives_the_same_scene_and_splits_never_meet():
    first, again = make_scene(scene_seed("val", 3)), make_scene(scene_seed("val", 3))
    assert np.array_equal(first.image, again.image)
    assert all(np.array_equal(a.mask, b.mask) for a, b in zip(first.things, again.things, strict=True))
    seeds = [scene_seed(split, i, seed) for split in ("base", "train", "val") for seed in (0, 1) for i in range(50)]
    assert len({make_scene(seed).image.tobytes() for seed in seeds[::10]}) == len(seeds[::10])
    assert len(set(seeds)) == len(seeds)
    with pytest.raises(ValueError, match="base, train, val"):
        scene_seed("test", 0)


def test_masks_tile_the_image_and_objects_stay_visible():
    for scene in SCENES:
        assert scene.image.shape == (SIDE, SIDE, 3)
        assert scene.image.dtype == np.uint8
        assert np.array_equal(sum(thing.mask.astype(int) for thing in scene.things), np.ones((SIDE, SIDE)))
        assert 2 <= len(scene.objects) <= 6
        for thing in scene.things:
            assert thing.mask.sum() >= 60
            assert set(thing.parts) <= set(PARTS.get(thing.name, ()))
            for mask in thing.parts.values():
                assert mask.any()
                assert not (mask & ~thing.mask).any()
            if thing.parts:
                assert np.array_equal(np.logical_or.reduce(list(thing.parts.values())), thing.mask)


def test_an_object_shows_its_color():
    for thing, image in ((thing, scene.image) for scene in SCENES for thing in scene.objects if thing.name == "car"):
        body = image[thing.parts["body"]].astype(float)
        nearest = np.abs(body[:, None] - np.array(list(COLORS.values()))).sum(2).argmin(1)
        assert list(COLORS)[Counter(nearest.tolist()).most_common(1)[0][0]] == thing.color


def test_every_class_color_and_size_occurs():
    things = [thing for index in range(250) for thing in make_scene(scene_seed("base", index)).things]
    assert {thing.name for thing in things} == set(CLASSES)
    assert {thing.color for thing in things} == {"", *COLORS}
    assert {thing.size for thing in things} == {"", "small", "large"}
    assert len(OBJECTS) >= 14
    assert len(STUFF) == 6


def test_expressions_fit_exactly_their_target():
    """Each phrase is read back from its words and judged on the boxes alone."""
    kinds = Counter()
    for scene in SCENES:
        for item in expressions(scene):
            kinds[item.kind] += 1
            fitting = [i for i, thing in enumerate(scene.things) if fits(scene, thing, item.text)]
            assert tuple(fitting) == item.targets, item
    assert set(kinds) == {"attribute", "relation", "ordinal", "superlative"}


def fits(scene, thing, text: str) -> bool:
    name = re.findall(rf"\b(?:{'|'.join(CLASSES)})\b", text)[0]
    if thing.name != name:
        return False
    same = [other for other in scene.things if other.name == name]
    (x, y), xs, ys = center(thing), [center(o)[0] for o in same], [center(o)[1] for o in same]
    head, _, tail = text.partition(name)
    for word in text.split():
        if word in COLORS and thing.color != word:
            return False
        if word in ("small", "large") and thing.size != word:
            return False
    if "largest" in head or "smallest" in head:
        areas = [int(other.mask.sum()) for other in same]
        return int(thing.mask.sum()) == (max(areas) if "largest" in head else min(areas))
    if match := re.search(r"(first|second|third) \w+ from the (left|right)", text):
        rank = ("first", "second", "third").index(match.group(1))
        return x == sorted(xs, reverse=match.group(2) == "right")[rank]
    if match := re.search(r"the (left|right|top|bottom) ", head) or re.search(r"nearest the (\w+) side", tail):
        return {"left": x == min(xs), "right": x == max(xs), "top": y == min(ys), "bottom": y == max(ys)}[
            match.group(1)
        ]
    if match := re.search(r"(left of|right of|above|below|nearest) the (\w+)", tail):
        anchor = next(center(other) for other in scene.things if other.name == match.group(2))
        far = [np.hypot(a - anchor[0], b - anchor[1]) for a, b in zip(xs, ys, strict=True)]
        return {
            "left of": x < anchor[0],
            "right of": x > anchor[0],
            "above": y < anchor[1],
            "below": y > anchor[1],
            "nearest": np.hypot(x - anchor[0], y - anchor[1]) == min(far),
        }[match.group(1)]
    return True


def test_phrases_for_several_fit_all_of_them_and_false_ones_none():
    kinds = Counter()
    for index, scene in enumerate(SCENES):
        rng = np.random.default_rng(index)
        names, colors = [thing.name for thing in scene.things], {thing.color for thing in scene.things}
        for item in several(scene):
            kinds[item.kind] += 1
            shared = {name for name in names if name in item.text or words.plural(name) in item.text}
            color = next((color for color in COLORS if f"all {color} things" == item.text), None)
            expected = [i for i, t in enumerate(scene.things) if (t.color == color if color else t.name in shared)]
            assert list(item.targets) == expected and len(expected) > 1, item
        for style in (refer.phrases, refer.looks_only, refer.descriptions):
            for wrong in false_premises(scene, style(scene), rng):
                kinds["false"] += 1
                assert not any(fits(scene, thing, wrong.text) for thing in scene.things), wrong
                assert [i for i, t in enumerate(scene.things) if fits(scene, t, wrong.truth.text)] == [
                    *wrong.truth.targets
                ]
        for text in absent(scene, rng):
            assert not any(fits(scene, thing, text) for thing in scene.things)
        for text in none_of_several(scene, rng):
            kinds["none"] += 1
            assert not colors & set(text.split()) and not any(re.search(rf"\b{name}\b", text) for name in names)
        for short, long, answer in unmet(scene, rng):
            fact = next(fact for fact in FACTS if fact.phrase == short)
            assert not set(fact.fits) & set(names) and short in long and answer.startswith(f"no, there is no {short}")
    assert min(kinds[kind] for kind in ("class", "color", "pair", "false", "none")) > 10


def test_queries_fit_one_class_and_every_class_has_two():
    known: dict[str, set[str]] = {}
    for index in range(150):
        scene = make_scene(scene_seed("base", index))
        for query in implicit(scene, np.random.default_rng(index)):
            (name,) = {scene.things[i].name for i in query.targets}
            assert query.targets == tuple(i for i, thing in enumerate(scene.things) if thing.name == name)
            assert name in query.explanation
            assert query.phrasings[0] == query.query_long
            assert all(query.query_short in text for text in query.phrasings)
            assert name not in query.query_short.split()
            known.setdefault(name, set()).add(query.query_short)
    assert set(known) == set(CLASSES)
    assert min(len(queries) for queries in known.values()) >= 2


def test_dialogues_are_true_and_presence_is_balanced():
    said = Counter()
    for index, scene in enumerate(SCENES):
        names = Counter(thing.name for thing in scene.things)
        for question, answer in (p for d in dialogues(scene, np.random.default_rng(index)) for p in d):
            if match := re.fullmatch(r"is there (?:an? )?(\w+)\?", question):
                assert answer.startswith("yes" if names[match.group(1)] else "no")
                said[answer[:2]] += 1
            if match := re.fullmatch(r"what color is the (\w+)\?", question):
                thing = next(thing for thing in scene.things if thing.name == match.group(1))
                assert answer == f"the {thing.name} is {thing.color}."
                assert shows_color(thing)
            if match := re.fullmatch(r"where is the (\w+)\?", question):
                thing = next(thing for thing in scene.things if thing.name == match.group(1))
                assert answer == f"the {thing.name} is {place(thing)}."
            if match := re.fullmatch(r"which of these can you see: (.*)\?", question):
                offered = match.group(1).split(", ")
                assert re.findall(r"\w+", answer.removeprefix("i see").replace(" and ", " ")) == [
                    name for name in offered if names[name]
                ]
    assert said["ye"] == said["no"] > 0


def test_captions_name_every_object_with_color_and_place():
    for index, scene in enumerate(SCENES):
        first, second, third = captions(scene, np.random.default_rng(index))
        for thing in scene.objects:
            looks = [thing.color] * shows_color(thing) + [thing.size] * shows_size(thing)
            assert all(word in first for word in (thing.name, place(thing), *looks))
            assert f"{thing.name} {place(thing)}" in third
        assert all(thing.name in text for thing in scene.stuff for text in (first, second, third))


def test_polygons_and_run_lengths_give_the_mask_back():
    for thing in (thing for scene in SCENES[:12] for thing in scene.things):
        filled = np.zeros((SIDE, SIDE), np.uint8)
        for polygon in pixel_polygons(thing.mask):
            cv2.fillPoly(filled, [np.array(polygon, np.int32)], 1)
        assert np.array_equal(filled > 0, thing.mask)
        parts = coco_mask.frPyObjects(coco_polygons(thing.mask), SIDE, SIDE)
        assert np.array_equal(coco_mask.decode(coco_mask.merge(parts)) > 0, thing.mask)
        assert np.array_equal(coco_mask.decode(rle(thing.mask)) > 0, thing.mask)


@pytest.mark.parametrize("dataset", ["ade20k", "cocostuff", "cityscapes", "mapillary"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_the_semantic_source_finds_the_scene_in_its_label_map(root: Path, dataset: str, split: str):
    source = build_source(f"{dataset}", root, split=split, classes=f"toy_classes/{dataset}.txt")
    assert list(source[0].vocabulary) == real_names(dataset)
    scenes = {scene.image.tobytes(): scene for scene in scenes_of(dataset, split)}
    for index in range(len(source)):
        record = source[index]
        scene = closest(np.array(Image.open(record.image)), scenes)
        for target in record.targets:
            masks = [thing.mask for thing in scene.things if target.phrase in also_called(thing.name, dataset)]
            assert np.array_equal(np.logical_or.reduce(masks), mask_of(target))


def scenes_of(dataset: str, split: str):
    if split == "val":
        return [make_scene(scene_seed("val", index)) for index in range(VAL_IMAGES)]
    pool = list(make_toy_dataset.POOLS).index(LAYOUTS[dataset].pool)
    return [make_scene(scene_seed("train", (pool << 24) + index)) for index in range(IMAGES)]


def closest(image: np.ndarray, scenes: dict):
    return min(scenes.values(), key=lambda scene: np.abs(scene.image.astype(int) - image).mean())


def mask_of(target: Target) -> np.ndarray:
    assert target.mask is not None
    return target.mask()


def also_called(name: str, dataset: str) -> set[str]:
    real = {
        "ade20k": {"fish": "animal"},
        "cocostuff": {"ball": "sports ball", "lamp": "light"},
        "cityscapes": {"house": "building", "tree": "vegetation", "grass": "terrain"},
        "mapillary": {"house": "building", "tree": "vegetation", "flower": "vegetation", "grass": "terrain"},
    }
    return {real[dataset].get(name, name)}


def test_label_values_are_the_published_ones():
    assert dict(label_table("ade20k"))[26] == "house"
    assert dict(label_table("cityscapes"))[26] == "car"
    names = dict(enumerate(readable for _, readable in mapillary_table()))
    assert len(names) == 124
    assert [names[i] for i in (21, 27, 30, 61, 65, 108, 123)] == [
        *("Road", "Building", "Person", "Sky", "Water", "Car", "Unlabeled")
    ]


@pytest.mark.parametrize("name", ["refcoco|unc", "refcoco+|unc", "refcocog|umd", "refclef|unc"])
def test_refer_sets_are_read_by_the_real_loader(root: Path, name: str):
    tests = {"refcocog|umd": ["test"], "refclef|unc": ["testA", "testB", "testC"]}
    splits = ["train", "val", *tests.get(name, ["testA", "testB"])]
    images = {}
    for split in splits:
        source = build_source(f"{name}|{split}", root)
        records = [source[index] for index in range(len(source))]
        assert all(0.9 * mask.size > mask.sum() > 40 for r in records for mask in map(mask_of, r.targets))
        images[split] = {record.image for record in records}
        if split == "testC":
            assert all("fish" in target.phrase for record in records for target in record.targets)
        if split == "testA":
            assert all("person" in target.phrase for record in records for target in record.targets)
        if name.startswith("refcoco+"):
            words = " ".join(target.phrase for record in records for target in record.targets).split()
            assert not {"left", "right", "above", "below", "top", "nearest", "first"} & set(words)
    assert not images["train"] & set().union(*(images[split] for split in splits[1:]))


def test_refs_have_the_released_keys(root: Path):
    refs = pickle.loads((root / "refer_seg/refcoco/refs(unc).p").read_bytes())
    keys = {"ref_id", "ann_id", "category_id", "image_id", "split", "file_name", "sentences", "sent_ids"}
    assert all(set(ref) == keys for ref in refs)
    assert all(set(s) == {"sent_id", "sent", "raw", "tokens"} for ref in refs for s in ref["sentences"])
    ids = [identity for ref in refs for identity in ref["sent_ids"]]
    assert len(set(ids)) == len(ids)
    instances = json.loads((root / "refer_seg/refcoco/instances.json").read_text())
    assert {ref["ann_id"] for ref in refs} <= {annotation["id"] for annotation in instances["annotations"]}


def test_other_refs_have_their_released_keys(root: Path):
    ref = {"ref_id", "ann_id", "category_id", "image_id", "split", "file_name", "sentences", "sent_ids"}
    said = {"sent_id", "sent", "raw", "tokens"}
    for name, file, of_ref, of_sentence in (
        ("grefcoco", "grefs(unc).json", {"no_target"}, set()),
        ("refzom", "Ref_ZOM.p", {"source"}, set()),
        ("R-refcoco", "refs(unc_exclude_unified).p", set(), {"exist"}),
        ("fprefcocog", "refs(berkeley_exclude_unified).p", set(), {"is_false_premise", "gt_sent"}),
    ):
        data = (root / "refer_seg" / name / file).read_bytes()
        refs = json.loads(data) if file.endswith("json") else pickle.loads(data)
        assert all(set(entry) == ref | of_ref for entry in refs)
        assert all(set(sentence) == said | of_sentence for entry in refs for sentence in entry["sentences"])
        if of_ref:
            none = {"grefcoco": [-1], "refzom": []}[name]
            sizes = Counter(0 if entry["ann_id"] == none else len(entry["ann_id"]) for entry in refs)
            assert sizes[0] and sizes[1] and sizes[2], "no, one and several targets"


def test_reason_and_vqa_are_read_by_the_real_loaders(root: Path):
    for split in ("train", "val", "test"):
        source = build_source(f"ReasonSeg|{split}", root)
        records = [source[index] for index in range(len(source))]
        assert all(mask_of(record.targets[0]).any() for record in records)
    vqa = build_source("llava_instruct_150k", root)
    turns = [turn for index in range(len(vqa)) for dialogue in vqa[index].dialogues for turn in dialogue]
    assert len(turns) > len(vqa) > 0


def test_writing_is_deterministic_and_only_what_was_asked(root: Path, tmp_path: Path):
    again = write(tmp_path / "again")
    files = written(root)
    assert files == written(again)
    _, different, errors = filecmp.cmpfiles(root, again, [str(file) for file in files], shallow=False)
    assert different == errors == []
    only = write(tmp_path / "only", "--only", "reason_seg")
    assert sorted(path.name for path in only.iterdir()) == ["reason_seg", "toy_world.json", "toy_world_files.txt"]


def written(out: Path) -> list[Path]:
    """The files below a folder, but for the indexes that reading leaves there."""
    files = (path.relative_to(out) for path in out.rglob("*") if path.is_file())
    return sorted(path for path in files if path.parts[0] != ".index")


def test_a_folder_of_others_is_never_replaced(root: Path, tmp_path: Path):
    with pytest.raises(SystemExit, match="--force"):
        write(root)
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(SystemExit, match="not a toy data set"):
        write(tmp_path, "--force")
    assert (tmp_path / "photo.jpg").is_file()
    with pytest.raises(SystemExit):
        make_toy_dataset.main([str(tmp_path / "new"), "--only", "imagenet"])


def test_every_file_is_listed_as_the_toy_world_s_own(root: Path):
    assert make_toy_dataset.strangers(root) == []


def test_what_was_put_beside_the_toy_world_is_never_removed(tmp_path: Path):
    out = write(tmp_path / "world", "--only", "reason_seg")
    (out / ".index").mkdir()
    (out / ".index" / "rows.jsonl").write_text("")  # made by reading it
    write(out, "--force", "--only", "reason_seg")
    (out / "coco").mkdir()
    (out / "coco" / "real.jpg").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"did not write \(coco/real\.jpg\)"):
        write(out, "--force", "--only", "reason_seg")
    assert (out / "coco" / "real.jpg").is_file() and (out / "reason_seg").is_dir()
