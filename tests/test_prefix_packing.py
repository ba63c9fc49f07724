"""Rows of an image that share their beginning, in one sequence: the loss and gradients of separate rows."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from data.types import IGNORE_ID, IMAGE_ID
from model.checkpoints.load import assemble
from model.finetune.trainable import apply_lora
from model.losses import objective
from model.vlm.base import Vision
from model.vlm.decoder import rotary_positions
from model.vlm.prefix_packing import _fill, can_pack, pack
from tests.tiny_model import EOS, PLAN, SEG, tiny_batch, tiny_model
from utils.config import LoraConfig, LossConfig

IMAGE = [IMAGE_ID] * 4
ROWS = [  # three dialogues about image 0 (one opens another), one and two about the next, one about the last
    ([1, 5, *IMAGE, 6, 7, 8, SEG, 9, SEG, EOS], 0),
    ([1, 5, *IMAGE, 6, 11, SEG, 13, EOS], 0),
    ([1, 5, *IMAGE, 6, 7], 0),
    ([1, 5, *IMAGE, 14, 15, SEG, EOS], 1),
    ([1, 5, *IMAGE, 14, 15, 9, 12, 13, SEG, EOS], 1),
    ([1, 5, *IMAGE, 20, SEG, EOS], 2),
]


def rows_batch(dtype=torch.float32):
    generator, batch = torch.Generator().manual_seed(3), tiny_batch()
    length = max(len(ids) for ids, _ in ROWS) + 1
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in ROWS])
    labels = ids.masked_fill((ids == 0) | (ids == IMAGE_ID), IGNORE_ID)
    labels[:, :7] = IGNORE_ID
    positions = (ids == SEG).nonzero()
    row_image = torch.tensor([image for _, image in ROWS])
    geometry = [*batch.geometry, batch.geometry[0]]
    counts = row_image[positions[:, 0]].bincount(minlength=3).tolist()
    draw = [torch.rand(n, *place.original, generator=generator) for n, place in zip(counts, geometry, strict=True)]
    return replace(
        batch,
        pixels=torch.randn(3, 3, 16, 16, generator=generator).to(dtype),
        seg_pixels=torch.randn(3, 3, 64, 64, generator=generator).to(dtype),
        ids=ids,
        labels=labels,
        attention=ids != 0,
        row_image=row_image,
        mask_rows=positions[:, 0],
        mask_positions=positions[:, 1:] - 1,
        masks=[(mask > 0.5).float() for mask in draw],
        geometry=geometry,
        names=["a", "b", "c"],
        ignore=[None] * 3,
    )


def gradients(model, batch, packed: bool):
    model.vlm.pack_rows = packed
    model.zero_grad(set_to_none=True)
    output = model(batch)
    losses = objective(output, batch, LossConfig())
    losses.total.backward()
    return output, losses, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


CASES = [  # eager attention takes its softmax in float32 whatever the model's type
    ("sdpa", torch.float64, 1e-10, False),
    ("sdpa", torch.float64, 1e-10, True),
    ("sdpa", torch.float32, 2e-4, False),
    ("eager", torch.float32, 2e-4, False),
]


@pytest.mark.parametrize(("attention", "dtype", "tolerance", "checkpointed"), CASES)
def test_packed_rows_have_the_loss_and_gradients_of_rows(attention, dtype, tolerance, checkpointed):
    model = assemble(PLAN, attention)
    model.load_state_dict(tiny_model(seed=2).state_dict())
    apply_lora(model, LoraConfig(r=2, alpha=4, dropout=0.0))
    model.to(dtype).train().requires_grad_(True)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B" in name:
                weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(7))
    if checkpointed:
        model.vlm.checkpoint_gradients()
    batch, lengths = rows_batch(dtype), []
    model.vlm.language.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[:2]))
    apart, packed = (gradients(model, batch, packed) for packed in (False, True))
    assert {tuple(shape) for shape in lengths} == {(6, 14), (3, 18)}
    assert packed[1].total.item() == pytest.approx(apart[1].total.item(), rel=tolerance)
    torch.testing.assert_close(packed[0].token_logits, apart[0].token_logits, atol=tolerance, rtol=tolerance)
    for one, other in zip(packed[0].masks, apart[0].masks, strict=True):
        torch.testing.assert_close(one, other, atol=max(tolerance, 1e-5), rtol=max(tolerance, 1e-5))
    assert packed[2].keys() == apart[2].keys()
    assert any(".lora_A" in name for name in packed[2])
    # masks are float32 in any case
    torch.testing.assert_close(packed[2], apart[2], atol=max(tolerance, 1e-6), rtol=max(tolerance, 1e-5))


def test_image_tokens_that_show_nothing_stay_hidden():
    model, batch = tiny_model(), rows_batch()
    shown = torch.tensor([1, 1, 0, 0, 1, 0, 1, 0, 1, 1, 1, 1], dtype=torch.bool)
    seen = Vision(torch.randn(12, 16), [4, 4, 4], attention=shown)
    results = []
    for packed in (False, True):
        model.vlm.set_packing(packed, 0)
        results.append(model.vlm(batch.ids, batch.attention, seen, batch.row_image).final[batch.attention])
    torch.testing.assert_close(*results)
    all_shown = replace(seen, attention=None)
    plain = model.vlm(batch.ids, batch.attention, all_shown, batch.row_image).final[batch.attention]
    assert not torch.allclose(results[1], plain)


def test_dialogues_do_not_see_each_other():
    batch = rows_batch()
    packing = pack(batch.ids, batch.attention, batch.row_image)
    assert packing is not None
    assert packing.source.shape == (3, 18)
    assert torch.equal(packing.scatter(packing.gather(batch.ids[..., None].double()))[batch.attention][:, 0].long(),
                       batch.ids[batch.attention])  # fmt: skip
    visible = packing.visible[0]
    assert visible[:7].equal(torch.ones(7, 18, dtype=torch.bool).tril())
    first, second = packing.place[0, 9], packing.place[1, 9]
    assert visible[first].sum() == 10
    assert visible[second].sum() == 10
    assert not visible[second, first]
    assert packing.gather_each(torch.arange(batch.ids.shape[1]).expand_as(batch.ids))[0, second] == 9


def test_rows_that_gain_nothing_stay_apart():
    batch = rows_batch()
    assert pack(batch.ids[2:4], batch.attention[2:4], batch.row_image[2:4]) is None, "one row per image"
    other = batch.ids[:2].clone()
    other[1, 0] = 3
    assert pack(other, batch.attention[:2], batch.row_image[:2]) is not None, "the shorter row's padding is saved"
    assert pack(other[:, :11], batch.attention[:2, :11], batch.row_image[:2]) is None, "nothing in common"
    left = batch.attention[:2].flip(1)
    assert pack(batch.ids[:2].flip(1), left, batch.row_image[:2]) is None, "left-padded rows are prompts"


@pytest.mark.parametrize(("most", "shape"), [(0, (3, 18)), (30, (2, 27)), (100, (1, 42))])
def test_images_share_sequences(most, shape):
    """18, 15 and 9 slots; no dialogue sees another's, and all give the loss and gradients of separate rows."""
    batch = rows_batch(torch.float64)
    packing = pack(batch.ids, batch.attention, batch.row_image, most=most)
    assert packing is not None
    assert packing.source.shape == shape
    columns = torch.arange(batch.ids.shape[1]).expand_as(batch.ids)
    assert torch.equal(packing.gather_each(columns)[0, :7], torch.arange(7))
    slots = packing.place.masked_fill(~batch.attention, -1)
    for row, (ids, image) in enumerate(ROWS):
        last = int(slots[row].max())
        assert int(packing.visible.flatten(0, 1)[last].sum()) == len(ids), "its beginning and itself"
        strangers = slots[batch.row_image != image].unique()[1:]
        inside = strangers[strangers // shape[1] == last // shape[1]] % shape[1]
        assert not packing.visible.flatten(0, 1)[last][inside].any()
    results = []
    for packed in (False, True):
        model = assemble(PLAN).double().train()
        model.load_state_dict(tiny_model(seed=2).state_dict())
        model.vlm.pack_length = most
        results.append(gradients(model, batch, packed))
    torch.testing.assert_close(results[1][1].total, results[0][1].total, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(results[1][0].token_logits, results[0][0].token_logits, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(results[1][2], results[0][2], atol=1e-6, rtol=1e-5)


def test_sequences_are_filled_first_fit():
    sequence, offset, slots = _fill([5, 4, 3, 2, 9, 1], 8, torch.device("cpu"))
    assert sequence.tolist() == [0, 1, 0, 1, 2, 1]
    assert offset.tolist() == [0, 0, 5, 4, 0, 6]
    assert slots == 9


def test_attention_without_a_mask_gets_rows_end_to_end(monkeypatch):
    """As flash attention would: no mask at all, one sequence, whose rows are inferred from positions that start at 0
    again. SDPA, which reads them in the same way, stands in for it."""
    model, batch = tiny_model(seed=2), rows_batch()
    model.vlm.set_packing(False, 0)
    apart = model(batch)
    monkeypatch.setattr("model.vlm.decoder.MASKED", ("eager",))
    model.vlm.set_packing(can_pack(True, "flash_attention_2"), 0)
    calls = []
    model.vlm.decoder.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    packed = model(batch)
    assert calls[0]["attention_mask"] is None
    assert calls[0]["inputs_embeds"].shape[:2] == (1, sum(len(ids) for ids, _ in ROWS))
    assert int((calls[0]["position_ids"] == 0).sum()) == len(ROWS)
    torch.testing.assert_close(packed.token_logits, apart.token_logits, atol=2e-4, rtol=2e-4)
    seen = Vision(torch.randn(12, 16), [4, 4, 4], attention=torch.ones(12, dtype=torch.bool))
    model.vlm(batch.ids, batch.attention, seen, batch.row_image)
    assert calls[1]["attention_mask"].shape == batch.ids.shape, "hidden image tokens need a mask: rows stay rows"


def test_flash_attention_says_that_rows_share_nothing(caplog):
    assert can_pack(True, "sdpa")
    assert not can_pack(False, "flash_attention_2")
    assert not caplog.records
    logger = logging.getLogger("assistant")
    propagate, logger.propagate = logger.propagate, True
    assert can_pack(True, "flash_attention_2")
    logger.propagate = propagate
    assert "model.pack_rows: flash_attention_2 takes no mask between dialogues" in caplog.text


@pytest.mark.parametrize("left", [False, True])
def test_rotary_positions_on_several_axes_are_those_of_transformers(left):
    """M-RoPE of padded rows about images of two grids, of which one row shows none."""
    grids, row_image = [(2, 3), (4, 1)], torch.tensor([0, 0, 1, 1])
    counts = [height * width for height, width in grids]
    rows = [[5, IMAGE_ID, 6, 7], [IMAGE_ID, 6], [5, 6, 7, IMAGE_ID, 8], [5, 6]]
    expanded = [
        [token for token in row for _ in range(counts[image] if token == IMAGE_ID else 1)]
        for row, image in zip(rows, row_image.tolist(), strict=True)
    ]
    length = max(map(len, expanded))
    ids, attention = torch.zeros(4, length, dtype=torch.long), torch.zeros(4, length, dtype=torch.bool)
    for index, row in enumerate(expanded):
        place = slice(length - len(row), None) if left else slice(len(row))
        ids[index, place], attention[index, place] = torch.tensor(row), True
    offsets = torch.cat([_offsets(*grid) for grid in grids], dim=1)
    vision = Vision(torch.zeros(sum(counts), 1), counts, offsets=offsets)
    found = rotary_positions(attention, vision, vision.index(ids, row_image))

    small = {"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 16, "intermediate_size": 8}
    stock = Qwen3VLModel(Qwen3VLConfig(text_config=small, vision_config={"depth": 1, "hidden_size": 8, "num_heads": 1}))
    patches = torch.tensor([(1, 2 * grids[image][0], 2 * grids[image][1]) for image in (0, 0, 1)])  # merged 2 x 2
    expected, _ = stock.get_rope_index(ids, (ids == IMAGE_ID).int(), patches, attention_mask=attention.long())
    assert torch.equal(found[1:, attention], expected[:, attention])
    assert torch.equal(found[0], (attention.long().cumsum(1) - 1).clamp(min=0))


def _offsets(height: int, width: int) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns]).flatten(1)
