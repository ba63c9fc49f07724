"""Plain English: habits of wording that docstrings, comments, messages and documents must not have.

`python tests/test_language.py [FOLDER or FILE ...]` prints every offence as file:line with what to write, then counts.
The numbers in `REMAINING` may only fall: who mends some lowers them.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = {".git", ".venv", ".ci", "runs", "dataset", "output", "vis_output", "assets", "__pycache__"}
LEFT_OUT |= {"tree.md"}  # generated from docstrings
HASH_COMMENTS = {".yaml", ".yml", ".sh", ".sbatch", ".toml"}


def one_of(words: str) -> str:
    return "(?:" + "|".join(words.split()) + ")"


NUMBER = one_of(r"one two three four five six ten several many more most few \d+(?:[.,]\d+)*")
UNIT = one_of(
    """annotation answer batch benchmark billion card category cell checkpoint class column core data[-_]?set day
    device dialogue element entry epoch evaluation example expression figure file folder gpu group head hour
    image instance item key layer level line machine mask metric micro-batch minute model module node object
    package page paper parameter part patch person phrase picture piece pixel process prompt query question
    rank recipe record round row run sample scale second sentence sequence set shard slot source split step
    suite system target task test thing token turn value video view weight worker yaml"""
)
COUNTED = one_of(
    """answer bit block box byte call cell channel character class colour column comparison count dialogue draw
    entry epoch example expression fact feature figure file folder forward gb gib gpu group head hour id
    image instance item kb kib label layer level line machine mask mb megabyte mib minute ms name number
    object panel pass patch phrase picture piece pixel plot png point position process prompt query question
    rank recipe record round row run sample scale second sentence set state step table target task test
    thread time token turn update value vector weight word worker"""
)
PLURALS = one_of(  # of those that are hardly ever verbs: "tokens a mask" is "per mask", "names a file" is not
    """bits blocks boxes bytes calls cells channels characters classes colours columns counts dialogues draws
    entries epochs examples expressions facts features figures files folders [gmk]i?b gpus groups heads
    hours ids images instances items labels layers levels lines machines masks megabytes minutes ms objects
    panels passes patches phrases pictures pieces pixels plots positions processes prompts queries questions
    ranks recipes records rounds rows samples scales seconds sentences sets states steps targets tasks
    threads times tokens turns updates values vectors weights words workers"""
)
NO_COMPOUND = (
    r"(?! (?:of|decoder|encoder|head|token|position|embedding|model)s?\b)"  # "prompts a mask decoder" is right
)


@dataclass(frozen=True)
class Rule:
    """pattern: what offends, whatever its case. write: what a reader expects in its place."""

    name: str
    pattern: str
    write: str


RULES = (
    Rule("told", r"\b(?:un)?told\b", "given, given by, read from, inferred from"),
    Rule("behind", r"\bbehind\b", "after"),
    Rule("anew", r"\banew\b", "again, from scratch"),
    Rule("so many", r"\bso many\b(?! \w+ that\b)", "this many, N"),
    Rule("alike", r"\b(?:alike|likewise)\b", "the same, equal, both; or drop it"),
    Rule("filler", r"\b(?:by nature|for ever|all the same|of old)\b", "drop it"),
    Rule("go on", r"\b(?:go|goes|going|went|gone) on\b(?! (?:at|in|to)\b)", "resumes, continues"),
    Rule("beside", r"\bbeside\b", "next to, in addition to, together with"),
    Rule("chance", r"\b(?:by chance|chance decides|no chance|has no say)\b", "at random, randomness, sampled"),
    Rule("drawn", r"\b(?:redrawn?|drawn|undrawn)\b", "sampled, rasterised, decoded, initialised, rendered"),
    Rule("picture", r"(?<![-/\"'])\bpictures?\b(?![/\"'])(?!\.\w)", "image"),  # not in flags, folders and file names
    Rule("a for per", rf"\b{PLURALS} an? {UNIT}\b{NO_COMPOUND}", "per"),
    Rule("a for per", rf"\b(?:once|twice|thrice|times|each) an? {UNIT}\b{NO_COMPOUND}", "per"),
    Rule("a for per", rf"\b(?:an?|{NUMBER}) (?:[\w<>./-]+ )?{COUNTED}s? an? {UNIT}\b{NO_COMPOUND}", "per"),
    Rule("a for per", rf"\b(?:one|two|three|\d+(?:[.,]\d+)*) an? {UNIT}\b{NO_COMPOUND}", "per"),
    Rule("a for per", rf"\b(?:one|two|an?) [\w<>./]+\.(?:py|yaml|md|json|sh) an? {UNIT}\b", "per"),
)
ALLOWED = (  # whole phrases in which a pattern is right
    "behind the scenes",
    "picture element",
    "told apart",
)
# The toy world's sentences are data: balls lie behind boxes there. Elsewhere a string of several words is a message.
PHRASES = ("toy", "tests", "wording")
SENTENCE = 5  # words
# Calls whose string arguments are read by people, however short.
SPOKEN = {"print", "log", "info", "warning", "error", "debug", "fail", "add_argument", "exit", "SystemExit"}


# Offences that remain, by folder. An empty table is the aim.
REMAINING: dict[str, int] = {}


@dataclass(frozen=True)
class Offence:
    path: Path
    line: int
    rule: Rule
    text: str

    def __str__(self) -> str:
        where = self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path
        return f"{where}:{self.line}: {self.text!r} ({self.rule.name}; write: {self.rule.write})"


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of everything in a file that is written for people."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from _python(text, sentences=not set(PHRASES) & set(path.parts))
    elif path.suffix == ".md":
        yield from _markdown(text)
    elif path.suffix in HASH_COMMENTS:
        found = (re.search(r"(?:^|\s)#(?!!)\s*(.*)", line) for line in text.splitlines())
        yield from _joined((number, comment.group(1)) for number, comment in enumerate(found, 1) if comment)


def _python(text: str, *, sentences: bool) -> Iterator[tuple[int, str]]:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = (token for token in tokens if token.type == tokenize.COMMENT and not token.string.startswith("#!"))
    yield from _joined((token.start[0], token.string.lstrip("# ")) for token in comments)
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body
            if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                yield from _constant(body[0].value)
        elif isinstance(node, ast.Raise) and node.exc is not None:
            yield from _strings(node.exc)
        elif isinstance(node, ast.Assert) and node.msg is not None:
            yield from _strings(node.msg)
        elif isinstance(node, ast.Call) and _callee(node.func) in SPOKEN:
            yield from _strings(node)
        elif sentences and isinstance(node, ast.Constant) and len(str(node.value).split()) >= SENTENCE:
            yield from _constant(node)


def _joined(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Comments on consecutive lines as one text, so that a phrase may run over a line's end."""
    start, texts = 0, []
    for number, text in lines:
        if texts and number != start + len(texts):
            yield start, "\n".join(texts)
            texts = []
        start = start if texts else number
        texts.append(text)
    if texts:
        yield start, "\n".join(texts)


