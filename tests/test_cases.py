"""The small inputs of ../shared/cases: what the doctor says of each, and what the sources make of it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from data.mixture import Mixture
from tools.doctor.__main__ import main as doctor_main
from tools.doctor.rehearsal import Rehearsal
from utils.config import load_recipe

ROOT = Path(__file__).resolve().parents[1]
CASES = ROOT.parent / "shared" / "cases"
WANTED = {  # what doctor and training say; None: it is read, with every record
    "labelme_rectangle": r"(2|3)\.json: shapes\[0\]: a shape of type '(point' encloses nothing|mask' needs 'mask')",
    "binary_255_one_name": r"write `255: cup` if 255 is 'cup', or `0: cup`",
    "coco_bbox_only": r"annotation 1: no 'segmentation'.*boxes: draw",
    "ref_other_image": r"ref 0: is of image 0, but its annotation 11 is of image 1",
    "coco_string_image_id": None,
    "same_stem": r"images/a\.jpg and \S*images/a\.png have the same name",
    "tif_bmp_webp": None,
    "names_with_marks": None,
    "value_null": r"entry 1 \(id 2\): conversations\[1\]: value must be text, got None",
    "jsonl_tokens_in_phrase": r"<image>.*",
    "classes_yaml_types": None,
    "jsonl_points_polygon": None,
    "exif_raw_size": r"the image is turned: its EXIF orientation is \d",
    "appledouble": None,
    "value_twice": r"line 1 \('1: cup'\) and line 2 \('1: mug'\)",
    "normalised_coco": r"annotation 0: all coordinates lie between 0 and 1",
}


@pytest.fixture
def case(request, tmp_path) -> tuple[str, Path]:
    """Its name, and its recipe next to a copy of its data."""
    place = CASES / request.param
    if not place.is_dir():
        pytest.skip(f"no {request.param} in ../shared/cases")
    shutil.copytree(place / "data", tmp_path / "data")
    text = (place / "recipe.yaml").read_text().replace("CONFIGS/", f"{ROOT}/configs/")
    values = yaml.safe_load(text)
    values["data"]["dataset_dir"] = str(tmp_path / "data")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return request.param, tmp_path / "recipe.yaml"


@pytest.mark.parametrize("case", WANTED, indirect=True)
def test_the_doctor_names_it(case, capsys):
    name, path = case
    status = doctor_main([str(path), "--full"])
    printed = capsys.readouterr().out
    if WANTED[name] is None:
        assert status == 0 and not re.search("^fault: |left out: ", printed, re.MULTILINE), printed
    else:
        assert status == 1 and re.search(WANTED[name], printed), printed


@pytest.mark.parametrize("case", WANTED, indirect=True)
def test_training_stops_there_or_draws_it(case):
    name, path = case
    recipe = load_recipe(path)

    def draw() -> None:
        mixture = Mixture.build(recipe.data, Rehearsal.of(recipe).maker)
        for index in range(12):
            assert mixture.sample(index).rows

    if WANTED[name] is None:
        draw()
    else:
        with pytest.raises((ValueError, OSError), match=WANTED[name]):
            draw()


def test_no_case_is_left_out():
    if not CASES.is_dir():
        pytest.skip("no ../shared/cases")
    missing = {path.name for path in CASES.iterdir() if path.is_dir()} - WANTED.keys()
    assert not missing, "cases whose wanted behaviour no test holds"
