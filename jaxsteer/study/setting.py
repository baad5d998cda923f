"""Validated inputs of a search: conversations with an open slot, and what a prompt in it may be."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.objectives import Objective, needs
from jaxsteer.personas import Item, Persona, Splits, search_conversations, split
from jaxsteer.prompts import (
    Conversation,
    Placement,
    Slots,
    allowed_tokens,
    build_slots,
    encode_texts,
    first_allowed,
    listed_tokens,
    question_conversation,
    render,
    with_first_tokens,
)
from jaxsteer.sae import SAE, check_sae
from jaxsteer.study.initial_prompts import first_prompts, listed_texts
from jaxsteer.study.named_objectives import NamedObjective
from jaxsteer.study.options import ContextOptions, PromptOptions, ScoringOptions
from jaxsteer.study.probe import blocks_before


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Where prompts are searched: contexts that nothing speaks against, and the prompts that are possible."""

    model: Model
    persona: Persona | None = None
    """Whose questions the contexts ask; ``None`` for conversations of the user's own."""
    placement: Placement
    read_position: str
    scoring: ScoringOptions
    slots: Slots
    least: int
    """The fewest tokens of a prompt; ``slots`` have room for the most."""
    allowed: Bool[np.ndarray, " V"]
    banned: tuple[str, ...]
    """Texts that no prompt may hold."""
    start: Int[np.ndarray, "n S"] | None
    """Prompts to begin with, best first; without them a search begins at random."""
    named: NamedObjective | None

    def named_in(self, slots: Slots) -> tuple[Objective, Slots]:
        """The objective that was asked for by name, for these slots, and the slots with the target that it reads."""
        assert self.named is not None
        return self.named.in_contexts(self.model, self.persona, slots, placement=self.placement)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PersonaSetting(Setting):
    """A setting whose contexts are a persona's questions."""

    persona: Persona
    splits: Splits
    sae: SAE | None


def prepare(
    contexts: ContextOptions,
    scoring: ScoringOptions,
    prompt: PromptOptions,
    model: Model,
    persona: Persona,
    named: NamedObjective | None = None,
    sae: SAE | None = None,
) -> PersonaSetting:
    """Check everything that can be checked without running the model, and ask train questions of the persona.

    Raises ``UserError`` for a model without tokenizer, an SAE off the residual stream, texts longer than the model's
    positions, an objective that does not fit, a token filter that leaves nothing, and datasets too small to split.
    """
    if sae is not None:
        check_sae(sae, model)
        blocks_before(str(sae.config.site_in), model.config.n_layers)
    splits = split(persona, seed=contexts.split_seed)
    chosen = context_items(splits.train, scoring.contexts or 1)
    asked = search_conversations(chosen, contexts.read_position, placement=contexts.placement)
    setting = open_slots(contexts, scoring, prompt, model, asked, named, persona)
    _check_lengths(setting, persona)
    return PersonaSetting(**{**vars(setting), "persona": persona}, splits=splits, sae=sae)


def open_slots(
    contexts: ContextOptions,
    scoring: ScoringOptions,
    prompt: PromptOptions,
    model: Model,
    conversations: Sequence[tuple[Conversation, str]],
    named: NamedObjective | None,
    persona: Persona | None = None,
) -> Setting:
    """The setting of a search in these conversations, each with where it is read. Raises ``UserError`` as ``prepare``
    does."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise UserError(f"model {model.name} has no tokenizer.json: a search needs the tokenizer beside the weights")
    texts = [conversation for conversation, _ in conversations]
    start = first_prompts(tokenizer, texts, phrase=prompt.init, run=prompt.init_from, lengths=prompt.lengths)
    lengths = prompt.lengths if start is None else prompt.lengths or (start.shape[1],) * 2
    assert lengths is not None, "the options were resolved"
    slots = build_slots(
        tokenizer,
        texts,
        lengths[1],
        read=[read for _, read in conversations],
        max_positions=model.config.max_positions,
    )
    if named is not None:
        objective, slots = named.in_contexts(model, persona, slots, placement=contexts.placement)
        needs(objective, model.config)
    allowed = token_mask(model, prompt.tokens or "words", prompt.ban, listed_texts(prompt.allow))
    allowed = allowed if prompt.allow else with_first_tokens(tokenizer, slots, allowed)
    first = first_allowed(tokenizer, slots, allowed).sum()
    if prompt.allow and first < 2:
        raise UserError(
            f"of what --allow lists, fewer than 2 tokens can stand first in the slot {contexts.slot!r}, where a token "
            "brings the space before the prompt, or must not where the chat template takes it away: list more"
        )
    if not first:
        raise UserError(
            f"no token of the filter --tokens {prompt.tokens} can stand first in the slot {contexts.slot!r}: the "
            "chat template or the tokenizer takes the space before the prompt away, and all allowed tokens begin with "
            "one. Use --tokens ascii"
        )
    return Setting(
        model=model,
        persona=persona,
        placement=contexts.placement,
        read_position=contexts.read_position,
        scoring=scoring,
        slots=slots,
        least=lengths[0],
        allowed=allowed,
        banned=prompt.ban,
        start=start,
        named=named,
    )


def token_mask(
    model: Model, tokens: str, banned: Sequence[str] = (), listed: Sequence[str] = ()
) -> Bool[np.ndarray, " V"]:
    """The tokens a prompt may use: "words" after a space, printable "ascii", or "all" that print, or instead those that
    are ``listed``; none with a banned text in it."""
    mask = allowed_tokens(
        model.tokenizer,
        model.config.vocab_size,
        ascii_only=tokens != "all" and not listed,
        word_initial=tokens == "words" and not listed,
        banned=banned,
    )
    return listed_tokens(model.tokenizer, mask, listed) if listed else mask


def context_items(items: Sequence[Item], n: int) -> tuple[Item, ...]:
    """``n`` questions spread over ``items``, at most one per group while there are groups enough."""
    unique = list({item.group: item for item in items}.values())
    step = max(1, len(unique) // n)
    return tuple(unique[::step][:n])


def _check_lengths(setting: Setting, persona: Persona) -> None:
    model, most = setting.model, setting.slots.length
    texts = []
    for item in persona.items:
        asked = render(model.tokenizer, question_conversation(item.asked, setting.placement), "")
        texts.append(f"{asked} {item.matching}")
    lengths = [len(ids) + most for ids in encode_texts(model.tokenizer, texts, style=setting.placement.style)]
    worst = int(np.argmax(lengths))
    if lengths[worst] > model.config.max_positions:
        item = persona.items[worst]
        raise UserError(
            f"question {item.id} needs {lengths[worst]} tokens with its answer and a prompt of {most} "
            f"tokens, but {model.name} has {model.config.max_positions} positions: leave out the long questions "
            f"({sum(n > model.config.max_positions for n in lengths)} of {len(lengths)}) or shorten the prompt"
        )
