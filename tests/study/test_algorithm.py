"""Options of algorithms: the preset's sizes, refusals, and a search of every name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from jaxsteer.errors import UserError
from jaxsteer.prompt_search import ALGORITHMS
from jaxsteer.study import SearchOptions
from jaxsteer.study.algorithm import HYPERPARAMETERS, SIZES, AlgorithmOptions


def test_every_algorithm_has_its_name_its_sizes_and_its_options() -> None:
    names = set(get_args(get_type_hints(AlgorithmOptions)["algorithm"]))
    assert names == set(ALGORITHMS) == set(SIZES["default"]) == set(SIZES["paper"])
    every = {field.name for config, _ in ALGORITHMS.values() for field in dataclasses.fields(config)}
    in_python_only = {"archive", "arguments", "probe_sampling"}
    assert set(HYPERPARAMETERS) == every - in_python_only
    for preset in SIZES:
        for name in names:
            options = SearchOptions.of(out=Path("x"), algorithm=name, preset=preset).resolved()
            algorithm = options.algorithm
            assert algorithm.make_search().candidates >= 1 and algorithm.config.population >= 1 and algorithm.steps
            assert options.resolved() == options, "filling in twice changes nothing"


def test_the_paper_preset_is_the_published_one() -> None:
    options = SearchOptions.of(out=Path("x"), preset="paper").resolved()
    algorithm = options.algorithm
    assert (algorithm.population, algorithm.children, algorithm.top_k, algorithm.restart_every) == (16, 32, 512, 50)
    assert (algorithm.steps, options.prompt.prompt_length, options.scoring.contexts) == (300, 8, 16)
    gcg = SearchOptions.of(out=Path("x"), preset="paper", algorithm="gcg").resolved().algorithm
    assert (gcg.search_width, gcg.top_k, gcg.population) == (512, 256, None)


def test_what_is_given_goes_before_the_preset() -> None:
    given = SearchOptions.of(out=Path("x"), algorithm="pez", population=3, learning_rate=0.5, steps=7)
    options = given.resolved().algorithm
    assert options.given == {"population": 3, "learning_rate": 0.5} and options.steps == 7
    assert SearchOptions.of(out=Path("x"), init="a phrase").resolved().prompt.prompt_length is None
    assert SearchOptions.of(out=Path("x"), init="a phrase").record()["init"] == "a phrase"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"algorithm": "gcg", "children": 4}, "--children is no option of --algorithm gcg; it has --top-k"),
        ({"algorithm": "mutation", "top_k": 4}, "--top-k is no option of --algorithm mutation"),
        ({"search_width": 4}, "--search-width is no option of --algorithm epo"),
        ({"algorithm": "pez", "draft": "m"}, "--draft is no option of --algorithm pez"),
        ({"population": 0}, "--population must be at least 1"),
        ({"prompt_length": "12:4"}, "--prompt-length must be at least 1, or a range such as 4:12, got 12:4"),
        ({"prompt_length": "4:"}, "--prompt-length must be"),
        ({"prompt_length": 0}, "--prompt-length must be at least 1"),
        ({"prompt_length": "4:12", "algorithm": "gcg"}, "--algorithm epo and mutation do"),
        ({"prompt_length": "4:12", "algorithm": "mutation", "replace": 2}, "without --replace"),
    ],
)
def test_options_that_do_not_fit_are_refused(given: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SearchOptions.of(out=Path("x"), **given).resolved()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"algorithm": "pez", "optimizer": "adamx"}, "optimizer 'adamx' is not known"),
        ({"algorithm": "gbda", "temperature": 0.0}, "temperature must be above 0"),
        ({"repetition": -1.0}, "repetition must be 0 or more"),
    ],
)
def test_values_that_make_no_search_are_refused_before_any_work(given: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SearchOptions.of(out=Path("x"), **given).resolved()
