"""ProTeGi: a beam of prompts, criticised and rewritten by a language model (Pryzant et al., arXiv 2305.03495).

In every round each prompt of the beam is tried on a minibatch of train questions; a language model is shown questions
on which the behaviour still appears, says what is wrong with the prompt (the "textual gradient"), and rewrites it. All
candidates, old ones too, are scored on the same train questions, and the best stay. The released code draws other
questions in every round, so that a prompt may survive by luck; here they are fixed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxsteer.evals.choice import choice_eval, distinct
from jaxsteer.personas import Item, Persona
from jaxsteer.prompts import Placement
from jaxsteer.writers.writer import Writer

if TYPE_CHECKING:
    from jaxsteer.models.model import Model

START = "Please be careful and honest in your answer."
CRITICISE = """A language model is shown questions, each together with this instruction:

<instruction>{prompt}</instruction>

The instruction should keep it from this behaviour: {behaviour}. It failed on these questions:

{errors}

Give {n} different short explanations of why the instruction did not work. Put each of them between <reason> and
</reason>."""
REWRITE = """A language model is shown questions, each together with this instruction:

<instruction>{prompt}</instruction>

The instruction should keep it from this behaviour: {behaviour}. It does not work well, because: {reason}

Write {n} different better instructions that mend this. Each must have fewer than {words} words. Put each of them
between <instruction> and </instruction>."""
_TAGGED = re.compile(r"<(reason|instruction)>(.*?)</\1>", re.DOTALL | re.IGNORECASE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProtegiConfig:
    """The published sizes (arXiv 2601.02896 uses the method with these)."""

    start: str = START
    beam: int = 4
    rounds: int = 4
    minibatch: int = 32
    """Train questions on which errors are looked for."""
    errors: int = 4
    """Errors shown at once."""
    criticisms: int = 2
    """Calls for criticism of each prompt."""
    reasons: int = 2
    """Reasons per call."""
    rewrites: int = 2
    """New prompts per reason."""
    words: int = 10
    """Prompts with as many words are refused."""
    scored: int = 128
    """Train questions on which candidates are compared: the same in every round."""
    temperature: float = 0.7


@dataclasses.dataclass(frozen=True, kw_only=True)
class Improved:
    """What the rounds led to."""

    beam: tuple[str, ...]
    """The best prompts, best first."""
    rounds: tuple[dict[str, float | str], ...]
    """After each round, the best prompt and its rate on the train questions."""
    tried: int
    """Different prompts that were scored."""
    calls: int
    """Replies that were asked for."""
    writer: str
    """The language model's name."""


def improve(
    model: Model,
    persona: Persona,
    train: Sequence[Item],
    writer: Writer,
    *,
    config: ProtegiConfig | None = None,
    placement: Placement = Placement(),
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Improved:
    """Run the rounds on train questions. Choosing within the returned beam is left to validation questions.

    Raises ``UserError`` when the writer gives no answer. A reply without the tags that were asked for adds nothing.
    """
    config = config or ProtegiConfig()
    name = writer.name  # an endpoint that is not there fails here
    rng = np.random.default_rng([seed, 30])
    items = list(distinct(train))
    shuffled = [items[i] for i in rng.permutation(len(items))]
    scored = shuffled[: config.scored]
    scores: dict[str, tuple[float, float]] = {}
    calls = 0

    def score(prompts: Sequence[str]) -> None:
        new = [prompt for prompt in prompts if prompt not in scores]
        for result in choice_eval(model, scored, new, placement=placement) if new else ():
            scores[result.prompt] = (float(result.persona.mean()), float(result.probability.mean()))

    def write(template: str, tag: str, n: int, **facts: object) -> list[str]:
        nonlocal calls
        content = template.format(n=n, behaviour=persona.subject, **facts)
        reply = writer.reply(
            [{"role": "user", "content": content}], temperature=config.temperature, seed=int(rng.integers(2**31))
        )
        calls += 1
        found = [" ".join(text.split()) for name, text in _TAGGED.findall(reply[0]) if name.lower() == tag]
        return [text for text in found if text][:n]

    beam = [config.start]
    score(beam)
    history: list[dict[str, float | str]] = []
    for number in range(config.rounds):
        batch = [items[i] for i in rng.choice(len(items), min(config.minibatch, len(items)), replace=False)]
        results = choice_eval(model, batch, beam, placement=placement, both_orders=False)
        candidates = list(beam)
        for prompt, result in zip(beam, results, strict=True):
            failed = [item for item, shown in zip(batch, result.persona, strict=True) if shown > 0.5]
            for _ in range(config.criticisms if failed else 0):
                picked = rng.choice(len(failed), min(config.errors, len(failed)), replace=False)
                errors = "\n\n".join(f"{failed[i].question}\nIts answer: {failed[i].matching}" for i in picked)
                for reason in write(CRITICISE, "reason", config.reasons, prompt=prompt, errors=errors):
                    candidates += write(
                        REWRITE, "instruction", config.rewrites, prompt=prompt, reason=reason, words=config.words
                    )
        fresh = [c for c in dict.fromkeys(candidates) if c in scores or len(c.split()) < config.words]
        score(fresh)
        beam = sorted(fresh, key=lambda prompt: scores[prompt])[: config.beam]
        history.append({"prompt": beam[0], "train_rate": scores[beam[0]][0]})
        say(
            f"ProTeGi, round {number + 1} of {config.rounds}: {len(scores)} prompts, best rate {scores[beam[0]][0]:.2f}"
        )
    return Improved(beam=tuple(beam), rounds=tuple(history), tried=len(scores), calls=calls, writer=name)
