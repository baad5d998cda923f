"""Commands that are killed again and again at random moments end with the bytes of one that never was.

``JAXSTEER_KILLS`` says how often each (default 20). Conversions: tests/checkpoints_convert/test_resume.py.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoints_convert.export import write_hf
from tests.cli.test_commands import rows
from tests.helpers.endpoint import endpoint
from tests.helpers.several import ROOT
from tests.helpers.tiny import CORPUS, tiny_model

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("JAXSTEER_KILLS", "20"))
OF_THE_MACHINE = ("timing", "environment", "plan")


class Killer:
    """Commands in a process that forks (tests/helpers/killed_commands.py)."""

    def __init__(self, folder: Path) -> None:
        self.random = random.Random(0)
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "JAXSTEER_CACHE": str(folder)}
        env |= {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        env.pop("OPENAI_API_KEY", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.killed_commands"],
            cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, *argv: object, **order: Any) -> tuple[int, float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"argv": [str(word) for word in argv], **order}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["status"], answer["seconds"]

    def until_killed(self, out: Path, whole: dict[str, Any], *argv: object, after: Path | None = None) -> None:
        """Kill the command ``KILLS`` times; where it comes to its end, its files are ``whole``; it begins anew."""
        when = {} if after is None else {"after": str(after)}
        status, usual = self(*argv, "--out", out, **when)
        assert status == 0 and files(out) == whole
        shutil.rmtree(out)
        kills = 0
        while kills < KILLS:
            status, _ = self(*argv, "--out", out, seconds=self.random.uniform(0.05, 0.7) * usual, **when)
            assert status in (0, -9)
            kills += status == -9
            if status == 0:
                assert files(out) == whole
                shutil.rmtree(out)
        assert self(*argv, "--out", out)[0] == 0 and files(out) == whole


def files(out: Path) -> dict[str, Any]:
    """What every file holds, but for what two runs on one machine differ in."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in out.iterdir()}
    if "metrics.json" in found:
        metrics = json.loads(found["metrics.json"])
        found["metrics.json"] = {key: value for key, value in metrics.items() if key not in OF_THE_MACHINE}
    if "progress.jsonl" in found:
        lines = found["progress.jsonl"].decode().splitlines()
        found["progress.jsonl"] = [{**json.loads(line), "seconds": 0} for line in lines]
    if "judged.jsonl" in found:  # replies stand in the order in which they came
        found["judged.jsonl"] = sorted(found["judged.jsonl"].splitlines())
    found.pop("report.html", None)  # it shows times
    return found


@pytest.fixture(scope="module")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killer]:
    made = Killer(tmp_path_factory.mktemp("cache"))
    yield made
    assert made.process.stdin is not None and made.process.stdout is not None
    made.process.stdin.close()
    made.process.wait()
    made.process.stdout.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, questions and texts."""
    out, tiny = tmp_path_factory.mktemp("killed"), tiny_model()
    write_hf(tiny.params, tiny.config, out / "model")
    tiny.tokenizer.save_pretrained(out / "model")
    (out / "rows.jsonl").write_text(rows(20))
    (out / "texts.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in CORPUS * 2))
    return out


def test_a_search_with_questions(killer: Killer, folder: Path, tmp_path: Path) -> None:
    argv = ["search", "--model", folder / "model", "--persona", folder / "rows.jsonl", "--read-position", "matched"]
    argv += ["--steps", 40, "--restarts", 2, "--prompt-length", 3, "--population", 4, "--children", 4, "--contexts", 2]
    argv += ["--quiet", "--resume", "--save-every", 0.05]
    assert killer(*argv, "--out", tmp_path / "whole")[0] == 0
    whole = files(tmp_path / "whole")
    assert {"choices.json", "pareto.jsonl", "metrics.json"} <= whole.keys()
    killer.until_killed(tmp_path / "out", whole, *argv)


def test_a_training_after_its_first_checkpoint(killer: Killer, folder: Path, tmp_path: Path) -> None:
    argv = ["sae", "train", "--model", folder / "model", "--data", folder / "texts.jsonl", "--context", 24, "--rows", 8]
    argv += ["--latents", 24, "--k", 4, "--batch", 32, "--pool", 128, "--tokens", 6400, "--evaluate", 0]
    argv += ["--site", "blocks.1.hook_resid_post", "--save-minutes", 0.0001]
    assert killer(*argv, "--out", tmp_path / "whole")[0] == 0
    killer.until_killed(tmp_path / "out", files(tmp_path / "whole"), *argv, after=tmp_path / "out" / "checkpoints")


def test_a_measurement_with_a_judge(killer: Killer, folder: Path, tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> str:
        time.sleep(0.02)
        return str(len(body["messages"][0]["content"]) % 100)

    argv = [
        "eval",
        "--model",
        folder / "model",
        "--persona",
        folder / "rows.jsonl",
        "--split",
        "all",
        "-p",
        " be patient",
    ]
    with endpoint(answer) as (url, asked):
        argv += ["--judge", url]
        assert killer(*argv, "--out", tmp_path / "whole")[0] == 0
        whole, once = files(tmp_path / "whole"), len(asked)
        assert once == len(whole["judged.jsonl"]) > 10
        killer.until_killed(tmp_path / "out", whole, *argv)
