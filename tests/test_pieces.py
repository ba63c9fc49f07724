"""Ids of plain text: the real vocabulary, both releases around added tokens, with and without `legacy`."""

import json
import pickle
import re
import shutil
from itertools import product
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from data.encode import Encoder
from data.pieces import KEEP, STRIP, Merges, SentencePieces
from data.templates import template
from data.tokens import TokenSpec, decode, load_tokenizer
from data.types import IGNORE_ID, IMAGE_ID, Mask, Refuse, Turn
from model.checkpoints.save import save_folder, save_original
from systems.assistant import load
from tests.records import OWN, SHARED, read_dialogues
from utils.config import ModelConfig, load_recipe

LISA, GSVA = TokenSpec(("[SEG]",), ("[SEG]",)), TokenSpec(("[SEG]", "[REJ]"), ("[SEG]",), "[REJ]")
LETTERS = st.one_of(st.sampled_from("  \t\n\r aeiT.,'<0x>漢😀\u200d\u00a0\u3000é"), st.characters(codec="utf-8"))
CHOICES = list(product((STRIP, KEEP), (True, False)))
FOLDER = OWN / "gsva"  # a tiny vocabulary with both tokens
TINY = {"head_options": {"decoder_heads": 4}}  # heads of the golden mask decoder, which no file tells
TOKENIZERS = {}


def encoder_of(release, legacy, folder=FOLDER, spec=GSVA, layout="llava_v1") -> Encoder:
    key = (folder, spec, release, legacy)
    if key not in TOKENIZERS:
        TOKENIZERS[key] = load_tokenizer(folder, spec, release=release, legacy=legacy)
    return Encoder(TOKENIZERS[key], spec, layout)


# --- the real vocabulary


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A folder as LLaVA-Lightning's: LLaMA's pieces and three added tokens."""
    if not (SHARED / "llama" / "tokenizer.model").is_file():
        pytest.skip(f"LLaMA's own vocabulary is not there: {SHARED / 'llama'}")
    folder = tmp_path_factory.mktemp("llama")
    shutil.copy(SHARED / "llama" / "tokenizer.model", folder)
    added = {"<im_patch>": 32000, "<im_start>": 32001, "<im_end>": 32002}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    return folder


@pytest.fixture(scope="module")
def merged(llama, tmp_path_factory) -> Path:
    """The same as a `tokenizer.json` alone, which today's library writes and Hugging Face folders have."""
    folder = tmp_path_factory.mktemp("merged")
    load_tokenizer(llama, LISA).save_pretrained(folder)
    (folder / "tokenizer.model").unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize("kind", ["llama", "merged"])
def test_ids_of_the_real_vocabulary_are_those_of_library_4_31(kind, request):
    folder = request.getfixturevalue(kind)
    encoder = encoder_of(STRIP, True, folder, LISA)
    assert isinstance(encoder.tokenizer.pieces.vocabulary, SentencePieces if kind == "llama" else Merges)
    rows = json.loads((SHARED / "llama" / "ref.json").read_text(encoding="utf-8"))
    assert len(rows) == 44
    for row in rows:
        (dialogue,) = read_dialogues([row["prompt"]], LISA)
        assert encoder(dialogue).ids == row["ids"], row["prompt"]


def test_words_with_blanks_in_a_row_are_sentencepiece_s_own(llama):
    """The library's own merges, too, which are saved as tokenizer.json: 259 8896 with those that it rebuilds."""
    tokenizer = load_tokenizer(llama, LISA)
    assert tokenizer("the  double", add_special_tokens=False).input_ids == [278, 29871, 3765]
    assert tokenizer.pieces.encode("the  double", blank=True) == [278, 29871, 3765]


# Measured with the slow tokenizers of both releases on LLaMA's vocabulary (`[SEG]` 32003, `[REJ]` 32004): what follows
# "USER:" and, of it, the labels.
QUESTION = "<image>\n What is x?"
ANSWER = ("the cat is ", Mask(0), " or ", Refuse(1), " ", Mask(2), ".")
MEASURED = {
    (STRIP, True): [[32001, -200, 32002, 1724, 338, 921, 29973], [278, 6635, 338, 32003, 470, 32004, 32003, 869, 2]],
    (KEEP, True): [
        [29871, 32001, -200, 32002, 29871, 13, 1724, 338, 921, 29973],
        [278, 6635, 338, 29871, 32003, 29871, 470, 29871, 32004, 259, 32003, 869, 2],
    ],
    (STRIP, False): [[32001, -200, 32002, 5618, 338, 921, 29973], [278, 6635, 338, 32003, 272, 32004, 32003, 29889, 2]],
}


