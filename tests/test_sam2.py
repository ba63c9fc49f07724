"""The heads of SAM 2 and SAM 3 against the library's own models: files, features, decoding, scores, what trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.types import Geometry
from model.checkpoints.bounds import check_head
from model.heads import HEADS, HeadContext
from model.heads.base import QUERIES_AT_ONCE
from model.heads.sam2 import REJECTED, Sam2Head
from model.heads.sam2_weights import released_sizes
from tests.test_seg_model import only, prompts
from tests.tiny_model import PLAN, tiny_batch, tiny_model
from tests.tiny_sam2 import HIDDEN, SIDES, SIZES, WIDTH, from_tensors, read, stock, write_original
from utils.config import CacheConfig
from utils.log import log

SHAPES = [(30, 40), (50, 20)]
QUERY_IMAGE = torch.tensor([0, 0, 0, 1, 1])
PUBLISHED = {"masks": "best_of_three", "not_a_point_tokens": 2}


@pytest.fixture(scope="module", params=["sam2", "sam3"])
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp(name)
    stock(name).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def theirs(name):
    return stock(name)


@pytest.fixture
def images(name):
    return torch.randn(2, 3, SIDES[name], SIDES[name], generator=torch.Generator().manual_seed(1))


@pytest.fixture
def queries():
    return torch.randn(5, 2, WIDTH, generator=torch.Generator().manual_seed(2))


def batch_of(images):
    return replace(tiny_batch(), seg_pixels=images)


def decode(head: Sam2Head, images, queries, **arguments):
    features = head.features(batch_of(images), None)
    return head.decode(features, queries, QUERY_IMAGE, geometry(head), **arguments)


def geometry(head: Sam2Head) -> list[Geometry]:
    return [head.view.geometry(*shape) for shape in SHAPES]


def expected(theirs, images, queries, *, points: int, best: bool):
    """(Q, h, w) logits and (Q,) scores of the stock model: one image at a time, the prompts by hand."""
    logits, scores = [], []
    for query, image in zip(queries, QUERY_IMAGE, strict=True):
        *fine, coarse = theirs.get_image_embeddings(images[image : image + 1])
        _, dense = theirs.prompt_encoder(None, None, None, None)
        sparse = torch.cat([theirs.prompt_encoder.not_a_point_embed.weight.expand(points, -1), query])
        masks, iou, _, presence = theirs.mask_decoder(
            image_embeddings=coarse,
            image_positional_embeddings=theirs.get_image_wide_positional_embeddings(),
            sparse_prompt_embeddings=sparse[None, None],
            dense_prompt_embeddings=dense,
            multimask_output=best,
            high_resolution_features=fine,
        )
        chosen = int(iou[0, 0].argmax())
        logits.append(masks[0, 0, chosen])
        scores.append(iou[0, 0, chosen] * presence[0, 0, 0].sigmoid())
    return torch.stack(logits), torch.stack(scores)


def test_features_are_the_stock_model_s(name, folder, theirs, images):
    *fine, coarse = read(name, folder).features(batch_of(images), None)
    *expected_fine, expected_coarse = theirs.get_image_embeddings(images)
    assert coarse.shape == expected_coarse.shape
    for ours, stock_level in zip(fine, expected_fine, strict=True):
        assert ours.std() > 0.1 and torch.equal(ours, stock_level)
    without_memory = expected_coarse - theirs.no_memory_embedding.view(1, -1, 1, 1)
    torch.testing.assert_close(coarse, without_memory, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("masks", "points"), [("single", 0), ("single", 1), ("best_of_three", 2)])
def test_masks_and_scores_are_the_stock_decoder_s(name, folder, theirs, images, queries, masks, points):
    head = read(name, folder, masks=masks, not_a_point_tokens=points)
    logits, scores = expected(theirs, images, queries, points=points, best=masks == "best_of_three")
    decoded = decode(head, images, queries, full=False)  # with gradients: the released attention
    torch.testing.assert_close(torch.cat(decoded.masks), logits, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(torch.cat(decoded.scores), scores, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        folded = decode(head, images, queries, full=False)
    torch.testing.assert_close(torch.cat(folded.masks), logits, atol=1e-4, rtol=1e-4)
    assert [len(part) for part in decoded.scores] == [3, 2] and logits.std() > 0.1


def test_a_point_prompt_gives_the_stock_model_s_masks(name, folder, theirs, images):
    """The whole forward of the library: what it makes of an empty point is two not-a-point embeddings."""
    head = read(name, folder, **PUBLISHED | {"not_a_point_tokens": 1})
    output = theirs(pixel_values=images)
    best = output.iou_scores[:, 0].argmax(-1)
    queries = head.prompts.not_a_point_embed.weight.expand(2, 1, -1)
    decoded = head.decode(
        head.features(batch_of(images), None), queries, torch.tensor([0, 1]), geometry(head), full=False
    )
    expected_masks = output.pred_masks[torch.arange(2), 0, best]
    torch.testing.assert_close(torch.cat(decoded.masks), expected_masks, atol=2e-6, rtol=1e-6)


def test_a_neck_of_four_levels_is_read_without_its_fourth(tmp_path, images):
    """facebook/sam3 has it. The stock image model then loses the no-memory embedding; ours keeps it."""
    images = torch.randn(2, 3, SIDES["sam3"], SIDES["sam3"], generator=torch.Generator().manual_seed(1))
    theirs = stock("sam3", (4.0, 2.0, 1.0, 0.5))
    theirs.save_pretrained(tmp_path)
    assert any("fpn_layers.3" in key for key in load_file(tmp_path / "model.safetensors"))
    head = read("sam3", tmp_path)
    levels = head.features(batch_of(images), None)
    for ours, stock_level in zip(levels, theirs.get_image_embeddings(images), strict=True):
        torch.testing.assert_close(ours, stock_level, atol=1e-6, rtol=1e-6)
    assert head.no_memory_embedding.abs().max() > 0.1


def test_whole_sam3_folders_are_read(tmp_path):
    """facebook/sam3 in its own names: the encoder is the detector's, the rest of the detector is left out."""
    head = from_stock("sam3", tmp_path / "tracker")
    table = {"tracker_model.detector_model.": "detector_model.", "tracker_model.tracker_neck.": "tracker_neck."}
    state = load_file(tmp_path / "tracker" / "model.safetensors")
    for old, new in table.items():
        state = {new + key.removeprefix(old) if key.startswith(old) else key: value for key, value in state.items()}
    state |= {
        "detector_model.text_encoder.x": torch.zeros(2),
        "tracker_model.memory_attention.x": torch.ones(1),
    }
    whole = tmp_path / "whole"
    whole.mkdir()
    save_file(state, whole / "model.safetensors")
    config = '{"model_type": "sam3_video", "tracker_config": %s}'
    (whole / "config.json").write_text(config % (tmp_path / "tracker" / "config.json").read_text())
    again = read("sam3", whole)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in head.state_dict().items())


