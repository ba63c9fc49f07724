"""The judge: the truth scores 1, our own predictions score as their run did, and what is wrong with a file is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import test_sem
from data.collate import rasterize_target
from data.sources.base import image_size
from data.types import Mask, Query, Record
from evaluation.asked import Asked, asked_about, query_id
from evaluation.catalog import ENTRIES
from evaluation.export.suites import export
from evaluation.judge import EXTERNAL, judge
from evaluation.metrics.base import RELEASED, STANDARD
from evaluation.metrics.matching import assign
from evaluation.protocols import FORCED, GENERATED
from evaluation.runner import evaluate, source_options
from evaluation.score import rescore
from evaluation.submitted import Catalogue, Entry, answer_from
from evaluation.suites import GROUPS, SUITES
from tests import messy
from tests.tiny_assistant import CLASSES, tiny, toy_world
from toy.world import __main__ as make_toy_dataset
from utils.config import Recipe, SuiteConfig
from utils.limits import ENTRY, MASKS
from utils.masks import encode_rle

REFER, LIST, ABSENT, SEVERAL = "refcoco|unc|val", "ade20k|val", "grefcoco|unc|val", "muse|val"
PREMISE, WORDS, TOGETHER = "ReasonSeg-premise|val", "vqa|val", "multirefcoco|unc|val"
ONE_OF_EACH_GROUP = tuple(next(suite.name for suite in ENTRIES if suite.group == group) for group in GROUPS)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return toy_world(tmp_path_factory.mktemp("world"), *make_toy_dataset.LAYOUTS, val_images=2)


def open_suite(name: str, world: Path):
    suite = SUITES[name]
    return suite.open(world, source_options(Recipe(), suite, CLASSES))


def true_answers(name: str, world: Path) -> list[dict]:
    """The truth as another program would write it: an answer per question."""
    source = open_suite(name, world)
    return [
        {"query": query_id(name, index, asked.number), **answer(source[index], asked)}
        for index in range(len(source))
        for asked in asked_about(source[index])
    ]


def answer(record: Record, asked) -> dict:
    if record.kind == "vqa":
        return {"text": record.accepted[asked.number][0]}
    targets = range(len(record.targets)) if asked.is_list else asked.query.targets
    size = image_size(record.image)
    masks = [
        {"phrase": record.targets[t].phrase, "segmentation": encode_rle(rasterize_target(record, t, size))}
        for t in targets
        if record.targets[t].mask is not None
    ]
    if asked.is_list and record.ignore is not None:  # lower classes win where masks overlap, as in the truth
        masks.sort(key=lambda mask: mask["phrase"])
    corrections = [record.targets[t].correction or "no" for t in targets if record.targets[t].mask is None]
    return {"masks": masks, "text": " ".join(corrections), **({} if masks else {"refused": True})}


def coco(answers: list[dict]) -> list[dict]:
    """The same as COCO results: an entry per mask."""
    entries = []
    for values in answers:
        rest = {key: value for key, value in values.items() if key == "query"}
        entries += [{**rest, **mask, "score": 0.5} for mask in values["masks"]] or [{**rest, "refused": True}]
    return entries


def write(path: Path, entries: list, lines: bool = True) -> Path:
    path.write_text("".join(json.dumps(e) + "\n" for e in entries) if lines else json.dumps(entries))
    return path


def values(result) -> dict[tuple[str, str], float | None]:
    return {(figure.metric, figure.variant): figure.value for figure in result.figures}


@pytest.mark.parametrize("name", ONE_OF_EACH_GROUP)
def test_the_truth_as_predictions_scores_one_on_every_kind_of_suite(world, tmp_path, name):
    answers = true_answers(name, world)
    files = {"answers": write(tmp_path / "answers.jsonl", answers)}
    if SUITES[name].metric != "exact":
        files["coco"] = write(tmp_path / "coco.json", coco(answers), lines=False)
    for form, file in files.items():
        results = judge([file], [name], world, classes=CLASSES)
        result = results.suites[name]
        assert not results.missing and result.protocol == EXTERNAL and result.queries == len(answers)
        standard = {metric: value for (metric, variant), value in values(result).items() if variant == STANDARD}
        assert {value for metric, value in standard.items() if metric not in ("Say", "Say_refused")} == {1.0}, standard
        assert ("Say" in standard) == (form == "answers" and name.startswith(("fp", "ReasonSeg-premise")))
        assert result.notes[0] == f"judged from {file.name}" and len(result.notes) == 1
        assert any(figure.interval for figure in result.figures)


@pytest.mark.parametrize(("system", "protocol"), [("gsva", GENERATED), ("gsva", FORCED), ("pixellm", FORCED)])
def test_own_predictions_are_judged_to_the_identical_figures(world, tmp_path, system, protocol):
    """As lines of predictions, and as exported COCO results; as-released figures that need logits are left out."""
    names = (LIST, REFER, ABSENT, SEVERAL, "ReasonSeg|val", "multirefcoco|unc|val", "vqa|val")
    run = evaluate(
        tiny(system, eager=8), names, world, protocol, 1, tmp_path, max_new_tokens=8, workers=0, classes=CLASSES
    )
    judged = judge([tmp_path], names, world, limit=1, classes=CLASSES, out_dir=tmp_path / "judged")
    for name in names:
        own, again = run.suites[name], judged.suites[name]
        assert again.protocol == own.protocol and again.queries == own.queries
        needs_logits = again.details.get("released_needs_logits")
        for figure, other in zip(own.figures, again.figures, strict=True):
            assert figure == other or (needs_logits and figure.variant == RELEASED and other.value is None), name
        assert not (needs_logits and protocol == FORCED)
    assert {name: s.figures for name, s in rescore([tmp_path / "judged" / "predictions"]).suites.items()} == {
        name: s.figures for name, s in judged.suites.items()
    }
    export([tmp_path / "predictions"], tmp_path, ["coco"])
    for name in (LIST, REFER, ABSENT, "ReasonSeg|val", *((SEVERAL,) if system == "pixellm" else ())):
        file = tmp_path / "coco" / f"{name.replace('|', '_')}.json"
        if json.loads(file.read_text()):
            results = judge([file], [name], world, limit=1, classes=CLASSES)
            standard = [figure for figure in run.suites[name].figures if figure.variant == STANDARD]
            got = [figure for figure in results.suites[name].figures if figure.variant == STANDARD]
            assert got == standard and results.suites[name].protocol == run.suites[name].protocol


def test_missing_doubled_and_unknown_entries_are_counted_and_named(world, tmp_path):
    answers = true_answers(ABSENT, world)
    absent = next(a for a in answers if not a["masks"])
    rest = [a for a in answers if a is not absent]
    strangers = [{"query": f"{ABSENT}/99/0", "masks": []}, {"image": "no.jpg", "masks": [], "phrase": "x"}]
    other = {"query": "ade20k|val/0/0", "masks": []}
    file = write(tmp_path / "a.jsonl", [*rest, rest[0], *strangers, other])
    result = judge([file], [ABSENT], world).suites[ABSENT]
    notes = "\n".join(result.notes)
    assert f"missing, scored as answers without a mask: 1 (the first: {absent['query']}); 1 of them are about" in notes
    assert (
        f"answered several times, of which the last and the highest score count: 1 (the first: {rest[0]['query']})"
        in notes
    )
    assert "unknown entries, which do not count: 2" in notes and "line" in notes and "no image 'no.jpg'" in notes
    assert "entries of other suites: 1 (the first: ade20k|val)" in notes
    with pytest.raises(ValueError, match=r"queries without an entry: 1"):
        judge([file], [ABSENT], world, on_missing="error")
    assert "no entry is about it; the files hold unknown entries 1" in str(
        judge([write(tmp_path / "b.jsonl", strangers[:1])], [ABSENT], world).missing
    )


def test_entries_are_found_by_image_and_phrase_number_or_name(world, tmp_path):
    source = open_suite(REFER, world)
    record = source[0]
    size = image_size(record.image)
    places = [p for p, t in enumerate(record.targets) if [u.phrase for u in record.targets].count(t.phrase) == 1]
    names = (
        {"image": record.image.relative_to(world).as_posix()},
        {"file_name": record.image.name},
        {"image_id": json.loads(questions(world, tmp_path)[0])["image_id"]},
    )
    for name in names:
        entries = [
            {
                **name,
                "phrase": f" {record.targets[p].phrase.upper()} ",
                "segmentation": encode_rle(rasterize_target(record, p, size)),
            }
            for p in places
        ]
        result = judge([write(tmp_path / "a.json", entries, lines=False)], [REFER], world, limit=1).suites[REFER]
        count = len(record.targets)
        assert values(result)["gIoU", STANDARD] == pytest.approx(len(places) / count)
        assert len(result.notes) == 2 + (count > len(places))  # where from, only one image, what is missing


def questions(world: Path, tmp_path: Path) -> list[str]:
    file = tmp_path / "questions.jsonl"
    assert test_sem.main(["--write_questions", str(file), "--suites", REFER, SEVERAL, "--dataset_dir", str(world)]) == 0
    return file.read_text().splitlines()


def test_questions_are_written_without_the_truth(world, tmp_path):
    lines = [json.loads(line) for line in questions(world, tmp_path)]
    refer = [line for line in lines if line["suite"] == REFER]
    source = open_suite(REFER, world)
    assert [line["question"] for line in refer] == [t.phrase.strip() for i in range(2) for t in source[i].targets]
    assert refer[0]["query"] == f"{REFER}/0/0" and (world / refer[0]["image"]).is_file()
    assert (refer[0]["height"], refer[0]["width"]) == image_size(source[0].image)
    several = [line for line in lines if line["suite"] == SEVERAL]
    assert several and all("phrases" not in line for line in several)  # the objects are the answer
    targets = [
        p.target for (turn,) in open_suite(SEVERAL, world)[0].dialogues for p in turn.answer if isinstance(p, Mask)
    ]
    assert len(targets) > len([line for line in several if "/0/" in line["query"]])


def rle(height: int, width: int) -> dict:
    return encode_rle(np.ones((height, width), bool))


BOMB = {"size": [10**6, 10**6], "counts": [0, 10**12]}
BAD = {
    "a mask of another size": ({"masks": [{"segmentation": rle(3, 5)}]}, r"line 2: masks\[0\]: .*\[3, 5\]"),
    "a bomb": ({"segmentation": BOMB}, "line 2: "),
    "a cut RLE": ({"segmentation": {"size": None, "counts": "0"}}, "line 2: "),
    "polygons far away": ({"segmentation": [[9e9, 9e9, 9e9, 1, 1, 1]]}, "line 2: "),
    "a box": ({"bbox": [1, 2, 3, 4]}, r"line 2: no 'segmentation' \(tools/boxes_to_masks.py"),
    "no answer": ({}, "line 2: no answer"),
    "a score that is no number": ({"segmentation": [], "score": "high"}, "line 2: score must be a finite number"),
    "a refusal with a mask": ({"segmentation": [[1, 1, 5, 1, 5, 5]], "refused": True}, "line 2: it is refused"),
    "masks that are no list": ({"masks": {}}, "line 2: masks must be a list"),
    "too many masks": ({"masks": [{"segmentation": []}] * 2001}, "more than the limit of 2000"),
}


@pytest.mark.parametrize(("values_of", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_read_is_an_error_with_file_and_line(world, tmp_path, values_of, message):
    first, second = true_answers(REFER, world)[:2]
    file = write(tmp_path / "bad.jsonl", [first, {"query": second["query"], **values_of}])
    with pytest.raises(ValueError, match=message) as caught:
        judge([file], [REFER], world)
    assert "bad.jsonl" in str(caught.value)
    with pytest.raises(SystemExit, match=r"test_sem.py: .*bad\.jsonl"):
        test_sem.main(["--predictions", str(file), "--suites", REFER, "--dataset_dir", str(world)])


@pytest.mark.parametrize(
    "text", ["", "[", '[{"query": "a"}', '{"query": NaN}', "[" * 10**5, "\x00\x01", '[1, {"a": 2}]']
)
def test_files_that_are_no_predictions_are_refused(world, tmp_path, text):
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"bad\.json"):
        judge([file], [REFER], world)


def test_huge_entries_are_refused_before_they_are_parsed(world, tmp_path, monkeypatch):
    answers = true_answers(REFER, world)
    answers[0]["text"] = "x" * 5000
    monkeypatch.setenv(ENTRY.name, "4000")
    for lines in (True, False):
        with pytest.raises(ValueError, match=ENTRY.name):
            judge([write(tmp_path / "big", answers, lines)], [REFER], world)
    monkeypatch.setenv(ENTRY.name, "100000")
    monkeypatch.setenv(MASKS.name, "1")
    with pytest.raises(ValueError, match=MASKS.name):
        judge([write(tmp_path / "big", answers)], [REFER], world)


def test_counts_in_a_file_are_not_believed_and_a_target_counts_once(world, tmp_path):
    run = evaluate(tiny("gsva"), [REFER], world, FORCED, 1, tmp_path, workers=0)
    file = tmp_path / "predictions" / "refcoco_unc_val.jsonl"
    line = json.loads(file.read_text())
    line["counts"]["overlaps"] = [[10, 10, 10, 10, 0]]
    file.write_text(json.dumps(line) + "\n")
    assert rescore([file]).suites[REFER].figures != run.suites[REFER].figures
    assert judge([file], [REFER], world, limit=1).suites[REFER].figures == run.suites[REFER].figures
    fewer = {**line, "answers": [dict(line["answers"][0])]}
    fewer["answers"][0] |= {"targets": line["answers"][0]["targets"][:1], "asked": line["answers"][0]["asked"][:1]}
    file.write_text(json.dumps(fewer) + "\n")
    result = judge([file], [REFER], world, limit=1).suites[REFER]
    assert "missing, scored as answers without a mask" in " ".join(result.notes)
    assert result.queries == len(open_suite(REFER, world)[0].targets)
    file.write_text(json.dumps({**line, "answers": line["answers"] * 2}) + "\n")
    with pytest.raises(ValueError, match=r"line 1: answers\[\d\]: asks about target 0 again"):
        judge([file], [REFER], world, limit=1)


def own_lines(name: str, answers: list[dict], world: Path, folder: Path) -> Path:
    """The answers as this program's own predictions, in `folder`; returns their file."""
    judge([write(folder.with_suffix(".jsonl"), answers)], [name], world, out_dir=folder)
    return folder / "predictions" / f"{name.replace('|', '_')}.jsonl"


