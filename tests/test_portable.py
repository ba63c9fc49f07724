"""A merged folder loads where there are torch and transformers, but not this project, with the same answers."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from data.tokens import mask_ids
from evaluation.auto_assistant import SegmentationAssistant
from evaluation.predictor import Predictor
from model.checkpoints.files import read_tensors
from model.checkpoints.hub import HUB_FILES
from model.checkpoints.save import save_folder
from model.heads import HEADS
from model.vlm import VLMS
from systems.assistant import Assistant, build, load
from systems.base import SYSTEMS, build_system
from systems.wording import wording_file
from tests import ask_elsewhere
from tests.records import OWN
from tests.tiny_assistant import tiny
from tests.tiny_base import base_tensors, write_base
from tests.tiny_qwen import stock_model
from tests.tiny_run import environment, write_recipe
from tests.tiny_sam2 import SIDES, stock
from tests.tiny_words import tiny_qwen_tokenizer
from tools.portable.copies import AVAILABLE, ROOT, copies, flat
from tools.portable.folder import CLASS, ENTRY, complete, own_modules
from utils.config import load_recipe

TOKENS = 12  # of an answer
QUESTION = "Where does the light come from?"
PIXEL = {"mask_head": "pixel", "tower": {"pad": True}, "head_options": {"levels": [-2], "width": 32, "mlp_dim": 64}}
# Packages of requirements.txt that somebody with torch and transformers need not have.
WITHOUT = ("accelerate", "cv2", "deepspeed", "matplotlib", "peft", "pycocotools", "rapidfuzz", "sacrebleu", "scipy")


def eager(assistant: Assistant, loudness: float = 400.0) -> Assistant:
    """The same assistant, whose answers to anything have mask tokens."""
    token = mask_ids(assistant.tokenizer, assistant.system.tokens)[0]
    name = next(name for name, _ in assistant.model.named_parameters() if name.endswith("lm_head.weight"))
    assistant.model.get_parameter(name).data[token] *= loudness
    return assistant


def made(folder: Path, **model) -> Assistant:
    """LISA as a recipe with these parts of a model builds it, before any training."""
    return eager(build(load_recipe(write_recipe(folder, model=model)), "cpu", trainable=False))


def write(assistant: Assistant, folder: Path) -> Path:
    """A merged folder, as the merge program writes it."""
    parts = (assistant.model, folder, assistant.tokenizer, assistant.recipe)
    save_folder(*parts, more=lambda draft: complete(draft, assistant, folder.name))
    return folder


def published() -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in read_tensors(OWN / "lisa").items()}


def elsewhere(place: Path, *words: str) -> str:
    """Runs Python in `place`, apart from this project and from the user's packages; returns what it prints."""
    variables = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    variables |= {"HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", *words], cwd=place, env=variables, capture_output=True, text=True, timeout=300
    )
    assert not done.returncode, done.stderr[-3000:]
    return done.stdout


