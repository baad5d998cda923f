"""Runs for objectives by name: what cannot work fails before the probe, what works is scored again from its text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import jaxsteer.study.objective_stage as aim
from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.study import SearchOptions, run
from tests.helpers.tiny import tiny_model

Make = Callable[..., SearchOptions]


def test_nan_fails_before_the_probe_and_leaves_nothing(
    options: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import jax.numpy as jnp\ndef bad(reads):\n    return jnp.log(-reads.logits[:, 0] ** 2)\n")
    monkeypatch.setattr(aim, "probe", None)
    chosen = options(objective=f"{file}:bad")
    with pytest.raises(UserError, match=r"not finite: for 4 random prompts it returned \[nan, nan, nan, nan\]"):
        run(chosen, model=Model(**vars(tiny_model())))
    assert not (chosen.run.out / "config.json").exists(), "the folder is still free"


@pytest.mark.slow
def test_a_run_for_every_questions_own_answer(options: Make) -> None:
    """The prompts' targets come back from their text alone, teacher-forced answers included."""
    metrics = run(options(objective="answer", raw_units=True), model=Model(**vars(tiny_model())))
    assert metrics.site == "custom: answer" and metrics.prompts
    for prompt in metrics.prompts:
        assert prompt.target == pytest.approx(prompt.search_target, abs=1e-3) and prompt.target < 0
