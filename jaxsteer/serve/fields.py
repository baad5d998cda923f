"""What bodies of requests hold: each field checked, unknown ones refused, those without an effect named.

A field that would change the answer is understood or refused; it is never passed over.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import secrets
from collections.abc import Mapping
from typing import Any

from jaxsteer.errors import UserError
from jaxsteer.files import parse_json
from jaxsteer.models.sampling import Decoding
from jaxsteer.serve.errors import Refused

MOST_CHOICES, MOST_PROMPTS, MOST_STOPS, MOST_TOPS = 64, 256, 16, 20
_COMMON = {
    "model", "max_tokens", "temperature", "top_p", "top_k", "stop", "seed", "n", "stream", "stream_options", "steering",
    "timeout",
}  # fmt: skip
_CHAT = _COMMON | {"messages", "max_completion_tokens", "logprobs", "top_logprobs"}
_COMPLETION = _COMMON | {"prompt", "echo", "logprobs", "suffix", "best_of"}
_NO_EFFECT = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "prompt_cache_key",
    "safety_identifier",
    "parallel_tool_calls",
}
_ONLY: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "reasoning_effort": (None,),
}
"""Fields of which only these values, which do nothing, are accepted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """The fields that both kinds of completions have."""

    decoding: Decoding
    max_tokens: int | None
    n: int
    stream: bool
    usage: bool
    """Whether a stream ends with a chunk of usage."""
    tops: int | None
    steering: Any
    timeout: float | None
    warnings: tuple[str, ...]
    messages: tuple[dict[str, str], ...] = ()
    prompts: tuple[str | list[int], ...] = ()
    echo: bool = False


def read_json(body: bytes) -> dict[str, Any]:
    """The object that a body holds. Raises ``Refused``."""
    try:
        found = parse_json(body.decode(), "the body")
    except UnicodeDecodeError:
        raise Refused("The body is no text: it has to be UTF-8.", code="not_json") from None
    except UserError as error:
        raise Refused(f"The body is not JSON as it has to be: {str(error)[:200]}", code="not_json") from None
    if not isinstance(found, dict):
        raise Refused("The body must be a JSON object.")
    return found


def chat_fields(body: Mapping[str, Any], model: str) -> Asked:
    """Of ``/v1/chat/completions``. Raises ``Refused``."""
    warnings = _known(body, _CHAT)
    _check_model(body, model)
    if "max_tokens" in body and "max_completion_tokens" in body:
        raise Refused("max_tokens and max_completion_tokens say the same: give one.", param="max_tokens")
    name = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    wanted, tops = _flag(body, "logprobs"), _whole(body, "top_logprobs", 0, MOST_TOPS)
    if tops is not None and not wanted:
        raise Refused("top_logprobs needs logprobs: true.", param="top_logprobs")
    return _asked(
        body,
        name,
        warnings,
        tops=(tops or 0) if wanted else None,
        messages=read_messages(body.get("messages")),
        least=1,
    )


def completion_fields(body: Mapping[str, Any], model: str) -> Asked:
    """Of ``/v1/completions``. Raises ``Refused``."""
    warnings = _known(body, _COMPLETION)
    _check_model(body, model)
    if body.get("suffix") not in (None, ""):
        raise Refused("suffix is not supported.", param="suffix")
    if body.get("best_of") not in (None, 1, body.get("n", 1)):
        raise Refused("best_of is not supported: ask for n.", param="best_of")
    tops, echo = _whole(body, "logprobs", 0, MOST_TOPS), _flag(body, "echo")
    if echo and _flag(body, "stream"):
        raise Refused("echo cannot be streamed: ask without stream.", param="echo")
    default = {"max_tokens": 16}  # as OpenAI's
    return _asked(
        default | dict(body),
        "max_tokens",
        warnings,
        tops=tops,
        prompts=_prompts(body.get("prompt")),
        echo=echo,
        least=0,
    )


