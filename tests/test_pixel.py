"""The mask head without SAM: fusion, levels, generation on padded images, new heads, layouts, published shapes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from data.collate import collate_prompts, load_views
from data.tokens import TokenSpec, load_tokenizer, mask_ids
from data.types import IMAGE_ID
from model.checkpoints.architecture import Architecture
from model.checkpoints.files import read_tensors, write_tensors
from model.checkpoints.layouts import published_table
from model.checkpoints.load import assemble, build_model, load_folder, views_for
from model.checkpoints.save import save_folder, save_original
from model.finetune.trainable import from_training_file, load_frozen_head, mark_trainable, trainable_names
from model.heads import HEADS, HeadContext
from model.heads.doubling import to_cells
from model.heads.pixel import PixelHead
from model.seg_model import SegModel
from model.vlm.towers.clip import ClipTower
from systems.assistant import load
from tests.records import OWN
from utils.config import ModelConfig, TowerConfig

GOLDEN = OWN / "pixellm"
SPEC = TokenSpec(added=tuple(f"[SEG{i}]" for i in range(6)), mask=tuple(f"[SEG{i}]" for i in range(6)))
CONFIG = ModelConfig(vision_tower=None, precision="fp32", head_options={"decoder_heads": 4})
PUBLISHED_TOWER = TowerConfig(size=448, pad=True, pool=2, new_projector=True, train_projector=True)
SMALL = {"decoder_heads": 4, "width": 32, "mlp_dim": 64}
POSITIONS = "embeddings.position_embedding.weight"
PIECES = 600  # of the golden tokenizer, without added tokens
PARTS = ("out_mm_projector", "prompt_encoder", "mask_decoder", "image_feature_neck", "text_hidden_fcs")


def pixel_of(model: SegModel) -> PixelHead:
    """The mask head, as its own class."""
    return cast(PixelHead, model.head)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def published():
    return {name: tensor.float() for name, tensor in read_tensors(GOLDEN).items()}


@pytest.fixture(scope="module")
def assistant():
    return load(GOLDEN, model={"head_options": {"decoder_heads": 4}, "model_max_length": 0}, device="cpu")


@pytest.fixture
def base(published, tmp_path) -> Path:
    """What PixelLM starts from: a LLaVA with a linear projector, next to it a tower of 336 pixels; no mask head."""
    folder = tmp_path / "llava"
    drop = (*(f"model.{part}." for part in PARTS), "model.vision_tower.", "model.mm_projector.")
    tensors = {name: tensor for name, tensor in published.items() if not name.startswith(drop)}
    tensors |= {name: tensors[name][:PIECES] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    tensors |= {"model.mm_projector.weight": torch.zeros(48, 32), "model.mm_projector.bias": torch.zeros(48)}
    write_tensors(tensors, folder)
    values = json.loads((GOLDEN / "config.json").read_text())
    kept = {key: value for key, value in values.items() if not key.startswith(("resize", "pad_train", "train_mask"))}
    (folder / "config.json").write_text(json.dumps(kept | {"architectures": ["LlavaLlamaForCausalLM"]}))
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(GOLDEN / name, folder / name)
    shutil.copytree(GOLDEN / "clip", folder / "clip")
    return folder


def build(folder: Path, **changes):
    changes = {"tower": PUBLISHED_TOWER, "head_options": SMALL, **changes}
    config = replace(CONFIG, version=str(folder), **changes)
    return build_model(config, SPEC, load_tokenizer(folder, SPEC), "pixel")


def test_equal_tokens_fuse_to_one_half(assistant):
    """pixellm.md 0: the constant is 1/6, so a level's three equal tokens give half of one."""
    vector = torch.randn(2, 1, 32)
    fused = assistant.model.head.fuse_levels(vector.expand(-1, 6, -1))
    torch.testing.assert_close(fused, 0.5 * vector.expand(-1, 2, -1))
    one = torch.zeros(1, 6, 1, dtype=torch.bfloat16)
    one[0, 0] = 1
    assert assistant.model.head.fuse_levels(one)[0, :, 0].tolist() == [0.1669921875, 0.0]


