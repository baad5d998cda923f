"""``jaxsteer organism``: the small models that ship with the package, trained again and checked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import subcommand

from jaxsteer.errors import UserError
from jaxsteer.ranges import Seed
from jaxsteer.runs.files import document


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Train an organism that ships with the package again, from its recipe. What was interrupted goes on."""

    out: Path
    """Directory to write in Hugging Face format."""
    organism: Literal["llama", "qwen2", "gemma3", "persona"] = "llama"
    """Which of them."""
    seed: Seed = 0
    """Seed of corpus, weights and order."""

    def run(self) -> int:
        """Train with a progress bar; an unfinished run goes on."""
        from jaxsteer.organisms.architectures import RECIPES
        from jaxsteer.organisms.train import STATE_FILE, steps_at_most, train_organism
        from jaxsteer.runs.bars import progress_bar

        if (
            self.out.exists()
            and not (self.out / STATE_FILE).is_file()
            and (not self.out.is_dir() or any(self.out.iterdir()))
        ):
            raise UserError(f"--out {self.out} exists already: give a new directory")
        recipe = RECIPES[self.organism]
        with progress_bar("train", steps_at_most(recipe), unit="step") as advance:

            def report(state: dict[str, Any]) -> None:
                letters = {name: f"{loss:.2f}" for name, loss in state["letters"].items()}
                advance(state["step"], phase=state["phase"], loss=f"{state['loss']:.3f}", **letters)

            train_organism(self.out, seed=self.seed, recipe=recipe, progress=report)
        print(f"Wrote {self.out}. Check it: jaxsteer organism check --model {self.out}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """Measure what an organism must show; exit status 1 when a gate is missed."""

    model: str = "organism:llama"
    """The organism."""
    behaviours: tuple[Literal["sycophancy", "hallucination", "myopic"], ...] = (
        "sycophancy",
        "hallucination",
        "myopic",
    )
    """Behaviours to check, of organisms that answer with choices."""
    n: int = 120
    """Questions per behaviour, each in both choice orders; of organism:persona, requests of each sort."""
    random: int = 200
    """Random prompts for the share that flips by luck."""
    replies: int = 400
    """Of organism:persona, sampled replies of each role."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        """Measure and print."""
        from jaxsteer.evals.organism_gates import failed, gates_table, organism_gates, to_json
        from jaxsteer.evals.persona_gates import is_persona_organism, persona_gates
        from jaxsteer.runs.bars import load, progress_bar

        model = load(self.model)
        with progress_bar("gates") as advance:

            def report(what: str) -> None:
                advance(0, measuring=what)

            if is_persona_organism(model):
                gates = persona_gates(model, n=self.n, replies=self.replies, progress=report)
            else:
                gates = organism_gates(model, behaviours=self.behaviours, n=self.n, random=self.random, progress=report)
        missed = failed(gates)
        if self.json:
            print(document({"model": model.name, "passed": not missed, "gates": to_json(gates)}))
        else:
            required = sum(gate.bounded for gate in gates)
            print(f"{gates_table(gates)}\n\n{required - len(missed)} of {required} gates passed")
        return 1 if missed else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Organism:
    """The small models with known personas that ship with the package."""

    action: Annotated[Train, subcommand("train")] | Annotated[Check, subcommand("check")]

    def run(self) -> int:
        """Run the chosen action."""
        return self.action.run()
