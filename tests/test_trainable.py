"""Which weights train, how LoRA starts and merges, and how the trained state is saved and restored."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from model.finetune.trainable import (
    apply_lora,
    check_frozen,
    describe,
    from_training_file,
    load_merged,
    load_trainable,
    mark_trainable,
    merge_lora,
    prepare_training,
    trainable_names,
    trainable_state,
)
from model.losses import objective
from tests.tiny_model import llava_of, sam_of, tiny_batch, tiny_model
from utils.config import LoraConfig, LossConfig, ModelConfig, TowerConfig

CONFIG = ModelConfig(lora=LoraConfig(r=2, alpha=4, dropout=0.0), gradient_checkpointing=False)


def step(model, rate: float = 0.05) -> None:
    """One plain gradient step on everything that trains."""
    batch = tiny_batch()
    objective(model(batch), batch, LossConfig()).total.backward()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.grad is not None:
                weight -= rate * weight.grad
    model.zero_grad(set_to_none=True)


def masks_of(model):
    with torch.no_grad():
        return torch.cat([mask.flatten() for mask in model(tiny_batch()).masks])


def test_what_trains():
    model = prepare_training(tiny_model(), CONFIG)
    names = trainable_names(model)
    lora = {name for name in names if ".lora_" in name}
    assert len(lora) == 2 * 2 * 2  # layers, q_proj and v_proj, A and B
    assert all(
        name.startswith("vlm.language.model.layers.") and ("q_proj" in name or "v_proj" in name) for name in lora
    )
    others = {".".join(name.split(".")[: 4 if name.startswith("vlm") else 2]) for name in names if name not in lora}
    full = {"vlm.language.model.embed_tokens", "vlm.language.lm_head.weight", "project.0", "project.2", "head.decoder"}
    assert others == full
    assert set(names) >= {f"head.decoder.{name}" for name, _ in sam_of(model).decoder.named_parameters()}
    assert model.training
    assert "lora" in describe(model)


def test_lora_leaves_other_layers_of_the_same_name_alone():
    """SAM's decoder and the vision tower have q_proj and v_proj too."""
    model = tiny_model()
    apply_lora(model, LoraConfig(r=2, target_modules=("q_proj", "v_proj", "out_proj", "gate_proj")[:2]))
    adapted = [name for name, _ in model.named_modules() if name.endswith("lora_A")]
    assert len(adapted) == 4
    assert not [name for name in adapted if not name.startswith("vlm.language.model.layers.")]


def test_scale_and_start():
    """alpha / r, and no change of the model before the first step."""
    model = tiny_model()
    before = masks_of(model)
    apply_lora(model, LoraConfig(r=8, alpha=16))
    assert torch.equal(before, masks_of(model))
    assert model.vlm.language.model.layers[0].self_attn.q_proj.scaling["default"] == 2


def test_frozen_mask_decoder():
    model = prepare_training(tiny_model(), replace(CONFIG, train_mask_decoder=False))
    assert not [name for name in trainable_names(model) if name.startswith("head.")]


def test_tower_and_mask_encoder_train_where_a_recipe_says_so():
    model = prepare_training(
        tiny_model(), replace(CONFIG, tower=TowerConfig(train=True), head_options={"train_encoder": True})
    )
    batch = tiny_batch()
    objective(model(batch), batch, LossConfig()).total.backward()
    moved = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert {"vlm.tower.embeddings.patch_embedding.weight", "head.encoder.patch_embed.projection.weight"} <= moved
    layers = len(llava_of(model).tower.encoder.layers)
    trained = {name.split(".")[4] for name in trainable_names(model) if name.startswith("vlm.tower.encoder.layers.")}
    assert trained == {str(layer) for layer in range(layers - 1)}, "what lies above the projected features does not"
    with pytest.raises(ValueError, match=r"no field in model.head_options 'train_encodr'"):
        mark_trainable(model, replace(CONFIG, head_options={"train_encodr": True}))


