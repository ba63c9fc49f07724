"""Scenes as tensors, prefetched by one worker process; every scene is used once."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from toy.base.sizes import CLIP_MEAN, CLIP_STD, SAM_MEAN, SAM_STD, TOWER_SIDE
from toy.base.trainer import compute_dtype
from toy.world.scene import Scene, make_scene, scene_seed

FIRST_SCENE = {  # of each use, in split "base"; "look" are the images without a dialogue of the LLaVA stage
    "tower": 0,
    "llava": 1 << 28,
    "sam": 2 << 28,
    "held_out": 3 << 28,
    "look": 4 << 28,
    "repeat": 5 << 28,
}
Sample = dict[str, np.ndarray]
MakeSample = Callable[[Scene, int, np.random.Generator], Sample]  # scene, step, generator


def scene_of(use: str, index: int, seed: int) -> Scene:
    """Scene `index` of a use of the base split; the uses never share a scene."""
    return make_scene(scene_seed("base", FIRST_SCENE[use] + index, seed))


def tower_view(image: np.ndarray) -> np.ndarray:
    """(3, T, T) uint8: what CLIPImageProcessor's bicubic resize gives for a square image."""
    small = Image.fromarray(image).resize((TOWER_SIDE, TOWER_SIDE), Image.Resampling.BICUBIC)
    return np.asarray(small).transpose(2, 0, 1)


def normalise_tower(pixels: Tensor) -> Tensor:
    """(B, 3, T, T) uint8 pixels, normalised with CLIP's statistics, in the dtype of the forward pass."""
    return _normalise(pixels, [255 * m for m in CLIP_MEAN], [255 * s for s in CLIP_STD])


def normalise_sam(pixels: Tensor) -> Tensor:
    """(B, 3, S, S) uint8 pixels, normalised with SAM's statistics, in the dtype of the forward pass."""
    return _normalise(pixels, SAM_MEAN, SAM_STD)


def _normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    centred = pixels.float() - torch.tensor(mean).view(3, 1, 1)
    return (centred / torch.tensor(std).view(3, 1, 1)).to(compute_dtype())


def stack_samples(samples: list[Sample]) -> dict[str, Tensor]:
    """One batch of samples that have equal shapes."""
    return {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in samples[0]}


class _Batches(IterableDataset):
    """Batch `step` of a use holds the scenes [step * size, (step + 1) * size), whatever was made before it."""

    def __init__(self, make: MakeSample, use: str, first: int, size: int, seed: int):
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


def prefetch(make: MakeSample, use: str, *, first: int, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Endless batches of `make(scene, step, rng)`, starting with batch `first`, made in a worker process."""
    return iter(DataLoader(_Batches(make, use, first, size, seed), batch_size=None, num_workers=1, prefetch_factor=4))


def held_out_batches(
    make: MakeSample, *, batches: int, size: int, seed: int, first: int = 0
) -> list[dict[str, Tensor]]:
    """A fixed list of batches of scenes that no stage trains on; another `first` gives other scenes."""
    source = _Batches(make, "held_out", first, size, seed)
    return [source.batch(first + index) for index in range(batches)]
