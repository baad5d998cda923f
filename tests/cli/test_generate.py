"""jaxsteer generate and jaxsteer chat."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxsteer.cli import main
from jaxsteer.cli.chat import talk
from jaxsteer.display import escaped
from jaxsteer.engine.chat import Chat
from jaxsteer.models.sampling import Decoding
from jaxsteer.steer import Vectors, save_vectors
from tests.helpers.tiny import tiny_model

MODEL = tiny_model("organism")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxsteer.checkpoints.loading.load", lambda source, **options: MODEL)


def test_generate_answers_arguments_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["A plain text", {"prompt": "An object"}, {"messages": [{"role": "user", "content": "Turns"}]}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    more = tmp_path / "more.txt"
    more.write_text("One a line\n")
    arguments = ["generate", "-f", str(file), "From the shell", "--file", str(more), "--json", "--max-new-tokens", "8"]
    arguments += ["--samples", "2", "--top-p", "1e-40"]
    assert main(arguments) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["sample"] for row in rows] == [0, 1] * 5
    assert [row["prompt"] for row in rows][::2] == [
        *("From the shell", "A plain text", "An object", lines[2]["messages"], "One a line")
    ]
    assert all(row["text"] and 0 < row["tokens"] <= 8 and row["finish"] in ("stop", "length") for row in rows)


def test_answers_are_steered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site, width = "blocks.1.hook_resid_post", MODEL.config.d_model
    vector = np.random.default_rng(0).normal(size=width).astype(np.float32)
    file = save_vectors(Vectors(arrays={site: vector}, fingerprint=MODEL.fingerprint), tmp_path / "push.safetensors")
    arguments = ["generate", "The river", "--plain", "--max-new-tokens", "8", "--temperature", "0", "--json"]
    texts = []
    for extra in ([], ["--coefficient", "0"], ["--coefficient", "50"]):
        assert main([*arguments, *(["--steer", str(file), *extra] if extra else [])]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1] != texts[2]
    assert main([*arguments, "--steer", str(file), "--coefficient", "50", "--compare"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert (both["unsteered"], both["text"]) == (texts[0], texts[2])
    assert main([*arguments[:-1], "--steer", str(file), "--coefficient", "50", "--compare"]) == 0
    shown = capsys.readouterr().out
    assert f"as it is:  {escaped(texts[0].strip())}" in shown and f"steered:   {escaped(texts[2].strip())}" in shown


def test_plain_text_is_continued(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "The river", "--plain", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out.startswith("The river")


def test_bad_input_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('"fine"\n{"prompt": 3}\n')
    typo, both = tmp_path / "typo.jsonl", tmp_path / "both.jsonl"
    typo.write_text('{"prompt": "a", "temprature": 0}')
    both.write_text('{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}')
    cases = [
        (["generate"], "no prompt was given"),
        (["generate", "a", "--plain", "--system", "b"], "no system message"),
        (["generate", "a", "--compare"], "give --steer FILE"),
        (["generate", "--file", str(broken)], "line 2: expected a text"),
        (["generate", "-f", str(typo)], "line 1: there is no field 'temprature'"),
        (["generate", "-f", str(both), "-f", str(broken)], "line 1: both messages and prompt"),
        (["generate", "--file", str(tmp_path / "absent.txt")], "cannot be read"),
        (["generate", "a\udcff"], "is no text: it has to be UTF-8"),
        (["generate", "a\udcff", "--plain"], "is no text: it has to be UTF-8"),
        (["generate", "a", "--top-p", "2"], "--top-p must be at most 1"),
    ]
    for arguments, message in cases:
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def conversation(said: list[str | type[BaseException]], **options: Any) -> tuple[list[dict[str, str]], str]:
    """Turns and everything written, of a chat in which ``said`` is typed."""
    lines: Iterator[str | type[BaseException]] = iter([*said, EOFError])
    written: list[str] = []

    def read(prompt: str) -> str:
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    chat = Chat(MODEL, decoding=Decoding(max_new_tokens=8))
    talk(chat, read=read, write=written.append, **options)
    return chat.turns, "".join(written)


def test_chat_keeps_the_context_until_reset() -> None:
    turns, written = conversation(["Hello there", "And you?"])
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
    assert turns[1]["content"] in written and turns[3]["content"] in written
    assert conversation(["Hello there", "/reset", "And you?"])[0][0]["content"] == "And you?"
    assert conversation(["Hello there", "/quit", "And you?"])[0] == turns[:2]
    steered, _ = conversation(["/system Be patient.", "Hello there", KeyboardInterrupt])
    assert steered[0] == turns[0] and steered[1] != turns[1]
    assert "/reset forgets" in conversation(["/help"])[1]


def test_an_answer_is_tried_again_with_other_random_numbers() -> None:
    turns, written = conversation(["Hello there", "/retry"])
    first = conversation(["Hello there"])[0]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] and turns[0] == first[0]
    assert turns[1] != first[1] and first[1]["content"] in written
    assert conversation(["/retry"])[0] == []


def test_the_strength_of_steering_changes_from_answer_to_answer() -> None:
    vector = np.random.default_rng(0).normal(size=MODEL.config.d_model).astype(np.float32)
    vectors = Vectors(arrays={"blocks.1.hook_resid_post": vector})
    at = lambda x: vectors.edits(coefficient=x) if x else None  # noqa: E731
    plain = conversation(["Hello there"])[0]
    assert conversation(["/strength 0", "Hello there"], at=at)[0] == plain
    assert conversation(["/strength 50", "Hello there"], at=at)[0] != plain
    assert conversation(["/strength 50", "/strength 0", "Hello there"], at=at)[0] == plain
    broken, written = conversation(["/strength 1e38", "Hello there", "/strength 0", "And you?"], at=at)
    assert "logits are NaN or infinite" in written and len(broken) == 4 and broken[3]["content"]
    for wrong in ("/strength much", "/strength", "/strength nan"):
        turns, written = conversation([wrong, "Hello there"], at=at)
        assert turns == plain and "/strength X steers" in written
    assert "/strength" not in conversation(["/strength 5"])[1]


def test_chat_says_when_the_conversation_is_too_long() -> None:
    turns, written = conversation(["Hello there", "word " * 400])
    assert "may have 256" in written and "/reset" in written
    assert len(turns) == 2


def test_an_interrupted_answer_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def pieces(*arguments: object, **options: object) -> Iterator[str]:
        yield "half an"
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxsteer.engine.chat._said", pieces)
    turns, written = conversation(["Hello"])
    assert turns[1]["content"] == "half an" and "[interrupted]" in written
