"""docs/tree.md is what the modules say of themselves."""

from __future__ import annotations

from tools.tree import FOLDERS, ROOT, document, first_sentence


def test_the_page_is_fresh():
    page = (ROOT / "docs/tree.md").read_text(encoding="utf-8")
    assert page == document(), "stale: run `python -m tools.tree > docs/tree.md`"


def test_every_module_says_what_it_is_for():
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path.read_text().strip()]
    assert not [str(path.relative_to(ROOT)) for path in files if not first_sentence(path)]
