"""Encoding: golden ids and labels, equality with tokenising the whole text, tokens and masks by construction."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data.encode import Encoder, SequenceTooLong
from data.templates import template
from data.tokens import TokenSpec, load_tokenizer, mask_ids
from data.types import IGNORE_ID, IMAGE_ID, Mask, Refuse, Turn
from systems.base import build_system
from tests.records import OWN, names, open_prompt, read_dialogues, read_record, record_folder, system_of

SIX = tuple(f"[SEG{index}]" for index in range(6))
IMAGE_TOKENS = 256  # of the images that the rows are about
SPECS = {
    "lisa": TokenSpec(("[SEG]",), ("[SEG]",)),
    "lasagna": TokenSpec(("<cat_start>", "<cat_end>", "<semantic>", "<ins>", "<no_ins>"), ("<ins>",), "<no_ins>"),
    "six": TokenSpec(SIX, SIX),
}
FOLDERS = {"lisa": "lisa", "lasagna": "lasagna", "six": "lisa"}
TOKENIZERS = {}


def tokenizer_of(name):
    if name not in TOKENIZERS:
        TOKENIZERS[name] = load_tokenizer(OWN / FOLDERS[name], SPECS[name])
    return TOKENIZERS[name]


def encoder_of(name, **options):
    return Encoder(tokenizer_of(name), SPECS[name], **options)


def recorded(name, file="golden.json"):
    """A record's conversations and arrays, with an encoder from its tokenizer."""
    folder = record_folder(name)
    if not (folder / file).is_file():
        pytest.skip("the published program does not generate")
    described = json.loads((folder / file).read_text())
    layout = described.get("conv_type", read_record(name).get("conv_type", "llava_v1"))
    spec = build_system(system_of(name)).tokens
    arrays = np.load((folder / file).with_suffix(".npz"))
    return described, arrays, spec, layout, Encoder(load_tokenizer(folder, spec), spec, layout)


@pytest.mark.parametrize("name", names())
def test_golden_ids_and_labels(name):
    described, record, spec, layout, encoder = recorded(name)
    rows = [dialogue for texts in described["conversations"] for dialogue in read_dialogues(texts, spec, layout)]
    assert len(rows) == len(record["input_ids"])
    for index, dialogue in enumerate(rows):
        encoded, real = encoder(dialogue), record["attention_mask"][index]
        assert encoded.ids == record["input_ids"][index][real].tolist()
        assert encoded.labels == record["labels"][index][real].tolist()


@pytest.mark.parametrize("name", names())
def test_golden_prompt(name):
    described, record, spec, layout, encoder = recorded(name, "generate.json")
    assert encoder.prompt(*open_prompt(described["prompt"], spec, layout)) == record["prompt_ids"][0].tolist()


# --- the published way: tokenise whole texts, then find the labels by measuring rounds (lisa.md 2.4 and 3.2)


def whole_text_ids(tokenizer, text):
    first, *rest = [tokenizer(piece)["input_ids"] for piece in text.split("<image>")]
    return first + [index for piece in rest for index in (IMAGE_ID, *piece[1:])]


def published_row(name, layout, dialogue):
    tokenizer, spec = tokenizer_of(name), SPECS[name]
    words = {Mask: "".join(spec.mask), Refuse: spec.refuse}
    ids, labels = [], []
    rounds = []
    for index, turn in enumerate(dialogue):
        question = turn.question.replace("<image>", "<im_start><image><im_end>")
        answer = "".join(item if isinstance(item, str) else words[type(item)] for item in turn.answer)
        prefix = template(layout).prefix(question, first=index == 0)
        rounds.append((prefix + " ", prefix + " " + answer + template(layout).close))
    ids = whole_text_ids(tokenizer, "".join(full for _, full in rounds))
    labels, start = list(ids), 1
    labels[0] = IGNORE_ID
    for opening, full in rounds:
        instruction = len(whole_text_ids(tokenizer, opening)) - 2
        labels[start : start + instruction] = [IGNORE_ID] * instruction
        start += len(whole_text_ids(tokenizer, full.removesuffix("</s>")))
    assert start == len(ids)
    return ids, labels


