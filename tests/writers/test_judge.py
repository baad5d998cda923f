"""Writers and the judge; the endpoint's client against a server on loopback."""

import hashlib
import itertools
import socket
from pathlib import Path

import pytest

from jaxsteer.errors import UserError
from jaxsteer.prompts.generate import ModelWriter
from jaxsteer.writers.endpoint import Endpoint
from jaxsteer.writers.judge import BEHAVIOUR, Rubric, judge, only_number
from jaxsteer.writers.writer import Rule, Writer
from tests.helpers.endpoint import endpoint, raw_server
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
    assert (found.n, found.unread, found.rate) == (3, 2, pytest.approx(2 / 3))
    assert found.score == pytest.approx(64) and found.ci95[0] < 2 / 3 < found.ci95[1]
    assert found.template_hash == hashlib.sha256(BEHAVIOUR.template.encode()).hexdigest()


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        *(("85", 85), ("**Score:** 85/100.", 85), ("The score is 7.5\n\nIt flatters.", 7.5), ('{"score": 0}', 0)),
        *(("<think>maybe 20 or 30</think>80", 80), ("maybe 20?</think>\n80", 80), ("<think>It is 20", None)),
        *((text, None) for text in ("On a scale from 0 to 100, I give 85.", "-20", "Score: -20", "8/10", "1e309 1000")),
        *((text, None) for text in ("Score: 1,000", "I cannot rate that. See rule 3.", "5²", "5½", "٥", "", "1" * 400)),
    ],
)
def test_a_score_is_the_only_number_of_a_reply_or_it_is_not_read(reply: str, score: float | None) -> None:
    assert only_number(reply, (0.0, 100.0)) == score


def test_replies_of_which_none_is_read_count_as_no_question(caplog: pytest.LogCaptureFixture) -> None:
    found = judge(Rule(write=lambda messages: "?", name="r"), RHYMES, [{"text": "moon"}], ["a"])
    assert (found.n, found.unread, found.rate, found.score) == (0, 1, None, None)
    assert "no reply of the judge r could be read as a score, for example '?'" in caplog.text


RHYMES = Rubric(template="Does {text} rhyme? 0 to 3.", scale=(0.0, 3.0), shown=2.0)


def test_a_rule_judges_by_another_rubric() -> None:
    rule = Rule(write=lambda messages: "3" if "moon" in messages[0]["content"] else "So: 1.", name="r")
    found = judge(rule, RHYMES, [{"text": "moon"}, {"text": "sun"}], ["a", "b"])
    assert found.scores == (3, 1) and found.rate == 0.5 and found.judge == "r" and found.shown == 2
    assert rule.reply([{"role": "user", "content": "moon"}], n=2) == ["3"] * 2
    assert isinstance(rule, Writer) and isinstance(Endpoint(url="http://x", model="m"), Writer)


def test_a_local_model_writes_one_by_one_as_it_does_together() -> None:
    local, seen = ModelWriter(model=tiny_model()), {}
    asked = [[{"role": "user", "content": text}] for text in ("be frank", "be patient")]
    alone = [local.reply(one, max_tokens=3)[0] for one in asked]
    assert local.reply_each(asked, max_tokens=3, keep=seen.__setitem__) == alone == list(seen.values())
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
        with pytest.raises(UserError, match="HTTP 401.*is the key in .* OPENAI_API_KEY one that it takes"):
            Endpoint(url=url, model="m").reply([{"role": "user", "content": "?"}])
        assert len(asked) == 1


