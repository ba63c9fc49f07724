"""The mixture: published rates, draws that depend on nothing but seed and number, and no silent replacement."""

import itertools
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.collate import Maker
from data.encode import Encoder
from data.mixture import DRAWS, Mixture, Part, Stream, picture_key
from data.sources import SOURCES
from data.tokens import TokenSpec, load_tokenizer
from data.types import Mask, Record, Target, Turn
from data.views import ClipView, SamView, Views
from utils.config import DataConfig, MixConfig, SetConfig, from_dict

GOLDEN = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent / "golden")
SPEC = TokenSpec(("[SEG]",), ("[SEG]",))
SHAPE = (12, 16)
PATCHES = 4


def square(index):
    mask = np.zeros(SHAPE, bool)
    mask[:4, index % 16] = True
    return mask


class Pictures:
    """Real files, two targets each; `empty` records have nothing to ask about, `broken` ones half a file."""

    def __init__(self, folder, count=5, empty=(), broken=()):
        folder.mkdir()
        self.paths, self.empty = [folder / f"{i}.png" for i in range(count)], set(empty)
        for index, path in enumerate(self.paths):
            Image.fromarray(np.full((*SHAPE, 3), 40 * index, np.uint8)).save(path)
            if index in broken:
                path.write_bytes(path.read_bytes()[:60])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        targets = tuple(Target(f"{index} {k}", partial(square, index + k)) for k in range(2))
        return Record(self.paths[index], "refer", () if index in self.empty else targets)


class Chance:
    """One to three rows; words and targets by chance."""

    def converse(self, record, rng):
        if not record.targets:
            return []
        rows = []
        for index in rng.integers(len(record.targets), size=rng.integers(1, 4)):
            words = ("Where is", "What about", "Show me")[rng.integers(3)]
            rows.append((Turn(f"<image>\n{words} {record.targets[index].phrase}?", (Mask(int(index)), ".")),))
        return rows


@pytest.fixture(scope="module")
def maker():
    encoder = Encoder(load_tokenizer(GOLDEN / "lisa", SPEC), SPEC, image_tokens=PATCHES)
    return Maker(Chance(), encoder, Views(ClipView(8), SamView(16)))


@pytest.fixture
def mixture(tmp_path, maker):
    sets = [Part("a", Pictures(tmp_path / "a"), 3.0), Part("b", Pictures(tmp_path / "b", 7, empty=(0, 3)), 1.0)]
    return Mixture(sets, maker, seed=5)


def stream_of(mixture, **options):
    return Stream(mixture, options.pop("batch_size", 2), image_tokens=PATCHES, **options)


