"""The text projection: its kinds, several prompts per token, published names, new weights, finished folders."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.checkpoints.layouts import Report, reading_table, to_model_names
from model.checkpoints.save import save_folder
from model.heads import HEADS
from model.losses import objective
from model.projection import KINDS, Projection, prompts_of
from model.vlm import VLMS
from systems.assistant import build, load
from tests.tiny_assistant import tiny
from tests.tiny_model import PLAN, tiny_batch, tiny_model
from utils.config import LossConfig, load_recipe

TABLE = reading_table(VLMS["llava"].WEIGHT_NAMES, HEADS["sam"].WEIGHT_NAMES)


def test_the_kinds_compute_what_they_say():
    states = torch.randn(3, 2, 8)
    linear, mlp, norm = (Projection(kind, 2).build(8, 5) for kind in ("linear", "mlp", "norm_mlp"))
    (only,), (first, _, last) = linear, mlp
    torch.testing.assert_close(linear(states), states @ only.weight.T + only.bias)
    hidden = (states @ first.weight.T + first.bias).clamp(min=0)
    torch.testing.assert_close(mlp(states), hidden @ last.weight.T + last.bias)
    scale, inner, _, outer = norm
    torch.nn.init.normal_(scale.weight)
    normed = states * (states.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * scale.weight
    hidden = normed @ inner.weight.T + inner.bias
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(norm(states), hidden @ outer.weight.T + outer.bias)


def test_prompts_of_a_token_stand_together():
    projected = torch.arange(2 * 3 * 8).view(2, 3, 8)  # 3 tokens, 2 prompts of 4 numbers each
    prompts = prompts_of(projected, 4)
    assert prompts.shape == (2, 6, 4)
    assert torch.equal(prompts[1, 2], projected[1, 1, :4]) and torch.equal(prompts[1, 3], projected[1, 1, 4:])


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        ("model.text_hidden_fcs.0.2.weight", "project.2.weight"),  # LISA's family: in a list
        ("text_hidden_fcs.0.weight", "project.0.weight"),  # Sa2VA
        ("text_hidden_fcs.2.bias", "project.2.bias"),
        ("seg_head.0.weight", "project.0.weight"),  # UniPixel
        ("seg_head.3.bias", "project.3.bias"),
        ("project.1.weight", "project.1.weight"),
    ],
)
def test_published_names(published, ours):
    assert TABLE.to_model(published) == ours


def test_what_unipixel_holds_for_regions_and_frames_has_no_place():
    report, weight = Report(), torch.zeros(1)
    names = ["ref_proj.1.bias", "ref_encoder.no_mask_embed.weight", "tem_emb.weight", "msk_proj.0.weight"]
    found = to_model_names(
        dict.fromkeys([*names, "seg_head.0.weight", "ref_other.weight"], weight), TABLE, report, HEADS["sam2"].IGNORED
    )
    assert list(found) == ["project.0.weight"] and report.ignored == names and report.unexpected == ["ref_other.weight"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompts", [1, 2])
def test_every_kind_trains_with_and_without_masks(kind, prompts):
    model = tiny_model(plan=replace(PLAN, projection=Projection(kind, prompts))).train()
    touched = []
    for masks in (True, False):
        model.zero_grad(set_to_none=True)
        batch = tiny_batch(masks=masks)
        output = model(batch)
        assert [len(masks) for masks in output.masks] == [len(masks) for masks in batch.masks]
        objective(output, batch, LossConfig()).total.backward()
        touched.append({name for name, weight in model.project.named_parameters() if weight.grad is not None})
    assert touched[0] == touched[1] == {name for name, _ in model.project.named_parameters()}


def test_both_prompts_of_a_token_matter():
    model, batch = tiny_model(plan=replace(PLAN, projection=Projection("mlp", 2))), tiny_batch()
    before = model(batch).masks[0]
    last, size = model.project[2], model.head.prompt_dim
    for part in (slice(0, size), slice(size, 2 * size)):
        kept = last.weight.data[part].clone()
        last.weight.data[part] += 1
        assert not torch.allclose(model(batch).masks[0], before, atol=1e-3)
        last.weight.data[part] = kept


@pytest.fixture(scope="module")
def recipe():
    recipe = load_recipe("configs/toy/lisa.yaml")
    return replace(recipe, model=replace(recipe.model, precision="fp32"))


@pytest.mark.parametrize(("kind", "prompts"), [("linear", 1), ("norm_mlp", 2)])
def test_a_recipe_chooses_it_and_its_folder_keeps_it(recipe, kind, prompts, tmp_path):
    recipe = replace(recipe, model=replace(recipe.model, text_projection=kind, prompts_per_token=prompts))
    made = build(recipe, device="cpu", trainable=False)
    state = made.model.project.state_dict()
    assert state.keys() == KINDS[kind](1, 1).state_dict().keys()
    width, last = made.model.vlm.hidden_size, list(state)[-2]
    assert state[last].shape == (prompts * made.model.head.prompt_dim, width)
    for name, weight in state.items():  # torch's own distribution of a linear layer, and the identity of a norm
        bound = width**-0.5
        assert (
            torch.equal(weight, torch.ones(width))
            if (kind, name) == ("norm_mlp", "0.weight")
            else (weight.abs().max() <= bound and (weight.numel() < 8 or weight.std() > bound / 4))
        )
    assert {name for name in made.model.report.fresh if name.startswith("project.")} == {f"project.{n}" for n in state}
    save_folder(made.model, tmp_path / "folder", made.tokenizer, recipe)
    again = load(tmp_path / "folder", device="cpu")
    assert all(torch.equal(again.model.project.state_dict()[name], weight) for name, weight in state.items())


def test_weights_of_another_projection_are_named(tmp_path):
    lisa = tiny("lisa")
    save_folder(lisa.model, tmp_path / "folder", lisa.tokenizer, lisa.recipe)
    for fields, message in (
        ({"text_projection": "norm_mlp"}, "missing: project.1.weight.*unexpected: .*project.2"),
        ({"prompts_per_token": 2}, "shapes differ"),
    ):
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "folder", model={**fields, "precision": "fp32"}, device="cpu")
