"""The examples of docs/serving.md, run as they stand there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from jaxsteer.steer import load_vectors
from tests.serve.conftest import Client

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_examples_run(client: Client) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        for command in re.split(r"\n(?=curl)", block.strip()):
            made = subprocess.run(
                ["bash", "-c", command.replace("http://127.0.0.1:8000", client.url)],
                capture_output=True, text=True, timeout=60, check=True,
            )  # fmt: skip
            answer = json.loads(made.stdout)
            assert "error" not in answer, answer
    steered = json.loads(made.stdout)
    assert steered["results"][0]["turns"][1]["along_edited"] > steered["results"][0]["turns"][1]["along"]


def test_the_python_examples_run(
    client: Client, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made, first, second = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(made, "serving.md", "exec"), {})  # noqa: S102
    vectors = load_vectors(tmp_path / "runs" / "vectors" / "push.safetensors", model=client.engine.model)
    assert vectors.sites == ("blocks.2.hook_resid_post",)
    exec(compile(second, "serving.md", "exec"), {})  # noqa: S102
    assert len(capsys.readouterr().out.splitlines()) >= 3
    exec(compile(first.replace("http://127.0.0.1:8000", client.url), "serving.md", "exec"), {})  # noqa: S102
    assert capsys.readouterr().out.strip()
