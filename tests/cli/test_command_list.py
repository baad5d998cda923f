"""The list of commands: light, complete, and true."""

from __future__ import annotations

import subprocess
import sys

import pytest

from jaxsteer.cli import main
from jaxsteer.cli.commands import COMMANDS, _load, help_text, parse

ALL = {name: command for group in COMMANDS.values() for name, command in group.items()}


def test_help_imports_neither_jax_nor_a_command() -> None:
    asked = "import sys; from jaxsteer.cli import main; main(['--help']); print(sorted(sys.modules))"
    said = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True, timeout=60).stdout
    listed, _, modules = said.rpartition("\n[")
    assert all(f"\n  {name} " in listed for name in ALL)
    assert "'jaxsteer.cli.commands'" in modules
    assert not {"'jax'", "'numpy'", "'tyro'", "'transformers'", "'jaxsteer.cli.search'"} & set(modules.split(", "))


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_command_is_there_and_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(_load(ALL[name]).run)
    assert main([name, "--help"]) == 0
    assert f"usage: jaxsteer {name}" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_list_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert max(map(len, help_text().splitlines())) <= min(columns, 120)


def test_without_a_command_the_list_is_shown_and_a_wrong_one_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Find prompts:" in capsys.readouterr().out
    assert main(["serch", "--out", "x"]) == 2
    assert "no command 'serch': did you mean search?" in capsys.readouterr().err


def test_completion_knows_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--tyro-print-completion", "bash"])
    script = capsys.readouterr().out
    assert all(name in script for name in ALL)
