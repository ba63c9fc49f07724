"""Which states prompt masks: before or at the mask token, after or before the final norm (TokenSpec.read, .norm)."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from data.encode import Encoder
from data.tokens import TokenSpec, load_tokenizer
from data.types import Mask, Turn
from model.heads import HEADS, HeadContext
from model.losses import objective
from model.projection import prompts_of
from tests.records import OWN
from tests.test_prefix_cache import PIXEL, answers, many
from tests.test_seg_model import generate, only, prompts
from tests.tiny_model import LLAVA, PLAN, SEG, TOWER, tiny_batch, tiny_model
from utils.config import LossConfig

WAYS = [
    TokenSpec(("[SEG]",), ("[SEG]",), read=read, norm=norm)
    for read, norm in product(("before", "at"), ("after", "before"))
]


def named(spec: TokenSpec) -> str:
    return f"{spec.read}-{spec.norm}"


def shifted(batch, spec: TokenSpec):
    """The batch, whose positions are those before the tokens, as an encoder of `spec` has it."""
    return replace(batch, mask_positions=batch.mask_positions + int(spec.read == "at"))


def reading(spec: TokenSpec, seed: int = 5, plan=PLAN):
    """A model that writes many mask tokens. Its final norm is not near the identity, so that both sides differ."""
    model = tiny_model(seed=seed, plan=plan).requires_grad_(False)
    model.vlm.language.lm_head.weight[SEG] *= 2.5
    model.vlm.decoder.norm.weight.copy_(torch.linspace(0.5, 2, 16))
    model.read_states(spec)
    return model


@pytest.mark.parametrize("spec", WAYS, ids=named)
def test_masks_are_prompted_by_that_state(spec):
    model, batch = reading(spec), tiny_batch()
    seen = {}
    hook = model.vlm.decoder.norm.register_forward_hook(
        lambda _, args, output: seen.update(before=args[0], after=output)
    )
    output = model(shifted(batch, spec))
    hook.remove()
    assert not model.vlm.decoder.norm._forward_pre_hooks, "nothing is left on the norm"
    rows, columns = (batch.ids == SEG).nonzero(as_tuple=True)
    states = seen[spec.norm][rows, columns - int(spec.read == "before")][:, None]
    queries = prompts_of(model.project(states), model.head.prompt_dim)
    vision = model.vlm.encode_images(batch.pixels, batch.geometry)
    features = model.head.features(batch, vision)
    expected = model.head.decode(features, queries, batch.row_image[rows], batch.geometry).masks
    torch.testing.assert_close(output.masks, expected)
    logits = model.vlm.logits(seen["after"][:, :-1][batch.labels[:, 1:] != -100])
    torch.testing.assert_close(output.token_logits, logits)


def test_the_ways_differ():
    masks = [reading(spec)(shifted(tiny_batch(), spec)).masks[0] for spec in WAYS]
    assert all(not torch.allclose(one, other, atol=1e-3) for i, one in enumerate(masks) for other in masks[:i])


@pytest.mark.parametrize("spec", WAYS, ids=named)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_packed_rows_have_the_masks_and_gradients_of_rows(spec, checkpointed):
    batch = shifted(tiny_batch(), spec)
    results = []
    for packed in (False, True):
        model = reading(spec).train().requires_grad_(True)
        if checkpointed:
            model.vlm.checkpoint_gradients()
        model.vlm.set_packing(packed, 0)
        output = model(batch)
        objective(output, batch, LossConfig()).total.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        results.append((output.masks, gradients))
    (apart, slow), (together, fast) = results
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("spec", WAYS, ids=named)
def test_generation_equals_teacher_forcing_of_its_own_answer(spec):
    model, batch = reading(spec), prompts()
    written = generate(model, batch)
    assert sum(len(answer.masks) for answer in written) >= 3, "the test needs mask tokens"
    for row, answer in enumerate(written):
        forced = only(batch, row)
        ids = torch.cat([forced.ids, torch.tensor([answer.ids])], dim=1)
        answered = torch.arange(ids.shape[1]) >= forced.ids.shape[1]
        positions = ((ids == SEG) & answered).nonzero()
        forced = replace(
            forced,
            ids=ids,
            labels=ids.where(answered, -100),
            attention=torch.ones_like(ids, dtype=torch.bool),
            mask_rows=positions[:, 0],
            mask_positions=positions[:, 1:] - int(spec.read == "before"),
        )
        masks = model(forced).masks[0]
        if spec.read == "at" and answer.ids[-1] == SEG:
            masks = masks[:-1]
        torch.testing.assert_close(answer.masks, masks, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spec", WAYS, ids=named)
def test_a_mask_token_at_the_length_limit_has_a_mask_only_if_the_state_before_it_is_read(spec):
    model = reading(spec)
    (written,) = generate(model, only(prompts(), 0), new=12)
    end = written.ids.index(SEG) + 1
    (cut,) = generate(model, only(prompts(), 0), new=end)
    assert cut.ids == written.ids[:end], "the mask token is the last"
    assert len(cut.masks) == (spec.read == "before")
    (longer,) = generate(model, only(prompts(), 0), new=end + 1)
    assert len(longer.masks) == longer.ids.count(SEG) - (spec.read == "at" and longer.ids[-1] == SEG)


def test_several_tokens_a_mask_are_read_each_at_its_own_place():
    spec = TokenSpec(("[A]", "[B]"), ("[A]", "[B]"), read="at", norm="before")
    config = HEADS["pixel"].config_for({}, {"levels": (-2, -3), **PIXEL}, HeadContext(TOWER["hidden_size"], 3, 16, 2))
    model = reading(spec, plan=replace(PLAN, head="pixel", head_config=config, vlm_config=LLAVA))
    model.vlm.language.lm_head.weight[SEG] *= 2  # two in a row make a mask
    found = 0
    for answer in answers(model, many(), mask_ids=(SEG, SEG)):
        starts, index = 0, 0
        while index + 1 < len(answer.ids):
            whole = answer.ids[index : index + 2] == [SEG, SEG]
            starts += whole and index + 2 < len(answer.ids)  # the state at the second token is there
            index += 2 if whole else 1
        assert len(answer.masks) == starts
        found += starts
    assert found > 3


def test_the_encoder_gives_the_positions():
    plain = TokenSpec(("[SEG]",), ("[SEG]",))
    tokenizer = load_tokenizer(OWN / "lisa", plain)
    dialogue = (Turn("<image>\nWhere?", ("Here ", Mask(0), " and ", Mask(1), ".")), Turn("And?", (Mask(2),)))
    before, at = (Encoder(tokenizer, replace(plain, read=read)).encode(dialogue) for read in ("before", "at"))
    seg = tokenizer.get_vocab()["[SEG]"]
    assert before.ids == at.ids and before.labels == at.labels
    assert [before.ids[place + 1] for (place,) in before.mask_positions] == [seg] * 3
    assert at.mask_positions == tuple((place + 1,) for (place,) in before.mask_positions)
