"""Qwen's byte-level tokenizers: recorded ids and labels, ids of each piece, blanks, reserved tokens, saved files."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data.encode import Encoder
from data.templates import TEMPLATES, template
from data.tokens import TokenSpec, added_tokens, decode, load_tokenizer, mask_ids, token_id
from data.types import IGNORE_ID, IMAGE_ID, Mask, Record, Refuse, Target, Turn
from model.checkpoints.layouts import Report
from model.checkpoints.load import NEW_ROW_STD, _fit_vocabulary
from model.checkpoints.save import _write_old_tokenizer, _write_tokenizer
from model.checkpoints.weight_source import WeightSource
from systems.assistant import _by_tokens
from systems.base import SYSTEMS, build_system
from tests.records import GOLDEN, OWN, script_of
from tests.tiny_words import OF_QWEN_3, PLAIN, SPECIAL, tiny_qwen_tokenizer
from tools.doctor.words import row_text
from training.compatibility import differences
from utils.config import Recipe, from_dict

LISA = TokenSpec(("[SEG]",), ("[SEG]",))
LASAGNA = TokenSpec(("<cat_start>", "<cat_end>", "<semantic>", "<ins>", "<no_ins>"), ("<ins>",), "<no_ins>")
CHATML = tuple(name for name, layout in TEMPLATES.items() if "<|im_end|>" in layout.close)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("qwen")
    tiny_qwen_tokenizer(place)
    return place


# --- records


@dataclass(frozen=True)
class Told:
    spec: TokenSpec
    template: str
    question: str  # how a record's question becomes ours
    pad: str  # stands for the image in recorded ids


SA2VA = Told(TokenSpec(("[SEG]", "<p>", "</p>", "<vp>", "</vp>"), ("[SEG]",)), "qwen_chat", "{}", "<|image_pad|>")
UNIPIXEL = Told(TokenSpec(("<|ref|>", "<|seg|>", "<|mem|>"), ("<|seg|>",)), "chatml", "<image>\n{}", "<|video_pad|>")
KINDS = {"sa2va_chat": SA2VA, "pixel_qwen2_5_vl": UNIPIXEL}  # model_type; not every record names its architecture


def kind_of(name: str) -> str | None:
    file = GOLDEN / name / "config.json"
    return json.loads(file.read_text(encoding="utf-8")).get("model_type") if file.is_file() else None


FOUND = {file.parent.name for file in GOLDEN.glob("*/golden.json")}
RECORDS = sorted({"sa2va_qwen3", "sa2va_qwen2_5", "unipixel"} | {name for name in FOUND if kind_of(name) in KINDS})


def record(name: str) -> tuple[Path, Told, dict]:
    place = GOLDEN / name
    if not (place / "golden.json").is_file():
        pytest.skip(f"no record {name} in {GOLDEN}")
    described = json.loads((place / "golden.json").read_text(encoding="utf-8"))
    return place, KINDS[str(kind_of(name))], described


def one_image_id(ids, pad: int) -> list[int]:
    """Recorded ids with our single IMAGE_ID for the run of pad tokens."""
    ids = np.asarray(ids)
    (places,) = np.nonzero(ids == pad)
    assert len(places) == places[-1] - places[0] + 1
    return [*ids[: places[0]].tolist(), IMAGE_ID, *ids[places[-1] + 1 :].tolist()]


def dialogue_of(turns, told: Told):
    """A recorded conversation; only the first question has the image."""
    asked = [question if index else told.question.format(question) for index, (question, _) in enumerate(turns)]
    return tuple(
        Turn(question, script_of(answer, told.spec)) for question, (_, answer) in zip(asked, turns, strict=True)
    )


@pytest.mark.parametrize("name", RECORDS)
def test_recorded_ids_and_labels(name):
    place, told, described = record(name)
    tokenizer = load_tokenizer(place, told.spec)
    encoder, pad = Encoder(tokenizer, told.spec, told.template), token_id(tokenizer, told.pad)
    with np.load(place / "golden.npz") as arrays:
        for index, talk in enumerate(described["conversations"]):
            row = encoder(dialogue_of(talk["turns"], told))
            ids, labels = arrays[f"conv{index}_input_ids"], arrays[f"conv{index}_labels"]
            assert row.ids == one_image_id(ids, pad)
            wanted = [label for label, token in zip(labels.tolist(), ids.tolist(), strict=True) if token != pad]
            assert [label for label, token in zip(row.labels, row.ids, strict=True) if token != IMAGE_ID] == wanted
            read = talk.get("seg_positions") or [position + 1 for position in talk.get("states_read", [])]
            shift = int((ids == pad).sum()) - 1  # every mask token comes after the image
            assert [position + 1 + shift for group in row.mask_positions for position in group] == read
            assert {name: index for name, index in described["tokens"].items() if name in told.spec.added} == {
                name: token_id(tokenizer, name) for name in told.spec.added if name in described["tokens"]
            }


@pytest.mark.parametrize("name", RECORDS)
def test_recorded_prompts(name):
    """Sa2VA answers with Qwen's own template: its Qwen2.5 has a system turn that training has not (sa2va.md 4.3)."""
    place, told, described = record(name)
    tokenizer = load_tokenizer(place, told.spec)
    pad, inside = token_id(tokenizer, told.pad), "generate" in described  # of golden.json
    runs = described["generate"] if inside else json.loads((place / "generate.json").read_text(encoding="utf-8"))
    with np.load(place / ("golden.npz" if inside else "generate.npz")) as arrays:
        for index, run in enumerate(runs):
            system = "qwen_system" if run["prompt"].startswith("<|im_start|>system") else None
            layout = told.template if told is UNIPIXEL else system
            question = run.get("text") or told.question.format(
                described["conversations"][run["conversation"]]["turns"][0][0]
            )
            encoder = Encoder(tokenizer, told.spec, prompt_template=layout)
            assert encoder.prompt(question) == one_image_id(arrays[f"gen{index}_input_ids"], pad)
            if "prediction" in run:
                answer = arrays[f"gen{index}_output_ids"][len(arrays[f"gen{index}_input_ids"]) :]
                assert decode(answer.tolist(), tokenizer) == run["prediction"].strip()


