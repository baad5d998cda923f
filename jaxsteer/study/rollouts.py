"""``persona_rollouts``: vectors of a trait from what a model answers under instructions for and against it.

The pipeline of persona_vectors (arXiv 2507.21509): answers under every instruction, a judge's scores of trait and
coherence, the pairs whose sides are what they should be, and differences of means at the output of every block.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxsteer.display import aligned, decimals, visible
from jaxsteer.errors import UserError, refuse_unknown
from jaxsteer.files.torchwrite import write_torch
from jaxsteer.models.model import Model
from jaxsteer.models.sites import resid_site
from jaxsteer.personas.directions import mean_difference
from jaxsteer.personas.traits import (
    COHERENCE,
    SIDES,
    THRESHOLD,
    Average,
    Rollout,
    Trait,
    kept_rollouts,
    load_trait,
    read_rollouts,
    rollout_pairs,
    write_rollouts,
)
from jaxsteer.processes import from_first, is_first
from jaxsteer.prompts import apply_template
from jaxsteer.prompts.generate import generate
from jaxsteer.ranges import CountFrom0, Seed, check_ranges
from jaxsteer.runs.bars import behind, load, progress_bar
from jaxsteer.runs.files import JUDGED, append_line, read_lines
from jaxsteer.runs.folder import opened
from jaxsteer.runs.result import KEPT, Result
from jaxsteer.steer import Vectors, load_vectors, save_vectors
from jaxsteer.study.measure import judge_config
from jaxsteer.writers.judge import Rubric, judge, require_scores
from jaxsteer.writers.writer import Writer

WRITTEN = "written.jsonl"
"""File of the directory: answers as they come."""
CHUNK = 64
"""Answers between two writes to it."""
NOTHING = 1e-6
"""Of the stream's norm: a shorter difference is rounding, as that of embeddings of the same token is."""
SIGN = "towards the trait: mean(positive instruction) - mean(negative instruction)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """How answers are written, which pairs are kept, and what is read of them."""

    samples: int = 1
    """Answers to each question under each instruction: greedy for one, else drawn at temperature 1."""
    max_new_tokens: int = 256
    """Longest answer."""
    seed: Seed = 0
    """Seed of what is drawn."""
    names: tuple[str, str] = ("", "")
    """What the assistant is called under instructions for and against the trait (default: the trait, and helpful)."""
    threshold: float = THRESHOLD
    """A positive answer scores at least this, a negative one less than 100 minus this."""
    least: int = 10
    """Pairs that have to be left."""
    coherence: Rubric = COHERENCE
    """What a judge is asked about whether an answer makes sense; facts: question, answer."""
    averages: tuple[Average, ...] = ("response_avg", "prompt_avg", "prompt_last")
    """What is read: the mean over the answer, over the prompt, or the prompt's last token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutResult(Result):
    """What became of the answers, and what the vectors are worth."""

    trait: str
    model: str
    judge: str
    pairs: CountFrom0
    """Positive and negative answers to a question under an instruction."""
    kept: CountFrom0
    """Pairs that the vectors are made of."""
    dropped: Mapping[str, int]
    """The others, by reason."""
    scores: tuple[float | None, float | None]
    """Mean trait score of positive and negative answers."""
    diagnostics: Mapping[str, Mapping[str, Mapping[str, float | None]]]
    """By average and site: norm, share of the stream's mean norm, cosine of the vectors of two halves of the questions.
    """

    def to_rows(self) -> list[dict[str, Any]]:
        """One row per average and site."""
        return [
            {"average": average, "site": site, **facts}
            for average, sites in self.diagnostics.items()
            for site, facts in sites.items()
        ]

    def table(self) -> str:
        """Counts, then a line for each site."""
        why = ", ".join(f"{n} {reason}" for reason, n in self.dropped.items())
        scores = " and ".join(decimals(score, 1) for score in self.scores)
        head = (
            f"{visible(self.trait)} in {visible(self.model)}: {self.kept} of {self.pairs} pairs of answers"
            + (f" (left out: {why})" if why else "")
            + f"; mean scores {scores} under instructions for and against it, by {visible(self.judge)}"
        )
        names = list(self.diagnostics)
        table = [("site", *(f"{name} {what}" for name in names for what in ("of stream", "halves")))]
        for site in self.diagnostics[names[0]]:
            cells = [site]
            for name in names:
                facts = self.diagnostics[name][site]
                cells += [decimals(facts["of_stream"], 3), decimals(facts["split_half_cosine"])]
            table.append(tuple(cells))
        note = (
            "of stream: norm of the vector as a share of the mean norm of what is read; halves: cosine of the vectors"
        )
        return f"{head}\n\n{aligned(table, note=f'{note} of two halves of the questions')}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Answers with their scores, and the vectors that they make."""

    result: RolloutResult
    vectors: dict[str, Vectors]
    """By average; at ``hook_embed`` and the output of every block, towards the trait."""
    positive: tuple[Rollout, ...]
    """All, also those that were left out."""
    negative: tuple[Rollout, ...]