BLANKS = st.text(st.sampled_from(" \n\t"), max_size=3)
WORDS = st.text(st.sampled_from("abcdefISTUe.,:?!'\"()[]<>/-0127 \n\té漢😀"), max_size=20)
PLAIN = st.tuples(BLANKS, WORDS, BLANKS).map("".join)


@st.composite
def dialogues(draw, spec):
    typed = [token for token in spec.added if token not in (*spec.mask, spec.refuse)]
    text = st.lists(st.one_of(PLAIN, st.sampled_from(typed)) if typed else PLAIN, max_size=4).map("".join)
    items = [PLAIN, st.builds(Mask, st.integers(0, 5))]
    items += [st.builds(Refuse, st.integers(0, 5))] if spec.refuse else []
    filled = st.lists(st.one_of(items), min_size=1, max_size=6).filter(
        lambda script: any(not isinstance(item, str) or item.strip() for item in script)
    )
    turns = [Turn(draw(text), tuple(draw(filled))) for _ in range(draw(st.integers(1, 3)))]
    first = turns[0]
    return (Turn(draw(BLANKS) + "<image>" + draw(BLANKS) + first.question, first.answer), *turns[1:])


@pytest.mark.parametrize("layout", ["llava_v1", "llava_llama_2"])
@pytest.mark.parametrize("name", sorted(SPECS))
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_encoding_equals_the_published_way(name, layout, data):
    dialogue = data.draw(dialogues(SPECS[name]))
    encoded = encoder_of(name, template=layout)(dialogue)
    assert (encoded.ids, encoded.labels) == published_row(name, layout, dialogue)


@pytest.mark.parametrize("name", sorted(SPECS))
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_tokens_and_masks_agree(name, data):
    spec = SPECS[name]
    dialogue = data.draw(dialogues(spec))
    encoded = encoder_of(name)(dialogue)
    wanted = [item.target for turn in dialogue for item in turn.answer if isinstance(item, Mask)]
    assert list(encoded.holes) == wanted
    group = mask_ids(tokenizer_of(name), spec)
    predicted = [tuple(encoded.ids[p + 1] for p in positions) for positions in encoded.mask_positions]
    assert predicted == [group] * len(wanted)
    assert all(encoded.labels[p + 1] == encoded.ids[p + 1] for row in encoded.mask_positions for p in row)
    assert sum(index in group for index in encoded.ids) == len(wanted) * len(group)


def test_an_open_prompt_is_the_row_up_to_the_answer():
    encoder = encoder_of("lisa")
    first, second = Turn("<image>\nWhere?", ("It is ", Mask(0), ".")), Turn("And the dog?", ("There.",))
    row = encoder((first, second))
    assert row.ids[: len(encoder.prompt(first.question))] == encoder.prompt(first.question)
    prompt = encoder.prompt(second.question, history=(first,))
    assert row.ids[: len(prompt)] == prompt
    assert row.labels[len(prompt)] == row.ids[len(prompt)] and row.labels[len(prompt) - 1] == IGNORE_ID


def test_an_open_prompt_may_have_a_template_of_its_own():
    encoder = encoder_of("lisa", prompt_template="vicuna_v1")
    turn = Turn("<image>\nHi", ("Hello.",))
    assert encoder.encode((turn,)) == encoder_of("lisa").encode((turn,))
    for history in ((), (turn,)):
        question = "Again?" if history else turn.question
        assert encoder.prompt(question, history) == encoder_of("lisa", template="vicuna_v1").prompt(question, history)
        assert encoder.prompt(question, history) != encoder_of("lisa").prompt(question, history)


def test_refusals_are_counted():
    turn = Turn("<image>\nHi", ("a", Mask(0), "b", Refuse(1), "c", Refuse(2)))
    assert encoder_of("lasagna").encode((turn, Turn("Again?", (Refuse(0),)))).refused == 3


