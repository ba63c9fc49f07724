"""Annotations to masks: polygons, RLE, painted shapes, and the pickles that hold them."""

from __future__ import annotations

import pickle
import resource

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco

from utils.masks import CachedMask, encode_rle, paint_shapes, polygons_to_mask, rle_to_mask, segmentation_to_mask
from utils.safe_pickle import load_plain

SIZE = (10, 12)
SQUARE = [2, 2, 6, 2, 6, 6, 2, 6]
SHIFTED = [4, 4, 8, 4, 8, 8, 4, 8]


def test_polygons_are_joined_and_cut_at_the_edge():
    mask = polygons_to_mask([SQUARE, [9, 7, 30, 7, 30, 30, 9, 30]], SIZE)
    expected = np.zeros(SIZE, bool)
    expected[2:6, 2:6] = expected[7:, 9:] = True
    assert mask.dtype == bool and np.array_equal(mask, expected)


def test_overlap_union_or_exclude():
    union = segmentation_to_mask([SQUARE, SHIFTED], SIZE)
    exclude = segmentation_to_mask([SQUARE, SHIFTED], SIZE, overlap="exclude")
    both = polygons_to_mask([SQUARE], SIZE) & polygons_to_mask([SHIFTED], SIZE)
    assert both.sum() == 4 and np.array_equal(exclude, union & ~both)
    with pytest.raises(ValueError, match="have: union, exclude"):
        segmentation_to_mask([SQUARE], SIZE, overlap="sum")


def test_excluded_overlap_scores_as_the_summed_map_does():
    """Value 2 of the released readers is neither class: same intersection and union for class 1."""
    truth = sum(polygons_to_mask([part], SIZE).astype(int) for part in (SQUARE, SHIFTED))
    ours = segmentation_to_mask([SQUARE, SHIFTED], SIZE, overlap="exclude")
    predicted = polygons_to_mask([[3, 3, 9, 3, 9, 9, 3, 9]], SIZE)
    assert (predicted & (truth == 1)).sum() == (predicted & ours).sum() and (truth == 1).sum() == ours.sum()


@pytest.mark.parametrize(
    ("segmentation", "says"),
    [
        ([[1, 1, 5, 5]], "three or more points"),
        ([[1, 1, 5, 5, 7]], "three or more points"),
        ([[1, 1, 5, "x", 7, 7]], "not a number"),
        ([[1, 1, 5, float("nan"), 7, 7]], "not finite"),
        ([[20, 20, 30, 20, 30, 30]], "outside the image of 10 x 12"),
        ([[-9, -9, -2, -9, -2, -2]], "outside"),
        ([[1, 1, 1e9, 1, 5, 5]], "coordinate 1e"),
        ("polygon", "got str"),
        ({"size": [12, 10], "counts": "x"}, r"size \[12, 10\], the image of \[10, 12\]"),
        ({"size": [10, 12], "counts": [5, 5]}, "add up to 10 x 12"),
        ({"size": [10, 12], "counts": "0"}, "add up to 10 x 12"),
        ({"size": [10, 12], "counts": "~~é"}, "damaged"),
        ({"size": [10, 12], "counts": "oooooooooooo0"}, "damaged"),
        ({"size": [10, 12], "counts": ""}, "damaged"),
        ({"counts": [120]}, "keys size and counts"),
        ([SQUARE, {"size": [10, 12], "counts": [120]}], "three or more points"),
    ],
)
def test_what_cannot_be_drawn_says_why(segmentation, says):
    with pytest.raises(ValueError, match=says):
        segmentation_to_mask(segmentation, SIZE)


@pytest.mark.parametrize("count", range(3, 9))
def test_opencv_contours_are_polygons_and_points_of_three_numbers_are_not(count):
    angles = 2 * np.pi * np.arange(count) / count
    points = np.stack([6 + 4 * np.cos(angles), 5 + 4 * np.sin(angles)], axis=1)
    flat = segmentation_to_mask([points.ravel().tolist()], SIZE)
    assert np.array_equal(segmentation_to_mask([points[:, None].tolist()], SIZE), flat) and flat.any()
    for extra in (0, 2):  # a third coordinate, or COCO's visibility of keypoints
        for shaped in (points, points[:, None]):
            with_third = np.concatenate([shaped, np.full((*shaped.shape[:-1], 1), extra)], axis=-1).tolist()
            with pytest.raises(ValueError, match=r"polygon 0 is .*; a point is x, y"):
                segmentation_to_mask([with_third], SIZE)


def packed_runs(deltas: list[int]) -> str:
    """COCO's text form of these signed numbers, each of which is relative to the last but one."""
    text = ""
    for value in deltas:
        while True:
            digit, value = value & 31, value >> 5
            more = value != (-1 if digit & 16 else 0)
            text += chr(48 + digit + 32 * more)
            if not more:
                break
    return text