def test_a_folder_is_not_judged_into_itself(world, tmp_path):
    out = tmp_path / "out"
    file = own_lines(REFER, true_answers(REFER, world), world, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for path in (out, out / "predictions", file, out / "predictions" / ".." / "predictions"):
        with pytest.raises(ValueError, match=r"is the folder that is judged, .*give another"):
            judge([path], [REFER], world, limit=1, out_dir=out)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert judge([out], [REFER], world, out_dir=out / "again").suites[REFER].values()["gIoU"] == 1.0


def test_parts_of_processes_may_be_empty_or_cut(world, tmp_path):
    file = own_lines(REFER, true_answers(REFER, world), world, tmp_path / "out")
    first, second = file.read_text().splitlines(keepends=True)
    file.write_text("")
    for place, text in enumerate((first, second, "", second[:50]), 1):
        file.with_suffix(f".{place}.jsonl").write_text(text)
    assert judge([tmp_path / "out"], [REFER], world).suites[REFER].values()["gIoU"] == 1.0


def test_predictions_are_judged_by_the_released_scoring_of_their_system(world, tmp_path):
    """Ignored pixels are background for SESAME, and count nowhere for LISA."""
    data = shutil.copytree(world / "reason_seg", tmp_path / "data" / "reason_seg").parent
    for file in data.glob("reason_seg/ReasonSeg/val/*.json"):
        image = json.loads(file.read_text())
        image["shapes"].append({"label": "ignore", "points": [[0, 0], [30, 0], [30, 30], [0, 30]]})
        file.write_text(json.dumps(image))
    evaluate(tiny("sesame"), [PREMISE], data, FORCED, 0, tmp_path, workers=0)
    file = tmp_path / "predictions" / "ReasonSeg-premise_val.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for answer in (answer for line in lines for answer in line["answers"]):  # every pixel, so these, too
        answer["masks"] = [rle(*mask["size"]) for mask in answer["masks"]]
    write(file, lines)
    own, sesame, lisa = (
        values(judge([tmp_path], [PREMISE], data, system=system).suites[PREMISE]) for system in (None, "sesame", "lisa")
    )
    assert own == sesame and own["Segment", STANDARD] == lisa["Segment", STANDARD]
    assert own["Segment", RELEASED] < lisa["Segment", RELEASED]


def test_own_predictions_of_annotations_that_have_changed_are_refused(world, tmp_path):
    file = own_lines(REFER, true_answers(REFER, world), world, tmp_path / "out")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0]["answers"][0]["asked"] = ["something else"]
    with pytest.raises(ValueError, match=r"asks for 'something else', but target 0 is '.*': the annotations have"):
        judge([write(file, lines)], [REFER], world)