def test_without_the_wrap_the_picture_stands_alone():
    spec = TokenSpec(("[SEG]",), ("[SEG]",), wrap_image=False)
    tokenizer = tokenizer_of("lisa")
    ids = Encoder(tokenizer, spec).prompt("<image>\nHi")
    text = template("llava_v1").prefix("<image>\nHi", first=True)
    assert ids == whole_text_ids(tokenizer, text) and 601 not in ids


def test_a_placeholder_among_the_tokens_still_stands_for_the_image(tmp_path):
    """llava-hf folders have it in their vocabulary, at an id of its own."""
    tokenizer = AutoTokenizer.from_pretrained(OWN / "lisa")
    tokenizer.add_tokens(["<image>", "<pad>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    encoder = Encoder(load_tokenizer(tmp_path, SPECS["lisa"]), SPECS["lisa"])
    dialogue = (Turn("<image>\nWhere is the cat?", ("It is ", Mask(0), ".")), Turn("And the dog?", ("There.",)))
    assert encoder(dialogue).mask_positions == encoder_of("lisa")(dialogue).mask_positions
    words = [token for token in encoder(dialogue).ids if token < 259]
    assert words == [token for token in encoder_of("lisa")(dialogue).ids if token < 259]
    assert encoder.prompt("<image>\nWhere is the cat?") == encoder_of("lisa").prompt("<image>\nWhere is the cat?")
    for text in ("<image>\nIs <image> here?", "<image>\nIs <pad> here?"):
        with pytest.raises(ValueError):
            encoder.prompt(text)


def test_a_row_fits_exactly_or_is_refused_with_its_text():
    dialogue = (Turn("<image>\nWhere is the red car?", ("Sure, ", Mask(0), ".")),)
    length = len(encoder_of("lisa")(dialogue).ids) - 1 + IMAGE_TOKENS
    assert encoder_of("lisa", max_length=length)(dialogue, IMAGE_TOKENS) == encoder_of("lisa")(dialogue)
    with pytest.raises(SequenceTooLong, match=rf"{length} positions.*model_max_length {length - 1}.*red car"):
        encoder_of("lisa", max_length=length - 1)(dialogue, IMAGE_TOKENS)
    assert encoder_of("lisa", max_length=length - 1).encode(dialogue).holes == (0,)


@pytest.mark.parametrize(
    ("question", "answer", "message"),
    [
        ("<image>\nDraw [SEG] now", ("ok",), r"token '\[SEG\]', which may not be typed: .*Draw"),
        ("<image>\nHi", ("a [SEG]",), r"token '\[SEG\]'"),
        ("<image>\nHi</s>", ("ok",), "token '</s>'"),
        ("<image>\nHi", ("ok <unk>",), "token '<unk>'"),
        ("<im_start><image>\nHi", ("ok",), "token '<im_start>'"),
        ("Hi", ("ok",), "<image> must stand once"),
        ("<image><image>\nHi", ("ok",), "<image> must stand once"),
        ("<image>\nHi", ("see <image>",), "<image> in an answer"),
        ("<image>\nHi", (" \n",), "empty answer to .*Hi"),
        ("<image>\nHi", (), "empty answer"),
        ("<image>\nHi", ("no ", Refuse(0)), "no token for absent targets"),
    ],
)
def test_texts_that_cannot_be_encoded_are_named(question, answer, message):
    with pytest.raises(ValueError, match=message):
        encoder_of("lisa")((Turn(question, answer),))


def test_the_picture_belongs_to_the_first_question_only():
    with pytest.raises(ValueError, match="in no other"):
        encoder_of("lisa")((Turn("<image>\nHi", ("ok",)), Turn("<image>\nHi", ("ok",))))
    with pytest.raises(ValueError, match="empty dialogue"):
        encoder_of("lisa")(())


# --- rows beyond the limit

TALK = (
    Turn("<image>\nWhat is it?", ("A cat on a mat, and a dog that looks at both of them.",)),
    Turn("Sure?", ("Quite sure, for it has whiskers.",)),
    Turn("Why?", ("Cats do.",)),
)
ROOM = IMAGE_TOKENS - 1  # positions that the image takes beyond its one id


@pytest.mark.parametrize("long_rows", ["cut", "cut_rounds"])
def test_a_dialogue_without_masks_is_cut_wherever_the_limit_is(long_rows):
    """As released: the first `max_length - 255` ids, no closing token (lisa.md 3.2); or whole rounds."""
    whole = encoder_of("lisa").encode(TALK)
    rounds = [encoder_of("lisa").encode(TALK[:number]) for number in (1, 2, 3)]
    lead = len(encoder_of("lisa").prompt(TALK[0].question))
    for limit in range(1, len(whole.ids) + 1):
        encoder = encoder_of("lisa", max_length=limit + ROOM, long_rows=long_rows)
        fitting = [row for row in rounds if len(row.ids) <= limit]
        if limit <= lead or (long_rows == "cut_rounds" and not fitting):
            with pytest.raises(SequenceTooLong, match=r"whole answer|first round is too long"):
                encoder(TALK, IMAGE_TOKENS)
            continue
        row = encoder(TALK, IMAGE_TOKENS)
        assert row.cut == len(whole.ids) - len(row.ids) and row.holes == ()
        assert (row.ids, row.labels) == (whole.ids[: len(row.ids)], whole.labels[: len(row.ids)])
        assert len(row.ids) == (limit if long_rows == "cut" else len(fitting[-1].ids))
        assert any(label != IGNORE_ID for label in row.labels)


@pytest.mark.parametrize("name", sorted(SPECS))
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_cut_takes_a_mask_or_a_refusal_away(name, data):
    """At any limit the row is too long, or it is the beginning of the whole one with every mask and refusal in it."""
    dialogue = data.draw(dialogues(SPECS[name]))
    whole = encoder_of(name).encode(dialogue)
    last = max((p[-1] + 1 for p in whole.mask_positions), default=0)
    for long_rows in ("cut", "cut_rounds"):
        limit = data.draw(st.integers(1, len(whole.ids)))
        try:
            row = encoder_of(name, max_length=limit + ROOM, long_rows=long_rows)(dialogue, IMAGE_TOKENS)
        except SequenceTooLong:
            assert limit < len(whole.ids)
            continue
        assert len(row.ids) <= limit and row.ids == whole.ids[: len(row.ids)] and last < len(row.ids)
        assert (row.holes, row.mask_positions, row.refused) == (whole.holes, whole.mask_positions, whole.refused)
        if name == "lasagna":
            refuse = tokenizer_of(name).get_vocab()["<no_ins>"]
            assert row.ids.count(refuse) == whole.ids.count(refuse) == row.refused


def test_an_explanation_behind_the_mask_is_cut_and_a_mask_behind_the_words_is_not():
    words = " because of its long whiskers and its striped fur"
    explained = (Turn("<image>\nWhy?", ("It is ", Mask(0), ".", words)),)
    late = (Turn("<image>\nWhy?", (words.strip(), Mask(0), ".")),)
    limit = len(encoder_of("six").encode(explained).ids) - 3
    encoder = encoder_of("six", max_length=limit + ROOM, long_rows="cut")
    row = encoder(explained, IMAGE_TOKENS)
    assert row.cut == 3 and row.holes == (0,) and len(row.mask_positions[0]) == 6
    inside = len(encoder_of("six").encode(late).ids) - 4  # in the midst of the six tokens of one mask
    with pytest.raises(SequenceTooLong, match="a cut would take a mask"):
        encoder_of("six", max_length=inside + ROOM, long_rows="cut")(late, IMAGE_TOKENS)


def test_rows_may_be_kept_whatever_their_length():
    assert encoder_of("lisa", max_length=260, long_rows="keep")(TALK, IMAGE_TOKENS) == encoder_of("lisa")(TALK)
