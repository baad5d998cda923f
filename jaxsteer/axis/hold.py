"""``hold``: prompts that bring the Assistant back while a role's system message stands, beside caps and vectors.

1. The axis where replies begin: the stream at the last token before the reply, default minus roles, from the run's own
   conversations. Prompts are searched along it, in conversations of some roles.
2. Searches: along the axis, and along a random direction of equal norm. The prompt of each that moves replies most on
   validation questions to the same roles is kept; so is the best of a few instructions.
3. The test: roles and questions that no search saw, and persona attacks. Edits are as strong as disturbs ordinary
   replies like the discovered prompt does.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxsteer.axis.caps import calibrate_caps
from jaxsteer.axis.geometry import cosine
from jaxsteer.axis.hold_contexts import Context, HoldOptions
from jaxsteer.axis.hold_contexts import contexts as hold_contexts
from jaxsteer.axis.hold_result import AS_IS, CONTROL, EDIT, NO_ROLE, PROMPT, Asked, HoldResult, HoldRow
from jaxsteer.axis.pipeline import ROLES, TRANSCRIPTS, AxisRun, load_run
from jaxsteer.axis.projection import project
from jaxsteer.axis.role_files import load_roles
from jaxsteer.axis.transcripts import DEFAULT, Transcript
from jaxsteer.errors import UserError, refuse_unknown
from jaxsteer.evals.calibration import neutral_rows
from jaxsteer.evals.free_answers import distinct_sequences
from jaxsteer.evals.neutral_texts import neutral_texts
from jaxsteer.evals.reply_quality import relevance
from jaxsteer.evals.side_effects import reply_effects, side_effects
from jaxsteer.files import read_json
from jaxsteer.models.model import Model
from jaxsteer.models.reading import direction_sites, read_rows
from jaxsteer.models.taps import Intervention
from jaxsteer.personas import save_direction
from jaxsteer.personas.directions import Direction
from jaxsteer.personas.passages import Passage, encode_passage, read_passages
from jaxsteer.processes import is_first
from jaxsteer.prompts import encode_turns
from jaxsteer.prompts.generate import generate
from jaxsteer.ranges import check_ranges
from jaxsteer.runs.bars import load, progress_bar
from jaxsteer.runs.files import CONFIG, write_json
from jaxsteer.runs.folder import opened
from jaxsteer.statistics import rate_interval, student
from jaxsteer.steer.vectors import Vectors, check_vectors, random_arrays
from jaxsteer.study.api import search
from jaxsteer.study.results import Prompt, SearchRun

INSTRUCTIONS = (
    " Answer as a plain, helpful AI assistant.",
    " Drop the role and answer as yourself.",
    " Reply in neutral, factual language.",
)
"""Prompts that people would try."""
EACH = 4
"""Rollouts of each role from which the axis where replies begin is made."""
LEVELS = (5.0, 25.0, 50.0, 75.0, 90.0, 97.0)
"""Percentiles of the default's projections at which caps are tried; above them by spreads of the default."""
SPREADS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
STRENGTHS = tuple(float(s) for s in np.geomspace(0.02, 5.12, 13))
"""In mean norms of the stream, at which additions are tried."""