def test_a_suite_has_the_protocol_of_its_own_entries(world, tmp_path):
    ways = {REFER: {}, ABSENT: {"protocol": "two_pass"}, PREMISE: {"protocol": "generate"}}
    entries = [{**answer, **way} for name, way in ways.items() for answer in true_answers(name, world)]
    judged = judge([write(tmp_path / "a.jsonl", entries)], list(ways), world).suites
    assert [judged[name].protocol for name in ways] == [EXTERNAL, "two_pass", "generate"]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_single_masks_belong_to_the_target_whose_number_they_have(order):
    """Also where two targets of a question have the same name, and where only a later one is answered."""
    masks = [np.zeros((4, 4), bool), np.zeros((4, 4), bool)]
    masks[0][:2], masks[1][2:] = True, True
    for names in (("man", "man"), ("man", "cup")):
        asked = Asked(0, Query("q", (), (0, 1), names), names)
        catalogue = Catalogue("s", [], Path())
        catalogue.asked = {0: {0: asked}}
        entries = []
        for number in (*order, order[0]):  # the last one again, with a low score
            values = {
                "query": f"s/0/{number}",
                "segmentation": encode_rle(masks[number]),
                "score": 0.9 - 0.1 * len(entries),
            }
            entries.append(Entry("here", values, *catalogue.find(values)[1:]))
        reply, _ = answer_from(entries, asked, (4, 4), by_phrase=True)
        found = [reply.masks[mask] > 0 for mask in assign(reply.claims, names)]
        assert all(np.array_equal(one, other) for one, other in zip(found, masks, strict=True))
    several = {"query": "s/0/0", "masks": [{"phrase": "man", "segmentation": encode_rle(mask)} for mask in masks]}
    asked = Asked(0, Query("q", (), (0, 1), ("man", "man")), ("man", "man"))
    assert len(answer_from([Entry("here", several, 0, "")], asked, (4, 4), by_phrase=True)[0].masks) == 2


