"""Second moments of keys, C = E[k k^T] over the tokens of text, of several layers in one pass.

Texts are streamed; sums lie on the devices, split over the model's mesh, in float32. At every doubling of the tokens
the relative change of C since the last one and its effective rank, tr(C)^2 / tr(C^2), are noted: nobody need wait for
more text than changes anything. What was cut off goes on to the same bytes. A finished covariance is a file that is
named by the model's fingerprint, the text's hash and the options, and is read wherever it is asked for again.

Letters: B rows, T time, I MLP width, l layers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.checkpoints.loading import cache_dir
from jaxsteer.display import aligned, compact
from jaxsteer.errors import UserError
from jaxsteer.files import make_directory, parse_json, read_tensors, tensor_bytes, write_bytes
from jaxsteer.files.lock import in_use
from jaxsteer.files.records import Record
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import Keep, run_layers, scan_blocks
from jaxsteer.models.model import Model
from jaxsteer.models.params import Params
from jaxsteer.models.sharding import place, require_memory, shard_rows
from jaxsteer.models.transformer import embed, make_context, positions_of
from jaxsteer.processes import as_first, is_first, to_host
from jaxsteer.ranges import MOST, Large, Range, Seed, check_ranges
from jaxsteer.rewrite.lowrank import KEY
from jaxsteer.rewrite.solve import Solver
from jaxsteer.sae.harvest import rows_of
from jaxsteer.sae.texts import FileDocuments, documents_of

log = logging.getLogger(__name__)

STATE, FILE, FORMAT = "state.safetensors", "block_{:03d}.safetensors", "jaxsteer.covariance/1"
HALVINGS = 6
"""Doublings of the tokens that are noted, the last of them the whole."""
SAVE_S = 60.0
"""Seconds between two saves of what was summed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CovarianceOptions:
    """How much text is read, and in which shape."""

    tokens: Large = 100_000
    """Tokens that keys are read at. (The papers: 100,000 articles of Wikipedia.)"""
    context: Annotated[int, Range(2, MOST)] = 128
    """Tokens of a row; longer texts are cut."""
    rows: int = 16
    """Rows at once."""
    seed: Seed = 0
    """Seed of the order of texts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convergence(Record):
    """How far a covariance had come."""

    tokens: int
    change: float
    """|C - C'| / |C| (Frobenius), C' that of about half as many tokens; NaN for the first."""
    rank: float
    """tr(C)^2 / tr(C^2): the number of directions that keys are spread over."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Covariance:
    """C of one layer, and how it came about."""

    layer: int
    matrix: Float[np.ndarray, "I I"]
    """E[k k^T], float32."""
    tokens: int
    curve: tuple[Convergence, ...]
    model: str
    fingerprint: str
    text: str
    """Hash of the text."""

    def solver(self, *, ridge: float = 0.0) -> Solver:
        """Factorised. Raises ``UserError`` for fewer tokens than keys have entries, without a ridge."""
        if self.tokens < len(self.matrix) and not ridge:
            raise UserError(_TOO_LITTLE.format(self.tokens, len(self.matrix)))
        return Solver.of(self.matrix, ridge=ridge)

    def table(self) -> str:
        """The curve as aligned text."""
        rows = [("tokens", "change", "effective rank")]
        rows += [(f"{one.tokens:,}", f"{one.change:.4f}", compact(one.rank)) for one in self.curve]
        return aligned(rows, left=(), note=f"block {self.layer}, keys of {len(self.matrix):,} entries")


_TOO_LITTLE = (
    "a covariance from {:,} tokens of keys with {:,} entries has no inverse: give more text (--data, --tokens), at "
    "best ten times as many tokens as entries, or a ridge (--ridge 1e-2)"
)


def save_covariance(covariance: Covariance, path: str | Path) -> None:
    """Write a safetensors file of one covariance."""
    facts = {"format": FORMAT, "layer": str(covariance.layer), "tokens": str(covariance.tokens)}
    facts |= {name: getattr(covariance, name) for name in ("model", "fingerprint", "text")}
    facts["curve"] = json.dumps([one.to_json() for one in covariance.curve])
    write_bytes(path, tensor_bytes({"covariance": covariance.matrix}, facts))