def from_stock(name: str, place: Path) -> Sam2Head:
    stock(name).save_pretrained(place)
    return read(name, place)


@pytest.mark.parametrize("version", ["2.0", "2.1"])
def test_original_files_of_both_versions(tmp_path, caplog, monkeypatch, version):
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(log, "handlers", [])
    head = from_stock("sam2", tmp_path / "folder")
    file = write_original(head, tmp_path / "sam2_hiera_mini.pt", version)
    with caplog.at_level("INFO"):
        again = read("sam2", file, sizes=SIZES, decoder_heads=4)
    assert again.state_dict().keys() == head.state_dict().keys()
    assert all(torch.equal(again.state_dict()[key], value) for key, value in head.state_dict().items())
    assert f"{9 if version == '2.1' else 7} weights are not of the image side" in caplog.text


@pytest.mark.parametrize("size", list(released_sizes()))
def test_the_four_released_sizes_are_known_by_their_shapes(size):
    config = HEADS["sam2"].released(size)
    with torch.device("meta"):
        state = HEADS["sam2"].build(config, "sdpa").state_dict()
    found = HEADS["sam2"].config_for(state, {})
    assert found["backbone_config"] == config["backbone_config"]
    assert found["prompt_encoder_config"] | config["prompt_encoder_config"] == found["prompt_encoder_config"]
    millions = sum(value.numel() for key, value in state.items() if key.startswith("encoder.")) / 1e6
    released = {"hiera_tiny": 27, "hiera_small": 34, "hiera_base_plus": 69, "hiera_large": 213}  # without the memory
    assert abs(millions - released[size]) < 1.5