def persona_rollouts(
    model: str | Model,
    trait: str | Path | Trait,
    judge: Writer,
    *,
    options: RolloutOptions | None = None,
    out: str | Path | None = None,
    **changed: Any,
) -> Rollouts:
    """Vectors of a ``trait`` (or its file) from the model's answers, as ``judge`` scores them.

    ``changed`` are fields of ``options``. ``out`` is a directory for the answers and the judge's replies as they come,
    the answers with their scores (<trait>_pos_instruct.csv, <trait>_neg_instruct.csv), the vectors
    (<trait>_<average>_diff.safetensors, and .pt for persona_vectors) and the result (metrics.json): the same call, cut
    off, goes on there.

    Raises ``UserError``, before a model is loaded, for a file that is no trait and for options that do not exist; for
    a judge that gives no answer, or none that is a score; and where fewer than ``least`` pairs are left, with the
    reasons.
    """
    refuse_unknown(changed, [f.name for f in dataclasses.fields(RolloutOptions)], "option of persona_rollouts")
    chosen = dataclasses.replace(options or RolloutOptions(), **changed)
    check_ranges(chosen)
    trait = trait if isinstance(trait, Trait) else load_trait(trait)
    kept = None if out is None else Path(out)
    config = {
        "kind": "rollouts",
        "model": model if isinstance(model, str) else [model.name, model.fingerprint],
        "trait": dataclasses.asdict(trait),
        **{f.name: getattr(chosen, f.name) for f in dataclasses.fields(chosen) if f.name != "coherence"},
        **judge_config(judge, chosen.coherence),
    }
    with contextlib.nullcontext() if kept is None else opened(kept, config, lambda _: None) as folder:
        if folder is not None and folder.finished is not None:
            result = RolloutResult.from_json(folder.finished, str(folder.path))
            sides = (read_rollouts(folder.path / f"{trait.name}_{side}_instruct.csv", trait.name) for side in SIDES)
            vectors = {str(name): load_vectors(_file(folder.path, trait, name)) for name in chosen.averages}
            return Rollouts(result=result, vectors=vectors, positive=next(sides), negative=next(sides))
        if folder is not None:
            folder.begin()
        ready = load(model) if isinstance(model, str) else model
        found = _scored(_written(ready, trait, chosen, kept), trait, judge, chosen, kept)
        made = rollout_vectors(ready, trait.name, *found, judged_by=judge.name, options=chosen)
        if folder is not None and kept is not None:
            if is_first():
                for name, each in made.vectors.items():
                    save_vectors(each, path := _file(kept, trait, name))
                    write_torch(path.with_suffix(".pt"), np.stack([*each.arrays.values()]))
            folder.finish(made.result)
    return made


def _file(folder: Path, trait: Trait, average: str) -> Path:
    return folder / f"{trait.name}_{average}_diff.safetensors"


