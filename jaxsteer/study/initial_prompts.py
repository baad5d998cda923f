"""What a search is given as texts: where it begins (a phrase, the prompts of an earlier run), what it may use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from jaxsteer.errors import UserError
from jaxsteer.files import read_json_lines, read_text
from jaxsteer.files.paths import named_file
from jaxsteer.prompts import PAD, Conversation, build_slots, encode
from jaxsteer.runs import files


def first_prompts(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    *,
    phrase: str | None,
    run: Path | None,
    lengths: tuple[int, int] | None,
) -> Int[np.ndarray, "n S"] | None:
    """Ids of the prompts to begin with, best first; ``None`` for a random start. S is their own length, or the most
    that they may have: shorter ones begin with ``PAD`` then.

    ``run`` is the directory of an earlier search: its prompts are taken as texts, so that another model or slot may go
    on with them. Raises ``UserError`` for both at once, for a text that is no slot's content in some conversation, and
    when no prompt has as many tokens as ``lengths`` asks for (from and to).
    """
    if phrase is None and run is None:
        return None
    if phrase is not None and run is not None:
        raise UserError("--init and --init-from both say where to begin: give one of them")
    texts, asked = ([phrase], "--init") if phrase is not None else (texts_of(Path(run or "")), f"--init-from {run}")
    found = [ids for ids in (phrase_ids(tokenizer, conversations, text) for text in texts) if ids is not None]
    if not found:
        raise UserError(
            f"{asked}: {texts[0]!r} cannot stand in the slot: its tokens merge with the text around it, or differ "
            "from one conversation to the other. Begin and end it with whole words"
        )
    longest = max(len(ids) for ids in found)
    least, most = lengths or (longest, longest)
    fitting = [np.pad(ids, (most - len(ids), 0), constant_values=PAD) for ids in found if least <= len(ids) <= most]
    if not fitting:
        asked_for = least if least == most else f"{least}:{most}"
        raise UserError(
            f"{asked}: {texts[0]!r} has {len(found[0])} tokens, but --prompt-length is {asked_for}: leave that out"
        )
    return np.stack(fitting)


def phrase_ids(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], phrase: str
) -> Int[np.ndarray, " S"] | None:
    """The ids of a phrase in the slot, if they are the same in all conversations and leave what is around alone."""
    if not phrase.strip():
        return None
    slots = build_slots(tokenizer, conversations, 1)
    found: list[np.ndarray] = []
    for conversation, before, closing in zip(conversations, slots.before, slots.closing, strict=True):
        ids = encode(tokenizer, conversation, phrase)
        end = len(ids) - len(closing)
        same = np.array_equal(ids[: len(before)], before) and np.array_equal(ids[end:], closing)
        if not same or end <= len(before) or (found and not np.array_equal(ids[len(before) : end], found[0])):
            return None
        found.append(ids[len(before) : end])
    return found[0].astype(np.int32)


def spread(prompts: Int[np.ndarray, "n S"], population: int) -> Int[np.ndarray, "P S"]:
    """One prompt per slot: the best first, as slot 0 weighs the objective most, and the others in their order."""
    return prompts[np.linspace(0, len(prompts) - 1, population).round().astype(int)]


def listed_texts(allow: Sequence[str]) -> list[str]:
    """What ``--allow`` lists: its texts, and of files the lines."""
    texts = []
    for entry in allow:
        path = named_file(entry)
        texts += [entry] if path is None else read_text(path).split("\n")
    found = list(dict.fromkeys(text for text in texts if text.strip()))
    if allow and not found:
        raise UserError(f"--allow {' '.join(allow)} lists no text")
    return found


def texts_of(run: Path) -> list[str]:
    """The prompts that an earlier search found, best objective first."""
    path = run / files.PARETO
    try:
        rows = [row for _, row in read_json_lines(path)]
        texts = [str(row["text"]) for row in rows if row["retokenises"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--init-from {run}: {path} is not the result of a search ({error})") from error
    if not texts:
        raise UserError(f"--init-from {run}: that search found no prompt whose text re-tokenises")
    return texts
