"""Objects as entries of COCO-style annotation files."""

from toy.world.layouts.labels import label_table, label_values
from toy.world.polygons import coco_polygons, rle
from toy.world.scene import CLASSES, Scene, Thing

THINGS_PER_IMAGE = 16  # the next image's annotation ids start this much later
FIRST_TOY_CATEGORY = 201  # for classes that COCO does not have


def image_entry(scene: Scene, number: int, file_name: str) -> dict:
    height, width = scene.image.shape[:2]
    return {"id": number, "file_name": file_name, "height": height, "width": width}


def annotation(scene: Scene, index: int, number: int, *, as_rle: bool = False) -> dict:
    """The entry of one thing. as_rle: a list with one run-length mask, as in RefCLEF, instead of polygons."""
    thing = scene.things[index]
    return {
        "id": annotation_id(number, index),
        "image_id": number,
        "category_id": category_id(thing.name),
        "segmentation": [rle(thing.mask)] if as_rle else coco_polygons(thing.mask),
        "area": int(thing.mask.sum()),
        "bbox": bbox(thing),
        "iscrowd": 0,
    }


def annotation_id(number: int, index: int) -> int:
    return number * THINGS_PER_IMAGE + index


def bbox(thing: Thing) -> list[int]:
    x0, y0, x1, y1 = thing.box
    return [x0, y0, x1 - x0, y1 - y0]


def object_indices(scene: Scene) -> list[int]:
    return [index for index, thing in enumerate(scene.things) if not thing.stuff]


def category_id(name: str) -> int:
    """COCO's id, which is one more than COCO-Stuff's label value."""
    values = label_values("cocostuff")
    return values[name] + 1 if name in values else FIRST_TOY_CATEGORY + CLASSES.index(name)


def categories() -> list[dict]:
    names = dict(label_table("cocostuff"))
    entries = ((category_id(name), names.get(category_id(name) - 1, name)) for name in CLASSES)
    return [{"id": value, "name": name, "supercategory": "toy"} for value, name in sorted(entries)]
