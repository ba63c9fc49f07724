"""Every cited section of a specification sheet exists (docs/spec), and every link of the documents leads to a file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SPEC = ROOT / "docs" / "spec"
SHEETS = {path.stem: path for path in sorted(SPEC.glob("*.md")) if path.stem != "README"}
LEFT_OUT = {".git", ".venv", "runs", "dataset", "output", "vis_output", ".pytest_cache", ".ruff_cache", ".hypothesis"}
SUFFIXES = {".py", ".yaml", ".yml", ".toml", ".sh", ".sbatch", ".md"}

SECTION = r"(?:\d+(?:\.\d+)*|[Aa]ppendix [A-Z])\b"
MORE = rf"(?:\s*(?:,|;|and|to|[-–]|,?\s*§)\s*§?{SECTION}(?!%|\.\d))*"  # 4.3 to 4.6; 1.6, 1.7; 4.2-4.3
GAP = r"[`)\s]*(?:\s|\n\s*#\s*)(?:section\s+|§\s*)?"  # a citation may run over the end of a comment's line
CITATIONS = (  # `name` and `sections`
    # lisa.md 5.3 | docs/spec/lisa.md 5.3 | `lisa.md` section 5.3
    re.compile(rf"\b(?P<name>[a-z0-9_]+)\.md{GAP}(?P<sections>{SECTION}(?!%){MORE})"),
    # (lisa 4.6, sesame 4.3)
    re.compile(rf"(?<![\w./-])(?P<name>{'|'.join(SHEETS)})\s+§?(?P<sections>\d+(?:\.\d+)+{MORE})"),
    # LISA §5.3
    re.compile(rf"\b(?P<name>(?i:{'|'.join(SHEETS)}))\s+§(?P<sections>{SECTION}{MORE})"),
    # lisa.md#53-loss
    re.compile(r"\b(?P<name>[a-z0-9_]+)\.md#(?P<anchor>[\w-]+)"),
)
ITEM = re.compile(r",?\s+(?:check|item|row|point)\s+(?P<item>\d+)")


class Citation(NamedTuple):
    where: str
    name: str
    section: str  # a number, or the anchor of a heading
    item: str | None = None


def files() -> list[Path]:
    tops = [path for path in ROOT.iterdir() if path.name not in LEFT_OUT]
    found = [path for top in tops for path in ([top] if top.is_file() else top.rglob("*"))]
    return sorted(path for path in found if path.suffix in SUFFIXES and path.is_file())


def citations(text: str, where: str) -> Iterator[Citation]:
    for pattern in CITATIONS:
        for match in pattern.finditer(text):
            name, place = match["name"].lower(), f"{where}:{text.count(chr(10), 0, match.start()) + 1}"
            if "anchor" in match.groupdict():
                yield from [Citation(place, name, match["anchor"])] if name in SHEETS else []
                continue
            sections = [section.removeprefix("appendix ") for section in re.findall(SECTION, match["sections"])]
            if name not in SHEETS and "." not in sections[0]:
                continue  # a number after another document's name
            item = ITEM.match(text, match.end())
            yield from (Citation(place, name, section) for section in sections[:-1])
            yield Citation(place, name, sections[-1], item and item["item"])


def sections(sheet: Path) -> dict[str, str]:
    """Number (and anchor) of every heading of a sheet, with the text below it up to the next of its level or above."""
    text = sheet.read_text(encoding="utf-8")
    headings = list(re.finditer(r"^(#{2,6}) (.*)$", text, re.MULTILINE))
    found = {}
    for index, heading in enumerate(headings):
        after = (other.start() for other in headings[index + 1 :] if len(other[1]) <= len(heading[1]))
        body = text[heading.end() : next(after, len(text))]
        found[_anchor(heading[2])] = body
        if number := re.match(r"(?:Appendix )?(\d+(?:\.\d+)*|[A-Z])(?:\.?\s)", heading[2]):
            assert number[1] not in found, f"{sheet.name} has two sections {number[1]}"
            found[number[1]] = body
    return found


def _anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def problem(citation: Citation, known: dict[str, dict[str, str]]) -> str | None:
    if citation.name not in known:
        return f"{citation.where}: there is no sheet {citation.name}.md; there are {', '.join(sorted(known))}"
    body = known[citation.name].get(citation.section)
    if body is None:
        return f"{citation.where}: {citation.name}.md has no section {citation.section}"
    if citation.item and not re.search(rf"^(?:{citation.item}\. |\| {citation.item} \|)", body, re.MULTILINE):
        return f"{citation.where}: {citation.name}.md {citation.section} has no item {citation.item}"
    return None


def test_cited_sections_exist():
    known = {name: sections(path) for name, path in SHEETS.items()}
    found = []
    for path in files():
        if path != Path(__file__).resolve():
            found += citations(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    cited = {citation.name for citation in found if not citation.where.startswith("docs/")}
    assert {"lisa", "lasagna", "gsva", "pixellm", "sesame"} <= cited, "the patterns find no citation of some sheets"
    assert not [text for citation in found if (text := problem(citation, known))]


def test_references_inside_a_sheet_exist():
    """§2.5 without a name means the sheet itself."""
    for name, path in SHEETS.items():
        known, text = sections(path), path.read_text(encoding="utf-8")
        foreign = re.compile(rf"(?i:{'|'.join(SHEETS)})(?:\.md`?'?s?)?\s+§[\d.–, -]+")
        for match in re.finditer(rf"§({SECTION})", foreign.sub("", text)):
            assert match[1] in known, f"{name}.md has no section {match[1]}, which it refers to"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the loss (lisa.md 5.3)", [("lisa", "5.3")]),
        ("beside it (lisa 4.6, sesame 4.3).", [("lisa", "4.6"), ("sesame", "4.3")]),
        ("see docs/spec/lisa.md 5.3.", [("lisa", "5.3")]),
        ("`lisa.md` section 5.3", [("lisa", "5.3")]),
        ("(lisa.md 3.4, 4.3 to 4.6)", [("lisa", "3.4"), ("lisa", "4.3"), ("lisa", "4.6")]),
        ("(lisa.md 4.2-4.3, lasagna.md 5.2), Pascal VOC", [("lisa", "4.2"), ("lisa", "4.3"), ("lasagna", "5.2")]),
        ("measuring rounds (lisa.md 2.4 and 3.2)", [("lisa", "2.4"), ("lisa", "3.2")]),
        ("# the state before it (lisa.md\n# 1.5)", [("lisa", "1.5")]),
        ("pixellm.md 0: the constant is 1/6", [("pixellm", "0")]),
        ("= LISA §1.2–1.3. Base", [("lisa", "1.2"), ("lisa", "1.3")]),
        ("[loss](docs/spec/lisa.md#53-loss)", [("lisa", "53-loss")]),
        ("(lasagna.md appendix A)", [("lasagna", "A")]),
        ("lisa 7b, lisa 13B, configs/lisa.yaml 5, your_data.md 3, lisa.md says", []),
    ],
)
def test_spellings_of_a_citation(text: str, expected: list[tuple[str, str]]):
    assert [(citation.name, citation.section) for citation in citations(text, "x")] == expected


def test_a_wrong_citation_is_found():
    known = {name: sections(path) for name, path in SHEETS.items()}
    (wrong,) = citations("(lisa.md 5.33)", "x.py")
    assert problem(wrong, known) == "x.py:1: lisa.md has no section 5.33"
    (unknown,) = citations("(lsia.md 5.3)", "x.py")
    assert "there is no sheet lsia.md" in problem(unknown, known)
    right, beyond = citations("pixellm.md 12, check 10; pixellm.md 12, check 99", "x.py")
    assert right.item == "10" and problem(right, known) is None
    assert problem(beyond, known) == "x.py:1: pixellm.md 12 has no item 99"


def test_links_of_the_documents_lead_to_files():
    """Relative links and images of every Markdown file; after `#` a heading of the file."""
    gone = []
    for path in files():
        if path.suffix != ".md":
            continue
        text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text):
            target, _, anchor = link.partition("#")
            file = (path.parent / target).resolve() if target else path
            if not file.exists() or not file.is_relative_to(ROOT):
                gone.append(f"{path.relative_to(ROOT)}: {link}")
            elif anchor and anchor not in {_anchor(h) for h in re.findall(r"^#+ (.*)$", file.read_text(), re.M)}:
                gone.append(f"{path.relative_to(ROOT)}: {link} (no such heading)")
    assert not gone


def test_sheets_are_introduced():
    """What a stranger must know: what it is, which paper and revision, and where the marks are explained."""
    index = (SPEC / "README.md").read_text(encoding="utf-8")
    for name, path in SHEETS.items():
        introduction = path.read_text(encoding="utf-8").split("\n## ")[0]
        assert introduction.startswith("# ") and "specification of the published system" in introduction, name
        assert "(README.md)" in introduction and re.search(r"arXiv \d{4}\.\d{5}|NeurIPS", introduction), name
        assert re.search(r"20\d\d", introduction), f"{name}: which revision?"
        assert f"({name}.md)" in index
