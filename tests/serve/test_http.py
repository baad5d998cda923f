"""The server as its clients see it: the same answers as in process, in OpenAI's forms, or a refusal."""

from __future__ import annotations

import http.client
import itertools
import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import jaxsteer
from jaxsteer import steer
from jaxsteer.engine import Request
from jaxsteer.models.roles import unlabelled
from jaxsteer.models.sampling import Decoding
from jaxsteer.prompts import encode_texts, encode_turns
from jaxsteer.prompts.generate import encode_prompts, generate
from tests.serve.conftest import Client, direction, serving

ASKED = [{"role": "user", "content": "Do you agree or disagree?"}]
SITE = "blocks.2.hook_resid_post"


def inline(seed: int, coefficient: float = 1.0, **more: Any) -> dict[str, Any]:
    values = [float(v) for v in direction(seed)]
    return {"operation": "add", "site": SITE, "values": values, "coefficient": coefficient} | more


def numbers(answer: Any) -> list[Any]:
    return [[one["logprob"], one["top_logprobs"]] for one in answer["choices"][0]["logprobs"]["content"]]


def test_a_chat_is_what_generate_says(client: Client) -> None:
    answer = client.chat(max_tokens=12)
    made = generate(client.engine.model, ASKED, temperature=0, max_new_tokens=12)
    choice = answer["choices"][0]
    assert choice["message"]["content"] == made.texts[0] and choice["finish_reason"] == made.finish[0]
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-") and answer["created"] > 0
    usage = answer["usage"]
    assert usage["prompt_tokens"] == made.prompt_length[0] and usage["completion_tokens"] == made.lengths[0]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    drawn = client.chat(temperature=0.8, seed=5, n=3, max_tokens=12, top_p=0.9)
    several = generate(client.engine.model, ASKED, temperature=0.8, seed=5, top_p=0.9, max_new_tokens=12, samples=3)
    assert [one["message"]["content"] for one in drawn["choices"]] == list(several.texts)
    assert [one["index"] for one in drawn["choices"]] == [0, 1, 2]
    assert drawn["usage"]["prompt_tokens"] == made.prompt_length[0], "a prompt is counted once"


@pytest.mark.parametrize(
    ("asked", "edits"),
    [
        ({"edits": [{"vector": "push.safetensors", "coefficient": 1.5}]}, steer.add(SITE, direction(1), 1.5)),
        (
            {"edits": [{"vector": "layers.safetensors", "sites": ["blocks.1.hook_resid_post"], "positions": "user"}]},
            steer.add("blocks.1.hook_resid_post", direction(11), positions="user"),
        ),
        ({"edits": [{"vector": "cap.safetensors"}]}, steer.ceiling(SITE, direction(1), -1.0)),
        ({"edits": [inline(4, 2.0, positions="response")]}, steer.add(SITE, direction(4), 2.0, positions="response")),
        (
            {"edits": [inline(4) | {"operation": "floor", "value": 9.0} | {"positions": [1, -1]}]},
            steer.floor(SITE, direction(4), 9.0, positions=[1, -1]),
        ),
        (
            {"vectors": [{"source": "layers.safetensors", "scale": 0.5, "layers": [0, 3], "normalize": True}]},
            steer.add(
                ["blocks.0.hook_resid_post", "blocks.3.hook_resid_post"], np.stack([direction(10), direction(13)]), 0.5,
                keep_norm=True, positions="every",
            ),
        ),
        (
            {"vectors": [{"source": "push.safetensors", "scale": 2, "apply": {"generation": True, "prompt": False}}]},
            steer.add(SITE, direction(1), 2.0, positions="response"),
        ),
    ],
)  # fmt: skip
def test_steered_over_http_is_steered_in_process(asked: Any, edits: Any, client: Client) -> None:
    if asked.get("edits", [{}])[0].get("operation") == "floor":
        asked["edits"][0].pop("coefficient", None)
    answer = client.chat(steering=asked, logprobs=True)
    prompt = encode_prompts(client.engine.model, ASKED, roles=True)[0]
    decoding = Decoding(temperature=0, max_new_tokens=8)
    row = client.engine.run([Request(prompt=prompt, decoding=decoding, edits=edits, tops=0)])[0]
    assert answer["choices"][0]["message"]["content"] == row.text
    found = [one["logprob"] for one in answer["choices"][0]["logprobs"]["content"]]
    expected = [s.log_prob for s in row.scores][: len(found)]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    said = answer["x_jaxsteer"]
    assert len(said["edits"]) == 1 and said["prompt_tokens_edited"] == row.edited
    plain = client.chat(logprobs=True)
    assert numbers(plain) != numbers(answer) and plain["x_jaxsteer"]["edits"] == []


