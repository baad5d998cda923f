"""Simulation scores of labels by a writer (Bills et al. 2023, Language models can explain neurons in language models).

The writer sees a label and a text in pieces (tokens), and says from 0 to 10 how strongly the latent is active at each;
the score is the correlation of these numbers with the latent's values, over all tokens of its texts. Half of the texts
are those at which it fires most strongly, half are drawn at random (the paper's mix). Two forms:

    all      one reply with a list of numbers, one for each piece
    token    one reply for each piece, with the text up to it (the paper's order: later pieces are not seen)

The paper takes expected values from the probabilities of the digits, where an endpoint gives them; here the number that
is written counts. Numbers that are all the same tell nothing and score 0. What cannot be read is counted.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxsteer.display import aligned, decimals, visible
from jaxsteer.errors import UserError
from jaxsteer.explain.contexts import Contexts
from jaxsteer.explain.labels import Labels
from jaxsteer.files import parse_json
from jaxsteer.files.records import Record
from jaxsteer.models.model import Model
from jaxsteer.models.run import capture
from jaxsteer.models.sites import parse_site
from jaxsteer.objectives.terms import check_choice
from jaxsteer.processes import to_host
from jaxsteer.prompts import bos_id
from jaxsteer.runs.result import Result
from jaxsteer.sae.dictionary import SAE, encode
from jaxsteer.sae.harvest import usable
from jaxsteer.statistics import student
from jaxsteer.writers.judge import ask_all, only_number
from jaxsteer.writers.writer import Messages, Writer

EACH = 5
"""Texts of either kind for a latent, of the paper."""
MOST = 10.0
ALL = """Idea: {label}
A text in {count} pieces, one on each line:
{pieces}
How strongly does each piece show the idea, from 0 (not at all) to 10 (as strongly as possible)? Most show nothing.
Reply with a list of {count} numbers, such as [0, 0, 7, 1], and nothing else."""
TOKEN = """Idea: {label}
Text: {text}
How strongly does the part between << and >> show the idea, from 0 (not at all) to 10 (as strongly as possible)?
Reply with one number and nothing else."""
_LIST = re.compile(r"\[[\s\d,.]*\]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulationScore(Record):
    """How well a label tells a latent's values."""

    latent: int
    correlation: float | None
    """Of simulated and true values over tokens; None where fewer than two were read, or the latent is constant."""
    read: int
    """Tokens with a number."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulationScores(Result):
    """Simulation of all labels."""

    form: str
    """"all" or "token"."""
    writer: str
    prompt: str
    scores: tuple[SimulationScore, ...]
    unread: int
    """Tokens without a number that could be read."""

    @property
    def correlation(self) -> float | None:
        """Mean over latents."""
        known = [score.correlation for score in self.scores if score.correlation is not None]
        return float(np.mean(known)) if known else None

    @property
    def ci95(self) -> tuple[float, float] | None:
        """Of the mean over latents."""
        return student([score.correlation for score in self.scores if score.correlation is not None])

    def to_rows(self) -> list[dict[str, Any]]:
        """One entry for every latent."""
        return [{"kind": "simulation", **score.to_json()} for score in self.scores]

    def table(self) -> str:
        """A line for every latent."""
        rows = [("latent", "correlation", "read")]
        rows += [(str(s.latent), decimals(s.correlation), str(s.read)) for s in self.scores]
        return aligned(rows, note=f"simulation ({self.form}) by {visible(self.writer)}; {self.unread} tokens unread")


def simulation_rows(contexts: Contexts, latents: Sequence[int], *, seed: int = 0) -> dict[int, list[int]]:
    """For every latent that fires in some context: the ``EACH`` strongest contexts, and as many drawn from the rest."""
    found = {}
    for latent in latents:
        values = contexts.values[:, latent]
        best = [int(row) for row in np.argsort(-values, kind="stable")[:EACH] if values[row] > 0]
        rest = np.setdiff1d(np.arange(len(contexts)), best)
        drawn = np.random.default_rng([seed, 2, latent]).permutation(rest)[:EACH]
        if best:
            found[latent] = [*best, *map(int, drawn)]
    return found


def token_values(
    model: Model, sae: SAE, contexts: Contexts, rows: Mapping[int, Sequence[int]], *, batch: int = 32
) -> dict[int, Float[np.ndarray, "n w"]]:
    """The values of latents at every token of their contexts ``rows``; 0 where they do not count, as in training."""
    site = parse_site(sae.config.site_in or "", model.config.n_layers).name
    bos = bos_id(model.tokenizer)
    asked = sorted({row for of in rows.values() for row in of})
    place = {row: at for at, row in enumerate(asked)}
    chosen = jnp.asarray(sorted(rows))
    parts = []
    for begin in range(0, len(asked), batch):
        part = asked[begin : begin + batch]
        ids = contexts.tokens[[*part, *part[-1:] * (batch - len(part))]]
        mask = np.ones(ids.shape, bool)
        x = capture(model, ids, [site], mask)[site].reshape(*ids.shape, -1)
        keep = usable(x, jnp.asarray(ids), jnp.asarray(mask), bos)
        codes = to_host(jnp.where(keep[..., None], encode(sae, x, chosen), 0.0))
        parts.append(np.asarray(codes)[: len(part)])
    everything = np.concatenate(parts)
    return {
        latent: everything[[place[row] for row in of], :, at] for at, (latent, of) in enumerate(sorted(rows.items()))
    }


def simulate_labels(
    model: Model,
    labels: Labels,
    contexts: Contexts,
    rows: Mapping[int, Sequence[int]],
    values: Mapping[int, Float[np.ndarray, "n w"]],
    writer: Writer,
    *,
    form: str = "all",
    log: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SimulationScores:
    """Let a writer say from every label how strongly its latent is active at each token of its contexts ``rows``.

    ``values`` are the true ones (``token_values``). ``log`` takes every reply as it comes, and what stands there is not
    asked for again. Latents without a label or a context are left out. Raises ``UserError`` when none is left, and when
    no reply can be read. Many parameters: what is simulated, on what, by whom.
    """
    check_choice("form", form, ("all", "token"))
    asked: list[tuple[int, np.ndarray]] = []
    requests: list[Messages] = []
    for one in labels.labels:
        if not one.label or one.latent not in rows:
            continue
        for row, true in zip(rows[one.latent], values[one.latent], strict=True):
            pieces = [model.tokenizer.decode([int(token)]) for token in contexts.tokens[row]]
            if form == "all":
                listed = "\n".join(f"{i}. {visible(piece)}" for i, piece in enumerate(pieces, 1))
                texts = [ALL.format(label=one.label, count=len(pieces), pieces=listed)]
                asked.append((one.latent, np.asarray(true, np.float64)))
            else:
                texts = [
                    TOKEN.format(label=one.label, text="".join(pieces[:at]) + f"<<{pieces[at]}>>")
                    for at in range(len(pieces))
                ]
                asked += [(one.latent, np.asarray([value], np.float64)) for value in true]
            requests += [[{"role": "user", "content": text}] for text in texts]
    if not requests:
        raise UserError("no latent has both a label and a context in which it fires: read more text")
    most = 16 + 5 * contexts.tokens.shape[1] if form == "all" else 8
    replies = ask_all(writer, requests, max_tokens=most, log=log, progress=progress)
    said = [_numbers(reply, len(true), form) for reply, (_, true) in zip(replies, asked, strict=True)]
    if all(numbers is None for numbers in said):
        wanted = "a list of as many numbers as there are tokens" if form == "all" else "a number from 0 to 10"
        raise UserError(f"no reply of {writer.name} is {wanted}, for example {replies[0][:60]!r}")
    scores = []
    for latent in dict.fromkeys(latent for latent, _ in asked):
        mine = [(n, t) for n, (owner, t) in zip(said, asked, strict=True) if owner == latent and n is not None]
        scores.append(_correlated(latent, mine))
    unread = sum(len(true) for numbers, (_, true) in zip(said, asked, strict=True) if numbers is None)
    prompt = ALL if form == "all" else TOKEN
    return SimulationScores(form=form, writer=writer.name, prompt=prompt, scores=tuple(scores), unread=unread)


def _numbers(reply: str, count: int, form: str) -> list[float] | None:
    if form == "token":
        one = only_number(reply, (0.0, MOST))
        return None if one is None else [one]
    found = _LIST.search(reply.rpartition("</think>")[2])
    if found is None:
        return None
    try:
        values = parse_json(found[0], "a reply")
    except UserError:
        return None
    fits = len(values) == count and all(0 <= value <= MOST for value in values)
    return [float(value) for value in values] if fits else None


def _correlated(latent: int, mine: Sequence[tuple[list[float], np.ndarray]]) -> SimulationScore:
    simulated = np.concatenate([np.asarray(numbers) for numbers, _ in mine]) if mine else np.zeros(0)
    true = np.concatenate([values for _, values in mine]) if mine else np.zeros(0)
    if len(true) < 2 or not np.ptp(true):
        return SimulationScore(latent=latent, correlation=None, read=len(true))
    flat = not np.ptp(simulated)
    return SimulationScore(
        latent=latent, correlation=0.0 if flat else float(np.corrcoef(simulated, true)[0, 1]), read=len(true)
    )
