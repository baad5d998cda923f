"""``/v1/chat/completions`` and ``/v1/completions``: from a body to rows of the engine, and back."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from jaxsteer.engine import Busy, Engine, Finished, Piece, Request, Ticket
from jaxsteer.engine.settings import check_served, leaves
from jaxsteer.errors import UserError
from jaxsteer.models.roles import Rendered
from jaxsteer.prompts.generate import encode_prompts
from jaxsteer.serve.answers import Answer, Words, event, refuse_failed
from jaxsteer.serve.errors import Refused
from jaxsteer.serve.fields import Asked, chat_fields, completion_fields, read_json
from jaxsteer.serve.library import Library

_GONE = 499


@dataclasses.dataclass
class Completions:
    """Both endpoints."""

    engine: Engine
    library: Library
    words: Words

    async def chat(self, request: HttpRequest) -> Response:
        """``POST /v1/chat/completions``."""
        asked = chat_fields(read_json(await request.body()), self.engine.model.name)
        return await self._answer(request, asked, chat=True)

    async def text(self, request: HttpRequest) -> Response:
        """``POST /v1/completions``."""
        asked = completion_fields(read_json(await request.body()), self.engine.model.name)
        return await self._answer(request, asked, chat=False)

    async def _answer(self, request: HttpRequest, asked: Asked, *, chat: bool) -> Response:
        if not self.engine.status.ready:
            what = self.engine.status.compiling or "its programs"
            raise Refused(f"The server is starting: it compiles {what}.", status=503, code="loading")
        client = request.client.host if request.client else ""
        rows, extra, parts = await asyncio.to_thread(self._rows, asked, chat, client)
        answer = Answer(model=self.engine.model, words=self.words, chat=chat, extra=extra, parts=parts)
        running = _Running(self.engine, rows)
        if asked.stream:
            stream = self._stream(request, answer, running, asked)
            return StreamingResponse(stream, media_type="text/event-stream")
        watch = asyncio.create_task(_gone(request))
        collect = asyncio.create_task(running.ends())
        try:
            await asyncio.wait({watch, collect}, return_when=asyncio.FIRST_COMPLETED)
            if not collect.done():
                return Response(status_code=_GONE)
            ends = collect.result()
        finally:
            running.cancel()
            watch.cancel()
            collect.cancel()
        for end in ends:
            refuse_failed(end)
        prompts = asked.prompts or ("",)
        return JSONResponse(answer.whole(ends, prompts, asked.tops, asked.echo, asked.n))

    def _rows(self, asked: Asked, chat: bool, client: str) -> tuple[list[Request], dict[str, Any], tuple[int, ...]]:
        """One row per prompt and choice, checked, what they are steered by, and how many parts each edit of that has.

        Raises ``Refused``.
        """
        steered = self.library.steered(asked.steering)
        edited = steered.edits is not None
        given: list[Any] = [list(asked.messages)] if chat else list(asked.prompts)
        try:
            check_served(steered.edits, self.engine.model.config)
        except UserError as error:
            raise Refused(str(error), param="steering", code="steering_refused") from None
        try:
            prompts: Sequence[Rendered] = [
                encode_prompts(self.engine.model, [prompt], roles=edited)[0] for prompt in given
            ]
            rows = [
                Request(
                    prompt=prompt, decoding=asked.decoding, number=number, edits=steered.edits, tops=asked.tops,
                    echo=asked.echo and asked.tops is not None, max_tokens=asked.max_tokens, timeout=asked.timeout,
                    client=client,
                )
                for prompt in prompts
                for number in range(asked.n)
            ]  # fmt: skip
            for row in rows[:: asked.n]:
                self.engine.check(row)
        except UserError as error:
            raise Refused(str(error), param="messages" if chat else "prompt") from None
        extra: dict[str, Any] = {"edits": list(steered.applied), "seed": asked.decoding.seed}
        if steered.merge is not None:
            extra["merge"] = steered.merge
        longest = max(len(prompt.ids) for prompt in prompts)
        warnings = [*asked.warnings, *_cut(asked.max_tokens, longest, self.engine.context)]
        if warnings:
            extra["warnings"] = warnings
        return rows, extra, tuple(len(leaves(one)) for one in steered.edits.edits) if steered.edits else ()

    async def _stream(
        self, request: HttpRequest, answer: Answer, running: _Running, asked: Asked
    ) -> AsyncIterator[str]:
        watch = asyncio.create_task(_gone(request))
        none = {"usage": None} if asked.usage else {}
        try:
            if answer.chat:
                for index in range(running.count):
                    yield event(answer.begin(index) | none)
            ends: dict[int, Finished] = {}
            said = [0] * running.count
            while len(ends) < running.count:
                take = asyncio.create_task(running.queue.get())
                await asyncio.wait({take, watch}, return_when=asyncio.FIRST_COMPLETED)
                if not take.done():
                    take.cancel()
                    return
                index, what = take.result()
                if isinstance(what, Piece):
                    yield event(answer.part(index, what, asked.tops, said[index]) | none)
                    said[index] += len(what.text)
                    continue
                ends[index] = what
                refuse_failed(what)
                yield event(answer.end(index, what) | none)
            if asked.usage:
                yield event(answer.last([ends[i] for i in sorted(ends)], asked.n))
        except Refused as refused:
            yield event(refused.body())
        finally:
            running.cancel()
            watch.cancel()
        yield "data: [DONE]\n\n"


class _Running:
    """The rows of one HTTP request."""

    def __init__(self, engine: Engine, rows: Sequence[Request]) -> None:
        """Raises ``Refused`` where the queue is full: then none is run."""
        self.queue: asyncio.Queue[tuple[int, Piece | Finished]] = asyncio.Queue()
        self.count, self._tickets = len(rows), list[Ticket]()
        loop = asyncio.get_running_loop()

        def listener(index: int) -> Any:
            def hear(what: Piece | Finished) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has been closed
                    loop.call_soon_threadsafe(self.queue.put_nowait, (index, what))

            return hear

        try:
            for index, row in enumerate(rows):
                self._tickets.append(engine.submit(row, listener(index)))
        except (Busy, UserError) as error:
            self.cancel()
            busy = isinstance(error, Busy)
            raise Refused(str(error), status=429 if busy else 400, code="busy" if busy else None) from None

    async def ends(self) -> list[Finished]:
        """How all of them ended, in order."""
        found: dict[int, Finished] = {}
        while len(found) < self.count:
            index, what = await self.queue.get()
            if isinstance(what, Finished):
                found[index] = what
        return [found[i] for i in range(self.count)]

    def cancel(self) -> None:
        """Those that have not ended."""
        for ticket in self._tickets:
            ticket.cancel()


def _cut(asked: int | None, prompt: int, context: int) -> list[str]:
    """That fewer tokens than were asked for have room behind the longest prompt."""
    if asked is None or prompt + asked <= context:
        return []
    return [f"max_tokens {asked} is cut to {context - prompt}: prompt and answer together may have {context} tokens"]


async def _gone(request: HttpRequest) -> None:
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