@pytest.mark.parametrize(("release", "legacy"), MEASURED)
def test_measured_ids_and_labels(llama, release, legacy):
    row = encoder_of(release, legacy, llama, GSVA).encode((Turn(QUESTION, ANSWER),))
    question, answer = MEASURED[release, legacy]
    assert row.ids[34:] == [*question, 319, 1799, 9047, 13566, 29901, *answer]
    assert [label for label in row.labels if label != IGNORE_ID] == answer


def test_a_lone_blank_draws_the_mask_in_gsva_s_stack(llama):
    """An answer that is one token: the state before it is that of a supervised blank, not of the colon."""
    turn = Turn("<image>\nWhere?", (Mask(0), "."))
    for release, before in ((STRIP, 29901), (KEEP, 29871)):
        row = encoder_of(release, True, llama, GSVA).encode((turn,))
        assert row.ids[row.mask_positions[0][0]] == before
        assert [i for i in row.labels if i != IGNORE_ID] == [29871] * (release == KEEP) + [32003, 869, 2]


@pytest.mark.parametrize("kind", ["llama", "merged"])
def test_texts_come_back_from_their_ids(kind, request):
    tokenizer = load_tokenizer(request.getfixturevalue(kind), LISA)
    texts = json.loads((SHARED / "llama" / "texts.json").read_text(encoding="utf-8"))
    for text in (text for pair in texts for text in pair):
        plain = text.replace("[SEG]", "")
        assert decode(tokenizer.pieces.encode(plain, blank=True), tokenizer) == plain.strip()


@pytest.mark.parametrize("kind", ["llama", "merged"])
def test_any_text_has_sentencepiece_s_ids_and_comes_back(kind, request):
    tokenizer = encoder_of(STRIP, True, request.getfixturevalue(kind), LISA).tokenizer
    pieces = sentencepiece.SentencePieceProcessor(str(SHARED / "llama" / "tokenizer.model"))

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(text=st.text(LETTERS, min_size=1, max_size=40))
    def hold(text):
        ids = tokenizer.pieces.encode(text, blank=True)
        assert ids == pieces.encode(text)
        assert decode(ids, tokenizer) == text.replace("▁", " ").strip()

    hold()


# --- the tiny vocabulary: whole texts through the releases' slow tokenizers, labels by measuring rounds (lisa.md 3.2)


def slow_ids(text: str, release: str, legacy: bool) -> list[int]:
    """What the slow tokenizer of a release gives for a text, BOS first."""
    proto = ModelProto.FromString((FOLDER / "tokenizer.model").read_bytes())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    proto.normalizer_spec.add_dummy_prefix = False
    bare = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    tokens = {"<s>": 1, "</s>": 2, "[SEG]": 600, "[REJ]": 601, "<im_start>": 602, "<im_end>": 603}
    text = text if legacy else "▁" + text.replace("▁", " ")
    parts = re.split("(" + "|".join(map(re.escape, tokens)) + ")", text)
    ids = [1]
    for place, part in enumerate(parts):
        if part in tokens:
            ids.append(tokens[part])
            continue
        if release == STRIP and place and parts[place - 1] not in ("<s>", "</s>"):
            part = part.lstrip()
        if release == STRIP and place + 1 < len(parts) and parts[place + 1] not in ("<s>", "</s>"):
            part = part.rstrip()
        if not part or (part == "▁" and place + 1 < len(parts)):  # a lone mark before a special token goes
            continue
        if legacy:
            ids += pieces.encode(part)
        elif release == KEEP:
            ids += bare.encode(part)
        elif part.startswith("▁"):
            ids += pieces.encode(part[1:])
        else:
            first, *rest = pieces.encode(part, out_type=str)
            first = first if part.startswith(" ") else first.removeprefix("▁")
            ids += [pieces.piece_to_id(piece) for piece in (first, *rest) if piece]
    return ids