BIG = 2**39 - 1  # the largest run that eight digits hold
HOSTILE = {  # counts whose sum, taken modulo 2^64 or 2^32, is the 120 pixels of SIZE
    "int64 wraps": [2**63, 2**63, 120],
    "int64 wraps below 0": [2**62, 2**62, 2**62, 2**62, 120],
    "uint32 wraps": [2**31, 2**31, 120],
    "floats wrap": [2.0**63, 2.0**63, 120.0],
    "negative": [125, -10, 5],
    "beyond the picture": [121],
    "fractions": [60.5, 59.5],
    "infinite": [float("inf"), 120],
    "no number": [float("nan"), 120],
    "beyond every integer": [10**400, 120],
    "texts": ["60", "60"],
    "none": [None, 120],
    "nested": [[60, 60]],
    "ragged": [[60], 60, [1, 2]],
    "long runs packed": packed_runs([0, BIG, 120]),
    "many long runs packed": packed_runs([0, 0, 0] + 1000 * [BIG]),
    "negative packed": packed_runs([60, 70, -10]),
    "a sum below 0 packed": packed_runs([60, 60, 0, -100, 100]),
    "cut packed": packed_runs([60, 60])[:-1] + "o",
    "no text": 120,
    "a mapping": {"0": 120},
    "nothing": None,
}


@pytest.mark.parametrize("counts", HOSTILE.values(), ids=HOSTILE)
def test_runs_are_bounded_before_they_are_summed(counts):
    """COCO's own code writes as far as the runs say; such a file ends the process there, and is an error here."""
    with pytest.raises(ValueError, match=r"RLE|mask"):
        segmentation_to_mask({"size": list(SIZE), "counts": counts}, SIZE)


@settings(max_examples=300, derandomize=True)
@given(st.lists(st.one_of(st.integers(-(2**70), 2**70), st.integers(-3, 130), st.floats()), max_size=9))
def test_any_list_of_runs_is_a_mask_or_an_error(counts):
    good = all(0 <= run <= 120 and run == int(run) for run in counts if run == run) and sum(counts) == 120
    if good:
        assert segmentation_to_mask({"size": list(SIZE), "counts": counts}, SIZE).sum() == sum(counts[1::2])
    else:
        with pytest.raises(ValueError):
            segmentation_to_mask({"size": list(SIZE), "counts": counts}, SIZE)


@settings(max_examples=300, derandomize=True)
@given(st.text(st.characters(min_codepoint=40, max_codepoint=115), max_size=40))
def test_any_packed_runs_are_a_mask_or_an_error(counts):
    try:
        assert segmentation_to_mask({"size": list(SIZE), "counts": counts}, SIZE).shape == SIZE
    except ValueError as error:
        assert "RLE" in str(error)


@pytest.mark.parametrize("size", [5, None, "10x12", [10**12, 10**12], [10], {"h": 10}])
def test_a_strange_size_of_an_rle_is_an_error(size):
    with pytest.raises(ValueError, match=r"size .*the image of"):
        segmentation_to_mask({"size": size, "counts": [120]}, SIZE)


@pytest.mark.parametrize("segmentation", [[], [SQUARE], {"size": [10**6, 10**6], "counts": [10**12]}])
def test_a_huge_mask_is_refused_before_it_is_allocated(segmentation, monkeypatch):
    with pytest.raises(ValueError, match=r"1000000000000 pixels, more than the limit of .*ASSISTANT_MAX_PIXELS"):
        segmentation_to_mask(segmentation, (10**6, 10**6))
    monkeypatch.setenv("ASSISTANT_MAX_PIXELS", "119")
    with pytest.raises(ValueError, match="120 pixels"):
        segmentation_to_mask([SQUARE], SIZE)
    monkeypatch.setenv("ASSISTANT_MAX_PIXELS", "many")
    with pytest.raises(ValueError, match="ASSISTANT_MAX_PIXELS must be a whole number"):
        segmentation_to_mask([SQUARE], SIZE)


def test_a_polygon_whose_outline_goes_on_for_ever_is_refused():
    """Few points are much memory in COCO's code where they are far apart: 12,000 here, within the permitted distance,
    would take 860 MB."""
    zigzag = [point for step in range(6000) for point in (-150, step % 7, 150, 9)]
    with pytest.raises(ValueError, match="outline of"):
        segmentation_to_mask([zigzag * 3], SIZE)
    assert segmentation_to_mask([zigzag[:600]], SIZE).shape == SIZE


def test_an_empty_segmentation_is_an_empty_mask():
    assert segmentation_to_mask([], SIZE).shape == SIZE and not segmentation_to_mask([], SIZE).any()


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)), st.sampled_from(["str", "list", "bytes"])
)
def test_rle_round_trip(mask, kind):
    rle = encode_rle(mask)
    if kind == "bytes":
        rle["counts"] = rle["counts"].encode()
    if kind == "list":
        rle["counts"] = _runs(mask)
    assert np.array_equal(rle_to_mask(rle, mask.shape), mask)


