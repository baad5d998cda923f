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
    before, after = re.findall(r"[\d.]+", capsys.readouterr().out.splitlines()[-1])[-2:]
    assert float(after) < 0.1 < 0.5 < float(before)
    exec(compile(blocks[1], "README.md", "exec"), names)  # noqa: S102
    assert names["states"][names["site"]].shape == (*names["tokens"].shape, 128)
    assert names["logits"].shape[:2] == names["tokens"].shape and names["answer"].texts[0]