def load_covariance(path: str | Path, *, model: Model | None = None) -> Covariance:
    """The covariance in a file. Raises ``UserError`` for other files and, with a ``model``, for other weights."""
    tensors, facts = read_tensors(path, "covariance")
    wanted = {"layer", "tokens", "model", "fingerprint", "text", "curve"}
    if facts.get("format") != FORMAT or set(tensors) != {"covariance"} or not wanted <= facts.keys():
        raise UserError(
            f"{path} is no covariance of jaxsteer ({FORMAT}): it has the tensors {', '.join(sorted(tensors))}"
        )
    if model is not None and facts["fingerprint"] != model.fingerprint:
        raise UserError(
            f"{path} holds keys of {facts['model']} (weights {facts['fingerprint'][:12]}), not of {model.name} "
            f"({model.fingerprint[:12]}): measure the covariance of this model"
        )
    curve = parse_json(facts["curve"], path, nan=True)
    return Covariance(
        layer=int(facts["layer"]),
        matrix=tensors["covariance"],
        tokens=int(facts["tokens"]),
        curve=tuple(Convergence.from_json(one, str(path)) for one in curve),
        model=facts["model"],
        fingerprint=facts["fingerprint"],
        text=facts["text"],
    )


def text_hash(model: Model, data: Sequence[str | Path], seed: int) -> str:
    """What tells one text from another: the contents of the files and the seed of their order."""
    found = hashlib.sha256(json.dumps([seed, [] if data else model.name]).encode())
    for path in data:
        with open(path, "rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def covariances(
    model: Model,
    layers: Sequence[int],
    data: Sequence[str | Path] = (),
    *,
    options: CovarianceOptions = CovarianceOptions(),
    folder: str | Path | None = None,
    save_s: float = SAVE_S,
    progress: Callable[..., None] | None = None,
) -> dict[int, Covariance]:
    """The covariances of keys of ``layers``, by layer.

    ``data`` are text files as ``documents_of`` takes them (an organism brings its own corpus). Files and what an
    interrupted call has summed are in ``folder`` (default: the cache). ``progress(done, total, **shown)`` counts
    tokens. Raises ``UserError`` for layers that the model does not have, sums that do not fit in memory, and texts
    that hold fewer tokens than keys have entries; warns of texts that hold fewer than were asked for.
    """
    check_ranges(options)
    layers = sorted(set(layers))
    for layer in layers:
        if not 0 <= layer < model.config.n_layers:
            raise UserError(f"there is no block {layer}: {model.name} has blocks 0 to {model.config.n_layers - 1}")
    documents = documents_of(model, data, seed=options.seed)
    about = {"model": model.fingerprint, "text": text_hash(model, data, options.seed), **dataclasses.asdict(options)}
    about["dtype"] = str(model.params.embed.dtype)
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    path = (cache_dir() / "covariances" if folder is None else Path(folder)) / name
    files = {layer: path / FILE.format(layer) for layer in layers}
    missing = [layer for layer in layers if not files[layer].is_file()]
    if missing:
        size = 4 * len(missing) * model.config.d_mlp**2
        require_memory("Covariances", 3 * size, model.mesh, "ask for fewer layers at a time.")
        make_directory(path.parent)
        with in_use(path):
            sums = _Sums(model, _layers_of(path / STATE, missing), path / STATE)
            for found in sums.read(documents, options, save_s, progress, about["text"]):
                if is_first():
                    save_covariance(found, path / FILE.format(found.layer))
            if is_first():
                (path / STATE).unlink(missing_ok=True)
    return {layer: load_covariance(files[layer], model=model) for layer in layers}


def _layers_of(state: Path, missing: Sequence[int]) -> tuple[int, ...]:
    """The layers to sum for: those that an interrupted call summed for, if all that are missing are among them."""
    if state.is_file():
        summed = tuple(parse_json(read_tensors(state, "state of a covariance")[1]["state"], state, nan=True)["layers"])
        if set(missing) <= set(summed):
            return summed
        state.unlink()
    return tuple(missing)


