"""How the toy world names things, and which facts are clear enough in the image to be mentioned."""

from toy.world.scene import SIDE, Scene, Thing
from toy.world.shapes import MAIN, OBJECTS, PARTS

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
ORDINALS = ("first", "second", "third")
_PLURALS = {"fish": "fish", "person": "people", "bus": "buses"}
_PAINTED = {  # the parts that carry an object's colour
    name: tuple(dict.fromkeys(layer.part for layer in shape.layers if layer.paint == MAIN))
    for name, shape in OBJECTS.items()
}
COLOR_PIXELS = 40  # an object's colour is mentioned when at least this much of its coloured parts shows
LARGE_SIDE = 43  # pixels; a large object hidden down to less than this looks small


def plural(name: str) -> str:
    return _PLURALS.get(name, name + "s")


def with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def join(phrases: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))


def noun(thing: Thing, *, color: bool = True, size: bool = False) -> str:
    """ "small red car", "person in red": the thing's name with the requested properties, as far as they show."""
    words = [thing.size] if size and shows_size(thing) else []
    if not (color and shows_color(thing)):
        return " ".join([*words, thing.name])
    if thing.name == "person":
        return " ".join([*words, "person in", thing.color])
    return " ".join([*words, thing.color, thing.name])


def shows_color(thing: Thing) -> bool:
    """Whether enough of the coloured part is in view."""
    painted = [thing.parts[part] for part in _PAINTED.get(thing.name, ()) if part in thing.parts]
    masks = painted if thing.name in PARTS else [thing.mask]
    return bool(thing.color) and sum(int(mask.sum()) for mask in masks) >= COLOR_PIXELS


def shows_size(thing: Thing) -> bool:
    """Whether the thing looks as large or small as it is, in spite of what hides it."""
    return bool(thing.size) and (across(thing) >= LARGE_SIDE) == (thing.size == "large")


def across(thing: Thing) -> int:
    x0, y0, x1, y1 = thing.box
    return max(x1 - x0, y1 - y0)


def center(thing: Thing) -> tuple[float, float]:
    x0, y0, x1, y1 = thing.box
    return (x0 + x1) / 2, (y0 + y1) / 2


def place(thing: Thing) -> str:
    """The thing's cell of a 3 x 3 grid over the image: "at the top left", "in the middle", …"""
    x, y = center(thing)
    where = " ".join(filter(None, (_end(y, "top", "bottom"), _end(x, "left", "right"))))
    return f"at the {where}" if where else "in the middle"


def _end(position: float, first: str, last: str) -> str:
    """The name of the outer third that `position` is in; "" for the middle."""
    if position < 0.36 * SIDE:
        return first
    return last if position > 0.64 * SIDE else ""


def by_class(scene: Scene) -> dict[str, list[int]]:
    """Indices into `scene.things` of each class that is in view, stuff included."""
    groups: dict[str, list[int]] = {}
    for index, thing in enumerate(scene.things):
        groups.setdefault(thing.name, []).append(index)
    return groups