# --- ids


SPECS = {name: build_system(name).tokens for name in SYSTEMS} | {"sa2va": SA2VA.spec, "unipixel": UNIPIXEL.spec}
TOKENIZERS: dict[str, tuple] = {}


def pair(name: str, folder: Path):
    """Our tokenizer, and the library's own with the same tokens."""
    if name not in TOKENIZERS:
        theirs = AutoTokenizer.from_pretrained(folder)
        theirs.add_tokens(list(SPECS[name].added), special_tokens=True)
        TOKENIZERS[name] = load_tokenizer(folder, SPECS[name]), theirs
    return TOKENIZERS[name]


BLANKS = st.text(st.sampled_from(" \n\t"), max_size=3)
WORDS = st.text(st.sampled_from("abcdefISTUe.,:?!'\"()[]<>|/-0127 \n\té漢😀"), max_size=20)
TEXTS = st.tuples(BLANKS, WORDS, BLANKS).map("".join)


@st.composite
def dialogues(draw, spec):
    items = [TEXTS, st.builds(Mask, st.integers(0, 5))]
    items += [st.builds(Refuse, st.integers(0, 5))] if spec.refuse else []
    filled = st.lists(st.one_of(items), min_size=1, max_size=6).filter(
        lambda script: any(not isinstance(item, str) or item.strip() for item in script)
    )
    turns = [Turn(draw(TEXTS), tuple(draw(filled))) for _ in range(draw(st.integers(1, 3)))]
    return (Turn(draw(BLANKS) + "<image>" + draw(BLANKS) + turns[0].question, turns[0].answer), *turns[1:])


def written(script, spec) -> str:
    words = {Mask: "".join(spec.mask), Refuse: spec.refuse}
    return "".join(item if isinstance(item, str) else words[type(item)] for item in script)