def published_row(layout: str, dialogue, release: str, legacy: bool) -> tuple[list[int], list[int], bool]:
    """Ids and labels, and whether the release's label rule fits (its rounds do not add up in every stack)."""

    def whole(text: str) -> list[int]:
        first, *rest = [slow_ids(piece, release, legacy) for piece in text.split("<image>")]
        return first + [index for piece in rest for index in (IMAGE_ID, *piece[1:])]

    rounds, words = [], {Mask: "[SEG]", Refuse: "[REJ]"}
    for index, turn in enumerate(dialogue):
        question = turn.question.replace("<image>", "<im_start><image><im_end>")
        answer = "".join(item if isinstance(item, str) else words[type(item)] for item in turn.answer)
        prefix = template(layout).prefix(question, first=index == 0)
        rounds.append((prefix + " ", prefix + " " + answer + template(layout).close))
    ids = whole("".join(text for _, text in rounds))
    labels, start = [IGNORE_ID, *ids[1:]], 1
    for opening, text in rounds:
        instruction = len(whole(opening)) - 2
        labels[start : start + instruction] = [IGNORE_ID] * instruction
        start += len(whole(text.removesuffix("</s>")))
    return ids, labels, start == len(ids)


BLANKS = st.text(st.sampled_from(" \n\t"), max_size=3)
WORDS = st.text(st.sampled_from("abcdefISTUe.,:?!'\"()[]<>/-0127 \n\té漢😀▁"), max_size=20)
PLAIN = st.tuples(BLANKS, WORDS, BLANKS).map("".join)
ITEMS = st.one_of(PLAIN, st.builds(Mask, st.integers(0, 5)), st.builds(Refuse, st.integers(0, 5)))


@st.composite
def dialogues(draw):
    filled = st.lists(ITEMS, min_size=1, max_size=6).filter(
        lambda script: any(not isinstance(item, str) or item.strip() for item in script)
    )
    turns = [Turn(draw(PLAIN), tuple(draw(filled))) for _ in range(draw(st.integers(1, 3)))]
    return (Turn("<image>" + turns[0].question, turns[0].answer), *turns[1:])


@pytest.mark.parametrize("layout", ["llava_v1", "llava_llama_2"])
@pytest.mark.parametrize(("release", "legacy"), CHOICES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(dialogue=dialogues())
def test_rows_are_those_of_the_release(layout, release, legacy, dialogue):
    ids, labels, fits = published_row(layout, dialogue, release, legacy)
    if 0 in ids:  # <unk>: the release crashes in training
        with pytest.raises(ValueError, match="has no id without a blank in front"):
            encoder_of(release, legacy, layout=layout)(dialogue)
        return
    row = encoder_of(release, legacy, layout=layout)(dialogue)
    assert row.ids == ids
    assert row.labels == labels or not fits
    assert fits or (release, legacy) == (KEEP, False) or "llama" in layout
    wanted = [item.target for turn in dialogue for item in turn.answer if isinstance(item, Mask)]
    assert list(row.holes) == wanted and [row.ids[at + 1] for (at,) in row.mask_positions] == [600] * len(wanted)


# --- choices


def test_a_word_without_an_id_of_its_own_is_an_error_that_names_the_ways_out():
    pieces = load_tokenizer(FOLDER, GSVA, legacy=False).pieces
    table = pieces.vocabulary.table()
    word = next(piece[1:] for piece in table if piece.startswith("▁") and len(piece) > 1 and piece[1:] not in table)
    assert pieces.encode(word, blank=True) == [table["▁" + word]]
    with pytest.raises(ValueError, match=rf"'{word}' after an added token has no id.*tokenizer_legacy=true.*4\.44"):
        pieces.encode(word, blank=False)
    other = load_tokenizer(FOLDER, GSVA, legacy=False, release=KEEP).pieces
    assert all(other.encode(word, blank=False))


@pytest.mark.parametrize("legacy", [True, False])
def test_half_a_surrogate_pair_is_named(legacy):
    with pytest.raises(ValueError, match=r"'\\ud83d' at position 4 is half a surrogate pair: 'the "):
        load_tokenizer(FOLDER, GSVA, legacy=legacy).pieces.encode("the \ud83d", blank=True)


def test_an_unknown_release_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"tokenization.*4\.36.*transformers-4\.31.*transformers-4\.44"):
        load_tokenizer(FOLDER, GSVA, release="transformers-4.36")


