"""Serves the page: where it listens, what an upload may be, and that nothing outside its own folder can be reached."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Awaitable, Callable, Generator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # Gradio takes seconds to import, and reads its settings from the environment when it is
    import gradio as gr

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "DejaVu Sans", "sans-serif"]
MONO = ["ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
HEADERS = {
    # The page loads and asks nothing but this server. Gradio needs inline code, and compiles its components' code.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' "
    "'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' blob:; connect-src 'self'; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True)
class Place:
    """Where the page is served. port: None for the first free one from 7860. max_upload: bytes of an uploaded file."""

    host: str = "127.0.0.1"
    port: int | None = None
    share: bool = False
    max_upload: int = 20 * 2**20


def check_address(host: str, port: int | None) -> None:
    """OSError where nothing can listen there, before anything slow is begun."""
    try:
        socket.create_server((host, port or 0)).close()
    except (OSError, OverflowError) as error:
        where = host if port is None else f"{host}:{port}"
        raise OSError(f"cannot listen at {where}: {error}") from None


@contextmanager
def own_folder() -> Generator[Path]:
    """A new folder that only this user may read, in which the page keeps all files, and which is removed at the end.

    To be entered before Gradio is imported: its settings are made here, the folder and that it reports nothing home.
    """
    folder = Path(tempfile.mkdtemp(prefix="assistant_page_")).resolve()
    settings = {
        "GRADIO_TEMP_DIR": str(folder / "uploads"),
        "GRADIO_EXAMPLES_CACHE": str(folder / "examples"),
        "GRADIO_ANALYTICS_ENABLED": "False",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def launch(blocks: gr.Blocks, place: Place, style: str) -> str:
    """Starts to serve the page in threads of its own and returns its address; `blocks.close()` ends it.

    OSError where no port is free. style: CSS of the page.
    """
    import gradio as gr
    from gradio import processing_utils
    from starlette.middleware import Middleware

    processing_utils.async_ssrf_protected_download = _refuse_address
    _, local, shared = blocks.launch(
        server_name=place.host,
        server_port=place.port,
        share=place.share,
        max_file_size=place.max_upload,
        allowed_paths=[],
        theme=gr.themes.Default(font=FONTS, font_mono=MONO),
        css=style,
        app_kwargs={"middleware": [Middleware(Guard)]},
        prevent_thread_lock=True,
        quiet=True,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=["api"],
    )
    return shared or local


async def _refuse_address(url: str, cache_dir: str) -> str:
    """In place of Gradio's download of a file that a visitor names by its address: of any size, from anywhere."""
    import gradio as gr

    raise gr.Error("Upload the file itself: addresses are not opened here.", print_exception=False)


class Guard:
    """Adds HEADERS to every answer, and refuses to fetch other servers' files on behalf of a visitor."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        path = str(scope.get("path", "")).lower()
        if any(mark in path for mark in ("file=http:", "file=https:", "/proxy=")):
            await with_headers({"type": "http.response.start", "status": 403, "headers": []})
            await with_headers({"type": "http.response.body", "body": b"Files of other servers are not opened here."})
            return
        await self.app(scope, receive, with_headers)
