"""The model of all systems: batching, caching, padding and checkpointing leave its answers and gradients unchanged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from data.types import IMAGE_ID
from model.heads.base import CHECKPOINTED_AT_ONCE
from model.losses import objective
from model.seg_model import find_groups
from tests.tiny_model import EOS, LLAVA, PLAN, SEG, llava_of, sam_of, tiny_batch, tiny_model
from utils.config import LossConfig


def prompts(left: int = 0):
    """Open prompts of different lengths, left-padded: two rows about image 0, one about image 1."""
    batch = tiny_batch(masks=False)
    image = [IMAGE_ID] * 4
    rows = [[1, 5, *image, 6, 7, 8, 11], [1, 5, *image, 9], [1, 5, *image, 10, 12, 30]]
    length = max(map(len, rows)) + left
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    lengths = torch.tensor([[length - len(row)] for row in rows])
    batch.ids, batch.labels = ids, torch.full_like(ids, -100)
    batch.attention = torch.arange(length)[None] >= lengths
    return batch


def only(batch, row: int):
    """The batch of one row, without its padding."""
    image = int(batch.row_image[row])
    start = int((~batch.attention[row]).sum())
    return replace(
        batch,
        pixels=batch.pixels[image : image + 1],
        seg_pixels=batch.seg_pixels[image : image + 1],
        ids=batch.ids[row : row + 1, start:],
        attention=batch.attention[row : row + 1, start:],
        row_image=torch.tensor([0]),
        geometry=[batch.geometry[image]],
    )


@pytest.fixture(scope="module")
def model():
    """Its output row of SEG is scaled so that random weights write mask tokens among others."""
    model = tiny_model(seed=5).requires_grad_(False)
    model.vlm.language.lm_head.weight[SEG] *= 2.5
    return model


def generate(model, batch, new=12):
    return model.generate(batch, max_new_tokens=new, mask_ids=(SEG,), eos=EOS)


def test_batched_answers_equal_single_ones(model):
    batch = prompts(left=3)
    together = generate(model, batch)
    assert sum(len(answer.masks) for answer in together) >= 3, "the test needs mask tokens"
    for row, answer in enumerate(together):
        (alone,) = generate(model, only(batch, row))
        assert alone.ids == answer.ids
        assert len(answer.masks) == answer.ids.count(SEG)
        torch.testing.assert_close(alone.masks, answer.masks, atol=1e-4, rtol=1e-4)


def test_cached_generation_equals_teacher_forcing_of_its_own_answer(model):
    batch = prompts()
    for row, answer in enumerate(generate(model, batch)):
        forced = only(batch, row)
        ids = torch.cat([forced.ids, torch.tensor([answer.ids])], dim=1)
        labels = ids.clone()
        labels[:, : forced.ids.shape[1]] = -100
        positions = (labels == SEG).nonzero()
        forced = replace(
            forced,
            ids=ids,
            labels=labels,
            attention=torch.ones_like(ids, dtype=torch.bool),
            mask_rows=positions[:, 0],
            mask_positions=positions[:, 1:] - 1,
        )
        output = model(forced)
        assert output.token_logits.argmax(-1).tolist() == answer.ids
        torch.testing.assert_close(output.masks[0], answer.masks, atol=1e-4, rtol=1e-4)


def test_pictures_are_encoded_once_whatever_their_rows(model):
    seen = []
    hooks = [
        part.register_forward_pre_hook(lambda module, args, kwargs: seen.append(len(args[0])), with_kwargs=True)
        for part in (model.vlm.tower.embeddings, model.head.encoder.patch_embed)
    ]
    generate(model, prompts())
    model(tiny_batch())
    for hook in hooks:
        hook.remove()
    assert seen == [2, 2, 2, 2]


def test_answers_stop_at_the_end_token(model):
    rigged = tiny_model(seed=5).requires_grad_(False)
    rigged.vlm.language.lm_head.weight.zero_()
    rigged.vlm.language.lm_head.weight[EOS] = 0  # all logits equal: the first id wins, which is not the end token
    assert [answer.ids for answer in generate(rigged, prompts(), new=3)] == [[0, 0, 0]] * 3
    (answer, *_) = rigged.generate(prompts(), max_new_tokens=5, mask_ids=(SEG,), eos=0)
    assert answer.ids == [0]
    assert answer.masks.shape == (0, 20, 30)


def test_right_padded_prompts_are_refused(model):
    batch = prompts()
    batch.attention = batch.attention.flip(1)
    with pytest.raises(ValueError, match="padded on the left"):
        generate(model, batch)


def test_generation_in_training_mode_is_refused():
    with pytest.raises(RuntimeError, match="eval"):
        generate(tiny_model().train(), prompts())


def test_padding_does_not_change_masks(model):
    batch = tiny_batch()
    wide = replace(
        batch,
        ids=torch.nn.functional.pad(batch.ids, (0, 4)),
        labels=torch.nn.functional.pad(batch.labels, (0, 4), value=-100),
        attention=torch.nn.functional.pad(batch.attention, (0, 4)),
    )
    a, b = model(batch), model(wide)
    torch.testing.assert_close(a.token_logits, b.token_logits)
    for one, other in zip(a.masks, b.masks, strict=True):
        torch.testing.assert_close(one, other)


def test_logits_stand_where_labels_are(model):
    batch = tiny_batch()
    output = model(batch)
    assert len(output.token_targets) == int((batch.labels != -100).sum())
    assert output.token_logits.shape == (len(output.token_targets), 40)


def test_batch_without_masks_touches_the_same_weights():
    """Every rank must reduce the same gradients: zero ones here, but not None."""
    model = tiny_model().requires_grad_(True)
    touched = []
    for masks in (True, False):
        model.zero_grad(set_to_none=True)
        batch = tiny_batch(masks=masks)
        objective(model(batch), batch, LossConfig()).total.backward()
        touched.append({name for name, weight in model.named_parameters() if weight.grad is not None})
    assert touched[0] == touched[1]
    assert {name.split(".")[0] for name in touched[1]} == {"vlm", "head", "project"}
    assert not any(weight.grad is None or weight.grad.any() for weight in model.project.parameters())


def test_checkpointed_gradients_are_the_plain_ones():
    gradients, passes = [], []
    for checkpointed in (False, True):
        model = tiny_model().train()
        model.vlm.language.model.layers[0].mlp.register_forward_pre_hook(lambda *_, c=checkpointed: passes.append(c))
        model.vlm.language.get_input_embeddings().requires_grad_(False)
        if checkpointed:
            model.vlm.checkpoint_gradients()
        batch = tiny_batch()
        objective(model(batch), batch, LossConfig()).total.backward()
        gradients.append(model.vlm.language.model.layers[0].self_attn.q_proj.weight.grad)
    assert passes == [False, True, True], "a checkpointed layer runs again in the backward pass"
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


def test_masks_decoded_again_have_the_same_gradients(monkeypatch):
    monkeypatch.setitem(CHECKPOINTED_AT_ONCE, "cpu", 2)  # of three: in two pieces
    gradients, passes = [], []
    for checkpointed in (False, True):
        model = tiny_model().train()
        model.head.checkpoint_decoder = checkpointed
        sam_of(model).decoder.register_forward_pre_hook(lambda *_, again=checkpointed: passes.append(again))
        batch = tiny_batch()
        objective(model(batch), batch, LossConfig()).total.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert passes == [False] + [True] * 3, "each piece but the last once more in the backward pass"
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_casts_keep_the_rotary_frequencies_in_float32():
    model = tiny_model()
    frequencies = model.vlm.language.model.rotary_emb.inv_freq.clone()
    model.bfloat16()
    assert model.dtype == torch.bfloat16
    kept = model.vlm.language.model.rotary_emb.inv_freq
    assert kept.dtype == torch.float32
    assert torch.equal(kept, frequencies)


def test_bf16_model_gives_float32_masks():
    model = tiny_model().bfloat16()
    output = model(tiny_batch().to("cpu", torch.bfloat16))
    assert output.token_logits.dtype == torch.bfloat16
    assert all(mask.dtype == torch.float32 for mask in output.masks)


def test_image_positions_must_match_the_tower(model):
    batch = tiny_batch()
    batch.ids[0, 2] = 6
    with pytest.raises(ValueError, match=r"\[3, 4, 4\] image positions, their images have \[4, 4, 4\]"):
        model(batch)


def test_linear_and_deep_projectors():
    for depth, linears in ((1, 1), (2, 2), (3, 3)):
        model = tiny_model(plan=replace(PLAN, vlm_config={**LLAVA, "projector_depth": depth}))
        assert sum(isinstance(part, torch.nn.Linear) for part in llava_of(model).projector.children()) == linears
        assert len(model(tiny_batch()).masks) == 2


def test_groups_are_whole_and_do_not_overlap():
    assert find_groups([7, 7, 1, 7], (7,)) == [0, 1, 3]
    assert find_groups([4, 5, 6, 4, 5, 4, 5, 6], (4, 5, 6)) == [0, 5]
    assert find_groups([4, 4, 4], (4, 4)) == [0]
    assert find_groups([], (4,)) == []
