"""LLaVA-Instruct: dialogues and descriptions of COCO train2017 pictures (lisa.md 4.5)."""

import json

from toyworld.layouts.world import World
from toyworld.talk import captions, dialogues

REQUESTS = ("describe this picture.", "what is in this picture?", "tell me what you see in this picture.")
DIALOGUES = 2  # at most, for one picture


def llava_instruct(world: World) -> str:
    """llava_dataset/llava_instruct_150k.json; pictures in coco/train2017."""
    entries = []
    for number, scene in world.train("coco2017"):
        name = f"{number:012d}"
        world.picture(f"coco/train2017/{name}.jpg", scene)
        rng = world.words(scene, "llava")
        request = REQUESTS[rng.integers(len(REQUESTS))]
        said = captions(scene, rng)
        talks = [[(request, said[rng.integers(len(said))])], *dialogues(scene, rng)[:DIALOGUES]]
        entries += [{"id": name, "image": f"{name}.jpg", "conversations": _turns(talk)} for talk in talks]
    world.file("llava_dataset/llava_instruct_150k.json").write_text(json.dumps(entries, indent=1))
    return f"{len(entries)} dialogues"


def _turns(talk: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Human and gpt in turn; the first question carries the picture."""
    turns = []
    for round_, (question, answer) in enumerate(talk):
        prefix = "" if round_ else "<image>\n"
        turns += [{"from": "human", "value": prefix + question}, {"from": "gpt", "value": answer}]
    return turns
