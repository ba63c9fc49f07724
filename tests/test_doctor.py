"""The data doctor: all well on a whole toy folder, and each planted fault is found, named and placed."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from data.encode import Encoder
from data.llama_tokenizer import LLAMA
from data.sources import SOURCES, build_source
from data.templates import template
from data.tokens import load_tokenizer
from data.types import IMAGE_ID
from systems.base import SYSTEMS, build_system
from tests.records import OWN
from tests.tiny_assistant import ON_PHOTOGRAPHS
from tools.doctor.__main__ import main
from tools.doctor.examine import Report
from tools.doctor.plan import Need
from tools.doctor.table import load_hints
from tools.doctor.words import row_text
from toy.world.__main__ import main as make_toy
from utils.config import load_recipe

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = OWN / "lisa"
REFER, PHOTOS = "refer_seg/refcoco", "refer_seg/images/mscoco/images/train2014"
MAPS, REASON, SAID = (
    "ade20k/annotations/training",
    "reason_seg/ReasonSeg/train",
    "llava_dataset/llava_instruct_150k.json",
)
RECIPES = list(  # one for each choice of data: those of other sizes, backbones and mask heads have the same
    {
        repr((recipe.system, recipe.options, recipe.data, recipe.eval)): path
        for path in sorted((ROOT / "configs").rglob("*.yaml"))
        if path.stem not in ON_PHOTOGRAPHS
        for recipe in [load_recipe(path)]
    }.values()
)
RECIPE = {
    "system": "lisa",
    "data": {
        "mixture": [
            {"task": "sem_seg", "sets": ["ade20k"]},
            {"task": "refer_seg", "sets": ["refcoco"]},
            {"task": "vqa", "sets": ["llava_instruct_150k"]},
            {"task": "reason_seg", "sets": ["ReasonSeg|train", {"source": "cityscapes", "rate": 0}]},
        ]
    },
    "eval": {"suites": ["ReasonSeg|val"], "final_suites": ["refcoco|unc|val"]},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("doctor") / "toy"
    only = ["ade20k", "cocostuff", "refcoco", "reason_seg", "llava_instruct"]
    assert make_toy([str(root), "--images", "40", "--val_images", "3", "--only", *only]) == 0
    return root


@pytest.fixture
def root(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "toy"))


def doctor(root, capsys, *arguments, recipe=RECIPE):
    """(exit status, what was printed)."""
    path = root.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    status = main([str(path), "--dataset_dir", str(root), "--full", *arguments])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def rewrite(path, change):
    """Change the JSON or pickle in a file."""
    load, dump = (pickle.loads, pickle.dumps) if path.suffix == ".p" else (json.loads, lambda v: json.dumps(v).encode())
    value = load(path.read_bytes())
    path.write_bytes(dump(change(value) or value))


def first(folder, pattern="*"):
    return sorted(folder.glob(pattern))[0]


def trained(root):
    """A training annotation of RefCOCO, with its picture's entry."""
    refs = pickle.loads((root / REFER / "refs(unc).p").read_bytes())
    return next(ref for ref in refs if ref["split"] == "train")


def edit_annotation(root, **fields):
    number = trained(root)["ann_id"]
    rewrite(
        root / REFER / "instances.json",
        lambda data: [entry.update(fields) for entry in data["annotations"] if entry["id"] == number] and None,
    )


def edit_image(root, **fields):
    number = trained(root)["image_id"]
    rewrite(
        root / REFER / "instances.json",
        lambda data: [entry.update(fields) for entry in data["images"] if entry["id"] == number] and None,
    )


def save_map(root, labels):
    Image.fromarray(labels).save(first(root / MAPS))


def side(root):
    return np.asarray(Image.open(first(root / MAPS))).shape


def overwrite(path, count=200):
    """Noise in the middle of a file, which stays as long as it was."""
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[:middle] + np.random.default_rng(0).bytes(count) + data[middle + count :])


class Attack:
    def __reduce__(self):
        return os.system, ("true",)