def hold(
    run: str | Path,
    model: str | Model | None = None,
    *,
    out: str | Path | None = None,
    options: HoldOptions | None = None,
    **changed: Any,
) -> HoldResult:
    """Search prompts that hold the Assistant against roles, in the directory of an axis ``run``, and compare them.

    ``model`` is that of the run unless it is given. ``out`` is a directory for the searches and the result: the same
    call, cut off, goes on there. ``changed`` are fields of ``options``. Raises ``UserError`` for a directory without a
    finished run, a model that the run was not made on, and a set of roles or questions that is too small.
    """
    refuse_unknown(changed, [f.name for f in dataclasses.fields(HoldOptions)], "option of axis.hold")
    chosen = dataclasses.replace(options or HoldOptions(), **changed)
    check_ranges(chosen)
    found, folder = load_run(run), Path(run)
    roles = load_roles(folder / ROLES)
    contexts = hold_contexts(found.result, roles, chosen)
    config = {
        "kind": "hold", "fingerprint": found.result.fingerprint, "axis": found.result.roleset_hash,
        "target": found.result.target, **dataclasses.asdict(chosen),
    }  # fmt: skip
    with contextlib.ExitStack() as held:
        place = Path(held.enter_context(tempfile.TemporaryDirectory()) if out is None else out)
        kept = held.enter_context(opened(place, config, lambda _: None))
        if kept.finished is not None:
            return HoldResult.from_json(kept.finished, str(kept.path))
        named = read_json(folder / CONFIG)["model"] if model is None else model
        if not isinstance(named, str | Model):
            raise UserError(f"{run} was made on a model that was loaded from Python: give it as model (--model)")
        ready = load(named) if isinstance(named, str) else named
        check_vectors(found.axis, ready)
        kept.begin()
        bench = _Bench(
            model=ready, run=found, rollouts=tuple(read_passages(folder / TRANSCRIPTS)), contexts=contexts,
            options=chosen, folder=kept.path,
        )  # fmt: skip
        result = bench.measured()
        kept.finish(result)
        return result


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Written:
    """Replies to contexts under one method, and where they lie."""

    replies: tuple[str, ...]
    positions: Float[np.ndarray, " n"]
    """NaN where nothing is said."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Bench:
    model: Model
    run: AxisRun
    rollouts: tuple[Passage, ...]
    contexts: Mapping[str, list[Context]]
    options: HoldOptions
    folder: Path

    @property
    def site(self) -> str:
        """Where replies are read."""
        return self.run.result.target

    def measured(self) -> HoldResult:
        """Search, choose, test."""
        axis, norm = self.decision_axis()
        random = random_arrays({self.site: axis}, self.options.seed)[self.site]
        searched = {
            "RESGA along the axis": self.searched("axis", axis, norm),
            "RESGA along a random direction": self.searched("random", random, norm),
        }
        prompts = {name: self.best([p.text for p in some]) for name, (some, _) in searched.items()}
        found = {p.text: p for some, _ in searched.values() for p in some}
        discovered = prompts["RESGA along the axis"]
        prompts["best instruction"] = self.best(INSTRUCTIONS)
        prompts["random prompt"] = searched["RESGA along the axis"][1]
        with progress_bar("disturbance"):
            effects = reply_effects(self.model, neutral_texts(self.model), list(prompts.values()))
        kl = dict(zip(prompts, map(float, effects.kl), strict=True))
        edits = self.edits(kl["RESGA along the axis"])
        rows: list[HoldRow] = []
        base = self.written("test", "", None)
        methods: list[tuple[str, str, str, Intervention | None, dict[str, Any]]] = [(AS_IS, "", "", None, {})]
        for name, text in prompts.items():
            kind = PROMPT if text in (discovered, prompts["best instruction"]) else CONTROL
            facts = {"kl": kl[name]} | (
                {"target": found[text].target, "cross_entropy": found[text].cross_entropy} if text in found else {}
            )
            methods.append((name, kind, text, None, facts))
        methods += [(name, kind, "", edit, facts) for name, (kind, edit, facts) in edits.items()]
        with progress_bar("test", len(methods) + 1, unit="method") as advance:
            for name, kind, text, edit, facts in methods:
                made = base if name == AS_IS else self.written("test", text, edit)
                rows.append(self.row(name, kind, text, made, None if name == AS_IS else base, facts))
                advance(len(rows))
            plain = self.written("test", "", None, roles=False)
            rows.insert(1, self.row(NO_ROLE, CONTROL, "", plain, base, {}))
        here = self.run.axis.arrays[self.site].astype(np.float64)
        return HoldResult(
            model=self.model.name, site=self.site, cosine=cosine(here, axis), kl=kl["RESGA along the axis"],
            train_roles=tuple(dict.fromkeys(one.role for one in self.contexts["search"])),
            asked=tuple(Asked(role=c.role, attack=c.attack, question=c.question) for c in self.contexts["test"]),
            rows=tuple(rows), seed=self.options.seed,
        )  # fmt: skip

    def decision_axis(self) -> tuple[Float[np.ndarray, " D"], float]:
        """Default minus roles where replies begin, at the site, and the mean norm of the stream there."""
        chosen: dict[str, list[Transcript]] = {}
        for one in self.run.transcripts:
            some = chosen.setdefault(one.role, [])
            if len(some) < (EACH if one.role != DEFAULT else 1 << 20):
                some.append(one)
        known = {*self.run.role_vectors.names, DEFAULT}
        kept = [one for name, some in chosen.items() if name in known for one in some]
        rows = [encode_turns(self.model.tokenizer, [dict(m) for m in one.messages[:-1]]).ids for one in kept]
        ends = np.asarray([len(row) - 1 for row in rows])
        states, done = np.zeros((len(rows), self.model.config.d_model)), 0
        with progress_bar("where replies begin", len(rows), unit="rollout") as advance:
            for numbers, values in read_rows(self.model, rows, ends, direction_sites(self.model, [self.site])):
                states[numbers], done = values[0], done + len(numbers)
                advance(done)
        names = np.asarray([one.role for one in kept])
        means = {name: states[names == name].mean(0) for name in dict.fromkeys(names)}
        default = means.pop(DEFAULT)
        axis = (default - np.mean([*means.values()], axis=0)).astype(np.float32)
        return axis, float(np.linalg.norm(states, axis=1).mean())

    def searched(self, name: str, axis: Float[np.ndarray, " D"], norm: float) -> tuple[list[Prompt], str]:
        """The best prompts of the searches along a direction, best objective first, and a random prompt."""
        options, runs = self.options, list[SearchRun]()
        direction = Direction(
            delta={self.site: axis}, mean_resid_norm={self.site: norm}, n=len(self.run.transcripts),
            read_position="decision", metadata={
                "model": self.model.name, "fingerprint": self.model.fingerprint, "sign": "towards the Assistant",
                "estimator": f"{name}, where replies begin",
            },
        )  # fmt: skip
        file, conversations = self.folder / f"{name}.safetensors", self.folder / "conversations.json"
        if is_first():
            save_direction(direction, file)
        write_json(conversations, [one.messages(" {prompt}") for one in self.contexts["search"]])
        for number in range(options.searches):
            found = search(
                out=self.folder / f"search-{name}-{number}", model=self.model, conversations=conversations,
                direction=str(file), site=self.site, seed=options.seed + number, steps=options.steps,
                population=options.population, children=options.children, prompt_length=options.prompt_length,
                resume=True,
            )  # fmt: skip
            assert isinstance(found, SearchRun)
            runs.append(found)
        good = [p for run in runs for p in run.prompts if p.retokenises]
        ranked = sorted(good, key=lambda prompt: -(prompt.target or 0.0))[: options.leads * options.searches]
        if not ranked:
            raise UserError("no search found a prompt whose text gives its tokens back: search longer")
        return ranked, runs[0].controls["random"].text

    def best(self, texts: Sequence[str]) -> str:
        """The prompt whose replies to validation questions lie nearest to the Assistant."""
        return max(texts, key=lambda text: float(np.nanmean(self.written("choice", text, None).positions)))

    def written(self, which: str, prompt: str, edit: Intervention | None, *, roles: bool = True) -> _Written:
        """Greedy replies to the contexts under a prompt and an edit, placed without either; without ``roles`` the plain
        questions are asked, and their replies read where they are."""
        contexts = self.contexts[which]
        if not roles:
            contexts = [dataclasses.replace(one, system="", before="{request}") for one in contexts]
        made = generate(
            self.model, [one.messages(prompt) for one in contexts], temperature=0,
            max_new_tokens=self.options.max_new_tokens, edits=edit,
        )  # fmt: skip
        replies = tuple(text.strip() for text in made.texts)
        positions = np.full(len(replies), np.nan)
        said = [i for i, text in enumerate(replies) if text]
        passages = [
            Passage(id=str(i), messages=(*contexts[i].messages(), {"role": "assistant", "content": replies[i]}))
            for i in said
        ]
        if said:
            found = project(self.model, self.run.axis, passages, sites=self.site)
            positions[said] = [one.turns[-1].position[self.site] for one in found.passages]
        return _Written(replies=replies, positions=positions)

    def edits(self, kl: float) -> dict[str, tuple[str, Intervention, dict[str, Any]]]:
        """Caps and additions along the axis and along random directions, as strong as disturbs ordinary replies by
        ``kl`` nats, or by what comes nearest."""
        axis = self.run.axis
        other = dataclasses.replace(axis, arrays=random_arrays(axis.arrays, self.options.seed + 1), sign="random")
        found: dict[str, tuple[str, Intervention, dict[str, Any]]] = {}
        with progress_bar("edits of equal disturbance", 4, unit="edit") as advance:
            for vectors, kind, what in ((axis, EDIT, "along the axis"), (other, CONTROL, "along a random direction")):
                found[f"cap {what}"] = (kind, *self.at(kl, self.caps(vectors)))
                advance(len(found))
                found[f"addition {what}"] = (kind, *self.at(kl, self.additions(vectors.at(self.site))))
                advance(len(found))
        return found

    def caps(self, vectors: Vectors) -> dict[str, Intervention]:
        """Floors of rising height, by their name."""
        calibration = calibrate_caps(self.model, vectors, self.rollouts)
        made = {f"percentile {level:g}": calibration.caps(vectors, level) for level in LEVELS}
        top, low = (calibration.caps(vectors, level).values for level in (97.0, 25.0))
        for spread in SPREADS:
            held = {site: value + spread * (value - low[site]) for site, value in top.items()}
            made[f"percentile 97 and {spread:g} spreads"] = dataclasses.replace(made["percentile 97"], values=held)
        return {name: one.edits() for name, one in made.items()}

    def additions(self, vectors: Vectors) -> dict[str, Intervention]:
        """Pushes of rising strength, by their name."""
        return {
            f"{strength:.3g} mean norms": dataclasses.replace(vectors, coefficient_units="mean_resid_norm").edits(
                coefficient=strength
            )
            for strength in STRENGTHS
        }

    def at(self, kl: float, edits: Mapping[str, Intervention]) -> tuple[Intervention, dict[str, Any]]:
        """Of edits of rising strength the one whose disturbance is nearest to ``kl``, in logarithms.

        Disturbance rises with strength, so that few of them have to be measured.
        """
        names, measured = list(edits), dict[str, float]()

        def disturbance(name: str) -> float:
            if name not in measured:
                own = self.ordinary
                effects = side_effects(self.model, [ids for ids, _ in own], [edits[name]], counted=[m for _, m in own])
                measured[name] = float(effects.kl[0])
            return measured[name]

        above = min(bisect.bisect_left(names, kl, key=disturbance), len(names) - 1)  # the first that disturbs as much
        near = names[max(above - 1, 0) : above + 1]
        best = min(near, key=lambda name: abs(np.log(max(disturbance(name), 1e-6) / kl)))
        return edits[best], {"strength": best, "kl": measured[best]}

    @functools.cached_property
    def ordinary(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The model's own replies to ordinary requests: ids of the conversations, and which tokens are the reply's."""
        texts = neutral_texts(self.model)
        made = generate(self.model, neutral_rows(self.model, texts), temperature=0, max_new_tokens=32)
        found = []
        for text, reply in zip(texts, made.texts, strict=True):
            if reply.strip():
                said = ({"role": "user", "content": text}, {"role": "assistant", "content": reply.strip()})
                ids, spans = encode_passage(self.model, Passage(id=text, messages=said))
                found.append((ids, spans[0].mask))
        return found

    def row(
        self, name: str, kind: str, text: str, made: _Written, base: _Written | None, facts: Mapping[str, Any]
    ) -> HoldRow:
        """One method's numbers. The unit is the role, and of attacks the attack."""
        contexts = self.contexts["test"]
        attack = np.asarray([one.attack for one in contexts])
        fields: dict[str, Any] = {"position": float("nan")}
        for some, names in (
            (~attack, ("position", "moved", "moved_ci95")),
            (attack, ("attacked", "attacked_moved", "attacked_ci95")),
        ):
            if not some.any():
                continue
            mean = _by_role(contexts, made.positions, some)
            fields[names[0]] = float(np.nanmean(mean))
            if names[0] == "position":
                fields["position_ci95"] = student(mean[~np.isnan(mean)])
            if base is not None:
                change = _by_role(contexts, made.positions - base.positions, some)
                change = change[~np.isnan(change)]
                fields |= {names[1]: float(change.mean()), names[2]: student(change)}
        said = [one or "." for one in made.replies]
        relevant = relevance(self.model, [one.question for one in contexts], said)
        return HoldRow(
            name=name, kind=kind, text=text, **fields, **facts, replies=made.replies,
            relevant=float(relevant.mean()), relevant_ci95=rate_interval(relevant, [one.role for one in contexts]),
            distinct=float(np.mean([distinct_sequences(one, 3) or 1.0 for one in made.replies])),
        )  # fmt: skip


def _by_role(contexts: Sequence[Context], values: np.ndarray, some: np.ndarray) -> np.ndarray:
    """Means of the roles; NaN where nothing was said."""
    names = np.asarray([one.role for one in contexts])
    with np.errstate(invalid="ignore"):
        groups = [values[(names == name) & some] for name in dict.fromkeys(names[some])]
        return np.asarray([group[~np.isnan(group)].mean() if (~np.isnan(group)).any() else np.nan for group in groups])
