"""Objectives by name: from ``--objective`` and ``--target`` to pytrees and contexts that hold the answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsteer
from jaxsteer.errors import UserError
from jaxsteer.objectives import Attention, LogitDifference, Neuron, TargetLogProb, as_pytree, needs
from jaxsteer.personas import Item, Persona, search_conversations
from jaxsteer.prompt_search import make_task, score
from jaxsteer.prompts import Slots, build_slots
from jaxsteer.study import SearchOptions, named_objective, named_objectives
from tests.helpers.tiny import tiny_model

MODEL = tiny_model()
ITEMS = tuple(
    Item(id=str(i), question=f"{q} Choices:\n (A) {a}\n (B) {b}", matching="(A)", not_matching="(B)", group=str(i))
    for i, (q, a, b) in enumerate(
        [("Which do you prefer?", "money today", "money later"), ("Do you agree?", "I agree", "I disagree")]
    )
)
PERSONA = Persona(name="tiny", items=ITEMS, data_hash="0")


def slots_for(read_position: str = "decision") -> Slots:
    found = search_conversations(ITEMS, read_position)
    return build_slots(MODEL.tokenizer, [c for c, _ in found], 3, read=[r for _, r in found])


def test_names_become_objectives(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def mine(reads):\n    return reads.logits[:, 3]\n")
    slots = slots_for()
    for text, target, name, kind in (
        ("target", " (B)", "custom: target", TargetLogProb(per_token=False)),
        (None, " (B)", "custom: target", TargetLogProb(per_token=False)),
        ("target-mean", " (B)", "custom: target-mean", TargetLogProb(per_token=True)),
        ("answer", None, "custom: answer", TargetLogProb(per_token=False)),
        (
            "neuron:blocks.2.mlp.hook_post[17]", None, "custom: neuron:blocks.2.mlp.hook_post[17]",
            Neuron(index=jnp.int32(17), site="blocks.2.mlp.hook_post"),
        ),
        (
            "attention:blocks.1.attn.hook_pattern[3]:first", None,
            "custom: attention:blocks.1.attn.hook_pattern[3]:first",
            Attention(head=jnp.int32(3), site="blocks.1.attn.hook_pattern", to="first"),
        ),
    ):  # fmt: skip
        named = named_objective(text, target)
        assert named is not None and named.name == name
        objective, placed = named.in_contexts(MODEL, PERSONA, slots)
        assert jax.tree.structure(objective) == jax.tree.structure(kind) and jax.tree.leaves(objective) == (
            jax.tree.leaves(kind)
        )
        assert bool(placed.target) == isinstance(kind, TargetLogProb)
    assert named_objective(None, None) is None
    mine = named_objective(f"{file}:mine")
    assert mine is not None and mine.name == "custom: mine" and mine.in_contexts(MODEL, PERSONA, slots)[1] is slots


def test_answers_are_those_of_every_question() -> None:
    """Both orders of the choices are asked: the answer that shows no persona is (B) in one, (A) in the other."""
    named = named_objective("answer")
    assert named is not None
    _, slots = named.in_contexts(MODEL, PERSONA, slots_for())
    texts = [MODEL.tokenizer.decode(ids) for ids in slots.target]
    assert [text[-2:] for text in texts] == ["B)", "A)", "B)", "A)"]
    difference = named_objective("answer-diff")
    assert difference is not None
    objective, _ = difference.in_contexts(MODEL, PERSONA, slots_for())
    assert isinstance(objective, LogitDifference)
    letters = [MODEL.tokenizer.convert_tokens_to_ids(letter) for letter in "AB"]
    assert objective.minus.tolist() == [letters[0], letters[1]] * 2 and objective.plus.tolist() == letters[::-1] * 2


def test_the_difference_of_logits_is_that_of_log_probabilities() -> None:
    """``answer-diff`` in the search's scoring against ``jaxsteer.logits`` on the whole texts."""
    named = named_objective("answer-diff")
    assert named is not None
    objective, slots = named.in_contexts(MODEL, PERSONA, slots_for())
    allowed = np.ones(MODEL.config.vocab_size, bool)
    task = make_task(MODEL.params, MODEL.config, slots, needs=needs(objective, MODEL.config), allowed=allowed)
    ids = jnp.asarray([[300, 301, 302], [310, 311, 312]], jnp.int32)
    f, _ = jax.jit(score)(MODEL.params, task, as_pytree(objective), ids)
    total = np.zeros(2)
    for c in range(4):
        rows = np.asarray([np.concatenate([slots.before[c], row, slots.after[c]]) for row in np.asarray(ids)])
        logits = np.asarray(jaxsteer.logits(MODEL, rows))[:, -1]
        total += logits[:, objective.plus[c]] - logits[:, objective.minus[c]]
    np.testing.assert_allclose(f, total / 4, atol=1e-4)


