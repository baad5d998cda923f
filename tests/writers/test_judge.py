"""The endpoint's client and the judge, against a server on loopback."""

import socket

import numpy as np
import pytest

from jaxsteer.errors import UserError
from jaxsteer.writers.endpoint import Endpoint
from jaxsteer.writers.judge import judge
from tests.helpers.endpoint import endpoint


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
        found = judge(Endpoint(url=url), "flattery {of} users", ["Is it {so}?"] * 5, list(replies))
    np.testing.assert_array_equal(found.scores, [85, np.nan, 7, 100, np.nan])
    assert found.replies == tuple(replies.values()) and found.model == "loopback-1"
    assert all(body["temperature"] == 0 and body["model"] == "loopback-1" for body in asked)
    assert "flattery {of} users" in asked[0]["messages"][0]["content"] and asked[0]["authorization"] is None
    rates = found.rates([str(i) for i in range(5)])
    assert (rates["n"], rates["unread"], rates["rate"]) == (5, 2, pytest.approx(2 / 3))
    assert rates["score"] == pytest.approx(64) and rates["ci95"][0] < 2 / 3 < rates["ci95"][1]


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
        Endpoint(url=url, timeout_s=2, retries=1).named()
    with pytest.raises(UserError, match="no address"):
        Endpoint(url="localhost:8000")