class _Sums:
    """Sums of products of keys, and where the reading of text has got to."""

    def __init__(self, model: Model, layers: tuple[int, ...], file: Path) -> None:
        self.model, self.layers, self.file = model, layers, file
        shape = (len(layers), model.config.d_mlp, model.config.d_mlp)
        self.sharding = _sharding(model.mesh, shape)
        self.sums, self.before = (jnp.zeros(shape, jnp.float32, device=self.sharding) for _ in range(2))
        self.tokens, self.marked = 0, 0
        self.position = (0, 0)
        self.curves: list[list[dict[str, Any]]] = [[] for _ in layers]
        if file.is_file():
            self._restore()

    def read(
        self,
        documents: Any,
        options: CovarianceOptions,
        save_s: float,
        progress: Callable[..., None] | None,
        text: str,
    ) -> list[Covariance]:
        """Sum until there are enough tokens, or no more text."""
        model, config = self.model, self.model.config
        rows, bos = rows_of(model, documents, rows=options.rows, context=options.context, position=self.position)
        last = len(documents) if isinstance(documents, FileDocuments) else None
        marks = [options.tokens >> i for i in reversed(range(HALVINGS))]
        saved = time.monotonic()
        while self.tokens < options.tokens and (last is None or self.position[0] < last):
            tokens, mask, self.position = rows.next()
            counted = mask & (np.cumsum(mask, 1) > 1) & (tokens != bos)
            arrays = (shard_rows(model.mesh, one) for one in (tokens, mask, counted))
            self.sums = _add(model.mesh, self.sums.shape)(
                self.sums, model.params, *arrays, config=config, layers=self.layers
            )
            self.tokens += int(counted.sum())
            ended = self.tokens >= options.tokens or (last is not None and self.position[0] >= last)
            if ended or (self.marked < HALVINGS and self.tokens >= marks[self.marked]):
                self._mark(marks)
            if as_first(time.monotonic() - saved > save_s) and not ended:
                self._save()
                saved = time.monotonic()
            if progress is not None:
                change = self.curves[0][-1]["change"] if self.curves[0] else float("nan")
                progress(min(self.tokens, options.tokens), options.tokens, change=f"{change:.3f}")
        if self.tokens < options.tokens:
            log.warning(
                "the text holds %s tokens, fewer than the %s that were asked for", f"{self.tokens:,}",
                f"{options.tokens:,}",
            )  # fmt: skip
        matrices = to_host(self.sums) / np.float32(self.tokens)
        return [
            Covariance(
                layer=layer,
                matrix=(matrix + matrix.T) / 2,
                tokens=self.tokens,
                curve=tuple(Convergence(**one) for one in curve),
                model=model.name,
                fingerprint=model.fingerprint,
                text=text,
            )
            for layer, matrix, curve in zip(self.layers, matrices, self.curves, strict=True)
        ]

    def _mark(self, marks: Sequence[int]) -> None:
        """Note how far the sums have come."""
        now, before = self.sums / self.tokens, self.before
        change, rank = to_host(_compared(now, before))
        for curve, moved, spread in zip(self.curves, change, rank, strict=True):
            first = not curve
            curve.append(
                {"tokens": self.tokens, "change": float("nan") if first else float(moved), "rank": float(spread)}
            )
        self.before = now
        self.marked = sum(mark <= self.tokens for mark in marks)

    def _save(self) -> None:
        tensors = {"sums": to_host(self.sums), "before": to_host(self.before)}
        state = {name: getattr(self, name) for name in ("layers", "tokens", "marked", "position", "curves")}
        if is_first():
            write_bytes(self.file, tensor_bytes(tensors, {"state": json.dumps(state)}))

    def _restore(self) -> None:
        """What an earlier call of the same has summed."""
        tensors, facts = read_tensors(self.file, "state of a covariance")
        state = parse_json(facts["state"], self.file, nan=True)
        self.sums, self.before = (jax.device_put(tensors[name], self.sharding) for name in ("sums", "before"))
        self.tokens, self.marked, self.curves = state["tokens"], state["marked"], state["curves"]
        self.position = tuple(state["position"])


def _sharding(mesh: Mesh | None, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """Rows of the matrices over all devices."""
    return place(mesh, P(None, ("prompts", "model")), shape)


@lru_cache(maxsize=8)
def _add(mesh: Mesh | None, shape: tuple[int, ...]) -> Any:
    """The compiled addition of a batch to sums of one shape."""

    @partial(jax.jit, static_argnames=("config", "layers"), donate_argnums=0, out_shardings=_sharding(mesh, shape))
    def add_keys(
        sums: Float[Array, "l I I"],
        params: Params,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        counted: Bool[Array, "B T"],
        *,
        config: ModelConfig,
        layers: tuple[int, ...],
    ) -> Float[Array, "l I I"]:
        def products(keys: Float[Array, "B T I"], _: None) -> Float[Array, "I I"]:
            wide = jnp.where(counted[:, :, None], keys.astype(jnp.float32), 0.0)
            return jnp.einsum("bti,btj->ij", wide, wide, precision=lax.Precision.HIGHEST)

        context = make_context(config, positions_of(mask), mask)
        x = run_layers(params, config, embed(params, config, tokens, context.positions), context, 0, layers[0])
        keep = [Keep((KEY,), products, layers)]
        _, (found,) = scan_blocks(params, config, x, context, layers[0], layers[-1] + 1, keep=keep)
        return sums + found

    return add_keys


@jax.jit
def _compared(now: Float[Array, "l I I"], before: Float[Array, "l I I"]) -> tuple[Array, Array]:
    """The relative change and the effective rank of every matrix."""
    squares = jnp.sum(now**2, (1, 2))
    change = jnp.sqrt(jnp.sum((now - before) ** 2, (1, 2)) / squares)
    return change, jnp.trace(now, axis1=1, axis2=2) ** 2 / squares
