"""The shipped toy base loads as the real ones do and knows its world; the program that trains it is sound."""

import itertools
import json
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import CLIPImageProcessor, LlamaTokenizer, LlavaForConditionalGeneration

from model.heads.doubling import to_cells
from model.heads.sam import SamHead
from toy.base.attention import attend, dialogue_mask
from toy.base.facts import CELL_SIDE, CELLS, GRID, Facts, cell_at
from toy.base.llava import LlavaStage, supervised_logits
from toy.base.pictures import held_out_batches, normalise_sam, normalise_tower, scene_of, tower_view
from toy.base.prompts import KINDS, prompt_sample
from toy.base.publish import LLAVA_FOLDER, SAM_FILE, save_sam
from toy.base.rows import IGNORED, RowBuilder
from toy.base.sam import SamStage, binary_iou
from toy.base.sizes import MAX_BYTES, SCENE_SIDE
from toy.base.trainer import StagePlan, compute_dtype, learning_rate, train_stage
from toy.base.turns import MENU, present
from toy.base.vocabulary import IMAGE_PATCH, SYSTEM, added_ids, load_vocabulary
from toy.world.scene import CLASSES, COLORS, make_scene, scene_seed

BASE = Path(__file__).parents[1] / "assets" / "toy"
FOLDER, SAM = BASE / LLAVA_FOLDER, BASE / SAM_FILE


@pytest.fixture(scope="module")
def llava() -> LlavaForConditionalGeneration:
    loaded = LlavaForConditionalGeneration.from_pretrained(FOLDER, output_loading_info=True, dtype=torch.float32)
    model, report = cast(tuple[LlavaForConditionalGeneration, dict], loaded)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


@pytest.fixture(scope="module")
def row() -> RowBuilder:
    return RowBuilder(FOLDER)


def test_the_weights_fit_their_limit():
    assert (FOLDER / "model.safetensors").stat().st_size + SAM.stat().st_size <= MAX_BYTES


def test_the_folder_loads_as_a_hugging_face_llava(llava):
    config = llava.config
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    assert config.text_config.vocab_size == len(LlamaTokenizer.from_pretrained(FOLDER))
    assert all(torch.isfinite(value).all() for value in llava.state_dict().values())


def test_the_image_processor_gives_the_pixels_of_training():
    scene = make_scene(scene_seed("val", 0))
    processed = CLIPImageProcessor.from_pretrained(FOLDER)(scene.image, return_tensors="pt")["pixel_values"]
    trained = normalise_tower(torch.from_numpy(tower_view(scene.image).copy())[None])
    assert (processed - trained.float()).abs().max() < 0.05  # bf16


def test_the_tokenizer_of_transformers_gives_the_ids_of_training(row):
    tokenizer = LlamaTokenizer.from_pretrained(FOLDER, legacy=True)
    pieces, question = load_vocabulary(FOLDER), "where is the red car? ASSISTANT: Hm"
    images = added_ids(pieces)
    text = f"{SYSTEM} USER: <im_start><im_patch><im_end>\n{question}"
    wrap = [images[token] for token in ("<im_start>", IMAGE_PATCH, "<im_end>")]
    expected = [1, *pieces.encode(f"{SYSTEM} USER:"), *wrap, *pieces.encode(question)]
    assert tokenizer(text).input_ids == expected
    assert all(len(pieces.encode(word)) == 1 for word in (*CLASSES, *COLORS, *CELLS))


def test_llava_distinguishes_present_and_absent_classes(llava, row):
    """Teacher-forced on scenes that no stage trained on."""
    batch = held_out_batches(RowBuilder(FOLDER, {present: 1.0}), batches=1, size=6, seed=77)[0]
    stage = LlavaStage(row.writer)
    stage.llava = llava
    with torch.no_grad():
        logits, labels, *_ = supervised_logits(stage, batch)
    guesses, yes, no = logits.argmax(-1), row.writer.word("yes"), row.writer.word("no")
    assert (guesses[labels == no] == no).float().mean() > 0.9
    assert (guesses[labels == yes] == yes).float().mean() > 0.8


