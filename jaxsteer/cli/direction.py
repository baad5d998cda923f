"""``jaxsteer direction``: where an objective ranks prompts as behaviour does, and what a direction file holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, subcommand

from jaxsteer.ranges import Seed
from jaxsteer.runs.files import document


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """Where does an objective rank prompts as behaviour does? Rank correlations by site, position and sign."""

    model: str = "organism:llama"
    """organism:NAME (llama, qwen2, gemma3, persona), a checkpoint, a Hugging Face directory, .gguf file or hub id."""
    persona: str = "sycophancy"
    """Built-in name, a public dataset (`jaxsteer data list`) or the path of a dataset."""
    read_positions: tuple[Literal["published", "matched", "decision"], ...] = ("published", "matched", "decision")
    """Read positions to compare."""
    style: Literal["chat", "plain"] = "chat"
    """Chat template of the model, or plain text."""
    slot: Literal["suffix", "prefix", "system", "system-suffix"] = "suffix"
    """Where the prompt stands."""
    prompt_length: int = 8
    """Tokens of the random prompts."""
    prompts: int = 240
    """Random prompts."""
    tokens: Literal["words", "ascii", "all"] = "words"
    """Tokens of the random prompts, as in search."""
    seed: Seed = 0
    """Seed of the random prompts."""
    split_seed: Seed = 0
    """Seed of the division into train, validation and test questions."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        """Probe and print."""
        from jaxsteer.cli.tables import probe_table
        from jaxsteer.prompts import Placement
        from jaxsteer.study.probe import Extent, choose
        from jaxsteer.study.probing import probe_positions

        probe = probe_positions(
            self.model,
            self.persona,
            self.read_positions,
            placement=Placement(style=self.style, slot=self.slot),
            length=self.prompt_length,
            tokens=self.tokens,
            split_seed=self.split_seed,
            extent=Extent(prompts=self.prompts, seed=self.seed),
        )
        chosen = choose(probe.rows)
        if self.json:
            print(document({**probe.to_json(), "chosen": dataclasses.asdict(chosen)}))
        else:
            print(probe_table(probe, chosen))
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Show:
    """Print what a direction file holds: sites, norms, where and how it was made."""

    file: Positional[Path]
    """direction.safetensors of a run."""

    def run(self) -> int:
        """Read and print."""
        from jaxsteer.cli.tables import direction_table
        from jaxsteer.personas import load_direction

        print(direction_table(load_direction(self.file)))
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Vectors of a trait from answers under instructions for and against it, as a judge scores them."""

    trait: Positional[Path]
    """Trait file of persona_vectors' layout: instruction, questions, eval_prompt."""
    out: Path
    """Directory for answers and scores as they come, and for the vectors; what was cut off there goes on."""
    judge: str
    """OpenAI-compatible address of the judge, e.g. http://127.0.0.1:8000/v1."""
    judge_model: str = ""
    """Name of the judge there (default: the first that it lists)."""
    model: str = "organism:llama"
    """organism:NAME, a converted checkpoint, a Hugging Face directory, a .gguf file, or a hub id."""
    samples: int = 1
    """Answers to each question under each instruction: greedy for one, else drawn at temperature 1."""
    max_new_tokens: int = 256
    """Longest answer."""
    least: int = 10
    """Pairs that have to be left after the judge's scores."""
    seed: Seed = 0
    """Seed of what is drawn."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        """Write, judge, read and print."""
        from jaxsteer.study.rollouts import persona_rollouts
        from jaxsteer.writers.endpoint import Endpoint

        found = persona_rollouts(
            self.model, self.trait, Endpoint(url=self.judge, model=self.judge_model), out=self.out,
            samples=self.samples, max_new_tokens=self.max_new_tokens, least=self.least, seed=self.seed,
        ).result  # fmt: skip
        print(document(found.to_json()) if self.json else f"{found.table()}\n\nWrote vectors to {self.out}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Direction:
    """Directions of a persona in a model."""

    action: (
        Annotated[Probe, subcommand("probe")]
        | Annotated[Rollouts, subcommand("rollouts")]
        | Annotated[Show, subcommand("show")]
    )

    def run(self) -> int:
        """Run the chosen action."""
        return self.action.run()
