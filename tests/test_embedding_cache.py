"""Kept embeddings are those of the encoder, rounded; damage, other processes and a full folder change nothing."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import cast

import pytest
import torch
from safetensors.torch import save

from data.collate import collate_prompts, load_views
from data.types import Geometry
from model.embedding_cache import CHECKSUM, GIB, EmbeddingCache
from model.vlm.llava import Llava
from systems.assistant import build, load
from tests.records import OWN
from tests.tiny_model import sam_of, tiny_batch, tiny_model
from utils.config import CacheConfig, Recipe, from_dict
from utils.log import log

WEIGHTS = "0123456789abcdef"
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def encode(pictures: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Two levels."""
    return pictures[:, :1] * 2 + 0.1, pictures[:, 1:, ::4, ::4]


def kept(pictures: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(level.half().float() for level in encode(pictures))


def same(ours: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))


def test_a_model_answers_from_cached_embeddings_as_from_its_encoder(tmp_path):
    model, batch = tiny_model().requires_grad_(False), tiny_batch()
    with torch.no_grad():
        plain = model(batch).masks
        head = sam_of(model)
        head.use_cache(CacheConfig(str(tmp_path)))
        first = model(batch).masks
        calls = []
        head.encoder.register_forward_hook(lambda *_: calls.append(1))
        second = model(batch).masks
    assert head.cache is not None
    assert not calls and (head.cache.hits, head.cache.misses) == (2, 2)
    for one, rounded, cached in zip(plain, first, second, strict=True):
        assert torch.equal(rounded, cached)  # the same at the first time and later
        assert not torch.equal(one, cached)
        torch.testing.assert_close(cached, one, atol=2e-2, rtol=2e-2)


def test_a_head_that_reads_the_tower_answers_from_the_states_that_it_kept(tmp_path):
    """A padded view: the states depend on the pixels and on what is padding."""
    settings = {"head_options": {"decoder_heads": 4}, "model_max_length": 0}
    assistant = load(OWN / "pixellm", model=settings, device="cpu")
    model = assistant.model
    sample = load_views(OWN / "pixellm" / "image0.png", assistant.views)
    batch = model.normalised(collate_prompts([sample], [[assistant.encoder.prompt("<image>\nWhat is it?")]]))
    tower = cast(Llava, model.vlm).tower
    with torch.no_grad():
        plain = model.vlm.encode_images(batch.pixels, batch.geometry)
        model.use_cache(CacheConfig(str(tmp_path)))
        first = model.vlm.encode_images(batch.pixels, batch.geometry)
        calls = []
        tower.register_forward_hook(lambda *_: calls.append(1))
        second = model.vlm.encode_images(batch.pixels, batch.geometry)
        assert not calls
        model.vlm.encode_images(batch.pixels, [Geometry(original=(448, 448), resized=(448, 448))])  # none is padding
        assert calls
    assert torch.equal(first.states, second.states) and not torch.equal(first.states, plain.states)
    torch.testing.assert_close(first.states, plain.states, atol=1e-2, rtol=1e-2)
    for level in model.head.levels:
        assert torch.equal(first.layers[level], plain.layers[level].half().float())
    with torch.no_grad():
        model.vlm.use_cache(CacheConfig(str(tmp_path)), [-3])  # of another recipe, which shares the folder
        other = model.vlm.encode_images(batch.pixels, batch.geometry)
    assert torch.equal(other.layers[-3], plain.layers[-3].half().float())


def test_only_images_that_are_new_are_encoded(tmp_path):
    cache, sizes = EmbeddingCache(tmp_path, 1, WEIGHTS), []

    def watched(images):
        sizes.append(len(images))
        return encode(images)

    cache(IMAGES[:2], watched)
    both = cache(IMAGES[[1, 2, 0]], watched)
    assert sizes == [2, 1] and {level.dtype for level in both} == {torch.float32}
    assert same(both, kept(IMAGES[[1, 2, 0]]))
    cache(IMAGES[:1].bfloat16(), watched)  # the same image in other numbers
    EmbeddingCache(tmp_path, 1, WEIGHTS[::-1])(IMAGES[:1], watched)  # other weights
    assert sizes == [2, 1, 1, 1]


