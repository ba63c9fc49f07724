"""The mixture: published rates, draws that depend on nothing but seed and number, and no silent replacement."""

import itertools
import json
import os
import pickle
import signal
import subprocess
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.blocklist import Blocklist, ImageSet, picture_key
from data.collate import NothingToAsk, SampleBuilder
from data.encode import Encoder, SequenceTooLong
from data.mixture import MAX_TRIES, Mixture, Part, Stream
from data.sources import SOURCES, build_source
from data.tokens import TokenSpec, load_tokenizer
from data.types import EmptyMask, Mask, Record, Target, Turn
from data.views import ClipView, SamView, Views
from tests.records import OWN
from utils.config import DataConfig, DatasetConfig, TaskConfig, from_dict
from utils.masks import CachedMask

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
    """One to three rows; words and targets at random."""

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
    encoder = Encoder(load_tokenizer(OWN / "lisa", SPEC), SPEC)
    return SampleBuilder(Chance(), encoder, Views(ClipView(8), SamView(16)))


@pytest.fixture
def mixture(tmp_path, maker):
    sets = [Part("a", Pictures(tmp_path / "a"), 3.0), Part("b", Pictures(tmp_path / "b", 7, empty=(0, 3)), 1.0)]
    return Mixture(sets, maker, seed=5)


def stream_of(mixture, **options):
    return Stream(mixture, options.pop("batch_size", 2), **options)


def same(one, two):
    for name in ("pixels", "seg_pixels", "ids", "labels", "attention", "row_image", "mask_rows", "mask_positions"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    assert all(torch.equal(a, b) for a, b in zip(one.masks, two.masks, strict=True))
    assert (one.names, one.skipped, one.geometry) == (two.names, two.skipped, two.geometry)


def test_a_draw_depends_on_seed_and_number_only(mixture):
    forward = [mixture.sample(i) for i in range(8)]
    backward = [mixture.sample(i) for i in reversed(range(8))][::-1]
    assert [s.name for s in forward] == [s.name for s in backward]
    assert [s.rows for s in forward] == [s.rows for s in backward]
    other = Mixture(mixture.parts, mixture.builder, seed=6)
    assert [s.name for s in forward] != [other.sample(i).name for i in range(8)]


@pytest.mark.parametrize("workers", [2, 4])
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
    assert resumed.position == 6 * 2


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
    """A builder that only says which record was sampled."""

    def build(self, record, rng):
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
    seen = [mixture.sample(index).name for index in range(draws)]
    expected = {"a": 9 / 24, "b": 9 / 24, "c": 2 / 12, "d": 1 / 12}
    for name, share in expected.items():
        for record in range(3):
            count, mean = seen.count(f"{name}/{record}"), draws * share / 3
            assert abs(count - mean) < 5 * np.sqrt(mean), (name, record)


class Fussy(Names):
    """A maker that refuses some of the records of some sets: every second of vqa, all of `bad`."""

    def build(self, record, rng):
        name, number = record.image.parts
        if name == "bad" or (name == "vqa" and int(number) % 2):
            raise (NothingToAsk if name == "bad" else SequenceTooLong)(f"{record.image}")
        return NameOnly(str(record.image), [])


@pytest.mark.parametrize("sampling", ["rates", "epoch"])
def test_what_cannot_be_used_is_replaced_in_its_own_family(sampling):
    """The rates hold though half of the dialogues and a whole set of another family are never used (lisa.md 4.1)."""
    mixture = [
        {"task": "sem_seg", "rate": 9, "sets": [{"source": "counted|good", "options": {"count": 30}}, "counted|bad"]},
        {"task": "vqa", "rate": 3, "sets": [{"source": "counted|vqa", "options": {"count": 20}}]},
        {"task": "sem_seg", "rate": 4, "sets": [{"source": "counted|more", "options": {"count": 30}}]},
    ]
    data = from_dict(DataConfig, {"mixture": mixture, "on_bad_sample": "skip", "sampling": sampling})
    drawn = Mixture.build(data, Fussy(), seed=2)
    samples = [drawn.sample(index) for index in range(83 * 60)]
    counts = Counter(Path(sample.name).parts[0] for sample in samples)
    wanted = (
        {"good": 9 / 16, "vqa": 3 / 16, "more": 4 / 16} if sampling == "rates" else {"good": 33 / 83, "vqa": 20 / 83}
    )
    for name, share in wanted.items():
        mean = len(samples) * share
        assert abs(counts[name] - mean) < 4 * np.sqrt(mean * (1 - share)), name
    assert counts["bad"] == 0 and not any(int(Path(s.name).name) % 2 for s in samples if s.name.startswith("vqa"))
    skipped = [message.split("/")[0] for sample in samples for message in sample.skipped]
    assert len(skipped) > 400 and {"vqa", "sem_seg"} == set(skipped)


# --- every image once


def once_each(tmp_path, maker, **options):
    sets = [Part("a", Pictures(tmp_path / "a", 4), 3.0), Part("b", Pictures(tmp_path / "b", 7), 1.0)]
    return Mixture(sets, maker, seed=5, sampling="epoch", **options)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), epoch=st.integers(0, 5))
