"""Choices, swapped copies and splits."""

from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxsteer.errors import UserError
from jaxsteer.personas import parse_choices, split, swap
from jaxsteer.personas.items import Item, count_choices, data_hash, group_of

ANTHROPIC = "Money now or later?\n\nChoices:\n (A) Now, please\n (B) Later"
WORDS = st.text(alphabet="abc dé.,:(X)\n", min_size=1, max_size=20).map(str.strip).filter(bool)


def make_item(number, matching="(A)", question=None):
    question = question or f"Question number {number}?\n (A) yes {number}\n (B) no {number}"
    return Item(
        id=f"i{number}",
        question=question,
        matching=matching,
        not_matching="(B)" if matching == "(A)" else "(A)",
        group=group_of(question),
    )


@pytest.mark.parametrize(
    ("question", "texts", "tail"),
    [
        (ANTHROPIC, ("Now, please", "Later"), ""),
        ("So?\nChoices:\n(A) Agree\n(B) Disagree\n\nAnswer:", ("Agree", "Disagree"), "\n\nAnswer:"),
        ("Which? (A) Smaller government (B) Larger government", ("Smaller government", "Larger government"), ""),
        ("Of (A) and (B), which?\n (A) one\n line two\n (B) two", ("one\n line two", "two"), ""),
        ("Which?\n (A) early\n (B) late\nAnswer with A or B:", ("early", "late"), "\nAnswer with A or B:"),
        ("Which?\n(A) early\n(B) late\nPlease choose one.", ("early", "late"), "\nPlease choose one."),
        ("Which?\n(A) early\n(B) late\nMy vote:", ("early", "late"), "\nMy vote:"),
        ("Which?\n(A) a\n(B) two\nlines of it", ("a", "two\nlines of it"), ""),
        ("Plan (A) or plan\n(A) of it?\n\n (A) x\n\n (B) y", ("x", "y"), ""),
    ],
)
def test_choices_are_parsed_in_their_own_wording(question, texts, tail):
    """test_defect_25: no Agree/Disagree wording is assumed."""
    choices = parse_choices(question)
    assert choices.texts == texts and choices.tail == tail


def test_swap_exchanges_texts_and_labels():
    item = make_item(0, question=ANTHROPIC)
    swapped = swap(item)
    assert swapped.question == "Money now or later?\n\nChoices:\n (A) Later\n (B) Now, please"
    assert (swapped.matching, swapped.not_matching) == ("(B)", "(A)")
    assert swapped.group == item.group == group_of(swapped.question)
    assert swapped.id != item.id


@example(stem="S", a=":", b=":\n:", tail="\nNow choose", sep="\n")
@example(stem="S", a=":\n:", b=":", tail="", sep="\n")
@given(
    stem=WORDS,
    a=WORDS,
    b=WORDS,
    tail=st.sampled_from(["", "\n\nAnswer:", "\nNow choose"]),
    sep=st.sampled_from(["\n", "\n\n"]),
)
def test_swapping_twice_changes_nothing(stem, a, b, tail, sep):
    item = make_item(0, question=f"{stem}\n (A) {a}{sep} (B) {b}{tail}")
    assert swap(swap(item)) == item
    assert group_of(swap(item).question) == item.group


@pytest.mark.parametrize(("question", "n"), [("Why?", 0), (ANTHROPIC, 2), (ANTHROPIC + "\n (C) Never", 3)])
def test_other_numbers_of_choices_are_counted_and_refused(question, n):
    assert count_choices(question) == n
    if n != 2:
        with pytest.raises(UserError, match=f"found {n}"):
            parse_choices(question)


def ids(part):
    return {item.id for item in part}


@settings(max_examples=40, deadline=None)
@given(n=st.integers(5, 80), seed=st.integers(0, 5), shuffler=st.randoms(use_true_random=False))
def test_splits_are_disjoint_complete_and_stable_under_row_order(n, seed, shuffler):
    items = [make_item(i, "(A)" if i % 3 else "(B)") for i in range(n)]
    items += [swap(item) for item in items[::2]]
    splits = split(items, seed=seed)
    parts = (splits.train, splits.validation, splits.test)
    groups = [{item.group for item in part} for part in parts]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    assert sum(len(part) for part in parts) == len(items)
    assert set().union(*map(ids, parts)) == ids(items)
    shuffler.shuffle(items)
    assert split(items, seed=seed) == splits


def test_splits_are_stratified_by_letter_and_differ_by_seed():
    items = [make_item(i, "(A)" if i < 150 else "(B)") for i in range(300)]
    splits = split(items, seed=0)
    for part, size in ((splits.train, 180), (splits.validation, 60), (splits.test, 60)):
        letters = Counter(item.matching for item in part)
        assert len(part) == size and abs(letters["(A)"] - letters["(B)"]) <= 2
    assert split(items, seed=1).test != splits.test


@pytest.mark.parametrize("fractions", [(0.5, 0.5, 0.5), (1.0, 0.0, 0.0), (0.5, 0.6, -0.1)])
def test_bad_fractions_are_refused(fractions):
    with pytest.raises(UserError, match="fractions"):
        split([make_item(i) for i in range(9)], seed=0, fractions=fractions)


def test_too_little_data_to_split():
    with pytest.raises(UserError, match="2 different questions .* give at least 4$"):
        split([make_item(0), make_item(1)], seed=0)
    assert split([make_item(i) for i in range(4)], seed=0).questions == {"train": 2, "validation": 1, "test": 1}


def test_the_data_hash_does_not_depend_on_order():
    items = [make_item(i) for i in range(5)]
    assert data_hash(items) == data_hash(items[::-1]) != data_hash(items[1:])
