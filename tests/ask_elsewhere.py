"""A program that loads merged folders with transformers alone, as somebody without this project would.

    python -I ask_elsewhere.py SETTINGS.json

Settings: names of packages that are to count as not installed (without), folders, images, a question (asked), tokens
of an answer (tokens), scripts to run (snippets), and the project's root, from which no module may come. Writes
<folder>.npz and heard.json.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any


def answers(ask: Any, segment: Any, classes: Any, chat: Any, image: Any, question: str) -> tuple[list, list]:
    """What four ways of asking about an image give: texts and the like, and the masks."""
    conversation = chat(image)
    rounds = [ask(image, question), conversation.ask(question), conversation.ask(question)]
    segments = [*segment(image, ["cup", "dog"]), *classes(image, ["sky", "boat"])]
    segments += [one for answer in rounds for one in answer.segments]
    told: list = [answer.text for answer in rounds]
    told += [[one.phrase, one.text, one.score, one.mask is not None] for one in segments]
    return told, [one.mask for one in segments if one.mask is not None]


def main(settings: dict[str, Any]) -> None:
    sys.modules.update(dict.fromkeys(settings["without"]))  # an import of any of them fails
    import numpy as np
    from transformers import AutoConfig, AutoModel

    heard = {}
    for folder in settings["folders"]:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        assert type(config).__module__.startswith("transformers.")
        model = AutoModel.from_pretrained(folder, trust_remote_code=True, max_new_tokens=settings["tokens"])
        asked = (model.predict, model.segment, model.classes, model.chat)
        heard[folder], masks = answers(*asked, settings["image"], settings["question"])
        np.savez(f"{folder}.npz", *masks)
    for snippet in settings["snippets"]:
        runpy.run_path(snippet)
    files = [str(getattr(module, "__file__", "")) for module in list(sys.modules.values())]
    own = [file for file in files if file.startswith(settings["project"]) and "site-packages" not in file]
    assert not own, f"modules of the project were imported: {own}"
    Path("heard.json").write_text(json.dumps(heard))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
