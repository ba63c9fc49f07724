"""Scenes as tensors, read ahead by one worker process; every scene is drawn once and never again."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from toy.base.sizes import CLIP_MEAN, CLIP_STD, SAM_MEAN, SAM_STD, TOWER_SIDE
from toy.world.scene import Scene, make_scene, scene_seed

FIRST_SCENE = {
    "tower": 0,
    "llava": 1 << 28,
    "sam": 2 << 28,
    "held_out": 3 << 28,
    "look": 4 << 28,
}  # first scene of each, in split "base"
Sample = dict[str, np.ndarray]


def scene_of(use: str, index: int, seed: int) -> Scene:
    """Scene `index` of a use of the base split; the uses never share a scene."""
    return make_scene(scene_seed("base", FIRST_SCENE[use] + index, seed))


def tower_view(image: np.ndarray) -> np.ndarray:
    """(3, T, T) uint8: what CLIPImageProcessor's bicubic resize gives for a square picture."""
    small = Image.fromarray(image).resize((TOWER_SIDE, TOWER_SIDE), Image.Resampling.BICUBIC)
    return np.asarray(small).transpose(2, 0, 1)


def normalise_tower(pixels: Tensor) -> Tensor:
    """(B, 3, T, T) uint8 to CLIP's normalised bf16."""
    return _normalise(pixels, [255 * m for m in CLIP_MEAN], [255 * s for s in CLIP_STD])


def normalise_sam(pixels: Tensor) -> Tensor:
    """(B, 3, S, S) uint8 to SAM's normalised bf16."""
    return _normalise(pixels, SAM_MEAN, SAM_STD)


def _normalise(pixels: Tensor, mean: list[float], std: list[float]) -> Tensor:
    mean, std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    return ((pixels.float() - mean) / std).bfloat16()


def stack_samples(samples: list[Sample]) -> dict[str, Tensor]:
    """Samples of equal shapes to one batch."""
    return {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in samples[0]}


class _Batches(IterableDataset):
    def __init__(
        self, make: Callable[[Scene, int, np.random.Generator], Sample], use: str, first: int, size: int, seed: int
    ):
        self.make, self.use, self.first, self.size, self.seed = make, use, first, size, seed

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        step = self.first
        while True:
            yield self.batch(step)
            step += 1

    def batch(self, step: int) -> dict[str, Tensor]:
        samples = []
        for index in range(step * self.size, (step + 1) * self.size):
            rng = np.random.default_rng((self.seed, FIRST_SCENE[self.use], index))
            samples.append(self.make(scene_of(self.use, index, self.seed), step, rng))
        return stack_samples(samples)


def prefetch(make: Callable, use: str, *, first: int, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Endless batches of `make(scene, step, rng)` from batch `first` on, made in a worker process."""
    return iter(DataLoader(_Batches(make, use, first, size, seed), batch_size=None, num_workers=1, prefetch_factor=4))


def held_out_batches(make: Callable, *, batches: int, size: int, seed: int, first: int = 0) -> list[dict[str, Tensor]]:
    """A fixed list of batches of scenes that no stage trains on; `first` tells the kinds of batches apart."""
    source = _Batches(make, "held_out", first, size, seed)
    return [source.batch(first + index) for index in range(batches)]
