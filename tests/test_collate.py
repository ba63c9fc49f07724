"""Samples and batches: one reading per image, masks in hole order, positions that point at the predicting states."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import collate as module
from data.collate import NothingToAsk, Sample, SampleBuilder, collate, collate_prompts, load_views, rasterize_masks
from data.encode import Encoded, Encoder, SequenceTooLong
from data.tokens import TokenSpec, load_tokenizer, mask_ids
from data.types import IGNORE_ID, IMAGE_ID, Geometry, Mask, Record, Target, Turn
from data.views import ClipView, SamView, Views
from tests.records import OWN

SPEC = TokenSpec(("[SEG]",), ("[SEG]",))
SIX = TokenSpec(tuple(f"[SEG{i}]" for i in range(6)), tuple(f"[SEG{i}]" for i in range(6)))
VIEWS = Views(ClipView(28), SamView(64))
TOKENIZER = load_tokenizer(OWN / "lisa", SPEC)
PATCHES = 4
SHAPE = (30, 40)


class Phrases:
    """One row per target, in the given order."""

    def __init__(self, order=None, words="Where is the {}?"):
        self.order, self.words = order, words

    def converse(self, record, rng):
        order = range(len(record.targets)) if self.order is None else self.order
        question = "<image>\n" + self.words
        return [(Turn(question.format(record.targets[i].phrase), ("It is ", Mask(i), ".")),) for i in order]


def stripe(index, shape=SHAPE):
    mask = np.zeros(shape, bool)
    mask[:, index] = True
    return mask


@pytest.fixture
def record(tmp_path):
    path = tmp_path / "scene.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (*SHAPE, 3), dtype=np.uint8)).save(path)
    targets = tuple(Target(f"thing {i}", partial(stripe, i)) for i in range(4))
    return Record(path, "refer", targets, ignore=partial(stripe, 39))


def maker(task, max_length=0, **options):
    return SampleBuilder(task, Encoder(TOKENIZER, SPEC, max_length=max_length), VIEWS, **options)


RNG = np.random.default_rng(0)


def test_masks_follow_the_holes_of_the_rows(record):
    order = [2, 0, 2, 1]
    sample = maker(Phrases(order)).build(record, RNG)
    assert [hole for row in sample.rows for hole in row.holes] == order
    assert sample.masks.dtype == torch.bool
    assert np.array_equal(sample.masks.numpy(), np.stack([stripe(i) for i in order]))
    assert sample.name == str(record.image) and sample.geometry == Geometry(SHAPE, (48, 64))
    assert sample.pixels.shape == (3, 28, 28) and sample.seg_pixels.shape == (3, 64, 64) and sample.ignore is None


def test_only_named_masks_are_drawn_once_and_the_picture_is_read_once(record, monkeypatch):
    drawn, read = [], []
    targets = tuple(Target(t.phrase, lambda i=i: drawn.append(i) or stripe(i)) for i, t in enumerate(record.targets))
    reader = module.read_image
    monkeypatch.setattr(module, "read_image", lambda path: read.append(path) or reader(path))
    task = Phrases([3, 1, 3])
    maker(task).build(Record(record.image, "refer", targets), RNG)
    assert sorted(drawn) == [1, 3] and read == [record.image]


def test_the_ignore_region_comes_along_when_wanted(record):
    task = Phrases()
    plain = Record(record.image, "refer", record.targets)
    samples = [maker(task, ignore_region=True).build(each, RNG) for each in (record, plain)]
    batch = collate(samples)
    assert np.array_equal(batch.ignore[0].numpy(), stripe(39)) and batch.ignore[1] is None
    moved = batch.to("cpu", torch.bfloat16)
    assert moved.ignore[0].dtype == torch.bool and moved.ignore[1] is None


def test_overlapping_parts_count_once(record):
    twice = Record(record.image, "refer", (Target("a", lambda: stripe(0).astype(np.uint8) * 2),))
    assert rasterize_masks(twice, [0], SHAPE).max() == 1


def test_a_mask_of_another_size_names_the_file_and_both_sizes(record):
    wrong = Record(record.image, "refer", (Target("red car", lambda: stripe(0, (40, 30))),))
    with pytest.raises(ValueError, match=r"scene.png: the mask of 'red car' is \(40, 30\), .*\(30, 40\)"):
        maker(Phrases()).build(wrong, RNG)


def test_a_mask_of_an_absent_target_is_an_error(record):
    with pytest.raises(ValueError, match=r"scene.png: .*mask for 'unicorn', which is absent"):
        maker(Phrases()).build(Record(record.image, "refer", (Target("unicorn", None),)), RNG)


def test_errors_of_the_encoder_name_the_picture(record):
    with pytest.raises(ValueError, match=r"scene.png: .*'\[SEG\]'.*may not be typed"):
        maker(Phrases(words="[SEG] {}")).build(record, RNG)
    with pytest.raises(NothingToAsk, match=r"scene.png: nothing to ask"):
        maker(Phrases([])).build(record, RNG)


def test_a_row_that_is_too_long_is_left_out_whole_only_when_allowed(record):
    long = Target("a " * 40 + "thing", partial(stripe, 1))
    mixed = Record(record.image, "refer", (record.targets[0], long, record.targets[2]))
    limit = len(maker(Phrases([0])).build(mixed, RNG).rows[0].ids) - 1 + PATCHES
    with pytest.raises(SequenceTooLong, match=r"scene.png: .*model_max_length"):
        maker(Phrases(), limit).build(mixed, RNG)
    sample = maker(Phrases(), limit, drop_long_rows=True).build(mixed, RNG)
    assert [row.holes for row in sample.rows] == [(0,), (2,)]
    assert np.array_equal(sample.masks.numpy(), np.stack([stripe(0), stripe(2)]))
    assert len(sample.skipped) == 1 and "scene.png" in sample.skipped[0]
    assert collate([sample]).skipped == sample.skipped
    with pytest.raises(SequenceTooLong):
        maker(Phrases([1]), limit, drop_long_rows=True).build(mixed, RNG)


def test_what_is_cut_off_rows_is_counted(record):
    """Words after the mask go; masks and rows stay, and the batch says how many rows lost how many ids."""

    class Explained(Phrases):
        def converse(self, record, rng):
            words = ("", " since it is long", " for it is the one that you see at the left")
            return [(Turn("<image>\nWhere?", (Mask(i), ".", text)),) for i, text in enumerate(words)]

    lengths = [len(row.ids) for row in maker(Explained()).build(record, RNG).rows]
    encoder = Encoder(TOKENIZER, SPEC, max_length=lengths[0] + 1 + PATCHES - 1, long_rows="cut")
    sample = SampleBuilder(Explained(), encoder, VIEWS).build(record, RNG)
    assert [row.cut for row in sample.rows] == [0, lengths[1] - lengths[0] - 1, lengths[2] - lengths[0] - 1]
    batch = collate([sample, sample])
    assert batch.cut_rows == 4 and batch.cut_tokens == 2 * sum(row.cut for row in sample.rows)
    assert batch.ids.shape[1] == encoder.max_length and len(batch.masks[0]) == 3 and not batch.skipped


def test_a_limit_without_room_for_words_is_refused_with_the_published_meaning():
    """SESAME's 512 counts 256 positions for an image of 576 (sesame.md 5.2)."""
    encoder = Encoder(TOKENIZER, SPEC, max_length=512, long_rows="cut")
    with pytest.raises(ValueError, match=r"model_max_length 512 leaves no room .* 576 .* model_max_length 832 here"):
        SampleBuilder(Phrases(), encoder, Views(ClipView(336), SamView(64)))


# --- batches


def fake_sample(rows, width=1, shape=(2, 3), tokens=PATCHES):
    """A sample of rows given as (length, place of the image, places of mask groups)."""
    encoded = []
    for length, picture, groups in rows:
        ids = list(range(10, 10 + length))
        ids[picture] = IMAGE_ID
        positions = tuple(tuple(start - 1 + k for k in range(width)) for start in groups)
        encoded.append(Encoded(ids, [IGNORE_ID] * 2 + ids[2:], tuple(range(len(groups))), positions))
        encoded[-1].labels[picture] = IGNORE_ID
    count = sum(len(groups) for _, _, groups in rows)
    pixels = torch.zeros(3, 4, 4)
    return Sample("x", pixels, pixels, Geometry(shape, (4, 4)), tokens, encoded, torch.zeros(count, *shape))


ROWS = st.tuples(st.integers(12, 20), st.integers(0, 4), st.lists(st.integers(5, 9), max_size=3, unique=True))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    pictures=st.lists(st.lists(ROWS, max_size=3), min_size=1, max_size=3),
    patches=st.integers(1, 6),
    width=st.integers(1, 3),
)
def test_expansion_keeps_every_token_and_every_position(pictures, patches, width):
    samples = [
        fake_sample([(n, p, sorted(g)) for n, p, g in rows], width, tokens=patches + number)
        for number, rows in enumerate(pictures)
    ]
    batch = collate(samples, pad_id=7)
    rows = [row for sample in samples for row in sample.rows]
    assert batch.row_image.tolist() == [b for b, sample in enumerate(samples) for _ in sample.rows]
    assert batch.mask_rows.tolist() == [r for r, row in enumerate(rows) for _ in row.holes]
    masks = iter(zip(batch.mask_rows, batch.mask_positions, strict=True))
    for index, row in enumerate(rows):
        real = batch.attention[index]
        tokens = patches + int(batch.row_image[index])  # an image has a number of its own
        length = len(row.ids) - 1 + tokens
        assert real.sum() == length and real[:length].all()
        ids, labels = batch.ids[index, :length], batch.labels[index, :length]
        picture = ids == IMAGE_ID
        assert picture.sum() == tokens and (labels[picture] == IGNORE_ID).all()
        assert ids[~picture].tolist() == [i for i in row.ids if i != IMAGE_ID]
        assert (batch.ids[index, length:] == 7).all() and (batch.labels[index, length:] == IGNORE_ID).all()
        for positions in row.mask_positions:
            mask_row, found = next(masks)
            assert mask_row == index and ids[found + 1].tolist() == [row.ids[p + 1] for p in positions]