def test_another_size_needs_what_no_shape_shows(tmp_path):
    tensors, _ = HEADS["sam2"].read_weights(write_original(from_stock("sam2", tmp_path), tmp_path / "a.pt"), {})
    with pytest.raises(ValueError, match=rf"no released size .* of width 8 and 1-1-2-1 blocks.*{', '.join(HIDDEN)}"):
        HEADS["sam2"].config_for(tensors, {})
    config = HEADS["sam2"].config_for(tensors, {"sizes": SIZES, "decoder_heads": 4})
    assert config["backbone_config"]["global_attention_blocks"] == [3]


@pytest.mark.parametrize("at_once", [2, 64])
def test_chunks_change_nothing(name, folder, images, queries, monkeypatch, at_once):
    head = read(name, folder, **PUBLISHED)
    with torch.no_grad():
        whole = decode(head, images, queries)
        monkeypatch.setitem(QUERIES_AT_ONCE, "cpu", at_once)
        parts = decode(head, images, queries)
    for one, other in zip((*whole.masks, *whole.scores), (*parts.masks, *parts.scores), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert [tuple(mask.shape) for mask in whole.masks] == [(3, 30, 40), (2, 50, 20)]


def test_masks_decoded_again_have_the_same_gradients(name, folder, images, queries):
    gradients = []
    for checkpointed in (False, True):
        head = read(name, folder, **PUBLISHED).train().requires_grad_(False)
        for part in head.trainable_parts({}):
            part.requires_grad_(True)
        head.checkpoint_decoder = checkpointed
        prompt = queries.clone().requires_grad_()
        decoded = decode(head, images, prompt)
        sum(mask.mean() for mask in decoded.masks).backward()
        gradients.append({key: weight.grad for key, weight in head.named_parameters() if weight.grad is not None})
        gradients[-1]["prompt"] = prompt.grad
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]["prompt"].abs().max() > 0
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, atol=1e-5, rtol=1e-4, msg=key)


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({}, {"decoder"}),
        ({"train_convs": False}, {"decoder"}),
        ({"train_encoder": True}, {"decoder", "encoder", "no_memory_embedding"}),
    ],
)
def test_gradients_reach_only_what_trains(name, folder, images, queries, options, trained):
    head = read(name, folder, **PUBLISHED).train().requires_grad_(False)
    for part in head.trainable_parts(options):
        part.requires_grad_(True)
    sum(mask.sum() for mask in decode(head, images, queries).masks).backward()
    moved = {key for key, weight in head.named_parameters() if weight.grad is not None}
    assert {key.split(".")[0] for key in moved} == trained
    assert any("conv_s0" in key for key in moved) == options.get("train_convs", True)
    assert not any("iou_prediction_head" in key or "pred_obj_score_head" in key for key in moved)  # sa2va.md 5.1