def test_strength_0_is_no_field_to_the_bit(client: Client) -> None:
    plain = client.chat(logprobs=True, top_logprobs=20)
    for steering in (
        {"edits": [inline(4, 0.0)]},
        {"edits": []},
        {"edits": [{"vector": "push.safetensors", "coefficient": 0}]},
        {"vectors": [{"source": "push.safetensors", "scale": 0}]},
    ):
        client.chat(steering={"edits": [inline(5, 3.0)]})
        answer = client.chat(logprobs=True, top_logprobs=20, steering=steering)
        assert numbers(answer) == numbers(plain)
        assert answer["choices"][0]["message"] == plain["choices"][0]["message"]


def test_many_mixed_clients_in_any_order(client: Client) -> None:
    """64 requests at once, with steering of their own, drawn and greedy: each gets what it gets alone."""

    def one(i: int) -> str:
        steering = {"edits": [inline(i, 1 + i / 20)]} if i % 3 else None
        fields = {"temperature": i % 2, "seed": i, "max_tokens": 3 + i % 6, "steering": steering}
        return client.chat("Do you agree? " * (1 + i % 5), **fields)["choices"][0]["message"]["content"]

    alone = {i: one(i) for i in range(0, 64, 8)}
    found = []
    for seed in range(2):
        order = np.random.default_rng(seed).permutation(64).tolist()
        with ThreadPoolExecutor(24) as pool:
            found.append(dict(zip(order, pool.map(one, order))))
    assert found[0] == found[1]
    assert {i: found[0][i] for i in alone} == alone and len(set(found[0].values())) > 20


def test_no_request_compiles(client: Client, compile_counter: type) -> None:
    for length in (1, 2):  # the engine of the tests makes its programs when they are needed
        client.chat(max_tokens=length, steering={"edits": [inline(1)]})
    with compile_counter() as count:
        for i in range(20):
            operation = ("add", "ablate")[i % 2]
            edit = inline(200 + i, 0.3 + i) | {"operation": operation, "site": f"blocks.{i % 4}.hook_resid_post"}
            client.chat(max_tokens=2, steering={"edits": [edit] * (1 + i % 3)}, seed=i)
    assert not count.names()


def test_streams_say_what_answers_say(client: Client) -> None:
    body = {"messages": ASKED, "temperature": 0, "max_tokens": 12, "logprobs": True, "top_logprobs": 2}
    steering = {"steering": {"edits": [{"vector": "push.safetensors"}]}}
    for more in ({}, steering, {"stop": ["agree"]}, {"n": 2, "temperature": 1, "seed": 3}):
        whole = client.good("/v1/chat/completions", body | more)
        events = client.stream("/v1/chat/completions", body | more | {"stream_options": {"include_usage": True}})
        assert events[-1] == "[DONE]" and events[-2]["choices"] == []
        usage, known = events[-2]["usage"], whole["usage"]
        assert [usage[k] for k in ("prompt_tokens", "completion_tokens")] == [
            known[k] for k in ("prompt_tokens", "completion_tokens")
        ]
        chunks = events[:-2]
        assert {(c["id"], c["created"], c["object"]) for c in chunks} == {
            (chunks[0]["id"], chunks[0]["created"], "chat.completion.chunk")
        }
        assert all(chunk["usage"] is None for chunk in chunks)
        for choice in whole["choices"]:
            own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
            assert own[0]["delta"] == {"role": "assistant", "content": ""} and own[-1]["delta"] == {}
            assert "".join(c["delta"].get("content", "") for c in own) == choice["message"]["content"]
            assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        assert chunks[0]["x_jaxsteer"]["edits"] == whole["x_jaxsteer"]["edits"]
    for event in client.stream("/v1/completions", {"prompt": "The radio", "max_tokens": 6, "seed": 1})[:-1]:
        assert event["object"] == "text_completion" and "text" in event["choices"][0]


