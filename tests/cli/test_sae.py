"""``jaxsteer sae``: train, eval and explore through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxsteer import load_sae
from jaxsteer.cli import main
from tests.helpers.tiny import CORPUS


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "some.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in CORPUS * 2), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch):
    """Programs for eight devices take far longer to compile; tests/sae has them."""
    monkeypatch.setattr("jaxsteer.cli.sae._Reading.mesh", lambda self: None)


def test_train_eval_and_explore(model_dir: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, common = tmp_path / "sae", ["--model", str(model_dir), "--data", str(texts), "--context", "24", "--rows", "8"]
    sizes = ["--latents", "24", "--k", "4", "--batch", "32", "--pool", "128", "--tokens", "128", "--evaluate", "50"]
    train = ["sae", "train", *common, *sizes, "--site", "blocks.1.hook_resid_post", "--out", str(out)]
    assert main(train) == 0
    assert "cross-entropy recovered" in capsys.readouterr().out
    sae = load_sae(out)
    assert sae.n_latents == 24 and sae.config.site_in == "blocks.1.hook_resid_post"
    measured = json.loads((out / "evaluation.json").read_text())
    assert main(["sae", "eval", "--sae", str(out), *common, "--tokens", "50", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == measured.keys() and found["tokens"] >= 50
    page = tmp_path / "page.html"
    explore = ["sae", "explore", "--sae", str(out), *common, "--tokens", "50", "--latents", "3", "5"]
    assert main([*explore, "--html", str(page)]) == 0
    text = capsys.readouterr().out
    assert "latent 3:" in text and "latent 5:" in text
    assert 'id="latent-5"' in page.read_text(encoding="utf-8")
    assert main([*train[:-1], str(tmp_path / "other"), "--pool", "100"]) == 2
    assert "multiple of twice the batch" in capsys.readouterr().err
    assert main(["sae", "explore", "--sae", str(out), *common, "--latents", "99"]) == 2
    assert "has the latents 0 to 23" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        (("--rows", "1048576"), "Reading 1,048,576 rows of 24 tokens at a time needs"),
        (("--latents", "1048576"), "Training needs"),
        (("--pool", str(1 << 30)), "Training needs"),
    ],
)
def test_counts_are_refused_before_memory_is_taken(
    model_dir: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, counts: tuple[str, str], says: str,
):  # fmt: skip
    monkeypatch.setattr("jaxsteer.models.sharding.free_memory", lambda: 1 << 28)
    sizes = ["--latents", "24", "--k", "4", "--batch", "32", "--pool", "128", "--tokens", "128", "--context", "24"]
    common = ["--model", str(model_dir), "--data", str(texts), "--site", "blocks.1.hook_resid_post"]
    assert main(["sae", "train", *common, *sizes, *counts, "--out", str(tmp_path / "sae")]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "sae").exists()