def _callee(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _strings(node: ast.AST) -> Iterator[tuple[int, str]]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Constant):
            yield from _constant(inner)


def _constant(node: ast.Constant) -> Iterator[tuple[int, str]]:
    if isinstance(node.value, str):
        yield node.lineno, node.value


def _markdown(text: str) -> Iterator[tuple[int, str]]:
    """Paragraphs outside fenced code, so that a phrase may run over a line's end."""
    fenced, start, paragraph = False, 1, []
    for number, line in enumerate([*text.splitlines(), ""], 1):
        if line.lstrip().startswith("```"):
            fenced, line = not fenced, ""
        if line.strip() and not fenced:
            start = start if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield start, "\n".join(paragraph)
            paragraph = []


def offences(paths: list[Path]) -> list[Offence]:
    """Every offence, file by file, each place once per rule's name."""
    found: dict[tuple[Path, int, str, int], Offence] = {}
    for path in paths:
        for start, raw in prose(path):
            text = re.sub(r"`[^`\n]*`", lambda code: "_" * len(code.group()), raw)  # names of code are no prose
            for phrase in ALLOWED:
                text = re.sub(re.escape(phrase), lambda found: "_" * len(found.group()), text, flags=re.IGNORECASE)
            flat = text.replace("\n", " ")
            flat = re.sub(r"(?<= ) +", lambda blanks: "\0" * len(blanks.group()), flat)  # indents keep their length
            for rule in RULES:
                for match in re.finditer(rule.pattern.replace(" ", r" \0*"), flat, re.IGNORECASE):
                    line = start + raw.count("\n", 0, match.start())
                    offence = Offence(path, line, rule, match.group().replace("\0", ""))
                    found.setdefault((path, start, rule.name, match.end()), offence)
    return sorted(found.values(), key=lambda offence: (str(offence.path), offence.line))


