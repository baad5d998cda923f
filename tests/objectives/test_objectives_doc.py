"""The code of docs/objectives.md, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxsteer.objectives import as_pytree
from jaxsteer.prompt_search import score
from jaxsteer.study import named_objective

DOC = (Path(__file__).resolve().parents[2] / "docs" / "objectives.md").read_text(encoding="utf-8")


def test_every_block_runs_and_the_first_finds_a_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOC, re.S)
    assert len(blocks) == 3
    names: dict = {}
    exec(compile(blocks[0], "docs/objectives.md", "exec"), names)  # noqa: S102
    assert len(capsys.readouterr().out.split()) >= 3, "a prompt of words"
    found, model, task = names["result"].prompts[0], names["model"], names["task"]
    assert len([line for line in blocks[0].splitlines() if line]) <= 15
    plain = jnp.asarray(
        [model.tokenizer.encode(" a" * task.length, add_special_tokens=False)[: task.length]], jnp.int32
    )
    before, _ = score(model.params, task, as_pytree(names["disagree"]), plain)
    assert found.target > float(before[0]) + 2, "the search raised the objective by more than two nats"
    for block in blocks[1:]:
        exec(compile(block, "docs/objectives.md", "exec"), names)  # noqa: S102
    assert "blocks.1.attn.hook_pattern" in capsys.readouterr().out and names["task"].target is not None


def test_every_name_of_the_table_is_known() -> None:
    table = DOC.split("| `--objective` |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `([^`]+)`( with `--target TEXT`)?", table, re.M)
    names = [(name.replace("\\|", "|"), " (B)" if target else None) for name, target in rows]
    assert len(names) == 10
    for name, target in names:
        if ".py" not in name:
            assert named_objective(name, target) is not None