def test_without_lora_the_language_model_trains_in_full():
    model = tiny_model()
    apply_lora(model, LoraConfig(r=0))
    mark_trainable(model, replace(CONFIG, lora=LoraConfig(r=0)))
    names = set(trainable_names(model))
    assert {f"vlm.language.{name}" for name, _ in model.vlm.language.named_parameters()} <= names
    assert not [
        name for name in names if name.startswith(("vlm.tower", "vlm.projector", "head.encoder", "head.prompts"))
    ]


@pytest.mark.parametrize(("rank", "layers"), [(0, False), (-1, True)])
def test_without_lora_the_language_model_may_be_frozen_or_train_by_layers(rank, layers):
    """gsva.md 5.1: rank 0 freezes all but the vocabulary, a negative one trains the layers."""
    model, lora = tiny_model(), LoraConfig(r=rank)
    apply_lora(model, lora)
    mark_trainable(model, replace(CONFIG, lora=lora, train_language=False))
    language = {name for name in trainable_names(model) if name.startswith("vlm.")}
    assert {"vlm.language.model.embed_tokens.weight", "vlm.language.lm_head.weight"} <= language
    assert any(".layers." in name for name in language) == layers
    assert "vlm.language.model.norm.weight" not in language and not any(".lora_" in name for name in language)


def test_only_trained_weights_move():
    model = prepare_training(tiny_model(), CONFIG)
    before = copy.deepcopy(dict(model.named_parameters()))
    step(model)
    step(model)  # LoRA's A has no gradient while B is zero
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    trained = set(trainable_names(model))
    assert moved <= trained
    unused = {name for name in trained - moved if "head.decoder" not in name}  # other mask tokens, IoU head
    assert not unused


def test_merging_changes_names_but_not_the_model():
    model = prepare_training(tiny_model(), CONFIG)
    plain = set(tiny_model().state_dict())
    for _ in range(2):
        step(model)
    model.eval()
    before = masks_of(model)
    q_proj = model.vlm.language.model.layers[0].self_attn.q_proj.base_layer.weight.clone()
    merge_lora(model)
    assert set(model.state_dict()) == plain
    assert not torch.equal(q_proj, model.vlm.language.model.layers[0].self_attn.q_proj.weight)
    torch.testing.assert_close(masks_of(model), before, atol=1e-4, rtol=1e-4)
    merge_lora(model)


def test_trained_state_restores_a_model():
    trained = prepare_training(tiny_model(), CONFIG)
    for _ in range(2):
        step(trained)
    other = prepare_training(tiny_model(), CONFIG, seed=1)
    load_trainable(other, {name: tensor.clone() for name, tensor in trainable_state(trained).items()})
    assert torch.equal(masks_of(trained.eval()), masks_of(other.eval()))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train_vocabulary": "new_tokens"},
        {"head_options": {"encoder_lora_rank": 2}},
        {"head_options": {"encoder_lora_rank": 2, "train_encoder": True}},
        {"lora": LoraConfig(r=0)},
        {"lora": LoraConfig(r=-1)},
    ],
    ids=str,
)
def test_a_plain_model_takes_a_checkpoint_as_one_with_adapters(changes: dict):
    """Bit for bit: answering adds what training learned without making adapters first."""
    config = replace(CONFIG, **changes)
    trained, plain = tiny_model(), tiny_model()
    trained.added_ids = plain.added_ids = [37, 38]
    prepare_training(trained, config)
    with torch.no_grad():
        for weight in trainable_state(trained).values():
            weight += 0.1 * torch.rand(weight.shape, generator=torch.Generator().manual_seed(len(weight)))
    state = {name: tensor.clone() for name, tensor in trainable_state(trained).items()}
    merge_lora(trained)
    before = tiny_model().state_dict()
    load_merged(plain, state, config)
    assert plain.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in plain.state_dict().items())
    assert not all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())


def test_a_plain_model_refuses_foreign_adapters():
    state = dict(trainable_state(prepare_training(tiny_model(), CONFIG)))
    with pytest.raises(ValueError, match=r"shapes.*q_proj\.lora_A\.default\.weight"):
        load_merged(tiny_model(), state, replace(CONFIG, lora=replace(CONFIG.lora, r=3)))
    with pytest.raises(ValueError, match=r"missing: none; unexpected: .*q_proj\.lora_A\.default\.weight"):
        load_merged(tiny_model(), state, replace(CONFIG, lora=replace(CONFIG.lora, target_modules=("v_proj",))))


