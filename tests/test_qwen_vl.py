"""Qwen2.5-VL and Qwen3-VL: the library's own states, logits and answers, packed or not, from every layout on disk."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from data.patch_view import PatchView
from data.tokens import load_tokenizer
from data.types import IMAGE_ID
from model.checkpoints.files import read_tensors, write_tensors
from model.checkpoints.layouts import to_layout_names
from model.checkpoints.load import build_model, load_folder
from model.checkpoints.name_table import NameTable, under
from model.checkpoints.save import save_folder
from model.finetune.trainable import prepare_training
from model.losses import objective
from model.seg_model import SegModel
from model.vlm import VLMS
from model.vlm.decoder import rotary_positions
from model.vlm.qwen_vl import QwenVL
from tests.backbone_contract import (
    LORA,
    ROWS,
    SPEC,
    BackboneContract,
    batch_of,
    expand,
    images_shown,
    seen_by,
    stock_of,
)
from tests.records import GOLDEN as RECORDS
from tests.tiny_base import GOLDEN as LISA
from tests.tiny_base import write_sam
from tests.tiny_qwen import (
    FAMILIES,
    IMAGE_PAD,
    PIXELS,
    load_backbone,
    read_backbone,
    segmenter,
    stock_model,
)
from tests.tiny_words import tiny_qwen_tokenizer
from tools.memory.__main__ import main as plan_memory
from tools.memory.released_sizes import released_architecture
from utils.config import LoraConfig, LossConfig, ModelConfig, TowerConfig
from utils.images import read_image


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp(request.param)
    stock_model(request.param).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def vlm(folder) -> QwenVL:
    return load_backbone(folder).requires_grad_(False)


def stock_inputs(vlm: QwenVL, ids: Tensor, attention: Tensor, row_image: Tensor) -> dict[str, Tensor]:
    """What the library's class takes."""
    pixels, geometry, _ = seen_by(vlm)
    grids = torch.tensor([(1, *(side // vlm.view.patch for side in place.resized)) for place in geometry])
    parts, shown = pixels.split(grids.prod(1).tolist()), images_shown(ids, row_image)
    return {
        "input_ids": ids.masked_fill(ids == IMAGE_ID, IMAGE_PAD),
        "attention_mask": attention.long(),
        "pixel_values": torch.cat([parts[image] for image in shown]),
        "image_grid_thw": grids[shown],
        "mm_token_type_ids": (ids == IMAGE_ID).int(),
    }


class TestContract(BackboneContract):
    PATCHES = "vlm.tower.patch_embed.proj.weight"
    PARTS: ClassVar[dict[str, str]] = {
        "lora": ".lora_",
        "new_rows": ".new_rows",
        "merger": "merger",
        "blocks": ".tower.blocks.0.",
        "embed_tokens": "embed_tokens.weight",
        "lm_head": "lm_head.weight",
        "language": "layers.0.mlp.up_proj.weight",
    }

    def stock_inputs(self, vlm, ids, attention, row_image):
        return stock_inputs(vlm, ids, attention, row_image)

    def stock_features(self, stock, vlm):
        pixels, geometry, _ = seen_by(vlm)
        grids = torch.tensor([(1, *(side // vlm.view.patch for side in place.resized)) for place in geometry])
        features = stock.model.get_image_features(pixels, grids)
        return torch.cat(features.pooler_output), getattr(features, "deepstack_features", [])

    def write_windowed(self, folder):
        window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
        stock_model("qwen2_5_vl", **window).save_pretrained(folder)

    def read(self, folder):
        return read(folder)

    @pytest.mark.parametrize(
        ("recipe", "expected"),
        [
            ({}, {"lora", "embed_tokens", "lm_head"}),
            ({"train_vocabulary": "new_tokens"}, {"lora", "new_rows"}),
            ({"tower": TowerConfig(train_projector=True)}, {"lora", "embed_tokens", "lm_head", "merger"}),
            ({"tower": TowerConfig(train=True)}, {"lora", "embed_tokens", "lm_head", "blocks"}),
            ({"lora": LoraConfig(r=0), "train_language": False}, {"embed_tokens", "lm_head"}),
            ({"lora": LoraConfig(r=0)}, {"embed_tokens", "lm_head", "language"}),
        ],
    )
    def test_gradients_reach_what_trains_and_nothing_else(self, folder, recipe, expected):
        self.check_gradients(folder, recipe, expected)


def test_rows_end_to_end_keep_their_boundaries_without_a_mask(vlm, monkeypatch):
    """As flash attention would read them: the boundaries are in the text positions, the first of four axes. SDPA, which
    infers them in the same way, stands in for it."""
    pixels, geometry, counts = seen_by(vlm)
    ids, real, row_image = expand(ROWS, counts)
    vision = vlm.encode_images(pixels, geometry)
    vlm.set_packing(False, 0)
    apart = vlm(ids, real, vision, row_image).final[real]
    monkeypatch.setattr("model.vlm.decoder.MASKED", ("eager",))
    vlm.set_packing(True, 0)
    calls: list[dict[str, Any]] = []
    hook = vlm.decoder.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    packed = vlm(ids, real, vision, row_image).final[real]
    hook.remove()
    vlm.set_packing(False, 0)
    positions = calls[0]["position_ids"]
    assert calls[0]["attention_mask"] is None and positions.shape == (4, 1, int(real.sum()))
    assert positions[0, 0].tolist() == [place for row in real for place in range(int(row.sum()))]
    assert not torch.equal(positions[0], positions[2])
    torch.testing.assert_close(packed, apart, atol=5e-6, rtol=1e-5)


def test_four_bit_layers_are_those_of_the_text_model(folder):
    """QLoRA: the decoder's linears in NF4 with adapters on them; tower, mergers and output layer stay."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = segmenter(folder)
    prepare_training(model, ModelConfig(precision="fp32", lora=LORA, load_in_4bit=True))
    small = {name for name, layer in model.named_modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)}
    assert len(small) == 4 * 7  # layers, linears of each
    assert all(name.startswith("vlm.language.model.layers.") for name in small)
    model.to("cpu")  # moving the layers shrinks them
    batch = batch_of(cast(QwenVL, model.vlm))
    objective(model(batch), batch, LossConfig()).total.backward()
    have = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert "vlm.language.model.layers.0.self_attn.q_proj.lora_B.default.weight" in have


def test_flash_attention_in_the_tower_reads_where_images_and_windows_begin(vlm, monkeypatch):
    """The kernel needs a GPU; a function that reads its arguments in the same way stands in for it."""
    pixels, geometry, _ = seen_by(vlm)
    expected = vlm.encode_images(pixels, geometry)

    def varlen(module, query, key, value, attention_mask, *, cu_seq_lens_q, max_length_q, scaling, is_causal, **_):
        assert attention_mask is None and not is_causal
        sizes = cu_seq_lens_q.diff().tolist()
        assert max(sizes) == max_length_q
        parts = zip(*(part.split(sizes, dim=2) for part in (query, key, value)), strict=True)
        attended = [torch.nn.functional.scaled_dot_product_attention(*part, scale=scaling) for part in parts]
        return torch.cat(attended, dim=2).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", varlen)
    monkeypatch.setattr(vlm.tower.config, "_attn_implementation_internal", "flash_attention_2")
    vision = vlm.encode_images(pixels, geometry)
    torch.testing.assert_close(vision.states, expected.states, atol=1e-5, rtol=1e-5)


def test_compiled_layers_have_the_states_of_plain_ones(folder, vlm):
    pixels, geometry, counts = seen_by(vlm)
    ids, real, row_image = expand(ROWS, counts)
    model = segmenter(folder)
    vision = model.vlm.encode_images(pixels, geometry)
    plain = model.vlm(ids, real, vision, row_image).final
    prepare_training(model, ModelConfig(precision="fp32", lora=LoraConfig(r=0), compile="eager"))
    torch.testing.assert_close(model.vlm(ids, real, vision, row_image).final, plain, atol=1e-6, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Files


PADDING = 9  # rows of the vocabulary matrix without a token


@pytest.fixture(scope="module")
def base(folder, tmp_path_factory) -> Path:
    """As the small models of the family are: tied embeddings with padding, and tokenizer files."""
    family = json.loads((folder / "config.json").read_text())["model_type"]
    place = tmp_path_factory.mktemp("base")
    size = tiny_qwen_tokenizer(place, version=3 if family == "qwen3_vl" else 2)
    stock_model(family, tied=True, vocab_size=size + PADDING).save_pretrained(place)
    assert "lm_head.weight" not in read_tensors(place)
    return place


@pytest.fixture(scope="module")
def sam(tmp_path_factory) -> Path:
    return write_sam(tmp_path_factory.mktemp("sam") / "sam.pth", read_tensors(LISA))


@pytest.fixture(scope="module")
def finished(base, sam, tmp_path_factory) -> Path:
    """An assistant on that base with a new token, as the project writes it; its view resizes twice."""
    place = tmp_path_factory.mktemp("finished") / "ours"
    tokenizer = load_tokenizer(base, SPEC)
    config = replace(READING, version=str(base), vision_pretrained=str(sam), tower=replace(PIXELS, resize="twice"))
    save_folder(build_model(config, SPEC, tokenizer), place, tokenizer)
    return place


READING = ModelConfig(precision="fp32", vision_tower=None, head_options={"decoder_heads": 4})


def read(folder: Path) -> SegModel:
    return load_folder(folder, SPEC, load_tokenizer(folder, SPEC), config=READING)


def test_our_folder_is_the_librarys_too(base, finished):
    """A tied and padded base: rows of its tokens stay, the new token has one of padding, the output layer is apart."""
    assert {name.split(".")[0] for name in read_tensors(finished)} == {"model", "lm_head", "head", "project"}
    stock, ours, again = stock_of(base), stock_of(finished), read(finished)
    new = load_tokenizer(base, SPEC).get_vocab()["[SEG]"]
    for name, tensor in stock.state_dict().items():
        mine = ours.state_dict()[name]
        same = torch.arange(len(tensor)) != (new if name.endswith(("embed_tokens.weight", "lm_head.weight")) else -1)
        assert torch.equal(tensor[same], mine[same]), name
    head, embedding = ours.lm_head.weight, ours.get_input_embeddings().weight
    assert not torch.equal(head[new], embedding[new]) and torch.equal(head[:new], embedding[:new])
    assert again.vlm.view == replace(read_backbone(base)[1], resize="twice")


def test_the_view_is_known_without_weights(finished, tmp_path):
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(finished / name, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    kind = VLMS[values["model_type"]]
    assert kind.view_of(values, ModelConfig(version=str(tmp_path))) == read(finished).vlm.view
    assert kind.view_of(values, ModelConfig(version=str(tmp_path), tower=PIXELS)).resize == "twice"


def write_layout(source: Path, target: Path, names: list[tuple[str, str]], config: dict[str, Any]) -> Path:
    """The weights of a folder under other names: pairs of theirs and ours."""
    tensors = {f"vlm.{name}": tensor for name, tensor in load_backbone(source).state_dict().items()}
    write_tensors(to_layout_names(tensors, NameTable(names)), target)
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_older_names_and_flat_sizes_are_read(folder, vlm, tmp_path):
    """The files of transformers before 4.52, whose config.json has the text sizes at its top, and Sa2VA's wrapper."""
    values = json.loads((folder / "config.json").read_text())
    text = dict(values["text_config"])
    rope = dict(text.pop("rope_parameters"))
    theta = rope.pop("rope_theta")
    text |= {"rope_theta": theta, "rope_scaling": {**rope, "type": "mrope"}}
    text.pop("layer_types", None)
    flat = {**text, **{key: values[key] for key in values if key not in ("text_config", "model_type")}}
    flat["model_type"] = values["model_type"]
    old = [
        ("visual.*", "vlm.tower.*"),
        ("model.*", "vlm.language.model.*"),
        ("lm_head.*", "vlm.language.lm_head.*"),
    ]
    today = type(vlm).FOLDER_NAMES
    wrapped = {**values, "model_type": "sa2va_chat", "text_config": {**text, "model_type": "any"}}
    folders = [
        write_layout(folder, tmp_path / "old", old, flat),
        write_layout(folder, tmp_path / "both", old, {**flat, "hidden_size": 7, "text_config": text}),
        write_layout(folder, tmp_path / "wrapped", under(today, "model.", ""), wrapped),
        write_layout(folder, tmp_path / "today", today, values),
    ]
    pixels, geometry, counts = seen_by(vlm)
    ids, real, row_image = expand(ROWS, counts)
    expected = vlm(ids, real, vlm.encode_images(pixels, geometry), row_image).final
    for other in folders:
        again = load_backbone(other).requires_grad_(False)
        assert type(again) is type(vlm)
        assert torch.equal(again(ids, real, again.encode_images(pixels, geometry), row_image).final, expected)


def test_rotations_are_scaled_as_the_file_says(folder, tmp_path):
    values = json.loads((folder / "config.json").read_text())
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    values["text_config"]["rope_parameters"] |= scaled
    other = write_layout(folder, tmp_path / "yarn", QwenVL.FOLDER_NAMES, values)
    vlm, stock = load_backbone(other), stock_of(other)
    pixels, geometry, counts = seen_by(vlm)
    ids, real, row_image = expand(ROWS, counts)
    with torch.no_grad():
        states = vlm(ids, real, vlm.encode_images(pixels, geometry), row_image).final
        expected = stock.model(**stock_inputs(vlm, ids, real, row_image)).last_hidden_state
        plain = load_backbone(folder)(ids, real, vlm.encode_images(pixels, geometry), row_image).final
    assert torch.equal(states[real], expected[real]) and not torch.equal(states, plain)


BAD: list[tuple[str, str, Any, str]] = [
    ("text_config", "num_hidden_layers", 10**6, "(?s:.*)num_hidden_layers.*1000000"),
    ("vision_config", "depth", 10**6, r"vision_config\.depth is 1000000; the weights there have"),
    ("text_config", "hidden_size", 10**9, r"text_config\.hidden_size is 1000000000"),
    ("vision_config", "out_hidden_size", 16, r"vision_config\.out_hidden_size 16 is not text_config\.hidden_size 32"),
    ("vision_config", "patch_size", [4, 4], "patch_size must be a whole number above 0"),
    ("text_config", "rope_parameters", {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [9, 9, 9]},
     "mrope_section must be three numbers that add up to"),
    ("text_config", "rope_parameters", {"rope_type": "default", "rope_theta": 1e6}, "mrope_section must be three"),
    ("text_config", "hidden_act", "import os", "no model can be made of these sizes"),
    ("text_config", "num_attention_heads", "four", "no model can be made of these sizes"),
]  # fmt: skip


def broken(source: Path, target: Path, section: str, key: str, value: Any) -> Path:
    values = json.loads((source / "config.json").read_text())
    values[section][key] = value
    shutil.copytree(source, target)
    (target / "config.json").write_text(json.dumps(values))
    return target


@pytest.mark.parametrize(("section", "key", "value", "message"), BAD)
def test_a_hostile_config_is_refused(finished, tmp_path, section, key, value, message):
    folder = broken(finished, tmp_path / "bad", section, key, value)
    with pytest.raises(ValueError, match=rf"config\.json.*{message}"):
        read(folder)


@pytest.mark.parametrize("value", [[0] * 10**5, [-1], [0, 99], ["x"], 3], ids=["long", "-1", "99", "x", "no list"])
def test_a_hostile_list_of_layers_is_refused(finished, tmp_path, value):
    vision = json.loads((finished / "config.json").read_text())["vision_config"]
    key = next(key for key in ("fullatt_block_indexes", "deepstack_visual_indexes") if key in vision)
    folder = broken(finished, tmp_path / "bad", "vision_config", key, value)
    with pytest.raises(ValueError, match=r"config\.json"):
        read(folder)


def test_what_does_not_fit_is_refused_before_weights_are_read(base, folder, tmp_path):
    """The folders hold no weights at all."""
    spec, tokenizer = SPEC, load_tokenizer(base, SPEC)
    shutil.copy(folder / "config.json", tmp_path)
    config = ModelConfig(version=str(tmp_path), precision="fp32")
    with pytest.raises(ValueError, match=r"the mask head 'pixel' decodes.*model\.mask_head from.*sam"):
        build_model(replace(config, mask_head="pixel"), spec, tokenizer)
    with pytest.raises(ValueError, match=r"model\.tower\.pool: the backbone 'qwen.*max_pixels, min_pixels"):
        build_model(replace(config, tower=TowerConfig(pool=2)), spec, tokenizer)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(ValueError, match=r"model\.tower\.max_pixels: the backbone 'llava' has no such setting"):
        build_model(replace(config, tower=TowerConfig(max_pixels=9)), spec, tokenizer)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_audio"}))
    with pytest.raises(ValueError, match=r"no vision-language model 'qwen2_audio'.*llava, .*qwen2_5_vl, qwen3_vl"):
        build_model(config, spec, tokenizer)


RELEASED = {  # weights of the released files; small ones hold no output layer of their own
    "Qwen2.5-VL-3B": 3_754_622_976,
    "Qwen2.5-VL-7B": 8_292_166_656,
    "Qwen3-VL-2B": 2_127_532_032,
    "Qwen3-VL-4B": 4_437_815_808,
    "Qwen3-VL-8B": 8_767_123_696,
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes_are_known_by_name(name):
    tower = TowerConfig(max_pixels=200_000)
    architecture, view = released_architecture(ModelConfig(version=f"Qwen/{name}-Instruct", tower=tower), "sam", SPEC)
    with torch.device("meta"):
        vlm = VLMS[architecture.vlm].build(architecture.vlm_config, view=view)
    count = sum(weight.numel() for weight in vlm.parameters())
    assert RELEASED[name] in (count, count - vlm.language.lm_head.weight.numel())
    assert cast(PatchView, vlm.view).max_pixels == 200_000


def test_memory_is_planned_from_config_json_alone(base, sam, tmp_path, capsys):
    shutil.copy(base / "config.json", tmp_path)
    recipe = tmp_path / "recipe.yaml"
    model = {"version": str(tmp_path), "vision_pretrained": str(sam), "head_options": {"decoder_heads": 4}}
    model |= {"conv_type": "qwen_chat", "tower": {"min_pixels": 384, "max_pixels": 1280}}
    recipe.write_text(json.dumps({"system": "lisa", "model": model}))
    assert plan_memory([str(recipe), "--gpus", "1", "--gpu_memory", "40"]) == 0
    assert "fits as it is" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Published assistants on these backbones: what their vision tower gave, and their positions


@pytest.mark.parametrize("name", ["sa2va_qwen2_5", "sa2va_qwen3", "unipixel"])
def test_the_vision_side_of_published_assistants(name):
    folder = RECORDS / name
    if not (folder / "golden.npz").is_file():
        pytest.skip(f"no record {name} in {RECORDS}")
    record, talks = np.load(folder / "golden.npz"), json.loads((folder / "golden.json").read_text())["conversations"]
    least, most = (128, 256) if name == "unipixel" else (512, 2048)  # tokens of 28 x 28 pixels
    limits = TowerConfig(min_pixels=least * 784, max_pixels=most * 784)
    vlm = load_backbone(folder, ModelConfig(precision="fp32", tower=limits)).requires_grad_(False)
    tokens = json.loads((folder / "golden.json").read_text())["tokens"]
    pad = tokens["<|video_pad|>" if name == "unipixel" else "<|image_pad|>"]
    for index, talk in enumerate(talks):
        image = talk["image"]
        original = read_image(folder / f"image{image}.png")
        shown = read_image(folder / f"resized{image}.png")
        place = vlm.view.geometry(*original.shape[:2])
        assert place.resized == shown.shape[:2]
        pixels = vlm.view.cut(shown)
        key = next(key for key in record.files if key.startswith(f"conv{index}_") and key.endswith("grid_thw"))
        assert record[key].tolist() == [[1, *(side // vlm.view.patch for side in place.resized)]]
        rows = record[f"conv{index}_pixel_values_rows"]
        np.testing.assert_allclose(pixels[::64], rows, atol=1e-6)
        # the published resize is torchvision's: in a few of a hundred values one of 255 levels away from Pillow's
        deviation = vlm.view.std if isinstance(vlm.view, PatchView) else ()
        levels = (vlm.view(original) - pixels).abs() * 255 * max(deviation)
        assert float(levels.max()) < 2.5 and float((levels > 0.5).float().mean()) < 0.01

        vision = vlm.encode_images(pixels, [place])
        for part, states in [
            ("rows", vision.states),
            *((f"deepstack{n}_rows", s) for n, s in enumerate(vision.deepstack)),
        ]:
            if f"visual{image}_{part}" in record:
                np.testing.assert_allclose(states[::16], record[f"visual{image}_{part}"], atol=5e-5)
        ids = torch.from_numpy(record[f"conv{index}_input_ids"])[None]
        ids = ids.masked_fill(ids == pad, IMAGE_ID)
        real, row_image = torch.ones_like(ids, dtype=torch.bool), torch.zeros(1, dtype=torch.long)
        positions = rotary_positions(real, vision, vision.index(ids, row_image))
        assert np.array_equal(positions[1:, 0].numpy(), record[f"conv{index}_position_ids"])
        logits = vlm.logits(vlm(ids, real, vision, row_image).final)[0, -1]
        np.testing.assert_allclose(logits.numpy(), record[f"conv{index}_logits_last"], atol=2e-4)