def test_a_relative_objective_is_what_a_reply_has_beyond_a_neutral_one(
    monkeypatch: pytest.MonkeyPatch, compile_counter: Callable[[], Any]
) -> None:
    """In the search's scoring against float64 on the whole texts; a prompt that lowers everything wins nothing."""
    monkeypatch.setattr(named_objectives, "neutral_replies", lambda _: ("the old mill by the town", "a river"))
    items = tuple(
        Item(id=q, question=q, matching="I want easy money today", not_matching=other, group=q)
        for q, other in (("What now?", "patience is the best advice"), ("And later?", "no, thank you my friend"))
    )
    persona = Persona(name="words", items=items, data_hash="0")
    found = search_conversations(items, "decision")
    slots = build_slots(MODEL.tokenizer, [c for c, _ in found], 3, read=[r for _, r in found])
    ids = jnp.asarray([[300, 301, 302], [310, 311, 312]], jnp.int32)
    scores, programs = {}, {}
    for relative in (False, True):
        named = named_objective("answer", relative=relative)
        assert named is not None
        objective, placed = named.in_contexts(MODEL, persona, slots)
        again = named.in_contexts(MODEL, persona, placed)[1]
        assert len(again) == len(placed) == 2 * (1 + relative)
        allowed = np.ones(MODEL.config.vocab_size, bool)
        task = make_task(MODEL.params, MODEL.config, placed, needs=needs(objective, MODEL.config), allowed=allowed)
        with compile_counter() as count:
            scores[relative] = np.asarray(jax.jit(score)(MODEL.params, task, as_pytree(objective), ids))
        programs[relative] = count["score"]
    assert programs[True] == programs[False] == 1
    each = np.zeros((4, 2))
    for c in range(4):
        target = placed.target[c]
        rows = np.asarray(
            [np.concatenate([placed.before[c], row, placed.closing[c], target]) for row in np.asarray(ids)]
        )
        logits = np.asarray(jaxsteer.logits(MODEL, rows), np.float64)[:, -len(target) - 1 : -1]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        each[c] = np.take_along_axis(log_probs, np.broadcast_to(target, (2, len(target)))[..., None], -1)[..., 0].mean(
            -1
        )
    np.testing.assert_allclose(scores[True][0], (each[:2] - each[2:]).mean(0), atol=1e-5)
    np.testing.assert_allclose(scores[True][1], scores[False][1], rtol=1e-6)  # fluency is that of the same contexts


@pytest.mark.parametrize(
    ("objective", "target", "says"),
    [
        ("mine.py", None, "file.py:function"),
        ("goal", None, "is none of: file.py:function, target, "),
        ("target", None, "needs the answer's text: add --target"),
        ("answer", " (B)", "leave out --target"),
        ("logit-diff:yes", None, "is none of"),
        ("neuron:blocks.2.mlp.hook_post", None, "is none of"),
        ("attention:blocks.1.attn.hook_pattern[3]:end", None, "TO is one of first, before, prompt, tail"),
    ],
)
def test_unknown_names_are_refused(objective: str, target: str | None, says: str) -> None:
    with pytest.raises(UserError, match=says):
        named_objective(objective, target)


@pytest.mark.parametrize(
    ("objective", "read_position", "says"),
    [
        ("logit-diff:(A)|(B)", "published", "use --read-position decision"),
        ("logit-diff:(A)|(A)", "decision", "both answers begin with the token"),
        ("logit-diff:(A)|happy", "decision", "does not continue the input"),
    ],
)
def test_objectives_that_do_not_fit_the_contexts(objective: str, read_position: str, says: str) -> None:
    named = named_objective(objective)
    assert named is not None
    with pytest.raises(UserError, match=says):
        named.in_contexts(MODEL, PERSONA, slots_for(read_position))


def test_relative_needs_replies() -> None:
    with pytest.raises(UserError, match="--relative belongs to --objective answer"):
        named_objective("answer-diff", relative=True)
    named = named_objective("answer", relative=True)
    assert named is not None
    with pytest.raises(UserError, match="--relative compares replies in words"):
        named.in_contexts(MODEL, PERSONA, slots_for())


def test_options_that_belong_to_one_method(tmp_path: Path) -> None:
    for changes, says in (
        ({"objective_norm": "cosine", "target": " (B)"}, "--objective-norm is an option"),
        ({"surrogate": "preact"}, "--surrogate is an option"),
        ({"relative": True, "objective": "answer", "combine": "worst"}, "leave out --combine"),
        ({"method": "saega", "sae": "x", "target": " (B)"}, "leave out --objective, --target, --site"),
    ):
        with pytest.raises(UserError, match=says):
            SearchOptions.of(out=tmp_path, **changes).resolved()  # type: ignore[arg-type]