def _asked(body: Mapping[str, Any], tokens: str, warnings: tuple[str, ...], *, least: int, **own: Any) -> Asked:
    most = _whole(body, tokens, least, 1 << 20)
    seed = _whole(body, "seed", -(1 << 63), (1 << 63) - 1)
    options = body.get("stream_options")
    if options is not None and (
        not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}
    ):
        raise Refused("stream_options has include_usage alone.", param="stream_options")
    stream = _flag(body, "stream")
    if options and not stream:
        raise Refused("stream_options needs stream: true.", param="stream_options")
    if (top_p := _number(body, "top_p", 1.0, 0, 1)) <= 0:
        raise Refused("top_p must be above 0.", param="top_p")
    decoding: dict[str, Any] = dict(
        temperature=_number(body, "temperature", 1.0, 0, 100), top_p=top_p,
        top_k=_whole(body, "top_k", 0, 1 << 20) or 0, stop=_stops(body.get("stop")),
        seed=secrets.randbits(31) if seed is None else seed % (1 << 63),
    )  # fmt: skip
    try:
        made = Decoding(max_new_tokens=max(most or (1 << 20), 1), **decoding)
    except UserError as error:
        raise Refused(str(error)) from None
    return Asked(
        decoding=made, max_tokens=most, n=_whole(body, "n", 1, MOST_CHOICES) or 1, stream=stream,
        usage=bool((options or {}).get("include_usage")), steering=body.get("steering"),
        timeout=None if body.get("timeout") is None else _number(body, "timeout", 0, 0.001, 86400), warnings=warnings,
        **own,
    )  # fmt: skip


def _known(body: Mapping[str, Any], known: set[str]) -> tuple[str, ...]:
    """Refuse fields that are not known; name those without an effect."""
    for name, value in body.items():
        if name in known or name in _NO_EFFECT:
            continue
        if name in _ONLY:
            if value not in _ONLY[name]:
                raise Refused(f"{name} is not supported.", param=name, code="unsupported")
            continue
        near = difflib.get_close_matches(name, [*known, *_ONLY], n=1)
        hint = f": did you mean {near[0]}?" if near else "."
        raise Refused(f"There is no field {name[:60]!r}{hint}", param=name[:60], code="unknown_field")
    return tuple(f"{name} has no effect" for name in body if name in _NO_EFFECT and body[name] is not None)


def _check_model(body: Mapping[str, Any], model: str) -> None:
    asked = body.get("model", model)
    if asked != model:
        message = f"The model {str(asked)[:80]!r} is not here; this server has {model!r}."
        raise Refused(message, status=404, param="model", code="model_not_found")


def read_messages(given: Any) -> tuple[dict[str, str], ...]:
    """The turns of a conversation. Raises ``Refused``."""
    if not isinstance(given, list) or not given:
        raise Refused("messages must be a list of one or more messages.", param="messages")
    found = []
    for i, message in enumerate(given):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise Refused(f"{where} must be an object with role and content.", param=where)
        if extra := set(message) - {"role", "content", "name"}:
            if any(message[name] not in (None, [], "") for name in extra):
                raise Refused(f"{where}.{sorted(extra)[0][:40]} is not supported.", param=where)
        role, content = message.get("role"), message.get("content")
        role = "system" if role == "developer" else role
        if role not in ("system", "user", "assistant"):
            raise Refused(f"{where}.role must be system, user or assistant, got {str(role)[:40]!r}.", param=where)
        if isinstance(content, list):
            if not all(
                isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content
            ):
                raise Refused(f"{where}.content may hold parts of type text alone.", param=where)
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise Refused(f"{where}.content must be text.", param=where)
        found.append({"role": role, "content": content})
    return tuple(found)


def _prompts(given: Any) -> tuple[str | list[int], ...]:
    def ids(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(type(t) is int for t in value)

    if isinstance(given, str) or ids(given):
        return (given,)
    if not isinstance(given, list) or not given or not all(isinstance(p, str) or ids(p) for p in given):
        raise Refused("prompt must be a text, a list of token ids, or a list of these.", param="prompt")
    if len(given) > MOST_PROMPTS:
        raise Refused(f"At most {MOST_PROMPTS} prompts may come in one request.", param="prompt")
    return tuple(given)


def _stops(given: Any) -> tuple[str, ...]:
    stops = [given] if isinstance(given, str) else given or []
    if not isinstance(stops, list) or not all(isinstance(s, str) and 0 < len(s) <= 200 for s in stops):
        raise Refused("stop must be a text or a list of texts that are not empty.", param="stop")
    if len(stops) > MOST_STOPS:
        raise Refused(f"stop may list at most {MOST_STOPS} texts.", param="stop")
    return tuple(stops)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise Refused(f"{name} must be true or false.", param=name)
    return bool(value)


def _whole(body: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int or not low <= value <= high:
        raise Refused(f"{name} must be a whole number from {low} to {high}.", param=name)
    return value


def _number(body: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Refused(f"{name} must be a number.", param=name)
    if not low <= value <= high:
        raise Refused(f"{name} must lie between {low:g} and {high:g}.", param=name)
    return float(value)
