"""Bad records while training, the doctor and the Python interface: what is skipped, counted, named and refused."""

from __future__ import annotations

import json
import re

import cv2
import numpy as np
import pytest
from PIL import Image

from data.collate import SampleBuilder
from data.mixture import Mixture, Part
from data.types import Record, Target
from data.views import ClipView, SamView, Views
from evaluation.catalog import Suite
from evaluation.metrics.matching import Names, assign_claims, read_list
from evaluation.runner import source_options
from evaluation.wrappers import PresentOnly
from systems.base import build_system
from tests import messy
from tests.messy import BOX
from tools.doctor.__main__ import main as doctor_main
from tools.doctor.rehearsal import Rehearsal
from utils.config import DataConfig, Recipe, from_dict, load_recipe
from utils.images import as_rgb, read_image

JSONL = {"source": "jsonl", "options": {"file": "q.jsonl"}}


# --- data.on_bad_sample


class Fails:
    """Two records; the second raises."""

    def __init__(self, root, error, late=False):
        self.paths, self.error, self.late = [messy.picture(root / f"{n}.jpg") for n in (0, 1)], error, late

    def __len__(self):
        return 2

    def image_paths(self):
        return [str(path) for path in self.paths]

    def __getitem__(self, index):
        if index and not self.late:
            raise self.error
        return Record(self.paths[index], "refer", (Target("x", self._raise if index else self._draw),))

    def _raise(self):
        raise self.error

    def _draw(self):
        return np.ones(messy.SIZE, bool)


