"""InternVL: the library's own states, logits and answers, packed or not, from its folders and back into them."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoTokenizer
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from data.encode import Encoder
from data.tile_view import TileView
from data.tokens import load_tokenizer
from data.types import IMAGE_ID, Mask, Turn
from model.checkpoints.files import read_tensors, write_tensors
from model.checkpoints.load import build_model, load_folder
from model.checkpoints.save import save_folder
from model.seg_model import SegModel
from model.vlm import VLMS
from model.vlm.internvl import InternVL
from systems.assistant import _by_tokens
from tests.backbone_contract import SIZES, SPEC, BackboneContract, images_shown, seen_by, stock_of
from tests.tiny_base import GOLDEN, write_sam
from tests.tiny_internvl import SIDE, TEXTS, stock_internvl, tiny_internvl_tokenizer
from tests.tiny_qwen import IMAGE_PAD, load_backbone
from tools.memory.__main__ import main as plan_memory
from tools.memory.released_sizes import released_architecture
from utils.config import LoraConfig, ModelConfig, TowerConfig

READING = ModelConfig(
    precision="fp32",
    vision_tower=None,
    head_options={"decoder_heads": 4},
    tower=TowerConfig(max_pixels=3 * SIDE**2),
)


@pytest.fixture(scope="module", params=TEXTS)
def folder(request, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp(request.param)
    stock_internvl(request.param).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def vlm(folder) -> Any:
    return load_backbone(folder).requires_grad_(False)


class TestContract(BackboneContract):
    PATCHES = "vlm.tower.embeddings.patch_embeddings.projection.weight"
    PARTS: ClassVar[dict[str, str]] = {
        "lora": ".lora_",
        "new_rows": ".new_rows",
        "projector": "vlm.projector.",
        "tower": "vlm.tower.",
        "vocabulary": "embed_tokens.weight",
        "language": "layers.0.mlp.up_proj.weight",
    }

    def stock_inputs(self, vlm, ids, attention, row_image):
        pixels, _, counts = seen_by(vlm)
        tiles = pixels.split([count // vlm.view.tile_tokens for count in counts])
        return {
            "input_ids": ids.masked_fill(ids == IMAGE_ID, IMAGE_PAD),
            "attention_mask": attention.long(),
            "pixel_values": torch.cat([tiles[image] for image in images_shown(ids, row_image)]),
        }

    def stock_features(self, stock, vlm):
        pixels, _, _ = seen_by(vlm)
        assert len(pixels) > len(SIZES)  # an image has several tiles
        return stock.model.get_image_features(pixels).pooler_output.flatten(0, 1), []

    def write_windowed(self, folder):
        stock_internvl(use_sliding_window=True, sliding_window=8, max_window_layers=2).save_pretrained(folder)

    def read(self, folder):
        return read(folder)

    @pytest.mark.parametrize(
        ("recipe", "expected"),
        [
            ({}, {"lora", "vocabulary"}),
            ({"train_vocabulary": "new_tokens"}, {"lora", "new_rows"}),
            ({"tower": TowerConfig(train_projector=True)}, {"lora", "vocabulary", "projector"}),
            ({"tower": TowerConfig(train=True)}, {"lora", "vocabulary", "tower"}),
            ({"lora": LoraConfig(r=0)}, {"vocabulary", "language"}),
        ],
    )
    def test_gradients_reach_what_trains_and_nothing_else(self, folder, recipe, expected):
        self.check_gradients(folder, recipe, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.fixture(scope="module", params=[False, True], ids=["as released", "tied and padded"])
def base(request, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("base")
    size = tiny_internvl_tokenizer(place)
    stock_internvl(tied=request.param, vocab_size=size + 9 * request.param).save_pretrained(place)
    assert ("language_model.lm_head.weight" in read_tensors(place)) != request.param
    return place


@pytest.fixture(scope="module")
def sam(tmp_path_factory) -> Path:
    return write_sam(tmp_path_factory.mktemp("sam") / "sam.pth", read_tensors(GOLDEN))


@pytest.fixture(scope="module")
def finished(base, sam, tmp_path_factory) -> Path:
    """An assistant on that base with a new token, as the project writes it."""
    place = tmp_path_factory.mktemp("finished") / "ours"
    tokenizer = load_tokenizer(base, SPEC)
    config = replace(READING, version=str(base), vision_pretrained=str(sam))
    save_folder(build_model(config, SPEC, tokenizer), place, tokenizer)
    return place


def read(folder: Path) -> SegModel:
    plain = replace(READING, tower=TowerConfig())  # what the folder says
    return load_folder(folder, SPEC, load_tokenizer(folder, SPEC), config=plain)


def test_our_folder_is_the_librarys_too(base, finished):
    assert {name.split(".")[0] for name in read_tensors(finished)} == {
        *("vision_tower", "multi_modal_projector", "language_model"),
        *("head", "project"),
    }
    stock, ours, again = stock_of(base), stock_of(finished), read(finished)
    size = load_tokenizer(base, SPEC).own_size
    for name, tensor in stock.state_dict().items():
        mine = ours.state_dict()[name]
        rows = size if name.endswith(("embed_tokens.weight", "lm_head.weight")) else len(tensor)
        assert torch.equal(tensor[:rows], mine[:rows]), name
    assert ours.config.image_seq_length == 4
    assert again.vlm.view == TileView(SIDE, 8, 1, 3)


def test_the_library_reads_our_words_and_settings_of_images(finished):
    tokenizer = AutoTokenizer.from_pretrained(finished)
    assert tokenizer.get_vocab() == load_tokenizer(finished, SPEC).get_vocab()
    processor = GotOcr2ImageProcessorPil.from_pretrained(finished)
    assert (processor.crop_to_patches, processor.min_patches, processor.max_patches) == (True, 1, 3)


def test_the_view_is_known_without_weights(finished, tmp_path):
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(finished / name, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    one = TowerConfig(max_pixels=SIDE**2)
    assert InternVL.view_of(values, ModelConfig(version=str(tmp_path))) == read(finished).vlm.view
    assert InternVL.view_of(values, ModelConfig(version=str(tmp_path), tower=one)) == TileView(SIDE, 8, 1, 1)


def test_the_names_of_the_librarys_modules_are_read(folder, vlm, tmp_path):
    write_tensors(dict(stock_of(folder).state_dict()), tmp_path)
    shutil.copy(folder / "config.json", tmp_path)
    again = load_backbone(tmp_path).state_dict()
    assert again.keys() == vlm.state_dict().keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in vlm.state_dict().items())


BAD: list[tuple[str | None, str, Any, str]] = [
    ("text_config", "num_hidden_layers", 10**6, "(?s:.*)num_hidden_layers.*1000000"),
    ("vision_config", "num_hidden_layers", 10**6, r"vision_config\.num_hidden_layers is 1000000; the weights"),
    ("text_config", "hidden_size", 10**9, r"text_config\.hidden_size is 1000000000"),
    ("vision_config", "image_size", [10**6, 10**6], "ASSISTANT_MAX_VIEW"),
    ("vision_config", "image_size", [16, 32], "image_size must be the side of a square"),
    ("vision_config", "patch_size", "4", "patch_size must be a whole number above 0"),
    ("vision_config", "patch_size", 3, "image_size 16 does not divide into tokens of 6 pixels"),
    ("vision_config", "hidden_act", "import os", "no model can be made of these sizes"),
    ("text_config", "num_attention_heads", "four", "no model can be made of these sizes"),
    ("text_config", "model_type", "llama", "no text_config.model_type of an InternVL 'llama'.*qwen2, qwen3"),
    (None, "downsample_ratio", 0.25, r"downsample_ratio 0\.25 is not supported, only 0\.5"),
    (None, "vision_feature_layer", -2, "vision_feature_layer -2 is not supported"),
]


@pytest.mark.parametrize(("section", "key", "value", "message"), BAD)
def test_a_hostile_config_is_refused(finished, tmp_path, section, key, value, message):
    shutil.copytree(finished, tmp_path / "bad")
    (tmp_path / "bad" / "preprocessor_config.json").unlink()
    values = json.loads((finished / "config.json").read_text())
    (values[section] if section else values)[key] = value
    (tmp_path / "bad" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "bad")


def test_what_does_not_fit_is_refused_before_weights_are_read(base, folder, tmp_path):
    tokenizer = load_tokenizer(base, SPEC)
    shutil.copy(folder / "config.json", tmp_path)
    config = ModelConfig(version=str(tmp_path), precision="fp32")
    with pytest.raises(ValueError, match=r"the mask head 'pixel' decodes.*model\.mask_head from.*sam"):
        build_model(replace(config, mask_head="pixel"), SPEC, tokenizer)
    with pytest.raises(ValueError, match=r"model\.tower\.resize: the backbone 'internvl'.*max_pixels, min_pixels"):
        build_model(replace(config, tower=TowerConfig(resize="twice")), SPEC, tokenizer)


# ---------------------------------------------------------------------------------------------------------------------
# Words


def test_the_image_stands_in_its_own_wrap(base):
    tokenizer = load_tokenizer(base, SPEC)
    assert tokenizer.family.name == "InternVL" and _by_tokens(base) == []
    row = Encoder(tokenizer, SPEC).encode((Turn("<image>\nWhere is the car?", ("It is ", Mask(0), ".")),))
    first, second = row.ids[: row.ids.index(IMAGE_ID)], row.ids[row.ids.index(IMAGE_ID) + 1 :]
    assert tokenizer.decode(first) == "<|im_start|>user\n<img>"
    assert tokenizer.decode(second) == (
        "</img>\nWhere is the car?<|im_end|>\n<|im_start|>assistant\nIt is [SEG].<|im_end|>\n"
    )
    assert pickle.loads(pickle.dumps(tokenizer)).family == tokenizer.family
    with pytest.raises(ValueError, match="may not be typed"):
        Encoder(tokenizer, SPEC).encode((Turn("<image>\nWhere is <IMG_CONTEXT>?", ("There.",)),))


def test_a_vocabulary_without_its_tokens_is_refused(tmp_path):
    tiny_internvl_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text.replace("<IMG_CONTEXT>", "<IMG_OTHER>"), encoding="utf-8")
    with pytest.raises(ValueError, match="without <IMG_CONTEXT>; of these only those of InternVL"):
        load_tokenizer(tmp_path, SPEC)


# ---------------------------------------------------------------------------------------------------------------------
# Planning


@pytest.mark.parametrize(("name", "billions"), [("1B", 0.938), ("2B", 2.089), ("8B", 7.944)])
def test_released_sizes_are_known_by_name(name, billions):
    """As the cards of the weights give them; new tokens have rows of their own."""
    tower = TowerConfig(max_pixels=4 * 448**2)
    config = ModelConfig(version=f"OpenGVLab/InternVL3-{name}-hf", tower=tower)
    architecture, view = released_architecture(config, "sam2", SPEC)
    with torch.device("meta"):
        vlm = VLMS[architecture.vlm].build(architecture.vlm_config, view=view)
    assert round(sum(weight.numel() for weight in vlm.parameters()) / 1e9, 3) == billions
    assert vlm.view == TileView(448, 28, 1, 4) and vlm.view.most_tokens == 5 * 256


def test_memory_is_planned_from_config_json_alone(base, sam, tmp_path, capsys):
    shutil.copy(base / "config.json", tmp_path)
    recipe = tmp_path / "recipe.yaml"
    model = {"version": str(tmp_path), "vision_pretrained": str(sam), "head_options": {"decoder_heads": 4}}
    model |= {"conv_type": "qwen_chat", "tower": {"max_pixels": 3 * SIDE**2}}
    recipe.write_text(json.dumps({"system": "lisa", "model": model}))
    assert plan_memory([str(recipe), "--gpus", "1", "--gpu_memory", "40"]) == 0
    assert "fits as it is" in capsys.readouterr().out
