"""``run``: from roles to the assistant axis of a model, in one directory that can be resumed.

1. Rollouts: every question in every role (``rollouts``).
2. Scores: which of them are in their role, where a judge is given (``scoring``).
3. States: the mean over what the assistant said, at every block (``states``).
4. Geometry: role vectors, the axis, principal components, intervals and controls (``analysis``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from threadpoolctl import threadpool_limits

from jaxsteer.axis import analysis, scoring
from jaxsteer.axis.geometry import COMPONENTS, cosine, exchanged
from jaxsteer.axis.places import Layer, Place
from jaxsteer.axis.projection import AXIS
from jaxsteer.axis.result import AxisResult, Filter, Reply
from jaxsteer.axis.role_files import load_roles
from jaxsteer.axis.role_vectors import RoleVectors, load_role_vectors
from jaxsteer.axis.roles import RoleSet
from jaxsteer.axis.rollouts import WritingOptions, plan, read_transcripts, require_template, write_rollouts
from jaxsteer.axis.states import States, read_states
from jaxsteer.axis.transcripts import DEFAULT, Transcript
from jaxsteer.errors import UserError, refuse_unknown
from jaxsteer.models.model import Model
from jaxsteer.models.sites import resid_site
from jaxsteer.processes import is_first
from jaxsteer.ranges import Seed, check_ranges
from jaxsteer.runs.bars import load, progress_bar
from jaxsteer.runs.files import JUDGED, write_json, write_lines
from jaxsteer.runs.folder import RunFolder, opened
from jaxsteer.statistics import spearman
from jaxsteer.steer import Vectors, load_vectors, save_vectors
from jaxsteer.study.measure import judge_config
from jaxsteer.study.outcome import environment
from jaxsteer.writers.judge import Rubric

log = logging.getLogger(__name__)

ROLES, TRANSCRIPTS, WRITTEN, STATES = "roles.json", "transcripts.jsonl", "rollouts", "states"
VECTORS = "role_vectors.safetensors"
SMALL = 1 << 20
"""Numbers in the vectors of all roles at a block, below which threads of linear algebra only wait for each other."""
EXAMPLES = 4
"""Roles at each end of which replies are shown."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxisOptions:
    """How characters are asked for, judged and placed."""

    writing: WritingOptions = WritingOptions()
    """How rollouts are written."""
    judge: scoring.Judge | None = None
    """Who says which rollouts are in their role: a writer, "words" (a rule that needs none), or nobody."""
    rubric: Rubric = scoring.IN_ROLE
    """What a judge is asked; facts: role, rubric, question, answer."""
    keep: int = scoring.FULLY
    """Of judged rollouts, those with at least this score make the vectors."""
    least: int = 5
    """Rollouts that a role needs, or it is left out. (The paper: 10, its code: 50.)"""
    layers: tuple[int, ...] = ()
    """Blocks to look at (default: all)."""
    target: int | None = None
    """Block at which roles are placed (default: where the axes of two halves of the questions agree best)."""
    seed: Seed = 0
    """Seed of halves, bootstrap draws and controls."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class AxisRun:
    """A finished run: its result, its vectors and its rollouts."""

    result: AxisResult
    axis: Vectors
    """At every block, towards the Assistant."""
    role_vectors: RoleVectors
    transcripts: tuple[Transcript, ...]
    """All rollouts, with scores where a judge gave them."""

    def _repr_html_(self) -> str:
        return self.result._repr_html_()


def run(
    model: str | Model,
    roles: str | Path | RoleSet = "default",
    *,
    options: AxisOptions | None = None,
    transcripts: str | Path | Sequence[Transcript] | None = None,
    out: str | Path | None = None,
    say: Callable[[str], None] = log.info,
    **changed: Any,
) -> AxisRun:
    """The assistant axis of ``model`` among ``roles`` (the shipped ones, a file, or a ``RoleSet``).

    ``changed`` are fields of ``options``. ``transcripts`` are rollouts that exist already, written by whatever model,
    as a JSON Lines file or as objects; their questions are told apart by number. ``out`` is a directory for all that is
    made (docs/assistant-axis.md); the same call, cut off, goes on there and gives the same files. ``say`` takes a line
    about what is to come.

    Raises ``UserError`` before anything is written for a model without chat template, roles that cannot be read,
    blocks that the model does not have, and rollouts of roles that are not among ``roles``; and for too few roles, a
    judge that tells nothing apart, and roles that are all the same.
    """
    refuse_unknown(changed, [f.name for f in dataclasses.fields(AxisOptions)], "option of axis.run")
    chosen = dataclasses.replace(options or AxisOptions(), **changed)
    for one in (chosen, chosen.writing):
        check_ranges(one)
    roles = roles if isinstance(roles, RoleSet) else load_roles(roles)
    brought = None if transcripts is None else _brought(transcripts, roles)
    config = {
        "kind": "axis",
        "model": model if isinstance(model, str) else [model.name, model.fingerprint],
        "roles": roles.data_hash,
        "transcripts": None if brought is None else _hash(brought),
        **dataclasses.asdict(chosen.writing),
        **{name: getattr(chosen, name) for name in ("keep", "least", "layers", "target", "seed")},
        **judge_config(None if isinstance(chosen.judge, str) else chosen.judge, chosen.rubric),
    } | ({"judge": chosen.judge} if isinstance(chosen.judge, str) else {})
    with _folder(out, config, say) as folder:
        if folder.finished is not None:
            return load_run(folder.path)
        _require_enough(roles, chosen, brought)
        ready = load(model) if isinstance(model, str) else model
        require_template(ready)
        sites = _sites(ready, chosen)
        say(cost(ready, roles, len(sites), chosen.writing, brought))
        folder.begin()
        write_json(folder.path / ROLES, roles.to_json())
        found = _found(ready, roles, brought, sites, chosen, folder.path)
        folder.finish(found.result)
        if is_first():  # they stand in the transcripts
            shutil.rmtree(folder.path / WRITTEN, ignore_errors=True)
        return found


def _require_enough(roles: RoleSet, options: AxisOptions, brought: Sequence[Transcript] | None) -> None:
    """Refuse rollouts that are too few whatever they say, before any is written or read."""
    asked = plan(roles, options.writing, "") if brought is None else brought
    counts = Counter(one.role for one in asked)
    if counts[DEFAULT] < options.least:
        raise UserError(
            f"the Assistant as it is would have {counts[DEFAULT]} rollouts and needs at least {options.least}: ask "
            "more questions or default prompts, or bring its rollouts under the role 'default'"
        )
    enough = [role.name for role in roles.roles if counts[role.name] >= options.least]
    if len(enough) <= COMPONENTS:
        raise UserError(
            f"{len(enough)} of {len(roles.roles)} roles would have the {options.least} rollouts that a role needs, and "
            f"an axis needs {COMPONENTS + 1} such roles: ask more roles, questions or instructions, or lower least"
        )


def cost(
    model: Model, roles: RoleSet, sites: int, options: WritingOptions, transcripts: Sequence[Transcript] | None = None
) -> str:
    """What a run takes, in words: rollouts, tokens, arithmetic, and room on disk."""
    asked = len(plan(roles, options, model.name)) if transcripts is None else len(transcripts)
    turns = 1 + len(roles.follow_ups)
    most = asked * turns * options.max_new_tokens
    weights = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    room = asked * sites * model.config.d_model * 4
    traits = f", {len(roles.traits)} traits on both sides" if roles.traits else ""
    written = "" if transcripts is not None else f", at most {most:,} tokens to be written"
    return (
        f"{len(roles.roles)} roles and the Assistant{traits}, {len(roles.questions)} questions: {asked:,} rollouts"
        f"{written}, about {4 * most * weights / 1e12:,.0f} TFLOP; states of {sites} blocks, {room / 1e6:,.0f} MB"
    )


@contextlib.contextmanager
def _folder(out: str | Path | None, config: dict[str, Any], say: Callable[[str], None]) -> Iterator[RunFolder]:
    """The directory of the run, or one that goes again."""
    with contextlib.ExitStack() as held:
        place = Path(held.enter_context(tempfile.TemporaryDirectory()) if out is None else out)
        yield held.enter_context(opened(place, config, say))


def load_run(folder: str | Path) -> AxisRun:
    """The run in a directory of ``jaxsteer axis run``. Raises ``UserError`` where none was finished."""
    path = Path(folder)
    return AxisRun(
        result=AxisResult.read(path),
        axis=load_vectors(path / AXIS),
        role_vectors=load_role_vectors(path / VECTORS),
        transcripts=tuple(read_transcripts(path / TRANSCRIPTS)),
    )


def _sites(model: Model, options: AxisOptions) -> list[str]:
    depth = model.config.n_layers
    wanted = options.layers or tuple(range(depth))
    for layer in (*wanted, *(() if options.target is None else (options.target,))):
        if not 0 <= layer < depth:
            raise UserError(f"there is no block {layer}: {model.name} has blocks 0 to {depth - 1}")
    if options.target is not None and options.target not in wanted:
        raise UserError(f"the target {options.target} is not among the blocks that are looked at: {list(wanted)}")
    return [resid_site(layer) for layer in sorted(set(wanted))]


def _brought(transcripts: str | Path | Sequence[Transcript], roles: RoleSet) -> list[Transcript]:
    """Rollouts that exist already. Raises ``UserError`` for roles and questions that are not in the set."""
    found = read_transcripts(transcripts) if isinstance(transcripts, str | Path) else list(transcripts)
    if not found:
        raise UserError("there is no rollout among the transcripts: expected one JSON object with 'messages' a line")
    sides = {f"{trait.name}{sign}" for trait in roles.traits for sign in "+-"}
    known = {DEFAULT, *sides, *(role.name for role in roles.roles)}
    for i, one in enumerate(found):
        if one.role not in known:
            raise UserError(
                f"rollout {i} is of the role {one.role!r}, which is not in {roles.name}: give the roles of these "
                "rollouts (--roles FILE)"
            )
        if one.question >= len(roles.questions):
            raise UserError(
                f"rollout {i} is of question {one.question}, but {roles.name} has questions 0 to "
                f"{len(roles.questions) - 1}: give the questions of these rollouts (--roles FILE)"
            )
        if not one.said.strip() and not any(turn.get("role") == "assistant" for turn in one.messages):
            raise UserError(f"rollout {i} ({one.role}) has no turn of the assistant")
    return found


def _hash(transcripts: Sequence[Transcript]) -> str:
    return hashlib.sha256(json.dumps([one.to_json() for one in transcripts]).encode()).hexdigest()


def _found(
    model: Model,
    roles: RoleSet,
    brought: list[Transcript] | None,
    sites: list[str],
    options: AxisOptions,
    path: Path,
) -> AxisRun:
    """All four stages."""
    seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(what: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        seconds[what] = round(time.monotonic() - began, 1)

    written = brought
    if written is None:
        with timed("rollouts"), progress_bar("rollouts", len(plan(roles, options.writing, model.name))) as advance:
            written = write_rollouts(model, roles, options.writing, path / WRITTEN, progress=advance)
    if options.judge is not None:
        with timed("judge"), progress_bar("judge", unit="reply") as advance:
            written = scoring.scored(
                written, roles, options.judge, rubric=options.rubric, log=path / JUDGED, progress=advance
            )
    write_lines(path / TRANSCRIPTS, [one.to_json() for one in written])
    with timed("states"), progress_bar("states", len(written), unit="rollout") as advance:
        states = read_states(model, written, sites, path / STATES, progress=advance)
    with timed("geometry"):
        result, vectors = analysed(model, roles, written, states, options)
    result = dataclasses.replace(result, seconds=seconds)
    plain = np.asarray([written[row].role == DEFAULT for row in states.rows()])
    axis = vectors.axis(lambda site: states.at(site)[plain], result.target)
    if is_first():
        vectors.save(path / VECTORS)
        save_vectors(axis, path / AXIS)
    return AxisRun(result=result, axis=axis, role_vectors=vectors, transcripts=tuple(written))


def analysed(
    model: Model, roles: RoleSet, transcripts: Sequence[Transcript], states: States, options: AxisOptions
) -> tuple[AxisResult, RoleVectors]:
    """The result and the role vectors of rollouts whose states are read."""
    with threadpool_limits(1 if model.config.d_model * len(roles.roles) < SMALL else None):
        return _analysed(model, roles, transcripts, states, options)


def _analysed(
    model: Model, roles: RoleSet, transcripts: Sequence[Transcript], states: States, options: AxisOptions
) -> tuple[AxisResult, RoleVectors]:
    rows = states.rows()
    keep = None if options.judge is None else options.keep
    rollouts, few = analysis.Rollouts.of(transcripts, rows, roles, least=options.least, keep=keep)
    with progress_bar("blocks", len(states.sites), unit="block") as advance:
        blocks = analysis.read_blocks(states, rollouts, seed=options.seed, progress=advance)
    target = (
        analysis.best_block(blocks, model.config.n_layers)
        if options.target is None
        else next(block for block in blocks if block.site == resid_site(options.target))
    )
    default, places = analysis.places(target, states, rollouts, seed=options.seed)
    order = [[role.name for role in rollouts.roles].index(place.name) for place in places]
    layers = list[Layer]()
    with progress_bar("controls", len(blocks), unit="block") as advance:
        for block in blocks:
            layers.append(analysis.layer_of(block, blocks, states, rollouts, order, seed=options.seed))
            advance(len(layers))
    result = AxisResult(
        model=model.name,
        fingerprint=model.fingerprint,
        roleset=roles.name,
        roleset_hash=roles.data_hash,
        rollouts=len(rows),
        silent=len(transcripts) - len(rows),
        questions=len(roles.questions),
        target=target.site,
        chosen=options.target is None,
        layers=tuple(layers),
        roles=tuple(places),
        default=default,
        traits=tuple(analysis.trait_places(target, states, rollouts, seed=options.seed)),
        left_out=few,
        filter=None if keep is None else _filter(transcripts, states, roles, target, rollouts, options),
        rating_p=_rating_p(places, options.seed),
        replies=_replies(transcripts, places),
        environment=environment(model),
    )
    vectors = RoleVectors(
        names=tuple(role.name for role in rollouts.roles),
        arrays={block.site: block.geometry.vectors for block in blocks},
        errors={block.site: block.errors for block in blocks},
        stream={block.site: block.stream for block in blocks},
        model=model.name,
        fingerprint=model.fingerprint,
    )
    return result, vectors


def _rating_p(places: Sequence[Place], seed: int) -> float | None:
    rated = [(place.position, place.assistant_like) for place in places if place.assistant_like is not None]
    if len(rated) < 4:
        return None
    position, rating = (np.asarray(column, np.float64) for column in zip(*rated, strict=True))
    return exchanged(position, rating, seed=seed)


def _filter(
    transcripts: Sequence[Transcript],
    states: States,
    roles: RoleSet,
    target: analysis.Block,
    kept: analysis.Rollouts,
    options: AxisOptions,
) -> Filter:
    """What the filter changes at the target block."""
    whole, _ = analysis.Rollouts.of(transcripts, states.rows(), roles, least=1)
    every = analysis.Geometry.of(whole.means(states.at(target.site)).vectors())
    names = [role.name for role in whole.roles]
    at = [names.index(role.name) for role in kept.roles]
    return Filter(
        judge=options.judge if isinstance(options.judge, str) else getattr(options.judge, "name", ""),
        keep=options.keep,
        scores=scoring.counts(transcripts, roles),
        kept=int(kept.counts[:-1].sum()),
        cosine=cosine(every.axis, target.geometry.axis),
        order=spearman(every.positions[at], target.geometry.positions[:-1]),
    )


def _replies(transcripts: Sequence[Transcript], places: Sequence[Place]) -> tuple[Reply, ...]:
    """Replies of the Assistant and of roles at both ends to the first two questions that the Assistant answered."""
    ends = places if len(places) <= 2 * EXAMPLES else (*places[:EXAMPLES], *places[-EXAMPLES:])
    asked = list(dict.fromkeys(one.question for one in transcripts if one.role == DEFAULT and one.said))[:2]
    first = {(one.role, one.question): one for one in reversed(transcripts) if one.said}
    some = [first.get((name, at)) for name in (DEFAULT, *(place.name for place in ends)) for at in asked]
    return tuple(Reply(role=one.role, question=one.asked, text=one.said[:400]) for one in some if one is not None)
