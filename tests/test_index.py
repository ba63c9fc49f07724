"""The index of annotation files: made once, shared, never stale, never half; large JSON read entry by entry."""

import json
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.readers import index
from data.readers import json_stream as stream
from data.readers.index import ENDS, HOME, META, ROWS, set_index_folder
from data.sources.base import Rows, image_paths, indexed_rows, read_entries

CALLS = "calls.txt"  # every parse adds a line next to its file
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def parse(path, *extra):
    with (path.parent / CALLS).open("a") as calls:
        calls.write("parsed\n")
    for number, name in enumerate(json.loads(path.read_text())):
        yield {"file_name": name, "number": number, "extra": [str(item) for item in extra if not callable(item)]}


def other_parse(path):
    yield {"file_name": "other"}


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.delenv(HOME, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "notes.json").write_text(json.dumps(["ä b.jpg", "b.jpg", "c.jpg"]))
    return folder


def open_index(root, *options):
    return indexed_rows(root, parse, [root / "notes.json"], *options, image_key="file_name")


def parses(root):
    return len((root / CALLS).read_text().splitlines())


def folders(root):
    return sorted(path for path in (root / ".index").iterdir() if path.is_dir())


# --- rows


@settings(max_examples=40, deadline=None)
@given(st.lists(VALUES, max_size=6))
def test_rows_are_what_was_put_in_in_memory_and_on_disk(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("rows")
    (folder / "x").touch()
    for rows in (Rows(values), indexed_rows(folder, lambda path: values, [folder / "x"])):
        assert list(rows) == values and len(rows) == len(values)
        assert list(pickle.loads(pickle.dumps(rows))) == values
        with pytest.raises(IndexError, match=f"row {len(values)} of {len(values)}"):
            rows[len(values)]
        with pytest.raises(IndexError):
            rows[-1]
    shutil.rmtree(folder)


def test_pictures_come_without_decoding(root):
    rows = open_index(root)
    assert rows.image_names() == ["ä b.jpg", "b.jpg", "c.jpg"] == Rows(rows, image_key="file_name").image_names()
    (folders(root)[0] / ROWS).write_bytes(b"x" * (folders(root)[0] / ROWS).stat().st_size)
    assert open_index(root).image_names() == ["ä b.jpg", "b.jpg", "c.jpg"]
    with pytest.raises(TypeError, match="without an image_key"):
        Rows([1]).image_names()


def mapped_kilobytes(folder):
    """Resident size of this process's map of the rows in `folder`."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.endswith(f"{folder}/{ROWS}"))
    return int(next(line for line in lines[start:] if line.startswith("Rss:")).split()[1])


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_what_was_read_does_not_stay_resident(root, monkeypatch):
    monkeypatch.setattr(index, "GIVE_BACK", 16)
    rows = indexed_rows(root, lambda path: ("x" * 200_000 for _ in range(100)), [root / "notes.json"])
    assert all(len(row) == 200_000 for row in rows)
    assert mapped_kilobytes(rows.folder) < 16 * 400 < 100 * 200


# --- made once, never stale


def test_the_second_start_parses_nothing(root):
    first, second = open_index(root), open_index(root)
    assert list(first) == list(second) and second[1] == {"file_name": "b.jpg", "number": 1, "extra": []}
    assert parses(root) == 1 and len(folders(root)) == 1


def test_a_changed_file_is_parsed_anew_and_replaces_the_old_index(root):
    held = open_index(root)
    (root / "notes.json").write_text(json.dumps(["d.jpg"]))
    assert [row["file_name"] for row in open_index(root)] == ["d.jpg"]
    assert [row["file_name"] for row in held] == ["ä b.jpg", "b.jpg", "c.jpg"], "who has the old one keeps it"
    os.utime(root / "notes.json", ns=(1, 1))
    open_index(root)
    assert parses(root) == 3 and len(folders(root)) == 1
    assert not [path for path in (root / ".index").iterdir() if ".old" in path.name]


def test_options_and_parsers_have_indexes_of_their_own(root):
    assert open_index(root, "train")[0]["extra"] == ["train"]
    assert open_index(root, "val")[0]["extra"] == ["val"]
    assert indexed_rows(root, other_parse, [root / "notes.json"])[0] == {"file_name": "other"}
    assert open_index(root, other_parse)[0]["file_name"] == "ä b.jpg"  # functions are told apart by name and text
    assert len(folders(root)) == 4


def test_changed_code_makes_a_new_index(root, monkeypatch):
    open_index(root)
    monkeypatch.setattr(index, "FORMAT", -1)
    open_index(root)
    assert parses(root) == 2


def test_a_dataset_folder_may_move(root):
    open_index(root)
    moved = root.with_name("moved")
    root.rename(moved)
    open_index(moved)
    assert parses(moved) == 1


@pytest.mark.parametrize("name", [ROWS, ENDS, META])
@pytest.mark.parametrize("how", ["cut", "garbage", "gone"])
def test_a_damaged_index_is_made_anew(root, name, how):
    open_index(root)
    (folder,) = folders(root)
    data = (folder / name).read_bytes()
    if how == "gone":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(data[: len(data) // 2] if how == "cut" else b"\0" * (len(data) + 1))
    assert [row["file_name"] for row in open_index(root)] == ["ä b.jpg", "b.jpg", "c.jpg"]
    assert parses(root) == 2


def test_a_row_that_was_overwritten_tells_the_folder(root):
    open_index(root)
    (folder,) = folders(root)
    (folder / ROWS).write_bytes(b"?" * (folder / ROWS).stat().st_size)
    with pytest.raises(ValueError, match=rf"{folder}: row 1 is damaged .*remove that folder"):
        open_index(root)[1]


def test_a_parser_that_fails_leaves_nothing(root):
    (root / "notes.json").write_text('["a.jpg", ')
    with pytest.raises(ValueError):
        open_index(root)
    assert not folders(root)


# --- where it is


def test_what_a_killed_process_left_is_removed_by_the_next_that_makes_an_index(root):
    """Its own drafts, and those of other indexes that nobody is making; nothing else."""
    (made,) = [open_index(root).folder]
    home, other = made.parent, "refcoco-instances.json-0123456789abcdef"
    for name in (f"{made.name}.a1b2_3x4", f"{made.name}.a1b2_3x4.old", f"{other}.zzzzzzzz", f"{other[:-1]}0.yyyyyyyy"):
        (home / name).mkdir()
        (home / name / ROWS).write_text("half")
    (home / "notes of mine").mkdir()
    (home / other).mkdir()  # an index of another kind
    lock = index.FileLock(home / f"{other}.lock")
    shutil.rmtree(made)
    with lock:  # somebody makes that one
        open_index(root)
    assert {path.name for path in folders(root)} == {made.name, other, f"{other}.zzzzzzzz", "notes of mine"}


@pytest.mark.parametrize("chooser", ["environment", "recipe"])
def test_environment_and_recipe_choose_the_place(root, tmp_path, monkeypatch, chooser):
    monkeypatch.setenv(HOME, str(tmp_path / ("fast disk" if chooser == "environment" else "slow disk")))
    set_index_folder(None if chooser == "environment" else str(tmp_path / "fast disk"))
    open_index(root), open_index(root)
    assert parses(root) == 1 and not (root / ".index").exists()
    assert len(list((tmp_path / "fast disk").glob("*/*/" + ROWS))) == 1


def test_an_empty_environment_variable_chooses_nothing(root, monkeypatch):
    monkeypatch.setenv(HOME, "")
    open_index(root)
    assert len(folders(root)) == 1


def test_a_dataset_folder_that_cannot_be_written_is_indexed_elsewhere(root, tmp_path):
    (root / ".index").write_text("a file where the folder should be")  # holds for the superuser, too
    open_index(root), open_index(root)
    assert parses(root) == 1
    assert len(list((tmp_path / "home").rglob(ROWS))) == 1


def test_nowhere_to_write_keeps_the_rows_in_memory_and_says_so(root, tmp_path, caplog):
    (root / ".index").touch()
    (tmp_path / "home").touch()
    with caplog.at_level("WARNING", logger="assistant"):
        assert len(open_index(root)) == 3
    assert f"set {HOME}" in caplog.text


# --- many processes


def _child(root, barrier, results):
    barrier.wait()
    rows = open_index(root)
    results.put([rows.folder is not None, [row["file_name"] for row in rows]])


def test_eight_processes_at_once_parse_once(root):
    fork = multiprocessing.get_context("fork")
    barrier, results = fork.Barrier(8), fork.Queue()
    children = [fork.Process(target=_child, args=(root, barrier, results)) for _ in range(8)]
    for child in children:
        child.start()
    found = [results.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert found == [[True, ["ä b.jpg", "b.jpg", "c.jpg"]]] * 8
    assert parses(root) == 1 and len(folders(root)) == 1


def test_a_spawned_process_maps_the_index_anew(root):
    copy = pickle.loads(pickle.dumps(open_index(root)))
    assert list(copy) == list(open_index(root)) and copy.image_names() == open_index(root).image_names()
    shutil.rmtree(folders(root)[0])
    with pytest.raises(OSError):
        pickle.loads(pickle.dumps(copy))


# --- sources


def test_image_paths_of_a_source_that_does_not_list_them():
    class Three:
        def __len__(self):
            return 3

        def __getitem__(self, number):
            return type("R", (), {"image": Path(f"{number}.jpg")})

    assert image_paths(Three()) == ["0.jpg", "1.jpg", "2.jpg"]


# --- large JSON, entry by entry


@settings(max_examples=60, deadline=None)
@given(value=st.dictionaries(st.text(max_size=6), VALUES, max_size=5), chunk=st.integers(1, 40), indent=st.booleans())
def test_entries_are_those_of_the_whole_file(tmp_path_factory, value, chunk, indent):
    path = tmp_path_factory.getbasetemp() / "stream.json"
    path.write_text(json.dumps(value, indent=1 if indent else None, ensure_ascii=indent), encoding="utf-8")
    whole = [(k, e) for k, v in value.items() for e in (v if isinstance(v, list) else [v])]
    before = stream.CHUNK
    stream.CHUNK = chunk
    try:
        assert list(read_entries(path)) == whole
    finally:
        stream.CHUNK = before


@pytest.mark.parametrize(
    "text", ['{"a": [1, 2', '{"a": [1 2]}', '{"a": 1', "", "[1]", '{"a": nope}', '{"a": [1]} x', '{"a" 1}']
)
def test_damaged_json_tells_file_and_place(tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"{path}: not valid JSON, perhaps cut off \(.* at character \d+\)"):
        list(read_entries(path))


def test_json_that_is_no_text(tmp_path):
    path = tmp_path / "bad.json"
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match=rf"{path}: not utf-8 text"):
        list(read_entries(path))