def test_an_image_that_own_predictions_lack_is_asked_all_its_questions(world, tmp_path):
    answers = true_answers(WORDS, world)
    file = own_lines(WORDS, answers, world, tmp_path / "out")
    file.write_text(file.read_text().splitlines(keepends=True)[0])
    own = judge([file], [WORDS], world)
    rest = [answer for answer in answers if answer["query"].startswith(f"{WORDS}/0/")]
    others = judge([write(tmp_path / "rest.jsonl", rest)], [WORDS], world)
    assert 1 < len(rest) < len(answers) and not own.missing
    assert own.suites[WORDS].figures == others.suites[WORDS].figures
    assert own.suites[WORDS].queries == len(answers)


def test_say_is_of_all_answers_where_any_has_words(world, tmp_path):
    """An answer without words has none that are right, as a missing one; a file without any is not judged by words."""
    answers = true_answers(PREMISE, world)

    def say(first: dict, others: dict) -> float | None:
        entries = [
            {key: value for key, value in answer.items() if key != "text"}
            | (first if answer["query"].startswith(f"{PREMISE}/0/") else others)
            for answer in answers
        ]
        return judge([write(tmp_path / "a.jsonl", entries)], [PREMISE], world).suites[PREMISE].values().get("Say")

    word = {"text": "a fish"}
    assert 0 < say(word, {}) == say(word, {"text": " "}) < say(word, word)
    assert say({}, {}) is say({"text": ""}, {"text": " "}) is None