FAULTS = {
    "folder missing": (
        lambda r: shutil.rmtree(r / "ade20k/images/training"),
        ["train ade20k: missing", "no ade20k/images/training"],
    ),
    "refs missing": (
        lambda r: (r / REFER / "refs(unc).p").unlink(),
        ["train refcoco: missing", r"no refer_seg/refcoco/refs\(unc\).p"],
    ),
    "file of another split": (
        lambda r: (r / REFER / "refs(unc).p").rename(r / REFER / "refs(google).p"),
        [r"refcoco holds instances.json, refs\(google\).p"],
    ),
    "split missing": (
        lambda r: rewrite(r / REFER / "refs(unc).p", lambda refs: [ref for ref in refs if ref["split"] == "train"]),
        ["eval refcoco|unc|val: cannot be read", "no ref of split 'val'"],
    ),
    "truncated JSON": (
        lambda r: os.truncate(r / REFER / "instances.json", 5000),
        ["refcoco: cannot be read", "instances.json: not valid JSON, perhaps cut off"],
    ),
    "truncated pickle": (
        lambda r: os.truncate(r / REFER / "refs(unc).p", 900),
        [r"refs\(unc\).p: not a complete pickle"],
    ),
    "pickle that runs code": (
        lambda r: (r / REFER / "refs(unc).p").write_bytes(pickle.dumps(Attack())),
        [r"refs\(unc\).p: refused, the pickle asks for posix.system"],
    ),
    "picture missing": (
        lambda r: first(r / PHOTOS).unlink(),
        ["train refcoco: images missing", r"no file .*COCO_train2014_000000000001.jpg"],
    ),
    "half a picture": (
        lambda r: os.truncate(first(r / "ade20k/images/training"), 700),
        ["train ade20k: broken items", r"ADE_train_00000001.jpg"],
    ),
    "damage inside a picture": (
        lambda r: overwrite(first(r / "ade20k/images/training")),
        ["warning: train ade20k: damaged images", "ADE_train_00000001.jpg: Corrupt JPEG data"],
    ),
    "map of another size": (
        lambda r: save_map(r, np.zeros((20, 30), np.uint8) + 3),
        ["ade20k: broken items", r"ADE_train_00000001.jpg: is \(\d+, \d+\), the mask of .* \(20, 30\)"],
    ),
    "unknown label values": (
        lambda r: save_map(r, np.full(side(r), 200, np.uint8)),
        ["ade20k: broken items", "ADE_train_00000001.png: unknown label values 200"],
    ),
    "coloured label map": (
        lambda r: save_map(r, np.zeros((*side(r), 3), np.uint8)),
        ["ADE_train_00000001.png: a label map has one channel, this one is RGB"],
    ),
    "map without picture": (
        lambda r: first(r / "ade20k/images/training").unlink(),
        ["ade20k: missing", "1 of .* label maps have no image"],
    ),
    "unlabelled map": (lambda r: save_map(r, np.zeros(side(r), np.uint8)), ["warning: train ade20k: nothing to ask"]),
    "two-point polygon": (
        lambda r: edit_annotation(r, segmentation=[[1, 1, 5, 5]]),
        ["refcoco: broken items", r"instances.json: annotation \d+ \(ref \d+\): .*point"],
    ),
    "RLE of another size": (
        lambda r: edit_annotation(r, segmentation={"size": [4, 4], "counts": [6, 4, 6]}),
        ["refcoco: broken items", r"annotation \d+ .*\(4, 4\)|\[4, 4\]"],
    ),
    "empty mask": (
        lambda r: edit_annotation(r, segmentation=[]),
        ["fault: train refcoco: broken items", "the segmentation is empty"],
    ),
    "size that is not the picture's": (
        lambda r: edit_image(r, height=400, width=300),
        ["refcoco: broken items", r"the mask of .* \(400, 300\)"],
    ),
    "path that leaves the folder": (
        lambda r: edit_image(r, file_name="../../../../etc/hosts.jpg"),
        ["refcoco: broken items", r"the path '../../../../etc/hosts.jpg' leaves"],
    ),
    "absolute path": (lambda r: edit_image(r, file_name="/etc/hosts"), ["the path '/etc/hosts' leaves"]),
    "id given twice": (
        lambda r: rewrite(r / REFER / "instances.json", lambda d: d["annotations"].append(d["annotations"][0])),
        ["refcoco: cannot be read", r"the id \d+ is given twice"],
    ),
    "picture under two ids": (
        lambda r: edit_image(r, file_name=sorted((r / PHOTOS).iterdir())[1].name),
        ["warning: train refcoco: images in several records"],
    ),
    "annotation that is not there": (
        lambda r: rewrite(r / REFER / "refs(unc).p", lambda refs: refs[0].update(ann_id=987654)),
        ["names annotation 987654, which is not in"],
    ),
    "trained and evaluated on": (
        lambda r: rewrite(r / REFER / "refs(unc).p", lambda refs: refs.append({**trained(r), "split": "val"})),
        [r"warning: train refcoco: trained and evaluated on \(refcoco\|unc\|val\)", "1 of .* training images"],
    ),
    "picture without JSON": (
        lambda r: first(r / REASON, "*.json").unlink(),
        [r"ReasonSeg\|train: missing", r"\.jpg has no partner"],
    ),
    "JSON without text": (
        lambda r: rewrite(first(r / REASON, "*.json"), lambda entry: entry.update(text=[])),
        [r"ReasonSeg\|train: broken items", "'text' must be a list of one or more queries"],
    ),
    "dialogue out of turn": (
        lambda r: rewrite(r / SAID, lambda entries: entries[0]["conversations"].pop() and None),
        ["llava_instruct_150k: broken items", "human and gpt must take turns"],
    ),
    "dialogue file is no list": (
        lambda r: (r / SAID).write_text("{}"),
        ["llava_instruct_150k: cannot be read", "expected a list"],
    ),
}  # fmt: skip
ONLY_WARNED = {
    "damage inside a picture",
    "unlabelled map",
    "picture under two ids",
    "trained and evaluated on",
}


