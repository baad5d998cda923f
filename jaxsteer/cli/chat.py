"""``jaxsteer chat``: talk with a model in the terminal; the answer appears as it is made."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Annotated, Literal

from tyro.conf import arg

from jaxsteer.cli.steering import Steering
from jaxsteer.errors import UserError
from jaxsteer.models.sampling import Decoding
from jaxsteer.prompts.chat import Chat as Conversation

HELP = "/reset forgets the conversation, /system TEXT sets the system message, /quit (or Ctrl-D) ends"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat(Steering):
    """Talk with a model, steered by a vector file on request.

    Ctrl-C interrupts an answer; /reset, /system TEXT and /quit are commands.
    """

    model: str = "organism:llama"
    """organism:NAME (llama, qwen2, gemma3, persona), a checkpoint, a Hugging Face directory, .gguf file or hub id."""
    system: str = ""
    """System message."""
    decoding: Annotated[Decoding, arg(name="")] = Decoding()
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights."""

    def run(self) -> int:
        """Read, answer, repeat."""
        from jaxsteer.runs.bars import load

        model = load(self.model, dtype=self.dtype)
        chat = Conversation(model, system=self.system, decoding=self.decoding, edits=self.edits(model))
        print(f"{model.name}. {HELP}.")
        talk(chat, read=input, write=lambda text: print(text, end="", flush=True))
        return 0


def talk(chat: Conversation, *, read: Callable[[str], str], write: Callable[[str], None]) -> None:
    """Read, answer, repeat. ``read`` raises ``EOFError`` at the end of input."""
    while True:
        try:
            said = read("> ").strip()
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:
            write("\n")
            continue
        command, _, rest = said.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            chat.turns = []
        elif command == "/system":
            chat.system = rest.strip()
        elif command.startswith("/"):
            write(f"{HELP}.\n")
        elif said:
            _answer(chat, said, write)


def _answer(chat: Conversation, said: str, write: Callable[[str], None]) -> None:
    try:
        pieces = chat.reply(said)
    except UserError as error:
        write(f"{error}\n/reset forgets the conversation so far.\n")
        return
    with contextlib.closing(pieces):
        try:
            for piece in pieces:
                write(piece)
        except KeyboardInterrupt:
            write(" [interrupted]")
    write("\n")