def test_the_sam_file_has_upstreams_names(tmp_path):
    with safe_open(SAM, "pt") as file:
        names = set(file.keys())
    assert {"image_encoder.pos_embed", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"} < names
    assert "mask_decoder.output_hypernetworks_mlps.3.layers.2.weight" in names
    with safe_open(save_sam(SamStage().sam, tmp_path), "pt") as file:
        assert set(file.keys()) == names


def test_sam_finds_things_from_boxes_on_val_scenes():
    tensors, options = SamHead.read_weights(str(SAM), {"decoder_heads": 8})
    head = SamHead.build(SamHead.config_for(tensors, options), "eager").float().eval()
    head.load_state_dict({key: value.float() for key, value in tensors.items()})
    scenes = [make_scene(scene_seed("val", index)) for index in range(8)]
    found = [box_iou(head, scene, thing) for scene in scenes for thing in scene.objects]
    assert np.mean(found) > 0.7


def box_iou(head: SamHead, scene, thing) -> float:
    x0, y0, x1, y1 = thing.box
    with torch.no_grad():
        pixels = normalise_sam(torch.from_numpy(scene.image.transpose(2, 0, 1).copy())[None]).float()
        embedding = head.encoder(pixels).last_hidden_state
        sparse, dense = head.prompts(None, None, torch.tensor([[[x0, y0, x1 - 1, y1 - 1]]], dtype=torch.float32), None)
        cells, positions = to_cells(embedding + dense), to_cells(head.positions(embedding))
        masks = head.decoder(cells, positions, sparse[:, 0], tuple(embedding.shape[-2:]))
        shown = nn.functional.interpolate(masks[:, None], size=SCENE_SIDE, mode="bilinear")[0, 0] > 0
    return binary_iou(shown.flatten(), torch.from_numpy(thing.mask).flatten()).item()


def test_the_log_is_of_the_run_that_made_the_files():
    lines = [json.loads(line) for line in (BASE / "train_log.jsonl").read_text().splitlines()]
    last = {line["stage"]: line["held_out"] for line in lines if "held_out" in line}
    assert set(last) == {"tower", "llava", "repeat", "sam"}
    assert last["sam"]["box_iou"] > 0.7


def test_place_words_count_columns_then_rows():
    assert len(set(CELLS)) == GRID * GRID
    assert cell_at(0, 0) == CELLS[0]
    assert cell_at(CELL_SIDE, 0) == CELLS[GRID]
    assert cell_at(SCENE_SIDE - 1, SCENE_SIDE - 1) == CELLS[-1]


def test_rows_label_answers_only(row):
    sample = row(scene_of("held_out", 3, 0), 0, np.random.default_rng(0))
    ids, labels, pieces = sample["ids"], sample["labels"], row.writer.pieces
    kept = labels != IGNORED
    assert (ids[kept] == labels[kept]).all() and not kept[ids == row.writer.images[IMAGE_PATCH]].any()
    before = ids[np.flatnonzero(kept[1:] & ~kept[:-1])]
    assert {pieces.id_to_piece(int(token)) for token in before} == {":"}
    assert "USER" not in pieces.decode(labels[kept].tolist())


def test_every_kind_of_turn_speaks_of_the_scene():
    rng = np.random.default_rng(1)
    facts = Facts(scene_of("held_out", 4, 0), rng)
    turns = [make(facts, rng) for make in MENU]
    assert sum(turn is not None for turn in turns) >= len(MENU) - 2
    _, answer = next(turn for make, turn in zip(MENU, turns, strict=True) if turn and make is present)
    words = answer.split()
    assert all(
        (word == "yes") == (name in facts.groups)
        for name, word in zip(words[::2], words[1::2], strict=True)
        if name != "animal"
    )


def test_dialogues_of_a_row_do_not_see_each_other(row):
    sample = row(scene_of("held_out", 6, 0), 0, np.random.default_rng(3))
    group, place = torch.from_numpy(sample["group"])[None], sample["place"]
    visible = dialogue_mask(group, torch.float32)[0] == 0
    last = int(np.flatnonzero(sample["group"] == 2)[-1])
    assert set(sample["group"][visible[last].numpy()].tolist()) == {0, 2}
    starts = [place[sample["group"] == number][0] for number in range(1, sample["group"].max() + 1)]
    assert set(starts) == {(sample["group"] == 0).sum()}


def test_prompts_lie_in_the_masks_they_ask_for():
    scene, rng = scene_of("held_out", 5, 0), np.random.default_rng(2)
    for step, kind in enumerate(KINDS):
        sample = prompt_sample(scene, step, rng)
        for points, masks in zip(sample["points"], sample["masks"], strict=False):
            cells = (points // (SCENE_SIDE / masks.shape[-1])).astype(int)
            assert (masks[-1][cells[:, 1], cells[:, 0]] > 0).all(), kind


def test_fast_attention_is_attention():
    query, key, value = torch.randn(3, 2, 2, 6, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    mask = torch.full((1, 6, 6), float("-inf")).triu(1)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert torch.allclose(attend(query, key, value, 0.5, mask), expected, atol=1e-6)


def test_the_rate_rises_then_falls():
    rates = [learning_rate(share, 1.0) for share in np.linspace(0, 1, 50)]
    peak = int(np.argmax(rates))
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(0.02)


def test_a_stage_resumes_from_its_checkpoint(tmp_path, monkeypatch):
    clock, seen = itertools.count(), []
    monkeypatch.setattr("toy.base.trainer.time.monotonic", lambda: float(next(clock)))

    def run(seconds: float, resume: bool):
        def batches(step: int):
            seen.append(step)
            return ({"x": torch.ones(1, 2)} for _ in itertools.count(step))

        plan = StagePlan("probe", seconds, 1e-3, tmp_path, resume)
        model = nn.Linear(2, 1)

        def objective(model, batch):
            return model(batch["x"].to(compute_dtype())).float().mean(), {}

        train_stage(plan, model, batches, objective, lambda m: {}, lambda m: None)
        return torch.load(tmp_path / "probe.pt", weights_only=True)["step"]

    first = run(5, False)
    assert first > 0
    assert run(10, True) > first
    assert seen == [0, first]
