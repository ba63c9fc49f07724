"""The scenes of a data set: which ones each layout takes, and a writer that writes every image once."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from toy.world.scene import Scene, make_scene, scene_seed

POOLS: dict[str, int] = {  # pools of training scenes, and how many of 20 training images each one gets
    "ade20k": 5,
    "coco2017": 4,
    "coco2014": 5,
    "reason_seg": 3,
    "cityscapes": 1,
    "mapillary": 1,
    "saiapr": 1,
}
ID_OFFSET = {"train": 1, "val": 1_000_001, "test": 2_000_001}  # image ids of the splits never coincide
POOL_BITS, TEST_BIT = 24, 1 << 24


FILES = "toy_world_files.txt"  # lists what was written


@dataclass
class World:
    """Scenes by split. Training scenes differ from pool to pool; validation and test scenes are shared by all."""

    out: Path
    seed: int
    val_images: int
    train_images: dict[str, int]  # pool -> number
    quiet: bool = False
    _written: set[Path] = field(default_factory=set)
    _listed: set[str] = field(default_factory=set)

    def train(self, pool: str) -> Iterator[tuple[int, Scene]]:
        """(image id, scene) of the pool's training images."""
        first = list(POOLS).index(pool) << POOL_BITS
        return self._scenes("train", pool, range(first, first + self.train_images[pool]))

    def val(self) -> Iterator[tuple[int, Scene]]:
        return self._scenes("val", "val", range(self.val_images))

    def test(self) -> Iterator[tuple[int, Scene]]:
        return islice(self.endless_test(), self.val_images)

    def endless_test(self) -> Iterator[tuple[int, Scene]]:
        """The test scenes and those after them, for a split that needs scenes of a kind which the first ones lack."""
        return self._scenes("test", "test", count(TEST_BIT))

    def words(self, scene: Scene, layout: str) -> np.random.Generator:
        """The random generator for wording, one per scene and layout."""
        return np.random.default_rng([scene.seed, *layout.encode()])

    def picture(self, path: str, scene: Scene) -> Path:
        """Write the scene's image to `path`, relative to the data set; layouts that share an image write it once."""
        target = self.file(path)
        if target not in self._written:
            Image.fromarray(scene.image).save(target, quality=95, subsampling=0, compress_level=1)
            self._written.add(target)
        return target

    def file(self, path: str) -> Path:
        """The place of a file of the data set, with its folder made. Files are listed as they are written, so that
        whoever removes the data set knows which files are its own."""
        target = self.out / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if path not in self._listed:
            self._listed.add(path)
            with (self.out / FILES).open("a", encoding="utf-8") as file:
                file.write(f"{path}\n")
        return target

    def _scenes(self, split: str, title: str, indices: range | count) -> Iterator[tuple[int, Scene]]:
        home = "train" if split == "train" else "val"
        bar = tqdm(indices, desc=f"  {title}", unit="picture", leave=False, disable=self.quiet or None)
        for number, index in enumerate(bar, ID_OFFSET[split]):
            yield number, make_scene(scene_seed(home, index, self.seed))