def test_an_epoch_visits_every_record_once(seed, sizes, epoch):
    parts = [Part(f"p{n}", Counted(f"p{n}", size), n + 1.0) for n, size in enumerate(sizes)]
    mixture = Mixture(parts, Names(), seed=seed, sampling="epoch")
    total = sum(sizes)
    assert mixture.num_records == total
    seen = [mixture.sample(index).name for index in range(epoch * total, (epoch + 1) * total)]
    assert sorted(seen) == sorted(f"p{n}/{k}" for n, size in enumerate(sizes) for k in range(size))


def test_epochs_are_shuffled_anew_and_repeatably():
    mixture, again = (Mixture([Part("a", Counted("a", 50))], Names(), seed=3, sampling="epoch") for _ in range(2))
    first, second = ([mixture.sample(50 * epoch + place).name for place in range(50)] for epoch in range(2))
    assert first != second and first != sorted(first)
    assert [again.sample(index).name for index in reversed(range(100))][::-1] == first + second


@pytest.mark.parametrize("workers", [0, 2, 4])
def test_epochs_resume_anywhere_with_any_workers(tmp_path, maker, workers):
    """4 + 7 images, batches of 2: the third epoch begins inside a batch."""
    mixture = once_each(tmp_path, maker)
    whole = list(itertools.islice(stream_of(mixture), 12))
    resumed = stream_of(mixture, start=5 * 2, workers=workers)
    for batch in whole[5:]:
        same(batch, next(resumed))


def test_processes_share_an_epoch(tmp_path, maker):
    mixture = once_each(tmp_path, maker)
    ranks = [stream_of(mixture, batch_size=1, rank=rank, world=11) for rank in range(11)]
    names = [name for stream in ranks for name in next(stream).names]
    assert len(set(names)) == 11


def test_an_unusable_record_of_an_epoch_is_replaced_and_noted(tmp_path, maker):
    mixture = Mixture([Part("a", Pictures(tmp_path / "a", 4, empty=(1,)))], maker, sampling="epoch")
    samples = [mixture.sample(index) for index in range(4)]
    assert {Path(sample.name).stem for sample in samples} == {"0", "2", "3"}
    skipped = [message for sample in samples for message in sample.skipped]
    assert any("1.png: nothing to ask" in message for message in skipped)


# --- evaluated images stay out


def held(**values):
    sets = values.pop("sets", (DatasetConfig("counted|train", options={"count": 6}),))
    return DataConfig(mixture=(TaskConfig("x", sets),), **values)


