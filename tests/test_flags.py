"""Command lines of the papers become the right recipes; wrong ones are refused with the nearest right thing."""

import shlex
from functools import reduce

import pytest
import yaml

import systems  # noqa: F401  (registers the systems)
from systems.base import systems_accepting
from utils.config import Recipe, load_recipe, to_dict
from utils.flag_table import FLAGS, markdown, page
from utils.flags import CONFIGS, mix, resolve

LISA_README = (
    "--version=LLAVA --dataset_dir=./data --vision_pretrained=SAM --dataset='sem_seg||refer_seg||vqa||reason_seg' "
    "--sample_rates=9,3,3,1 --exp_name=lisa-7b"
)
LASAGNA_README = (
    "--version=LLAVA --dataset_dir=./dataset --vision_pretrained=SAM --vision_tower=CLIP "
    "--dataset='sem_seg||refer_seg||vqa||reason_seg' --exp_name=LaSagnA-7b --batch_size=2 --model_max_length=1024 "
    "--num_all_classes=80"
)


GSVA_TRAIN = (
    "--local_rank=0 --precision=bf16 --mllm_model_path=LLAVA --segmentation_model_path=sam_vit_h.pth "
    "--vision-tower=CLIP --dataset_dir=./data --lora_r=64 "
    "--dataset='sem_seg||refer_seg||vqa||reason_seg' --sample_rates=9,6,3,1 "
    "--refer_seg_data='refclef||refcoco||refcoco+||refcocog||grefcoco' --num_classes_per_sample=5 --batch_size=20 "
    "--weight=stage1.bin --no_sampling --val_refzom --auto_resume --exp_name=gsva --log_base_dir=./outputs"
)
SESAME_TRAIN = (
    "--version=LLAVA15 --dataset_dir=./dataset --vision_pretrained=SAM --exp_name=sesame_bun "
    "--num_classes_per_sample=3 --batch_size=12 "
    "--dataset='refer_seg||correct_refer_seg||vqa||neg_refer_seg' --sample_rates=12,2,2,1"
)


def recipe(line: str, said: list | None = None) -> Recipe:
    return resolve(shlex.split(line), systems_accepting, say=(said if said is not None else []).append)


def tasks(found: Recipe) -> dict:
    return {task.task: (task.rate, [item.source for item in task.sets]) for task in found.data.mixture}


def test_lisa_readme_line():
    found = recipe(LISA_README)
    assert found.system == "lisa"
    assert (found.model.version, found.model.vision_pretrained) == ("LLAVA", "SAM")
    assert found.run.exp_name == "lisa-7b"
    assert {task: rate for task, (rate, _) in tasks(found).items()} == {
        "sem_seg": 9,
        "refer_seg": 3,
        "vqa": 3,
        "reason_seg": 1,
    }
    assert tasks(found)["sem_seg"][1] == ["ade20k", "cocostuff", "pascal_part", "paco_lvis", "mapillary"]
    assert tasks(found)["refer_seg"][1] == ["refclef", "refcoco", "refcoco+", "refcocog"]
    assert (found.train.epochs, found.train.steps_per_epoch, found.train.zero_stage) == (10, 500, 2)
    assert (found.model.lora.r, found.model.lora.alpha, found.model.lora.target_modules) == (
        8,
        16,
        ("q_proj", "v_proj"),
    )


def test_lasagna_readme_line_is_told_by_its_own_flag():
    found = recipe(LASAGNA_README)
    assert found.system == "lasagna"
    assert found.options["num_all_classes"] == 80
    assert found.model.vision_tower == "CLIP" and found.model.model_max_length == 1024
    assert found.train.epochs == 36
    assert tasks(found)["sem_seg"][0] == 10
    assert {item.source: item.rate for item in found.data.mixture[0].sets} == {
        "cocostuff": 6,
        "ade20k": 3,
        "mapillary": 2,
        "cityscapes": 2,
        "openimage": 1,
    }
    assert "refcocog|umd|test" in found.eval.final_suites


def test_gsva_line_is_told_by_its_own_flags():
    found = recipe(GSVA_TRAIN)
    assert found.system == "gsva" and found.options["num_classes_per_sample"] == 5
    assert (found.model.version, found.model.vision_pretrained) == ("LLAVA", "sam_vit_h.pth")
    assert (found.model.checkpoint_file, found.model.vision_tower, found.model.lora.r) == ("stage1.bin", "CLIP", 64)
    assert found.data.sampling == "epoch" and found.loss.count_refused
    assert tasks(found)["refer_seg"] == (6, ["refclef", "refcoco", "refcoco+", "refcocog", "grefcoco"])
    assert found.eval.suites == ("ReasonSeg|val", "refzom|final|test")
    defaults = recipe("--mllm_model_path=LLAVA")
    assert defaults.eval.suites == ("ReasonSeg|val", "grefcoco|unc|val")
    assert (defaults.model.lora.r, defaults.model.train_language, defaults.model.model_max_length) == (0, False, 1024)