def test_the_last_answer_counts_whatever_its_form(world, tmp_path):
    """A refusal is a whole answer where one thing is asked for, and one part of an answer where several are."""

    def score(name: str, answers: list[dict]):
        result = judge([write(tmp_path / "a.jsonl", answers)], [name], world).suites[name]
        return result.values()["gIoU"], [note for note in result.notes if note.startswith("answered several times")]

    first, *rest = true_answers(REFER, world)
    part = 1 / (1 + len(rest))
    name = {"query": first["query"]}
    refusals = [{**name, "refused": True}, {**name, "masks": []}, {**name, "masks": [], "refused": True}]
    for refusal in refusals:
        for entries, expected in (([first, refusal], 1 - part), ([refusal, first], 1), ([refusal, refusal], 1 - part)):
            found, (note,) = score(REFER, [*entries, *rest])
            assert found == pytest.approx(expected) and f": 1 (the first: {first['query']})" in note
    for called in ({}, {"category": "person"}, {"phrase": "x"}):  # as a detector names its boxes
        masks = [{**name, **called, "segmentation": mask["segmentation"]} for mask in first["masks"] * 2]
        found, (note,) = score(REFER, [*masks, *rest])
        assert found == 1 and first["query"] in note
    (mask,) = coco([first])
    refusal = {**name, "refused": True}
    for entries, expected in (([mask, refusal], 1 - part), ([refusal, mask], 1), ([mask, refusal, mask], 1)):
        found, (note,) = score(REFER, [*entries, *rest])
        assert found == pytest.approx(expected) and first["query"] in note
    together = true_answers(TOGETHER, world)
    several = next(answer for answer in together if len(answer["masks"]) > 1)
    refusal = {"query": several["query"], "phrase": several["masks"][0]["phrase"], "refused": True}
    found, (note,) = score(TOGETHER, [*together, refusal])
    assert found == 1 and several["query"] in note
    masks = coco(together)
    assert score(TOGETHER, masks)[0] == 1 and score(TOGETHER, [refusal, *masks])[0] == 1
    assert score(TOGETHER, [*masks, refusal])[0] == pytest.approx(1 - 1 / len(masks))