def test_pictures_of_the_suites_stay_out_and_are_counted(monkeypatch, caplog):
    paths = lambda self: [f"/d/{k:012d}.jpg" for k in range(self.count)]  # noqa: E731
    monkeypatch.setattr(Counted, "image_paths", paths, raising=False)
    monkeypatch.setattr(Counted, "__getitem__", lambda self, k: Record(Path(f"/d/{k:012d}.jpg"), "refer"))
    suites = [DatasetConfig("counted|val")]  # images 0, 1 and 2

    def seen(**values):
        mixture = Mixture.build(held(**values), Names(), held_out=suites)
        return {int(Path(mixture.sample(index).name).stem) for index in range(100)}

    assert seen() == set(range(6))
    with caplog.at_level("INFO", logger="assistant"):
        assert seen(exclude_val="eval_suites") == {3, 4, 5} == seen(exclude_val="eval_suites", sampling="epoch")
    assert "counted|train trains without 3 of 6 images" in caplog.text
    with pytest.raises(ValueError, match="is empty without evaluated images"):
        Mixture.build(held(exclude_val="eval_suites", sets=(DatasetConfig("counted"),)), Names(), held_out=suites)


def test_a_bad_entry_of_an_evaluated_file_blocks_nothing_where_bad_samples_are_skipped(tmp_path):
    lines = [{"image": "a.jpg", "phrase": "cup", "polygons": [[1, 1, 5, 1, 5, 5]]}, {"image": "b.jpg", "phrase": 5}]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({**lines[0], "image": f"{n}.jpg"}) for n in "abc"))
    (tmp_path / "val.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sets = (DatasetConfig("jsonl", options={"file": "train.jsonl"}),)
    suites = [DatasetConfig("jsonl", options={"file": "val.jsonl"})]
    config = partial(held, exclude_val="eval_suites", sets=sets, dataset_dir=str(tmp_path))
    with pytest.raises(ValueError, match="line 2: give one of polygons"):
        Mixture.build(config(), Names(), held_out=suites)
    (part,) = Mixture.build(config(on_bad_sample="skip"), Names(), held_out=suites).parts
    assert list(part.records) == [1, 2]


def test_pictures_are_told_apart_across_coco_releases():
    assert picture_key("a/COCO_train2014_000000000009.jpg") == picture_key(Path("b/val2017/000000000009.jpg"))
    assert picture_key("train/000000000009.jpg") != picture_key("val/000000000009.jpg"), "nor are equal numbers"
    assert picture_key("train/0001.jpg") != picture_key("val/0001.jpg"), "equal names are not equal images"
    assert picture_key("x/../val/1.jpg") == picture_key("val/1.jpg")


def test_links_to_one_picture_are_one_picture(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(b"")
    (tmp_path / "all").symlink_to(tmp_path / "images")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "all/a.jpg")
    names = ("images/a.jpg", "all/a.jpg", "b.jpg")
    assert len({picture_key(tmp_path / name) for name in names}) == 1


def test_copies_of_coco_s_images_in_other_folders_are_found_by_their_bytes(tmp_path):
    """Not by their number alone: images of one's own may be numbered, too."""
    places = ("train2014/COCO_train2014_000000000009.jpg", "train2017/000000000009.jpg", "mine/000000000009.jpg")
    other = "own/000000000009.jpg"
    for name in (*places, other):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"a" if name != other else b"b")
    (tmp_path / "linked.jpg").symlink_to(tmp_path / places[1])
    for held in places:
        images = ImageSet([str(tmp_path / held)])
        assert all(str(tmp_path / name) in images for name in places)
        assert str(tmp_path / other) not in images and str(tmp_path / "lost/000000000009.jpg") not in images
    assert str(tmp_path / "linked.jpg") in ImageSet([str(tmp_path / places[0])]), "a link with another name"


@pytest.fixture
def refer_world(tmp_path):
    """RefCOCO, RefCOCOg and LLaVA-Instruct on one set of images: 1 is evaluated on in RefCOCO, 2 in RefCOCOg."""
    splits = {"refcoco": {1: "testA", 2: "train", 3: "train"}, "refcocog": {1: "train", 2: "val", 3: "train"}}
    for name, of_picture in splits.items():
        write_refer(tmp_path, name, of_picture, split_by="umd" if name == "refcocog" else "unc")
    folder = tmp_path / "coco/train2017"
    folder.mkdir(parents=True)
    said = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]
    entries = [{"id": str(n), "image": f"{n:012d}.jpg", "conversations": said} for n in (1, 2, 3, 4)]
    (tmp_path / "llava_dataset").mkdir()
    (tmp_path / "llava_dataset/llava_instruct_150k.json").write_text(json.dumps(entries))
    return tmp_path