@pytest.mark.parametrize("number", [3, 0])
def test_sizes_double_level_by_level(assistant, number):
    head = assistant.model.head
    features, decoder = [torch.randn(1, 32, 32, 32), torch.randn(1, 32, 64, 64)], head.decoder
    prompts, image = torch.randn(number, 32), torch.zeros(number, dtype=torch.long)
    cells = [to_cells(level)[image] for level in features]
    positions = [torch.zeros(1, 32**2, 32), torch.zeros(1, 64**2, 32)]
    dense = torch.zeros(32)
    with torch.no_grad():
        first = decoder(0, cells[0], positions[0], (32, 32), dense, prompts, None)
        second = decoder(1, cells[1], positions[1], (64, 64), dense, prompts, first)
        whole = head._low_resolution(features, torch.randn(number, 6, 32), image)
    assert first.shape == (number, 64, 64) and second.shape == whole.shape == (number, 128, 128)


def write_eagerly(assistant, batch):
    """The model's answer with every mask token forced upon it in turn."""
    model, wanted = assistant.model, mask_ids(assistant.tokenizer, assistant.system.tokens)
    steps = iter([7, *wanted, 9, *wanted[:3], *wanted, 2])
    logits = model.vlm.logits

    def force(states):
        found = torch.full_like(logits(states), -1.0)
        found[..., next(steps)] = 1.0
        return found

    model.vlm.logits = force
    try:
        (answer,) = model.generate(batch, max_new_tokens=32, mask_ids=wanted, eos=2)
    finally:
        del model.vlm.logits
    return answer


def test_cached_masks_equal_teacher_forced_ones_on_a_padded_image(assistant):
    """The image mask stays in force, and positions count on, in every cached step (pixellm.md 1.5)."""
    model = assistant.model
    sample, prompt = (
        load_views(GOLDEN / "image0.png", assistant.views),
        assistant.encoder.prompt("<image>\nWhat is it?"),
    )
    assert sample.geometry.resized == (358, 448)
    answer = write_eagerly(assistant, collate_prompts([sample], [[prompt]]))
    assert len(answer.masks) == 2, "a broken group is no mask"
    batch = collate_prompts([sample], [[prompt + answer.ids]])
    first = batch.ids.shape[1] - len(answer.ids) - 1  # the state that predicts the first new token
    starts = torch.tensor([first + 1, first + 1 + 6 + 1 + 3])
    batch.mask_rows, batch.mask_positions = torch.zeros(2, dtype=torch.long), starts[:, None] + torch.arange(6)
    with torch.no_grad():
        forced = model(batch).masks[0]
    assert torch.equal(batch.ids[0, starts + 1], torch.full((2,), mask_ids(assistant.tokenizer, SPEC)[0]))
    torch.testing.assert_close(answer.masks, forced, atol=1e-4, rtol=1e-4)


def test_padding_reaches_no_word(assistant):
    """What stands deep in the padding changes no other state of the tower, and none of the language model's text."""
    model = assistant.model
    sample = load_views(GOLDEN / "image0.png", assistant.views)
    batch = model.normalised(collate_prompts([sample], [[assistant.encoder.prompt("<image>\nWhat is it?")]]))
    changed = batch.pixels.clone()
    changed[:, :, 14 * 27 :] = 5.0  # 358 rows of image: 26 rows of patches, 13 of tokens
    hidden = []
    with torch.no_grad():
        for pixels in (batch.pixels, changed):
            vision = model.vlm.encode_images(pixels, batch.geometry)
            assert vision.attention.sum() == 13 * 16
            hidden.append(
                (
                    vision.layers[-2],
                    model.vlm(batch.ids, batch.attention, vision, batch.row_image).final,
                )
            )
    (patches, words), (patches_changed, words_changed) = hidden
    visible, padding = 26 * 32, 27 * 32
    torch.testing.assert_close(patches[:, :visible], patches_changed[:, :visible])
    assert (patches[:, padding:] - patches_changed[:, padding:]).abs().max() > 1e-3
    is_text = batch.ids[0] != IMAGE_ID
    torch.testing.assert_close(words[0, is_text], words_changed[0, is_text])


def test_a_new_head_needs_no_file(base):
    model = build(base)
    tower = read_tensors(base / "clip")
    (name,) = [name for name in tower if name.endswith(POSITIONS)]
    expected = ClipTower.resize_positions(tower[name], 32, "released")
    assert torch.equal(model.vlm.tower.state_dict()[POSITIONS], expected)
    correct = build(base, tower=replace(PUBLISHED_TOWER, position_resize="correct"))
    assert torch.equal(
        correct.vlm.tower.state_dict()[POSITIONS], ClipTower.resize_positions(tower[name], 32, "correct")
    )
    fresh = {name.split(".")[0] if not name.startswith("vlm") else "vlm.projector" for name in model.report.fresh}
    assert fresh == {"head", "project", "vlm.projector"} and not model.report.missing
    assert model.vlm.projector[0].weight.shape == (96, 32) and model.head.projector[0].weight.shape == (96, 32)
    for projector in (model.vlm.projector, model.head.projector):
        assert 0.01 < projector[2].weight.std() < 0.03 and not projector[0].bias.any()
    assert 0.5 < model.head.prompts.shared_embedding.positional_embedding.std() < 1.5
    assert views_for(model).seg is None and model.vlm.view.most_tokens == 256
    again = build(base)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("released", [True, False])
