"""Searches in conversations of one's own: a frontier without rates, and what needs a persona refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.report.page import write_report
from jaxsteer.study import SearchOptions, run
from jaxsteer.study.attribution import attribute_run
from tests.helpers.tiny import tiny_model

Make = Callable[..., SearchOptions]
CONVERSATIONS = [
    "I think {prompt} and the answer is",
    [{"role": "system", "content": "Be frank. {optim_str}"}, {"role": "user", "content": "Do you agree?"}],
]


@pytest.fixture
def own(tmp_path: Path, options: Make) -> Make:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(CONVERSATIONS))
    usual = {"persona": "sycophancy", "contexts": None, "conversations": file}
    return lambda **changes: options(**{**usual, **changes})


def model() -> Model:
    return Model(**vars(tiny_model()))


@pytest.mark.slow
def test_a_search_in_own_conversations_has_a_frontier_and_no_rates(own: Make) -> None:
    chosen = own(target="clear", combine="worst")
    metrics = run(chosen, model=model())
    assert metrics.conversations == 2 and metrics.persona == "mine (no persona)"
    assert metrics.site == "custom: target" and metrics.selected == 0
    assert metrics.baseline is None and metrics.probe is None and "splits" not in metrics.to_json()
    for prompt in metrics.prompts:
        assert prompt.target == pytest.approx(prompt.search_target, abs=1e-3) and prompt.rate is None
    assert metrics.controls["random"].target <= metrics.prompts[0].target
    assert json.loads((chosen.run.out / "metrics.json").read_text()) == metrics.to_json() and metrics == run(chosen)
    assert metrics.prompts[0].text.strip() in metrics.table()
    with pytest.raises(UserError, match="no behaviour to attribute"):
        attribute_run(chosen.run.out, model=model())
    assert "mine (no persona)" in Path(write_report(chosen.run.out)).read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "--direction FILE and --site"),
        ({"direction": "random:1", "site": "layers.1"}, "--direction FILE and --site"),
        ({"objective": "answer"}, "made of a persona's answers"),
        ({"target": "x", "persona": "myopic"}, "--persona is an option of a persona's questions"),
        ({"target": "x", "contexts": 3}, "--contexts is an option"),
        ({"target": "x", "slot": "system"}, "--slot is an option"),
        ({"target": "x", "vary": ("seed=0:2",)}, "--conversations serve one search"),
        ({"target": "x", "conversations": Path("nowhere.json")}, "nowhere.json cannot be read"),
    ],
)
def test_what_needs_a_persona_is_refused(own: Make, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(own(**changes), model=model())