@pytest.mark.parametrize(("release", "legacy"), CHOICES)
def test_tokenizers_travel_to_worker_processes(release, legacy):
    encoder = encoder_of(release, legacy)
    row = (Turn("<image>\n? Where is  it", ("It is ", Mask(0), ".  There")),)
    assert pickle.loads(pickle.dumps(encoder))(row) == encoder(row)


@pytest.mark.parametrize(("said", "meant"), [(False, False), (True, True), (None, True), ("nothing", True)])
def test_the_folder_s_files_say_legacy_where_they_are_asked(tmp_path, said, meant):
    folder = Path(shutil.copytree(FOLDER, tmp_path / "copy", ignore=shutil.ignore_patterns("*.npz", "*.bin")))
    values = json.loads((folder / "tokenizer_config.json").read_text())
    values = {key: value for key, value in values.items() if key != "legacy"}
    values |= {} if said == "nothing" else {"legacy": said}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    assert load_tokenizer(folder, GSVA, legacy=None).pieces.legacy is meant
    assert load_tokenizer(folder, GSVA).pieces.legacy and not load_tokenizer(folder, GSVA, legacy=False).pieces.legacy


@pytest.mark.parametrize(("release", "legacy"), CHOICES)
def test_a_saved_tokenizer_remembers_both(tmp_path, release, legacy):
    tokenizer = load_tokenizer(FOLDER, GSVA, release=release, legacy=legacy)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path, GSVA, legacy=None)
    assert (again.pieces.release, again.pieces.legacy) == (release, legacy)
    assert again.get_added_vocab() == tokenizer.get_added_vocab()
    assert load_tokenizer(tmp_path, GSVA, release=STRIP).pieces.strips


def test_published_folders_are_read_as_their_files_say(tmp_path):
    """LISA++ says `legacy: false`; recipes, which train, have legacy unless they say otherwise."""
    folder = Path(shutil.copytree(OWN / "lisa", tmp_path / "copy"))
    values = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**values, "legacy": False}))
    assert not load(folder, model=TINY, device="cpu").tokenizer.pieces.legacy
    assert load(folder, model={**TINY, "tokenizer_legacy": True}, device="cpu").tokenizer.pieces.legacy
    assert ModelConfig().tokenizer_legacy is True


def test_both_layouts_of_a_folder_carry_the_choices(tmp_path):
    choices = {"tokenization": KEEP, "tokenizer_legacy": False}
    assistant = load(FOLDER, model={**TINY, **choices}, device="cpu")
    save_folder(assistant.model, tmp_path / "own", assistant.tokenizer, assistant.recipe)
    save_original(assistant.model, tmp_path / "original", assistant.tokenizer, "LisaGSVAForCausalLM")
    for folder in ("own", "original"):
        found = load(tmp_path / folder, model=TINY, device="cpu")
        assert (found.tokenizer.pieces.release, found.tokenizer.pieces.legacy) == (KEEP, False)
        assert found.encoder.prompt(QUESTION) == assistant.encoder.prompt(QUESTION)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", "version https://git-lfs.github.com/spec/v1\n", r"model \(43 bytes\) is no SentencePiece"),
        ("tokenizer.model", "", r"tokenizer\.model \(0 bytes\) is no SentencePiece model"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: expected a JSON object"),
        (
            "tokenizer_config.json",
            '{"legacy": "false"}',
            r"tokenizer_config\.json: .* legacy is true, false or null",
        ),
    ],
)
def test_broken_tokenizer_files_are_named(tmp_path, name, content, message):
    shutil.copy(FOLDER / "tokenizer.model", tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path, GSVA)


def test_files_of_two_vocabularies_are_refused(tmp_path):
    load_tokenizer(OWN / "lisa", LISA).save_pretrained(tmp_path)
    shutil.copy(OWN.parents[1] / "assets/toy/llava/tokenizer.model", tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer\.model is of another vocabulary than the other tokenizer files"):
        load_tokenizer(tmp_path, LISA)


def test_recipes_name_the_release_of_their_paper():
    """GSVA pins 4.44; SESAME overrules LLaVA 1.5's `legacy: false`; what is not said is 4.31 with legacy."""
    configs = sorted((OWN.parents[1] / "configs").rglob("*.yaml"))
    for file in configs:
        model = load_recipe(file).model
        published = file.stem.startswith("gsva") and file.parent.name != "toy"
        assert model.tokenization == (KEEP if published else None), file
        assert model.tokenizer_legacy is True