def test_what_trains(base, released):
    """pixellm.md 5.3; better: the neck, what stands for no mask, and the weights of the fusion too."""
    head = {**SMALL, "train_neck": not released, "fusion": "released" if released else "trained"}
    config = replace(CONFIG, tower=PUBLISHED_TOWER, head_options=head)
    model = build(base, head_options=head)
    mark_trainable(model, replace(config, lora=replace(config.lora, r=0), train_language=False))
    trained = set(trainable_names(model))
    parts = {".".join(name.split(".")[:2]) for name in trained if not name.startswith("vlm.language")}
    always = {"head.decoder", "head.projector", "vlm.projector", "project.0", "project.2"}
    assert parts == always | (set() if released else {"head.neck", "head.prompts", "head.fusion", "head.balance"})
    assert not any("positional_embedding" in name for name in trained)
    if not released:
        assert {name for name in trained if "prompts" in name} == {"head.prompts.no_mask_embed.weight"}
        torch.testing.assert_close(model.head.fusion, torch.full((2, 3), 1 / 6))
        torch.testing.assert_close(model.head.balance, torch.full((2,), 0.5))


def test_trained_fusion_starts_as_released_and_can_be_chosen_later(assistant, published):
    tokenizer = load_tokenizer(GOLDEN, SPEC)
    later = load_folder(
        GOLDEN, SPEC, tokenizer, "pixel", replace(CONFIG, head_options={"fusion": "trained", "decoder_heads": 4})
    )
    assert set(later.report.fresh) == {"head.fusion", "head.balance"}
    features, queries = [torch.randn(1, 32, 32, 32), torch.randn(1, 32, 64, 64)], torch.randn(2, 6, 32)
    image = torch.zeros(2, dtype=torch.long)
    with torch.no_grad():
        expected = pixel_of(assistant.model)._low_resolution(features, queries, image)
        logits = pixel_of(later)._low_resolution(features, queries, image)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_own_folder_gives_the_same_model(assistant, tmp_path):
    save_folder(assistant.model, tmp_path / "own", assistant.tokenizer, assistant.recipe)
    found = load(tmp_path / "own", device="cpu")
    assert found.system.name == "pixellm" and found.views == assistant.views
    assert found.model.architecture.head_config == assistant.model.architecture.head_config
    state = assistant.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in found.model.state_dict().items())
    assert found.model.vlm.pool == 2 and found.model.head.levels == (-2, -11)


def test_published_layout_is_written_back(assistant, published, tmp_path):
    save_original(assistant.model, tmp_path / "original", assistant.tokenizer, "PixelLMForCausalLM")
    written = torch.load(tmp_path / "original" / "pytorch_model.bin", weights_only=True)
    expected = {name for name in published if "vision_tower" not in name and "inv_freq" not in name}
    assert set(written) == expected and all(torch.equal(written[name], published[name]) for name in expected)
    values = json.loads((tmp_path / "original" / "config.json").read_text())
    assert values["resize_vision_tower_size"] == 448 and values["pad_train_clip_images"]
    found = load(tmp_path / "original", model={"head_options": {"decoder_heads": 4}}, device="cpu")
    state = assistant.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in found.model.state_dict().items())


def test_a_training_file_brings_the_frozen_part_of_the_head(base, published):
    """As released neck, prompt encoder and Fourier tables are initialised and never trained: only the file has them."""
    head = {**SMALL, "train_neck": False}
    model = build(base, head_options=head)
    config = replace(
        CONFIG, tower=PUBLISHED_TOWER, head_options=head, lora=replace(CONFIG.lora, r=0), train_language=False
    )
    mark_trainable(model, config)
    file = {f"base_model.model.{name}": tensor for name, tensor in published.items()}
    assert from_training_file(model, file).keys() == set(trainable_names(model))
    load_frozen_head(model, file, config.head_options)
    for ours, theirs in (
        ("neck.0.weight", "image_feature_neck.0.weight"),
        ("fine_positions.positional_embedding", "mask_decoder.pe1.positional_encoding_gaussian_matrix"),
        ("prompts.no_mask_embed.weight", "prompt_encoder.no_mask_embed.weight"),
    ):
        assert torch.equal(model.head.state_dict()[ours], published[f"model.{theirs}"])