def test_an_absent_object_gives_an_empty_mask_in_evaluation_alone(name, folder, images, queries):
    head, plain = read(name, folder, reject="object"), read(name, folder)
    for part in (head, plain):  # some objects are there, others are not
        with torch.no_grad():
            part.decoder.pred_obj_score_head.proj_out.bias.sub_(presence(plain, images, queries).median())
    absent = presence(plain, images, queries) <= 0
    assert 0 < absent.sum() < 5
    with torch.no_grad():
        rejected, kept = decode(head, images, queries, full=False), decode(plain, images, queries, full=False)
        trained = decode(head.train(), images, queries, full=False)
    assert bool((torch.cat(rejected.masks)[absent] == REJECTED).all())
    assert torch.equal(torch.cat(rejected.masks)[~absent], torch.cat(kept.masks)[~absent])
    torch.testing.assert_close(torch.cat(trained.masks), torch.cat(kept.masks), atol=1e-5, rtol=1e-5)
    assert torch.equal(torch.cat(rejected.scores), torch.cat(kept.scores))
    assert float(torch.cat(kept.scores)[absent].max()) < 0.5


@torch.no_grad()
def presence(head: Sam2Head, images, queries) -> torch.Tensor:
    seen = []
    hook = head.decoder.pred_obj_score_head.register_forward_hook(lambda *given: seen.append(given[2][:, 0, 0]))
    decode(head, images, queries)
    hook.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("resize", ["one_step", "two_step"])
def test_the_two_ways_of_resizing(name, folder, images, queries, resize):
    head = read(name, folder, resize=resize)
    low = torch.cat(decode(head, images, queries, full=False).masks)
    sides = [(SIDES[name], SIDES[name])] if resize == "two_step" else []
    for index, part in enumerate(decode(head, images, queries).masks):
        steps = low[index == QUERY_IMAGE][:, None]
        for size in (*sides, SHAPES[index]):
            steps = torch.nn.functional.interpolate(steps, size, mode="bilinear", align_corners=False)
        torch.testing.assert_close(part, steps[:, 0])


def test_cached_levels_are_the_encoder_s_rounded(name, folder, images, queries, tmp_path):
    head = read(name, folder, **PUBLISHED).requires_grad_(False)
    plain = head.features(batch_of(images), None)
    head.use_cache(CacheConfig(str(tmp_path)))
    first = head.features(batch_of(images), None)
    head.encoder.register_forward_hook(lambda *_: pytest.fail("it is in the cache"))
    second = head.features(batch_of(images), None)
    assert head.cache is not None and (head.cache.hits, head.cache.misses) == (2, 2)
    for level, one, other in zip(plain, first, second, strict=True):
        assert torch.equal(one, other) and torch.equal(one, level.half().float())
    changed = read(name, folder).requires_grad_(False)
    with torch.no_grad():
        changed.decoder.conv_s0.weight.add_(1)
    changed.use_cache(CacheConfig(str(tmp_path)))
    changed.features(batch_of(images), None)
    assert changed.cache is not None and changed.cache.misses == 2, "other weights of conv_s0, other files"


def test_a_cache_is_refused_where_its_content_trains(name, folder, tmp_path):
    head = read(name, folder).requires_grad_(False)
    head.decoder.requires_grad_(True)
    with pytest.raises(ValueError, match=r"conv_s1, which train; set model\.head_options\.train_convs=false"):
        head.use_cache(CacheConfig(str(tmp_path)))


def test_a_configuration_keeps_the_choices_and_a_recipe_overrides_them(name, folder):
    tensors, options = HEADS[name].read_weights(folder, {**PUBLISHED, "reject": "object"})
    config = HEADS[name].config_for(tensors, options, HeadContext(1, 1, 1, 1, side=SIDES[name]))
    assert config["decoding"] == {**PUBLISHED, "reject": "object"}
    saved = HeadContext(1, 1, 1, 1, saved_config=config)
    assert HEADS[name].config_for({}, {}, saved) == config
    other = HEADS[name].config_for({}, {"reject": "none"}, saved)
    assert other["decoding"] == {**PUBLISHED, "reject": "none"} and config["decoding"]["reject"] == "object"


