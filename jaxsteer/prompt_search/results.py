"""What a search found, problem by problem and over many."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, SupportsIndex

import jax
import numpy as np

from jaxsteer.errors import UserError
from jaxsteer.files import parse_json
from jaxsteer.prompt_search.compiling import MemoryPlan
from jaxsteer.prompt_search.pareto import Archive, frontier
from jaxsteer.prompts import PAD


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredPrompt:
    """One prompt of a result: its ids, scores, the step that found it and whether its text gives the same ids."""

    ids: tuple[int, ...]
    target: float
    cross_entropy: float
    step: int
    problem: int
    retokenises: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class WaveResult:
    """What the n problems of a wave found, on the host."""

    archive: Archive
    """NumPy arrays with a leading n axis."""
    rejected: tuple[ScoredPrompt, ...]
    kept: Any
    """A tree of NumPy arrays with a leading n axis."""
    steps: int
    seconds: float
    """From the start of the search to the end of this wave."""
    interrupted: bool = False

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything that a file keeps, by names."""
        kept = {f"kept{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(self.kept))}
        notes = {"rejected": to_json(self.rejected), "steps": self.steps, "seconds": self.seconds}
        archive = {name: getattr(self.archive, name) for name in ("ids", "f", "x", "step")}
        return {**archive, **kept, "notes": np.asarray(json.dumps(notes))}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], kept: jax.tree_util.PyTreeDef) -> WaveResult:
        """What ``to_arrays`` made; ``kept`` is the structure of that field. Raises ``UserError`` for anything else."""
        try:
            notes = parse_json(str(arrays["notes"]), "the notes of a finished wave")
            leaves = [arrays[name] for name in sorted(arrays) if name.startswith("kept")]
            return cls(
                archive=Archive(*(jax.tree.map(np.asarray, arrays[name]) for name in ("ids", "f", "x", "step"))),
                rejected=tuple(from_json(notes["rejected"])),
                kept=jax.tree.unflatten(kept, leaves),
                steps=int(notes["steps"]),
                seconds=float(notes["seconds"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"what was kept of a finished wave is damaged ({error!r}): leave out --resume to begin again"
            ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found, problem by problem (R problems, archives of A prompts)."""

    archive: Archive
    """NumPy arrays with a leading R axis: every problem's Pareto frontier. Only of problems that were searched: an
    interrupted search has fewer."""
    rejected: tuple[ScoredPrompt, ...]
    """Prompts that were on an archive until their text was found not to re-tokenise."""
    kept: Any
    """What ``keep`` made of the last states, as NumPy arrays with a leading R axis."""
    plan: MemoryPlan
    steps: int
    """Steps of every problem; of the problems searched last, if the search was interrupted."""
    candidates: int
    compile_s: float
    search_s: float
    interrupted: bool

    @property
    def prompts(self) -> tuple[ScoredPrompt, ...]:
        """The Pareto frontier over all problems, as ``frontier`` gives it."""
        return self.frontier(range(len(self.archive.f)))

    def of(self, problems: Sequence[int]) -> SearchResult:
        """The result of some of the problems, numbered anew; ``candidates`` stays that of all."""
        rows = [problem for problem in problems if problem < len(self.archive.f)]
        numbers = {problem: number for number, problem in enumerate(rows)}
        return dataclasses.replace(
            self,
            archive=jax.tree.map(lambda a: a[rows], self.archive),
            kept=jax.tree.map(lambda a: a[rows], self.kept),
            rejected=tuple(
                dataclasses.replace(entry, problem=numbers[entry.problem])
                for entry in self.rejected
                if entry.problem in numbers
            ),
        )

    def frontier(self, problems: Sequence[int]) -> tuple[ScoredPrompt, ...]:
        """The Pareto frontier over some problems, best target first, and after it the prompts that would have been on
        it if their text re-tokenised."""
        chosen = [problem for problem in problems if problem < len(self.archive.f)]
        kept = [
            prompt_at(self.archive, problem, row, number=problem, retokenises=True)
            for problem in chosen
            for row in np.flatnonzero(np.isfinite(self.archive.f[problem]))
        ]
        good = [kept[i] for i in _frontier_of(kept)]
        wanted = set(chosen)
        # By their ids: several problems may have met the same prompt.
        broken = {entry.ids: entry for entry in self.rejected if entry.problem in wanted}
        everything = kept + list(broken.values())
        marked = [everything[i] for i in _frontier_of(everything) if not everything[i].retokenises]
        return (*good, *marked)


def joined(waves: Sequence[WaveResult]) -> WaveResult:
    """Waves as one, in their order."""
    archive, kept = (
        jax.tree.map(lambda *leaves: np.concatenate(leaves), *trees)
        for trees in ([wave.archive for wave in waves], [wave.kept for wave in waves])
    )
    return WaveResult(
        archive=archive,
        rejected=tuple(entry for wave in waves for entry in wave.rejected),
        kept=kept,
        steps=waves[-1].steps,
        seconds=waves[-1].seconds,
        interrupted=waves[-1].interrupted,
    )


def prompt_at(
    archive: Archive, problem: SupportsIndex, row: SupportsIndex, *, number: int, retokenises: bool
) -> ScoredPrompt:
    """A row of one problem's archive; the problem's own number is ``number``."""
    return ScoredPrompt(
        ids=tuple(int(i) for i in archive.ids[problem, row] if i != PAD),
        target=float(archive.f[problem, row]),
        cross_entropy=float(archive.x[problem, row]),
        step=int(archive.step[problem, row]),
        problem=number,
        retokenises=retokenises,
    )


def to_json(entries: Sequence[ScoredPrompt]) -> list[dict[str, Any]]:
    """Prompts as JSON objects."""
    return [dataclasses.asdict(entry) for entry in entries]


def from_json(rows: Sequence[dict[str, Any]]) -> list[ScoredPrompt]:
    """What ``to_json`` made."""
    return [ScoredPrompt(**{**row, "ids": tuple(row["ids"])}) for row in rows]


def _frontier_of(entries: Sequence[ScoredPrompt]) -> np.ndarray:
    if not entries:
        return np.zeros(0, int)
    return frontier(np.array([e.target for e in entries]), np.array([e.cross_entropy for e in entries]))
