"""The log and the README that stand beside the base: what it is, how it was made, what was measured."""

import json
from pathlib import Path

from toy.base.publish import LLAVA_FOLDER, SAM_FILE

LOG = "train_log.jsonl"
STAGES = {"tower": "vision tower alone", "llava": "LLaVA (tower, projector, language model)", "sam": "SAM"}
_TEXT = """# The toy base

The counterparts of LLaVA and SAM for the toy world, trained from nothing on procedural scenes by
`python scripts/make_toy_base.py` (its log: `{log}`). They were never shown a mask token, a scene of the toy datasets,
or a scene twice.

| file | what | bytes |
|---|---|---|
| `{folder}/` | a Hugging Face LLaVA folder: CLIP tower 128 px, patch 8, layer -2; LLaMA 256 wide | {llava} |
| `{sam}` | SAM under upstream's names: ViT 160 wide, 160 px, patch 8, prompts of 128 | {sam_bytes} |

All weights are fp16. The vocabulary has 1792 sentencepiece pieces, then `<im_patch>` (the `image_token_index`),
`<im_start>` and `<im_end>`, as LLaVA v1.1 has them. Places are one word each, column letter and row letter on a
16 x 16 grid.

| stage | training time, one core | steps | held-out figures |
|---|---|---|---|
{rows}

In the table, `present` and `find` ask for lists of classes, `shown` and `absent` are the accuracies on classes that
are and are not in view, `near` is the share of place words within one cell; all are of single tokens with the truth so
far given. IoUs of SAM are at half the input side for points, boxes, several points, and part / thing / class levels.
"""


def write_report(scratch: Path, out: Path) -> Path:
    """Join the stages' logs into <out>/train_log.jsonl and write <out>/README.md from them."""
    lines = [line for stage in STAGES for line in (scratch / f"{stage}.jsonl").read_text().splitlines()]
    (out / LOG).write_text("\n".join(lines) + "\n", encoding="utf-8")
    last = {entry["stage"]: entry for entry in map(json.loads, lines) if "held_out" in entry}
    text = _TEXT.format(
        log=LOG,
        folder=LLAVA_FOLDER,
        sam=SAM_FILE,
        llava=(out / LLAVA_FOLDER / "model.safetensors").stat().st_size,
        sam_bytes=(out / SAM_FILE).stat().st_size,
        rows="\n".join(_row(stage, entry) for stage, entry in last.items()),
    )
    (out / "README.md").write_text(text, encoding="utf-8")
    return out / "README.md"


def _row(stage: str, entry: dict) -> str:
    figures = ", ".join(f"{name} {value:.3f}" for name, value in entry["held_out"].items())
    return f"| {STAGES[stage]} | {entry['seconds'] / 60:.0f} min | {entry['step']} | {figures} |"