def same(one, two):
    for name in ("pixels", "seg_pixels", "ids", "labels", "attention", "row_image", "mask_rows", "mask_positions"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    assert all(torch.equal(a, b) for a, b in zip(one.masks, two.masks, strict=True))
    assert (one.names, one.skipped, one.geometry) == (two.names, two.skipped, two.geometry)


def test_a_draw_depends_on_seed_and_number_only(mixture):
    forward = [mixture.draw(i) for i in range(8)]
    backward = [mixture.draw(i) for i in reversed(range(8))][::-1]
    assert [s.name for s in forward] == [s.name for s in backward]
    assert [s.rows for s in forward] == [s.rows for s in backward]
    other = Mixture(mixture.parts, mixture.maker, seed=6)
    assert [s.name for s in forward] != [other.draw(i).name for i in range(8)]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(mixture, workers):
    alone, helped = stream_of(mixture), stream_of(mixture, workers=workers)
    for _ in range(5):
        same(next(alone), next(helped))


def test_a_resumed_stream_goes_on_where_it_stopped(mixture):
    whole = list(itertools.islice(stream_of(mixture), 6))
    first = stream_of(mixture)
    for _ in range(4):
        next(first)
    resumed = stream_of(mixture, start=first.position, workers=1)
    for batch in whole[4:]:
        same(batch, next(resumed))
    assert resumed.position == 6


def test_processes_share_out_the_samples_of_one(mixture):
    """Two processes with batches of 2 see, step by step, what one sees with batches of 4."""
    one = stream_of(mixture, batch_size=4)
    two = [stream_of(mixture, rank=rank, world=2) for rank in range(2)]
    for _ in range(3):
        assert next(one).names == next(two[0]).names + next(two[1]).names


class Counted:
    """A source without files, for counting draws."""

    def __init__(self, name, count):
        self.name, self.count = name, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return Record(Path(f"{self.name}/{index}"), "refer")


class Names:
    """A maker that only tells which record was drawn."""

    def make_sample(self, record, rng):
        return NameOnly(str(record.image), [])


class NameOnly:
    def __init__(self, name, skipped):
        self.name, self.skipped = name, skipped


@pytest.fixture(autouse=True)
def counted_source(monkeypatch):
    def counted(root, split="train", count=3):
        return Counted(split, count)

    monkeypatch.setitem(SOURCES._factories, "counted", counted)


def test_nested_rates_then_uniform_records():
    data = from_dict(
        DataConfig,
        {
            "mixture": [
                {"task": "x", "rate": 9, "sets": ["counted|a", "counted|b"]},
                {"task": "y", "rate": 3, "sets": [{"source": "counted|c", "rate": 2}, "counted|d"]},
                {"task": "z", "rate": 0, "sets": ["no such source"]},
            ]
        },
    )
    mixture = Mixture.build(data, Names(), seed=1)
    draws = 4000
    seen = [mixture.draw(index).name for index in range(draws)]
    expected = {"a": 9 / 24, "b": 9 / 24, "c": 2 / 12, "d": 1 / 12}
    for name, share in expected.items():
        for record in range(3):
            count, mean = seen.count(f"{name}/{record}"), draws * share / 3
            assert abs(count - mean) < 5 * np.sqrt(mean), (name, record)


def test_exclude_val_keeps_validation_pictures_out():
    data = DataConfig(mixture=(MixConfig("x", (SetConfig("counted|train", options={"count": 6}),)),))
    held_out = ["counted|val"]  # pictures 0, 1 and 2
    seen = {Mixture.build(data, Names(), held_out=held_out).draw(i).name for i in range(100)}
    assert seen == {f"train/{i}" for i in range(6)}
    kept = Mixture.build(replace(data, exclude_val=True), Names(), held_out=held_out)
    assert {kept.draw(i).name for i in range(100)} == {f"train/{i}" for i in (3, 4, 5)}


def test_pictures_are_told_apart_across_coco_releases():
    assert picture_key("a/COCO_train2014_000000000009.jpg") == picture_key(Path("b/000000000009.jpg")) == "000000000009"
    assert picture_key("a/ADE_val_00000001.jpg") == "ADE_val_00000001"


# --- bad samples


def test_a_record_with_nothing_to_ask_is_drawn_anew_and_noted(tmp_path, maker):
    mixture = Mixture([Part("a", Pictures(tmp_path / "a", 4, empty=(1,)))], maker)
    samples = [mixture.draw(index) for index in range(30)]
    assert not any(sample.name.endswith("1.png") for sample in samples)
    skipped = [message for sample in samples for message in sample.skipped]
    assert skipped and all(m.startswith("a: ") and "1.png: nothing to ask" in m for m in skipped)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_picture_stops_the_run_by_default(tmp_path, maker, workers):
    mixture = Mixture([Part("a", Pictures(tmp_path / "a", 2, broken=(0, 1)))], maker)
    with pytest.raises(OSError, match=r"a/[01].png"):
        next(stream_of(mixture, workers=workers))


def test_an_error_tells_the_record_and_the_dataset(tmp_path, maker):
    mixture = Mixture([Part("set a", Pictures(tmp_path / "a", 1, broken=(0,)))], maker)
    with pytest.raises(OSError) as caught:
        mixture.draw(3)
    assert caught.value.__notes__ == ["while making sample 3: record 0 of set a"]


def test_skipping_is_counted_and_reported(tmp_path, maker, caplog):
    source = Pictures(tmp_path / "a", 4, broken=(2,))
    stream = stream_of(Mixture([Part("set a", source)], maker, on_bad_sample="skip"), batch_size=4, workers=1)
    with caplog.at_level("WARNING", logger="assistant"):
        batches = list(itertools.islice(stream, 6))
    skipped = [message for batch in batches for message in batch.skipped]
    assert skipped and len(skipped) == stream.skipped
    assert all("set a, record 2: cannot read picture" in message and "2.png" in message for message in skipped)
    assert [r.getMessage() for r in caplog.records] == [f"left out: {message}" for message in skipped][:20]
    assert not any(name.endswith("2.png") for batch in batches for name in batch.names)


def test_a_wholly_bad_dataset_does_not_hang(tmp_path, maker):
    mixture = Mixture([Part("a", Pictures(tmp_path / "a", 1, broken=(0,)))], maker, on_bad_sample="skip")
    with pytest.raises(RuntimeError, match=rf"{DRAWS} draws in a row gave no sample; the last: a, record 0: .*0.png"):
        mixture.draw(0)


def test_programming_errors_are_never_skipped(tmp_path, maker):
    class Wrong(Pictures):
        def __getitem__(self, index):
            return Record(self.paths[index], "refer", (Target("x", lambda: undefined_name),))  # noqa: F821

    mixture = Mixture([Part("a", Wrong(tmp_path / "a", 1))], maker, on_bad_sample="skip")
    with pytest.raises(NameError):
        mixture.draw(0)


# --- errors at the door


def test_bad_settings_are_refused(tmp_path, maker):
    with pytest.raises(ValueError, match="dataset nothing is empty"):
        Mixture([Part("nothing", Counted("x", 0))], maker)
    with pytest.raises(ValueError, match="no dataset with a rate above 0"):
        Mixture([Part("a", Counted("x", 1), 0.0)], maker)
    with pytest.raises(ValueError, match="the rate of a is -1"):
        Mixture([Part("a", Counted("x", 1), -1.0)], maker)
    with pytest.raises(ValueError, match=r"no data.on_bad_sample 'ignore'; have: raise, skip"):
        Mixture([Part("a", Counted("x", 1))], maker, on_bad_sample="ignore")


def test_a_missing_or_empty_dataset_is_named_with_its_folder(tmp_path, maker):
    data = DataConfig(str(tmp_path), (MixConfig("x", (SetConfig("counted", options={"count": 0}),)),))
    with pytest.raises(ValueError, match=rf"x/counted \({tmp_path}\) is empty"):
        Mixture.build(data, maker)
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        Mixture.build(replace(data, mixture=(MixConfig("x", (SetConfig("ade20k"),)),)), maker)
    with pytest.raises(KeyError, match="no source 'ade20'"):
        Mixture.build(replace(data, mixture=(MixConfig("x", (SetConfig("ade20"),)),)), maker)
