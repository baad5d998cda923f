"""``Engine``: rows of many requests in one running loop, which they join and leave.

One thread owns the device. In every turn it ends rows that were cancelled or ran out of time, runs some pieces of the
prompts that wait, puts rows whose prompt is done into the batch, and decodes: one token per row while somebody could
join, several while nobody waits. Programs exist for a few widths of the batch and a few lengths of rows (``ladder``);
requests, edits and settings are data.

A row's tokens depend on its request alone: on its prompt, edits and seed. Its log-probabilities do so to the bit within
one width and length, and to rounding beyond.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import numpy as np

from jaxsteer.engine import device
from jaxsteer.engine.batch import Batch, Row
from jaxsteer.engine.joining import Joining
from jaxsteer.engine.prefix import Prefixes
from jaxsteer.engine.programs import Programs, ladder
from jaxsteer.engine.requests import Finished, Piece, Request, Ticket
from jaxsteer.engine.settings import check_served
from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.models.sampling import stop_ids
from jaxsteer.models.sharding import require_memory
from jaxsteer.ranges import Positive, Range, check_ranges

log = logging.getLogger(__name__)

PIECES_PER_TURN = 4
"""Pieces of prompts that are run between two steps of the rows."""
_SECONDS_PER_CALL = 0.1


class Busy(Exception):
    """The queue is full."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How much the engine does at a time."""

    rows: Annotated[int, Range(1, 4096)] = 32
    """Rows decoded at a time."""
    context: Annotated[int, Range(0, 1 << 20)] = 0
    """Longest prompt and answer together, in tokens (0: the model's positions, at most 2048)."""
    waiting: Annotated[int, Range(1, 1 << 20)] = 256
    """Requests that may wait for a row; more are refused."""
    timeout: Positive = 600.0
    """Seconds that a request may take, waiting included."""
    prefix_mib: Annotated[int, Range(0, 1 << 20)] = 256
    """Memory for the beginnings of prompts, in MiB; 0 keeps none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineStatus:
    """What the engine does at the moment, and what it has done so far."""

    ready: bool
    compiling: str
    """The program that is being compiled, or ""."""
    rows: int
    width: int
    slots: int
    waiting: int
    requests: int
    tokens: int
    prompt_tokens: int
    cached_tokens: int
    steps: int
    """Calls of the device that decoded."""
    compiled: int
    """Programs made so far."""


class Engine:
    """See the module. Close it, or use it in a ``with`` statement."""

    def __init__(self, model: Model, options: EngineOptions = EngineOptions(), *, warm: bool = True) -> None:
        """Plan memory and start the thread, which compiles all programs first if ``warm``.

        Raises ``UserError`` for a model without tokenizer and for more rows than fit into memory.
        """
        check_ranges(options)
        if model.tokenizer is None:
            raise UserError(f"{model.name} came without tokenizer.json, and cannot be served.")
        self.model, self.options = model, options
        self.context = min(options.context or 2048, model.config.max_positions)
        self._plan_memory()
        self.programs = Programs(model, ladder(options.rows, 8, 1), ladder(self.context, 4, min(512, self.context)))
        self.prefixes = Prefixes(options.prefix_mib << 20)
        self._batch = Batch(self.programs)
        self._waiting: collections.OrderedDict[str, collections.deque[Ticket]] = collections.OrderedDict()
        self._deadlines: dict[Ticket, float] = {}
        self._joining: Joining | None = None
        self._counts = collections.Counter[str]()
        self._pace = 0.0
        """Seconds of one step, smoothed."""
        self._news = threading.Condition()
        self._closed = False
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(warm,), name="jaxsteer-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _plan_memory(self) -> None:
        config, rows = self.model.config, self.options.rows
        width = self.model.params.embed.dtype.itemsize
        keys = 2 * config.n_layers * config.n_kv_heads * config.d_head * width * self.context
        needed = 2 * (rows + 1) * keys + rows * 4 * config.vocab_size * 2 + (self.options.prefix_mib << 20)
        require_memory(
            f"Serving {rows} rows of {self.context} tokens", needed, self.model.mesh,
            "choose fewer rows (--rows) or shorter ones (--context).",
        )  # fmt: skip

    # Asked by any thread

    def check(self, request: Request) -> None:
        """Refuse, with a ``UserError``, a request that does not fit the model or the engine."""
        n, vocab = len(request.prompt.ids), len(self.model.params.embed)
        wanted = 1 if request.max_tokens != 0 else 0
        if not 1 <= n <= self.context - wanted:
            raise UserError(
                f"The prompt has {n} tokens, and prompt and answer together may have {self.context}: shorten it."
            )
        if request.prompt.ids.min() < 0 or request.prompt.ids.max() >= vocab:
            raise UserError(f"The prompt holds token ids outside of 0 ... {vocab - 1}.")
        if request.tops is not None and not 0 <= request.tops <= device.TOPS:
            raise UserError(f"{request.tops} most likely tokens are asked for: 0 to {device.TOPS} can be.")
        if len(stop_ids(self.model, request.decoding)) > device.STOPS:
            raise UserError(f"At most {device.STOPS} stop tokens are possible.")
        check_served(request.edits, self.model.config)

    def submit(self, request: Request, listener: Callable[[Piece | Finished], None] | None = None) -> Ticket:
        """Queue a request. Raises ``UserError`` as ``check``, and ``Busy`` where too many wait."""
        self.check(request)
        ticket = Ticket(request, listener)
        with self._news:
            if self._closed:
                raise Busy("The server is shutting down.")
            if sum(map(len, self._waiting.values())) >= self.options.waiting:
                raise Busy(f"{self.options.waiting} requests are waiting already: try again later.")
            self._waiting.setdefault(request.client, collections.deque()).append(ticket)
            seconds = self.options.timeout if request.timeout is None else min(request.timeout, self.options.timeout)
            self._deadlines[ticket] = time.monotonic() + seconds
            self._counts["requests"] += 1
            self._news.notify_all()
        return ticket

    def run(self, requests: Sequence[Request]) -> list[Finished]:
        """All of them answered. Raises ``UserError`` for the first that failed."""
        tickets = [self.submit(request) for request in requests]
        return [ticket.result() for ticket in tickets]

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Wait until all programs are compiled; whether they are."""
        return self._ready.wait(timeout)

    @property
    def status(self) -> EngineStatus:
        """What it does."""
        counts = self._counts
        return EngineStatus(
            ready=self._ready.is_set(),
            compiling=self.programs.compiling,
            rows=len(self._batch.rows) + (self._joining is not None),
            width=self._batch.width,
            slots=self._batch.slots,
            waiting=sum(map(len, list(self._waiting.values()))),
            compiled=self.programs.compiled,
            **{name: counts[name] for name in ("requests", "tokens", "prompt_tokens", "cached_tokens", "steps")},
        )

    def close(self) -> None:
        """End all rows as they are, and the thread."""
        with self._news:
            self._closed = True
            self._news.notify_all()
        self._thread.join()

    # The thread

    def _run(self, warm: bool) -> None:
        try:
            if warm:
                self.programs.warm(lambda: self._closed)
            self._ready.set()
            while not self._closed:
                self._turn()
        except Exception:  # of our own making: nobody may wait for what will never come
            log.exception("the engine has ended")
        finally:
            with self._news:
                self._closed = True
                left = [ticket for own in self._waiting.values() for ticket in own]
                self._waiting.clear()
            for ticket in left:
                self._refuse(ticket, "cancelled")
            if self._joining is not None:
                self._leave(self._joining.row, "cancelled")
            for row in self._batch.rows.values():
                self._leave(row, "cancelled")

    def _turn(self) -> None:
        self._end_rows()
        ran = self._run_prompts()
        if self._batch.rows:
            self._decode()
        elif not ran:
            with self._news:
                if not self._closed and not self._waiting:
                    self._news.wait(timeout=1.0)

    def _end_rows(self) -> None:
        """Rows and requests that were cancelled, or whose time is over."""
        now = time.monotonic()
        over = {t: r for t, end in list(self._deadlines.items()) if (r := _over(t, now > end))}
        if not over:
            return
        with self._news:
            for client, own in list(self._waiting.items()):
                kept = collections.deque(ticket for ticket in own if ticket not in over)
                gone = [ticket for ticket in own if ticket in over]
                self._waiting[client] = kept
                if not kept:
                    del self._waiting[client]
                for ticket in gone:
                    self._refuse(ticket, over[ticket])
        if self._joining is not None and (reason := over.get(self._joining.row.ticket)):
            self._leave(self._joining.row, reason)
            self._joining = None
        for at, row in list(self._batch.rows.items()):
            if reason := over.get(row.ticket):
                self._batch.remove(at)
                self._leave(row, reason)

    def _next(self) -> Ticket | None:
        """The next request: clients take turns."""
        with self._news:
            if not self._waiting:
                return None
            client, own = next(iter(self._waiting.items()))
            ticket = own.popleft()
            self._waiting.pop(client)
            if own:
                self._waiting[client] = own
            return ticket

    def _run_prompts(self) -> bool:
        """Some pieces of prompts; whether there were any."""
        ran = False
        for _ in range(PIECES_PER_TURN):
            if self._joining is None:
                if len(self._batch.rows) >= self.options.rows or (ticket := self._next()) is None:
                    return ran
                self._joining = Joining(self.programs, self.prefixes, Row(self.model, ticket, self.context))
            joining, ran = self._joining, True
            try:
                ready = joining.step()
            except Exception as error:
                self._joining = None
                self._fail([joining.row], error)
                continue
            if not ready:
                continue
            self._joining = None
            self._counts["prompt_tokens"] += joining.row.prompt_tokens
            self._counts["cached_tokens"] += joining.row.cached_tokens
            if joining.row.limit <= 0:
                self._leave(joining.row, "length")
                continue
            self._batch.add(joining.row, joining.made())
        return ran

    def _decode(self) -> None:
        someone = bool(self._waiting or self._joining) and len(self._batch.rows) < self.options.rows
        steps = 1 if someone else int(np.clip(_SECONDS_PER_CALL / max(self._pace, 1e-4), 1, device.PER_CALL))
        rows, began = dict(self._batch.rows), time.perf_counter()
        try:
            self._batch.settle(steps)
            rows = dict(self._batch.rows)
            made = self._batch.advance(steps)
        except Exception as error:
            self._batch = Batch(self.programs)
            self._fail(list(rows.values()), error)
            return
        took = (time.perf_counter() - began) / max(int(made.count.max()), 1)
        self._pace = took if not self._pace else 0.7 * self._pace + 0.3 * took
        self._counts["steps"] += 1
        for at, row in rows.items():
            count = int(made.count[at])
            self._counts["tokens"] += count
            reason = row.add(jax.tree.map(lambda a, at=at, count=count: a[at][:count], (made.tokens, made.scores)),
                             bool(made.done[at]))  # fmt: skip
            if reason is not None:
                self._batch.remove(at)
                self._leave(row, reason)

    def _leave(self, row: Row, reason: Any) -> None:
        self._deadlines.pop(row.ticket, None)
        row.finish(reason)

    def _refuse(self, ticket: Ticket, reason: Any) -> None:
        self._deadlines.pop(ticket, None)
        ticket.tell(
            Finished(reason=reason, text="", tokens=(), prompt_tokens=len(ticket.request.prompt.ids), cached_tokens=0)
        )

    def _fail(self, rows: Sequence[Row], error: Exception) -> None:
        if not isinstance(error, UserError):
            log.exception("the engine failed")
        for row in rows:
            row.internal = not isinstance(error, UserError)
            row.error = f"{type(error).__name__} in the engine" if row.internal else str(error)
            self._leave(row, "error")


def _over(ticket: Ticket, late: bool) -> str:
    return "cancelled" if ticket.cancelled else "timeout" if late else ""
