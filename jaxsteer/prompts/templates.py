"""Chat turns as text, by the template that came with a tokenizer.

A template is a program of somebody else. It runs in a process of its own with limits on time and memory
(``template_worker``), can reach nothing but the turns, and whatever goes wrong in it is one ``UserError``.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from jaxsteer.errors import UserError
from jaxsteer.files import check_surrogates

Message = dict[str, str]
TEMPLATE_DATE = "26 Jul 2024"
"""What templates print as today's date, as in ``template_worker``."""


class _TemplateFault(Exception):
    """What a template says about the turns that it cannot write."""


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template; of several with names, the one called "default". Raises ``UserError`` if there is none."""
    if not tokenizer.chat_template:
        raise UserError("this tokenizer has no chat template: use style 'plain', or add chat_template.jinja")
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise UserError(f"no chat template of this tokenizer is called 'default': {error}") from None


def apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generation_prompt: bool = True
) -> str:
    """Chat turns as text, generation prompt included. Raises ``UserError`` without a template or for bad turns.

    A system message that the template refuses, or drops in silence, is put before the first user turn. Contents are
    given as lists of parts to a template that drops texts.
    """
    check_surrogates([message["content"] for message in messages], "what is asked")
    template = template_of(tokenizer)
    values = {
        **tokenizer.special_tokens_map,
        "add_generation_prompt": generation_prompt,
        "date_string": TEMPLATE_DATE,
        "enable_thinking": False,
    }

    def write(turns: Sequence[Message], in_parts: bool) -> str:
        given: list[dict[str, Any]] = [
            {**m, "content": [{"type": "text", "text": m["content"]}]} if in_parts else dict(m) for m in turns
        ]
        return _WORKER.render(template, given, values)

    def drops(turns: Sequence[Message], in_parts: bool, text: str) -> bool:
        """Whether something that system or user say makes no difference to the text."""
        for i, message in enumerate(turns):
            content = message["content"].strip()
            if message["role"] == "assistant" or content in text:
                continue
            other = {**message, "content": ("Z" if content.startswith("Q") else "Q") * len(content)}
            try:
                if write([*turns[:i], other, *turns[i + 1 :]], in_parts) == text:
                    return True
            except _TemplateFault:
                continue
        return False

    turns = [dict(m) for m in messages]
    forms = [turns, _fold_system(turns)] if any(m["role"] == "system" for m in turns) else [turns]
    why = ""
    for form in forms:
        for in_parts in (False, True):
            try:
                text = write(form, in_parts)
            except _TemplateFault as fault:
                why = why if in_parts else str(fault)
                break
            if not drops(form, in_parts, text):
                return text
            why = "it leaves out what the messages say"
    also = ", also without system role" if len(forms) > 1 else ""
    raise UserError(f"the chat template refuses these turns{also}: {why}")


def _fold_system(messages: list[Message]) -> list[Message]:
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    rest = [dict(m) for m in messages if m["role"] != "system"]
    if rest and rest[0]["role"] == "user":
        rest[0]["content"] = f"{system}\n\n{rest[0]['content']}"
        return rest
    return [{"role": "user", "content": system}, *rest]


class _Worker:
    """The process that renders: started when it is first needed, and again after it was ended by its limits."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        atexit.register(self._end)

    def render(self, template: str, turns: Sequence[dict[str, Any]], values: dict[str, Any]) -> str:
        """The text. Raises ``_TemplateFault`` for what the template raises, and ``UserError`` beyond the limits."""
        asked = json.dumps({"template": template, "turns": turns, "values": values})
        with self._lock:
            process = self._process or self._start()
            try:
                process.stdin.write(f"{asked}\n")  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
                line = process.stdout.readline()  # type: ignore[union-attr]
            except BaseException as error:  # also Ctrl-C: what is still to come answers no other question
                process.kill()
                self._end()
                if not isinstance(error, OSError):
                    raise
                line = ""
            if not line:
                self._end()
                raise UserError(
                    "the chat template takes too long, or too much memory, to write these turns: a text may take 2 "
                    "seconds of the processor and 2 GiB. Look for loops in chat_template.jinja, or use style 'plain'"
                )
        answer = json.loads(line)
        if "error" in answer:
            raise _TemplateFault(answer["error"].removeprefix("TemplateError: "))
        return str(answer["text"])

    def _start(self) -> subprocess.Popen[str]:
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("template_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env={**os.environ, **quiet},
        )
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            try:
                process.communicate(timeout=5)
            except (OSError, ValueError, subprocess.TimeoutExpired):
                process.kill()
                process.wait()


_WORKER = _Worker()
