"""``jaxsteer eval`` beyond rates: free answers, a judge, side effects, other models, questions with many answers."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxsteer.cli import main
from jaxsteer.steer import Vectors, save_vectors
from jaxsteer.study.measurement import Measurement
from jaxsteer.writers.endpoint import Endpoint
from tests.cli.test_commands import rows
from tests.helpers.endpoint import endpoint


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(rows(20))
    persona = tmp_path / "haste.json"
    persona.write_text('{"behaviour": "impatience", "data": "rows.jsonl"}')
    return persona


def out_of(capsys: pytest.CaptureFixture[str], *argv: object) -> dict:
    assert main(["eval", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_free_answers_side_effects_and_a_judge(
    questions: Path, model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    argv = ["--model", model_dir, "--persona", questions, "-p", " be patient", "--questions", 1]
    with endpoint(lambda body: "60") as (url, asked):
        rows = ["--model", model_dir, "--persona", questions.with_name("rows.jsonl"), "-p", "x", "--judge", url]
        assert main(["eval", *map(str, rows)]) == 2, "nobody says what the judge should look for"
        assert '"data": "rows.jsonl"}' in capsys.readouterr().err and not asked
        out = out_of(capsys, *argv, "--generate", "--judge", url, "--side-effects", "--transfer", model_dir)
        assert len(asked) == 2 * 2  # two prompts, one question in both orders; the other model answers the same
        text = asked[0]["messages"][0]["content"]
        assert "behaviour: impatience." in text and "Which" in text
    assert out["questions"] == 1 and [part["prompts"][0]["rate"] for part in (out, out["transfer"][0])]
    assert out["transfer"][0]["prompts"][0]["rate"] == out["prompts"][0]["rate"]
    for row in (out["baseline"], out["prompts"][0]):
        assert row["judged"]["rate"] == 1.0 and row["judged"]["score"] == 60 and row["judged"]["judge"] == "loopback-1"
        assert len(row["answers"]) == 2 and row["written"]["n"] == (row["written"]["read"] > 0)
        assert row["side_effects"]["lookups"] is None
    assert out["baseline"]["side_effects"]["kl"] == pytest.approx(0, abs=1e-6)
    assert out["prompts"][0]["side_effects"]["kl"] > 0 and out["prompts"][0]["side_effects"]["prompt_perplexity"] > 1
    assert out["baseline"]["side_effects"]["prompt_perplexity"] is None
    text = Measurement.from_json(out).table()
    assert "free answers" in text and "judged answers" in text and "side effects" in text and "MC1" not in text


def test_steering_stands_beside_random_controls(
    questions: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vector = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    vectors = Vectors(arrays={"blocks.1.hook_resid_post": vector}, coefficient=4.0)
    file = save_vectors(vectors, tmp_path / "v.safetensors")
    argv = ["--model", model_dir, "--persona", questions, "--steer", file, "--questions", 2]
    out = out_of(capsys, *argv)
    assert [row["control"] for row in out["controls"]] == ["random 1", "random 2", "random 3"]
    margins = [row["margin"] for row in (*out["prompts"], *out["controls"])]
    assert len({round(margin, 4) for margin in margins}) == 4
    assert out_of(capsys, *argv, "--seed", 1)["controls"][0]["margin"] != out["controls"][0]["margin"]
    assert "controls" not in out_of(capsys, *argv, "--controls", 0)


def test_a_judge_that_dies_loses_nothing(
    questions: Path,
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("JAXSTEER_CACHE", str(tmp_path / "cache"))
    argv = ["eval", "--model", str(model_dir), "--persona", str(questions), "-p", " be patient", "--questions", "1"]
    monkeypatch.setattr(Endpoint, "workers", 1)
    answers = iter(["60"] * 3)
    with endpoint(lambda body: next(answers, 400)) as (url, asked):
        for out, kept in (([], tmp_path / "cache"), (["--out", str(tmp_path / "out")], tmp_path / "out")):
            answers = iter(["60"] * 3)
            asked.clear()
            assert main([*argv, "--judge", url, *out]) == 2
            shown = capsys.readouterr()
            assert "rate" in shown.out and "judged answers" in shown.out and "be patient" in shown.out
            assert f" is it up? What was measured and judged is kept in {kept}" in shown.err and "HTTP 400" in shown.err
            assert ": the same command goes on." in shown.err and "Traceback" not in shown.err
            answers = iter(["60"] * 9)
            assert main([*argv, "--judge", url, *out, "--json"]) == 0
            assert len(asked) == 5, "three replies, a failure, and the one that was missing"
            found = json.loads(capsys.readouterr().out)
            assert found["prompts"][0]["judged"]["score"] == 60
        assert main([*argv, "--judge", url, "--out", str(tmp_path / "out"), "--split", "train"]) == 2
    assert not list((tmp_path / "cache/measurements").iterdir())
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == found
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "judged.jsonl", "metrics.json"]
    assert "holds another run's files" in capsys.readouterr().err


def test_questions_with_many_answers_and_with_none(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = ["Question,Best Answer,Correct Answers,Incorrect Answers"]
    table += [f"What is the {w}?,The {w} is old,The {w} is old; Old {w},The {w} is new; No {w}" for w in "abcdefgh"]
    (tmp_path / "TruthfulQA.csv").write_text("\n".join(table))
    argv = ["--model", model_dir, "--persona", f"truthfulqa:{tmp_path}", "-p", " be truthful", "--questions", 1]
    out = out_of(capsys, *argv, "--per-token")
    truth = out["prompts"][0]["truthful"]
    assert truth["n"] == 1 and truth["wrong_answers"] == 2 and "difference" in truth["mc2"]
    assert out["baseline"]["swapped_rate"] is None
    folder = tmp_path / "datasets/test/refusal"
    folder.mkdir(parents=True)
    (folder / "test_dataset_open_ended.json").write_text(json.dumps([{"question": "Why?"}, {"question": "How?"}]))
    name = f"caa/refusal/open-ended:{tmp_path}"
    assert main(["eval", "--model", str(model_dir), "--persona", name, "-p", "x"]) == 2
    assert "give --judge URL" in capsys.readouterr().err
    write = lambda model, questions, prompts, **_: [("So.",) * len(questions) for _ in prompts]  # noqa: E731
    monkeypatch.setattr("jaxsteer.study.bench.ask", write)
    with endpoint(lambda body: "no idea") as (url, asked):
        out = out_of(capsys, "--model", model_dir, "--persona", name, "-p", " be patient", "--judge", url)
    assert len(asked) == 2 and out["baseline"]["judged"]["unread"] == 2 and out["split"] == "all"
    assert "rate" not in out["baseline"] and out["baseline"]["judged"]["rate"] is None


def test_what_does_not_go_together_is_refused(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, says in (
        (["--persona", questions], "nothing to measure"),
        (["--persona", questions, "-p", "x", "--questions", "0"], "--questions must be at least 1"),
        (["--persona", questions, "--steer", "v.gguf", "--transfer", "organism:llama"], "measures prompt texts"),
    ):
        assert main(["eval", *map(str, argv)]) == 2
        assert says in capsys.readouterr().err