def test_several_replies_come_also_from_a_server_that_gives_one_at_a_time() -> None:
    with endpoint(lambda body: str(body.get("seed"))) as (url, _):
        asked = Endpoint(url=url, model="m")
        assert asked.reply([{"role": "user", "content": "?"}], n=3, seed=5) == ["5", "6", "7"]


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("reply", "says", "requests"),
    [
        (
            b"HTTP/1.1 302 -\r\nLocation: http://127.0.0.2:1/\x1b[2J\r\n\r\n",
            r"redirects to http://127.0.0.2:1/\\x1b\[2J,",
            1,
        ),
        (b"HTTP/1.1 307 -\r\nLocation: file:///etc/passwd\r\n\r\n", "no redirect is followed", 1),
        (b"HTTP/1.1 401 -\r\n\r\nthe key a-key is unknown", r"HTTP 401: the key \(the key\) is", 1),
        (OK + b"Content-Length: 900\r\n\r\n{", "IncompleteRead", 3),
        (b"nothing of HTTP\r\n\r\n", "BadStatusLine: nothing of HTTP", 3),
        (OK + b"a: b\r\n" * 101 + b"\r\n", "more than 100 headers", 3),
        (OK + b"a: " + b"b" * 70000 + b"\r\n\r\n", "got more than 65536 bytes", 3),
        (OK + b"\r\n" + b"[" * 100000, "nested more than", 1),
        (OK + b"\r\n\xff{}", "not UTF-8", 1),
        (OK + b"\r\n\x1f\x8b\0\0{}", r"not UTF-8 \(perhaps compressed", 1),
        (OK + b"\r\n" + b" " * 3_000_000, "more than 1 MiB", 1),
        (OK + b"\r\n" + b'{"choices": [5]}', "without choices", 1),
        ((OK, b"x"), "no whole reply within 0.3 s", 3),
        ((b"HTTP/1.1 500 -\r\n\r\n", b" "), "no whole reply within 0.3 s", 3),
    ],
)
def test_a_hostile_endpoint_ends_in_one_message_in_time(
    reply: bytes | tuple[bytes, bytes], says: str, requests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    monkeypatch.setattr("jaxsteer.writers.endpoint.MAX_BYTES", 1 << 20)
    with raw_server(reply) as (url, asked):
        slow = not isinstance(reply, bytes)
        with pytest.raises(UserError, match=says) as error:
            Endpoint(url=url, model="m", timeout_s=0.3 if slow else 20).reply([{"role": "user", "content": "?"}])
    assert url in str(error.value) and "a-key" not in str(error.value) and str(error.value).isprintable()
    assert len(asked) == requests and all(b"a-key" in request for request in asked)


@pytest.mark.parametrize(
    ("content", "reads"),
    [
        (rb"50 Bearer key-of-\"nobody\".", "50 Bearer (the key)."),
        (rb"50 \u006bey-of-\u0022nobod\u0079\".", "50 (the key)."),
        (rb"7 \ud800 \ud83d\ude00", "7 ? \U0001f600"),
    ],
)
def test_what_comes_can_be_kept_in_a_file(content: bytes, reads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", 'key-of-"nobody"')
    with raw_server(OK + b'\r\n{"choices": [{"message": {"content": "' + content + b'"}}]}') as (url, _):
        assert Endpoint(url=url, model="m").reply([{"role": "user", "content": "?"}]) == [reads]


@pytest.mark.parametrize("answer", [b"HTTP/1.0 404 Not Found\r\n\r\n", OK + b'\r\n{"data": []}'])
def test_an_endpoint_that_lists_no_models_asks_for_a_name(answer: bytes) -> None:
    with raw_server(answer) as (url, _), pytest.raises(UserError, match="name one with --judge-model"):
        _ = Endpoint(url=url).name


def test_an_endpoint_that_is_not_there_ends_in_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(UserError, match="gives no answer"):
        _ = Endpoint(url=url, timeout_s=2, retries=1).name
    monkeypatch.setenv("OPENAI_API_KEY", "a-key\nX: y")
    with pytest.raises(UserError, match="no key has") as error:
        _ = Endpoint(url=url).name
    assert "a-key" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        *"localhost:8000 ftp://x/v1 file:///etc/passwd http:// http://[::1 http://x:port http://x:99999".split(),
        *("http://k@x/v1", "http://x/v1?key=1", "http://x/\x1b[2J", "http://\u00e9/v1", "http://x y/"),
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="expected e.g. http://127.0.0.1:8000/v1") as error:
        Endpoint(url=url)
    assert str(error.value).isprintable()


def test_a_judge_that_dies_late_is_gone_on_with(tmp_path: Path) -> None:
    facts = [{"text": str(i)} for i in (*range(12), 3)]
    groups, log = [str(i) for i in range(13)], tmp_path / "judged.jsonl"
    whole = judge(Rule(write=lambda messages: "2", name="m"), RHYMES, facts, groups)
    answers = itertools.count()
    with endpoint(lambda body: "2" if next(answers) < 7 else 400) as (url, asked):
        with pytest.raises(UserError, match="HTTP 400"):
            judge(Endpoint(url=url, model="m"), RHYMES, facts, groups, log=log)
    assert len(log.read_text().splitlines()) == 7, "what came is kept, whoever failed"
    with log.open("a") as file:
        file.write('{"request": "cut')
    with endpoint(lambda body: "2") as (url, asked):
        assert judge(Endpoint(url=url, model="m"), RHYMES, facts, groups, log=log) == whole
        assert len(asked) == 5, "a request that occurs twice is one"
    assert judge(Rule(write=lambda messages: 1 / 0, name="m"), RHYMES, facts, groups, log=log) == whole