def test_long_runs_decode_as_coco_does():
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = np.zeros((70, 90), bool)
        for top, left, height, width in rng.integers(1, 60, (4, 4)):
            mask[top : top + height, left : left + width] ^= True
        packed = coco.frPyObjects({"size": [70, 90], "counts": _runs(mask)}, 70, 90)
        assert packed["counts"].decode() == encode_rle(mask)["counts"]
        assert np.array_equal(rle_to_mask(packed, (70, 90)), mask)


def _runs(mask: np.ndarray) -> list[int]:
    runs, value = [0], False
    for pixel in mask.T.ravel():
        if pixel != value:
            runs, value = [*runs, 0], pixel
        runs[-1] += 1
    return runs


def test_a_list_of_rles_is_joined():
    parts = [polygons_to_mask([part], SIZE) for part in (SQUARE, SHIFTED)]
    rles = [coco.encode(np.asfortranarray(part, dtype=np.uint8)) for part in parts]
    assert np.array_equal(segmentation_to_mask(rles, SIZE), parts[0] | parts[1])


def test_shapes_are_painted_from_large_to_small_with_their_outline():
    large, small = [[1.9, 1], [8, 1], [8, 8], [1, 8]], [[3, 3], [5.9, 3], [5, 5], [3, 5]]
    expected = np.zeros(SIZE, np.uint8)
    expected[1:9, 1:9] = 1
    expected[3:6, 3:6] = 255
    for shapes in ([(large, 1), (small, 255)], [(small, 255), (large, 1)]):
        assert np.array_equal(paint_shapes(shapes, SIZE), expected)
    assert paint_shapes([([[2, 2], [7, 2]], 1)], SIZE).sum() == 6, "two points are a line"
    assert not paint_shapes([], SIZE).any()


@pytest.mark.parametrize("points", [[[50, 50], [60, 50], [60, 60]], [], [[1, 2, 3]], [["a", 1]], [[1, 1], [1e8, 1]]])
def test_bad_shapes_are_refused(points):
    with pytest.raises(ValueError, match="shape"):
        paint_shapes([(points, 1)], SIZE)


def test_once_draws_once():
    calls = []
    once = CachedMask(lambda: calls.append(1) or np.ones(SIZE, bool))
    assert once() is once() and len(calls) == 1


def test_plain_pickles_load(tmp_path):
    value = [{"a": (1, 2.5, None, True), "b": "é", "c": {3}, "n": np.int64(7), "f": np.float32(0.5), "raw": b"\xff"}]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path = tmp_path / f"{protocol}.p"
        path.write_bytes(pickle.dumps(value, protocol=protocol))
        assert load_plain(path) == value
        assert type(load_plain(path)[0]["n"]) is int
    (tmp_path / "python2.p").write_bytes(b"(lp0\nS'caf\\xc3\\xa9'\np1\naS'caf\\xe9'\np2\na.")
    assert load_plain(tmp_path / "python2.p")[1] == "café", "falls back to Latin-1"


class Bomb:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("call", ["os.system", "builtins.exec", "builtins.getattr", "numpy.load", "subprocess.Popen"])
def test_a_pickle_that_calls_something_is_refused_and_nothing_runs(tmp_path, call):
    module, _, name = call.rpartition(".")
    loaded = getattr(__import__(module), name)
    victim, path = tmp_path / "victim", tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps([{"x": Bomb(loaded, f"touch {victim}")}]))
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p.*refused.*\." + name):
        load_plain(path)
    assert not victim.exists()


def test_codecs_and_object_scalars_are_no_way_round(tmp_path):
    import _codecs

    path = tmp_path / "x.p"
    for bomb in (Bomb(_codecs.encode, "x", "zlib_codec"), np.array([{}], dtype=object), np.dtype("O")):
        path.write_bytes(pickle.dumps(bomb))
        with pytest.raises(ValueError, match="refused"):
            load_plain(path)


def test_a_truncated_pickle_names_its_file(tmp_path):
    path = tmp_path / "refs(unc).p"
    data = pickle.dumps([{"sent": "a"}] * 5)
    for end in (0, 10, len(data) - 1):
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match=r"refs\(unc\)\.p: not a complete pickle"):
            load_plain(path)


PICKLES = {
    "a place": b"\x80\2]r\xff\xff\xff\x7f.",
    "a place in text": b"(lp99999999999\n.",
    "bytes": b"\x80\5\x96" + bytes([0] * 5 + [9] * 3),
}


@pytest.mark.parametrize("data", PICKLES.values(), ids=PICKLES)
def test_a_few_bytes_of_a_pickle_do_not_ask_for_gigabytes(data, tmp_path):
    """The file is read, or is an error; the memory that it asks for is never taken."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (tmp_path / "refs.p").write_bytes(data)
    try:
        assert load_plain(tmp_path / "refs.p") == []
    except ValueError as error:
        assert "refs.p: not a complete pickle" in str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB
