"""The common prefix of the rows about an image is read once; nothing about the answers changes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from data.types import IMAGE_ID, Geometry
from model.checkpoints.architecture import Architecture
from model.heads import HEADS, HeadContext
from model.vlm.prefix_cache import PrefixCache, attend, split_prefix
from tests.tiny_model import EOS, LANGUAGE, LLAVA, PLAN, SEG, SIDE, TOWER, tiny_batch, tiny_model

IMAGE = [IMAGE_ID] * 4
PIXEL = {"width": 16, "mlp_dim": 16, "decoder_heads": 2}
LEAD = [1, 5, 6, 7, 8, *IMAGE, 9]


def talkative(plan: Architecture = PLAN):
    """Random weights that write mask tokens among others, and end answers at different lengths."""
    model = tiny_model(seed=5, plan=plan).requires_grad_(False)
    model.vlm.language.lm_head.weight[SEG] *= 2.5
    model.vlm.language.lm_head.weight[EOS] *= 2.0
    return model


@pytest.fixture(scope="module")
def model():
    return talkative()


def batch_of(rows: list[list[int]], row_image: list[int], left: int = 0):
    """Left-padded prompts about three images of different sizes."""
    batch, generator = tiny_batch(masks=False), torch.Generator().manual_seed(3)
    length = max(map(len, rows)) + left
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    return replace(
        batch,
        pixels=torch.randn(3, 3, 16, 16, generator=generator),
        seg_pixels=torch.randn(3, 3, SIDE, SIDE, generator=generator),
        geometry=[*batch.geometry, Geometry((12, 12), (64, 64))],
        ids=ids,
        labels=torch.full_like(ids, -100),
        attention=torch.arange(length)[None] >= torch.tensor([[length - len(row)] for row in rows]),
        row_image=torch.tensor(row_image),
    )


def alone(batch, row: int):
    """One row with its image, unpadded: the one-by-one path."""
    image, start = int(batch.row_image[row]), int((~batch.attention[row]).sum())
    return replace(
        batch,
        pixels=batch.pixels[image : image + 1],
        seg_pixels=batch.seg_pixels[image : image + 1],
        geometry=batch.geometry[image : image + 1],
        ids=batch.ids[row : row + 1, start:],
        attention=batch.attention[row : row + 1, start:],
        row_image=torch.tensor([0]),
    )


def many(count: int = 9, seed: int = 0):
    """Rows of different lengths about three images: several, one, several; one pair is the same to the last token."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(1, 9, (1,), generator=generator))
        rows.append([*LEAD, *torch.randint(3, 30, (length,), generator=generator).tolist()])
    rows[1] = list(rows[0])
    return batch_of(rows, [0] * 5 + [1] + [2] * (count - 6), left=2)


def answers(model, batch, new: int = 14, mask_ids=(SEG,)):
    return model.generate(batch, max_new_tokens=new, mask_ids=mask_ids, eos=EOS)


