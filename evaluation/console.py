"""Lines typed at a terminal: arrow keys and history, commands that begin with a slash, text printed as it comes."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from utils.registry import unknown

SLASH = "/"


@dataclass(frozen=True)
class Command:
    """usage: its name and what follows it, as in `/image PATH`. run: called with what was typed after the name."""

    usage: str
    help: str
    run: Callable[[str], object]

    @property
    def name(self) -> str:
        return self.usage.split()[0]


class Console:
    """Reads lines and runs the commands among them."""

    def __init__(self, commands: Sequence[Command]):
        self.commands = commands
        if sys.stdin.isatty():
            with suppress(ImportError):  # Python for Windows has none; lines can be typed without it
                import readline  # noqa: F401  input() then has arrow keys and a history

    def read(self, prompt: str, *, again: bool = True) -> str | None:
        """The next line without outer blanks; None at the end of input. Ctrl-C drops the line and asks again, or is an
        empty line where `again` is False."""
        while True:
            try:
                return input(prompt).strip()
            except EOFError:
                print()
                return None
            except KeyboardInterrupt:
                if not again:
                    print()
                    return ""
                print(f"\n{SLASH}quit or Ctrl-D leaves.")

    def run(self, line: str) -> bool:
        """Runs a command; an unknown one is answered with the list of all. Returns False where the line is none."""
        if not line.startswith(SLASH):
            return False
        name, _, rest = line.partition(" ")
        command = self.find(line)
        if command is None:
            print(f"{unknown('command', name, [command.name for command in self.commands])}\n{self.help()}")
        else:
            command.run(rest.strip())
        return True

    def find(self, line: str) -> Command | None:
        """The command that a line begins with; None of any other line, such as a path that begins with a slash."""
        return next((command for command in self.commands if command.name == line.partition(" ")[0]), None)

    def help(self) -> str:
        """The commands, one per line."""
        width = max(len(command.usage) for command in self.commands)
        return "\n".join(f"  {command.usage:<{width}}  {command.help}" for command in self.commands)


def typed_path(words: str) -> str:
    """A path as it is typed, or as a terminal pastes it where a file is dropped on it: with `~` for the home folder, in
    quotes, or with backslashes before its blanks, unless there is a file of that very name."""
    path = os.path.expanduser(words)
    if os.path.exists(path) or not (os.sep == "/" or words.startswith(('"', "'"))):
        return path  # elsewhere a backslash stands between folders
    try:
        parts = shlex.split(words)
    except ValueError:  # one quote, as in an apostrophe
        return path
    return os.path.expanduser(parts[0]) if len(parts) == 1 else path


@contextmanager
def remembered_interrupt() -> Generator[Callable[[], None]]:
    """Ctrl-C raises KeyboardInterrupt as ever, and the function that is given raises it again.

    C code that looks an attribute or a key up drops every exception of the Python code that it runs meanwhile, so one
    raised there would be lost. Where Ctrl-C raises nothing, in a program that ignores it, has its own handler or calls
    from another thread, that stays so.
    """
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield check
        return
    signal.signal(signal.SIGINT, press)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


class Typist:
    """Prints a growing text: each call the part that is new. check: called first, may raise to stop the text."""

    def __init__(self, check: Callable[[], None]) -> None:
        self.text = ""
        self.check = check

    def __call__(self, text: str) -> None:
        self.check()
        print(text[len(self.text) :], end="", flush=True)
        self.text = text

    @property
    def line_end(self) -> str:
        """What ends the line in which the text stands."""
        return "\n" if self.text else ""
