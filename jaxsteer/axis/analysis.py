"""From states of rollouts to an ``AxisResult``: the geometry of every block with its controls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from jaxsteer.axis.geometry import Agreement, Geometry, Means, agreement, contrasts, cosine, pivotal
from jaxsteer.axis.places import Layer, Place, TraitPlace
from jaxsteer.axis.roles import Role, RoleSet
from jaxsteer.axis.states import States
from jaxsteer.axis.transcripts import DEFAULT, Transcript
from jaxsteer.errors import UserError
from jaxsteer.models.sites import resid_site
from jaxsteer.statistics import spearman

SPLITS, DRAWS, TARGET_DRAWS = 20, 200, 1000
"""Random halvings of the questions, and bootstrap draws at every block and at the target."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Rollouts:
    """Rollouts with states as numbers: entry i belongs to row i of the states."""

    roles: tuple[Role, ...]
    """Those that have enough rollouts."""
    traits: tuple[str, ...]
    questions: int
    role: Int[np.ndarray, " n"]
    """Number of the role, that of the Assistant being their count; -1 for what is left out or of a trait."""
    side: Int[np.ndarray, " n"]
    """2 k for the positive and 2 k + 1 for the negative side of trait k; -1 for all others."""
    question: Int[np.ndarray, " n"]

    @classmethod
    def of(
        cls,
        transcripts: Sequence[Transcript],
        rows: Int[np.ndarray, " n"],
        roles: RoleSet,
        *,
        least: int,
        keep: int | None = None,
    ) -> tuple[Rollouts, dict[str, int]]:
        """Of the transcripts with states (``rows``), without roles that have fewer than ``least`` rollouts; and these,
        with how many they have. With ``keep`` a rollout of a role needs at least that score.

        Raises ``UserError`` where the Assistant has fewer than ``least``.
        """
        named = [transcripts[row] for row in rows]
        kept = [one.role == DEFAULT or keep is None or (one.score is not None and one.score >= keep) for one in named]
        counts = {name: 0 for name in (DEFAULT, *(role.name for role in roles.roles))}
        for one, good in zip(named, kept, strict=True):
            if good and one.role in counts:
                counts[one.role] += 1
        if counts[DEFAULT] < least:
            raise UserError(
                f"the Assistant as it is has {counts[DEFAULT]} rollouts that say something and needs at least {least}: "
                "ask more questions, or give its rollouts under the role 'default'"
            )
        few = {name: n for name, n in counts.items() if n < least}
        left = tuple(role for role in roles.roles if role.name not in few)
        number = {role.name: i for i, role in enumerate(left)} | {DEFAULT: len(left)}
        sides = {f"{t.name}{sign}": 2 * i + (sign == "-") for i, t in enumerate(roles.traits) for sign in "+-"}
        found = cls(
            roles=left,
            traits=tuple(trait.name for trait in roles.traits),
            questions=len(roles.questions),
            role=np.asarray([number.get(one.role, -1) if good else -1 for one, good in zip(named, kept, strict=True)]),
            side=np.asarray([sides.get(one.role, -1) for one in named]),
            question=np.asarray([one.question for one in named]),
        )
        return found, few

    def means(self, states: Float[np.ndarray, "n D"]) -> Means:
        """Of the roles, the Assistant last."""
        return Means.of(states, self.role, self.question, len(self.roles), self.questions)

    def sides(self, states: Float[np.ndarray, "n D"]) -> Means:
        """Of the sides of the traits."""
        return Means.of(states, self.side, self.question, 2 * len(self.traits) - 1, self.questions)

    @property
    def counts(self) -> Int[np.ndarray, " A"]:
        """Rollouts of every role, the Assistant last."""
        return np.bincount(self.role[self.role >= 0], minlength=len(self.roles) + 1)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """What stays in memory of one block."""

    site: str
    geometry: Geometry
    errors: Float[np.ndarray, "A D"]
    """Standard errors of the vectors over questions."""
    stream: float
    """Mean norm of what is read."""
    halves: Agreement


def read_blocks(
    states: States, rollouts: Rollouts, *, seed: int, progress: Callable[[int, int], None] | None = None
) -> list[Block]:
    """The vectors and the axis of every block. Raises ``UserError`` as ``Geometry.of`` and ``agreement`` do."""
    found = []
    for i, site in enumerate(states.sites):
        values = states.at(site)
        means = rollouts.means(values)
        found.append(
            Block(
                site=site,
                geometry=Geometry.of(means.vectors()),
                errors=means.errors(),
                stream=float(np.linalg.norm(values.astype(np.float64), axis=1).mean()),
                halves=agreement(means, SPLITS, seed),
            )
        )
        if progress is not None:
            progress(i + 1, len(states.sites))
    return found