def files(places: list[Path]) -> list[Path]:
    suffixes = {".py", ".md", *HASH_COMMENTS}
    found = []
    for place in places:
        if place.is_dir():
            found += files([path for path in sorted(place.iterdir()) if not _left_out(path)])
        elif place.suffix in suffixes:
            found.append(place)
    return found


def _left_out(path: Path) -> bool:
    if path.resolve() == Path(__file__).resolve():  # its examples offend
        return True
    parts = path.relative_to(ROOT).parts if path.is_relative_to(ROOT) else path.parts
    return bool(LEFT_OUT & set(parts))


def test_plain_english():
    """Folder by folder, no more than there were."""
    found = offences(files([ROOT]))
    counts = Counter(_top(offence.path) for offence in found)
    more = [str(offence) for offence in found if counts[_top(offence.path)] > REMAINING.get(_top(offence.path), 0)]
    assert not more, "\n".join(["habits of wording, see `python tests/test_language.py`:", *more])


OFFENDING = """
\"\"\"Two tokens a mask, told by the weights.\"\"\"
x = 1  # so many rows a
        # picture; `beside` is code
raise ValueError("the run goes on")
NAMES = ("behind",)
"""


def test_offences_are_found_where_they_are(tmp_path: Path):
    """In docstrings, comments (over their lines' ends) and messages; not in code or in names in backquotes."""
    (tmp_path / "x.py").write_text(OFFENDING.lstrip(), encoding="utf-8")
    (tmp_path / "x.md").write_text(
        "One plot a\nkey.\n\n```\nbehind\n```\nIt stands\nbehind `told`.\n", encoding="utf-8"
    )
    found = [(offence.path.name, offence.line, offence.rule.name) for offence in offences(files([tmp_path]))]
    assert found == [
        ("x.md", 1, "a for per"),
        ("x.md", 8, "behind"),
        ("x.py", 1, "told"),
        ("x.py", 1, "a for per"),
        ("x.py", 2, "so many"),
        ("x.py", 2, "a for per"),
        ("x.py", 3, "picture"),
        ("x.py", 4, "go on"),
    ]


def test_plain_sentences_pass(tmp_path: Path):
    text = (
        "It names a file, is a mask, prompts a mask decoder, has two tokens per mask: a list of masks, a key of a row."
    )
    (tmp_path / "x.md").write_text(text, encoding="utf-8")
    assert not offences(files([tmp_path]))


def main(arguments: list[str]) -> int:
    found = offences(files([Path(argument).resolve() for argument in arguments] or [ROOT]))
    for offence in found:
        print(offence)
    for title, counts in (
        ("by rule", Counter(offence.rule.name for offence in found)),
        ("by folder", Counter(_top(offence.path) for offence in found)),
    ):
        print(f"\n{title}: " + ", ".join(f"{name} {count}" for name, count in counts.most_common()))
    return 1 if found else 0


def _top(path: Path) -> str:
    parts = path.relative_to(ROOT).parts if path.is_relative_to(ROOT) else path.parts
    return parts[0] if len(parts) > 1 else "(root)"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