def test_a_whole_folder_is_all_well(root, capsys):
    status, printed = doctor(root, capsys, "--strict")
    assert status == 0 and printed.rstrip().endswith("all well")
    for name in ("ade20k", "refcoco", "llava_instruct_150k", r"ReasonSeg\|train"):
        assert re.search(rf"train  {name} +found +\d+ +\d", printed), name
    assert "cityscapes" not in printed, "what the recipe does not use may be missing"
    assert re.search(r"eval   refcoco\|unc\|val +found +3 ", printed)


@pytest.fixture(scope="module")
def every_layout(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipes") / "toy"
    assert make_toy([str(root), "--images", "24", "--val_images", "2"]) == 0
    return root


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_toy_world_has_what_every_recipe_needs(every_layout, capsys, recipe):
    status = main([str(recipe), "--dataset_dir", str(every_layout), "--check", "3"])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert re.search(r"train  \S.* found ", printed) and not re.search(" (missing|broken) ", printed)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(root, capsys, name):
    plant, wanted = FAULTS[name]
    doctor(root, capsys)  # the index of the whole folder must not hide what comes after
    plant(root)
    status, printed = doctor(root, capsys)
    for text in wanted:
        assert re.search(text, printed), printed
    assert status == (name not in ONLY_WARNED)
    assert not re.search(r"\n(fault|warning): .*(Traceback|NameError)", printed)
    if name in ONLY_WARNED:
        assert doctor(root, capsys, "--strict")[0] == 1


def test_a_corrupt_index_is_no_fault(root, capsys):
    doctor(root, capsys)
    for path in (root / ".index").glob("*/*"):
        os.truncate(path, path.stat().st_size // 2)
    assert doctor(root, capsys)[0] == 0


def test_the_rule_of_the_recipe_settles_the_overlap(root, capsys):
    FAULTS["trained and evaluated on"][0](root)
    _, printed = doctor(root, capsys, "--set", "data.exclude_val=eval_suites")
    assert "trained and evaluated on" not in printed
    _, printed = doctor(root, capsys, "--set", "data.exclude_val=refer_family")
    assert "trained and evaluated on" not in printed


def test_without_full_some_records_are_drawn_and_the_rest_judged(root, capsys):
    path = root.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    assert main([str(path), "--dataset_dir", str(root), "--check", "2"]) == 0
    assert re.search(r"train  refcoco +found +\d+ +~\d+ +- +2 ", capsys.readouterr().out)


def test_hints_say_what_is_missing_and_where_to_get_it(root, capsys):
    shutil.rmtree(root / "ade20k")
    shutil.rmtree(root / REFER)
    status, printed = doctor(root, capsys, "--fix-hints")
    assert status == 1
    assert re.search(r"train  ade20k +missing .*expects ade20k/images/", printed)
    for text in ("ADEChallengeData2016.zip", "unzip refcoco.zip -d", "refer_seg/refcoco/instances.json"):
        assert text in printed
    assert "llava_instruct_150k.json -d" not in printed


def test_every_source_has_hints():
    hints = load_hints()
    assert set(hints) == set(SOURCES)
    assert all(hint["expects"] and hint["from"] and hint["unpack"] for hint in hints.values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"system": "lissa"}, "no system 'lissa'"),
        ({"options": {"number": 1}}, "number"),
        ({"eval": {"suites": ["refcoco|unc|valid"]}}, r"no suite 'refcoco\|unc\|valid'"),
        ({"data": {"mixtures": []}}, "no field in data 'mixtures'"),
    ],
)
def test_a_recipe_that_cannot_be_read(root, capsys, change, words):
    status, printed = doctor(root, capsys, recipe={**RECIPE, **change})
    assert status == 2 and re.search(words, printed)


