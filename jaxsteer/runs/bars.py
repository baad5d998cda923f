"""Progress of whatever takes long: one bar for every stage, alive on a terminal, a line now and then in a file."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm.auto import tqdm

from jaxsteer.checkpoints import loading
from jaxsteer.models.model import Model
from jaxsteer.processes import is_first

TICK, EVERY = 1.0, 30.0
"""Seconds between two drawings of a bar, and between two lines about progress where it cannot be drawn."""

UNKNOWN = "{desc}: {elapsed}{postfix}"
"""A bar without a total."""

Advance = Callable[..., None]
"""``advance(done, total)``: how much is done, of how much; ``None`` for a total that stays. Keywords stand behind."""


@contextlib.contextmanager
def progress_bar(what: str, total: float | None = None, *, unit: str = "it", quiet: bool = False) -> Iterator[Advance]:
    """A bar for the body, which moves it by what it is given: ``advance(done, total=None, **shown)``.

    On a terminal (and in a notebook) the bar shows the rest time, or the time so far where there is no total, and is
    drawn anew every second, so that it lives while one long program runs; it is removed at the end. Elsewhere stderr
    gets a line every 30 s, and nothing from what is faster. Of several processes the first draws.
    """
    if quiet or not is_first():
        yield lambda done, total=None, **shown: None
        return
    drawn = sys.stderr.isatty() or "ipykernel" in sys.modules
    shape: Any = {"unit": unit, "unit_scale": unit == "tok", "bar_format": None if total else UNKNOWN}
    bar = tqdm(total=total, desc=what, leave=False, disable=not drawn, **shape)
    begun, done, ended = time.monotonic(), 0.0, threading.Event()

    def advance(now: float, total: float | None = None, **shown: Any) -> None:
        nonlocal done
        done, bar.total = now, total or bar.total
        bar.bar_format = None if bar.total else UNKNOWN
        bar.update(now - bar.n)
        if shown:
            bar.set_postfix(shown, refresh=False)

    def live() -> None:
        while not ended.wait(TICK if drawn else EVERY):
            if drawn:
                bar.refresh()
            else:
                print(line(what, done, bar.total, time.monotonic() - begun), file=sys.stderr, flush=True)

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    try:
        yield advance
    finally:
        ended.set()
        thread.join()
        bar.close()


def behind(advance: Advance, before: float, done: float, total: float) -> None:
    """Move the bar of several parts by what is done of one, which has ``before`` ahead of it."""
    advance(before + done)


def line(what: str, done: float, total: float | None, seconds: float) -> str:
    """Progress as a line of a log."""
    spent = tqdm.format_interval(seconds)
    if not total:
        return f"{what}: {spent}"
    rest = f", about {tqdm.format_interval(seconds * (total - done) / done)} to go" if done else ""
    return f"{what}: {done:.0f} of {total:.0f} ({done / total:.0%}) in {spent}{rest}"


def say(message: str, file: Any = None) -> None:
    """Print a line above whatever bar is drawn (to stdout, or to ``file``)."""
    tqdm.write(message, file=file)


def load(model: str, *, quiet: bool = False, **how: Any) -> Model:
    """``jaxsteer.load`` with a bar: converting on first use and reading the weights can take minutes."""
    with progress_bar(f"loading {model}", quiet=quiet):
        return loading.load(model, **how)
