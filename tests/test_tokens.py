"""The tokenizer recipe: published ids around added tokens, ids by name, decoding without surprises."""

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.tokens import TokenSpec, decode, load_tokenizer, mask_ids, token_id
from data.types import Mask, Refuse
from systems.base import build_system
from tests.records import OWN, names, read_dialogues, read_record, record_folder, system_of

LISA = TokenSpec(added=("[SEG]",), mask=("[SEG]",))
LASAGNA = TokenSpec(("<cat_start>", "<cat_end>", "<semantic>", "<ins>", "<no_ins>"), ("<ins>",), "<no_ins>")


@pytest.fixture(scope="module")
def lisa():
    return load_tokenizer(OWN / "lisa", LISA)


@pytest.fixture(scope="module")
def pieces():
    return sentencepiece.SentencePieceProcessor(str(OWN / "lisa" / "tokenizer.model"))


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(st.sampled_from("abcdeghimnorst ,.?'-019\n\té漢😀"), max_size=60))
@example(text="  two blanks first")
def test_plain_text_gives_the_ids_of_sentencepiece(lisa, pieces, text):
    assert ids(lisa, text) == pieces.encode(text)


def test_added_tokens_strip_both_sides_and_pieces_start_anew(lisa):
    seg, dot = token_id(lisa, "[SEG]"), ids(lisa, ".")
    assert ids(lisa, "It is [SEG].") == [*ids(lisa, "It is"), seg, *dot]
    assert ids(lisa, "It is \n [SEG] \n.") == [*ids(lisa, "It is"), seg, *dot]
    assert ids(lisa, "[SEG][SEG] [SEG]") == [seg] * 3


def test_sentence_ends_do_not_strip(lisa):
    end, blank = lisa.eos_token_id, ids(lisa, ". ")[len(ids(lisa, ".")) :]
    assert blank and ids(lisa, "a. </s>") == [*ids(lisa, "a."), *blank, end]
    assert ids(lisa, "a.</s>b") == [*ids(lisa, "a."), end, *ids(lisa, "b")]


def test_pad_is_unk_with_id_0_and_padding_is_right(lisa):
    assert (lisa.pad_token_id, lisa.unk_token_id, lisa.bos_token_id, lisa.eos_token_id) == (0, 0, 1, 2)
    assert lisa.padding_side == "right"


def test_tokens_of_the_folder_keep_their_ids(lisa):
    assert [token_id(lisa, name) for name in ("[SEG]", "<im_start>", "<im_end>")] == [600, 601, 602]
    assert len(lisa) == 603


def test_new_tokens_come_after_in_the_order_of_the_spec():
    more = TokenSpec(added=("[SEG]", "[REJ]"), mask=("[SEG]",), refuse="[REJ]")
    tokenizer = load_tokenizer(OWN / "lisa", more)
    assert token_id(tokenizer, "[REJ]") == 603
    assert mask_ids(tokenizer, more) == (600,)


def test_decode_gives_added_tokens_verbatim_and_no_other_blanks():
    tokenizer = load_tokenizer(OWN / "lasagna", LASAGNA)
    row = ids(tokenizer, "sky<ins> traffic light<no_ins>wall<ins></s>")
    assert decode([1, -200, *row, 0], tokenizer) == "sky<ins>traffic light<no_ins>wall<ins>"


@pytest.mark.parametrize("name", names())
def test_decode_inverts_the_golden_answers(name):
    folder, spec = record_folder(name), build_system(system_of(name)).tokens
    tokenizer, described = load_tokenizer(folder, spec), read_record(name)
    with np.load(folder / "golden.npz") as record:
        labels = [index for row in record["labels"].tolist() for index in row if index != -100]
    texts = [
        read_dialogues(texts, spec, described.get("conv_type", "llava_v1")) for texts in described["conversations"]
    ]
    turns = [turn for group in texts for dialogue in group for turn in dialogue]
    ends = [position for position, index in enumerate(labels) if index == tokenizer.eos_token_id]
    assert len(ends) == len(turns)
    for turn, start, end in zip(turns, [-1, *ends], ends, strict=False):
        words = {Mask: "".join(spec.mask), Refuse: spec.refuse}
        written = [part.strip() if isinstance(part, str) else words[type(part)] for part in turn.answer]
        assert decode(labels[start + 1 : end], tokenizer) == "".join(written)


def test_a_missing_token_names_the_added_ones(lisa):
    with pytest.raises(KeyError, match=r"no token '\[REJ\]'.*\[SEG\]"):
        token_id(lisa, "[REJ]")


def test_a_spec_may_only_use_tokens_that_it_adds():
    with pytest.raises(ValueError, match=r"'\[SEG\]' is used but not among"):
        TokenSpec(added=("[SIG]",), mask=("[SEG]",))


def test_a_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no tokenizer"):
        load_tokenizer(tmp_path, LISA)
