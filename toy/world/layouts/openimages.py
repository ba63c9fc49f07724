"""Open Images V6 as LaSagnA lays it out: masks of another size than their image (lasagna.md 5.2, 5.6)."""

import json

from PIL import Image

from toy.world.layouts.world import World
from toy.world.scene import CLASSES
from toy.world.words import by_class

LARGER = 2  # mask files have this many times the side of their image


def openimage(world: World) -> str:
    """OpenImageV6/{folder_<split>,<split>-masks,annotations/new/<split>_mask.json} of train and validation."""
    pictures = 0
    for split, scenes in (("train", world.train("mapillary")), ("validation", world.val())):
        files_by_class: dict[str, dict[str, list[str]]] = {}
        for _, scene in scenes:
            name = f"{scene.seed * 0x9E3779B97F4A7C15 % (1 << 64):016x}"  # 16 hexadecimal digits, in no order
            world.picture(f"OpenImageV6/folder_{split}/{name[:2]}/{name}.jpg", scene)
            files_by_class[name] = {}
            for kind, indices in by_class(scene).items():
                files = [f"{name[0]}/{name}_{kind}_{index}.png" for index in indices]
                for file, index in zip(files, indices, strict=True):
                    mask = scene.things[index].mask.repeat(LARGER, axis=0).repeat(LARGER, axis=1)
                    Image.fromarray(mask).save(world.file(f"OpenImageV6/{split}-masks/{file}"))
                files_by_class[name][kind.capitalize()] = files
            pictures += 1
        entries = {**files_by_class, "categories": [name.capitalize() for name in CLASSES]}
        world.file(f"OpenImageV6/annotations/new/{split}_mask.json").write_text(json.dumps(entries))
    return f"{pictures} pictures, {len(CLASSES)} classes"