@pytest.mark.parametrize(
    ("options", "side", "message"),
    [
        ({"masks": "best"}, None, r"model\.head_options\.masks 'best'.*best_of_three, single"),
        ({"not_a_point_tokens": 99}, None, r"not_a_point_tokens must be 0 to 16, got 99"),
        ({"resample": "lanczos"}, None, r"model\.head_options\.resample 'lanczos'.*pil_bicubic"),
        ({"decoder_head": 8}, None, r"no field in model\.head_options 'decoder_head' \(did you mean 'decoder_heads'"),
        ({"sizes": {"trunk": {}}}, None, r"no section of model\.head_options\.sizes 'trunk'.*backbone_config"),
        ({"sizes": {"backbone_config": {"width": 3}}}, None, r"backbone_config 'width'"),
        ({"train_encoder": True, "encoder_lora_rank": 2}, None, "one of them"),
        ({"encoder_lora_rank": -1}, None, "encoder_lora_rank must be 0 or more"),
        ({}, 1001, r"model\.image_size 1001 must be a multiple of"),
    ],
)
def test_choices_are_checked_before_weights_are_read(name, options, side, message):
    with pytest.raises(ValueError, match=message):
        HEADS[name].check_options(options, side)


def test_files_of_another_head_are_named(tmp_path):
    sam2 = from_stock("sam2", tmp_path / "sam2")
    from_stock("sam3", tmp_path / "sam3")
    original = write_original(sam2, tmp_path / "sam2.1_hiera_tiny.pt")
    sam1 = {"image_encoder.pos_embed": torch.zeros(1), "image_encoder.blocks.0.norm1.bias": torch.zeros(1)}
    torch.save(sam1, tmp_path / "sam_vit_b.pth")
    wrong = [("sam", original, "sam2"), ("sam", tmp_path / "sam2", "sam2"), ("sam", tmp_path / "sam3", "sam3")]
    wrong += [("sam2", tmp_path / "sam_vit_b.pth", "sam"), ("sam2", tmp_path / "sam3", "sam3")]
    wrong += [
        ("sam3", original, "sam2"),
        ("sam3", tmp_path / "sam2", "sam2"),
        ("sam3", tmp_path / "sam_vit_b.pth", "sam"),
    ]
    for head, path, owner in wrong:
        with pytest.raises(ValueError, match=rf"not {head.upper()} weights.*set model\.mask_head={owner}$"):
            HEADS[head].read_weights(path, {})


def test_incomplete_weights_are_named(tmp_path):
    for name in ("sam2", "sam3"):
        tensors, options = HEADS[name].read_weights(write(name, tmp_path / name), {})
        tensors = {key: value for key, value in tensors.items() if "mask_tokens" not in key}
        with pytest.raises(ValueError, match=rf"{name.upper()} weights are incomplete.*decoder\.mask_tokens\.weight"):
            HEADS[name].config_for(tensors, options)


def write(name: str, place: Path) -> Path:
    stock(name).save_pretrained(place)
    return place


def test_a_side_that_the_windows_do_not_divide_is_refused(folder, name):
    tensors, options = HEADS[name].read_weights(folder, {})
    side = {"sam2": 96 + 16, "sam3": 60}[name]
    with pytest.raises(ValueError, match=rf"model\.image_size {side}"):
        from_tensors(name, tensors, options, side)


@pytest.mark.parametrize("side", [96, 128])
def test_other_sides_are_possible(tmp_path, side):
    head = from_stock("sam2", tmp_path)
    tensors, options = HEADS["sam2"].read_weights(tmp_path, {})
    other = from_tensors("sam2", tensors, options, side)
    assert other.view.size == side and head.view.size == 64
    levels = other.features(batch_of(torch.randn(1, 3, side, side)), None)
    assert [level.shape[-1] * stride for level, stride in zip(levels, (4, 8, 16), strict=True)] == [side] * 3