def test_foreign_state_is_refused():
    model = prepare_training(tiny_model(), CONFIG)
    state = dict(trainable_state(model))
    state["head.encoder.pos_embed"] = state.pop("project.0.bias")
    with pytest.raises(ValueError, match=r"missing: project\.0\.bias; unexpected: head\.encoder\.pos_embed"):
        load_trainable(model, state)
    state = dict(trainable_state(model))
    state["project.0.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"shapes.*project\.0\.bias"):
        load_trainable(model, state)


def test_whole_model_files_of_the_original_programs():
    """Names as zero_to_fp32 leaves them: the LoRA wrapper's prefix, adapters called `default`."""
    model = prepare_training(tiny_model(), CONFIG)
    wanted = trainable_state(model)
    file = {
        "base_model.model.lm_head.weight": wanted["vlm.language.lm_head.weight"],
        "base_model.model.model.text_hidden_fcs.0.0.bias": wanted["project.0.bias"],
        "base_model.model.model.layers.0.self_attn.q_proj.weight": torch.zeros(16, 16),
        "base_model.model.model.layers.1.self_attn.v_proj.lora_A.default.weight": wanted[
            "vlm.language.model.layers.1.self_attn.v_proj.lora_A.default.weight"
        ],
        "base_model.model.model.visual_model.mask_decoder.iou_token.weight": wanted["head.decoder.iou_token.weight"],
        "base_model.model.model.visual_model.image_encoder.pos_embed": torch.zeros(1),
    }
    found = from_training_file(model, file)
    assert len(found) == 4
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    assert from_training_file(model, model.state_dict()).keys() == wanted.keys()


@pytest.mark.parametrize("extra", ["k_proj.lora_A.default.weight", "q_proj.lora_magnitude_vector.default.weight"])
def test_adapters_that_a_recipe_has_not_are_never_left_out(extra):
    """A file of other target modules, or of DoRA, would merge into another model than was trained."""
    model = prepare_training(tiny_model(), CONFIG)
    name = f"base_model.model.model.layers.0.self_attn.{extra}"
    with pytest.raises(ValueError, match=rf"1 weights of adapters .* e\.g\. {name}: .*target_modules.*no DoRA"):
        from_training_file(model, {**model.state_dict(), name: torch.ones(16)})


@pytest.mark.parametrize("vocabulary", ["full", "new_tokens"])
def test_frozen_weights_of_a_training_file_are_the_bases(vocabulary):
    """Else its adapters would be merged into another base than they were trained on."""
    model = tiny_model()
    model.added_ids = [37, 38]
    prepare_training(model, replace(CONFIG, train_mask_decoder=False, train_vocabulary=vocabulary))
    names = set(trainable_names(model))
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    check_frozen(model, rounded)
    assert any(name.endswith("q_proj.base_layer.weight") for name in rounded.keys() - names)
    layer = "vlm.language.model.layers.1.mlp.up_proj.weight"
    trained = {"head.decoder.iou_token.weight": 1.02, layer: 1.02, "vlm.projector.0.weight": -1.0}
    for name, factor in trained.items():
        with pytest.raises(
            ValueError, match=rf"^1 frozen weights .* e\.g\. {name}: .*another base.*tools.convert_weights"
        ):
            check_frozen(model, {**rounded, name: factor * rounded[name]})
    check_frozen(model, {**rounded, layer: torch.zeros(3, 1, dtype=torch.uint8)})  # of 4 bits: nothing to compare


def test_unknown_target_lists_the_choices():
    with pytest.raises(ValueError, match=r"'qproj'.*did you mean 'q_proj'.*down_proj"):
        apply_lora(tiny_model(), LoraConfig(target_modules=("qproj",)))


def test_adapters_are_drawn_by_seed():
    one, same, other = (prepare_training(tiny_model(), CONFIG, seed=seed) for seed in (3, 3, 4))
    name = "vlm.language.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert torch.equal(trainable_state(one)[name], trainable_state(same)[name])
    assert not torch.equal(trainable_state(one)[name], trainable_state(other)[name])