def write_refer(root, name, of_picture, split_by):
    folder, pictures = root / "refer_seg" / name, root / "refer_seg/images/mscoco/images/train2014"
    folder.mkdir(parents=True)
    pictures.mkdir(parents=True, exist_ok=True)
    refs = [
        {"ref_id": n, "ann_id": n, "image_id": n, "split": split, "sentences": [{"sent": f"thing {n}"}]}
        for n, split in of_picture.items()
    ]
    (folder / f"refs({split_by}).p").write_bytes(pickle.dumps(refs))
    images = [{"id": n, "file_name": f"COCO_train2014_{n:012d}.jpg", "height": 4, "width": 4} for n in of_picture]
    shapes = [{"id": n, "image_id": n, "category_id": 1, "segmentation": []} for n in of_picture]
    (folder / "instances.json").write_text(json.dumps({"images": images, "annotations": shapes}))


@pytest.mark.parametrize(
    ("rule", "usable"),
    [
        ("off", {"refcoco": 2, "refcocog": 2, "llava_instruct_150k": 4}),
        ("refer_family", {"refcoco": 1, "refcocog": 1, "llava_instruct_150k": 2}),
        ("cross_refer", {"refcoco": 1, "refcocog": 1, "llava_instruct_150k": 4}),
    ],
)
def test_rules_of_the_referring_sets(refer_world, caplog, rule, usable):
    with caplog.at_level("WARNING", logger="assistant"):
        blocklist = Blocklist.build(rule, refer_world)
    found = {name: len(blocklist.usable(name, build_source(name, refer_world))) for name in usable}
    assert found == usable
    if rule != "off":
        assert blocklist.images.keys == {"coco 000000000001", "coco 000000000002"}
        assert blocklist.splits == ("refcoco|unc|testA", "refcocog|umd|val")
        assert "grefcoco|unc|val" in caplog.text, "what is not there is said"


def test_a_cleaned_file_stands_in_for_the_released_one(refer_world):
    folder = refer_world / "refer_seg/refcoco"
    (folder / "refs(unc).p").rename(folder / "refs(unc_exclude_unified).p")
    found = Blocklist.build("refer_family", refer_world)
    assert found.splits == ("refcoco|unc_exclude_unified|testA", "refcocog|umd|val") and len(found.images) == 2


def test_a_rule_without_any_of_its_sets_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data.exclude_val refer_family: .* has none of refcoco\|unc\|val"):
        Blocklist.build("refer_family", tmp_path)


# --- bad samples


def test_a_record_with_nothing_to_ask_is_drawn_anew_and_noted(tmp_path, maker):
    mixture = Mixture([Part("a", Pictures(tmp_path / "a", 4, empty=(1,)))], maker)
    samples = [mixture.sample(index) for index in range(30)]
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
        mixture.sample(3)
    assert caught.value.__notes__ == ["while making sample 3: record 0 of set a"]


def test_skipping_is_counted_and_reported(tmp_path, maker, caplog):
    source = Pictures(tmp_path / "a", 4, broken=(2,))
    stream = stream_of(Mixture([Part("set a", source)], maker, on_bad_sample="skip"), batch_size=4, workers=1)
    with caplog.at_level("WARNING", logger="assistant"):
        batches = list(itertools.islice(stream, 6))
    skipped = [message for batch in batches for message in batch.skipped]
    assert skipped and len(skipped) == stream.skipped
    assert all("set a, record 2: cannot read image" in message and "2.png" in message for message in skipped)
    assert [r.getMessage() for r in caplog.records] == [f"left out: {message}" for message in skipped][:20]
    assert not any(name.endswith("2.png") for batch in batches for name in batch.names)


