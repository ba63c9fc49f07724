"""Example images of the web page: scenes that no toy model was trained on, each with a question that fits it."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from toy.world.scene import make_scene, scene_seed

EXAMPLES = (  # index of a validation scene, kind of question, its words
    (11, "classes", "sky, sand, airplane, boat, clock"),
    (24, "phrases", "the orange boat, the white airplane, the black flag"),
    (0, "question", "which part of this picture shows the thing that floats and sails?"),
    (5, "classes", "sky, road, ball, flower, boat"),
)


def write_examples(folder: Path) -> list[tuple[Path, str, str]]:
    """Writes the images as PNG files; returns file, kind of question and words of each."""
    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for index, kind, words in EXAMPLES:
        file = folder / f"toy_scene_{index}.png"
        Image.fromarray(make_scene(scene_seed("val", index)).image).save(file)
        examples.append((file, kind, words))
    return examples