@pytest.mark.parametrize("seed", range(4))
def test_answers_and_masks_are_those_of_the_one_by_one_path(model, seed):
    compare(model, many(seed=seed))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_so_they_are_with_fewer_key_heads_and_another_attention(attention):
    language = {**LANGUAGE, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = talkative(replace(PLAN, vlm_config={**LLAVA, "language": language}))
    model.vlm.language.config._attn_implementation = attention
    compare(model, many())
    assert model.vlm.language.config._attn_implementation == attention


def test_so_they_are_with_the_pixel_head():
    config = HEADS["pixel"].config_for({}, {"levels": (-2, -3), **PIXEL}, HeadContext(TOWER["hidden_size"], 3, 16, 2))
    model = talkative(replace(PLAN, head="pixel", head_config=config))
    model.vlm.language.lm_head.weight[SEG] *= 2  # two in a row make a mask
    compare(model, many(), mask_ids=(SEG, SEG))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_scores_of_half_precision_are_not_rounded_before_the_softmax(dtype):
    """Qwen2.5's keys have biases that make all scores thousands; only their differences, of a few units, count."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, 2, 40, 64, generator=generator) for _ in range(3))
    query, key = query[:, :, -1:], key.clone()
    query[..., :4] += 8
    key[..., :4] += 100
    query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    shared = slice(0, 30)  # of the first row: the prefix of all
    key[:, :, shared], value[:, :, shared] = key[:1, :, shared], value[:1, :, shared]
    expected = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
    prefix = PrefixCache([key[:1, :, shared]], [value[:1, :, shared]], torch.zeros(3, dtype=torch.long), [3])
    mask = torch.ones(3, 1, 1, 40, dtype=torch.bool)
    own = key[:, :, 30:], value[:, :, 30:]
    got, _ = attend(SimpleNamespace(layer_idx=0), query, *own, mask, scaling=1 / 8, prefix=prefix)
    assert (got.transpose(1, 2).float() - expected).abs().max() < 0.05


def compare(model, batch, mask_ids=(SEG,)):
    """All rows in one batch against each alone."""
    together = answers(model, batch, mask_ids=mask_ids)
    lengths = {len(answer.ids) for answer in together}
    assert len(lengths) > 1, "the test needs rows that stop early"
    assert sum(len(answer.masks) for answer in together) > 3, "the test needs masks"
    for row, answer in enumerate(together):
        (single,) = answers(model, alone(batch, row), mask_ids=mask_ids)
        assert answer.ids == single.ids
        torch.testing.assert_close(answer.masks, single.masks, atol=1e-4, rtol=1e-4)


def positions_read(model, batch, new: int) -> list[tuple[int, int]]:
    seen = []
    hook = model.vlm.language.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple((args[0] if args else kwargs["hidden_states"]).shape[:2])),
        with_kwargs=True,
    )
    answers(model, batch, new)
    hook.remove()
    return seen


def test_the_shared_beginning_is_read_once_a_picture(model):
    rows = [[*LEAD, 11, 12], [*LEAD, 13], [*LEAD, 11, 14, 15], [*LEAD, 20, 21], [*LEAD, 22]]
    seen = positions_read(model, batch_of(rows, [0, 0, 0, 1, 1]), new=1)
    assert seen == [(2, len(LEAD)), (5, 3)]
    assert positions_read(model, batch_of(rows[:1], [0]), new=1) == [(1, len(LEAD) + 2)]
    assert positions_read(model, batch_of(rows[:2], [0, 1]), new=1) == [(2, len(LEAD) + 2)]


def test_finished_rows_leave_the_batch(model, monkeypatch):
    monkeypatch.setattr(model.vlm, "draft_tokens", 0)
    batch = many()
    written = [len(answer.ids) for answer in answers(model, batch)]
    widths = [rows for rows, length in positions_read(model, batch, 14) if length == 1]
    assert len(widths) == max(written) - 1 and widths[-1] < len(written)
    for step, width in enumerate(widths, 1):
        writing = sum(length > step for length in written)
        assert writing <= width < max(2 * writing, 2) or width == len(written)


def test_split_keeps_a_last_token_and_marks_padding():
    rows = [[1, 2, 3], [1, 2, 3, 4, 5], [1, 7], [1, 2, 3]]
    length = 6
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    attention = ids != 0
    split = split_prefix(ids, attention, torch.tensor([0, 0, 2, 3]))
    assert split is not None
    assert split.first_row.tolist() == [0, 2, 3] and split.of_row.tolist() == [0, 0, 1, 2]
    assert split.real.tolist() == [[True, True], [False, True], [True, True]]
    prefixes = [ids[row, columns].tolist() for row, columns in zip(split.first_row, split.columns, strict=True)]
    assert prefixes[0] == [1, 2] and prefixes[1][1] == 1 and prefixes[2] == [1, 2]
    assert split.suffix.tolist() == [[False, False, True], [True] * 3, [False, False, True], [False, False, True]]
    assert split_prefix(ids[1:], attention[1:], torch.tensor([0, 1, 2])) is None
    assert (
        split_prefix(torch.tensor([[1, 2], [3, 2]]), torch.ones(2, 2, dtype=torch.bool), torch.zeros(2).long()) is None
    )
