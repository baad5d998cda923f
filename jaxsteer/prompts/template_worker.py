"""A program, not a module: renders chat templates, one a line, in a process whose time and memory are limited.

It is run by ``jaxsteer.prompts.templates``. Templates come from anywhere and may loop for ever or build texts of any
size. Here that ends this process only. Rendering is that of transformers, but for the date.
"""

from __future__ import annotations

import datetime
import json
import os
import resource
import signal
import sys

from transformers.utils import chat_template_utils

SECONDS = 2
"""Of the processor, for one text."""
BYTES = 2 << 30
CHARACTERS = 1 << 24


class _Date(datetime.datetime):
    """Today is always the default date of Llama 3's templates, so that results do not change overnight."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> _Date:
        """The same on any day."""
        return cls(2024, 7, 26, tzinfo=tz)


def _answer(asked: dict) -> dict:
    try:
        turns, template = asked["turns"], asked["template"]
        text = chat_template_utils.render_jinja_template([turns], chat_template=template, **asked["values"])[0][0]
        text.encode()  # a template may write half a character
        return {"text": text} if len(text) <= CHARACTERS else {"error": f"it writes {len(text)} characters"}
    except MemoryError:
        os._exit(1)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:500]}"}


def main() -> None:
    """Answer lines of stdin on stdout until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    chat_template_utils.datetime = _Date  # type: ignore[misc]
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process, also within one operation
        answer = json.dumps(_answer(json.loads(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(answer, flush=True)


if __name__ == "__main__":
    main()
