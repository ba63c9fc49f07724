"""Names to classes and claims to phrases."""

from __future__ import annotations

from data.types import Claim
from evaluation.metrics.matching import Names, assign, compact, read_list

NAMES = Names(["wall", "traffic light", "light", "sky"])


def test_exact_matching_forgets_blanks_and_capitals_only():
    assert NAMES.exact("Trafficlight ") == 1 and NAMES.exact("light") == 2
    assert NAMES.exact("trafic light") is None and NAMES.exact("") is None
    assert compact(" Traffic  Light") == "trafficlight"


def test_a_letter_and_its_accent_are_the_composed_letter():
    """Tokenizers of Qwen compose them, so that an answer never has the two characters that a file may have."""
    for name in ("cafe\u0301", "caf\u00e9"):
        assert [Names([name]).exact(said) for said in ("cafe\u0301", "CAF\u00c9 ")] == [0, 0]


def test_fuzzy_matching_takes_the_nearest_however_far():
    assert NAMES.fuzzy("walls") == 0 and NAMES.fuzzy("trafic light") == 1
    assert NAMES.fuzzy("zzz") is not None
    assert NAMES.fuzzy("") is None


def test_every_published_class_name_finds_itself_without_its_blanks():
    for names in (NAMES.names, ["floor", "floor-wood", "wall-wood", "wood"]):
        for index, name in enumerate(names):
            assert Names(names).exact(name) == index and Names(names).fuzzy(name) == index


def test_a_list_answer_is_read_by_name():
    claims = [Claim("sky", 0), Claim("wall", None), Claim("unicorn", 1), Claim("sky", 2)]
    reading = read_list(claims, ["wall", "sky", "light"], NAMES)
    assert reading.masks == ((3, 0), (3, 2)) and reading.unmatched == 1
    released = read_list(claims, ["wall", "sky", "light"], NAMES, fuzzy=True)
    assert released.unmatched == 0 and len(released.masks) == 3


def test_the_answer_to_one_class_is_about_that_class():
    reading = read_list([Claim("", 0)], ["traffic light"], NAMES)
    assert reading.masks == ((1, 0),) and not reading.unmatched
    assert read_list([], ["sky"], NAMES).masks == ()


def test_a_mask_with_another_name_is_not_that_of_the_one_thing_that_was_refused():
    claims = [Claim("sky", None), Claim("wall", 0)]
    reading = read_list(claims, ["sky"], NAMES)
    assert reading.masks == () and reading.unmatched == 1
    assert assign(claims, ["sky"]) == [None] and assign(claims[::-1], ["sky"]) == [None]
    assert assign([Claim("wall", 0), Claim("sky.", 1)], ["sky"]) == [1], "the one with the name"


def test_a_single_phrase_takes_the_first_mask():
    assert assign([Claim("a", None), Claim("b", 0), Claim("c", 1)], ["cup"]) == [0]
    assert assign([Claim("cup", None)], ["cup"]) == [None] and assign([], ["cup"]) == [None]


def test_several_phrases_are_matched_by_name_then_by_order():
    claims = [Claim("red cup", 0), Claim("", 1), Claim("dog", None)]
    assert assign(claims, ["dog", "red cup", "spoon"]) == [None, 0, 1]
    assert assign([Claim("", 0), Claim("", 1)], ["a", "b", "c"]) == [0, 1, None]
    assert assign([Claim("cup", 0), Claim("cup", 1)], ["cup", "cup"]) == [0, 1]
