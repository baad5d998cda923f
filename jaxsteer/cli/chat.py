"""``jaxsteer chat``: talk with a model in the terminal; the answer appears as it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from jaxsteer.cli.generate import Decoding
from jaxsteer.cli.steering import Steering
from jaxsteer.errors import UserError

HELP = "/reset forgets the conversation, /system TEXT sets the system message, /quit (or Ctrl-D) ends"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat(Decoding, Steering):
    """Talk with a model, steered by a vector file on request.

    Ctrl-C interrupts an answer; /reset, /system TEXT and /quit are commands.
    """

    model: str = "organism:llama"
    """organism:NAME (llama, qwen2 or gemma3), a converted checkpoint, a Hugging Face directory, or a hub id."""
    system: str = ""
    """System message."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights."""

    def run(self) -> int:
        """Read, answer, repeat."""
        from jaxsteer.checkpoints.loading import load

        model = load(self.model, dtype=self.dtype)
        settings = self.settings() | {"edits": self.edits(model)}
        print(f"{model.name}. {HELP}.")
        talk(model, self.system, settings, read=input, write=lambda text: print(text, end="", flush=True))
        return 0


def talk(
    model: Any, system: str, settings: dict[str, Any], *, read: Callable[[str], str], write: Callable[[str], None]
) -> list[dict[str, str]]:
    """The conversation until its end; returns its turns. ``read`` raises ``EOFError`` at the end of input."""
    turns: list[dict[str, str]] = []
    for answer in range(1 << 30):
        try:
            said = read("> ").strip()
        except EOFError:
            write("\n")
            return turns
        except KeyboardInterrupt:
            write("\n")
            continue
        command, _, rest = said.partition(" ")
        if command == "/quit":
            return turns
        if command == "/reset":
            turns = []
        elif command == "/system":
            system = rest.strip()
        elif command.startswith("/"):
            write(f"{HELP}.\n")
        elif said:
            turns = _answer(model, system, turns, said, settings | {"seed": settings["seed"] + answer}, write)
    return turns


def _answer(
    model: Any,
    system: str,
    turns: list[dict[str, str]],
    said: str,
    settings: dict[str, Any],
    write: Callable[[str], None],
) -> list[dict[str, str]]:
    """The turns with what was said and what was answered; without both where the model could not answer."""
    from jaxsteer.prompts.generate import stream

    asked = [*turns, {"role": "user", "content": said}]
    head = [{"role": "system", "content": system}] if system else []
    pieces: list[str] = []
    try:
        for piece in stream(model, [*head, *asked], **settings):
            piece = piece if pieces else piece.lstrip()
            pieces.append(piece)
            write(piece)
    except KeyboardInterrupt:
        write(" [interrupted]")
    except UserError as error:
        write(f"{error}\n/reset forgets the conversation so far.\n")
        return turns
    write("\n")
    return [*asked, {"role": "assistant", "content": "".join(pieces).strip()}]