def test_a_source_that_does_not_exist_is_a_fault_of_the_recipe(root, capsys):
    recipe = {
        **RECIPE,
        "data": {"mixture": [{"task": "x", "sets": ["ade20", {"source": "ade20k", "options": {"clases": 1}}]}]},
    }
    status, printed = doctor(root, capsys, recipe=recipe)
    assert status == 1 and "no source 'ade20'" in printed and "no option 'clases'" in printed


def test_sheets_show_pictures_and_the_exact_words(root, capsys, tmp_path):
    status, _ = doctor(root, capsys, "--sample", "2", "--out", str(tmp_path / "sheets"))
    assert status == 0
    sheets = sorted((tmp_path / "sheets").glob("*.png"))
    assert [path.name for path in sheets] == [
        "00_ade20k.png", "01_refcoco.png", "02_llava_instruct_150k.png", "03_ReasonSeg_train.png"
    ]  # fmt: skip
    words = sheets[1].with_suffix(".txt").read_text()
    assert all(f"--- {name}: " in words for name in SYSTEMS)
    assert words.count("=== record ") == 2 and "USER: <im_start><image><im_end>\n" in words and "[SEG]" in words
    assert np.asarray(Image.open(sheets[1])).std() > 20, "an image is on it"


@pytest.mark.parametrize("name", ["lisa", "lasagna"])
def test_the_words_are_those_that_are_encoded(root, name):
    system = build_system(name)
    tokenizer = load_tokenizer(TOKENIZER, system.tokens)
    encoder = Encoder(tokenizer, system.tokens)
    source = build_source("ade20k", root)
    for dialogue in system.task.converse(source[0], np.random.default_rng(0)):
        text = row_text(dialogue, system.tokens, template("llava_v1"), LLAMA)
        before, after = (tokenizer(part).input_ids for part in text.split("<image>"))
        assert encoder.encode(dialogue).ids == [*before, IMAGE_ID, *after[1:]]


def test_findings_of_a_kind_are_counted_and_the_first_is_kept():
    report = Report(Need("train", "x"))
    for text in ("first", "second"):
        report.note("fault", "broken items", text)
    assert report.faults == 2 and [(f.text, f.count) for f in report.findings] == [("first", 2)]
