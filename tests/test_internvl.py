"""InternVL: the library's own states, logits and answers, packed or not, from its folders and back into them."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from data.encode import Encoder
from data.tile_view import TileView
from data.tokens import TokenSpec, load_tokenizer
from data.types import IMAGE_ID, Mask, Turn
from model.checkpoints.files import read_tensors, write_tensors
from model.checkpoints.load import build_model, load_folder
from model.checkpoints.save import save_folder, save_original
from model.finetune.trainable import prepare_training, trainable_names
from model.losses import objective
from model.seg_model import SegModel
from model.vlm import VLMS
from model.vlm.internvl import InternVL
from systems.assistant import _by_tokens
from tests.test_qwen_vl import EOS, LORA, ROWS, SHOWING, batch_of, expand, seen_by
from tests.tiny_base import GOLDEN, write_sam
from tests.tiny_internvl import SIDE, TEXTS, stock_internvl, tiny_internvl_tokenizer
from tests.tiny_qwen import IMAGE_PAD, load_backbone, segmenter
from tools.memory.__main__ import main as plan_memory
from tools.memory.released_sizes import released_architecture
from utils.config import LoraConfig, LossConfig, ModelConfig, TowerConfig

SPEC = TokenSpec(added=("[SEG]",), mask=("[SEG]",))
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


def stock_of(folder: Path, attention: str = "sdpa") -> PreTrainedModel:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    return model.eval()


def stock_inputs(vlm: Any, ids: Tensor, attention: Tensor, row_image: Tensor) -> dict[str, Tensor]:
    """What the library's class takes: the tiles of an image again for every row about it."""
    pixels, _, counts = seen_by(vlm)
    tiles = pixels.split([count // vlm.view.tile_tokens for count in counts])
    shown = [image for row, image in enumerate(row_image.tolist()) if bool((ids[row] == IMAGE_ID).any())]
    return {
        "input_ids": ids.masked_fill(ids == IMAGE_ID, IMAGE_PAD),
        "attention_mask": attention.long(),
        "pixel_values": torch.cat([tiles[image] for image in shown]),
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_states_and_logits_are_those_of_the_library(folder, attention):
    vlm, stock = load_backbone(folder, attention=attention), stock_of(folder, attention)
    pixels, geometry, counts = seen_by(vlm)
    assert len(set(counts)) == 2 and len(pixels) > 3
    ids, real, row_image = expand(ROWS, counts)
    with torch.no_grad():
        vision = vlm.encode_images(pixels, geometry)
        states = vlm(ids, real, vision, row_image).final
        inputs = stock_inputs(vlm, ids, real, row_image)
        features = stock.model.get_image_features(pixels).pooler_output
        expected = stock(**inputs)
        hidden = stock.model(**inputs).last_hidden_state
    assert torch.equal(vision.states, features.flatten(0, 1)) and vision.counts == counts
    assert torch.equal(states[real], hidden[real])
    assert torch.equal(vlm.logits(states)[real], expected.logits[real])


@pytest.mark.parametrize("most", [0, 200])
def test_packed_rows_have_the_states_of_rows(vlm, most):
    pixels, geometry, counts = seen_by(vlm)
    ids, real, row_image = expand(ROWS, counts)
    vision = vlm.encode_images(pixels, geometry)
    vlm.set_packing(False, 0)
    apart = vlm(ids, real, vision, row_image).final[real]
    shapes = []
    hook = vlm.decoder_layers[0].register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape[:2]))
    vlm.set_packing(True, most)
    packed = vlm(ids, real, vision, row_image).final[real]
    hook.remove()
    vlm.set_packing(False, 0)
    assert shapes[0][0] == (1 if most else 3) and shapes[0].numel() < ids.numel()
    torch.testing.assert_close(packed, apart, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("rows", [SHOWING, ROWS[1:4]], ids=["shared", "one each"])
def test_answers_are_those_of_the_library(folder, vlm, rows):
    """Greedy, of prompts of unequal length about images of different grids, with and without a shared prefix."""
    pixels, geometry, counts = seen_by(vlm)
    ids, real, row_image = expand([(row[:-2], image) for row, image in rows], counts, left=True)
    vision = vlm.encode_images(pixels, geometry)
    written = vlm.generate(ids, real, vision, row_image, max_new_tokens=12, eos=EOS)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": EOS, "pad_token_id": EOS}
    with torch.no_grad():
        inputs = stock_inputs(vlm, ids, real, row_image)
        expected = stock_of(folder).generate(**inputs, **options)[:, ids.shape[1] :].tolist()
    for mine, theirs in zip(written.ids, expected, strict=True):
        assert mine == theirs[: len(mine)] and (len(mine) == 12 or mine[-1] == EOS)
    assert len({tuple(row) for row in written.ids}) > 1


@pytest.mark.parametrize("checkpointed", [False, True])
def test_packed_rows_have_the_loss_and_gradients_of_rows(folder, checkpointed):
    results = []
    for packed in (False, True):
        model = segmenter(folder).double()
        model.vlm.set_packing(packed, 0)
        model.train()
        if checkpointed:
            model.vlm.checkpoint_gradients()
        batch = batch_of(model.vlm).to("cpu", torch.float64)
        losses = objective(model(batch), batch, LossConfig())
        losses.total.backward()
        grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        results.append((losses.total.detach(), grads))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-6, rtol=1e-6)
    assert results[0][1].keys() == results[1][1].keys() > {"vlm.tower.embeddings.patch_embeddings.projection.weight"}
    torch.testing.assert_close(results[1][1], results[0][1], atol=1e-6, rtol=1e-5)


TRAINED = [
    ({}, {"lora", "vocabulary"}),
    ({"train_vocabulary": "new_tokens"}, {"lora", "new_rows"}),
    ({"tower": TowerConfig(train_projector=True)}, {"lora", "vocabulary", "projector"}),
    ({"tower": TowerConfig(train=True)}, {"lora", "vocabulary", "tower"}),
    ({"lora": LoraConfig(r=0)}, {"vocabulary", "language"}),
]


@pytest.mark.parametrize(("recipe", "expected"), TRAINED)
def test_gradients_reach_what_trains_and_nothing_else(folder, recipe, expected):
    model = segmenter(folder)
    prepare_training(model, ModelConfig(**{"precision": "fp32", "lora": LORA} | recipe))
    batch = batch_of(model.vlm)
    objective(model(batch), batch, LossConfig()).total.backward()
    have = {name for name, weight in model.named_parameters() if weight.grad is not None}
    wanted = set(trainable_names(model))
    # scores of masks are in no loss, and one of the decoder's candidate masks counts
    assert have <= wanted and not [name for name in wanted - have if not name.startswith("head.")]
    assert all(bool(model.get_parameter(name).grad.isfinite().all()) for name in have)
    parts = {"lora": ".lora_", "new_rows": ".new_rows", "projector": "vlm.projector.", "tower": "vlm.tower."}
    parts |= {"vocabulary": "embed_tokens.weight", "language": "layers.0.mlp.up_proj.weight"}
    assert {part for part, key in parts.items() if any(key in name for name in have)} == expected
    mine = {name for name in have if ".lora_" in name}
    assert all(name.startswith("vlm.language.model.layers.") for name in mine)


def test_rotary_frequencies_stay_float32_whatever_the_weights_are(folder):
    vlm = load_backbone(folder)
    before = {name: buffer.clone() for name, buffer in vlm.named_buffers()}
    assert before and all("inv_freq" in name for name in before)
    vlm.bfloat16()
    assert all(torch.equal(buffer, before[name]) for name, buffer in vlm.named_buffers())


def test_a_sliding_window_switches_packing_off(tmp_path):
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    stock_internvl(**window).save_pretrained(tmp_path)
    vlm: Any = load_backbone(tmp_path).requires_grad_(False)
    vlm.set_packing(True, 0)
    pixels, geometry, counts = seen_by(vlm)
    ids, real, row_image = expand(ROWS, counts)
    with torch.no_grad():
        expected = stock_of(tmp_path).model(**stock_inputs(vlm, ids, real, row_image)).last_hidden_state
    states = vlm(ids, real, vlm.encode_images(pixels, geometry), row_image).final
    assert not vlm.packs and torch.equal(states[real], expected[real])


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
    assert ours.config.image_token_id == IMAGE_PAD and ours.config.image_seq_length == 4
    assert again.vlm.view == TileView(SIDE, 8, 1, 3)
    vlm: Any = again.vlm
    pixels, geometry, counts = seen_by(vlm)
    ids, real, row_image = expand(ROWS, counts)
    with torch.no_grad():
        mine = vlm(ids, real, vlm.encode_images(pixels, geometry), row_image).final
        theirs = ours(**stock_inputs(vlm, ids, real, row_image)).logits
    assert torch.equal(vlm.logits(mine)[real], theirs[real])


def test_the_library_reads_our_words_and_settings_of_images(finished):
    tokenizer = AutoTokenizer.from_pretrained(finished)
    assert tokenizer.get_vocab() == load_tokenizer(finished, SPEC).get_vocab()
    processor = GotOcr2ImageProcessorPil.from_pretrained(finished)
    assert (processor.crop_to_patches, processor.min_patches, processor.max_patches) == (True, 1, 3)


def test_our_folder_reads_back_equal(finished, tmp_path):
    model = read(finished)
    save_folder(model, tmp_path / "again", load_tokenizer(finished, SPEC))
    again, expected = read(tmp_path / "again"), model.state_dict()
    assert again.architecture == model.architecture and again.vlm.view == model.vlm.view
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


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


def test_there_is_no_released_layout_to_write(finished, tmp_path):
    with pytest.raises(ValueError, match=r"no common layout.*InternVLForConditionalGeneration"):
        save_original(read(finished), tmp_path / "out", load_tokenizer(finished, SPEC))


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