@pytest.mark.parametrize("spec", [SPEC, SIX])
def test_positions_point_at_the_states_that_predict_the_mask_tokens(record, spec):
    tokenizer = load_tokenizer(OWN / "lisa", spec)
    full = SampleBuilder(Phrases([1, 0]), Encoder(tokenizer, spec), VIEWS)
    batch = collate([full.build(record, RNG)] * 2)
    group = mask_ids(tokenizer, spec)
    assert batch.mask_positions.shape == (4, len(group)) and batch.mask_rows.tolist() == [0, 1, 2, 3]
    predicted = batch.ids[batch.mask_rows[:, None], batch.mask_positions + 1]
    assert predicted.tolist() == [list(group)] * 4
    assert [len(masks) for masks in batch.masks] == [2, 2] and len(batch) == 2


def test_golden_positions_are_those_of_the_published_offset():
    """A token at unexpanded index t is predicted at t + 254 with 256 patches (lisa.md 1.5)."""
    encoder = Encoder(TOKENIZER, SPEC)
    row = encoder((Turn("<image>\nWhere is the dog in this image?", ("It is ", Mask(0), ".")),))
    sample = Sample("x", torch.zeros(3, 2, 2), None, Geometry((1, 1), (1, 1)), 256, [row], torch.zeros(1, 1, 1))
    batch = collate([sample])
    (token,) = mask_ids(TOKENIZER, SPEC)
    assert batch.mask_positions.tolist() == [[row.ids.index(token) + 254]] and batch.seg_pixels is None


def test_a_batch_without_masks_has_empty_queries(record):
    batch = collate([fake_sample([(12, 1, [])])])
    assert batch.mask_rows.shape == (0,) and batch.mask_positions.shape == (0, 1) and len(batch.masks[0]) == 0


def test_masks_and_holes_must_agree():
    sample = fake_sample([(12, 1, [5])])
    sample.masks = sample.masks[:0]
    with pytest.raises(ValueError, match="x: its rows have 1 holes for masks, but it has 0 masks"):
        collate([sample])


def test_prompts_are_padded_on_the_left(record):
    encoder = Encoder(TOKENIZER, SPEC)
    sample = load_views(record.image, VIEWS)
    prompts = [
        [encoder.prompt("<image>\nHi"), encoder.prompt("<image>\nWhere is the thing?")],
        [encoder.prompt("<image>")],
    ]
    batch = collate_prompts([sample, sample], prompts)
    flat = [ids for group in prompts for ids in group]
    assert batch.row_image.tolist() == [0, 0, 1] and batch.geometry[0].original == SHAPE
    for index, ids in enumerate(flat):
        length = len(ids) - 1 + PATCHES
        assert batch.attention[index].tolist() == [False] * (batch.ids.shape[1] - length) + [True] * length
        real = batch.ids[index][batch.attention[index]]
        assert real[real != IMAGE_ID].tolist() == [i for i in ids if i != IMAGE_ID]
        assert (real == IMAGE_ID).sum() == PATCHES and (batch.labels[index] == IGNORE_ID).all()