def test_gsva_evaluation_line():
    line = "--mllm_model_path LLAVA --weight ft.bin --eval_only --val_dataset 'grefcoco|unc|testA' --precision fp32"
    found = recipe(line)
    assert (
        found.eval.eval_only
        and found.eval.suites == ("grefcoco|unc|testA",)
        and found.model.checkpoint_file == "ft.bin"
    )


def test_sesame_line_is_told_by_its_tasks():
    found = recipe(SESAME_TRAIN)
    assert found.system == "sesame" and (found.train.epochs, found.train.batch_size) == (20, 12)
    assert {task: rate for task, (rate, _) in tasks(found).items()} == {
        "refer_seg": 12,
        "correct_refer_seg": 2,
        "vqa": 2,
        "neg_refer_seg": 1,
    }
    assert [task.rate for task in recipe("--system sesame --sample_rates 12,2,2,1").data.mixture] == [0, 12, 2, 2, 1, 0]
    found = recipe("--neg_refer_seg_data 'R-refcoco' --correct_refer_seg_data 'fprefcocog||fprefcoco'")
    assert found.system == "sesame" and tasks(found)["correct_refer_seg"][1] == ["fprefcocog", "fprefcoco"]
    assert recipe("--dataset 'refer_seg' --sample_rates 1").system == "lisa"  # every system knows that task


SESAME_REASON = (
    "--version=liuhaotian/llava-v1.5-7b --dataset_dir=./dataset --vision_pretrained=SAM --exp_name=sesame_bun "
    "--dataset='sem_seg||refer_seg||correct_refer_seg||vqa||neg_refer_seg||reason_seg' --sample_rates=10,10,2,3,1,1 "
    "--batch_size=12 --grad_accumulation_steps 1 --num_classes_per_sample=3"
)


def test_sesame_reasoning_line_has_the_tables_and_parts_of_the_release():
    found = recipe(SESAME_REASON)
    assert found.system == "sesame" and found.train.batch_size == 12
    assert {task: rate for task, (rate, _) in tasks(found).items()} == {
        "sem_seg": 10,
        "refer_seg": 10,
        "correct_refer_seg": 2,
        "vqa": 3,
        "neg_refer_seg": 1,
        "reason_seg": 1,
    }
    assert tasks(found)["reason_seg"][1] == ["ReasonSeg|train"]
    parts = {"instances": "separate", "names": "published"}
    assert {item.source: item.options for item in found.data.mixture[0].sets} == {
        "ade20k": {},
        "cocostuff": {"table": "182"},
        "pascal_part": parts,
        "paco_lvis": parts,
    }
    assert found.data.mixture == load_recipe(CONFIGS / "sesame_reason_7b.yaml").data.mixture


def test_a_task_at_rate_0_is_known_and_asks_for_its_rate():
    base = [{"task": name, "rate": rate, "sets": [{"source": name}]} for name, rate in (("a", 0), ("b", 2), ("c", 1))]

    def rates(**given: str) -> dict[str, float]:
        return {task["task"]: float(task["rate"]) for task in mix(base, given)}

    assert rates() == {"a": 0, "b": 2, "c": 1}
    assert rates(sample_rates="5,6") == {"a": 0, "b": 5, "c": 6}, "numbers are for the tasks that are trained on"
    assert rates(sample_rates="4,5,6") == {"a": 4, "b": 5, "c": 6}
    assert rates(dataset="a||c", sample_rates="3,0") == {"a": 3, "c": 0}
    with pytest.raises(ValueError, match=r"1 numbers for 2 tasks \(b, c\)"):
        rates(sample_rates="1")
    for given in ({"dataset": "a||b"}, {"a_data": "x"}, {"a_data": "x", "sample_rates": "5,6"}):
        with pytest.raises(ValueError, match=r"the recipe has a at rate 0 .* --sample_rates"):
            rates(**given)


def test_a_recipe_may_have_several_entries_of_a_task_and_flags_do_not_choose_between_them():
    sets = [{"source": "jsonl", "options": {"file": name}} for name in ("a", "b")]
    base = [{"task": "mine", "rate": rate, "sets": sets[:rate]} for rate in (2, 1)]
    assert mix(base, {}) == base
    for given in ({"dataset": "mine"}, {"sample_rates": "1,2"}, {"mine_data": "jsonl"}):
        with pytest.raises(ValueError, match=r"--\w+: the recipe has several entries of task mine; .*data\.mixture"):
            mix(base, given)
    with pytest.raises(ValueError, match="--mine_data: the recipe has several sets of source jsonl"):
        mix(base[:1], {"mine_data": "jsonl"})


def test_dashes_and_underscores_are_the_same():
    assert recipe("--vision-tower=A --lora-r 4") == recipe("--vision_tower A --lora_r=4")


@pytest.mark.parametrize("name", [flag.name for flag in FLAGS if flag.value_type is bool and flag.value is None])
def test_switches_have_both_forms(name):
    (flag,) = [flag for flag in FLAGS if flag.name == name]
    for text, value in ((f"--{name}", True), (f"--no-{name}", False), (f"--no_{name}", False)):
        assert reduce(dict.__getitem__, flag.field.split("."), to_dict(recipe(text))) is value


