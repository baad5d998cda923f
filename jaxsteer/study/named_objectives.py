"""Objectives by name: what ``--objective`` and ``--target`` mean, from text to a pytree and contexts that serve it."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from jaxsteer.errors import UserError
from jaxsteer.files.paths import user_path
from jaxsteer.lens.features import find_feature
from jaxsteer.models.model import Model
from jaxsteer.objectives import Attention, ByContext, LogitDifference, Neuron, Objective, Projection, TargetLogProb
from jaxsteer.objectives.reads import KEYS
from jaxsteer.personas import Item, Persona
from jaxsteer.personas.items import mostly_replies
from jaxsteer.personas.pairs import both_orders
from jaxsteer.prompts import Conversation, Placement, Slots, question_conversation, with_target
from jaxsteer.sae import load_sae
from jaxsteer.sae.loading import check_sae
from jaxsteer.sae.objective import Latents, latents_objective
from jaxsteer.study.free_replies import neutral_replies

FORMS = (
    "file.py:function",
    "target",
    "target-mean",
    "answer",
    "answer-diff",
    "logit-diff:TEXT|TEXT",
    "neuron:SITE[INDEX]",
    "attention:SITE[HEAD]:TO",
    "feature:NAME",
    "latent:SAE[INDEX]",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contexts:
    """The contexts that an objective is made for."""

    model: Model
    slots: Slots
    answers: Sequence[tuple[str, str]]
    """Of every context, the answer that is wanted of its item, and the other; empty where the contexts are of no
    persona."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedObjective:
    """An objective that was asked for by name, still to be made for contexts (``in_contexts``)."""

    name: str
    make: Callable[[Contexts], Objective]
    target: str | None = None
    """Text of the answer whose probability is read."""
    own_answer: bool = False
    """Whether instead it is, in every context, the answer that is wanted of the item."""
    of_persona: bool = False
    """Whether it is made of the answers of a persona's items."""
    relative: bool = False
    """Whether it is what the answer gains beyond a neutral reply in its place: every context counts twice then."""

    def in_contexts(
        self, model: Model, persona: Persona | None, slots: Slots, *, placement: Placement = Placement()
    ) -> tuple[Objective, Slots]:
        """The objective for the contexts of ``slots``, and these slots with the target answer that it reads.

        Raises ``UserError`` when the objective does not fit the contexts or the model.
        """
        if self.relative:
            slots = _twice(slots)
            if persona is None or not mostly_replies(persona.items):
                raise UserError(
                    "--relative compares replies in words, and this persona's answers are none: leave it out"
                )
        given = [] if persona is None else [persona.answers(item) for item in _items(persona, slots, placement)]
        contexts = Contexts(model=model, slots=slots, answers=given)
        objective = self.make(contexts)
        answers = [wanted for wanted, _ in given] if self.own_answer else self.target
        if self.relative:
            half, neutral = len(slots) // 2, neutral_replies(model)
            answers = [*(answers or ())[:half], *(neutral[i % len(neutral)] for i in range(half))]
        if answers is not None:
            slots = with_target(model.tokenizer, slots, answers, max_positions=model.config.max_positions)
        return objective, slots


def named_objective(
    objective: str | None, target: str | None = None, *, relative: bool = False
) -> NamedObjective | None:
    """What ``--objective``, ``--target`` and ``--relative`` ask for, or ``None`` where nothing is given.

    =========================  ================================================================================
    ``file.py:function``       a function of the reads, or any objective, from a file that is run as Python code
    ``target``                 log-probability of the text ``--target`` as the answer (the default with --target)
    ``target-mean``            the same per token
    ``answer``                 log-probability of every question's wanted answer: that which does not show the
                               persona, or to elicit it, that which does; ``relative``: of replies, what it has
                               per token beyond a neutral reply in its place
    ``answer-diff``            logit of that answer's first token minus that of the persona's
    ``logit-diff:yes|no``      logit of one text's first token minus the other's
    ``neuron:SITE[17]``        one entry of a site, e.g. ``blocks.2.mlp.hook_post[17]``
    ``attention:SITE[3]:TO``   what a head of ``blocks.1.attn.hook_pattern`` gives to "first", "before", "prompt"
                               (the default) or "tail"
    ``feature:a3.h5: Paris``   a feature by its name (``lens.find_feature``): a neuron, what a head adds to a token, a
                               vector of a file
    ``latent:SAE[17]``         one latent of an SAE (a folder, a file, a hub id)
    =========================  ================================================================================

    Raises ``UserError`` for anything else, and for files that do not give a function.
    """
    if relative and objective != "answer":
        raise UserError("--relative belongs to --objective answer: the wanted reply beside a neutral one in its place")
    if objective is None and target is None:
        return None
    text = objective or "target"
    kind, _, rest = text.partition(":")
    if kind in ("target", "target-mean") and not rest:
        if target is None:
            raise UserError(f"--objective {kind} needs the answer's text: add --target TEXT")
        return _named(text, lambda _: TargetLogProb(per_token=kind == "target-mean"), target)
    if kind in ("answer", "answer-diff") and not rest:
        if target is not None:
            raise UserError(f"--objective {kind} takes every question's own answer: leave out --target")
        if kind == "answer":
            name = "custom: answer" + " (relative)" * relative
            made = _beyond if relative else lambda _: TargetLogProb()
            return NamedObjective(name=name, make=made, own_answer=True, of_persona=True, relative=relative)
        return dataclasses.replace(_named(text, _answer_difference), of_persona=True)
    if kind == "logit-diff" and rest.count("|") == 1:
        plus, minus = rest.split("|")
        return _named(text, lambda c: _difference(c, plus, minus), target)
    if kind in ("neuron", "attention") and (match := re.fullmatch(r"(.+)\[(\d+)\](?::(\w+))?", rest)):
        site, index, to = match.group(1), jnp.int32(match.group(2)), match.group(3)
        if kind == "neuron" and to is None:
            return _named(text, lambda _: Neuron(index=index, site=site), target)
        if kind == "attention" and (to is None or to in KEYS):
            return _named(text, lambda _: Attention(head=index, site=site, to=to or "prompt"), target)  # type: ignore[arg-type]
    if kind == "feature" and rest:
        return _named(text, lambda c: _feature(c, rest), target)
    if kind == "latent" and (match := re.fullmatch(r"(.+)\[(\d+)\]", rest)):
        path, number = match.group(1), int(match.group(2))
        return _named(text, lambda c: _latent(c, path, number), target)
    if ".py" not in text:
        raise UserError(f"--objective {text!r} is none of: {', '.join(FORMS)} (TO is one of {', '.join(KEYS)})")
    found = load_objective(text)
    return _named(text.rpartition(":")[2], lambda _: found, target)