def test_a_model_answers_with_scores(name, folder):
    """Teacher forced and generated: one score per mask, in the same order."""
    tensors, options = HEADS[name].read_weights(folder, {})
    config = HEADS[name].config_for(tensors, options, HeadContext(1, 1, 1, 1, side=SIDES[name]))
    model = tiny_model(seed=5, plan=replace(PLAN, head=name, head_config=config)).requires_grad_(False)
    batch = replace(tiny_batch(), seg_pixels=torch.randn(2, 3, SIDES[name], SIDES[name]))
    output = model(batch)
    assert output.scores is not None and [len(part) for part in output.scores] == [2, 1]
    assert all(0 <= float(score) <= 1 for part in output.scores for score in part)
    empty = model(replace(tiny_batch(masks=False), seg_pixels=batch.seg_pixels))
    assert empty.scores is not None and [len(part) for part in empty.scores] == [0, 0]


@torch.no_grad()
def test_generated_masks_keep_their_scores(name, folder):
    """Every new token is a mask here: the rows of a batch have what each has alone."""
    tensors, options = HEADS[name].read_weights(folder, {})
    config = HEADS[name].config_for(tensors, options, HeadContext(1, 1, 1, 1, side=SIDES[name]))
    model = tiny_model(seed=5, plan=replace(PLAN, head=name, head_config=config)).requires_grad_(False)
    model.vlm.language.lm_head.weight.zero_()  # all logits are equal: the first id wins
    batch = prompts()
    batch.seg_pixels = torch.randn(2, 3, SIDES[name], SIDES[name], generator=torch.Generator().manual_seed(3))
    together = model.generate(batch, max_new_tokens=2, mask_ids=(0,), eos=1)
    for row, answer in enumerate(together):
        (alone,) = model.generate(only(batch, row), max_new_tokens=2, mask_ids=(0,), eos=1)
        assert answer.ids == [0, 0] and answer.scores is not None and len(answer.scores) == len(answer.masks) == 2
        torch.testing.assert_close(answer.scores, alone.scores, atol=1e-5, rtol=1e-5)
    assert len({round(float(score), 4) for answer in together for score in answer.scores}) >= 3
    (empty, *_) = model.generate(batch, max_new_tokens=1, mask_ids=(5,), eos=1)
    assert empty.masks.shape == (0, 20, 30)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("backbone_config", "blocks_per_stage", [1, 10**9, 1, 1], r"head_config\.backbone_config\.blocks_per_stage is"),
        (
            "backbone_config",
            "embed_dim_per_stage",
            [8] * 10**4,
            r"head_config\.backbone_config\.embed_dim_per_stage is",
        ),
        ("backbone_config", "hidden_size", 10**9, r"head_config\.backbone_config\.hidden_size is 1000000000"),
        ("backbone_config", "_name_or_path", "http://x", r"no size in head_config\.backbone_config '_name_or_path'"),
        ("prompt_encoder_config", "image_size", 10**6, r"image_size: 1000000 pixels per side, more than the limit"),
        ("decoding", "not_a_point_tokens", 10**9, r"not_a_point_tokens must be 0 to 16"),
        ("decoding", "masks", "all", r"head_config\.decoding\.masks 'all'"),
    ],
)
def test_sizes_in_a_stranger_s_configuration_are_bounded_by_the_weights(tmp_path, section, key, value, message):
    head = from_stock("sam2", tmp_path)
    tensors, options = HEADS["sam2"].read_weights(tmp_path, {})
    config = HEADS["sam2"].config_for(tensors, options, HeadContext(1, 1, 1, 1, side=64))
    changed = {**config, section: {**config[section], key: value}}
    state = {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        saved = HEADS["sam2"].config_for({}, {}, HeadContext(1, 1, 1, 1, saved_config=changed))
        check_head(saved, HEADS["sam2"].SIZE_KEYS, state, "config.json")