def test_whole_training_file_over_a_base(base, published, assistant, tmp_path):
    """--weight: the only way in which the released program scores right (pixellm.md 0, 5.1)."""
    file = tmp_path / "pytorch_model.bin"
    torch.save({f"base_model.model.{name}": tensor for name, tensor in published.items()}, file)
    model = build(base, checkpoint_file=str(file), head_options={"decoder_heads": 4})
    state = assistant.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_wrong_choices_are_refused(base):
    for changes, message in (
        ({"tower": replace(PUBLISHED_TOWER, pad=False)}, r"must show the whole image.*pad_train_clip_images"),
        ({"head_options": {"fusion": "mean"}}, r"no model\.head_options\.fusion 'mean'.*trained"),
        ({"head_options": {"neck": 1}}, r"no field in model\.head_options 'neck'.*train_neck"),
        ({"head_options": {"levels": [-2, -30]}}, r"levels.*13 layers"),
        ({"head_options": {"levels": [-2, -3, -4]}}, "must be 1 or 2"),
        ({"head_options": {"width": 36, "decoder_heads": 4}}, r"decoder_heads=4 does not divide"),
    ):
        with pytest.raises(ValueError, match=message):
            build(base, **changes)


@pytest.mark.parametrize(("width", "inner", "layers", "heads"), [(4096, 11008, 32, 32), (5120, 13824, 40, 40)])
def test_published_names_and_shapes(width, inner, layers, heads):
    """The 241 weights of the published checkpoints in addition to LLaMA's (pixellm.md 7.3), without their memory."""
    language = {"vocab_size": 32009, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = HEADS["pixel"].config_for({}, {}, HeadContext(1024, 24, width, 6))
    vlm_config = {
        "language": language | {"num_attention_heads": heads},
        "tower": tower | {"image_size": 448, "patch_size": 14},
        "projector_depth": 2,
        "projector_width": 2 * width,
        "tower_input": {"pool": 2},
    }
    plan = Architecture("llava", vlm_config, "pixel", config)
    with torch.device("meta"):
        model = assemble(plan)
    table = published_table(model.vlm.published_names(vlm_config), HEADS["pixel"].WEIGHT_NAMES)
    shapes = {str(table.to_layout(name)): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    language_names = {name for name in shapes if name.startswith(("model.layers.", "model.norm."))}
    own = {n: s for n, s in shapes.items() if n not in language_names and "vision_tower" not in n}
    assert len(language_names) == 9 * layers + 1
    assert len(own) - len(("embed_tokens", "lm_head")) == 241
    parts = {part: sum(np.prod(s) for n, s in own.items() if n.startswith(f"model.{part}.")) for part in PARTS}
    assert parts["mask_decoder"] == 7571940 + 256  # with the Fourier table, which the sheet counts apart
    assert parts["image_feature_neck"] == {4096: 1639424, 5120: 1901568}[width]
    assert parts["out_mm_projector"] == {4096: 41955328, 5120: 62929920}[width]
    assert parts["text_hidden_fcs"] == {4096: 17830144, 5120: 27530496}[width]
    for name, shape in {
        "mm_projector.0.weight": (2 * width, 1024),
        "mm_projector.2.weight": (width, 2 * width),
        "image_feature_neck.0.weight": (256, width, 1, 1),
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": (2, 128),
        "mask_decoder.pe1.positional_encoding_gaussian_matrix": (2, 128),
        "mask_decoder.transformer.1.layers.1.cross_attn_image_to_token.q_proj.weight": (128, 256),
        "mask_decoder.transformer.0.layers.0.mlp.lin1.weight": (2048, 256),
        "mask_decoder.output_upscaling.0.weight": (256, 32, 2, 2),
        "mask_decoder.upsample_2x.0.weight": (256, 256, 2, 2),
        "mask_decoder.level_embed.weight": (2, 256),
        "mask_decoder.output_hypernetworks_mlps.3.layers.2.weight": (32, 256),
        "mask_decoder.iou_prediction_head.layers.2.weight": (4, 256),
    }.items():
        assert own[f"model.{name}"] == shape, name
    assert model.vlm.view.most_tokens == 256