def _named(name: str, make: Callable[[Contexts], Objective], target: str | None = None) -> NamedObjective:
    return NamedObjective(name=f"custom: {name}", make=make, target=target)


def _feature(contexts: Contexts, name: str) -> Projection:
    feature = find_feature(contexts.model, name)
    return Projection(delta=jnp.asarray(feature.reads), site=feature.site)


def _latent(contexts: Contexts, path: str, number: int) -> Latents:
    sae = load_sae(path, mesh=contexts.model.mesh)
    check_sae(sae, contexts.model, None)
    if number >= sae.n_latents:
        raise UserError(f"latent {number}: {path} has the latents 0 to {sae.n_latents - 1}")
    index, weight = np.asarray([number]), np.ones(1, np.float32)  # off, it has the gradient of its pre-activation
    return latents_objective(sae, index, weight, str(sae.config.site_in), surrogate="preact")


def _beyond(contexts: Contexts) -> ByContext:
    """The log-probability per token of every answer minus that of the neutral reply in the second half of contexts."""
    half = len(contexts.slots) // 2
    return ByContext(objective=TargetLogProb(per_token=True), weights=jnp.repeat(jnp.asarray([2.0, -2.0]), half))


def _twice(slots: Slots) -> Slots:
    """Every context and then every one again, where that is not done."""
    half = len(slots) // 2
    if slots.target and slots.conversations[:half] == slots.conversations[half:]:
        return slots
    names = ("before", "after", "closing", "conversations", "surroundings")
    return dataclasses.replace(
        slots, **{name: 2 * getattr(slots, name) for name in names}, read_index=np.tile(slots.read_index, 2), checked={}
    )


def _answer_difference(contexts: Contexts) -> LogitDifference:
    """Of every context's item, the answer that is wanted minus the other."""
    wanted, other = zip(*contexts.answers, strict=True)
    return _difference(contexts, wanted, other)


def _difference(contexts: Contexts, plus: str | Sequence[str], minus: str | Sequence[str]) -> LogitDifference:
    """Of two answers in place, the logits of the first tokens: the read position must be right before them."""
    slots, tokenizer = contexts.slots, contexts.model.tokenizer
    ends = np.asarray([slots.length - 1 + len(closing) for closing in slots.closing])
    if (ends != slots.read_index).any():
        raise UserError(
            "a logit difference is read where the answer begins, but the read position is elsewhere: use "
            "--read-position decision"
        )
    first = [
        np.asarray([int(ids[0]) for ids in with_target(tokenizer, slots, answers).target]) for answers in (plus, minus)
    ]
    if (first[0] == first[1]).any():
        same = int(np.flatnonzero(first[0] == first[1])[0])
        raise UserError(
            f"both answers begin with the token {tokenizer.decode([int(first[0][same])])!r}, so that their first "
            "logits do not differ: use --read-position decision, or answers that differ at once"
        )
    return LogitDifference(plus=jnp.asarray(first[0], jnp.int32), minus=jnp.asarray(first[1], jnp.int32))


def _items(persona: Persona, slots: Slots, placement: Placement) -> list[Item]:
    """The item of every context, by its turns: copies with exchanged choices have questions of their own."""
    asked = {_turns(question_conversation(item.asked, placement)): item for _, item in both_orders(persona.items)}
    missing = [c for c in slots.conversations if _turns(c) not in asked]
    if missing:
        raise UserError(f"a context asks no question of persona {persona.name!r}: {_turns(missing[0])[-120:]!r}")
    return [asked[_turns(conversation)] for conversation in slots.conversations]


def _turns(conversation: Conversation) -> str:
    return str(conversation.messages or conversation.text)


def load_objective(reference: str) -> Objective:
    """The function (or objective) that ``file.py:function`` names; the file is run as Python code.

    Raises ``UserError`` when the file or the function is missing, the file fails, or it is not callable.
    """
    file, _, name = reference.rpartition(":")
    if not file or not name.isidentifier():
        raise UserError(f"--objective expects file.py:function, got {reference!r}")
    path = user_path(file)
    if not path.is_file():
        raise UserError(f"--objective {reference!r}: there is no file {file}")
    spec = importlib.util.spec_from_file_location("jaxsteer_user_objective", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--objective {reference!r}: {file} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # so that dataclasses and pickling in the file find their module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"--objective {reference!r}: running {file} failed: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if found is None:
        known = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        raise UserError(
            f"--objective {reference!r}: {file} defines no {name}; it has {', '.join(known) or 'no functions'}"
        )
    if not callable(found):
        raise UserError(f"--objective {reference!r}: {name} is a {type(found).__name__}, not a function of the reads")
    return found
