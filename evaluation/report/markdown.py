"""Results as a page of Markdown: one table a suite, every figure with its variant, protocol and interval."""

from __future__ import annotations

from typing import Any


def as_markdown(results: dict[str, Any]) -> str:
    """`results` as `evaluate` and `rescore` return them."""
    parts = ["# Results"]
    for name, suite in results["suites"].items():
        asked = f"{suite['pictures']} pictures, {suite['queries']} queries, {suite['seconds']:.0f} s"
        failed = f"answers that could not be read: {suite['parse_failures']}, cut off: {suite['unfinished']}"
        rows = ["| metric | variant | protocol | value | 95 % interval |", "| --- | --- | --- | ---: | --- |"]
        for figure in suite["figures"]:
            words = (
                figure["metric"],
                figure["variant"],
                figure["protocol"],
                format_value(figure["value"]),
                format_interval(figure),
            )
            rows.append("| " + " | ".join(map(in_cell, words)) + " |")
        done = "".join(f" {plain(note[0].upper() + note[1:])}." for note in suite["notes"])
        parts.append(f"## {plain(name)}\n\n{asked}; {failed}.{done}\n\n" + "\n".join(rows))
    parts += [f"## {plain(name)}\n\nNot evaluated. {plain(text)}" for name, text in results["missing"].items()]
    return "\n\n".join(parts) + "\n"


def plain(text: str) -> str:
    """Text in which Markdown finds no HTML."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


def in_cell(text: str) -> str:
    return plain(text).replace("|", "\\|")


def format_value(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def format_interval(figure: dict[str, Any]) -> str:
    """The interval of a figure, "" where none is estimated."""
    return "{:.4f} to {:.4f}".format(*figure["interval"]) if figure["interval"] else ""