def test_files_of_earlier_versions_which_held_one_tensor_are_read(tmp_path):
    cache, old = EmbeddingCache(tmp_path, 1, WEIGHTS), torch.randn(1, 8, 8).half()
    path = cache._place(cache._name(IMAGES[0]))
    path.parent.mkdir(parents=True, exist_ok=True)
    content = save({"embedding": old})
    path.write_bytes(hashlib.blake2b(content, digest_size=CHECKSUM).digest() + content)
    (embedding,) = cache(IMAGES[:1], lambda pictures: pytest.fail("it is there"))
    assert torch.equal(embedding, old[None].float())


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_a_damaged_file_is_reported_and_computed_again(tmp_path, caplog, monkeypatch, damage):
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(log, "handlers", [])  # another test's capture may still be among them
    EmbeddingCache(tmp_path, 1, WEIGHTS)(IMAGES[:1], encode)
    (file,) = tmp_path.rglob("*.bin")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # one bit
    file.write_bytes(content if damage is None else damage)
    cache = EmbeddingCache(tmp_path, 1, WEIGHTS)
    for _ in range(2):
        assert same(cache(IMAGES[:1], encode), kept(IMAGES[:1]))
    assert (cache.damaged, cache.misses, cache.hits) == (1, 1, 1)
    assert caplog.text.count("cannot be read") == 1 and str(file) in caplog.text


def test_what_was_not_used_for_longest_goes_first_and_the_room_is_kept(tmp_path):
    size = CHECKSUM + (64 + 2 * 4) * 2 + 152  # of a file, about
    cache = EmbeddingCache(tmp_path, 10 * size / GIB, WEIGHTS)
    other = tmp_path / "notes.txt"
    other.write_text("not ours")
    pictures = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for number, picture in enumerate(pictures):
        cache(picture[None], encode)
        for path in tmp_path.rglob("*.bin"):  # file systems may tell times apart by milliseconds only
            if path.stat().st_mtime > 10**9:
                os.utime(path, (number, number))
        cache(pictures[:1], encode)  # used all the time
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.bin")) <= 10 * size
    files = len(list(tmp_path.rglob("*.bin")))
    assert 5 <= files <= 10 and cache.misses == len(pictures) and other.exists()
    cache(pictures[-files + 1 :], encode)
    assert cache.misses == len(pictures)
    cache(pictures[1:2], encode)
    assert cache.misses == len(pictures) + 1


def test_embeddings_beyond_half_precision_are_not_kept(tmp_path):
    cache = EmbeddingCache(tmp_path, 1, WEIGHTS)
    for _ in range(2):
        assert float(cache(IMAGES[:1], lambda pictures: (pictures[:, :1] * 0 + 1e6,))[0].max()) == 1e6
    assert cache.misses == 2 and not list(tmp_path.rglob("*.bin"))


def use(folder: str) -> tuple[tuple[torch.Tensor, ...], int]:
    cache = EmbeddingCache(folder, 400 / GIB, WEIGHTS)  # room for one: the two remove each other's files
    for _ in range(30):
        result = cache(IMAGES, encode)
    return result, cache.damaged


def test_processes_share_a_folder(tmp_path):
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        for result, damaged in pool.map(use, [str(tmp_path)] * 2):
            assert same(result, kept(IMAGES)) and damaged == 0
    assert not list(tmp_path.rglob("*.part"))


def test_a_full_disk_costs_a_warning_not_the_run(tmp_path):
    cache = EmbeddingCache(tmp_path, 1, WEIGHTS)
    for letters in {cache._name(picture)[:2] for picture in IMAGES}:
        (tmp_path / WEIGHTS / letters).write_text("a file where the folder should be")
    assert same(cache(IMAGES, encode), kept(IMAGES))


def test_it_is_refused_where_embeddings_change(tmp_path):
    settings = CacheConfig(str(tmp_path))
    with pytest.raises(ValueError, match="the image encoder trains"):
        tiny_model().head.use_cache(settings)
    with pytest.raises(ValueError, match=r"max_gib must be above 0"):
        EmbeddingCache(tmp_path, 0, WEIGHTS)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"model\.embedding_cache\.folder: .*file"):
        EmbeddingCache(tmp_path / "file", 1, WEIGHTS)
    recipe = from_dict(Recipe, {"model": {"embedding_cache": {"folder": str(tmp_path)}}})
    with pytest.raises(ValueError, match="all processes must encode together"):
        build(replace(recipe, train=replace(recipe.train, zero_stage=3)))


def test_a_setting_of_the_model_turns_it_on(tmp_path):
    over = {"vision_tower": str(OWN / "lisa" / "clip"), "embedding_cache": {"folder": str(tmp_path), "max_gib": 0.5}}
    assistant = load(OWN / "lisa", device="cpu", model=over)
    cache = sam_of(assistant.model).cache
    assert cache is not None and cache.room == GIB // 2