@pytest.mark.parametrize("prompt", ["The radio plays", "<|bos|>The radio plays"])
def test_tokens_stand_where_their_offsets_say(client: Client, prompt: str) -> None:
    """A token that the tokenizer adds before a text is not in the text; chunks of a stream count on."""
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 8, "logprobs": 1}
    choice = client.good("/v1/completions", body | {"echo": True})["choices"][0]
    scores = choice["logprobs"]
    at = list(zip(scores["tokens"], scores["text_offset"], strict=True))
    assert scores["tokens"][0] == "<|bos|>" and at[0][1] == 0
    for token, offset in at[0 if prompt.startswith("<") else 1 :]:
        if offset < len(choice["text"]):  # a stop token is told, and not said
            assert choice["text"][offset : offset + len(token)] == token
    whole = client.good("/v1/completions", body)["choices"][0]["logprobs"]
    parts = [chunk["choices"][0]["logprobs"] for chunk in client.stream("/v1/completions", body)[:-1]]
    streamed = [offset for part in parts if part for offset in part["text_offset"]]
    assert streamed == whole["text_offset"] and len(streamed) > 1


def test_echo_and_log_probs_as_harnesses_read_them(client: Client) -> None:
    """One generated token behind the prompt, the first entry null, numbers in both lists the very same."""
    model = client.engine.model
    ids = [int(i) for i in encode_texts(model.tokenizer, ["The radio plays in the house and I like it"])[0]]
    rows = [ids, ids[:5], ids[:1]]
    body = {"prompt": rows, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    answer = client.good("/v1/completions", body)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    for row, choice in zip(rows, answer["choices"], strict=True):
        scores = choice["logprobs"]
        lengths = {len(scores[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
        assert lengths == {len(row) + 1}
        assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
        request = Request(
            prompt=unlabelled(np.asarray(row, np.int32)),
            decoding=Decoding(temperature=0),
            tops=1,
            echo=True,
            max_tokens=1,
        )
        expected = client.engine.run([request])[0]
        known = [s.log_prob for s in (*expected.prompt_scores, *expected.scores)]
        np.testing.assert_allclose(scores["token_logprobs"][1:], known[1:], rtol=1e-6, atol=1e-6)
        for number, top in zip(scores["token_logprobs"][1:], scores["top_logprobs"][1:]):
            assert number in top.values() and max(top.values()) >= number
        assert scores["token_logprobs"][-1] == max(scores["top_logprobs"][-1].values()), "a greedy token"
    assert answer["choices"][0]["text"].startswith(model.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    only = client.good("/v1/completions", body | {"max_tokens": 0, "prompt": ids})["choices"][0]
    assert only["logprobs"]["token_logprobs"] == answer["choices"][0]["logprobs"]["token_logprobs"][:-1]
    pushed = client.good("/v1/completions", body | {"prompt": ids, "steering": {"edits": [inline(3)]}})
    assert pushed["choices"][0]["logprobs"]["token_logprobs"] != answer["choices"][0]["logprobs"]["token_logprobs"]


BAD: list[tuple[str, Any, str]] = [
    ("/v1/chat/completions", {}, "messages"),
    ("/v1/chat/completions", {"messages": []}, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, "role"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text alone"),
    ("/v1/chat/completions", {"messages": ASKED, "sterring": {}}, "did you mean steering"),
    ("/v1/chat/completions", {"messages": ASKED, "temperature": "hot"}, "temperature"),
    ("/v1/chat/completions", {"messages": ASKED, "temperature": -1}, "temperature"),
    ("/v1/chat/completions", {"messages": ASKED, "max_tokens": 0}, "max_tokens"),
    ("/v1/chat/completions", {"messages": ASKED, "n": 1000}, "n must be"),
    ("/v1/chat/completions", {"messages": ASKED, "frequency_penalty": 1}, "frequency_penalty"),
    ("/v1/chat/completions", {"messages": ASKED, "tools": [{}]}, "tools"),
    ("/v1/chat/completions", {"messages": ASKED, "top_logprobs": 3}, "logprobs"),
    ("/v1/chat/completions", {"messages": ASKED, "stop": [""]}, "stop"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 600}]}, "may have 512"),
    ("/v1/completions", {"prompt": [99999]}, "token ids"),
    ("/v1/completions", {"prompt": {"a": 1}}, "prompt"),
    ("/v1/completions", {"prompt": "a", "echo": True, "stream": True}, "echo"),
    ("/v1/completions", {"prompt": "a", "logprobs": 21}, "logprobs"),
    ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix"),
    ("/tokenize", {"text": "a"}, "no field 'text'"),
    ("/detokenize", {"tokens": [-1]}, "tokens"),
    ("/v1/project", {"text": "a", "vectors": ["nothing"]}, "No vectors 'nothing'"),
    ("/v1/project", {"text": "a", "vectors": []}, "1 to 16 names"),
    ("/v1/completions", b'{"prompt": "a", "prompt": "b"}', "prompt"),
    ("/v1/completions", b'{"prompt": "\xff"}', "UTF-8"),
    ("/v1/completions", b'{"prompt": "a", "temperature": NaN}', "NaN"),
    ("/v1/completions", {"prompt": "a", "top_p": 0}, "top_p must be above 0"),
    ("/v1/project", {"text": "a", "vectors": ["push.safetensors"], "sites": ["blocks.1.hook_resid_post"]}, "no vector"),
    ("/v1/steering/load", {"path": "x"}, "name"),
    ("/v1/steering/load", {"name": "broken.safetensors"}, "broken"),
]
STEERING: list[tuple[Any, str]] = [
    ("push", "object"),
    ({}, "exactly one"),
    ({"edits": [], "vectors": []}, "exactly one"),
    ({"edit": []}, "no field 'edit': did you mean 'edits'"),
    ({"edits": {}}, "edits must be a list"),
    ({"edits": [{"vector": "push.safetensors"}] * 17}, "at most 16 edits, got 17$"),
    ({"edits": [inline(1) | {"value": 2}]}, "add takes a coefficient, and no value"),
    ({"edits": [inline(1) | {"operation": "floor"}]}, "floor takes a value, and no coefficient"),
    ({"edits": [], "other": 1}, "no field 'other'"),
    ({"edits": [{}]}, "edits\\[0\\]"),
    ({"edits": [{"vector": "/etc/passwd"}]}, "No vectors"),
    ({"edits": [{"vector": "push.safetensors", "strength": 2}]}, "no field 'strength'"),
    (
        {"edits": [{"vector": "push.safetensors", "coefficient": None, "sites": ["blocks.0.hook_resid_post"]}]},
        "no vector",
    ),
    ({"edits": [{"vector": "push.safetensors", "positions": "everywhere"}]}, "positions"),
    ({"edits": [{"vector": "push.safetensors", "sites": []}]}, "empty list"),
    ({"edits": [{"vector": "push.safetensors", "units": "mean_resid_norm"}]}, "mean norm"),
    ({"edits": [{"vector": "cap.safetensors", "coefficient": 2}]}, "no coefficient"),
    ({"edits": [inline(1) | {"site": "blocks.9.hook_resid_post"}]}, "N from 0 to 3"),
    ({"edits": [inline(1) | {"site": "blocks.1.hook_nothing"}]}, "hook_nothing.*KIND one of( hook_\\w+,?){5}$"),
    ({"edits": [inline(1) | {"site": "blocks.1.attn.hook_z"}]}, "hook_z"),
    ({"edits": [inline(1) | {"values": [1.0, 2.0]}]}, "2 components"),
    ({"edits": [inline(1) | {"values": [0.0] * 128}]}, "zero"),
    ({"edits": [inline(1) | {"operation": "rotate"}]}, "rotate"),
    ({"edits": [{"latents": [999999], "operation": "amplify", "amount": 2}]}, "latents"),
    ({"edits": [{"latents": [1], "operation": "released", "amount": 2}]}, "released"),
    ({"edits": [{"latents": [1]}]}, "amount"),
    ({"vectors": [{"source": "push.safetensors", "algorithm": "loreft"}]}, "loreft"),
    ({"vectors": [{"source": "push.safetensors", "layers": [0]}]}, "layer 0"),
    ({"vectors": [{"source": "push.safetensors", "apply": {"prompt": {"window": 2}}}]}, "windows"),
    ({"vectors": [{"source": "cap.safetensors"}]}, "ceiling"),
    ({"vectors": [{"source": "push.safetensors"}], "debug": True}, "debug"),
]


@pytest.mark.parametrize(("path", "body", "message"), BAD)
def test_bad_requests_are_refused_in_openais_form(path: str, body: Any, message: str, client: Client) -> None:
    status, _, found = client.ask(path, body)
    assert status in (400, 404), found
    assert set(found) == {"error"} and set(found["error"]) == {"message", "type", "param", "code"}
    assert message in found["error"]["message"], found


@pytest.mark.parametrize(("steering", "message"), STEERING)
def test_steering_that_is_not_understood_is_refused(steering: Any, message: str, client: Client) -> None:
    before = client.engine.status.requests
    status, _, found = client.ask("/v1/chat/completions", {"messages": ASKED, "max_tokens": 2, "steering": steering})
    assert status in (400, 404) and set(found["error"]) == {"message", "type", "param", "code"}, found
    assert re.search(message, found["error"]["message"]) and found["error"]["param"] == "steering", found
    assert client.engine.status.requests == before, "nothing was run"


def test_bodies_that_are_no_requests(client: Client) -> None:
    for body in (b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"messages": 1}', b"nan"):
        status, _, found = client.ask("/v1/chat/completions", body)
        assert status == 400 and found["error"]["type"] == "invalid_request_error"
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=30)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Length", str(5 << 20))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    assert client.ask("/v1/nothing")[0] == 404 and client.ask("/v1/nothing")[2]["error"]["code"] is None
    assert client.ask("/v1/chat/completions")[0] == 405
    status, _, found = client.ask("/v1/embeddings", {"input": "x"})
    assert status == 404 and "embeddings" in found["error"]["message"]
    status, _, found = client.ask("/v1/chat/completions", {"model": "other", "messages": ASKED})
    assert status == 404 and found["error"]["code"] == "model_not_found"


def test_vectors_come_from_the_directory_and_nowhere_else(client: Client) -> None:
    known = client.good("/v1/steering")
    assert set(known["files"]) == {"push.safetensors", "layers.safetensors", "cap.safetensors", "broken.safetensors"}
    assert [one["name"] for one in known["data"]] == ["push.safetensors", "layers.safetensors", "cap.safetensors"]
    assert known["sae"]["latents"] > 0 and known["active"] is False
    for name in ("../secret.safetensors", "/etc/passwd", "..", "", "./push.safetensors", "push.safetensors\0"):
        assert client.ask("/v1/steering/load", {"name": name})[0] == 404
    shown = client.good("/v1/steering/push.safetensors")
    assert shown["operation"] == "add" and shown["site"] == SITE and shown["sign"] == "pushes"
    assert shown["norms"][SITE] == pytest.approx(8.0, rel=1e-5)
    assert client.ask("/v1/steering/nothing")[0] == 404
    status, _, found = client.ask("/v1/steering/unload", {"name": "nothing"})
    assert status == 404 and found["error"]["param"] == "name"
    left = client.good("/v1/steering/unload", {"name": "cap.safetensors"})
    assert "cap.safetensors" not in [one["name"] for one in left["data"]]
    body = {"messages": ASKED, "steering": {"edits": [{"vector": "cap.safetensors"}]}}
    assert client.ask("/v1/chat/completions", body)[0] == 400
    client.good("/v1/steering/load", {"name": "cap.safetensors"})
    client.good("/v1/chat/completions", body | {"max_tokens": 1})


def test_projections_before_and_after_edits(client: Client) -> None:
    talk = [*ASKED, {"role": "assistant", "content": "I agree with you."}]
    unit = direction(1) / np.linalg.norm(direction(1).astype(np.float64))
    steering = {"edits": [{"vector": "push.safetensors", "coefficient": 2}]}
    found = client.good("/v1/project", {"messages": talk, "vectors": ["push.safetensors"], "steering": steering})
    text = encode_turns(client.engine.model.tokenizer, talk, generation_prompt=False)
    states = np.asarray(jaxsteer.capture(client.engine.model, text.ids[None], [SITE])[SITE][0], np.float64)
    (result,) = found["results"]
    np.testing.assert_allclose(result["along"], states @ unit, atol=1e-4)
    shift = np.asarray(result["along_edited"]) - result["along"]
    np.testing.assert_allclose(shift[1:], 16.0, atol=1e-3)
    assert shift[0] == 0 and found["tokens_edited"] == len(text.ids) - 1 == found["count"] - 1
    assert [turn["role"] for turn in result["turns"]] == ["user", "assistant"]
    own = [i for i, token in enumerate(found["tokens"]) if token["turn"] == 1 and token["role"] == "assistant"]
    assert result["turns"][1]["along"] == pytest.approx(np.mean([result["along"][i] for i in own]))
    assert result["turns"][1]["along_edited"] == pytest.approx(np.mean([result["along_edited"][i] for i in own]))
    assert "".join(found["tokens"][i]["text"] for i in own) == talk[1]["content"]
    capped = client.good(
        "/v1/project",
        {"messages": talk, "vectors": ["push.safetensors"], "steering": {"edits": [{"vector": "cap.safetensors"}]}},
    )["results"][0]
    assert max(capped["along_edited"][1:]) <= -1 + 1e-3 and capped["along"] == pytest.approx(result["along"], abs=1e-4)
    plain = client.good("/v1/project", {"text": "The radio plays.", "vectors": ["layers.safetensors"], "tokens": False})
    assert len(plain["results"]) == 4 and "tokens" not in plain and "along" not in plain["results"][0]


def test_tokens_there_and_back(client: Client) -> None:
    made = client.good("/tokenize", {"prompt": "Do you agree?"})
    assert made["count"] == len(made["tokens"]) and made["max_model_len"] == 512
    bare = client.good("/tokenize", {"prompt": "Do you agree?", "add_special_tokens": False})["tokens"]
    assert made["tokens"][1:] == bare
    assert client.good("/detokenize", {"tokens": bare}) == {"prompt": "Do you agree?"}
    chat = client.good("/tokenize", {"messages": ASKED})["tokens"]
    assert chat == encode_prompts(client.engine.model, ASKED)[0].ids.tolist()
    assert client.good("/tokenizer_info")["eos_token"]


def test_models_health_metrics_page(client: Client) -> None:
    listed = client.good("/v1/models")
    assert listed["object"] == "list" and listed["data"][0]["id"] == "organism:llama"
    assert client.good("/v1/models/organism:llama") == listed["data"][0]
    assert abs(listed["data"][0]["created"] - time.time()) < 3600  # when the server began
    assert client.good("/health")["status"] == "ok"
    text = client.good("/metrics")
    assert "jaxsteer_requests_total" in text and "jaxsteer_waiting 0.0" in text
    status, headers, page = client.ask("/")
    assert status == 200 and "<html" in page
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff" and "server" not in headers
    for path in ("/page/../app.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py"):
        assert client.ask(path)[0] == 404


def test_hosts_and_origins(client: Client) -> None:
    assert client.ask("/v1/models", Host="evil.example")[0] == 403
    for host in (f"127.0.0.1:{client.port}", "localhost", "[::1]:1"):
        assert client.ask("/v1/models", Host=host)[0] == 200
    own = {"Origin": f"http://127.0.0.1:{client.port}"}
    assert client.ask("/v1/models", **own)[0] == 200
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{client.port + 1}"):
        assert client.ask("/v1/models", Origin=origin)[0] == 403


def test_keys(client: Client) -> None:
    with serving(client.engine, client.library, key="k" * 20) as other:
        assert other.ask("/v1/models")[0] == 401 and other.ask("/metrics")[0] == 401
        for given in ("Bearer", "Bearer wrong", "Basic " + "k" * 20, "Bearer " + "k" * 21):
            status, headers, found = other.ask("/v1/models", Authorization=given)
            assert status == 401 and headers["www-authenticate"] == "Bearer"
            assert found["error"]["type"] == "authentication_error"
        assert other.ask("/v1/models", Authorization="Bearer " + "k" * 20)[0] == 200
        assert other.ask("/health")[0] == 200 and other.ask("/")[0] == 200


def test_slow_bodies_are_ended(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxsteer.serve import guards

    monkeypatch.setattr(guards, "SECONDS_FOR_BODY", 0.3)
    with serving(client.engine, client.library) as other, socket.create_connection(("127.0.0.1", other.port), 10) as s:
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert b"408" in s.recv(4096).split(b"\r\n")[0]


def test_slow_heads_are_ended_and_no_http_is_refused(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxsteer.serve import connections

    monkeypatch.setattr(connections, "SECONDS_FOR_HEAD", 0.5)
    half = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: "
    whole = half + b"no\r\n\r\n"

    def rest(s: socket.socket) -> bytes:
        return b"".join(iter(lambda: s.recv(4096), b""))

    def refused(answer: bytes) -> Any:
        return json.loads(answer.split(b"\r\n\r\n")[-1])["error"]

    with serving(client.engine, client.library) as other:
        four = [socket.create_connection(("127.0.0.1", other.port), 10) for _ in range(4)]
        slow, silent, again, nonsense = four
        slow.sendall(half)
        again.sendall(whole)
        assert again.recv(4096).startswith(b"HTTP/1.1 200")
        again.sendall(half)  # the second request of a connection has no more time than the first
        nonsense.sendall(b"\0\1\2\r\n\r\n")
        assert refused(rest(nonsense))["code"] == "not_http"
        assert other.good("/health")["status"] == "ok"
        assert [refused(rest(s))["code"] for s in (slow, again)] == ["slow_head"] * 2 and rest(silent) == b""
        for s in four:
            s.close()


def test_what_is_cut_and_what_is_not_reached_is_said(client: Client) -> None:
    def warned(**fields: Any) -> list[str]:
        whole = client.chat(**fields)["x_jaxsteer"]
        body = {"messages": ASKED, "temperature": 0, "max_tokens": 8} | fields
        ends = [one for one in client.stream("/v1/chat/completions", body)[:-1] if one["choices"][0]["finish_reason"]]
        assert ends[0]["x_jaxsteer"].get("warnings", []) == whole.get("warnings", [])
        return whole.get("warnings", [])

    push = {"vector": "push.safetensors"}
    assert warned(steering={"edits": [push, push | {"positions": "response"}, push | {"coefficient": 0}]}) == []
    far, nobody = push | {"positions": [400]}, push | {"positions": "system"}
    found = warned(steering={"edits": [push, far, nobody]}, user="me")
    assert found[0] == "user has no effect" and len(found) == 3
    assert found[1].startswith("edits[1] reaches no token of the prompt (positions [400])") and "edits[2]" in found[2]
    said = client.chat(steering={"edits": [nobody]})["x_jaxsteer"]
    assert said["prompt_tokens_edited"] == 0 and "prompt_tokens_edited is 0" in said["warnings"][0]
    (cut,) = warned(max_tokens=100_000, stop=["e"])
    assert cut.startswith("max_tokens 100000 is cut to ") and cut.endswith("together may have 512 tokens")


@pytest.mark.parametrize("stream", [True, False])
def test_a_killed_client_frees_its_row(stream: bool, client: Client) -> None:
    body = {"prompt": "The radio", "max_tokens": 480, "temperature": 1, "seed": 1, "stream": stream, "stop": None}
    connection = http.client.HTTPConnection("127.0.0.1", client.port)
    connection.request("POST", "/v1/completions", json.dumps(body))
    while not client.engine.status.rows:
        time.sleep(0.005)
    connection.sock.close() if connection.sock else None
    connection.close()
    steps = client.engine.status.steps
    for _ in itertools.repeat(None, 500):
        if not client.engine.status.rows:
            break
        time.sleep(0.01)
    status = client.engine.status
    assert status.rows == 0 and status.steps - steps < 20, "far fewer calls than 480 tokens take"


def test_a_server_that_steers_everything(client: Client, directory: Any) -> None:
    from jaxsteer.serve.library import Library

    library = Library(model=client.engine.model, directory=directory)
    library.load("push.safetensors")
    library.default = ("push.safetensors",)
    push = {"edits": [{"vector": "push.safetensors"}]}
    with serving(client.engine, library) as other:
        assert other.good("/v1/steering")["active"] is True
        by_default = other.chat(logprobs=True)
        assert by_default["x_jaxsteer"]["edits"][0]["default"] is True
        assert numbers(by_default) == numbers(client.chat(logprobs=True, steering=push))
        status, _, found = other.ask("/v1/chat/completions", {"messages": ASKED, "steering": {"edits": [inline(3)]}})
        assert status == 400 and found["error"]["code"] == "merge_missing"
        both = other.chat(logprobs=True, steering={"edits": [inline(3)], "merge": True})
        two = {"edits": [{"vector": "push.safetensors"}, inline(3)]}
        assert numbers(both) == numbers(client.chat(logprobs=True, steering=two))
        own = other.chat(logprobs=True, steering={"edits": [], "merge": False})
        assert numbers(own) == numbers(client.chat(logprobs=True))
        assert other.ask("/v1/steering/unload", {"name": "push.safetensors"})[0] == 400
