"""Dialogues and descriptions of COCO images (LLaVA-Instruct, lisa.md 4.5), and questions with short answers."""

import json

from toy.world.layouts.world import World
from toy.world.scene import OBJECTS, Scene
from toy.world.talk import captions, dialogues
from toy.world.words import NUMBERS, by_class, plural, shows_color, with_article

REQUESTS = ("describe this picture.", "what is in this picture?", "tell me what you see in this picture.")
DIALOGUES = 2  # at most per image


def llava_instruct(world: World) -> str:
    """llava_dataset/llava_instruct_150k.json; images in coco/train2017."""
    entries = []
    for number, scene in world.train("coco2017"):
        name = f"{number:012d}"
        world.picture(f"coco/train2017/{name}.jpg", scene)
        rng = world.words(scene, "llava")
        request = REQUESTS[rng.integers(len(REQUESTS))]
        options = captions(scene, rng)
        talks = [[(request, options[rng.integers(len(options))])], *dialogues(scene, rng)[:DIALOGUES]]
        entries += [{"id": name, "image": f"{name}.jpg", "conversations": _turns(talk)} for talk in talks]
    world.file("llava_dataset/llava_instruct_150k.json").write_text(json.dumps(entries, indent=1))
    return f"{len(entries)} dialogues"


def short_answers(world: World) -> str:
    """vqa/{train,val}.json next to the images: number, colour and presence, answered in a word."""
    questions = 0
    for split, scenes in (("train", world.train("cityscapes")), ("val", world.val())):
        entries = []
        for number, scene in scenes:
            name = f"{split}/{number}.jpg"
            world.picture(f"vqa/{name}", scene)
            entries += [{"image": name, **entry} for entry in _short(world, scene)]
        world.file(f"vqa/{split}.json").write_text(json.dumps(entries, indent=1))
        questions += len(entries)
    return f"{questions} questions"


def _short(world: World, scene: Scene) -> list[dict[str, str | list[str]]]:
    """One question of each kind, as far as the scene allows it."""
    rng = world.words(scene, "vqa")
    groups = by_class(scene)
    objects = [name for name in groups if name in OBJECTS]
    absent = [name for name in OBJECTS if name not in groups]
    present_name = objects[rng.integers(len(objects))]
    absent_name = absent[rng.integers(len(absent))]
    number = len(groups[present_name])
    entries: list[dict[str, str | list[str]]] = [
        {"question": f"How many {plural(present_name)} are there?", "answers": [NUMBERS[number], str(number)]},
        {"question": f"Is there {with_article(absent_name)}?", "answer": "no"},
        {"question": f"Is there {with_article(present_name)}?", "answer": "yes"},
    ]
    single = [name for name in objects if len(groups[name]) == 1 and name != "person"]
    colored = [name for name in single if shows_color(scene.things[groups[name][0]])]
    for name in colored[:1]:
        entries.append({"question": f"What color is the {name}?", "answer": scene.things[groups[name][0]].color})
    return entries


def _turns(talk: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Human and gpt in turn; the first question has the image token."""
    turns = []
    for position, (question, answer) in enumerate(talk):
        prefix = "<image>\n" if position == 0 else ""
        turns += [{"from": "human", "value": prefix + question}, {"from": "gpt", "value": answer}]
    return turns