def maker(tmp_path) -> SampleBuilder:
    path = messy.recipe(tmp_path / "r.yaml", ["jsonl"])
    made = Rehearsal.of(load_recipe(path)).maker
    return SampleBuilder(made.task, made.encoder, Views(ClipView(16), SamView(16)))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        cv2.error("too large"), TypeError("NoneType"), AttributeError("no attribute"), MemoryError("16 GB"),
        Image.DecompressionBombError("a bomb"), KeyError("width"), OverflowError("int"), ValueError("bad"),
        OSError("bad"), RecursionError("deep"), ZeroDivisionError("by zero"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_any_error_of_one_record_is_skipped_counted_and_named(tmp_path, error, late):
    source = Fails(tmp_path, error, late)
    mixture = Mixture([Part("set a", source)], maker(tmp_path), on_bad_sample="skip")
    messages = [message for index in range(8) for message in mixture.sample(index).skipped]
    assert messages and all("set a, record 1" in message for message in messages)
    if not isinstance(error, (ValueError, OSError)):
        assert all("1.jpg" in message and type(error).__name__ in message for message in messages)
    strict = Mixture([Part("set a", source)], maker(tmp_path))
    with pytest.raises(type(error)) as caught:
        for index in range(8):
            strict.sample(index)
    assert "record 1 of set a" in caught.value.__notes__[-1]


def test_a_bad_entry_of_a_file_is_skipped_and_counted(tmp_path):
    root = messy.jsonl(tmp_path / "data", {"phrase": None, "mask": None}, {"polygons": [BOX]})
    data = from_dict(DataConfig, {"dataset_dir": str(root), "mixture": [{"task": "x", "sets": [JSONL]}]})
    with pytest.raises(ValueError, match="line 1: phrase must be text"):
        Mixture.build(data, maker(tmp_path))
    data = from_dict(DataConfig, {**vars(data), "on_bad_sample": "skip"})
    mixture = Mixture.build(data, maker(tmp_path))
    skipped = [message for index in range(12) for message in mixture.sample(index).skipped]
    assert skipped and all("q.jsonl: line 1: phrase must be text" in message for message in skipped)


# --- the doctor


def test_words_that_the_encoder_refuses_are_named_each_kind_once(tmp_path, capsys):
    root = messy.jsonl(
        tmp_path / "data",
        *({"phrase": f"the <image> cup {n}", "polygons": [BOX]} for n in range(5)),
        {"phrase": "the [SEG] cup", "polygons": [BOX]},
        {"phrase": "{braces} {0} %s", "polygons": [BOX]},
    )
    status, printed = messy.doctor(root, [JSONL], capsys)
    assert status == 1 and "6 faults" in printed
    assert len(re.findall("words that cannot be encoded", printed)) == 2
    assert "(5 times" in printed and "'the <image> cup 0'" in printed and "the token '[SEG]'" in printed
    assert "braces" not in printed and printed.count("the <image> cup") == 3


@pytest.mark.parametrize("version", ["assets/toy/llava", "nowhere/llava"])
def test_mask_tokens_are_found_with_and_without_a_tokenizer(tmp_path, capsys, version):
    root = messy.coco(tmp_path / "data", categories=[{"id": 1, "name": "cup <ins>"}, {"id": 2, "name": "dog"}])
    model = {"version": str(messy.ROOT / version)}
    sets = [{"source": "coco", "options": {"annotations": "a.json", "images": "img"}}]
    status, printed = messy.doctor(root, sets, capsys, "toy/lasagna", model=model)
    assert status == 1 and "the token '<ins>'" in printed
    assert ("not checked: the length of rows" in printed) == (version == "nowhere/llava")


def test_rows_that_do_not_fit_are_faults(tmp_path, capsys):
    root = messy.jsonl(tmp_path / "data", {"phrase": "cup " * 200, "polygons": [BOX]})
    version = str(messy.ROOT / "assets/toy/llava")
    status, printed = messy.doctor(root, [JSONL], capsys, model={"version": version, "model_max_length": 320})
    assert status == 1 and "does not fit in model_max_length 320" in printed


def test_questions_of_evaluation_are_encoded_too(tmp_path, capsys):
    root = messy.jsonl(tmp_path / "data", {"phrase": "the <image> cup", "polygons": [BOX]})
    path = messy.recipe(tmp_path / "r.yaml", [JSONL | {"rate": 0}])
    own = {"name": "mine", "metric": "overlap"} | JSONL
    arguments = ["--set", f"eval.custom=[{json.dumps(own)}]", "--set", "eval.suites=[mine]"]
    assert doctor_main([str(path), "--dataset_dir", str(root), "--full", *arguments]) == 1
    assert "eval mine: broken items" in (printed := capsys.readouterr().out) and "<image>" in printed


def test_bad_records_are_each_named_and_the_good_ones_counted(tmp_path, capsys):
    bad = [messy.annotation(id=n, segmentation=[], bbox=[1, 2, 3, 4]) for n in (1, 2)]
    images = [{"id": n, "file_name": "0.jpg", "height": 48, "width": 64} for n in range(3)]
    entries = [entry | {"image_id": n} for n, entry in enumerate([*bad, messy.annotation(id=3)])]
    root = messy.coco(tmp_path / "data", images=images, annotations=entries)
    sets = [{"source": "coco", "options": {"annotations": "a.json", "images": "img"}}]
    status, printed = messy.doctor(root, sets, capsys)
    assert (
        status == 1 and "broken items (2 times" in printed and "annotation 1:" in printed and "annotation 2:" in printed
    )


def test_one_kind_of_bad_entry_is_listed_once(tmp_path, capsys):
    values = [None, ["a"], 5, {"b": None}]
    root = messy.jsonl(tmp_path / "data", *({"phrase": value, "polygons": [BOX]} for value in values))
    status, printed = messy.doctor(root, [JSONL], capsys)
    assert status == 1 and printed.count("fault: ") == 1 and "broken items (4 times" in printed


def test_classes_that_never_occur(tmp_path, capsys):
    root = messy.folder(tmp_path / "data", "background\ncup\nunicorn")
    _, printed = messy.doctor(root, ["folder"], capsys)
    assert "warning: train folder: classes that never occur\n    1 of 3: unicorn" in printed


# --- numbers of a recipe


@pytest.mark.parametrize(
    ("section", "field", "value", "allowed"),
    [
        ("train", "epochs", 0, "1 or more"), ("train", "steps_per_epoch", -1, "1 or more"),
        ("train", "batch_size", 0, "1 or more"), ("train", "grad_accumulation_steps", 0, "1 or more"),
        ("train", "lr", -1e-4, "above 0"), ("train", "lr", float("nan"), "above 0"), ("train", "lr", "inf", "above 0"),
        ("train", "beta2", 1.0, "0 or more and below 1"), ("train", "print_freq", 0, "1 or more"),
        ("train", "seed", -1, "0 or more and at most 4294967295"), ("train", "warmup_steps", -5, "0 or more"),
        ("train", "save_steps", -1, "0 or more"), ("train", "keep_checkpoints", 0, "1 or more"),
        ("data", "workers", -1, "0 or more"), ("data", "prefetch", 0, "1 or more"),
        ("data", "val_workers", -2, "0 or more"), ("eval", "batch_size", 0, "1 or more"),
        ("eval", "limit", -1, "0 or more"), ("eval", "every_epochs", 0, "1 or more"),
        ("loss", "ce", -1, "0 or more"), ("model", "model_max_length", -1, "0 or more"),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused_with_field_value_and_range(section, field, value, allowed):
    with pytest.raises(ValueError, match=rf"^{section}\.{field}: .* is out of range; it must be {allowed}$"):
        from_dict(Recipe, {section: {field: value}})


def test_nested_numbers_are_checked_too():
    sets = [{"source": "ade20k", "rate": -1}]
    with pytest.raises(ValueError, match=r"^data\.mixture\[0\]\.sets\[0\]\.rate: -1\.0 is out of range"):
        from_dict(Recipe, {"data": {"mixture": [{"task": "x", "sets": sets}]}})
    with pytest.raises(ValueError, match=r"^model\.lora\.dropout: 1\.0 .*below 1"):
        from_dict(Recipe, {"model": {"lora": {"dropout": 1}}})


@pytest.mark.parametrize("name", ["", " ", ".", "..", "../other", "/tmp/x"])
def test_a_run_needs_a_folder_of_its_own(name):
    with pytest.raises(ValueError, match=r"run\.exp_name: .* names no folder"):
        from_dict(Recipe, {"run": {"exp_name": name}})


@pytest.mark.parametrize("name", [False, True, 5, 1.5])
def test_text_that_yaml_reads_as_something_else_is_refused(name):
    with pytest.raises(ValueError, match=r"run\.exp_name: expected str, got .*write text in quotes"):
        from_dict(Recipe, {"run": {"exp_name": name}})
    assert from_dict(Recipe, {"data": {"exclude_val": False}}).data.exclude_val == "off"


# --- images in the Python API


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "I;16", "1", "LA"])
def test_a_pil_picture_looks_as_its_file_does(tmp_path, mode):
    ramp = np.linspace(0, 255, 64).astype(np.uint8)[None].repeat(48, 0)
    image = Image.fromarray(ramp.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(ramp).convert(mode)
    image.save(tmp_path / "a.png")
    read = Image.open(tmp_path / "a.png")
    assert read.mode == mode
    assert np.array_equal(as_rgb(read), read_image(tmp_path / "a.png")) and len(np.unique(as_rgb(read))) > 1


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_without_a_range_are_refused(kind):
    with pytest.raises(ValueError, match="no agreed range"):
        as_rgb(Image.fromarray(np.ones((4, 4), kind)))


# --- names, suites, weights


NAMES = ["misc.", "table, wooden", ".38 revolver", "a.k.a.", "..."]


@pytest.mark.parametrize("form", ["released", "paper"])
def test_a_perfect_answer_is_read_whole_whatever_marks_names_have(form):
    system = build_system("lasagna", {"tokens": form})
    targets = tuple(Target(name, lambda: np.ones((2, 2), bool)) for name in NAMES[:4])
    (query,) = system.task.queries(Record(messy.ROOT, "classes", targets, tuple(NAMES[:4])))
    text = "".join(part if isinstance(part, str) else "".join(system.tokens.mask) for part in query.reference_answer)
    names = Names(NAMES[:4])
    reading = read_list(system.read(text), query.phrases, names)
    assert reading.masks == ((0, 0), (1, 1), (2, 2), (3, 3)) and reading.unmatched == 0
    claims = list(reversed(system.read(text)))
    assert [claim.mask for claim in assign_claims(claims, query.phrases)] == [0, 1, 2, 3]


def test_a_name_with_a_mark_beside_one_without():
    names = Names(["misc", "misc.", "dog"])
    assert [names.exact(name) for name in ("misc", "misc.", "dog;", "cat")] == [0, 1, 2, None]


class Some:
    def __init__(self, *present):
        self.present = present

    def __len__(self):
        return len(self.present)

    def __getitem__(self, index):
        there = (lambda: np.ones((2, 2), bool)) if self.present[index] else None
        return Record(messy.ROOT / str(index), "refer", (Target("x", there), Target("y", None)))


def test_present_only_leaves_out_pictures_of_which_nothing_is_left():
    source = PresentOnly(Some(False, True, True, False))
    assert len(source) == 2 and [source[i].image.name for i in (0, 1)] == ["1", "2"]
    assert [path[-1] for path in source.image_paths()] == ["1", "2"] and len(source[0].targets) == 1
    with pytest.raises(ValueError, match="nothing is present in any of 2 records"):
        PresentOnly(Some(False, False))


def test_class_tables_that_contradict_each_other_are_refused():
    sets = [{"source": "ade20k", "options": {"classes": names}} for names in (["sky"], ["wall"])]
    recipe = from_dict(Recipe, {"data": {"mixture": [{"task": "x", "sets": sets}]}})
    suite = Suite("ade20k|val", "semantic", "semantic", "")
    with pytest.raises(ValueError, match=r"ade20k do not agree on classes \(\['sky'\] and \['wall'\]\)"):
        source_options(recipe, suite)
    assert source_options(recipe, suite, "mine.txt") == {"classes": "mine.txt"}
