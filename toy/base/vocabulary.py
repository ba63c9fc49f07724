"""The toy LLaMA vocabulary: a small sentencepiece BPE model in which the words that matter are one piece each."""

import io
import json
from pathlib import Path

import numpy as np
import sentencepiece

from toy.base.facts import CELLS, Facts
from toy.base.pictures import scene_of
from toy.base.turns import MENU
from toy.world.knowledge import FACTS
from toy.world.scene import CLASSES, COLORS, PARTS

PIECES = 1792
IMAGE_PATCH, IMAGE_START, IMAGE_END = "<im_patch>", "<im_start>", "<im_end>"  # as in LLaVA v1.1, after the pieces
ADDED = (IMAGE_PATCH, IMAGE_START, IMAGE_END)
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
)
WORDS_FILE = Path(__file__).with_name("words.txt")
SCENES = 400  # scenes with whose dialogues the model is trained
OTHER_WORDS = ["USER", "ASSISTANT", "yes", "no", "animal"]


def train_vocabulary(folder: Path, seed: int) -> sentencepiece.SentencePieceProcessor:
    """Train the model, write the tokenizer's files into `folder`, and check that every important word is one piece."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_corpus(seed)),
        model_writer=buffer,
        vocab_size=PIECES,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(buffer.getvalue())
    _write_settings(folder)
    pieces = load_vocabulary(folder)
    split = [word for word in _single_words() if len(pieces.encode(word)) != 1]
    if split:
        raise ValueError(
            f"the vocabulary of {PIECES} pieces splits {', '.join(split)}: raise PIECES or the weight of these words"
        )
    return pieces


def load_vocabulary(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def added_ids(pieces: sentencepiece.SentencePieceProcessor) -> dict[str, int]:
    """Ids of the image tokens, which come after the pieces."""
    return {token: pieces.get_piece_size() + index for index, token in enumerate(ADDED)}


def _single_words() -> list[str]:
    parts = {part for names in PARTS.values() for part in names}
    return [*CLASSES, *COLORS, *sorted(parts), "small", "large", *OTHER_WORDS, *CELLS]


def _corpus(seed: int) -> list[str]:
    """Training text: the words that must be one piece (often), other words (less often), and dialogues about scenes."""
    lines = _single_words() * 3000
    for line in WORDS_FILE.read_text(encoding="utf-8").splitlines():
        lines += [line] * 12
    facts = " ".join([*(fact.phrase for fact in FACTS), *(fact.reason for fact in FACTS)])
    lines += [SYSTEM] * 200 + [facts] * 60
    for index in range(SCENES):
        rng = np.random.default_rng((seed, index))
        scene = Facts(scene_of("held_out", 1 << 20 | index, seed), rng)
        turns = [make(scene, rng) for make in MENU]
        lines += [f"USER: {turn[0]} ASSISTANT: {turn[1]}" for turn in turns if turn]
    return lines


def _write_settings(folder: Path) -> None:
    ids = added_ids(load_vocabulary(folder))
    special = {
        "content": "",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    plain = {index: special | {"content": token} for index, token in enumerate(("<unk>", "<s>", "</s>"))}
    images = {index: special | {"content": token, "lstrip": True, "rstrip": True} for token, index in ids.items()}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "use_fast": False,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "padding_side": "right",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "added_tokens_decoder": {str(index): token for index, token in (plain | images).items()},
    }
    _write_json(folder / "tokenizer_config.json", config)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    _write_json(folder / "special_tokens_map.json", names)
    _write_json(folder / "added_tokens.json", ids)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