@pytest.mark.parametrize("name", sorted(SPECS))
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_each_piece_has_the_ids_of_the_library(folder, name, data):
    """Question with its words, answer with its stop token, and the line break between rounds, each on its own."""
    ours, theirs = pair(name, folder)
    spec = SPECS[name]
    dialogue = data.draw(dialogues(spec))
    ids, labels = [], []

    def add(text: str, supervised: bool) -> None:
        before, image, after = text.partition("<image>")
        new = theirs(before).input_ids + ([IMAGE_ID, *theirs(after).input_ids] if image else [])
        ids.extend(new)
        labels.extend(new if supervised else [IGNORE_ID] * len(new))

    for turn in dialogue:
        question = turn.question.replace("<image>", "<|vision_start|><image><|vision_end|>")
        add(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", False)
        add(f"{written(turn.answer, spec)}<|im_end|>", True)
        add("\n", False)
    row = Encoder(ours, spec)(dialogue)
    assert (row.ids, row.labels) == (ids, labels)
    group = mask_ids(ours, spec)
    assert all(tuple(row.ids[place + 1] for place in places) == group for places in row.mask_positions)
    assert len(row.mask_positions) == sum(isinstance(item, Mask) for turn in dialogue for item in turn.answer)


@pytest.mark.parametrize("name", sorted(SPECS))
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_an_answer_comes_back_from_its_ids(folder, name, data):
    """Blanks next to added tokens included; the library normalises letters (NFC), which these are already."""
    ours, _ = pair(name, folder)
    (turn, *_) = data.draw(dialogues(SPECS[name]))
    row = Encoder(ours, SPECS[name])((turn,))
    answer = [label for label in row.labels if label != IGNORE_ID]
    assert answer[-1] == ours.eos_token_id
    assert decode(answer, ours) == written(turn.answer, SPECS[name]).strip()


@pytest.mark.parametrize("layout", CHATML)
def test_an_open_prompt_is_the_row_up_to_the_answer(folder, layout):
    tokenizer = load_tokenizer(folder, LISA)
    encoder = Encoder(tokenizer, LISA, layout)
    first, second = Turn("<image>\nWhere?", ("It is ", Mask(0), ".")), Turn("And the dog?", ("There.",))
    row = encoder((first, second))
    for prompt in (encoder.prompt(first.question), encoder.prompt(second.question, (first,))):
        assert row.ids[: len(prompt)] == prompt and row.ids[0] != tokenizer.pad_token_id
        assert row.labels[len(prompt) - 1] == IGNORE_ID and row.labels[len(prompt)] == row.ids[len(prompt)]
    shown = row_text((first, second), LISA, template(layout), tokenizer.family)
    assert shown.replace("<image>", "") == tokenizer.decode([index for index in row.ids if index != IMAGE_ID])
    assert shown.endswith("<|im_end|>" if layout == "chatml" else "<|im_end|>\n")
    assert ("<|vision_end|>Where" if layout == "chatml" else "<|vision_end|>\nWhere") in shown
    assert shown.startswith("<|im_start|>user" if layout == "qwen_chat" else "<|im_start|>system\nYou are")


def test_vocabulary_and_merges_alone_give_the_same_ids(folder, tmp_path):
    size = tiny_qwen_tokenizer(tmp_path, parts=True)
    ours, same = load_tokenizer(tmp_path, LISA), load_tokenizer(folder, LISA)
    assert not (tmp_path / "tokenizer.json").exists() and size == ours.own_size == same.own_size
    assert ours.get_vocab() == same.get_vocab()
    text = "<image>\nPlease segment  the é漢😀 car's 127 dogs\n\n in this image."
    assert Encoder(ours, LISA).prompt(text) == Encoder(same, LISA).prompt(text)


def test_pad_stop_and_no_bos(folder):
    tokenizer = load_tokenizer(folder, LISA)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (None, "<|im_end|>", "<|endoftext|>")
    assert tokenizer.padding_side == "right"


@pytest.mark.parametrize("name", sorted(SPECS))
def test_a_system_adds_its_tokens_and_no_image_wrap(folder, name):
    tokenizer, spec = load_tokenizer(folder, SPECS[name]), SPECS[name]
    assert added_tokens(tokenizer.family, spec) == spec.added
    ids = [token_id(tokenizer, token) for token in spec.added]
    assert (
        ids == list(range(tokenizer.own_size, tokenizer.own_size + len(spec.added))) and len(tokenizer) == ids[-1] + 1
    )


def test_ids_without_a_token_decode_to_nothing(folder):
    tokenizer = load_tokenizer(folder, LISA)
    ids = Encoder(tokenizer, LISA).prompt("<image> a dog")
    beyond = len(tokenizer)
    seg = token_id(tokenizer, "[SEG]")
    assert (
        decode([beyond, *tokenizer("a").input_ids, beyond + 3, seg, beyond, tokenizer.eos_token_id], tokenizer)
        == "a[SEG]"
    )
    assert "a dog" in decode(ids, tokenizer)


@pytest.mark.parametrize("token", ["<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<think>", "[SEG]"])
def test_control_tokens_may_not_be_typed(folder, token):
    encoder = Encoder(load_tokenizer(folder, LISA), LISA)
    for turn in (Turn(f"<image>\nHi {token}", ("ok",)), Turn("<image>\nHi", (f"ok {token}",))):
        with pytest.raises(ValueError, match="which may not be typed"):
            encoder((turn,))
    with pytest.raises(ValueError, match="which may not be typed"):
        encoder.prompt(f"<image>{token}")
    with pytest.raises(ValueError, match="half a surrogate pair"):
        encoder.tokenizer.pieces.stretch("a \ud83d", opens=False, continues=False)


def test_structural_tokens_of_a_system_may_be_typed(folder):
    encoder = Encoder(load_tokenizer(folder, LASAGNA), LASAGNA)
    ids = encoder.prompt("<image>\n<semantic>Segment.<cat_start> sky, dog <cat_end>")
    assert [token_id(encoder.tokenizer, token) in ids for token in LASAGNA.added] == [True, True, True, False, False]


# --- answers


FACTS = (
    Record(Path("a.jpg"), "refer", (Target("the red car", lambda: np.ones((2, 2), bool)), Target("a dog", None))),
    Record(
        Path("b.jpg"),
        "classes",
        (Target("sky", lambda: np.ones((2, 2), bool)), Target("traffic light", lambda: np.ones((2, 2), bool))),
        vocabulary=("sky", "traffic light", "road", "boat"),
    ),
)


@pytest.mark.parametrize("name", sorted(SYSTEMS))
def test_an_answer_reads_the_same_with_each_tokenizer(folder, name):
    """LLaMA's decoding leaves no blanks around tokens, Qwen's leaves them where they were."""
    system, claims = build_system(name), 0
    encoders = [Encoder(load_tokenizer(place, system.tokens), system.tokens) for place in (folder, OWN / "lisa")]
    for record, seed in product(FACTS, range(8)):
        answers = [dialogue[0] for dialogue in system.task.converse(record, np.random.default_rng(seed))]
        answers += [Turn(query.question, query.reference_answer) for query in system.task.queries(record)]
        for turn in answers:
            rows = [encoder.encode((turn,)) for encoder in encoders]
            texts = [
                decode([label for label in row.labels if label != IGNORE_ID], encoder.tokenizer)
                for row, encoder in zip(rows, encoders, strict=True)
            ]
            qwen, llama = map(system.read, texts)
            assert qwen == llama and texts[0] == written(turn.answer, system.tokens).strip()
            assert sum(claim.mask is not None for claim in qwen) == len(rows[0].holes) or name == "sesame"
            claims += len(qwen)
    assert claims > 20


# --- templates


def test_a_template_of_another_family_is_refused(folder):
    qwen, llama = load_tokenizer(folder, LISA), load_tokenizer(OWN / "lisa", LISA)
    with pytest.raises(ValueError, match=r"Qwen tokenizer.*<\|im_end\|> 'llava_v1'.*have: chatml, qwen_chat, qwen_sys"):
        Encoder(qwen, LISA, "llava_v1")
    with pytest.raises(ValueError, match=r"LLaMA tokenizer.*</s> 'qwen_chat'.*have: llava_llama_2, llava_v1, vicuna"):
        Encoder(llama, LISA, "qwen_chat")
    assert Encoder(qwen, LISA).template == template("qwen_chat") and Encoder(llama, LISA).template == template(
        "llava_v1"
    )


def test_a_released_prompt_template_counts_for_its_own_tokenizers(folder):
    """SESAME's, for example, which is LLaVA's."""
    for place, expected in ((folder, "qwen_chat"), (OWN / "lisa", "vicuna_v1")):
        encoder = Encoder(load_tokenizer(place, LISA), LISA, prompt_template="vicuna_v1")
        assert encoder.prompt_template == template(expected)


@pytest.mark.parametrize(
    ("before", "now", "harmless"),
    [("llava_v1", None, True), (None, "qwen_chat", True), ("vicuna_v1", None, False), ("llava_v1", "qwen_chat", False)],
)
def test_a_run_may_name_its_family_s_template_or_none(before, now, harmless):
    old, new = (from_dict(Recipe, {"model": {"conv_type": name}}) for name in (before, now))
    meaning, others = differences(old, new, {})
    assert [change.field for change in (others if harmless else meaning)] == ["model.conv_type"]


# --- files


def test_a_saved_tokenizer_is_read_back_equal(folder, tmp_path):
    ours = load_tokenizer(folder, LASAGNA)
    text = "It's <ins> a  dog.<no_ins>\n\n<|im_end|> é漢😀 12"
    for number, write in enumerate((_write_tokenizer, _write_old_tokenizer)):
        place = tmp_path / str(number)
        place.mkdir()
        write(place, ours)
        assert not (place / "tokenizer.model").exists()
        assert str(tmp_path) not in "".join(file.read_text(encoding="utf-8") for file in place.iterdir())
        theirs, again = AutoTokenizer.from_pretrained(place), load_tokenizer(place, LASAGNA)
        assert theirs.get_vocab() == again.get_vocab() == ours.get_vocab()
        assert theirs(text).input_ids == again(text).input_ids == ours(text).input_ids
        assert again.own_size == len(ours), "its own tokens are the folder's now"
        assert _by_tokens(place) == ["lasagna"]


def test_the_base_s_tokens_are_of_no_system(tmp_path):
    for version in (2, 3):
        tiny_qwen_tokenizer(tmp_path / str(version), version=version)
        assert _by_tokens(tmp_path / str(version)) == []
        family = load_tokenizer(tmp_path / str(version), LISA).family
    assert family.control == {*SPECIAL, *PLAIN} and family.optional == {*OF_QWEN_3}


def test_it_travels_to_worker_processes(folder):
    encoder = Encoder(load_tokenizer(folder, LISA), LISA)
    again = pickle.loads(pickle.dumps(encoder))
    assert again.prompt("<image>\nWhere is it?") == encoder.prompt("<image>\nWhere is it?")
    assert again.tokenizer.family == encoder.tokenizer.family


def change(file: Path, edit) -> None:
    values = json.loads(file.read_text(encoding="utf-8"))
    edit(values)
    file.write_text(json.dumps(values), encoding="utf-8")


def test_other_byte_level_vocabularies_are_refused(tmp_path):
    tiny_qwen_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    change(file, lambda values: values.update(normalizer=None))
    with pytest.raises(ValueError, match=r"tokenizer\.json: normalizer is not that of Qwen2"):
        load_tokenizer(tmp_path, LISA)
    tiny_qwen_tokenizer(tmp_path)
    for name in (file, tmp_path / "tokenizer_config.json"):
        text = name.read_text(encoding="utf-8")
        name.write_text(text.replace("<|vision_", "<|look_").replace("<|im_end|>", "<|eot_id|>"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"without <\|im_end\|>, <\|vision_start\|>, <\|vision_end\|>"):
        load_tokenizer(tmp_path, LISA)
    file.write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no JSON \(a pointer"):
        load_tokenizer(tmp_path, LISA)
    file.write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected a JSON object"):
        load_tokenizer(tmp_path, LISA)


@pytest.mark.parametrize("key", ["vocab_file", "merges_file", "tokenizer_file", "name_or_path"])
def test_files_elsewhere_are_not_read(folder, tmp_path, key):
    for parts in (True, False):
        place = tmp_path / str(parts)
        tiny_qwen_tokenizer(place, parts=parts)
        change(place / "tokenizer_config.json", lambda values: values.update({key: str(tmp_path / "elsewhere")}))
        assert load_tokenizer(place, LISA).get_vocab() == load_tokenizer(folder, LISA).get_vocab()


# --- rows of the vocabulary

BACKBONE = SimpleNamespace(EMBEDDING="in", LM_HEAD="out")


def fitted(tokenizer, spec, rows, *, finished=False, outputs=None, lenient=False, weight=None):
    """Embedding and output rows after fitting; row k was k everywhere."""
    tensors = {
        name: torch.arange(float(count))[:, None].repeat(1, 2) + 10
        for name, count in (("in", rows), ("out", outputs or rows))
    }
    source = WeightSource(Path("folder"), {}, tensors, Report(), finished)
    source.weight = weight
    _fit_vocabulary(source, BACKBONE, spec, tokenizer, torch.Generator().manual_seed(0), lenient)  # ty: ignore
    return source.tensors["in"], source.tensors["out"]


def test_a_padded_base_keeps_its_rows_and_draws_those_of_new_tokens(folder):
    tokenizer = load_tokenizer(folder, LASAGNA)
    own, size = tokenizer.own_size, len(tokenizer)
    for table in fitted(tokenizer, LASAGNA, size + 7):
        kept = torch.arange(float(size + 7))[:, None].repeat(1, 2) + 10
        assert (
            len(table) == size + 7 and torch.equal(table[:own], kept[:own]) and torch.equal(table[size:], kept[size:])
        )
        assert float(table[own:size].abs().max()) < 6 * NEW_ROW_STD and len(table[own:size].unique()) == 2 * (
            size - own
        )


def test_a_base_grows_where_the_tokenizer_outgrows_it(folder):
    tokenizer = load_tokenizer(folder, LASAGNA)
    own, size = tokenizer.own_size, len(tokenizer)
    for rows in (own, own + 2):
        for table in fitted(tokenizer, LASAGNA, rows):
            assert len(table) == size and float(table[own:].abs().max()) < 6 * NEW_ROW_STD
            assert torch.equal(table[:own, 0], torch.arange(float(own)) + 10)


def test_finished_checkpoints_are_taken_with_and_without_padding(folder, tmp_path):
    _write_tokenizer(tmp_path, load_tokenizer(folder, LASAGNA))
    tokenizer = load_tokenizer(tmp_path, LASAGNA)
    for rows in (len(tokenizer), len(tokenizer) + 7):
        for table in fitted(tokenizer, LASAGNA, rows, finished=True):
            assert torch.equal(table[:, 0], torch.arange(float(rows)) + 10)
    with pytest.raises(ValueError, match="wrong vocabulary size"):
        fitted(tokenizer, LASAGNA, len(tokenizer) + 7, outputs=len(tokenizer), finished=True)
    with pytest.raises(ValueError, match="has no <no_ins>"):
        fitted(tokenizer, LASAGNA, len(tokenizer) - 1, finished=True)
    other = load_tokenizer(tmp_path, LISA)
    for rows in (len(tokenizer), len(tokenizer) + 7):
        with pytest.raises(ValueError, match=r"another system.*has no \[SEG\]"):
            fitted(other, LISA, rows, finished=True)


def test_a_bare_weight_file_on_a_base_takes_the_tokens_of_its_system(folder):
    tokenizer = load_tokenizer(folder, LISA)
    tables = fitted(tokenizer, LISA, len(tokenizer) + 7, finished=True, weight=Path("model.bin"))
    assert all(torch.equal(table[:, 0], torch.arange(float(len(tokenizer) + 7)) + 10) for table in tables)
