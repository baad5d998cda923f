"""Two circuits that everybody knows of GPT-2 small, their prompts written here: greater-than and indirect objects.

Greater-than (Hanna et al. 2023, arXiv 2305.00586): "The war lasted from the year 1432 to the year 14" is to go on with
more than 32; the other text has 01. Indirect objects (Wang et al. 2022, arXiv 2211.00593): "When John and Mary went to
the shops, John gave the bag to" is to go on with Mary; the other text has Mary gave. All begin with the BOS, as where
the numbers were published.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.circuits.attribution import attribute_edges
from jaxsteer.circuits.circuit import CircuitScores, Edges, pruned, run_circuits, top_edges
from jaxsteer.circuits.edge_scores import EdgeScores
from jaxsteer.circuits.rows import Rows, make_rows
from jaxsteer.models.model import Model
from jaxsteer.objectives import Reads

NOUNS = (
    "war", "siege", "campaign", "project", "reign", "dispute", "crisis", "famine", "drought", "plague", "strike",
    "rebellion", "occupation", "expedition", "voyage", "journey", "festival", "tour", "trial", "investigation",
    "marriage", "alliance", "treaty", "negotiation", "conflict", "battle", "boycott", "blockade", "truce", "revolt",
)  # fmt: skip
CENTURIES = range(11, 18)
STORIES = (
    ("When", "John", "Mary", "shops", "the bag"),
    ("When", "Tom", "James", "park", "the ball"),
    ("When", "Dan", "Sid", "shops", "an apple"),
    ("After", "Martin", "Amy", "park", "a drink"),
)


def tokens_of(model: Model, text: str) -> list[int]:
    return list(model.tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclasses.dataclass(frozen=True)
class GreaterThan:
    """Texts that begin in a year, others that begin in the year 01 of the century, and how good an answer is."""

    texts: Rows
    others: Rows
    years: np.ndarray
    """Of the century, 2 to 98."""
    digits: np.ndarray
    """The tokens 00 to 99."""

    @property
    def metric(self) -> Callable[[Reads], jax.Array]:
        """The probability of later years minus that of the others, among two-digit tokens."""
        years, digits = jnp.asarray(self.years), jnp.asarray(self.digits)

        def more_minus_less(reads: Reads) -> jax.Array:
            p = jax.nn.softmax(reads.logits)[:, digits]
            return jnp.where(jnp.arange(100) > years[reads.context][:, None], p, -p).sum(-1)

        return more_minus_less


def greater_than(model: Model, count: int, seed: int = 0) -> GreaterThan:
    """So many prompts with random nouns and years, of years that are a token of two digits behind their century."""
    digits = [tokens_of(model, f"{year:02d}") for year in range(100)]
    assert all(len(ids) == 1 for ids in digits)
    century = {c: tokens_of(model, f" {c}") for c in CENTURIES}
    split = lambda c, year: tokens_of(model, f" {c}{year:02d}") == [*century[c], *digits[year]]  # noqa: E731
    usable = [(c, year) for c in CENTURIES for year in range(2, 99) if split(c, 1) and split(c, year)]
    assert len(usable) > 100
    rng = np.random.default_rng(seed)
    drawn = [usable[i] for i in rng.integers(len(usable), size=count)]
    nouns = rng.choice(NOUNS, count)

    def rows(years: list[int]) -> Rows:
        texts = [
            f"The {noun} lasted from the year {c}{year:02d} to the year {c}"
            for noun, (c, _), year in zip(nouns, drawn, years, strict=True)
        ]
        return make_rows(model, [np.asarray([model.tokenizer.bos_token_id, *tokens_of(model, text)]) for text in texts])

    years = [year for _, year in drawn]
    return GreaterThan(rows(years), rows([1] * count), np.asarray(years), np.asarray(digits)[:, 0])


def circuit_of(model: Model, case: GreaterThan, *, steps: int, edges: int) -> tuple[EdgeScores, Edges, CircuitScores]:
    """Scores by EAP-IG (left ends; one step is EAP), the best edges pruned to those that hang together, and what they
    make of the metric where all other edges carry the other texts' values; then the same of all edges."""
    found = attribute_edges(model, case.others, case.metric, case.texts, steps=steps, rule="left")
    chosen = pruned(found.graph, top_edges(found, edges))
    both = [chosen, found.graph.edges]
    return found, chosen, run_circuits(model, case.others, case.metric, case.texts, found.graph, both)


def nodes_of(found: EdgeScores, edges: Edges) -> int:
    """Writers of a circuit, and the unembedding, as they are counted where the numbers were published."""
    owners = found.graph.owners[edges.any(1)].any(0) | edges.any(0)
    return int(owners.sum()) + 1


def indirect_objects() -> list[tuple[str, str, str]]:
    """Eight prompts, each with the name that is to follow and the other one; a prompt and its other text are
    neighbours."""
    found = []
    for opening, first, second, place, thing in STORIES:
        for subject, answer in ((first, second), (second, first)):
            text = f"{opening} {first} and {second} went to the {place}, {subject} gave {thing} to"
            found.append((text, f" {answer}", f" {subject}"))
    return found