def test_an_empty_mask_of_a_present_thing_is_a_bad_sample(tmp_path, maker):
    class Emptied(Pictures):
        def __getitem__(self, index):
            nothing = Target("gone", CachedMask(partial(np.zeros, SHAPE, bool), "instances.json: annotation 9"))
            return Record(self.paths[index], "refer", (nothing,)) if index == 1 else super().__getitem__(index)

    source = Emptied(tmp_path / "a", 3)
    with pytest.raises(EmptyMask, match=r"1\.png: the mask of 'gone' has no pixel.*instances.json: annotation 9"):
        [Mixture([Part("a", source)], maker).sample(index) for index in range(20)]
    samples = [Mixture([Part("a", source)], maker, on_bad_sample="skip").sample(index) for index in range(20)]
    assert any("a, record 1: " in message for sample in samples for message in sample.skipped)
    assert not any(sample.name.endswith("1.png") for sample in samples)


def test_a_wholly_bad_dataset_does_not_hang(tmp_path, maker):
    mixture = Mixture([Part("a", Pictures(tmp_path / "a", 1, broken=(0,)))], maker, on_bad_sample="skip")
    with pytest.raises(RuntimeError, match=rf"{MAX_TRIES} records in a row .*; the last: a, record 0: .*0.png"):
        mixture.sample(0)


def test_programming_errors_are_never_skipped(tmp_path, maker):
    class Wrong(Pictures):
        def __getitem__(self, index):
            return Record(self.paths[index], "refer", (Target("x", lambda: undefined_name),))  # noqa: F821

    mixture = Mixture([Part("a", Wrong(tmp_path / "a", 1))], maker, on_bad_sample="skip")
    with pytest.raises(NameError):
        mixture.sample(0)


# --- workers


def test_workers_outlive_a_signal_to_all_processes_of_a_job_but_not_their_own_process(mixture):
    """SIGTERM as a scheduler sends it, from another process and from the moment they exist; then as a parent does."""
    stream, alone = stream_of(mixture, workers=2), stream_of(mixture)
    same(next(stream), next(alone))
    workers = stream._batches._workers
    subprocess.run(["kill", "-TERM", *(str(worker.pid) for worker in workers)], check=True)
    for _ in range(12):
        same(next(stream), next(alone))
    assert all(worker.is_alive() for worker in workers)
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())  # this process still hears it
    started = time.monotonic()
    stream.close()
    for worker in workers:
        worker.join(30)
    assert not any(worker.is_alive() for worker in workers)
    other = stream_of(mixture, workers=1)
    next(other)
    (worker,) = other._batches._workers
    os.kill(worker.pid, signal.SIGTERM)  # from its own process
    worker.join(30)
    assert worker.exitcode == 0 and time.monotonic() - started < 60


# --- errors at the door


def test_bad_settings_are_refused(tmp_path, maker):
    with pytest.raises(ValueError, match="dataset nothing is empty"):
        Mixture([Part("nothing", Counted("x", 0))], maker)
    with pytest.raises(ValueError, match="no dataset with a rate above 0"):
        Mixture([Part("a", Counted("x", 1), 0.0)], maker)
    with pytest.raises(ValueError, match="the rate of a is -1"):
        Mixture([Part("a", Counted("x", 1), -1.0)], maker)


def test_a_missing_or_empty_dataset_is_named_with_its_folder(tmp_path, maker):
    data = DataConfig(str(tmp_path), (TaskConfig("x", (DatasetConfig("counted", options={"count": 0}),)),))
    with pytest.raises(ValueError, match=rf"x/counted \({tmp_path}\) is empty"):
        Mixture.build(data, maker)
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        Mixture.build(replace(data, mixture=(TaskConfig("x", (DatasetConfig("ade20k"),)),)), maker)
    none = TaskConfig("y", (DatasetConfig("counted", 0.0),), rate=3.0)
    with pytest.raises(ValueError, match=r"data\.mixture: y has the rate 3 and no set with a rate above 0"):
        Mixture.build(replace(data, mixture=(none,)), maker)
    with pytest.raises(KeyError, match="no source 'ade20'"):
        Mixture.build(replace(data, mixture=(TaskConfig("x", (DatasetConfig("ade20"),)),)), maker)
