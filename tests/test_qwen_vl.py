"""Qwen2.5-VL and Qwen3-VL: the library's own states, logits and answers, packed or not, from every layout on disk."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from data.patch_view import PatchView
from data.tokens import TokenSpec, load_tokenizer
from data.types import IGNORE_ID, IMAGE_ID, Batch, Geometry
from data.views import read_image
from model.checkpoints.files import read_tensors, write_tensors
from model.checkpoints.layouts import to_layout_names
from model.checkpoints.load import build_model, load_folder
from model.checkpoints.name_table import NameTable, under
from model.checkpoints.save import save_folder, save_original
from model.finetune.trainable import prepare_training, trainable_names
from model.losses import objective
from model.seg_model import SegModel
from model.vlm import VLMS
from model.vlm.decoder import rotary_positions
from model.vlm.prefix_packing import can_pack
from model.vlm.qwen_vl import QwenVL
from tests.records import GOLDEN as RECORDS
from tests.tiny_base import GOLDEN as LISA
from tests.tiny_base import write_sam
from tests.tiny_qwen import (
    EOS,
    FAMILIES,
    IMAGE_PAD,
    PIXELS,
    SEG,
    load_backbone,
    read_backbone,
    segmenter,
    stock_model,
)
from tests.tiny_words import tiny_qwen_tokenizer
from tools.memory.__main__ import main as plan_memory
from tools.memory.released_sizes import released_architecture
from utils.config import LoraConfig, LossConfig, ModelConfig, TowerConfig

SIZES = [(30, 41), (50, 20), (26, 26)]  # of the images
ROWS = [  # several rows about the first image; the others have grids of their own, and a row that does not show one
    ([5, 52, IMAGE_ID, 53, 6, 7, SEG, 9, EOS], 0),
    ([5, 52, IMAGE_ID, 53, 6, 11, SEG, EOS], 0),
    ([5, 52, IMAGE_ID, 53, 14, 15, SEG, 12, 13, EOS], 1),
    ([52, IMAGE_ID, 53, 20, SEG, EOS], 2),
    ([5, 8, 9], 2),
]
SHOWING = ROWS[:4]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp(request.param)
    stock_model(request.param).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def vlm(folder) -> QwenVL:
    return load_backbone(folder).requires_grad_(False)


def stock_of(folder: Path, attention: str = "sdpa") -> PreTrainedModel:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    return model.eval()


def seen_by(vlm: QwenVL) -> tuple[Tensor, list[Geometry], list[int]]:
    """The patches of the images end to end, where they lie, and their tokens."""
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
    pixels = torch.cat([vlm.view(image) for image in images])
    return pixels, [vlm.view.geometry(*size) for size in SIZES], [vlm.view.tokens(*size) for size in SIZES]


def expand(rows: list[tuple[list[int], int]], counts: list[int], left: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (R, L) with an image position for every token, attention, and the image of each row."""
    long = [[t for id in ids for t in [id] * (counts[i] if id == IMAGE_ID else 1)] for ids, i in rows]
    length = max(map(len, long))
    ids, attention = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.bool)
    for index, row in enumerate(long):
        place = slice(length - len(row), None) if left else slice(len(row))
        ids[index, place], attention[index, place] = torch.tensor(row), True
    return ids, attention, torch.tensor([image for _, image in rows])


