"""The page in Gradio: what a visitor sees and does, and the same as an API."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from web.view import ANSWER, NOTE, QUESTION, Sample, code, example_buttons, said, shown
from web.visit import CLASSES, FREE, KINDS, PHRASES, Answer, Question, Refused, Talk, Visit, Visits

MODEL = "model"  # the queue of everything that asks the model, which answers one question at a time
WAITING = 50  # questions that may wait in it
# Seconds: how often copies of uploads and downloads are looked through, and how old they get. A visit has copies of its
# uploads, but its download buttons hold these.
SWEEP, KEEP = 600, 24 * 3600
LABELS = {FREE: "Question", PHRASES: "Phrases", CLASSES: "Classes"}
DOWNLOADS = {"masks": "Masks (PNG)", "overlay": "Overlay (PNG)", "coco": "COCO JSON"}
HINTS = {
    FREE: "A question: Where could I sit?",
    PHRASES: "Phrases: the red car, the tallest tree",
    CLASSES: "Classes: sky, road, car, unicorn",
}
STYLE = """
.gradio-container { width: 100%; max-width: 1280px !important; margin: auto; }
.dark { color-scheme: dark; }
#viewer .html-container, #chat .html-container, #examples .html-container { padding: 0 !important; }
#title h1 { margin: .2rem 0 0; } #title p { margin: .1rem 0 .3rem; color: var(--body-text-color-subdued); }
@media (max-width: 640px) { .gradio-container > main { padding: .6rem !important; } }
"""
# In the browser, which alone knows what was typed meanwhile: a refused question returns to its line if that is empty.
GIVE_BACK = "(returned, words) => ['', returned && !words.trim() ? returned : words]"
Update = tuple[Any, ...]  # a value for each of the outputs of an event


def build(visits: Visits, name: str, samples: Sequence[Sample], note: str = "") -> gr.Blocks:
    """The page of an assistant called `name`. note: a sentence about it."""
    page = _Page(visits)
    with gr.Blocks(
        title="Ask about an image", analytics_enabled=False, delete_cache=(SWEEP, KEEP), fill_width=True
    ) as blocks:
        gr.Markdown(f"# Ask about an image\n\n{_plain(f'{name}. {note}'.strip())}", elem_id="title")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                upload = gr.File(label="Your image", file_types=["image"], height=150, elem_id="upload")
            with gr.Column(scale=3, min_width=280, visible=bool(samples)):
                examples = gr.HTML(
                    example_buttons(samples),
                    css_template=code("examples.css"),
                    js_on_load=code("examples.js"),
                    elem_id="examples",
                )
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                viewer = gr.HTML(
                    shown(None),
                    html_template='<div class="viewer"></div>',
                    css_template=code("viewer.css"),
                    js_on_load=code("viewer.js"),
                    elem_id="viewer",
                )
                with gr.Row():
                    files = [
                        gr.DownloadButton(label, interactive=False, size="sm", min_width=90, elem_id=f"download_{key}")
                        for key, label in DOWNLOADS.items()
                    ]
            with gr.Column(scale=2, min_width=280):
                chat = gr.HTML(
                    said(None),
                    html_template='<div class="chat" role="log" aria-label="conversation"></div>',
                    css_template=code("chat.css"),
                    js_on_load=code("chat.js"),
                    elem_id="chat",
                )
                kind = gr.Radio(
                    [(LABELS[one], one) for one in KINDS],
                    value=FREE,
                    label="Kind of question",
                    show_label=False,
                    container=False,
                    elem_id="kind",
                )
                words = gr.Textbox(
                    placeholder=HINTS[FREE],
                    label="Your words",
                    show_label=False,
                    lines=1,  # so that Enter asks
                    max_lines=6,
                    elem_id="words",
                    container=False,
                )
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", size="md", elem_id="ask", min_width=80, scale=2)
                    stop = gr.Button("Stop", size="md", elem_id="stop", min_width=60)
                    new = gr.Button("Start over", size="md", elem_id="new", min_width=120)
                returned = gr.Textbox(visible="hidden", elem_id="returned")  # the words of a question that was refused
        _add_api(page)  # first: its names are those of the functions, which the page's own events have, too
        everything = [chat, viewer, *files]
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        upload.upload(page.open, upload, [upload, *everything], **quiet)
        examples.click(page.sample(samples), None, [kind, words, *everything], **quiet)
        kind.change(lambda kind: gr.update(placeholder=HINTS.get(kind, "")), kind, words, queue=False, **quiet)
        waiting = gr.on([ask.click, words.submit], page.wait, [kind, words], [words, chat], queue=False, **quiet)
        asked = waiting.then(
            page.ask, None, [returned, *everything], concurrency_id=MODEL, concurrency_limit=1, **quiet
        )
        asked.then(None, [returned, words], [returned, words], js=GIVE_BACK, queue=False, **quiet)
        stop.click(page.stop, None, None, queue=False, **quiet)
        new.click(page.forget, None, everything, queue=False, **quiet)
        blocks.unload(page.leave)
    blocks.queue(max_size=WAITING)
    return blocks


def _add_api(page: _Page) -> None:
    """The endpoints /open, /ask and /forget for programs, which work as the page does (docs/web.md)."""
    image = gr.File(visible=False, label="image")
    kind = gr.Radio(list(KINDS), value=FREE, visible=False, label="kind")
    words = gr.Textbox(visible=False, label="words")
    answer = gr.JSON(visible=False, label="answer")
    button = gr.Button(visible=False)
    button.click(page.api_open, image, answer, api_name="open")
    button.click(
        page.api_ask,
        [words, kind],
        answer,
        api_name="ask",
        validator=page.api_asked,  # Gradio calls it when the question arrives
        preprocess=False,  # it would refuse a wrong kind there, and the client would not get the sentence
        concurrency_id=MODEL,
        concurrency_limit=1,
    )
    button.click(page.api_forget, None, answer, api_name="forget")


class _Page:
    """What happens at each event. Gradio passes the request, whose session is one browser tab or one API client."""

    def __init__(self, visits: Visits):
        self.visits = visits

    def open(self, file: str | None, request: gr.Request) -> Update:
        return None, *self._open(file, request)

    def sample(self, samples: Sequence[Sample]) -> Any:
        def choose(event: gr.EventData, request: gr.Request) -> Update:
            sample = dict(enumerate(samples))[event.number]
            return sample.kind, sample.words, *self._open(sample.file, request)

        return choose

    def _open(self, file: str | Path | None, request: gr.Request) -> Update:
        visit = self._visit(request)
        try:
            talk = visit.open(file)
        except Refused as error:
            return self._all(visit, str(error))
        return self._all(visit, f"{talk.image.name}, {talk.size[1]} x {talk.size[0]} pixels: ask about it.")

    def wait(self, kind: str, words: str, request: gr.Request) -> Update:
        """Empties the line for the next question, and what stands in the conversation until the model has answered
        those who asked before. While an answer is being written, all stays as it is."""
        visit = self._visit(request)
        if not visit.wait(kind, words):
            return gr.skip(), gr.skip()
        return "", said(visit.talk, *_asked(words), (NOTE, "Waiting for the model ...")) if words.strip() else gr.skip()

    def ask(self, request: gr.Request) -> Generator[Update]:
        """Answers the question that waits. Of one that is refused, the words come first: they return to the line."""
        visit = self._visit(request)
        same = [gr.skip()] * 4
        question = visit.turn()
        if question is None:
            yield gr.skip(), gr.skip(), *same
            return
        asked = _asked(question.words)
        answers = visit.ask(question)
        try:
            while True:
                text = next(answers)
                yield gr.skip(), said(visit.talk, *asked, (ANSWER, text)), *same
        except StopIteration:
            yield gr.skip(), *self._all(visit)
        except Refused as error:
            yield question.words, said(visit.talk, *asked, (NOTE, str(error))), *same
        finally:
            answers.close()

    def stop(self, request: gr.Request) -> None:
        self._visit(request).stop()

    def forget(self, request: gr.Request) -> Update:
        visit = self._visit(request)
        try:
            visit.forget()
        except Refused as error:
            return self._all(visit, str(error))
        return self._all(visit, "A new conversation about the same image.")

    def leave(self, request: gr.Request) -> None:
        self.visits.leave(str(request.session_hash))

    def api_open(self, image: str | None, request: gr.Request) -> dict[str, Any]:
        """Starts a conversation about an image; returns its name, width and height."""
        try:
            talk = self._visit(request).open(image)
        except Refused as error:
            raise gr.Error(str(error), print_exception=False) from None
        return {"image": talk.image.name, "width": talk.size[1], "height": talk.size[0]}

    def api_asked(self, words: str, kind: str, request: gr.Request) -> tuple[None, None]:
        """Notes which conversation a question is about when it is asked: until its turn comes, that may be another."""
        request.state.talk = self._visit(request).talk if request.session_hash else None
        return None, None

    def api_ask(self, words: str, kind: str, request: gr.Request) -> Generator[dict[str, Any]]:
        """Asks about the image. kind: question, phrases, or classes (names with commas between them).

        Yields {"text": ...} as the answer is written, at last the whole answer: text, finished, notes, masks, absent,
        unmentioned, coco (COCO results).
        """
        if not isinstance(words, str):
            raise gr.Error("The words are one text; names have commas between them.", print_exception=False)
        visit = self._visit(request)
        answers = visit.ask(Question(str(kind), words, request.state.talk))
        try:
            while True:
                yield {"text": next(answers)}
        except StopIteration as done:
            yield _answer_of(done.value)
        except Refused as error:
            raise gr.Error(str(error), print_exception=False) from None
        finally:
            answers.close()

    def api_forget(self, request: gr.Request) -> dict[str, Any]:
        """Drops all rounds of the conversation; the image stays."""
        try:
            self._visit(request).forget()
        except Refused as error:
            raise gr.Error(str(error), print_exception=False) from None
        return {"rounds": 0}

    def _visit(self, request: gr.Request) -> Visit:
        return self.visits.of(str(request.session_hash))

    def _all(self, visit: Visit, *notes: str) -> Update:
        """The conversation, the viewer, and the files of the last answer."""
        talk = visit.talk
        return said(talk, *((NOTE, note) for note in notes)), shown(talk), *map(_download, _files(talk))


def _asked(words: str) -> list[tuple[str, str]]:
    """The question as it stands in the conversation; nothing of an empty one."""
    return [(QUESTION, words.strip())] if words.strip() else []


def _files(talk: Talk | None) -> list[Path | None]:
    """The files of the last answer: a zip of its masks, its overlay, its COCO results."""
    if talk is None or not talk.answers:
        return [None, None, None]
    report = talk.answers[-1].report
    overlay, coco = Path(report["overlay"]), Path(report["exports"][0])
    masks = [Path(mask["file"]) for mask in report["masks"]]
    if not masks:
        return [None, overlay, coco]
    packed = overlay.with_name(f"{overlay.stem.removesuffix('_overlay')}_masks.zip")
    with zipfile.ZipFile(packed, "w") as archive:
        for mask in masks:
            archive.write(mask, mask.name)
    return [packed, overlay, coco]


def _download(file: Path | None) -> Any:
    return gr.update(value=None if file is None else str(file), interactive=file is not None)


def _answer_of(answer: Answer) -> dict[str, Any]:
    """An answer for programs: nothing in it names a file of this machine."""
    report = answer.report
    kept = ("name", "instead", "score", "area", "share", "colour")
    return {
        "text": answer.text,
        "finished": all(entry["finished"] for entry in report["answers"]),
        "notes": answer.notes,
        "masks": [{key: mask[key] for key in kept} for mask in report["masks"]],
        "absent": report["absent"],
        "unmentioned": answer.unmentioned,
        "coco": json.loads(Path(report["exports"][0]).read_text(encoding="utf-8")),
    }


def _plain(text: str) -> str:
    """Text that Markdown and HTML show as it is."""
    return "".join(f"&#{ord(letter)};" if letter in "\\`*_{}[]<>()#+-!|&~$" else letter for letter in text)