def snippet_of(folder: Path, file: Path) -> str:
    """Writes the program in a folder's card to `file`; returns its name."""
    (program,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    assert f'AutoModel.from_pretrained("{folder.name}", trust_remote_code=True)' in program
    file.write_text(program)
    return file.name


def same_elsewhere(place: Path, *folders: str, without: tuple[str, ...] = WITHOUT, least: int = 4) -> None:
    """Asserts that AutoModel elsewhere and `Predictor` here give equal answers, to the last bit of every mask, and that
    the program in the first folder's card runs there. least: masks of a folder's answers."""
    # without loss, so that OpenCV and Pillow read the same
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(place / "photo.png")
    settings = {"without": without, "folders": folders, "image": "photo.png", "question": QUESTION, "tokens": TOKENS}
    snippets = [snippet_of(place / folders[0], place / "use.py")]
    Image.open(place / "photo.png").save(place / "street.jpg")
    (place / "settings.json").write_text(json.dumps(settings | {"project": f"{ROOT}/", "snippets": snippets}))
    shutil.copy(ask_elsewhere.__file__, place / "ask.py")
    elsewhere(place, "ask.py", "settings.json")
    heard = json.loads((place / "heard.json").read_text())
    for name in folders:
        own = Predictor.from_pretrained(place / name, device="cpu", max_new_tokens=TOKENS)
        told, masks = ask_elsewhere.answers(own.ask, own, own.classes, own.chat, place / "photo.png", QUESTION)
        assert heard[name] == told
        with np.load(place / f"{name}.npz") as found:
            assert len(found.files) == len(masks) >= least
            assert all(np.array_equal(mask, found[key]) for key, mask in zip(found.files, masks, strict=True))
        assert not least or any(mask.any() and not mask.all() for mask in masks)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two merged folders, `sam` and `pixel`."""
    folder = tmp_path_factory.mktemp("portable")
    write(tiny("lisa", eager=5), folder / "sam")
    base = write_base(folder / "base", base_tensors(published()))
    write(made(folder, version=str(base), **PIXEL), folder / "pixel")
    return folder


def test_auto_model_answers_as_the_predictor(place):
    """Both folders in one process: neither takes the other's code for its own."""
    same_elsewhere(place, "sam", "pixel")
    assert (place / "mask_0.png").is_file()  # that program's


def test_stock_classes_read_the_folder_without_its_code(place):
    for name in ("sam", "pixel"):
        assert type(AutoConfig.from_pretrained(place / name)) is LlavaConfig
        stock, report = LlavaForConditionalGeneration.from_pretrained(place / name, output_loading_info=True)
        assert type(stock) is LlavaForConditionalGeneration
        # the tiny projector has one layer, the library's has two
        assert all("multi_modal_projector.linear_2" in key for key in report["missing_keys"])


def test_our_programs_never_run_the_folders_code(place, tmp_path):
    folder = tmp_path / "hostile"
    shutil.copytree(place / "sam", folder)
    for file in folder.glob("*.py"):
        file.write_text("raise SystemExit('run')\n")
    (folder / "wording.yaml").write_text("answer: [{mask}")
    for name in ("config", "tokenizer_config"):
        values = json.loads((folder / f"{name}.json").read_text())
        spread = dict.fromkeys(("AutoModel", "AutoConfig", "AutoModelForImageTextToText"), f"{ENTRY}.{CLASS}")
        spread |= {"AutoTokenizer": [spread["AutoModel"]] * 2}
        (folder / f"{name}.json").write_text(json.dumps(values | {"auto_map": spread}))
    assert load(folder, device="cpu").system.name == "lisa"
    assert not any(fnmatch(f"{ENTRY}.py", pattern) for pattern in HUB_FILES)


def test_copies_are_complete_and_ask_for_nothing_else(tmp_path):
    """With every system, backbone and mask head: more than any folder has."""
    parts = {kind.__module__ for registry in (VLMS, HEADS, SYSTEMS) for kind in map(registry.__getitem__, registry)}
    texts = copies({SegmentationAssistant.__module__, *parts})
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        assert set(get_imports(tmp_path / name)) <= AVAILABLE | sys.stdlib_module_names, name
        assert not re.search("training|data_sources|finetune_trainable|evaluation_runner", name)
    first = tmp_path / f"{flat(SegmentationAssistant.__module__)}.py"
    needed = {Path(file).name for file in get_relative_import_files(first)}
    assert needed <= texts.keys() and "systems_base.py" in needed


def test_a_folder_has_the_code_of_its_own_parts(place):
    names = {file.name for file in (place / "pixel").glob("model_*_*.py")} | {ENTRY}
    assert {"model_heads_pixel.py", "model_vlm_llava.py"} <= names
    assert not {"model_heads_sam2.py", "model_vlm_qwen_vl.py", "systems_gsva.py"} & names
    assert own_modules(load(place / "pixel", device="cpu")) > {"model.heads.pixel", "systems.lisa"}


class WithoutImports(ast.NodeTransformer):
    """Drops import statements, what stands around them, and what takes their place in a copy."""

    def visit(self, node: ast.AST) -> ast.AST | None:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            return None
        node = self.generic_visit(node)
        if isinstance(node, ast.Try) and not node.body:
            return None
        typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        missing = isinstance(node, ast.Raise) and "is not among the files of this folder" in ast.dump(node)
        return None if typing or missing else node


def test_copies_say_what_the_modules_say(place):
    files = [file for file in (place / "pixel").glob("*.py") if file.stem != ENTRY]
    assert len(files) > 50
    for file in files:
        (where,) = re.findall(r"^# A copy of (\S+) .*Apache-2.0$", file.read_text().splitlines()[0])
        copy, original = (ast.parse(one.read_text()) for one in (file, ROOT / where))
        assert ast.dump(WithoutImports().visit(copy)) == ast.dump(WithoutImports().visit(original)), where


@pytest.mark.parametrize("system", list(SYSTEMS))
def test_every_system_takes_its_wording_from_a_file(system):
    assert build_system(system, {"wording": str(wording_file(system))}).tokens == build_system(system).tokens


def test_options_of_loading(place):
    loaded = SegmentationAssistant.from_pretrained(place / "sam", torch_dtype="bfloat16", device_map={"": "cpu"})
    assert loaded.dtype == torch.bfloat16 and loaded.device == torch.device("cpu")
    assert SegmentationAssistant.from_pretrained(place / "sam", dtype="auto", device_map="auto").eval().dtype in (
        torch.float32,
        torch.float16,
        torch.bfloat16,
    )
    for options, kind, says in (
        ({"dtype": "int8"}, ValueError, "dtype: 'int8' is not a choice; have: torch.float32"),
        ({"device_map": "balanced"}, ValueError, "on one device, not on 'balanced'"),
        ({"device_map": {"vlm": 0, "head": 1}}, ValueError, "on one device"),
        ({"quantization_config": {"bits": 4}}, TypeError, "not loaded with quantization_config; there are dtype"),
        ({"attn_implementation": "nothing"}, ValueError, "attn_implementation"),
    ):
        with pytest.raises(kind, match=re.escape(says)):
            SegmentationAssistant.from_pretrained(place / "sam", **options)
    for call in (loaded.save_pretrained, SegmentationAssistant._from_config):
        with pytest.raises(NotImplementedError, match="folder"):
            call()
    with pytest.raises(FileNotFoundError, match="me/nothing"):
        SegmentationAssistant.from_pretrained("me/nothing", local_files_only=True)


def test_pillow_reads_files_where_opencv_is_missing(place, monkeypatch, caplog):
    monkeypatch.setattr("evaluation.auto_assistant.find_spec", lambda name: None)
    monkeypatch.setattr("utils.log.log.propagate", True)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.effect_noise((50, 30), 90).convert("RGB").save(place / "turned.png", exif=exif)
    own = Predictor.from_pretrained(place / "sam", device="cpu", max_new_tokens=TOKENS)
    other = SegmentationAssistant(own)
    for asked, expected in zip(
        other.segment(place / "turned.png", ["cup"]), own(place / "turned.png", ["cup"]), strict=True
    ):
        assert np.array_equal(asked.mask, expected.mask) and asked.mask.shape == (50, 30)
    assert "OpenCV is not installed: Pillow reads" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_qwen_base_with_sam2(family, tmp_path):
    size = tiny_qwen_tokenizer(tmp_path / "base", version=3 if family == "qwen3_vl" else 2)
    stock_model(family, tied=True, vocab_size=size + 9, max_position_embeddings=2048).save_pretrained(tmp_path / "base")
    stock("sam2").save_pretrained(tmp_path / "sam2")
    model = {"version": str(tmp_path / "base"), "vision_pretrained": str(tmp_path / "sam2"), "mask_head": "sam2"}
    model |= {"vision_tower": None, "conv_type": "qwen_chat", "tower": {"min_pixels": 384, "max_pixels": 1280}}
    model |= {"image_size": SIDES["sam2"], "head_options": {"masks": "best_of_three"}}
    write(made(tmp_path, **model), tmp_path / "qwen")
    same_elsewhere(tmp_path, "qwen", without=(*WITHOUT, "sentencepiece", "google.protobuf"))
    assert not {"model_vlm_llava.py", "model_heads_sam3.py"} & {file.name for file in (tmp_path / "qwen").iterdir()}


@pytest.mark.slow
def test_every_published_system(tmp_path):
    """Random weights seldom write a mask in the words of these systems; their texts are compared."""
    names = ("lasagna", "gsva", "sesame", "pixellm")
    for name in names:
        write(tiny(name, eager=8), tmp_path / name)
    same_elsewhere(tmp_path, *names, least=0)


@pytest.mark.slow
def test_a_folder_in_the_hubs_cache(place, tmp_path):
    """As the hub's client leaves it: links to blobs, under the name of a commit."""
    commit = "0123456789" * 4
    cache = tmp_path / "home" / "hub" / "models--me--mine"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    shutil.copytree(place / "sam", cache / "snapshots" / commit)
    program = (
        "from transformers import AutoModel; import numpy as np\n"
        "model = AutoModel.from_pretrained('me/mine', trust_remote_code=True, max_new_tokens=8)\n"
        "print(model.predict(np.full((40, 60, 3), 99, np.uint8), 'Where?').text)\n"
    )
    own = Predictor.from_pretrained(place / "sam", device="cpu", max_new_tokens=8)
    assert elsewhere(tmp_path, "-c", program).strip() == own.ask(np.full((40, 60, 3), 99, np.uint8), "Where?").text