def test_validation_is_switched_off_by_a_flag_that_has_no_negation():
    assert recipe("").eval.validate and not recipe("--no_eval").eval.validate and not recipe("--no-eval").eval.validate
    for text in ("--no-no_eval", "--no_no_eval", "--eval"):
        with pytest.raises(SystemExit, match="unknown flag"):
            recipe(text)


@pytest.mark.parametrize(
    ("line", "excluded", "sampling"),
    [
        ("", "off", "rates"),
        ("--exclude_val --no_sampling", "refer_family", "epoch"),
        ("--exclude-val=cross_refer --sampling=once", "cross_refer", "epoch"),
        ("--exclude_val --no-exclude_val --set data.exclude_val=off", "off", "rates"),
    ],
)
def test_switches_of_named_choices(line, excluded, sampling):
    assert (recipe(line).data.exclude_val, recipe(line).data.sampling) == (excluded, sampling)


def test_precedence(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"system": "lisa", "train": {"lr": 1e-4, "batch_size": 3, "epochs": 7}}))
    found = recipe(f"--config {path} --batch_size 4 --epochs 8 --set train.epochs=9")
    assert found.train.grad_accumulation_steps == 10  # default
    assert found.train.lr == 1e-4  # recipe
    assert found.train.batch_size == 4  # flag over recipe
    assert found.train.epochs == 9  # --set over flag
    assert recipe(f"--config {path} --system lasagna").system == "lasagna"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--versoin=X", ["--versoin", "did you mean --version?"]),
        ("--learning-rate-of-nothing 3", ["unknown flag"]),
        ("stray", ["unknown argument 'stray'"]),
        ("--lr fast", ["--lr", "float"]),
    ],
)
def test_wrong_flags_are_refused_with_the_nearest(line, words, capsys):
    with pytest.raises(SystemExit) as stop:
        recipe(line)
    assert all(word in str(stop.value) for word in words)


def test_wrong_values_name_their_place():
    with pytest.raises(ValueError, match=r"train\.lrr.*lr|field in train 'lrr'"):
        recipe("--set train.lrr=3")
    with pytest.raises(ValueError, match=r"'sem_segg'.*did you mean 'sem_seg'"):
        recipe("--dataset sem_segg")
    with pytest.raises(ValueError, match="2 numbers for 4 tasks"):
        recipe("--sample_rates 1,2")
    with pytest.raises(ValueError, match=r"no system 'nowhere'; have: "):
        recipe("--system nowhere")


def test_mixture_keeps_what_the_recipe_knows():
    base = [
        {"task": "sem_seg", "rate": 10, "sets": [{"source": "a", "rate": 6, "options": {"x": 1}}, {"source": "b"}]},
        {"task": "vqa", "rate": 2, "sets": [{"source": "v"}]},
    ]
    found = mix(base, {"dataset": "vqa||sem_seg||new", "new_data": "n", "sem_seg_data": "c||a"})
    assert [task["task"] for task in found] == ["vqa", "sem_seg", "new"]
    assert [task["rate"] for task in found] == [2, 10, 1.0]
    assert [(item["source"], item["rate"]) for item in found[1]["sets"]] == [("c", 1.0), ("a", 6)]
    assert found[1]["sets"][1]["options"] == {"x": 1}
    assert base[0]["sets"][0]["source"] == "a" and len(base) == 2  # unchanged


def test_flags_without_meaning_say_so():
    said = []
    recipe("--vis_save_path=./x --local_rank=0 --start_epoch 3", said)
    assert len(said) == 2 and "vis_save_path" in said[0] and "start_epoch" in said[1]


def test_the_page_of_flags_is_fresh():
    text = (CONFIGS.parent / "docs" / "flags.md").read_text(encoding="utf-8")
    assert text == page(), "docs/flags.md is stale: python -m utils.flags > docs/flags.md"


def test_table_lists_every_flag():
    table = markdown()
    assert all(f"`--{flag.name}`" in table for flag in FLAGS)
    assert all(line.replace("\\|", "").count("|") == 5 for line in table.splitlines())


@pytest.mark.parametrize("name", ["config", "system", "dataset", "sem_seg_data"])
def test_an_empty_value_as_of_a_shell_variable_that_is_not_set_is_refused(name):
    with pytest.raises(ValueError, match=f"--{name} is empty"):
        recipe(f"--{name}=''")


def test_the_home_folder_after_an_equals_sign_is_found(monkeypatch):
    """Where a shell leaves the ~ as it is."""
    monkeypatch.setenv("HOME", "/home/me")
    found = recipe("--dataset-dir=~/data --vision_pretrained=~/sam.pth")
    assert (found.data.dataset_dir, found.model.vision_pretrained) == ("/home/me/data", "/home/me/sam.pth")


def test_a_switch_with_a_value_says_how_switches_are_written():
    with pytest.raises(SystemExit, match="unknown argument 'False'; switches are written --name or --no_name"):
        recipe("--auto_resume False")