def _written(model: Model, trait: Trait, options: RolloutOptions, kept: Path | None) -> list[Rollout]:
    """The answers without scores, the positive ones first; those that stand in the directory are not written again."""
    asked = [
        (side, i, k, trait.messages(side, question, k, options.names[s]))
        for s, side in enumerate(SIDES)
        for i, question in enumerate(trait.questions)
        for k in range(len(trait.instructions))
    ]
    log = None if kept is None else kept / WRITTEN
    lines = [] if log is None else from_first(lambda: read_lines(log))
    known = {int(line["number"]): str(line["answer"]) for line in lines}
    total, size = len(asked) * options.samples, max(1, CHUNK // options.samples)
    with progress_bar("answers", total, unit="answer") as advance:
        for begin in range(0, len(asked), size):
            chunk, first = asked[begin : begin + size], begin * options.samples
            numbers = range(first, first + len(chunk) * options.samples)
            if not all(number in known for number in numbers):
                seed = int.from_bytes(hashlib.sha256(f"{options.seed}\x1f{begin}".encode()).digest()[:4], "big") >> 1
                made = generate(
                    model, [messages for *_, messages in chunk], samples=options.samples, seed=seed,
                    temperature=0.0 if options.samples == 1 else 1.0, max_new_tokens=options.max_new_tokens,
                    progress=partial(behind, advance, first),
                )  # fmt: skip
                for number, text in zip(numbers, made.texts, strict=True):
                    if log is not None and number not in known:
                        append_line(log, {"number": number, "answer": text})
                    known[number] = text
            advance(numbers.stop)
    prompts = [apply_template(model.tokenizer, messages) for *_, messages in asked]
    return [
        Rollout(
            id=f"{trait.name}_{i}_{side}_{k}", question=trait.questions[i], prompt=prompt,
            answer=known[number * options.samples + sample],
        )
        for number, ((side, i, k, _), prompt) in enumerate(zip(asked, prompts, strict=True))
        for sample in range(options.samples)
    ]  # fmt: skip


def _scored(
    rollouts: Sequence[Rollout], trait: Trait, writer: Writer, options: RolloutOptions, kept: Path | None
) -> tuple[tuple[Rollout, ...], tuple[Rollout, ...]]:
    """Positive and negative answers with the judge's scores."""
    facts = [{"question": one.question, "answer": one.answer} for one in rollouts]
    groups, scores = [one.question for one in rollouts], []
    for what, rubric in (("trait", Rubric(template=trait.rubric)), ("coherence", options.coherence)):
        log = None if kept is None else kept / JUDGED
        try:
            with progress_bar(f"judge: {what}", unit="reply") as advance:
                found = judge(writer, rubric, facts, groups, log=log, progress=advance)
            require_scores(found)
        except UserError as error:
            where = "" if kept is None else f". {KEPT.format(kept)}"
            raise UserError(f"{error}{where}") from error
        scores.append(found.scores)
    judged = [dataclasses.replace(one, trait=t, coherence=c) for one, t, c in zip(rollouts, *scores, strict=True)]
    half = len(judged) // 2
    sides = tuple(judged[:half]), tuple(judged[half:])
    if kept is not None and is_first():
        for side, some in zip(SIDES, sides, strict=True):
            write_rollouts(kept / f"{trait.name}_{side}_instruct.csv", trait.name, some)
    return sides


def rollout_vectors(
    model: Model,
    name: str,
    positive: Sequence[Rollout],
    negative: Sequence[Rollout],
    *,
    judged_by: str = "",
    options: RolloutOptions | None = None,
) -> Rollouts:
    """Vectors from answers that have scores already, for example those of persona_vectors (``read_rollouts``).

    Raises ``UserError`` where fewer than ``least`` pairs are left, with the reasons.
    """
    options = options or RolloutOptions()
    kept, dropped = kept_rollouts(positive, negative, threshold=options.threshold)
    if len(kept) < options.least:
        why = ", ".join(f"{n} {reason}" for reason, n in dropped.items())
        raise UserError(
            f"only {len(kept)} of {len(positive)} pairs of answers are left, and at least {options.least} have to be; "
            f"left out: {why or 'none'}. Give other instructions, more questions or samples, or another judge or rubric"
        )
    sides = [[side[i] for i in kept] for side in (positive, negative)]
    sites = ("hook_embed", *map(resid_site, range(model.config.n_layers)))
    vectors: dict[str, Vectors] = {}
    diagnostics: dict[str, dict[str, dict[str, float | None]]] = {}
    for average in options.averages:
        with progress_bar(f"reading {average}", unit="answer") as advance:
            pairs = rollout_pairs(model, name, sides[0], sides[1], average)
            found = mean_difference(model, pairs, sites, progress=advance).vectors()
        notes = {key: text for key, text in found.metadata.items() if key not in ("n_pairs", "diagnostics")}
        shares = {site: found.norm(site) / found.mean_resid_norm[site] for site in sites}
        vectors[average] = dataclasses.replace(
            found,
            arrays={site: -array * (shares[site] > NOTHING) for site, array in found.arrays.items()},
            sign=SIGN,
            metadata=notes | {"rollout_pairs": f"{len(kept)} of {len(positive)}", "judge": judged_by},
        )
        halves = json.loads(found.metadata["diagnostics"])
        diagnostics[average] = {
            site: {
                "norm": vectors[average].norm(site),
                "of_stream": share * (share > NOTHING),
                "split_half_cosine": half if share > NOTHING and np.isfinite(half) else None,
            }
            for site, share in shares.items()
            for half in [halves[site]["split_half_cosine"]]
        }
    return Rollouts(
        result=RolloutResult(
            trait=name, model=model.name, judge=judged_by, pairs=len(positive), kept=len(kept), dropped=dropped,
            scores=(_mean(positive), _mean(negative)), diagnostics=diagnostics,
        ),
        vectors=vectors,
        positive=tuple(positive),
        negative=tuple(negative),
    )  # fmt: skip


def _mean(rollouts: Sequence[Rollout]) -> float | None:
    known = [one.trait for one in rollouts if one.trait is not None]
    return float(np.mean(known)) if known else None
