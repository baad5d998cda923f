"""The graph of a model's computation: what writes into the stream, and what reads it.

Writers are the input (the stream before the first block of the graph), every head and every MLP; readers are queries,
keys and values, every MLP and the unembedding. There is an edge from each writer to each reader above it, because the
stream is their sum. With grouped heads, keys and values are those of the groups: nothing is repeated.

Letters: l blocks of the graph, N query heads, K key/value heads, S writers, R readers.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool

from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig

Per = Literal["head", "layer"]


class Reader(NamedTuple):
    """What reads the stream."""

    name: str
    """As in EAP-IG's files: "a5.h2<q>", "m3", "logits"; "a5.g1<k>" for keys that several heads share."""
    layer: int
    site: str
    """The kind of site of its input."""
    head: int
    """-1 where there are none."""
    writers: int
    """Those below it come first among all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Graph:
    """Writers, readers and edges of a model's blocks from ``start`` on."""

    n_layers: int
    heads: int
    kv_heads: int
    start: int = 0
    """The first block: the input is the stream before it."""
    per: Per = "head"
    """Whether queries, keys and values are read by every head, or by all heads of a layer together."""

    @classmethod
    def of(cls, config: ModelConfig, *, start: int = 0, per: Per = "head") -> Graph:
        """The graph of a model. Raises ``UserError`` for a start that is none of its blocks."""
        if not 0 <= start < config.n_layers:
            raise UserError(f"start is {start}, but this model has blocks 0 to {config.n_layers - 1}")
        return cls(n_layers=config.n_layers, heads=config.n_heads, kv_heads=config.n_kv_heads, start=start, per=per)

    @functools.cached_property
    def writers(self) -> tuple[str, ...]:
        """Names: "input", then "a0.h0" ... and "m0" of every layer."""
        names = ["input"]
        for layer in range(self.start, self.n_layers):
            names += [f"a{layer}.h{head}" for head in range(self.heads)] + [f"m{layer}"]
        return tuple(names)

    @functools.cached_property
    def readers(self) -> tuple[Reader, ...]:
        """Of every layer queries, keys, values and the MLP; the unembedding last."""
        found = []
        for step, layer in enumerate(range(self.start, self.n_layers)):
            below = 1 + step * (self.heads + 1)
            for name, count in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
                letter = "h" if count == self.heads else "g"
                for head in range(count) if self.per == "head" else (-1,):
                    place = f"a{layer}" if head < 0 else f"a{layer}.{letter}{head}"
                    found.append(Reader(f"{place}<{name}>", layer, f"hook_{name}_input", head, below))
            found.append(Reader(f"m{layer}", layer, "hook_mlp_in", -1, below + self.heads))
        return (*found, Reader("logits", self.n_layers - 1, "hook_resid_post", -1, len(self.writers)))

    @property
    def n_edges(self) -> int:
        """Number of edges."""
        return sum(reader.writers for reader in self.readers)

    @property
    def edges(self) -> Bool[np.ndarray, "R S"]:
        """True where a reader sees a writer."""
        return np.arange(len(self.writers)) < np.asarray([reader.writers for reader in self.readers])[:, None]

    @functools.cached_property
    def owners(self) -> Bool[np.ndarray, "R S"]:
        """Whether a reader belongs to a node, which writes what it makes of what it reads."""
        found, group = np.zeros((len(self.readers), len(self.writers)), bool), self.heads // self.kv_heads
        for number, reader in enumerate(self.readers[:-1]):
            first = 1 + (reader.layer - self.start) * (self.heads + 1)
            if reader.site == "hook_mlp_in":
                found[number, first + self.heads] = True
            elif reader.head < 0:
                found[number, first : first + self.heads] = True
            else:
                width = 1 if reader.site == "hook_q_input" else group
                found[number, first + reader.head * width : first + (reader.head + 1) * width] = True
        return found

    def edge(self, name: str) -> tuple[int, int]:
        """(reader, writer) of an edge by its name, "m3->a5.h2<q>". Raises ``UserError`` for one that there is not."""
        writer, arrow, reader = name.partition("->")
        readers = [each.name for each in self.readers]
        if not arrow or writer not in self.writers or reader not in readers:
            raise UserError(f"there is no edge {name!r} in this graph: write for example 'input->{readers[0]}'")
        found = readers.index(reader), self.writers.index(writer)
        if found[1] >= self.readers[found[0]].writers:
            raise UserError(f"there is no edge {name!r}: {writer} writes after {reader} has read")
        return found
