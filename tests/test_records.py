"""The helper that reads golden records: conversations of several rounds, numbered holes, folders of other families."""

import json
import shutil

import numpy as np
import pytest
import sentencepiece

from data.encode import Encoder
from data.tokens import load_tokenizer
from data.types import IGNORE_ID, IMAGE_ID, Mask, Refuse, Turn
from systems.base import build_system
from tests import records
from tests.records import OWN, last_answer, names, open_prompt, read_dialogues, record_folder, script_of

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
)
GSVA, SIX = build_system("gsva").tokens, build_system("pixellm").tokens
SEG, REJ, START, END, EOS = 600, 601, 602, 603, 2  # ids in the tokenizer of the record gsva
PIECES = sentencepiece.SentencePieceProcessor(str(OWN / "gsva" / "tokenizer.model"))

# A conversation, and its row cut at the added tokens: each text has the ids of it alone; answers are trained on.
ROUNDS = [
    (
        f"{SYSTEM} USER: <image>\nWhat are the red car and the dog? ASSISTANT: Sure, red car:[SEG], dog:[REJ].</s>"
        "USER: And the tree? ASSISTANT: [SEG]</s>USER: Thank you. ASSISTANT: Yes.\nIt is.</s>",
        [
            (f"{SYSTEM} USER:", START, IMAGE_ID, END, "What are the red car and the dog? ASSISTANT:"),
            ("Sure, red car:", SEG, ", dog:", REJ, ".", EOS),
            ("USER: And the tree? ASSISTANT:",),
            (SEG, EOS),
            ("USER: Thank you. ASSISTANT:",),
            ("Yes.\nIt is.", EOS),
        ],
    ),
    (
        f"{SYSTEM} USER: <image>\n Where is  it? ASSISTANT: It is [REJ] .</s>"
        "USER: Look again: ASSISTANT: here [SEG] [SEG]</s>",
        [
            (f"{SYSTEM} USER:", START, IMAGE_ID, END, "Where is  it? ASSISTANT:"),
            ("It is", REJ, ".", EOS),
            ("USER: Look again: ASSISTANT:",),
            ("here", SEG, SEG, EOS),
        ],
    ),
]


def by_hand(parts) -> tuple[list[int], list[int]]:
    """Ids and labels of alternating questions and answers."""
    ids, labels = [1], [IGNORE_ID]
    for number, part in enumerate(parts):
        new = [index for piece in part for index in (PIECES.encode(piece) if isinstance(piece, str) else [piece])]
        ids += new
        labels += new if number % 2 else [IGNORE_ID] * len(new)
    return ids, labels


@pytest.fixture
def record(tmp_path, monkeypatch):
    """A record of the form of golden/README.md with conversations of three and of two rounds about one image."""
    folder = tmp_path / "gsva_rounds"
    folder.mkdir()
    for file in (OWN / "gsva").glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_bytes((OWN / "gsva" / "config.json").read_bytes())
    rows = [by_hand(parts) for _, parts in ROUNDS]
    length = max(len(ids) for ids, _ in rows)
    arrays = {
        "input_ids": [ids + [0] * (length - len(ids)) for ids, _ in rows],
        "labels": [labels + [IGNORE_ID] * (length - len(labels)) for _, labels in rows],
        "attention_mask": [[True] * len(ids) + [False] * (length - len(ids)) for ids, _ in rows],
    }
    ids, labels, attention = (np.array(arrays[name]) for name in ("input_ids", "labels", "attention_mask"))
    np.savez(folder / "golden.npz", input_ids=ids, labels=labels, attention_mask=attention)
    (folder / "golden.json").write_text(json.dumps({"conversations": [[text for text, _ in ROUNDS]]}))
    monkeypatch.setattr(records, "GOLDEN", tmp_path)
    return folder


def test_a_record_of_several_rounds_has_the_ids_written_by_hand(record):
    """Read as tests/test_golden.py reads it: found by its folder, its system by its architecture."""
    assert "gsva_rounds" in names("gsva") and record_folder("gsva_rounds") == record
    described, arrays = json.loads((record / "golden.json").read_text()), np.load(record / "golden.npz")
    encoder = Encoder(load_tokenizer(record, GSVA), GSVA)
    for index, dialogue in enumerate(read_dialogues(described["conversations"][0], GSVA)):
        row, real = encoder(dialogue), arrays["attention_mask"][index]
        assert row.ids == arrays["input_ids"][index][real].tolist()
        assert row.labels == arrays["labels"][index][real].tolist()