def best_block(blocks: Sequence[Block], depth: int) -> Block:
    """Where the axes of two halves of the questions agree best, the last of ``depth`` blocks left out unless it
    is alone: its output is about the next token, and an edit there changes no state that a later token reads."""
    inner = [block for block in blocks if block.site != resid_site(depth - 1)] or blocks
    return max(inner, key=lambda block: block.halves.cosine)


def layer_of(
    block: Block, blocks: Sequence[Block], states: States, rollouts: Rollouts, order: Sequence[int], *, seed: int
) -> Layer:
    """The numbers of one block with their intervals and controls; ``order`` is that of the roles in the result."""
    means, here = rollouts.means(states.at(block.site)), block.geometry
    drawn = [Geometry.of(means.vectors(weights)) for weights in means.draws(DRAWS, seed)]
    base = contrasts(here.vectors)
    other = blocks[(blocks.index(block) + len(blocks) // 2) % len(blocks)].geometry
    rating = np.asarray([-1 if role.assistant_like is None else role.assistant_like for role in rollouts.roles])
    known = rating >= 0
    score = {
        name: spearman(values[:-1][known], rating[known]) if known.sum() > 3 else None
        for name, values in (("rating", here.positions), ("pc1_rating", here.loadings[:, 0]))
    }
    return Layer(
        site=block.site,
        of_stream=float(np.linalg.norm(here.axis)) / block.stream,
        halves=block.halves.cosine,
        halves_spread=block.halves.cosine_spread,
        order=block.halves.order,
        order_spread=block.halves.order_spread,
        shuffled_order=float(np.mean([agreement(means.shuffled(k), 1, k).order for k in range(seed, seed + SPLITS)])),
        other_order=spearman(here.positions[:-1], here.along(other.axis)[:-1]),
        cosine=float(here.cosines[0]),
        cosine_ci95=pivotal(float(here.cosines[0]), [one.cosines[0] for one in drawn], 0, 1),
        cosines=tuple(map(float, here.cosines)),
        scaled_cosine=float(Geometry.of(here.vectors, scaled=True).cosines[0]),
        base_cosine=float(np.median(base)),
        base_share=float((base < here.cosines[0]).mean()),
        explained=tuple(map(float, here.explained[:10])),
        needed=here.needed,
        edge=float(here.edge[0]),
        edge_ci95=pivotal(float(here.edge[0]), [one.edge[0] for one in drawn]),
        rating=score["rating"],
        pc1_rating=score["pc1_rating"],
        positions=tuple(float(here.positions[i]) for i in order),
        pc1=tuple(float(here.loadings[i, 0]) for i in order),
    )


def places(block: Block, states: States, rollouts: Rollouts, *, seed: int) -> tuple[Place, list[Place]]:
    """The Assistant and the roles at one block, from the Assistant's end to the other."""
    means, here = rollouts.means(states.at(block.site)), block.geometry
    drawn = [Geometry.of(means.vectors(weights)) for weights in means.draws(TARGET_DRAWS, seed)]
    positions, pc1 = np.stack([one.positions for one in drawn]), np.stack([one.loadings[:, 0] for one in drawn])
    counts = rollouts.counts
    found = []
    for i, role in enumerate((*rollouts.roles, Role(name=DEFAULT, instructions=("-",)))):
        found.append(
            Place(
                name=role.name,
                family=role.family,
                human=role.human,
                assistant_like=role.assistant_like,
                rollouts=int(counts[i]),
                position=float(here.positions[i]),
                ci95=pivotal(float(here.positions[i]), positions[:, i]),
                pc1=float(here.loadings[i, 0]),
                pc1_ci95=pivotal(float(here.loadings[i, 0]), pc1[:, i]),
                pc2=float(here.loadings[i, 1]),
            )
        )
    return found[-1], sorted(found[:-1], key=lambda place: -place.position)


def trait_places(block: Block, states: States, rollouts: Rollouts, *, seed: int) -> list[TraitPlace]:
    """The traits that have rollouts on both sides beside the axis, by their cosine with it."""
    if not rollouts.traits:
        return []
    values = states.at(block.site)
    sides, means = rollouts.sides(values), rollouts.means(values)

    def beside(weights: np.ndarray | None) -> np.ndarray:
        vectors, axis = sides.vectors(weights), Geometry.of(means.vectors(weights)).axis
        return np.asarray([cosine(one, axis) for one in vectors[0::2] - vectors[1::2]])

    found = beside(None)
    drawn = np.stack([beside(weights) for weights in means.draws(DRAWS, seed)])
    norms = np.linalg.norm(np.subtract(*(sides.vectors()[i::2] for i in (0, 1))), axis=1) / block.stream
    made = [
        TraitPlace(
            name=name,
            cosine=float(found[i]),
            ci95=pivotal(float(found[i]), drawn[:, i], -1, 1),
            of_stream=float(norms[i]),
        )
        for i, name in enumerate(rollouts.traits)
        if np.isfinite(found[i]) and np.isfinite(drawn[:, i]).all()
    ]
    return sorted(made, key=lambda place: -place.cosine)
