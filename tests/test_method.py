"""docs/method.md stays true: its example prints what the page shows, its diagram and numbers agree with the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from data.encode import Encoder
from data.tokens import load_tokenizer
from data.types import Mask, Refuse, Turn
from systems.base import build_system
from utils.config import LossConfig

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "method.md"
TEXT = PAGE.read_text(encoding="utf-8")
SVG = "{http://www.w3.org/2000/svg}"


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    return found


def test_the_example_prints_what_the_page_shows():
    run = subprocess.run([sys.executable, "-c", block("python")], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == block("text"), f"paste this into {PAGE.name}:\n{run.stdout}"


def test_mask_positions_stand_before_the_mask_tokens():
    """What the page says of its example, without the page."""
    tokens = build_system("lasagna").tokens
    tokenizer = load_tokenizer(ROOT / "assets" / "toy" / "llava", tokens)
    row = Encoder(tokenizer, tokens)(
        (Turn("<image>\nSegment it.", ("sky", Mask(1), "dog", Refuse(2), "road", Mask(0))),)
    )
    names = tokenizer.convert_ids_to_tokens([max(0, token) for token in row.ids])
    assert row.holes == (1, 0) and row.refused == 1
    for (position,), name in zip(row.mask_positions, ("▁sky", "▁road"), strict=True):
        assert (names[position], names[position + 1]) == (name, "<ins>")


def test_the_weights_of_the_loss_are_the_recipes():
    loss = LossConfig()
    for place in (TEXT, (ROOT / "docs" / "method.svg").read_text(encoding="utf-8")):
        found = re.search(r"([\d.]+) · (?:CE|cross entropy)[^+]*\+ ([\d.]+) · BCE \+ ([\d.]+) · dice", place)
        assert found and tuple(map(float, found.groups())) == (loss.ce, loss.bce, loss.dice)


def test_the_diagram_is_text_for_both_colour_schemes():
    root = ElementTree.parse(ROOT / "docs" / "method.svg").getroot()
    texts = {"".join(node.itertext()) for node in root.iter(f"{SVG}text")}
    assert {"CLIP tower", "projector", "mask decoder", "SAM image encoder", "image embedding"} <= texts
    assert root.find(f"{SVG}title") is not None and root.find(f"{SVG}desc") is not None
    style = root.find(f"{SVG}style").text
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    for name in (".page", "text", ".frozen", ".trains", ".token", ".mask-token", ".flow"):
        assert re.search(rf"{re.escape(name)}\b", light) and re.search(rf"{re.escape(name)}\b", dark), name
    used = {name for node in root.iter() for name in (node.get("class") or "").split()}
    assert not {name for name in used if f".{name}" not in style}, "classes without a style"
    _, _, width, height = map(float, root.get("viewBox").split())
    for node in root.iter(f"{SVG}rect"):
        x, y = float(node.get("x") or 0), float(node.get("y") or 0)
        assert x + float(node.get("width")) <= width and y + float(node.get("height")) <= height
