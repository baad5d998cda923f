"""``jaxsteer chat``: talk with a model in the terminal; the answer appears as it is made."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from jaxsteer.cli.steering import Steering
from jaxsteer.engine.chat import Chat as Conversation
from jaxsteer.errors import UserError
from jaxsteer.models.sampling import Decoding

if TYPE_CHECKING:
    from jaxsteer.steer import Edits

HELP = (
    "/reset forgets the conversation, /system TEXT sets the system message, /retry answers the last message again, "
    "/quit (or Ctrl-D) ends"
)
STRENGTH = "/strength X steers with X times the vectors from now on, /strength 0 leaves the model as it is"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat(Steering):
    """Talk with a model, steered by a vector file on request.

    Ctrl-C interrupts an answer; /reset, /system TEXT, /retry, /strength X and /quit are commands; the arrow keys edit a
    line and bring back earlier ones.
    """

    model: str = "organism:llama"
    """organism:NAME (llama, qwen2, gemma3, persona), a checkpoint, a Hugging Face directory, .gguf file or hub id."""
    system: str = ""
    """System message."""
    decoding: Annotated[Decoding, arg(name="")] = Decoding()
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights."""
    delta: Path | None = None
    """Change of the weights to load them with (delta.safetensors of `jaxsteer rewrite run`)."""

    def run(self) -> int:
        """Read, answer, repeat."""
        from jaxsteer.runs.bars import load

        with contextlib.suppress(ImportError):  # input() edits lines where this is there
            import readline  # noqa: F401

        model = load(self.model, dtype=self.dtype, delta=self.delta)
        vectors = self.vectors(model)
        chat = Conversation(model, system=self.system, decoding=self.decoding, edits=self.edits_of(vectors))
        print(f"{model.name}. {HELP}.")
        if vectors is None:
            talk(chat, read=input, write=lambda text: print(text, end="", flush=True))
            return 0
        amount = vectors.coefficient if self.coefficient is None else self.coefficient
        print(f"Steered by {self.steer} with {amount:g} {_UNITS[vectors.coefficient_units]}. {STRENGTH}.")

        def at(strength: float) -> Edits | None:
            return vectors.edits(coefficient=strength, positions=self.positions) if strength else None

        talk(chat, read=input, write=lambda text: print(text, end="", flush=True), at=at)
        return 0


_UNITS = {"vector": "times the vectors", "mean_resid_norm": "mean norms of the stream"}


def talk(
    chat: Conversation,
    *,
    read: Callable[[str], str],
    write: Callable[[str], None],
    at: Callable[[float], Edits | None] | None = None,
) -> None:
    """Read, answer, repeat. ``read`` raises ``EOFError`` at the end of input; ``at`` makes the edits of a strength."""
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
        elif command == "/strength" and at is not None:
            _set_strength(chat, rest, at, write)
        elif command == "/retry" and chat.turns:
            *chat.turns, asked, _ = chat.turns
            _answer(chat, asked["content"], write)
        elif command.startswith("/"):
            write(f"{HELP}.\n" if at is None else f"{HELP}. {STRENGTH}.\n")
        elif said:
            _answer(chat, said, write)


def _set_strength(
    chat: Conversation, text: str, at: Callable[[float], Edits | None], write: Callable[[str], None]
) -> None:
    try:
        chat.edits = at(float(text))
    except (ValueError, UserError) as error:
        write(f"{error if isinstance(error, UserError) else f'{text!r} is no number'}. {STRENGTH}.\n")


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
        except UserError as error:
            write(str(error))
    write("\n")
