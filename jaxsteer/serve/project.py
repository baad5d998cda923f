"""``/v1/project``, ``/tokenize`` and ``/detokenize``: what a text is to the model."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse

from jaxsteer.axis.projection import calibration, scale, units
from jaxsteer.engine import Engine
from jaxsteer.engine.projecting import Along, TurnAlong, along_of, by_turn
from jaxsteer.errors import UserError
from jaxsteer.models.roles import ROLES, Rendered, unlabelled
from jaxsteer.prompts import encode_texts, encode_turns
from jaxsteer.serve.answers import Words
from jaxsteer.serve.errors import Refused
from jaxsteer.serve.fields import read_json, read_messages
from jaxsteer.serve.library import Library
from jaxsteer.steer.vectors import Vectors

_FIELDS = {"model", "messages", "text", "vectors", "sites", "steering", "tokens", "generation_prompt"}


@dataclasses.dataclass
class Reading:
    """The endpoints that read."""

    engine: Engine
    library: Library
    words: Words
    _one: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    async def project(self, request: HttpRequest) -> JSONResponse:
        """``POST /v1/project``: a text's tokens and turns along loaded vectors, as the model reads it without edits,
        and with those of ``steering``."""
        body = read_json(await request.body())
        _only(body, _FIELDS)
        return JSONResponse(await asyncio.to_thread(self._project, body))

    def _project(self, body: Mapping[str, Any]) -> dict[str, Any]:
        library = self.library
        steered = library.steered(body["steering"]) if body.get("steering") is not None else None
        names = body.get("vectors")
        if names is None:
            names = [library.axis] if library.axis else list(library.loaded)[:1]
        elif not isinstance(names, list) or not all(isinstance(n, str) for n in names) or not 1 <= len(names) <= 16:
            raise Refused("vectors must be a list of 1 to 16 names; leave it out for the axis.", param="vectors")
        if not names:
            raise Refused("No vectors are loaded to project on: POST /v1/steering/load.", param="vectors")
        text = self._text(body)
        try:
            places = [(name, library.find(name), site) for name in names for site in self._sites(name, body)]
            along = [units(vectors, [site])[0] for _, vectors, site in places]
            with self._one:
                edits = None if steered is None else steered.edits
                found = along_of(self.engine.model, text, along, [site for *_, site in places], edits)
        except UserError as error:
            raise Refused(str(error), param="sites" if "sites" in body else "vectors") from None
        turns = by_turn(text, found)
        results = [_result(name, vectors, site, s, found, turns) for s, (name, vectors, site) in enumerate(places)]
        made: dict[str, Any] = {
            "object": "projection", "model": self.engine.model.name, "count": len(text.ids),
            "results": results, "edits": [] if steered is None else list(steered.applied),
            "tokens_edited": found.touched,
        }  # fmt: skip
        if body.get("tokens", True):
            made["tokens"] = [
                {
                    "id": int(i), "text": self.words(int(i))[0], "turn": int(turn) if text.turns else 0,
                    "role": ROLES[int(role)] if text.turns else "text",
                }
                for i, role, turn in zip(text.ids, text.role, text.turn, strict=True)
            ]  # fmt: skip
        else:
            for one in made["results"]:
                del one["along"], one["along_edited"]
        return made

    def _sites(self, name: str, body: Mapping[str, Any]) -> list[str]:
        """The sites at which one of the vectors is asked for."""
        vectors, asked = self.library.find(name), body.get("sites")
        own = vectors.metadata.get("site")
        sites = asked if asked is not None else [own] if own else list(vectors.sites)
        if not isinstance(sites, list) or not all(isinstance(s, str) for s in sites) or not 0 < len(sites) <= 128:
            raise Refused("sites must be a list of names of sites.", param="sites")
        return list(vectors.at(sites).sites)

    def _text(self, body: Mapping[str, Any]) -> Rendered:
        tokenizer, model = self.engine.model.tokenizer, self.engine.model
        if ("messages" in body) == ("text" in body):
            raise Refused("Give either messages or text.", param="messages")
        try:
            if "text" in body:
                if not isinstance(body["text"], str) or not body["text"]:
                    raise Refused("text must be a text that is not empty.", param="text")
                text = unlabelled(encode_texts(tokenizer, [body["text"]])[0])
            else:
                messages = [dict(m) for m in read_messages(body["messages"])]
                text = encode_turns(tokenizer, messages, generation_prompt=body.get("generation_prompt") is True)
        except UserError as error:
            raise Refused(str(error), param="messages") from None
        if len(text.ids) > min(self.engine.context, model.config.max_positions):
            raise Refused(
                f"The text has {len(text.ids)} tokens, and may have {self.engine.context}.",
                param="text" if "text" in body else "messages",
            )
        return text

    async def tokenize(self, request: HttpRequest) -> JSONResponse:
        """``POST /tokenize``: ids of a text (``prompt``) or of ``messages``."""
        body = read_json(await request.body())
        _only(body, {"model", "prompt", "messages", "add_special_tokens", "add_generation_prompt"})
        if ("messages" in body) == ("prompt" in body):
            raise Refused("Give either prompt or messages.", param="prompt")
        ids = await asyncio.to_thread(self._ids, body)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": self.engine.context})

    def _ids(self, body: Mapping[str, Any]) -> list[int]:
        tokenizer = self.engine.model.tokenizer
        try:
            if "messages" in body:
                messages = [dict(m) for m in read_messages(body["messages"])]
                asked = body.get("add_generation_prompt", True) is True
                return [int(i) for i in encode_turns(tokenizer, messages, generation_prompt=asked).ids]
            if not isinstance(body["prompt"], str):
                raise Refused("prompt must be a text.", param="prompt")
            if body.get("add_special_tokens", True) is False:
                return [int(i) for i in tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]]
            return [int(i) for i in encode_texts(tokenizer, [body["prompt"]])[0]]
        except UserError as error:
            raise Refused(str(error), param="prompt") from None

    async def detokenize(self, request: HttpRequest) -> JSONResponse:
        """``POST /detokenize``: the text of ids (``tokens``)."""
        body = read_json(await request.body())
        _only(body, {"model", "tokens"})
        tokens, most = body.get("tokens"), len(self.engine.model.tokenizer)
        if not isinstance(tokens, list) or not all(type(t) is int and 0 <= t < most for t in tokens):
            raise Refused(f"tokens must be a list of ids from 0 to {most - 1}.", param="tokens")
        text = self.engine.model.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return JSONResponse({"prompt": text})

    async def tokenizer_info(self, request: HttpRequest) -> JSONResponse:
        """``GET /tokenizer_info``: special tokens and the chat template, as clients that tokenise here ask for."""
        tokenizer = self.engine.model.tokenizer
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        return JSONResponse(
            {"tokenizer_class": type(tokenizer).__name__, "vocab_size": len(tokenizer)}
            | {name: getattr(tokenizer, name, None) for name in names}
            | {"chat_template": getattr(tokenizer, "chat_template", None), "model_max_length": self.engine.context}
        )


def _result(name: str, vectors: Vectors, site: str, s: int, found: Along, turns: list[TurnAlong]) -> dict[str, Any]:
    ends = scale(vectors, site)

    def position(value: float | None) -> float | None:
        return None if ends is None or value is None else (value - ends[0]) / (ends[1] - ends[0])

    rows = []
    for turn in turns:
        plain, edited = turn.plain[s], None if turn.edited is None else turn.edited[s]
        rows.append(
            {
                "turn": turn.turn,
                "role": turn.role,
                "tokens": turn.tokens,
                "along": plain,
                "along_edited": edited,
                "position": position(plain),
                "position_edited": position(edited),
            }  # fmt: skip
        )
    return {
        "vector": name, "site": site, "sign": vectors.sign,
        "scale": None if ends is None else {"roles": ends[0], "default": ends[1]},
        "calibration": {f"{k:g}": v for k, v in calibration(vectors, site).items()}, "turns": rows,
        "along": found.plain[s].tolist(), "along_edited": None if found.edited is None else found.edited[s].tolist(),
    }  # fmt: skip


def _only(body: Mapping[str, Any], known: set[str]) -> None:
    for name in body:
        if name not in known:
            raise Refused(f"There is no field {name[:60]!r} here.", param=name[:60], code="unknown_field")
