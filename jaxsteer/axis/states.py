"""States of rollouts: the mean over what the assistant said, at every block, kept in shards.

A shard is a safetensors file: ``rows`` are the numbers of the rollouts that said something, and under the name of each
site stand their states, float32 [rows, D]. Reading one site of a million rollouts does not read the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from safetensors import safe_open

from jaxsteer.axis.rollouts import SHARD
from jaxsteer.axis.transcripts import Transcript
from jaxsteer.errors import UserError
from jaxsteer.files import make_directory, tensor_bytes, write_bytes
from jaxsteer.models.model import Model
from jaxsteer.models.reading import direction_sites, read_rows
from jaxsteer.processes import from_first, is_first
from jaxsteer.prompts import encode_turns

ROWS = "rows"


@dataclasses.dataclass(frozen=True, kw_only=True)
class States:
    """States of rollouts on disk."""

    shards: tuple[Path, ...]
    sites: tuple[str, ...]

    def rows(self) -> Int[np.ndarray, " n"]:
        """Numbers of the rollouts that have states, rising."""
        return np.concatenate([self._read(path, ROWS) for path in self.shards])

    def at(self, site: str) -> Float[np.ndarray, "n D"]:
        """Their states at one site."""
        return np.concatenate([self._read(path, site) for path in self.shards])

    def _read(self, path: Path, name: str) -> np.ndarray:
        with safe_open(path, framework="numpy") as file:
            found: np.ndarray = file.get_tensor(name)
        return found


def read_states(
    model: Model,
    transcripts: Sequence[Transcript],
    sites: Sequence[str],
    folder: Path,
    *,
    batch: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> States:
    """The mean of the stream over all tokens that the assistant said, of each rollout, at ``sites``.

    Rollouts that say nothing have none. Shards that stand in ``folder`` are not read again. Raises ``UserError`` for
    sites outside of the stream, and for a conversation longer than the model's positions.
    """
    found = direction_sites(model, sites)
    shards = []
    make_directory(folder)
    for number, begin in enumerate(range(0, len(transcripts), SHARD)):
        path = folder / f"{number:05d}.safetensors"
        shards.append(path)
        if from_first(path.exists):
            continue
        encoded = [
            encode_turns(model.tokenizer, [dict(turn) for turn in one.messages], generation_prompt=False)
            for one in transcripts[begin : begin + SHARD]
        ]
        masks = [one.mask("assistant") for one in encoded]
        said = [i for i, mask in enumerate(masks) if mask.any()]
        for i in said:
            if len(encoded[i].ids) > model.config.max_positions:
                raise UserError(
                    f"rollout {begin + i} ({transcripts[begin + i].role}) has {len(encoded[i].ids)} tokens, but "
                    f"{model.name} has {model.config.max_positions} positions: leave it out, or shorten it"
                )
        states = np.empty((len(found), len(said), model.config.d_model), np.float32)
        rows, reads = [encoded[i].ids for i in said], [masks[i] for i in said]
        for numbers, values in read_rows(model, rows, reads, found, batch_size=batch) if said else ():
            states[:, numbers] = values
        tensors = {site.name: array for site, array in zip(found, states, strict=True)}
        if is_first():
            write_bytes(path, tensor_bytes(tensors | {ROWS: np.asarray(said, np.int64) + begin}))
        from_first(path.exists)  # the others wait until it is written
        if progress is not None:
            progress(min(begin + SHARD, len(transcripts)), len(transcripts))
    return States(shards=tuple(shards), sites=tuple(site.name for site in found))