def stock_inputs(vlm: QwenVL, ids: Tensor, attention: Tensor, row_image: Tensor) -> dict[str, Tensor]:
    """What the library's class takes: an image again for every row about it."""
    pixels, geometry, _ = seen_by(vlm)
    grids = torch.tensor([(1, *(side // vlm.view.patch for side in place.resized)) for place in geometry])
    parts = pixels.split(grids.prod(1).tolist())
    shown = [image for row, image in enumerate(row_image.tolist()) if bool((ids[row] == IMAGE_ID).any())]
    return {
        "input_ids": ids.masked_fill(ids == IMAGE_ID, IMAGE_PAD),
        "attention_mask": attention.long(),
        "pixel_values": torch.cat([parts[image] for image in shown]),
        "image_grid_thw": grids[shown],
        "mm_token_type_ids": (ids == IMAGE_ID).int(),
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_states_and_logits_are_those_of_the_library(folder, attention):
    vlm, stock = load_backbone(folder, attention=attention), stock_of(folder, attention)
    pixels, geometry, counts = seen_by(vlm)
    assert len(set(counts)) == 3
    ids, real, row_image = expand(ROWS, counts)
    with torch.no_grad():
        vision = vlm.encode_images(pixels, geometry)
        states = vlm(ids, real, vision, row_image).final
        inputs = stock_inputs(vlm, ids, real, row_image)
        expected = stock(**inputs)
        features = stock.model.get_image_features(pixels, inputs["image_grid_thw"][1:])
        hidden = stock.model(**inputs).last_hidden_state
    assert torch.equal(vision.states, torch.cat(features.pooler_output)) and vision.counts == counts
    deep = getattr(features, "deepstack_features", [])
    assert len(deep) == len(vision.deepstack) and all(map(torch.equal, deep, vision.deepstack))
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


@pytest.mark.parametrize("rows", [SHOWING, ROWS[1:4]], ids=["shared", "one each"])
def test_answers_are_those_of_the_library(folder, vlm, rows):
    """Greedy, of prompts of unequal length about images of different grids, with and without a shared prefix."""
    pixels, geometry, counts = seen_by(vlm)
    ids, real, row_image = expand([(row[:-2], image) for row, image in rows], counts, left=True)
    vision = vlm.encode_images(pixels, geometry)
    written = vlm.generate(ids, real, vision, row_image, max_new_tokens=12, eos=EOS)
    stock = stock_of(folder)
    inputs = stock_inputs(vlm, ids, real, row_image)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": EOS, "pad_token_id": EOS}
    with torch.no_grad():
        expected = stock.generate(**inputs, **options)[:, ids.shape[1] :].tolist()
    for mine, theirs in zip(written.ids, expected, strict=True):
        assert mine == theirs[: len(mine)] and (len(mine) == 12 or mine[-1] == EOS)
    assert len({tuple(row) for row in written.ids}) > 1


def test_the_states_of_an_answer_are_those_of_teacher_forcing(vlm):
    pixels, geometry, counts = seen_by(vlm)
    ids, real, row_image = expand([(row[:-2], image) for row, image in SHOWING], counts, left=True)
    vision = vlm.encode_images(pixels, geometry)
    written = vlm.generate(ids, real, vision, row_image, max_new_tokens=6, eos=EOS)
    for row, new in enumerate(written.ids):
        whole = torch.cat([ids[row, real[row]], torch.tensor(new)])[None]
        states = vlm(whole, torch.ones_like(whole, dtype=torch.bool), vision, row_image[row : row + 1]).final[0]
        torch.testing.assert_close(written.states[row, : len(new)], states[-len(new) - 1 : -1], atol=1e-5, rtol=1e-4)


def batch_of(vlm: QwenVL) -> Batch:
    generator = torch.Generator().manual_seed(3)
    pixels, geometry, counts = seen_by(vlm)
    ids, real, row_image = expand(ROWS, counts)
    labels = ids.masked_fill(~real | (ids == IMAGE_ID), IGNORE_ID)
    labels[:, 0] = IGNORE_ID
    places = (ids == SEG).nonzero()
    number = row_image[places[:, 0]].bincount(minlength=3).tolist()
    masks = [
        (torch.rand(n, *place.original, generator=generator) > 0.5).float()
        for n, place in zip(number, geometry, strict=True)
    ]
    own = [Geometry(place.original, (64, 64)) for place in geometry]
    return Batch(
        pixels=pixels,
        seg_pixels=torch.randn(3, 3, 64, 64, generator=generator),
        ids=ids,
        labels=labels,
        attention=real,
        row_image=row_image,
        mask_rows=places[:, 0],
        mask_positions=places[:, 1:] - 1,
        masks=masks,
        geometry=own,
        names=["a", "b", "c"],
        ignore=[None] * 3,
    )


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
    assert results[0][1].keys() == results[1][1].keys() > {"vlm.tower.patch_embed.proj.weight"}
    torch.testing.assert_close(results[1][1], results[0][1], atol=1e-6, rtol=1e-5)


LORA = LoraConfig(r=2, alpha=4, dropout=0.0, target_modules=("q_proj", "o_proj", "down_proj"))
TRAINED = [
    ({}, {"lora", "embed_tokens", "lm_head"}),
    ({"train_vocabulary": "new_tokens"}, {"lora", "new_rows"}),
    ({"tower": TowerConfig(train_projector=True)}, {"lora", "embed_tokens", "lm_head", "merger"}),
    ({"tower": TowerConfig(train=True)}, {"lora", "embed_tokens", "lm_head", "blocks"}),
    ({"lora": LoraConfig(r=0), "train_language": False}, {"embed_tokens", "lm_head"}),
    ({"lora": LoraConfig(r=0)}, {"embed_tokens", "lm_head", "language"}),
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
    parts = {"lora": ".lora_", "new_rows": ".new_rows", "merger": "merger", "blocks": ".tower.blocks.0."}
    parts |= {
        "embed_tokens": "embed_tokens.weight",
        "lm_head": "lm_head.weight",
        "language": "layers.0.mlp.up_proj.weight",
    }
    found = {part for part, key in parts.items() if any(key in name for name in have)}
    assert found == expected
    mine = {name for name in have if ".lora_" in name}
    assert all(name.startswith("vlm.language.model.layers.") for name in mine)
    assert {"project.0.weight", "head.decoder.transformer.layers.0.self_attn.q_proj.weight"} <= have


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


def test_rotary_frequencies_stay_float32_whatever_the_weights_are(folder):
    vlm = load_backbone(folder)
    before = {name: buffer.clone() for name, buffer in vlm.named_buffers() if "inv_freq" in name}
    assert len(before) == 4  # of the tower and of the text model, each twice
    vlm.bfloat16()
    for name, buffer in vlm.named_buffers():
        assert name not in before or torch.equal(buffer, before[name])
    pixels, geometry, counts = seen_by(vlm)
    ids, real, row_image = expand(ROWS, counts)
    with torch.no_grad():
        states = vlm(ids, real, vlm.encode_images(pixels.bfloat16(), geometry), row_image).final
    assert states.dtype == torch.bfloat16 and bool(states.isfinite().all())


# ---------------------------------------------------------------------------------------------------------------------
# Files


SPEC = TokenSpec(added=("[SEG]",), mask=("[SEG]",))
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
    assert ours.config.image_token_id == IMAGE_PAD
    assert again.vlm.view == replace(read_backbone(base)[1], resize="twice")

    vlm = cast(QwenVL, again.vlm)
    pixels, geometry, counts = seen_by(vlm)
    ids, real, row_image = expand(ROWS, counts)
    with torch.no_grad():
        mine = vlm(ids, real, vlm.encode_images(pixels, geometry), row_image).final
        theirs = ours(**stock_inputs(vlm, ids, real, row_image)).logits
    assert torch.equal(vlm.logits(mine)[real], theirs[real])


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


def test_a_sliding_window_switches_packing_off(tmp_path, caplog, monkeypatch):
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    stock_model("qwen2_5_vl", **window).save_pretrained(tmp_path)
    vlm, stock = load_backbone(tmp_path).requires_grad_(False), stock_of(tmp_path)
    assert not vlm.packs
    monkeypatch.setattr("utils.log.log.propagate", True)
    assert not can_pack(True, "sdpa", vlm.packs)
    assert "model.pack_rows" in caplog.text and "sliding window" in caplog.text
    vlm.set_packing(True, 0)
    pixels, geometry, counts = seen_by(vlm)
    ids, real, row_image = expand(ROWS, counts)
    vision = vlm.encode_images(pixels, geometry)
    with torch.no_grad():
        expected = stock.model(**stock_inputs(vlm, ids, real, row_image)).last_hidden_state
    assert torch.equal(vlm(ids, real, vision, row_image).final[real], expected[real])
    prompts, seen, images = expand([(row[:-2], image) for row, image in ROWS[:2]], counts, left=True)
    written = vlm.generate(prompts, seen, vision, images, max_new_tokens=5, eos=EOS)
    inputs = stock_inputs(vlm, prompts, seen, images)
    answers = stock.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=EOS, pad_token_id=EOS)
    for mine, theirs in zip(written.ids, answers[:, prompts.shape[1] :].tolist(), strict=True):
        assert mine == theirs[: len(mine)]


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


def test_there_is_no_released_layout_to_write(finished, tmp_path):
    with pytest.raises(ValueError, match=r"no common layout.*ForConditionalGeneration"):
        save_original(read(finished), tmp_path / "out", load_tokenizer(finished, SPEC))


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