def test_the_program_judges_reports_and_exports(world, tmp_path, capsys):
    file = write(tmp_path / "a.jsonl", true_answers(LIST, world))
    words = ["--predictions", str(file), "--suites", LIST, "--dataset_dir", str(world), "--classes", CLASSES]
    assert test_sem.main([*words, "--out", str(tmp_path / "out"), "--export", "coco", "semantic", "panoptic"]) == 0
    assert EXTERNAL in capsys.readouterr().out
    for name in ("results.json", "report/index.html", "coco/ade20k_val.json", "semantic/ade20k_val/classes.json"):
        assert (tmp_path / "out" / name).is_file()
    with pytest.raises(SystemExit, match="one at a time"):
        test_sem.main([*words, "--from", str(file)])
    with pytest.raises(SystemExit, match="--export needs --out"):
        test_sem.main([*words, "--export", "coco"])


def test_a_bad_line_of_the_data_is_left_out_where_asked_for(tmp_path):
    """In a folder of mask files and lines of one's own, of which one cannot be used."""
    root = messy.jsonl(tmp_path / "own", {"polygons": [messy.BOX]}, {"polygons": [], "phrase": "the pan"})
    own = SuiteConfig(name="mine", source="jsonl", metric="generalised", options={"file": "q.jsonl"})
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"query": "mine/1/0", "masks": []}) + "\n")
    assert "q.jsonl" in judge([answers], ["mine"], root, custom=[own]).missing["mine"]
    result = judge([answers], ["mine"], root, custom=[own], on_bad_sample="skip").suites["mine"]
    assert result.images == 1 and any("1" in note and "left out" in note for note in result.notes)
    suite_file, asked = tmp_path / "own.yaml", tmp_path / "asked.jsonl"
    suite_file.write_text("- {name: mine, source: jsonl, metric: generalised, options: {file: q.jsonl}}\n")
    words = ["--write_questions", str(asked), "--suites", "mine", "--suite_file", str(suite_file)]
    words += ["--dataset_dir", str(root)]
    with pytest.raises(SystemExit, match=r"q\.jsonl"):
        test_sem.main(words)
    assert test_sem.main([*words, "--on_bad_sample", "skip"]) == 0
    (line,) = asked.read_text().splitlines()
    assert json.loads(line)["query"] == "mine/1/0"