def test_rounds_become_turns_and_slots_count_through_the_picture():
    first, second = read_dialogues([text for text, _ in ROUNDS], GSVA)
    assert first == (
        Turn("<image>\nWhat are the red car and the dog?", ("Sure, red car:", Mask(0), ", dog:", Refuse(1), ".")),
        Turn("And the tree?", (Mask(2),)),
        Turn("Thank you.", ("Yes.\nIt is.",)),
    )
    assert second == (
        Turn("<image>\n Where is  it?", ("It is ", Refuse(3), " .")),
        Turn("Look again:", ("here ", Mask(4), " ", Mask(5))),
    )


def test_every_template_is_read():
    text = "[INST] <<SYS>>\n{}\n<</SYS>>\n\n<im_start><image><im_end>\nHi [/INST] It is [SEG]. </s>"
    text += "<s>[INST] Again? [/INST] No. </s>"
    encoder = Encoder(load_tokenizer(OWN / "gsva", GSVA), GSVA, "llava_llama_2")
    system = encoder.template.first.split("<<SYS>>\n")[1].split("\n<</SYS>>")[0]
    (found,) = read_dialogues([text.replace("{}", system)], GSVA, "llava_llama_2")
    assert found == (Turn("<image>\nHi", ("It is ", Mask(0), ".")), Turn("Again?", ("No.",)))
    with pytest.raises(AssertionError, match="no conversation of the template llava_v1"):
        read_dialogues([text], GSVA)
    with pytest.raises(AssertionError, match="no conversation"):
        read_dialogues([f"{ROUNDS[0][0]}USER: and then"], GSVA)


def test_a_prompt_ends_with_a_question_after_whole_rounds():
    whole = ROUNDS[1][0]
    (rounds,) = read_dialogues([whole], GSVA)
    question, history = open_prompt(f"{whole}USER: And the sky? ASSISTANT:", GSVA)
    assert question == "And the sky?" and len(history) == 2
    assert [turn.question for turn in history] == [turn.question for turn in rounds]
    assert open_prompt(f"{SYSTEM} USER: <im_start><image><im_end>\nHi ASSISTANT:", GSVA) == ("<image>\nHi", ())
    with pytest.raises(AssertionError, match="no open prompt"):
        open_prompt(whole, GSVA)


def test_the_last_answer_of_a_conversation_is_without_the_templates_words():
    assert last_answer("USER: x <ins> ASSISTANT: wall <ins> boat <no_ins></s>") == " wall <ins> boat <no_ins>"
    assert last_answer(ROUNDS[1][0]) == " here [SEG] [SEG]"
    assert last_answer("[INST] Hi [/INST] It is [SEG]. </s>", "llava_llama_2") == " It is [SEG]."


def test_groups_of_mask_tokens_with_and_without_blanks():
    group = SIX.mask
    assert script_of(f"a {''.join(group)}, b {' '.join(group)}.", SIX) == ("a ", Mask(0), ", b ", Mask(1), ".")


def test_folders_of_other_families_are_skipped_with_their_architecture(record):
    for name, architecture in (("video", "VideoLISAForCausalLM"), ("bare", None)):
        (record.parent / name).mkdir()
        (record.parent / name / "golden.json").write_text("{}")
        (record.parent / name / "config.json").write_text(json.dumps({"architectures": [architecture]}))
        with pytest.raises(pytest.skip.Exception, match=f"{name} is of a system that is not here: .*{architecture}"):
            record_folder(name)
    with pytest.raises(pytest.skip.Exception, match="no record lisa in"):
        record_folder("lisa")
    assert {"video", "lisa", "gsva_rounds"} <= {*names()}


def test_records_of_another_form_are_skipped(record):
    shutil.copytree(record, record.parent / "modern")
    (record.parent / "modern" / "golden.json").write_text(json.dumps({"train": []}))
    with pytest.raises(pytest.skip.Exception, match="modern is of another form"):
        record_folder("modern")
    assert record_folder("modern", several_runs=True).name == "modern"
    with pytest.raises(pytest.skip.Exception, match="gsva_rounds is of another form"):
        record_folder(record.name, several_runs=True)
