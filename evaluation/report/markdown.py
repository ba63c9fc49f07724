"""Results as text: a page of Markdown with one table per suite, and a table for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evaluation.metrics.base import Figure

if TYPE_CHECKING:  # results.py writes the page
    from evaluation.results import EvaluationResults


def as_markdown(results: EvaluationResults) -> str:
    """One table per suite, every figure with its variant, protocol and interval."""
    parts = ["# Results"]
    for name, suite in results.suites.items():
        asked = f"{suite.images} images, {suite.queries} queries, {suite.seconds:.0f} s"
        failed = f"answers that could not be read: {suite.parse_failures}, cut off: {suite.unfinished}"
        rows = ["| metric | variant | protocol | value | 95 % interval |", "| --- | --- | --- | ---: | --- |"]
        for figure in suite.figures:
            cells = (figure.metric, figure.variant, suite.protocol, format_value(figure), format_interval(figure))
            rows.append("| " + " | ".join(map(_in_cell, cells)) + " |")
        notes = "".join(f" {_escape(note[0].upper() + note[1:])}." for note in suite.notes)
        parts.append(f"## {_escape(name)}\n\n{asked}; {failed}.{notes}\n\n" + "\n".join(rows))
    parts += [f"## {_escape(name)}\n\nNot evaluated. {_escape(reason)}" for name, reason in results.missing.items()]
    return "\n\n".join(parts) + "\n"


def as_table(results: EvaluationResults) -> str:
    """Every figure on a line of its own, with suite, variant and protocol."""
    width = max([24, *(len(name) + 2 for name in results.suites)])
    lines = [f"{'suite':<{width}}{'metric':<18}{'variant':<13}{'protocol':<16}{'value':>8}  images    95 % interval"]
    for name, suite in results.suites.items():
        for figure in suite.figures:
            lines.append(
                f"{name:<{width}}{figure.metric:<18}{figure.variant:<13}{suite.protocol:<16}{format_value(figure):>8}"
                f"  {suite.images:<8}  {format_interval(figure)}".rstrip()
            )
        lines += [f"  {name}: {note}" for note in suite.notes]
        problems = {
            "left_out": suite.left_out,
            "parse_failures": suite.parse_failures,
            "unfinished": suite.unfinished,
        }
        if any(problems.values()):
            lines.append(f"  {name}: " + ", ".join(f"{key} {count}" for key, count in problems.items() if count))
    lines += [f"{name}: not evaluated. {reason}" for name, reason in results.missing.items()]
    return "\n".join(lines)


def format_value(figure: Figure) -> str:
    """The value of a figure, "-" where nothing was counted."""
    return "-" if figure.value is None else f"{figure.value:.4f}"


def format_interval(figure: Figure) -> str:
    """The interval of a figure, "" where none is estimated."""
    return "{:.4f} to {:.4f}".format(*figure.interval) if figure.interval else ""


def _escape(text: str) -> str:
    """Text in which Markdown finds no HTML."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _in_cell(text: str) -> str:
    return _escape(text).replace("|", "\\|")
