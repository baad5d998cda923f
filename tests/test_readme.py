"""The Python of the README, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_first_two_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(blocks[0], "README.md", "exec"), names)  # noqa: S102
    told = capsys.readouterr().out
    before, after = re.findall(r"Rate\(([\d.]+),", told)
    assert float(after) < 0.1 < 0.5 < float(before)
    assert "control: random 1 for steered" in told and "as it is:" in told
    assert (tmp_path / "runs" / "mine" / "metrics.json").is_file()
    exec(compile(blocks[1], "README.md", "exec"), names)  # noqa: S102
    assert names["states"][names["site"]].shape == (*names["tokens"].shape, 128)
    assert names["logits"].shape[:2] == names["tokens"].shape and names["answer"].texts[0]
