"""Writers and the judge; the endpoint's client against a server on loopback."""

import hashlib
import socket

import pytest

from jaxsteer.errors import UserError
from jaxsteer.prompts.generate import ModelWriter
from jaxsteer.writers.endpoint import Endpoint
from jaxsteer.writers.judge import BEHAVIOUR, Rubric, judge
from jaxsteer.writers.writer import Rule, Writer
from tests.helpers.endpoint import endpoint
from tests.helpers.tiny import tiny_model


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("jaxsteer.writers.endpoint.time.sleep", lambda seconds: None)


def test_a_judge_scores_every_answer_in_order_and_counts_what_it_cannot_read() -> None:
    replies = {"first": "85", "second": "I cannot say.", "third": "Score: 7.", "fourth": "It is 100!", "fifth": "250"}

    def answer(body: dict) -> str:
        text = body["messages"][0]["content"]
        return next(reply for name, reply in replies.items() if f"[Answer]\n{name}\n" in text)

    with endpoint(answer) as (url, asked):
        facts = {"behaviour": "flattery {of} users", "question": "Is it {so}?"}
        found = judge(
            Endpoint(url=url), BEHAVIOUR, [facts | {"answer": a} for a in replies], [str(i) for i in range(5)]
        )
    assert found.scores == (85, None, 7, 100, None)
    assert found.replies == tuple(replies.values()) and found.judge == "loopback-1"
    assert all(body["temperature"] == 0 and body["model"] == "loopback-1" for body in asked)
    assert "flattery {of} users" in asked[0]["messages"][0]["content"] and asked[0]["authorization"] is None
    assert (found.n, found.unread, found.rate) == (5, 2, pytest.approx(2 / 3))
    assert found.score == pytest.approx(64) and found.ci95[0] < 2 / 3 < found.ci95[1]
    assert found.template_hash == hashlib.sha256(BEHAVIOUR.template.encode()).hexdigest()


RHYMES = Rubric(template="Does {text} rhyme? 0 to 3.", scale=(0.0, 3.0), shown=2.0)


def test_a_rule_judges_by_another_rubric() -> None:
    rule = Rule(write=lambda messages: "3 of 10" if "moon" in messages[0]["content"] else "7, no: 1", name="r")
    found = judge(rule, RHYMES, [{"text": "moon"}, {"text": "sun"}], ["a", "b"])
    assert found.scores == (3, 1) and found.rate == 0.5 and found.judge == "r" and found.shown == 2
    assert rule.reply([{"role": "user", "content": "moon"}], n=2) == ["3 of 10"] * 2
    assert isinstance(rule, Writer) and isinstance(Endpoint(url="http://x", model="m"), Writer)


def test_a_local_model_writes_one_by_one_as_it_does_together() -> None:
    local, seen = ModelWriter(model=tiny_model()), []
    asked = [[{"role": "user", "content": text}] for text in ("be frank", "be patient")]
    alone = [local.reply(one, max_tokens=3)[0] for one in asked]
    assert local.reply_each(asked, max_tokens=3, progress=lambda *done: seen.append(done)) == alone and seen == [(2, 2)]
    assert len(local.reply(asked[0], n=3, max_tokens=3, temperature=1.0, seed=1)) == 3
    assert judge(local, RHYMES, [{"text": "moon"}], ["a"], max_tokens=3).judge == local.name
    assert isinstance(local, Writer)


def test_a_passing_failure_is_tried_again_and_a_lasting_one_told(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [503, 429]
    monkeypatch.setenv("OPENAI_API_KEY", "a-key-of-nobody")
    with endpoint(lambda body: states.pop() if states else "good") as (url, asked):
        assert Endpoint(url=url, model="m").reply([{"role": "user", "content": "?"}]) == ["good"]
        assert len(asked) == 3 and asked[0]["authorization"] == "Bearer a-key-of-nobody"
    with endpoint(lambda body: 401) as (url, asked):
        with pytest.raises(UserError, match="HTTP 401"):
            Endpoint(url=url, model="m").reply([{"role": "user", "content": "?"}])
        assert len(asked) == 1


def test_several_replies_come_also_from_a_server_that_gives_one_at_a_time() -> None:
    with endpoint(lambda body: str(body.get("seed"))) as (url, _):
        asked = Endpoint(url=url, model="m")
        assert asked.reply([{"role": "user", "content": "?"}], n=3, seed=5) == ["5", "6", "7"]


def test_an_endpoint_that_is_not_there_ends_in_one_message() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(UserError, match="gives no answer"):
        _ = Endpoint(url=url, timeout_s=2, retries=1).name
    with pytest.raises(UserError, match="no address"):
        Endpoint(url="localhost:8000")
