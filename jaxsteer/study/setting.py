"""What a run works with, once everything that can be refused has been refused."""

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
)
from jaxsteer.sae import SAE, check_sae
from jaxsteer.study.initial_prompts import first_prompts, listed_texts
from jaxsteer.study.named_objectives import Custom
from jaxsteer.study.options import SearchOptions
from jaxsteer.study.probe import blocks_before


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What a run works with once everything has been checked."""

    options: SearchOptions
    model: Model
    persona: Persona
    splits: Splits
    slots: Slots
    allowed: Bool[np.ndarray, " V"]
    custom: Custom | None
    sae: SAE | None = None
    start: Int[np.ndarray, "n S"] | None = None
    """Prompts to begin with, best first; without them a search begins at random."""

    @property
    def placement(self) -> Placement:
        """How questions are asked, and where the prompt stands."""
        return Placement(style=self.options.style, slot=self.options.slot)

    def placed(self, slots: Slots) -> tuple[Objective, Slots]:
        """The objective that was asked for by name, for these slots, and the slots with the target that it reads."""
        assert self.custom is not None
        return self.custom.place(self.model, self.persona, slots, placement=self.placement)


def prepare(
    options: SearchOptions,
    model: Model,
    persona: Persona,
    custom: Custom | None = None,
    sae: SAE | None = None,
) -> Setting:
    """Check everything that can be checked without running the model, and build the contexts of the search.

    Raises ``UserError`` for a model without tokenizer, a site beyond the last layer or off the residual stream, texts
    longer than the model's positions, an objective that does not fit, a token filter that leaves nothing, and datasets
    too small to split.
    """
    if model.tokenizer is None:
        raise UserError(f"model {model.name} has no tokenizer.json: a search needs the tokenizer beside the weights")
    if options.site != "auto" and custom is None:
        blocks_before(options.site, model.config.n_layers)
    if sae is not None:
        check_sae(sae, model)
        blocks_before(str(sae.config.site_in), model.config.n_layers)
    splits = split(persona, seed=options.split_seed)
    placement = Placement(style=options.style, slot=options.slot)
    chosen = context_items(splits.train, options.contexts or 1)
    asked = search_conversations(chosen, options.read_position, placement=placement)
    setting = locate(options, model, persona, splits, asked, custom, sae)
    _check_lengths(setting.options, model, persona)
    return setting


def locate(
    options: SearchOptions,
    model: Model,
    persona: Persona,
    splits: Splits,
    conversations: Sequence[tuple[Conversation, str]],
    custom: Custom | None,
    sae: SAE | None = None,
) -> Setting:
    """The setting of a search in these conversations, each with where it is read. Raises ``UserError`` as ``prepare``
    does."""
    texts = [conversation for conversation, _ in conversations]
    start = first_prompts(model.tokenizer, texts, phrase=options.init, run=options.init_from, lengths=options.lengths)
    if start is not None and options.lengths is None:
        options = dataclasses.replace(options, prompt_length=start.shape[1])
    assert options.lengths is not None
    slots = build_slots(
        model.tokenizer,
        texts,
        options.lengths[1],
        read=[read for _, read in conversations],
        max_positions=model.config.max_positions,
    )
    if custom is not None:
        objective, slots = custom.place(
            model, persona, slots, placement=Placement(style=options.style, slot=options.slot)
        )
        needs(objective, model.config)
    allowed = token_mask(model, options.tokens or "words", options.ban, listed_texts(options.allow))
    if options.allow and first_allowed(model.tokenizer, slots, allowed).sum() < 2:
        raise UserError(
            f"of what --allow lists, fewer than 2 tokens can stand first in the slot {options.slot!r}, where a token "
            "brings the space before the prompt, or must not where the chat template takes it away: list more"
        )
    if not first_allowed(model.tokenizer, slots, allowed).any():
        raise UserError(
            f"no token of the filter --tokens {options.tokens} can stand first in the slot {options.slot!r}: this chat "
            "template takes the space before the prompt away, and all allowed tokens begin with one. Use --tokens ascii"
        )
    return Setting(
        options=options,
        model=model,
        persona=persona,
        splits=splits,
        slots=slots,
        allowed=allowed,
        custom=custom,
        sae=sae,
        start=start,
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


def _check_lengths(options: SearchOptions, model: Model, persona: Persona) -> None:
    placement = Placement(style=options.style, slot=options.slot)
    texts = []
    for item in persona.items:
        asked = render(model.tokenizer, question_conversation(item.question, placement), "")
        texts.append(f"{asked} {item.matching}")
    most = options.lengths[1] if options.lengths else 0
    lengths = [len(ids) + most for ids in encode_texts(model.tokenizer, texts)]
    worst = int(np.argmax(lengths))
    if lengths[worst] > model.config.max_positions:
        item = persona.items[worst]
        raise UserError(
            f"question {item.id} needs {lengths[worst]} tokens with its answer and a prompt of {most} "
            f"tokens, but {model.name} has {model.config.max_positions} positions: leave out the long questions "
            f"({sum(n > model.config.max_positions for n in lengths)} of {len(lengths)}) or shorten the prompt"
        )
