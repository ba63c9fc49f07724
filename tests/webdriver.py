"""A real browser under a test's hands: Chromium by its WebDriver, the W3C's protocol of JSON over HTTP.

It opens no connection but to this machine: every other host name is unknown to it.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
DRIVER = shutil.which("chromedriver")
MISSING = "no chromium with chromedriver on PATH" if not (CHROMIUM and DRIVER) else ""
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-sync", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--force-color-profile=srgb",
         "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")  # fmt: skip
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name of a reference to an element


class Browser:
    """A window of Chromium. downloads: the folder in which it puts what is downloaded."""

    def __init__(self, downloads: Path, *, size: tuple[int, int] = (1280, 1000), dark: bool = False):
        self.downloads = downloads
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = ["nice", str(DRIVER), f"--port={port}", "--log-level=OFF"]
        self._driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._address = f"http://127.0.0.1:{port}"
        options = {
            "binary": CHROMIUM,
            "args": [*FLAGS, f"--window-size={size[0]},{size[1]}", *(["--force-dark-mode"] if dark else [])],
            "prefs": {"download.default_directory": str(downloads), "download.prompt_for_download": False},
        }
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        try:
            wait_for(lambda: self._call("GET", "/status")["ready"])
            made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
            self._session = f"/session/{made['sessionId']}"
        except BaseException:
            self._driver.kill()
            raise

    def close(self) -> None:
        try:
            self._call("DELETE", self._session)
        finally:
            self._driver.terminate()
            self._driver.wait(30)

    def open(self, address: str) -> None:
        self._do("POST", "/url", {"url": address})

    def new_tab(self) -> str:
        """Opens a tab and goes there; returns its name."""
        name = self._do("POST", "/window/new", {"type": "tab"})["handle"]
        self.go_to(name)
        return name

    def tab(self) -> str:
        return self._do("GET", "/window")

    def go_to(self, tab: str) -> None:
        self._do("POST", "/window", {"handle": tab})

    def run(self, script: str, *values: Any) -> Any:
        """Runs the body of a JavaScript function with `arguments`; returns what it returns."""
        return self._do("POST", "/execute/sync", {"script": script, "args": values})

    def find(self, selector: str) -> dict[str, str]:
        """The first element of a CSS selector, waited for."""
        return wait_for(lambda: self._do("POST", "/element", {"using": "css selector", "value": selector}), selector)

    def click(self, selector: str) -> None:
        self._do("POST", f"/element/{self.find(selector)[ELEMENT]}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Types text into a field, or names a file for a field of files."""
        self._do("POST", f"/element/{self.find(selector)[ELEMENT]}/value", {"text": text})

    def move_to(self, selector: str, x: int, y: int) -> None:
        """Moves the pointer to a place of an element, in pixels from its middle."""
        move = {"type": "pointerMove", "duration": 0, "origin": self.find(selector), "x": x, "y": y}
        pointer = {"type": "pointer", "id": "mouse", "actions": [move]}
        self._do("POST", "/actions", {"actions": [pointer]})

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def wait(self, script: str, *values: Any, seconds: float = 60) -> Any:
        """Waits until a script returns something true, and returns it."""
        return wait_for(lambda: self.run(script, *values), script, seconds)

    def screenshot(self) -> str:
        """PNG, in base64."""
        return self._do("GET", "/screenshot")

    def console(self) -> list[str]:
        """What went wrong on the page since the last call: errors of scripts, and what it may not load."""
        return [
            entry["message"] for entry in self._do("POST", "/se/log", {"type": "browser"}) if entry["level"] == "SEVERE"
        ]

    def devtools(self, command: str, **values: Any) -> Any:
        return self._do("POST", "/goog/cdp/execute", {"cmd": command, "params": values})

    def _do(self, method: str, path: str, body: Any = None) -> Any:
        return self._call(method, self._session + path, body)

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._address + path, data, {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise LookupError(json.load(error)["value"]["message"].splitlines()[0]) from None


def wait_for(look: Callable[[], Any], what: str = "", seconds: float = 60) -> Any:
    """The first true value of `look`, which may raise until then."""
    end, last = time.monotonic() + seconds, None
    while time.monotonic() < end:
        try:
            if found := look():
                return found
        except (LookupError, OSError) as error:
            last = error
        time.sleep(0.1)
    raise TimeoutError(f"not within {seconds} s: {what} ({last})")
