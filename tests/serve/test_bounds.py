"""What the chat page asks beyond other clients: bounds on loaded vectors, and the scales of axis files."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from jaxsteer import steer
from jaxsteer.axis.projection import CALIBRATION, DEFAULT_PROJECTION, ROLES_PROJECTION
from jaxsteer.engine import Request
from jaxsteer.engine.spec import read_steering
from jaxsteer.models.sampling import Decoding
from jaxsteer.prompts.generate import encode_prompts
from tests.serve.conftest import Client, direction

ASKED = [{"role": "user", "content": "Do you agree or disagree?"}]
SITES = [f"blocks.{i}.hook_resid_post" for i in range(4)]


@pytest.mark.parametrize("operation", ["floor", "ceiling", "clamp"])
def test_loaded_vectors_are_bounded_by_a_value(operation: str, client: Client) -> None:
    made: Any = {"floor": steer.floor, "ceiling": steer.ceiling, "clamp": steer.clamp}[operation]
    one = {"vector": "layers.safetensors", "operation": operation, "value": 4.5}
    vectors = np.stack([direction(10 + i) for i in (1, 3)])
    for asked, edit in (
        (one | {"sites": [SITES[1], SITES[3]]}, made([SITES[1], SITES[3]], vectors, 4.5)),
        (
            one | {"vector": "push.safetensors", "positions": "user"},
            made(SITES[2], direction(1), 4.5, positions="user"),
        ),
    ):
        answer = client.chat(steering={"edits": [asked]}, logprobs=True)
        prompt = encode_prompts(client.engine.model, ASKED, roles=True)[0]
        decoding = Decoding(temperature=0, max_new_tokens=8)
        row = client.engine.run([Request(prompt=prompt, decoding=decoding, edits=edit, tops=0)])[0]
        found = [token["logprob"] for token in answer["choices"][0]["logprobs"]["content"]]
        np.testing.assert_allclose(found, [s.log_prob for s in row.scores][: len(found)], atol=1e-5)
        said = answer["x_jaxsteer"]["edits"][0]
        assert said["operation"] == operation and set(said["values"].values()) == {4.5} and "coefficient" not in said


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"operation": "floor"}, "takes a value"),
        ({"operation": "floor", "value": 1, "coefficient": 2}, "neither coefficient"),
        ({"operation": "add", "value": 1}, "bounded by floor, ceiling, clamp"),
        ({"value": 1}, "belongs to an operation"),
        ({"vector": "cap.safetensors", "operation": "floor", "value": 1}, "of the operation ceiling already"),
        ({"operation": "floor", "value": "1"}, "finite number"),
    ],
)
def test_bounds_that_are_not_understood_are_refused(edit: Any, message: str, client: Client) -> None:
    body = {"messages": ASKED, "max_tokens": 2, "steering": {"edits": [{"vector": "push.safetensors"} | edit]}}
    status, _, found = client.ask("/v1/chat/completions", body)
    assert status == 400 and message in found["error"]["message"], found


def test_a_bound_holds_what_is_projected(client: Client) -> None:
    """A floor at the site of the projection shows as a bound for every token but the first; the words do not move."""
    messages = [*ASKED, {"role": "assistant", "content": "I agree with you."}]
    body = {"messages": messages, "vectors": ["push.safetensors"]}
    bound = {"edits": [{"vector": "push.safetensors", "operation": "floor", "value": 25.0}]}
    plain, floored = (client.good("/v1/project", body | more)["results"][0] for more in ({}, {"steering": bound}))
    np.testing.assert_allclose(floored["along"], plain["along"], atol=1e-4)
    expected = [plain["along"][0], *np.maximum(plain["along"][1:], 25.0)]
    np.testing.assert_allclose(floored["along_edited"], expected, rtol=1e-4, atol=1e-3)
    assert min(plain["along"][1:]) < 25.0 < max(plain["along"])


def test_axis_files_tell_their_scale(client: Client) -> None:
    push, site = client.library.loaded["push.safetensors"], SITES[2]
    ends = {ROLES_PROJECTION: -2.0, DEFAULT_PROJECTION: 6.0, CALIBRATION: {"25": 4.0, "50": 5.5}}
    metadata = push.metadata | {key: json.dumps({site: value}) for key, value in ends.items()}
    client.library.loaded["axis"] = dataclasses.replace(push, metadata=metadata)
    try:
        told = client.good("/v1/steering/axis")
        assert told["scale"] == {site: {"roles": -2.0, "default": 6.0}}
        assert told["calibration"] == {site: {"25": 4.0, "50": 5.5}}
    finally:
        del client.library.loaded["axis"]
    assert client.good("/v1/steering/push.safetensors")["scale"] == {}


def test_the_applied_bound_is_said(client: Client) -> None:
    item = {"vector": "push.safetensors", "operation": "floor", "value": 3}
    steered = read_steering({"edits": [item]}, client.engine.model, client.library.find)
    assert steered.applied[0]["values"] == {SITES[2]: 3.0} and steered.applied[0]["sites"] == [SITES[2]]
