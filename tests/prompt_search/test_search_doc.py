"""The code of docs/prompt-search.md, run as it stands there, and its commands, read by the command line."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from jaxsteer.cli.commands import parse
from jaxsteer.prompt_search import ALGORITHMS
from jaxsteer.study.options import OPTIONS

DOC = (Path(__file__).resolve().parents[2] / "docs" / "prompt-search.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_python_example_runs(capsys) -> None:
    block = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)[0]
    exec(compile(block, "docs/prompt-search.md", "exec"), {"__name__": "example"})  # noqa: S102
    assert float(capsys.readouterr().out.split()[-1]) > 0


def test_every_option_and_algorithm_that_is_named_exists() -> None:
    known = {f"--{name.replace('_', '-')}" for name in OPTIONS}
    elsewhere = {"--soft", "--json", "--quick", "--algorithms"}  # of eval and generate, and of the experiment
    elsewhere |= {"--config", "--toml", "--help", "--help-all"}  # of the command line itself
    assert set(re.findall(r"--[a-z][a-z-]+", DOC)) <= known | elsewhere
    for name in ALGORITHMS:
        assert f"| `{name}`" in DOC


def test_commands_give_options_that_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("out: runs/one\n", encoding="utf-8")
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^jaxsteer search .*$", DOC, re.MULTILINE)]
    assert len(commands) >= 4
    for words in commands:
        parse(words[1:]).options.resolved()
